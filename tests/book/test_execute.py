"""Pages run side by side, once; failures are named; what was finished is kept."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import execute
import pytest
from execute import Book, PagesFailedError, over_budget

HEAD = """---
jupytext:
  text_representation:
    format_name: myst
kernelspec:
  display_name: Python 3
  name: python3
---
# A page
"""
CONF = """
import sys
sys.path.insert(0, {ext!r})
extensions = ["myst_nb", "sphinx_external_toc", "pagecache"]
external_toc_path = "_toc.yml"
exclude_patterns = ["_build"]
nb_execution_mode = "cache"
nb_execution_raise_on_error = True
html_theme = "basic"
"""


def page(*cells: str) -> str:
    return HEAD + "".join(f"\nWords.\n\n```{{code-cell}} ipython3\n{cell}\n```\n" for cell in cells)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "repo"
    write(root, {"index.md": "# A book\n", "constraints.txt": "", "pages/value.txt": "first"})
    return root


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, "utf-8")
    pages = sorted(path.relative_to(root).with_suffix("").as_posix() for path in root.glob("pages/*.md"))
    toc = [
        "format: jb-book",
        "root: index",
        *(["chapters:"] if pages else []),
        *(f"- file: {p}" for p in pages),
    ]
    (root / "_toc.yml").write_text("\n".join(toc) + "\n")


def outputs(book: Book, name: str) -> str:
    found = next(page for page in book.pages if page.name == name)
    _, notebook = book.cache.merge_match_into_notebook(found.notebook)
    return "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))


def test_pages_run_once_each_in_its_own_folder_and_thread(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels = root / "kernels" / "kernels" / "python3"  # a user's kernel of the same name must not be taken
    kernels.mkdir(parents=True)
    (kernels / "kernel.json").write_text('{"argv": ["false"], "display_name": "x", "language": "python"}')
    monkeypatch.setenv("JUPYTER_PATH", str(root / "kernels"))
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    where = (
        "import os, sys\nprint(os.getcwd(), os.environ['OMP_NUM_THREADS'], sys.executable, 'x' in globals())"
    )
    write(
        root,
        {"pages/one.md": page("x = 1", where), "pages/two.md": page(where), "pages/prose.md": "# Prose\n"},
    )
    book = Book(root)
    said: list[str] = []
    assert sorted(book.execute(say=said.append)) == ["pages/one", "pages/two"]
    assert outputs(book, "pages/one") == f"{root}/pages 1 {sys.executable} True\n"
    assert outputs(book, "pages/two") == f"{root}/pages 1 {sys.executable} False\n"
    assert any("pages/one: its cells are new" in line for line in said)

    state = json.loads((root / "_build" / "execution.json").read_text())
    assert state.keys() == {"pages/one", "pages/two"}
    assert state["pages/one"]["cells"] == 2
    assert state["pages/one"]["status"] == "ok"
    assert state["pages/one"]["cpu_seconds"] > 0.05
    assert state["pages/one"]["wall_seconds"] > 0.05

    file = root / "_build" / "execution.json"
    before = file.stat().st_mtime_ns
    assert Book(root).execute() == []
    assert file.stat().st_mtime_ns == before


def test_a_changed_input_reruns_its_page_and_says_so(root: Path) -> None:
    write(
        root, {"pages/reads.md": page("print(open('value.txt').read())"), "pages/other.md": page("print(2)")}
    )
    Book(root).execute()
    (root / "pages" / "value.txt").write_text("second")
    said: list[str] = []
    book = Book(root)
    assert book.execute(say=said.append) == ["pages/reads"]
    assert said[0] == "pages/reads: file:value.txt changed"
    assert outputs(book, "pages/reads") == "second\n"


def test_a_failing_page_is_named_with_its_cell_and_keeps_the_others(root: Path) -> None:
    write(root, {"pages/bad.md": page("a = 1", "b = 0\na / b"), "pages/good.md": page("print(1)")})
    with pytest.raises(PagesFailedError) as failed:
        Book(root).execute()
    text = str(failed.value)
    line = (root / "pages" / "bad.md").read_text().splitlines().index("b = 0") + 1
    assert text.startswith(f"pages/bad.md:{line}: code cell 2 of 2 failed\n\n    b = 0\n    a / b\n")
    assert "ZeroDivisionError: division by zero" in text
    assert "\x1b" not in text
    state = json.loads((root / "_build" / "execution.json").read_text())
    assert (state["pages/bad"]["status"], state["pages/good"]["status"]) == ("failed", "ok")

    write(root, {"pages/bad.md": page("a = 1", "b = 1\na / b")})
    assert Book(root).execute() == ["pages/bad"]
    state = json.loads((root / "_build" / "execution.json").read_text())
    assert (state["pages/bad"]["status"], state["pages/good"]["status"]) == ("ok", "ok")


def test_what_takes_too_long_is_said() -> None:
    def said(*seconds: float) -> list[str]:
        return [
            line.split(":")[0]
            for line in over_budget({str(i): {"cpu_seconds": s} for i, s in enumerate(seconds)})
        ]

    assert said(20, 59.9, 1) == []
    assert said(20, 61, 1) == ["1"]
    assert said(31, 32, 1) == []
    assert said(*[31, 32, 1] * 6) == ["the median page takes 31 CPU-seconds, at most 30 are allowed"]
    assert said(*[29.0] * 70) == ["all pages take 2030 CPU-seconds, at most 1800 are allowed"]
    assert over_budget({"failed": {"status": "failed"}}) == []


def test_a_kernel_that_dies_is_a_failure(root: Path) -> None:
    write(root, {"pages/dies.md": page("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)")})
    with pytest.raises(PagesFailedError, match=r"pages/dies.md:14: code cell 1 of 1 failed"):
        Book(root).execute()


def test_an_interrupted_run_keeps_what_was_finished(root: Path) -> None:
    write(root, {"pages/quick.md": page("print(1)"), "pages/slow.md": page("import time\ntime.sleep(30)")})
    command = [sys.executable, "-u", execute.__file__]
    environment = {**os.environ, "BOOK_JOBS": "2"}
    running = subprocess.Popen(command, cwd=root, env=environment, stdout=subprocess.PIPE, text=True)
    assert running.stdout is not None
    for line in running.stdout:
        if line.startswith("pages/quick: 1 cells"):
            break
    start = time.monotonic()
    running.send_signal(signal.SIGINT)
    said = running.communicate(timeout=20)[0]
    assert "goes on from there" in said
    assert running.returncode == 130
    assert time.monotonic() - start < 15

    write(root, {"pages/slow.md": page("print(2)")})
    assert Book(root).execute() == ["pages/slow"]


def sphinx(root: Path, builder: str = "html") -> subprocess.CompletedProcess[str]:
    (root / "conf.py").write_text(CONF.format(ext=str(Path(execute.__file__).parents[1] / "_ext")))
    command = [
        sys.executable,
        "-m",
        "sphinx",
        "-b",
        builder,
        ".",
        f"_build/{builder}",
        "-d",
        "_build/doctrees",
    ]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("before", [[], ["text"]], ids=["html alone", "read by another builder before"])
def test_a_bare_build_executes_and_reads_what_changed_again(root: Path, before: list[str]) -> None:
    write(
        root,
        {"pages/reads.md": page("print('it is', open('value.txt').read())"), "pages/other.md": page("2")},
    )
    for content in ("first", "second"):
        (root / "pages" / "value.txt").write_text(content)
        for builder in [*before, "html"]:
            built = sphinx(root, builder)
            assert built.returncode == 0, built.stderr
        assert f"it is {content}" in (root / "_build" / "html" / "pages" / "reads.html").read_text()

    written = (root / "_build" / "html" / "pages" / "reads.html").stat().st_mtime_ns
    assert sphinx(root).returncode == 0
    assert (root / "_build" / "html" / "pages" / "reads.html").stat().st_mtime_ns == written


def test_a_bare_build_stops_at_a_failing_page(root: Path) -> None:
    write(root, {"pages/bad.md": page("1 / 0")})
    built = sphinx(root)
    assert built.returncode != 0
    assert "pages/bad.md:14: code cell 1 of 1 failed" in built.stderr
    assert "ZeroDivisionError" in built.stderr
    assert not (root / "_build" / "html" / "pages" / "bad.html").exists()


def test_sphinx_never_runs_a_cell_itself(root: Path) -> None:
    write(root, {"stray.md": page("open('ran.txt', 'w')")})
    (root / "index.md").write_text("# A book\n\n```{toctree}\nstray\n```\n")
    built = sphinx(root)
    assert built.returncode != 0
    assert "is it missing from _toc.yml?" in built.stderr
    assert not (root / "ran.txt").exists()
