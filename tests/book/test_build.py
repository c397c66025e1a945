"""The commands: what is done once is not done again, what is missing is named, what fails stops the rest."""

from __future__ import annotations

import io
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import build
import ci
import environment
import latex
import pytest
from console import StepError
from stamps import Stamp, digest

ROOT = Path(__file__).resolve().parents[2]


# ------------------------------------------------------------------ stamps


def test_the_digest_sees_contents_names_and_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "book" / "__pycache__").mkdir(parents=True)
    (tmp_path / "book" / "a.md").write_text("a")
    seen = {digest(tmp_path, ["book", "c.yml"])}

    def is_new() -> bool:
        now, known = digest(tmp_path, ["book", "c.yml"]), len(seen)
        seen.add(now)
        return len(seen) > known

    (tmp_path / "book" / "__pycache__" / "a.pyc").write_text("x")
    (tmp_path / "book" / ".hidden").write_text("x")
    (tmp_path / "other").write_text("x")
    assert not is_new()
    (tmp_path / "book" / "a.md").write_text("b")
    assert is_new()
    (tmp_path / "book" / "a.md").rename(tmp_path / "book" / "b.md")
    assert is_new()
    (tmp_path / "c.yml").write_text("")
    assert is_new()
    assert digest(tmp_path, ["book"]) != digest(tmp_path, ["book"], extra=["3.12"])


def test_a_stamp_holds_while_inputs_and_results_stand(tmp_path: Path) -> None:
    stamp, made = Stamp(tmp_path / "stamps" / "x.json"), tmp_path / "made"
    assert not stamp.holds("1")
    made.write_text("")
    stamp.write("1", made=[made])
    assert stamp.holds("1")
    assert not stamp.holds("2")
    made.unlink()
    assert not stamp.holds("1")
    stamp.path.write_text("{ torn")
    assert not stamp.holds("1")


# ------------------------------------------------------------------ make book


@pytest.fixture
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """build.py with every step replaced by a note that it was done."""
    done: list[str] = []
    html, tex = tmp_path / "_build" / "html", tmp_path / "_build" / "latex"
    html.mkdir(parents=True)
    (html / "index.html").write_text("")
    tex.mkdir()
    for name, value in {"BUILD": tmp_path / "_build", "HTML": html, "LATEX": tex, "ROOT": tmp_path}.items():
        monkeypatch.setattr(build, name, value)
    for names in ("named_in_tests", "named_in_pages"):
        monkeypatch.setattr(build, names, set)
    for step in ("proof", "pages"):
        monkeypatch.setattr(build, step, lambda step=step: done.append(step))
    monkeypatch.setattr(build, "sphinx", lambda name, with_pdf: done.append(f"{name} {with_pdf}"))
    monkeypatch.setattr(build, "ensure_latex", lambda: False)
    monkeypatch.setattr(build, "missing_latex", lambda: ["lualatex"])
    monkeypatch.setattr(build.Environment, "is_ready", lambda self: True)
    monkeypatch.setattr(build.Environment, "inputs", "environment")
    (tmp_path / "_toc.yml").write_text("a")
    return done


def test_without_latex_there_is_the_html_once(
    house: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert build.up_to_date("book", []) is None
    build.make_book()
    assert house == ["proof", "pages", "html False"]
    assert "no PDF without LaTeX" in capsys.readouterr().out

    said = build.up_to_date("book", [])
    assert said is not None
    assert str(build.HTML / "index.html") in said
    assert "no PDF, because there is no LaTeX" in said

    monkeypatch.setattr(build, "missing_latex", list)  # LaTeX has been installed since
    assert build.up_to_date("book", []) is None


def test_what_is_edited_makes_the_build_old(house: list[str]) -> None:
    build.make_book(pdf=False)
    assert build.up_to_date("html", []) is not None
    (build.ROOT / "_toc.yml").write_text("b")
    assert build.up_to_date("html", []) is None


def test_what_is_edited_during_the_build_is_for_the_next_one(
    house: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "pages", lambda: (build.ROOT / "_toc.yml").write_text("edited"))
    build.make_book(pdf=False)
    assert build.up_to_date("html", []) is None


def test_a_pdf_alone_needs_latex(house: list[str]) -> None:
    with pytest.raises(StepError, match="no LaTeX"):
        build.make_book(html=False)


NOTHING = """
import sys, time
sys.path.insert(0, sys.argv[1])
import build
build.up_to_date("book", []), build.up_to_date("test", [])
print(time.process_time(), *sys.modules)
"""


def test_finding_nothing_to_do_takes_no_time() -> None:
    tools = str(ROOT / "book" / "_tools")
    done = subprocess.run([sys.executable, "-c", NOTHING, tools], capture_output=True, text=True, check=True)
    seconds, *modules = done.stdout.split()
    assert float(seconds) < 3
    assert not {"torch", "sphinx", "yaml", "jupyter_cache", "textbook_code"} & set(modules)


def test_the_makefile_offers_the_commands_there_are() -> None:
    named = re.search(r"^COMMANDS := (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert named
    described = re.findall(r"^    ([a-z, -]+?)  ", build.__doc__ or "", re.MULTILINE)
    assert set(named.group(1).split()) == {name for names in described for name in names.split(", ")}


def test_an_unknown_command_shows_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert build.main(["bok"]) == 2
    assert "test-slow" in capsys.readouterr().out


def test_a_failing_program_shows_its_warnings_and_its_log(house: list[str]) -> None:
    said = "print('much'); print('\\x1b[91mpage.md:3: WARNING: no such label\\x1b[0m'); raise SystemExit(3)"
    with pytest.raises(StepError) as error:
        build.run([sys.executable, "-c", said], log="html")
    assert "\npage.md:3: WARNING: no such label" in f"\n{error.value}"
    assert str(build.LOGS / "html.log") in str(error.value)


# ------------------------------------------------------------------ the system


@pytest.fixture
def bare_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with nothing on its path but apt-get, which notes what it is told."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "apt-get").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/told\n')
    (folder / "apt-get").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/bin")
    monkeypatch.setattr(environment.shutil, "which", lambda name: shutil_which(name, path=str(folder)))
    return tmp_path / "told"


shutil_which = shutil.which


def test_latex_is_installed_by_root_where_no_one_can_be_asked(
    bare_machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert set(environment.LATEX_PROGRAMS) <= set(environment.missing_latex())
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr("sys.stdin", io.StringIO())
    assert environment.ensure_latex() is False  # this apt-get only takes notes
    assert bare_machine.read_text().splitlines() == [
        "update", f"install -y --no-install-recommends {' '.join(environment.LATEX)}",
    ]  # fmt: skip


def test_latex_is_not_installed_against_a_no(bare_machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(environment, "ask", lambda question: False)
    assert environment.ensure_latex() is False
    assert not bare_machine.exists()


def test_without_root_the_one_line_to_run_is_shown(
    bare_machine: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert environment.ensure_latex() is False
    assert "sudo apt-get install -y --no-install-recommends latexmk make" in capsys.readouterr().out
    assert not bare_machine.exists()


# ------------------------------------------------------------------ LaTeX


def test_the_log_tells_what_is_wrong_from_what_is_unsightly() -> None:
    log = """
LaTeX Warning: Reference `eq:nowhere' on page 3 undefined on input line 12.
Package hyperref Warning: Token not allowed in a PDF string.
LaTeX Warning: Label `a:b' multiply defined.
Missing character: There is no → in font lmroman10-regular!
Overfull \\hbox (4.2pt too wide) in paragraph at lines 3--4
Overfull \\hbox (45.0pt too wide) in paragraph at lines 5--6
"""
    report = latex.read_log(log)
    assert [line.split(":")[0] for line in report.wrong] == [
        "LaTeX Warning",
        "LaTeX Warning",
        "Missing character",
    ]
    assert report.wide == ["Overfull \\hbox (45.0pt too wide) in paragraph at lines 5--6"]


@pytest.mark.skipif(
    shutil.which("lualatex") is None, reason="LaTeX is not installed; `make book` installs it"
)
def test_a_document_becomes_a_pdf_or_an_error_with_its_line(tmp_path: Path) -> None:
    source = tmp_path / "small.tex"
    source.write_text("\\documentclass{article}\n\\begin{document}\nA word.\n\\end{document}\n")
    pdf, report = latex.Run(tmp_path).wait()
    assert pdf.read_bytes().startswith(b"%PDF")
    assert (report.wrong, report.wide) == ([], [])

    source.write_text("\\documentclass{article}\n\\begin{document}\n\\nonsense\n\\end{document}\n")
    with pytest.raises(latex.LatexError, match=r"small.tex:3: Undefined control sequence"):
        latex.Run(tmp_path).wait()

    source.write_text("\\documentclass{article}\n\\begin{document}\n\\ref{nowhere}\n\\end{document}\n")
    with pytest.raises(latex.LatexError, match="`nowhere' on page 1 undefined"):
        latex.Run(tmp_path).wait()


# ------------------------------------------------------------------ the checks on a clean machine


def stage(name: str, code: str, minutes: float = 1.0, needs: tuple[str, ...] = ()) -> ci.Stage:
    return ci.Stage(name, minutes, lambda: [[sys.executable, "-c", code]], needs=needs)


def test_a_failing_stage_fails_the_whole_and_holds_up_only_what_needs_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stages = [
        stage("first", "print('=== 3 passed in 0.1s ===')"),
        stage("broken", "raise SystemExit(3)"),
        stage("after", "print('never')", needs=("broken",)),
        stage("apart", "print('still done')", needs=("first",)),
        stage("endless", "import time; time.sleep(60)", minutes=0.01),
    ]
    monkeypatch.setattr(ci, "STAGES", stages)
    assert ci.main() == 1
    assert [s.outcome for s in stages] == ["passed", "failed (3)", "needs broken", "passed", "over 0.01 min"]
    said = capsys.readouterr().out
    assert "never" not in said.replace("print('never')", "")
    assert said.rindex("=== 3 passed in 0.1s ===") > said.index("summary")
    monkeypatch.setattr(ci, "STAGES", [stage("first", "pass")])
    assert ci.main() == 0


def test_a_stage_over_its_cap_takes_its_children_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    child = f"import time; time.sleep(3); open({str(tmp_path / 'late')!r}, 'w')"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    monkeypatch.setattr(ci, "STAGES", [stage("slow", code, minutes=0.02)])
    assert ci.main() == 1
    subprocess.run(["sleep", "3"], check=True)
    assert not (tmp_path / "late").exists()


def test_the_slow_test_of_a_day_fits_into_its_stage() -> None:
    name = "tests/test_experiments.py::test_the_whole_experiment_repeats[{}]"
    assert ci.is_short(name.format("bart_noise"))
    assert not ci.is_short(name.format("bert_bbc"))
    assert ci.is_short("tests/test_wheel.py::test_a_model_runs_from_an_empty_environment")
    stage = next(stage for stage in ci.STAGES if stage.name == "slow test")
    assert stage.minutes * 60 / 1.5 > ci.LONGEST
