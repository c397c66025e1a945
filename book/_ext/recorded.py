"""``{recorded} NAME``: the box around what an experiment measured; ``{recorded-table}`` lists them all.

The data are in ``experiments/NAME.json``, written by the experiments' runner. What the page says about them
is the directive's content.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from execution import duration
from generated import Generated, read_json, table
from sphinx.application import Sphinx

FOLDER = Path("experiments")
_HASHED = "and the modules of the package that it imports, sha256"
FIELDS = ("command", "date", "machine", "source_sha256")


class RecordedError(ValueError):
    """There is no such experiment, or its record is incomplete."""


def load(root: Path, name: str) -> Mapping[str, Any]:
    """The record of one experiment.

    Raises:
        RecordedError: there is none, or it lacks one of the fields the box prints.
    """
    record = read_json(root / FOLDER / f"{name}.json")
    if record is None:
        known = ", ".join(sorted(path.stem for path in (root / FOLDER).glob("*.json"))) or "none"
        raise RecordedError(f"recorded: no experiment {name!r} has been recorded; there are: {known}")
    for field in FIELDS:
        if not record.get(field):
            raise RecordedError(f"{FOLDER / name}.json: field {field!r} is missing or empty")
    return record


def _took(record: Mapping[str, Any]) -> str:
    seconds = record.get("cpu_seconds")
    return f", {duration(seconds)} of processor time" if seconds else ""


def repeat(name: str) -> str:
    return f"make experiment NAME={name}"


def box(name: str, record: Mapping[str, Any], content: str = "") -> str:
    """The box as Markdown."""
    lines = [
        "``````{admonition} Recorded, not run now",
        ":class: recorded",
        "",
        *([content, ""] if content else []),
        f"- **Machine:** {record['machine']}",
        f"- **Date:** {str(record['date'])[:10]}",
        f"- **Command:** `{record['command']}`{_took(record)}",
        f"- **Source:** `{FOLDER}/{name}.py` {_HASHED} {{digest}}`{record['source_sha256']}`",
        f"- **To repeat it:** `{repeat(name)}`",
        "``````",
    ]
    return "\n".join(lines)


def listing(records: Mapping[str, Mapping[str, Any]]) -> str:
    """All recorded experiments as Markdown."""
    if not records:
        return "*No experiment has been recorded yet.*"
    rows = [
        (
            f"{{ref}}`{name} <experiment-{name.replace('_', '-')}>`",
            record["machine"],
            str(record["date"])[:10],
            duration(record.get("cpu_seconds")),
        )
        for name, record in records.items()
    ]
    out = [
        table(("Experiment", "Machine", "Date", "Processor time"), rows, (26, 36, 18, 20), kind="recorded"),
        "",
    ]
    for name, record in records.items():
        versions = ", ".join(f"{k} {v}" for k, v in record.get("versions", {}).items())
        out += [
            f"(experiment-{name.replace('_', '-')})=",
            f"## `{name}`",
            "",
            *([str(record["about"]), ""] if record.get("about") else []),
            f"- **Command:** `{record['command']}`{_took(record)}",
            f"- **Source:** `{FOLDER}/{name}.py` {_HASHED} {{digest}}`{record['source_sha256']}`",
            *([f"- **Versions:** {versions}"] if versions else []),
            f"- **To repeat it:** `{repeat(name)}`",
            "",
        ]
    return "\n".join(out)


class Recorded(Generated):
    """``{recorded} NAME``"""

    required_arguments = 1
    has_content = True

    def reads(self) -> list[Path]:
        return [self.root / FOLDER / f"{self.arguments[0]}.json"]

    def markdown(self) -> str:
        name = self.arguments[0]
        try:
            return box(name, load(self.root, name), "\n".join(self.content))
        except RecordedError as error:
            raise self.error(str(error)) from error


class RecordedTable(Generated):
    """``{recorded-table}``"""

    def _names(self) -> list[str]:
        return sorted(path.stem for path in (self.root / FOLDER).glob("*.json"))

    def reads(self) -> list[Path]:
        return [self.root / FOLDER]

    def markdown(self) -> str:
        return listing({name: load(self.root, name) for name in self._names()})


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_directive("recorded", Recorded)
    app.add_directive("recorded-table", RecordedTable)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
