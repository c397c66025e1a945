"""Experiments too long for a page: run once, recorded with all that is needed to run them again.

An experiment is a file `experiments/NAME.py` with

    ABOUT       what it asks, in a sentence or two
    CONFIG      everything that can be set, JSON-able, with the list of `seeds`
    DATA        the sources it reads (`textbook_code.data.sources`)
    TOLERANCE   how far a repetition may be from the record: `loss`, relative, of each of the first
                steps, and `results`, absolute
    REPLAY      the arms whose first steps a quick test repeats
    arms(config)                           the names of its independent parts, such as "causal/seed-0"
    run(config, arm, *, steps=None, log)   one arm: calls `log(loss, of=total)` after each step and returns
                                           its results; with `steps`, stops after so many of them
    summarise(config, runs)                what the book quotes, from the results of all arms

and, where it trains a model that the package is to carry (see `textbook_code.checkpoints`),

    CHECKPOINT  {"name", "arm", "metric"}: the checkpoint's name, the arm whose model it is, and which of
                that arm's results measures it; with "interval" the name of the result that bounds it
    sample(config, model)                  a figure of the model that is quickly computed, as a test does

in which case `run` returns for that arm the pair (results, model), or (results, model, tokenizer) where the
model reads text. Only the command `run` keeps the model. And `NAME.json` beside it is what it gave.

    python -m textbook_code.recorded run NAME        run it and write the record; goes on where it stopped
    python -m textbook_code.recorded replay NAME     repeat the first steps and compare the losses
    python -m textbook_code.recorded verify NAME     repeat all of it and compare the results

Book: recorded-experiments
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import Any

from textbook_code.imports import needed_files

_PACKAGE = Path(__file__).resolve().parent
_PARTS = ("ABOUT", "CONFIG", "DATA", "TOLERANCE", "REPLAY", "arms", "run", "summarise")
_DIGITS = 6  # significant digits of a recorded loss


class RecordError(ValueError):
    """There is no such experiment or record, or it is incomplete.

    Book: recorded-experiments
    """


@dataclass(frozen=True)
class Recorded:
    """What an experiment gave, and where, when and from what.

    `runs` holds each arm's own results, `curves` the loss of each of its steps, `results` what the
    experiment makes of them; `source_sha256` is one hash over `sources`, the experiment's file and all of
    the package that it imports.

    Book: recorded-experiments
    """

    name: str
    about: str
    command: str
    date: str
    machine: str
    versions: dict[str, str]
    cpu_seconds: float
    source_sha256: str
    sources: dict[str, str]
    data: list[str]
    config: dict[str, Any]
    seeds: list[int]
    tolerance: dict[str, float]
    results: dict[str, Any]
    runs: dict[str, dict[str, Any]] = field(repr=False)
    curves: dict[str, list[float]] = field(repr=False)


@dataclass(frozen=True)
class Replay:
    """How far the repeated first steps were from the record; true when within the tolerance.

    `worst` is the greatest relative difference of a loss, seen at step `step` (from 1) of `arm`.

    Book: recorded-experiments
    """

    name: str
    steps: int
    arms: tuple[str, ...]
    worst: float
    arm: str
    step: int
    tolerance: float

    def __bool__(self) -> bool:
        return self.worst <= self.tolerance

    def __str__(self) -> str:
        return (
            f"{self.name}: {self.steps} steps of {', '.join(self.arms)} repeated; the losses differ by at "
            f"most {self.worst:.1e} ({self.arm}, step {self.step}), {'within' if self else 'beyond'} the "
            f"tolerance of {self.tolerance:.0e}"
        )


class Log:
    """Keeps the losses of one arm and shows how far it is; an experiment calls it after each step.

    Book: recorded-experiments
    """

    def __init__(self, show: Callable[[int, int, float], None] | None = None) -> None:
        self.losses: list[float] = []
        self._show = show

    def __call__(self, loss: float, *, of: int) -> None:
        """Note the loss of a step, the arm having `of` of them."""
        self.losses.append(float(f"{float(loss):.{_DIGITS}g}"))
        if self._show:
            self._show(len(self.losses), of, self.losses[-1])


def folder() -> Path:
    """Where the experiments are: in the wheel beside the modules, else in the checkout.

    Book: recorded-experiments
    """
    shipped = _PACKAGE / "_experiments"
    return shipped if shipped.is_dir() else _PACKAGE.parent / "experiments"


def names() -> list[str]:
    """The experiments there are.

    Book: recorded-experiments
    """
    return sorted(path.stem for path in folder().glob("*.py") if not path.stem.startswith("_"))


def load(name: str) -> Recorded:
    """The record of experiment `name`.

    Raises: RecordError when there is none, naming those there are, or when a field is missing.

    Book: recorded-experiments
    """
    path = folder() / f"{name}.json"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in folder().glob("*.json"))) or "none"
        raise RecordError(f"name: no record of {name!r}; recorded are: {known}")
    try:
        return Recorded(**json.loads(path.read_text("utf-8")))
    except (TypeError, ValueError) as error:
        raise RecordError(f"{path.name}: not a complete record ({error})") from error


def experiment(name: str) -> ModuleType:
    """The module of experiment `name`, loaded from its file.

    Raises: RecordError when there is none or when one of its parts is missing.

    Book: recorded-experiments
    """
    path = folder() / f"{name}.py"
    if name not in names():
        raise RecordError(f"name: got {name!r}, expected one of {', '.join(names())}")
    spec = importlib.util.spec_from_file_location(f"experiments.{name}", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    missing = [part for part in _PARTS if not hasattr(module, part)]
    if missing:
        raise RecordError(f"{path.name}: it defines no {', '.join(missing)}")
    return module


def record(
    name: str, *, kept: Path | None = None, quiet: bool = False, model_folder: Path | None = None
) -> Recorded:
    """Run all arms of an experiment on one thread and return the record, which is not yet written.

    Each arm that is done is noted in the file `kept`, and a later call with the same file, config and
    sources goes on with the next one. The model of an experiment with a `CHECKPOINT` is written to
    `model_folder`, if given, in half precision.

    Book: recorded-experiments
    """
    module, sources = experiment(name), source_hashes(folder() / f"{name}.py")
    key = _digest({"config": module.CONFIG, "sources": sources, "torch": _version("torch")})
    earlier = json.loads(kept.read_text("utf-8")) if kept and kept.is_file() else {}
    done: dict[str, Any] = earlier["arms"] if earlier.get("key") == key else {}
    with _one_thread(), _progress(module.arms(module.CONFIG), done, quiet) as begin:
        for arm in module.arms(module.CONFIG):
            if arm in done:
                continue
            log, started = Log(begin(arm)), time.process_time()
            result, *model = _with_model(module, arm, module.run(module.CONFIG, arm, log=log))
            seconds = round(time.process_time() - started, 1)
            done[arm] = {"result": result, "losses": log.losses, "cpu_seconds": seconds}
            if model and model_folder:
                done[arm]["model"] = _keep_model(module, model_folder, *model)
            if kept:
                _write(kept, {"key": key, "arms": done})
    runs = {arm: done[arm]["result"] for arm in module.arms(module.CONFIG)}
    return Recorded(
        name=name,
        about=module.ABOUT,
        command=f"python -m textbook_code.recorded run {name}",
        date=datetime.now(UTC).date().isoformat(),
        machine=machine(),
        versions=versions(),
        cpu_seconds=round(sum(arm["cpu_seconds"] for arm in done.values()), 1),
        source_sha256=_digest(sources),
        sources=sources,
        data=list(module.DATA),
        config=module.CONFIG,
        seeds=list(module.CONFIG.get("seeds", [])),
        tolerance=module.TOLERANCE,
        results=module.summarise(module.CONFIG, runs),
        runs=runs,
        curves={arm: done[arm]["losses"] for arm in runs},
    )


def save(recorded: Recorded) -> Path:
    """Write the record beside its experiment.

    Raises: RecordError in an installed package, which has nowhere to keep one.

    Book: recorded-experiments
    """
    if folder().parent == _PACKAGE:
        raise RecordError("run: an experiment is recorded in a checkout; an installed package can replay it")
    path = folder() / f"{recorded.name}.json"
    _write(path, asdict(recorded))
    return path


def _with_model(module: ModuleType, arm: str, returned: Any) -> tuple[Any, ...]:
    """What an arm returned, as its results and, of the checkpoint's arm, the model and its tokenizer."""
    wanted = getattr(module, "CHECKPOINT", {}).get("arm") == arm
    if wanted != isinstance(returned, tuple):
        expected = "a pair of results and model, being the checkpoint's" if wanted else "its results alone"
        raise RecordError(f"run: expected of {arm} {expected}, got {type(returned).__name__}")
    return returned if wanted else (returned,)


def _keep_model(module: ModuleType, folder: Path, model: Any, tokenizer: Any = None) -> dict[str, Any]:
    """Write the model beside the arms that are done; what the manifest is to say of it."""
    from textbook_code import checkpoints

    sample = module.sample(module.CONFIG, model) if hasattr(module, "sample") else None
    checkpoints.export(model, folder, tokenizer=tokenizer)
    return {"class": type(model).__name__, "sample": sample}


def save_checkpoint(recorded: Recorded, kept: Path, model_folder: Path) -> Path | None:
    """Take the model of an experiment with a `CHECKPOINT` into the package; None where there is no such.

    Args:
        recorded: what `record` returned.
        kept, model_folder: as given to `record`.

    Raises: RecordError when the model is not there, or the arm has no such result.

    Book: recorded-experiments
    """
    from textbook_code import checkpoints

    wanted = getattr(experiment(recorded.name), "CHECKPOINT", None)
    if wanted is None:
        return None
    arm, metric = wanted["arm"], wanted["metric"]
    about = json.loads(kept.read_text("utf-8"))["arms"][arm].get("model")
    if about is None or not model_folder.is_dir():
        raise RecordError(f"{recorded.name}: the model of {arm} was not kept; run it again with --restart")
    result = recorded.runs[arm]
    missing = [key for key in (metric, wanted.get("interval", metric)) if key not in result]
    if missing:
        raise RecordError(f"CHECKPOINT: {arm} has no {missing[0]!r}, expected one of {', '.join(result)}")
    seed = re.search(r"seed-(\d+)", arm)
    entry = {
        "class": about["class"],
        "experiment": recorded.name,
        "arm": arm,
        "seed": int(seed.group(1)) if seed else None,
        "metric": metric,
        "value": result[metric],
        "interval": result[wanted["interval"]] if "interval" in wanted else None,
        "sample": about["sample"],
    }
    return checkpoints.adopt(model_folder, wanted["name"], entry)


def replay(name: str, *, steps: int = 20, arms: Sequence[str] | None = None) -> Replay:
    """Repeat the first `steps` steps of the experiment's `REPLAY` arms and compare the losses.

    Raises: RecordError when there is no record, or when it has no such arm.

    Book: recorded-experiments
    """
    if steps < 1:
        raise ValueError(f"steps: got {steps}, expected at least 1")
    recorded, module = load(name), experiment(name)
    worst, where, count = -1.0, ("", 0), 0
    arms = list(arms or module.REPLAY)
    for arm in arms:
        if arm not in recorded.curves:
            raise RecordError(f"arms: {name} has no {arm!r}, expected some of {', '.join(recorded.curves)}")
        log = Log()
        with _one_thread():
            module.run(recorded.config, arm, steps=steps, log=log)
        expected = recorded.curves[arm][:steps]
        if len(log.losses) != len(expected):
            raise RecordError(f"{name}: {arm} ran {len(log.losses)} steps, the record has {len(expected)}")
        count = max(count, len(expected))
        for step, (got, wanted) in enumerate(zip(log.losses, expected, strict=True), start=1):
            difference = abs(got - wanted) / max(abs(wanted), 1e-12)
            if not difference <= worst:  # a nan is the worst of all
                worst, where = difference, (arm, step)
    return Replay(name, count, tuple(arms), worst, *where, recorded.tolerance["loss"])


def differences(old: Recorded, new: Recorded) -> list[str]:
    """Where the results of `new` are further from those of `old` than its tolerance, one line each.

    Book: recorded-experiments
    """
    before, after = dict(_leaves(old.results)), dict(_leaves(new.results))
    out = [f"{key}: only in one of the two" for key in sorted(before.keys() ^ after.keys())]
    for key in sorted(before.keys() & after.keys()):
        was, now = before[key], after[key]
        numbers = all(isinstance(x, int | float) and not isinstance(x, bool) for x in (was, now))
        if not (abs(now - was) <= old.tolerance["results"] if numbers else now == was):
            out.append(f"{key}: was {was}, is {now} (tolerance {old.tolerance['results']:g})")
    return out


def source_hashes(path: Path) -> dict[str, str]:
    """The sha256 of a file and of every module of this package that it imports, also indirectly.

    Book: recorded-experiments
    """
    modules = needed_files(path.read_text("utf-8"), package=_PACKAGE)
    named = {f"experiments/{path.name}": path}
    named |= {module.relative_to(_PACKAGE.parent).as_posix(): module for module in sorted(modules)}
    return {name: hashlib.sha256(file.read_bytes()).hexdigest() for name, file in named.items()}


def machine() -> str:
    """This machine's processor in words.

    Book: recorded-experiments
    """
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file() and (
        line := re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE)
    ):
        model = line.group(1)
    return f"{model}, {os.cpu_count()} cores, one thread used, {platform.system()}"


def versions() -> dict[str, str]:
    """Of Python and of the libraries that decide the numbers.

    Book: recorded-experiments
    """
    return {"python": platform.python_version()} | {
        name: _version(name) for name in ("torch", "numpy", "scikit-learn", "tokenizers", "textbook_code")
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _leaves(tree: Any, at: str = "results") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from _leaves(value, f"{at}.{key}")
    elif isinstance(tree, list | tuple):
        for index, value in enumerate(tree):
            yield from _leaves(value, f"{at}[{index}]")
    else:
        yield at, tree


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _write(path: Path, content: dict[str, Any]) -> None:
    """JSON with each list of numbers on one line, moved into place when it is whole."""
    text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)
    text = re.sub(r"\[[-+\d.eE,\s]*\]", lambda found: " ".join(found.group().split()), text)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.write_text(text + "\n", "utf-8")
    partial.replace(path)


@contextmanager
def _one_thread() -> Iterator[None]:
    """One torch thread and a random state of its own, for as long as an experiment runs."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _progress(arms: list[str], done: Mapping[str, Any], quiet: bool) -> Iterator[Callable[[str], Any]]:
    """Bars for the arms and for the steps of the present one; gives what starts an arm's bar."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True, quiet=quiet)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        kept = sum(arm in done for arm in arms)
        if kept:
            console.print(f"{kept} of {len(arms)} arms are kept from an earlier run.")
        overall = progress.add_task("arms", total=len(arms), completed=kept)
        current = progress.add_task("", total=None)

        def begin(arm: str) -> Callable[[int, int, float], None]:
            progress.reset(current, description=arm, total=None)
            progress.update(overall, completed=sum(a in done for a in arms))
            console.log(f"{arm} …") if not console.is_terminal else None

            def show(step: int, total: int, loss: float) -> None:
                progress.update(current, completed=step, total=total, description=f"{arm}  loss {loss:.4f}")

            return show

        yield begin


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; see the module's own words.

    Book: recorded-experiments
    """
    parser = argparse.ArgumentParser(
        prog="python -m textbook_code.recorded", description="Recorded experiments."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="the experiments there are")
    for command, what in (
        ("run", "run one and write its record"),
        ("replay", "repeat the first steps and compare the losses"),
        ("verify", "repeat all of it and compare the results"),
    ):
        sub = commands.add_parser(command, help=what)
        sub.add_argument("name", metavar="NAME", help=f"one of: {', '.join(names())}")
        if command == "replay":
            sub.add_argument("--steps", type=int, default=20, help="how many steps (20)")
        else:
            sub.add_argument(
                "--restart", action="store_true", help="forget the arms kept from an earlier run"
            )
    options = parser.parse_args(arguments)
    try:
        return _act(options)
    except RecordError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Interrupted; the arms that are done are kept, and the same command goes on.", file=sys.stderr)
        return 130


def _act(options: argparse.Namespace) -> int:
    if options.command == "list":
        for name in names():
            print(f"{name}: {experiment(name).ABOUT}")
        return 0
    if options.command == "replay":
        outcome = replay(options.name, steps=options.steps)
        print(outcome)
        return 0 if outcome else 1
    work = Path("_build/experiments") if Path("_build").is_dir() else Path(tempfile.gettempdir())
    kept = work / f"{options.name}.{options.command}.json"
    if options.restart:
        kept.unlink(missing_ok=True)
    model_folder = work / f"{options.name}.model" if options.command == "run" else None
    new = record(options.name, kept=kept, model_folder=model_folder)
    if model_folder:
        print(f"{save(new)}: {len(new.runs)} arms, {new.cpu_seconds:.0f} CPU-seconds")
        if checkpoint := save_checkpoint(new, kept, model_folder):
            print(f"{checkpoint.name}: the package carries it")
        shutil.rmtree(model_folder, ignore_errors=True)
    kept.unlink(missing_ok=True)
    if options.command == "run":
        print(json.dumps(new.results, indent=1, ensure_ascii=False))
        return 0
    old = load(options.name)
    wrong = differences(old, new)
    print("\n".join(wrong) or f"{old.name}: all results within {old.tolerance['results']:g} of the record")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
