"""``{execution-table}``: every executed page with its cells, its time and its status.

The data are what the parallel execution before the build wrote to ``_build/execution.json``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from generated import Generated, build_file, read_json, table
from sphinx.application import Sphinx

STATE = "execution.json"


def duration(seconds: float | None) -> str:
    """Seconds as a reader says them.

    >>> duration(8.24), duration(75), duration(None)
    ('8.2 s', '1 min 15 s', '–')
    """
    if seconds is None:
        return "–"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s"


def markdown(pages: Mapping[str, Mapping[str, Any]] | None, docnames: set[str]) -> str:
    """The table and its total; a sentence where nothing has been executed."""
    if not pages:
        return "*No page was executed in this build.*"
    rows = []
    for page, state in sorted(pages.items()):
        docname = page.removesuffix(".md")
        title = f"{{doc}}`/{docname}`" if docname in docnames else f"`{docname}`"
        when = str(state.get("when", "–")).replace("T", " ")[:16]
        rows.append(
            (
                title,
                str(state.get("cells", "–")),
                duration(state.get("cpu_seconds")),
                duration(state.get("wall_seconds")),
                str(state.get("status", "–")),
                when,
            )
        )
    total = [sum(state.get(key) or 0 for state in pages.values()) for key in ("cpu_seconds", "wall_seconds")]
    cells = sum(state.get("cells") or 0 for state in pages.values())
    rows.append(("**Total**", str(cells), duration(total[0]), duration(total[1]), "", ""))
    head = ("Page", "Cells", "Processor time", "Elapsed time", "Status", "Executed")
    return table(head, rows, (32, 8, 16, 16, 11, 17), kind="execution")


class ExecutionTable(Generated):
    """``{execution-table}``"""

    def reads(self) -> list[Path]:
        return [build_file(self.root, STATE)]

    def markdown(self) -> str:
        return markdown(read_json(build_file(self.root, STATE)), set(self.env.found_docs))


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_directive("execution-table", ExecutionTable)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
