"""`make bench`: times ours beside the peers and writes `_build/bench.json`.

python -m benchmarks             all of it
python -m benchmarks --record    … and keep it as benchmarks/results.json, which the book shows
python -m benchmarks --only bert --rounds 7
python -m benchmarks --only bert --record    measure these again, and keep the other rows of the record
python -m benchmarks --cold      also clone the repository and time `make book` there, cold and unchanged
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported

ROOT = Path(__file__).resolve().parent.parent
TARGET = 0.95
DECODE_FEWER = 3  # a round of writing takes seconds: so many times fewer of them
ABOUT = (
    "Sizes are those of MiniLM: six layers, width 384, twelve heads. A training step runs with the published "
    "dropout and ends in a step of plain gradient descent. `torch.nn.TransformerEncoder` has no embeddings, "
    "heads or pre-trained weights: it runs behind our embeddings. In evaluation it takes a fused path, one "
    "call for a whole layer, which gives no access to the attention weights and overwrites its intermediate "
    "results, as only inference can: hence its smaller memory there. The other families of the first part "
    "have four blocks (an encoder-decoder two and two) of width 256 with eight heads, 4,096 words and their "
    "LM head; their memory is not measured. SmolLM2 writes 32 tokens behind a prompt of 16, greedily, with a "
    "cache; the roofline is the time in which the bytes of weights and cache arrive, at the bandwidth that "
    "multiplying by the model's matrices reaches alone, the prompt's pass not counted. The window of 256 is "
    "compared with torch's kernel on the same queries and keys, 8 heads of 64 in one text of 4,096: handed "
    "the window as a mask, which is the same function; and without a mask or causal, which are others, to "
    "see what is saved. It has no part in the mean."
)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15, help="rounds of each comparison (15)")
    parser.add_argument("--only", default="", help="just the comparisons whose name contains this")
    parser.add_argument("--record", action="store_true", help="write benchmarks/results.json too")
    parser.add_argument("--cold", action="store_true", help="time make book in a fresh clone (half an hour)")
    parser.add_argument("--memory-of", nargs=2, metavar=("CASE", "WHO"), help=argparse.SUPPRESS)
    options = parser.parse_args()

    import torch

    torch.set_num_threads(1)
    if options.memory_of:
        return memory_of(int(options.memory_of[0]), options.memory_of[1])

    from rich.console import Console

    from textbook_code.recorded import machine, versions

    console = Console()
    rows = compare(options.rounds, options.only, console)
    if options.record and options.only:
        again = {(row["what"], row["peer"]): row for row in rows}
        kept = json.loads((ROOT / "benchmarks" / "results.json").read_text("utf-8"))["rows"]
        rows = [again.pop((row["what"], row["peer"]), row) for row in kept] + list(again.values())
    results = {
        "command": "make bench",
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine(),
        "versions": versions() | {"transformers": _version("transformers")},
        "about": ABOUT,
        "rows": rows,
        "other": against_the_faster(rows) + decoded(rows) + other(options.cold, console),
    }
    show(results, console)
    text = json.dumps(results, indent=1, ensure_ascii=False) + "\n"
    for path in [ROOT / "_build" / "bench.json", *([ROOT / "benchmarks" / "results.json"] * options.record)]:
        path.parent.mkdir(exist_ok=True)
        partial = path.with_name(f".{path.name}.partial")
        partial.write_text(text, "utf-8")
        partial.replace(path)
        console.print(f"written: {path.relative_to(ROOT)}")
    return 0


def compare(rounds: int, only: str, console: Console) -> list[dict[str, Any]]:
    """One row for each case and peer: the ratio with its interval, the times, the memory."""
    import statistics

    import torch
    from rich.progress import Progress

    from benchmarks.measure import interleaved, peak_memory, ratio
    from benchmarks.subjects import CASES, OURS, build

    rows = []
    cases = [(i, case) for i, case in enumerate(CASES) if only.lower() in case.what.lower()]
    with Progress(console=console, transient=True) as progress:
        bar = progress.add_task("", total=len(cases) * rounds)
        for index, case in cases:
            progress.update(bar, description=case.what)
            built = {who: build(case, who) for who in (OURS, *case.peers)}
            for who, (_, output) in built.items():
                torch.testing.assert_close(
                    output, built[OURS][1], rtol=1e-4, atol=1e-4, msg=f"{case.what}: {who}"
                )
            works = {who: work for who, (work, _) in built.items()}
            turns = rounds if case.mode != "decode" else max(3, rounds // DECODE_FEWER)
            seconds = interleaved(works, turns, lambda n=rounds / turns: progress.advance(bar, n))
            memory = {who: peak_memory([str(index), who]) if case.with_memory else None for who in works}
            for who in case.peers:
                middle, low, high = ratio(seconds[OURS], seconds[who])
                rows.append(
                    {
                        "what": case.what,
                        "peer": case.peer(who),
                        "ratio": round(middle, 4),
                        "low": round(low, 4),
                        "high": round(high, 4),
                        "ours_seconds": round(statistics.median(seconds[OURS]), 6),
                        "peer_seconds": round(statistics.median(seconds[who]), 6),
                        "memory_ratio": _quotient(memory[OURS], memory[who]),
                        "ours_bytes": memory[OURS],
                        "peer_bytes": memory[who],
                    }
                )
    return rows


def decoded(rows: list[dict[str, Any]]) -> list[dict[str, str]]:
    """What the rows of decoding mean: tokens a second, and the share of what the memory allows."""
    import torch

    from benchmarks import decoding
    from benchmarks.subjects import CASES

    out = []
    for case in CASES:
        row = next((row for row in rows if row["what"] == case.what and case.mode == "decode"), None)
        if row is None:
            continue
        least, bandwidth = decoding.roofline(getattr(torch, case.model), rounds=9)
        for whose, seconds in (("ours", row["ours_seconds"]), ("transformers", row["peer_seconds"])):
            out.append(
                {
                    "what": f"SmolLM2 in {case.model}, {whose}",
                    "value": f"{decoding.NEW / seconds:.1f} tokens a CPU-second, "
                    f"{least / seconds:.0%} of the roofline ({bandwidth / 1e9:.1f} GB/s)",
                }
            )
    return out


def other(cold: bool, console: Console) -> list[dict[str, str]]:
    """The import, the weight of the built pages, and on request the time of `make book`."""
    from benchmarks.measure import import_time, page_weights

    seconds = import_time("textbook_code")
    out = [{"what": "import textbook_code, beyond Python's own start", "value": f"{1000 * seconds:.2g} ms"}]
    pages, shared = page_weights(ROOT / "_build" / "html")
    if pages:
        page = max(pages, key=pages.__getitem__)
        out.append({"what": "HTML pages built", "value": str(len(pages))})
        out.append(
            {"what": "heaviest page, without pictures", "value": f"{pages[page] / 1e6:.2f} MB ({page})"}
        )
        out.append({"what": "styles and scripts that all pages share", "value": f"{shared / 1e6:.2f} MB"})
    if cold:
        out += book_times(console)
    return out


def book_times(console: Console) -> list[dict[str, str]]:
    """Wall time of `make book` in a fresh clone with an empty data cache, and once more without a change."""
    out = []
    with tempfile.TemporaryDirectory() as folder:
        clone = Path(folder) / "book"
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
        env = {
            k: v for k, v in os.environ.items() if k not in ("OMP_NUM_THREADS", "VIRTUAL_ENV", "PYTHONPATH")
        }
        env["TEXTBOOK_CODE_CACHE"] = str(Path(folder) / "cache")
        for what in ("make book, fresh clone and empty data cache", "make book, nothing changed"):
            console.print(f"{what} …")
            started = time.perf_counter()
            done = subprocess.run(
                ["make", "book"], cwd=clone, env=env, capture_output=True, text=True, check=False
            )
            if done.returncode:
                raise RuntimeError(f"make book failed:\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}")
            out.append({"what": what, "value": f"{time.perf_counter() - started:.1f} s"})
    return out


def memory_of(index: int, who: str) -> int:
    """In a process of its own: build one subject and print the bytes of its peak."""
    from benchmarks.measure import own_peak
    from benchmarks.subjects import CASES, build

    work, _ = build(CASES[index], who)
    print(own_peak(work))
    return 0


def show(results: dict[str, Any], console: Console) -> None:
    from rich.table import Table

    table = Table(title="Peer's processor time ÷ ours, one thread: above 1, ours is faster")
    for column in ("what", "peer", "ratio", "95 % interval", "ours", "peer's", "memory ÷ peer's"):
        table.add_column(column, justify="left" if column in ("what", "peer") else "right")
    for row in results["rows"]:
        colour = "green" if row["ratio"] >= 1 else "yellow" if row["ratio"] >= TARGET else "red"
        table.add_row(
            row["what"],
            row["peer"],
            f"[{colour}]{row['ratio']:.3f}[/]",
            f"{row['low']:.3f} to {row['high']:.3f}",
            f"{1000 * row['ours_seconds']:.1f} ms",
            f"{1000 * row['peer_seconds']:.1f} ms",
            "–" if row["memory_ratio"] is None else f"{row['memory_ratio']:.2f}",
        )
    console.print(table)
    below = [f"{what} ({value:.3f})" for what, value in slowest(results["rows"]).items() if value < TARGET]
    console.print(f"below {TARGET} of the faster peer: {', '.join(below) or 'none'}")
    for row in results["other"]:
        console.print(f"{row['what']}: {row['value']}")


def slowest(rows: list[dict[str, Any]]) -> dict[str, float]:
    """For each case the ratio to the faster of its peers; a window is no peer of the whole square."""
    from benchmarks import windows

    faster: dict[str, float] = {}
    for row in rows:
        if row["what"] == windows.WHAT:
            continue
        faster[row["what"]] = min(faster.get(row["what"], math.inf), row["ratio"])
    return faster


def against_the_faster(rows: list[dict[str, Any]]) -> list[dict[str, str]]:
    ratios = slowest(rows).values()
    if not ratios:
        return []
    mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
    return [{"what": "geometric mean of the ratios to the faster peer of each pair", "value": f"{mean:.3f}"}]


def _quotient(a: int | None, b: int | None) -> float | None:
    return round(a / b, 3) if a and b else None


def _version(package: str) -> str:
    from importlib.metadata import version

    return version(package)


if __name__ == "__main__":
    sys.exit(main())
