"""The PDF from Sphinx's LaTeX sources: latexmk with LuaLaTeX, and a reading of its log.

python book/_tools/latex.py _build/latex [NAME.tex]
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ENGINE = ("latexmk", "-lualatex", "-interaction=nonstopmode", "-halt-on-error", "-file-line-error")
WIDE = 10.0  # points a line may stick out before it is reported


class LatexError(Exception):
    """LaTeX stopped, or the PDF it made is not whole; the message says why."""


@dataclass(frozen=True)
class Report:
    """What the log of a finished run says: what is wrong in the PDF, and what is only unsightly."""

    wrong: list[str]
    wide: list[str]


class Run:
    """A run of latexmk in the background: start it, do something else, wait for it."""

    def __init__(self, folder: Path, name: str | None = None) -> None:
        self.folder = folder
        self.source = folder / name if name else _only_source(folder)
        self._output = (folder / "latexmk.log").open("w")
        self._process = subprocess.Popen(
            [*ENGINE, self.source.name],
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=subprocess.STDOUT,
            # the same sources give the same PDF, and no line of the log is broken
            env={"SOURCE_DATE_EPOCH": "0", **os.environ, "FORCE_SOURCE_DATE": "1", "max_print_line": "1000"},
        )

    def stop(self) -> None:
        """End it, if it still runs; latexmk goes on from there the next time."""
        if self._process.poll() is None:
            self._process.terminate()
            self._process.wait()
        self._output.close()

    def wait(self) -> tuple[Path, Report]:
        """The finished PDF and what the log says.

        Raises:
            LatexError: LaTeX stopped, or something in the PDF is undefined or cannot be printed.
        """
        status = self._process.wait()
        self._output.close()
        log = self.source.with_suffix(".log")
        text = log.read_text("utf-8", errors="replace") if log.is_file() else ""
        if status:
            raise LatexError(f"LaTeX stopped ({log}):\n{_reason(text) or self._tail()}")
        report = read_log(text)
        if report.wrong:
            raise LatexError(f"the PDF is not whole ({log}):\n" + "\n".join(report.wrong))
        return self.source.with_suffix(".pdf"), report

    def _tail(self) -> str:
        return "\n".join(
            (self.folder / "latexmk.log").read_text("utf-8", errors="replace").splitlines()[-20:]
        )


def read_log(text: str) -> Report:
    """Undefined references and missing characters are wrong; lines far too wide are unsightly."""
    wrong = re.findall(
        r"^(?:LaTeX|Package \w+) Warning: (?:Reference|Citation|Hyper reference) [`'].*undefined.*$"
        r"|^Missing character: .*$"
        r"|^LaTeX Warning: Label [`'].*multiply defined.*$",
        text,
        re.MULTILINE,
    )
    wide = [
        match.group(0)
        for match in re.finditer(r"^Overfull \\hbox \(([\d.]+)pt too wide\).*$", text, re.MULTILINE)
        if float(match.group(1)) > WIDE
    ]
    return Report(sorted(set(wrong)), wide)


def _reason(log: str) -> str:
    """The first error of a log with the lines around it."""
    lines = log.splitlines()
    for i, line in enumerate(lines):
        if line.startswith("!") or re.match(r"^\S+\.\w+:\d+: ", line):
            return "\n".join(lines[i : i + 12])
    return ""


def _only_source(folder: Path) -> Path:
    found = sorted(folder.glob("*.tex"))
    if len(found) != 1:
        raise LatexError(f"expected one .tex file in {folder}, found {[path.name for path in found]}")
    return found[0]


if __name__ == "__main__":
    try:
        pdf, report = Run(Path(sys.argv[1]), *sys.argv[2:3]).wait()
    except LatexError as error:
        sys.exit(str(error))
    print(pdf, *report.wide, sep="\n")
