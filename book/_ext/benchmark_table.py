"""``{benchmarks}``: what the committed benchmarks measured, ours beside the peers.

``benchmarks/results.json`` is written by ``python -m benchmarks --record``. Its fields:

    command, date, machine, versions     where the figures come from
    about                                optional: what a reader must know of the run
    rows                                 for each comparison: what, peer, ratio, low, high (peer ÷ ours, with
                                         the interval), and where measured ours_seconds, peer_seconds,
                                         memory_ratio
    other                                optional: further measurements, each with what and value
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from generated import Generated, read_json, table
from sphinx.application import Sphinx

RESULTS = Path("benchmarks/results.json")
FIELDS = ("command", "date", "machine", "rows")


class BenchmarkError(ValueError):
    """The results are not what they should be."""


def check(results: Mapping[str, Any]) -> None:
    """Refuse results that lack a field, or whose ratio is outside its interval.

    Raises:
        BenchmarkError: so.
    """
    for field in FIELDS:
        if not results.get(field):
            raise BenchmarkError(f"{RESULTS}: {field} is missing or empty")
    for row in results["rows"]:
        for field in ("what", "peer", "ratio", "low", "high"):
            if field not in row:
                raise BenchmarkError(f"{RESULTS}: {row.get('what', '?')}: {field} is missing")
        if not row["low"] <= row["ratio"] <= row["high"]:
            raise BenchmarkError(
                f"{RESULTS}: {row['what']}: the ratio {row['ratio']} is outside its interval"
            )


def milliseconds(seconds: float | None) -> str:
    """Three figures of a time in milliseconds.

    >>> milliseconds(0.012345), milliseconds(1.2345), milliseconds(None)
    ('12.3 ms', '1230 ms', '–')
    """
    if seconds is None:
        return "–"
    value = float(f"{1000 * seconds:.3g}")
    return f"{value:g} ms"


def mean_against_the_faster(rows: list[Mapping[str, Any]]) -> float:
    """The geometric mean over all comparisons of the ratio to the faster peer."""
    faster: dict[str, float] = {}
    for row in rows:
        faster[row["what"]] = min(faster.get(row["what"], math.inf), row["ratio"])
    return math.exp(sum(map(math.log, faster.values())) / len(faster))


def markdown(results: Mapping[str, Any] | None) -> str:
    """The table, what it was measured on, and the geometric mean of the ratios."""
    if results is None:
        return "*No benchmark has been recorded yet.*"
    check(results)
    rows = [
        (
            row["what"],
            row["peer"],
            f"**{row['ratio']:.2f}**\n\n{row['low']:.2f} to {row['high']:.2f}",
            f"{milliseconds(row.get('ours_seconds'))}\n\n{milliseconds(row.get('peer_seconds'))}",
            f"{row['memory_ratio']:.2f}" if row.get("memory_ratio") else "–",
        )
        for row in results["rows"]
    ]
    head = ("What", "Peer", "Peer ÷ ours", "Ours, peer", "Memory, ours ÷ peer")
    mean = mean_against_the_faster(results["rows"])
    out = [
        table(head, rows, (28, 27, 16, 15, 14), kind="benchmarks"),
        "",
        f"Against the faster peer of each comparison, the geometric mean of the ratios is {mean:.2f}.",
        *([results["about"]] if results.get("about") else []),
        "",
    ]
    if results.get("other"):
        out += [table(("Further measurements", "Value"), _other(results), (70, 30)), ""]
    versions = ", ".join(f"{name} {version}" for name, version in results.get("versions", {}).items())
    out += [
        f"- **Machine:** {results['machine']}",
        f"- **Date:** {str(results['date'])[:10]}",
        f"- **Command:** `{results['command']}`",
        *([f"- **Versions:** {versions}"] if versions else []),
    ]
    return "\n".join(out)


def _other(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(row["what"], str(row["value"])) for row in results["other"]]


class Benchmarks(Generated):
    """``{benchmarks}``"""

    def reads(self) -> list[Path]:
        return [self.root / RESULTS]

    def markdown(self) -> str:
        try:
            return markdown(read_json(self.root / RESULTS))
        except BenchmarkError as error:
            raise self.error(str(error)) from error


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_directive("benchmarks", Benchmarks)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
