"""``{ledger}``: the rows of the parity ledger, each tolerance beside the error that this build measured.

The committed rows are in ``book/appendix/parity-ledger.json``; the parity tests write what they saw to
``_build/parity.json``. Option ``:models: bert, gpt`` keeps the rows of those models.

From the shell, ``python book/_ext/ledger.py`` compares the two sets of rows and fails when they differ or
when an error exceeds its tolerance.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

COMMITTED = Path("book/appendix/parity-ledger.json")
MEASURED = "parity.json"
FIELDS = {
    "id",
    "model",
    "head",
    "reference",
    "reference_version",
    "dtype",
    "tolerance_forward",
    "tolerance_backward",
    "weights",
    "test",
    "page",
}
WEIGHTS = ("random", "real")
DIRECTIONS = ("forward", "backward")
NOT_MEASURED = "not measured in this build"


class LedgerError(ValueError):
    """The ledger is not what it should be."""


def load(path: Path) -> list[dict[str, Any]]:
    """The committed rows, checked.

    Raises:
        LedgerError: a row lacks a field or has an unknown one, has a bad value, or repeats an id.
    """
    rows = json.loads(path.read_text("utf-8"))
    if not isinstance(rows, list):
        raise LedgerError(f"{path}: expected a list of rows, got {type(rows).__name__}")
    seen: set[str] = set()
    for row in rows:
        name = row.get("id", "?")
        if set(row) != FIELDS:
            missing, unknown = sorted(FIELDS - set(row)), sorted(set(row) - FIELDS)
            raise LedgerError(f"{path}: row {name!r}: missing fields {missing}, unknown fields {unknown}")
        if row["weights"] not in WEIGHTS:
            raise LedgerError(
                f"{path}: row {name!r}: weights must be one of {WEIGHTS}, got {row['weights']!r}"
            )
        if not row["tolerance_forward"] or row["tolerance_forward"] < 0:
            raise LedgerError(f"{path}: row {name!r}: tolerance_forward must be > 0")
        if name in seen:
            raise LedgerError(f"{path}: id {name!r} occurs twice")
        seen.add(name)
    return rows


def compare(
    committed: Iterable[Mapping[str, Any]], measured: Mapping[str, Mapping[str, Any]] | None
) -> list[str]:
    """What is wrong with a full run of the parity tests, one sentence each; empty when all is well."""
    rows = {row["id"]: row for row in committed}
    measured = measured or {}
    problems = [f"{name}: in the ledger, but no test measured it" for name in rows if name not in measured]
    problems += [f"{name}: measured, but not in the ledger" for name in measured if name not in rows]
    for name in rows.keys() & measured.keys():
        for direction in DIRECTIONS:
            tolerance, error = rows[name][f"tolerance_{direction}"], measured[name].get(f"{direction}_error")
            if tolerance is None and error is None:
                continue
            if tolerance is None:
                problems.append(f"{name}: a {direction} error was measured, the ledger promises none")
            elif error is None:
                problems.append(f"{name}: the ledger promises a {direction} error, none was measured")
            elif not error <= tolerance:  # so that NaN is a problem too
                problems.append(
                    f"{name}: {direction} error {error:.3g} exceeds its tolerance {tolerance:.3g}"
                )
    return sorted(problems)


def markdown(
    rows: Iterable[Mapping[str, Any]],
    measured: Mapping[str, Mapping[str, Any]] | None,
    *,
    link_pages: bool = True,
) -> str:
    """The rows as a Markdown table."""
    from generated import scientific, table

    def side(row: Mapping[str, Any], direction: str) -> str:
        tolerance = row[f"tolerance_{direction}"]
        if tolerance is None:
            return "–"
        error = (measured or {}).get(row["id"], {}).get(f"{direction}_error")
        seen = f"*{NOT_MEASURED}*" if error is None else scientific(error)
        mark = " **above its tolerance**" if error is not None and not error <= tolerance else ""
        return f"{seen}{mark}\n\nallowed {scientific(tolerance)}"

    def reference(row: Mapping[str, Any]) -> str:
        package, _, name = row["reference"].rpartition(".")
        version = (measured or {}).get(row["id"], {}).get("reference_version") or row["reference_version"]
        return f"`{name}`\n\nof {package} {version}"

    def subject(row: Mapping[str, Any]) -> str:
        head = f"{{ref}}`{row['head']} <{row['page']}>`" if link_pages else row["head"]
        return f"**{row['model']}**, {head}\n\n{row['weights']} weights, {row['dtype']}"

    cells = [
        (
            subject(row),
            reference(row),
            side(row, "forward"),
            side(row, "backward"),
        )
        for row in rows
    ]
    head = ("What is compared", "Reference", "Forward error", "Gradient error")
    return table(head, cells, (27, 39, 17, 17), kind="ledger")


def choose(rows: list[dict[str, Any]], models: str | None) -> list[dict[str, Any]]:
    """The rows of the models named in a comma-separated list; all of them for None.

    Raises:
        LedgerError: the ledger has no row of one of them.
    """
    if models is None:
        return rows
    wanted = [name.strip().lower() for name in models.split(",") if name.strip()]
    known = {row["model"].lower() for row in rows}
    for name in wanted:
        if name not in known:
            raise LedgerError(f"models: the ledger has no row of {name!r}; it has {', '.join(sorted(known))}")
    return [row for row in rows if row["model"].lower() in wanted]


def setup(app: Any) -> dict[str, Any]:
    from docutils.parsers.rst import directives
    from generated import Generated, build_file, read_json

    class Ledger(Generated):
        """``{ledger}``, or ``{ledger}`` with the option ``:models:``."""

        option_spec = {"models": directives.unchanged_required}  # noqa: RUF012

        def reads(self) -> list[Path]:
            return [self.root / COMMITTED, build_file(self.root, MEASURED)]

        def markdown(self) -> str:
            path, built = self.reads()
            if not path.exists():
                return "*The ledger has no rows yet.*"
            try:
                rows = choose(load(path), self.options.get("models"))
            except LedgerError as error:
                raise self.error(str(error)) from error
            on_this_page = "models" in self.options
            return markdown(rows, read_json(built), link_pages=not on_this_page)

    app.add_directive("ledger", Ledger)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}


def main() -> int:
    sys.path.insert(0, str(Path(__file__).parent))  # PYTHONSAFEPATH leaves it out
    from generated import build_file

    try:
        rows = load(COMMITTED)
        measured = json.loads(build_file(Path(), MEASURED).read_text("utf-8"))
    except (OSError, ValueError) as error:
        print(f"ledger: {error}", file=sys.stderr)
        return 2
    problems = compare(rows, measured)
    for problem in problems:
        print(problem, file=sys.stderr)
    if not problems:
        print(f"ledger: {len(rows)} rows, all measured, all within tolerance")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
