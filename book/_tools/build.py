"""The commands behind the Makefile.

    book        environment, data, pages, HTML and PDF
    html, pdf   only the one or the other
    serve       the HTML on a local port
    test        all fast tests, and those of the built pages where there is a browser
    test-slow   the tests that take minutes
    lint        style, types, spelling, and numbers typed by hand
    bench       the benchmarks
    ledger      the rows of the parity ledger, from the tests
    experiment  run a recorded experiment:  make experiment NAME=…
    clean       remove what was built; the environment and the data cache stay

Started with any Python >= 3.11, it makes the environment and goes on inside it. A step whose inputs are what
they were is passed over; after an interruption the same command goes on from there. FORCE=1 does all again.
"""

from __future__ import annotations

import sys

if sys.version_info < (3, 11):  # noqa: UP036 (this file may be started by an old one)
    sys.exit(f"Python 3.11 or newer is needed, this is {sys.version.split()[0]}: make PYTHON=python3.12 …")

import ast
import fcntl
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # PYTHONSAFEPATH leaves it out

from console import StepError, closing_table, say, timed
from environment import ROOT, Environment, browser, ensure_latex, missing_latex
from stamps import Stamp, digest

BUILD = ROOT / "_build"
HTML, LATEX, LOGS = BUILD / "html", BUILD / "latex", BUILD / "logs"
FORCE = os.environ.get("FORCE") == "1"

PACKAGE = ["pyproject.toml", "constraints.txt", "textbook_code", "experiments"]
BOOK = [*PACKAGE, "_config.yml", "_toc.yml", "CITATION.cff", "CHANGELOG.md", "book", "benchmarks"]
TESTS = [*BOOK, "README.md", "LICENSE", "LICENSE-TEXT", "Makefile", "tests"]
SHOWN = ["_build/parity.json"]  # results of this machine that the book prints

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
SIDE_BY_SIDE = ["-n", str(CORES), "--dist", "loadfile"]
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


# ------------------------------------------------------------------ steps


def environment(arguments: Sequence[str]) -> None:
    """Make the environment if it is not there, and go on inside it."""
    env = Environment()
    if FORCE or not env.is_ready():
        with timed("environment") as tell, only_one(env.folder.with_name(f"{env.folder.name}.lock")):
            if FORCE or not env.is_ready():  # another build may have made it in the meantime
                env.make(tell)
    if Path(sys.prefix).resolve() != env.folder.resolve():
        sys.stdout.flush()
        os.execv(env.python, [str(env.python), str(Path(__file__).resolve()), *arguments])


def data(names: set[str]) -> None:
    """Fetch the sources of data and weights that are named and not yet there."""
    from textbook_code.data.sources import cached, fetch

    missing = sorted(name for name in names if cached(name) is None)
    if missing:
        with timed("data") as tell:
            for name in missing:
                tell(f"fetching {name}")
                try:
                    fetch(name)
                except Exception as error:
                    raise StepError(f"{name}: {error}") from error


def proof() -> None:
    """Measure the parity errors that the book prints, unless these very models were measured before."""
    stamp, inputs = stamp_of("proof"), proof_inputs()
    if stamp.holds(inputs) and not FORCE:
        return
    with timed("proof") as tell:
        tell("comparing every model with its reference")
        pytest("-q", "-m", "parity_row and not slow", *SIDE_BY_SIDE, *proof_tests(), log="proof")
        stamp.write(inputs, made=[BUILD / "parity.json"])


def proof_tests() -> list[str]:
    """The files with tests that declare a row of the ledger."""
    return [name for name in in_tests("test_*.py") if "@parity_row(" in (ROOT / name).read_text("utf-8")]


def proof_inputs() -> str:
    return digest(
        ROOT, [*PACKAGE, *proof_tests(), "tests/parity.py", "tests/references.py", "tests/conftest.py"]
    )


def in_tests(pattern: str) -> list[str]:
    return [path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "tests").rglob(pattern))]


def pages() -> None:
    """Execute the pages whose cells or inputs changed."""
    from execute import Book, PagesFailedError, over_budget

    book = Book(ROOT)
    with timed("pages") as tell:
        try:
            ran = book.execute(say=tell)
        except PagesFailedError as failed:
            raise StepError(str(failed)) from None
        tell(f"{len(ran)} of {len(book.pages)} executed, the others were up to date")
        slow = over_budget(book.state)
        if slow and os.environ.get("CI"):  # a reader's machine may be slower than the one that checks
            raise StepError("\n".join(slow))
        for line in slow:
            tell(line)


def sphinx(builder: str, *, with_pdf: bool) -> None:
    """Build the book with one builder, every warning an error."""
    with timed(builder) as tell:
        tell("reading what changed and writing")
        command = [tool("jupyter-book"), "build", ".", "--builder", builder, "-W", "-n", "--keep-going"]
        try:
            run(command, log=builder, env={"TEXTBOOK_CODE_PDF": "1" if with_pdf else "0"})
        except StepError:  # what was read with a warning must be read, and warn, again
            (BUILD / ".doctrees" / "environment.pickle").unlink(missing_ok=True)
            raise


@contextmanager
def typesetting() -> Iterator[Callable[[], Path]]:
    """Run LaTeX beside what is done inside; the function it gives waits for the PDF."""
    from latex import LatexError, Run

    running = Run(LATEX)

    def finish() -> Path:
        with timed("pdf") as tell:
            try:
                made, report = running.wait()
            except LatexError as error:
                raise StepError(str(error)) from None
            for line in report.wide:
                tell(line)
            return made

    try:
        yield finish
    finally:
        running.stop()


def page_pdfs(book: Path) -> None:
    """Cut the book's PDF into one a page, beside the HTML."""
    with timed("page PDFs"):
        run([sys.executable, "book/_tools/page_pdfs.py", str(book), str(HTML)], log="page-pdfs")


# ------------------------------------------------------------------ commands


def make_book(*, html: bool = True, pdf: bool = True) -> None:
    """HTML, PDF or both; what was built from these very inputs is left alone."""
    name = "book" if html and pdf else "html" if html else "pdf"
    stamp = stamp_of(name)
    with only_one(BUILD / ".lock"):
        data(named_in_tests() | named_in_pages())
        proof()
        inputs = book_inputs()  # as it is now: what is edited from here on is for the next build
        pages()
        can = pdf and ensure_latex()
        if pdf and not can:
            say("no PDF without LaTeX; the HTML is built", step="pdf")
            if not html:
                raise StepError("there is no LaTeX")
        made = []
        if can:
            sphinx("latex", with_pdf=True)
            with typesetting() as finish:
                if html:
                    sphinx("html", with_pdf=True)
                made.append(finish())
            if html:
                page_pdfs(made[0])
        elif html:
            sphinx("html", with_pdf=False)
        if html:
            made.insert(0, HTML / "index.html")
        stamp.write(inputs, made=made, without_latex=pdf and not can)
    print(closing_table())
    for path in made:
        print(f"{path.suffix[1:].upper():>12} | {path}")


def book_inputs() -> str:
    return digest(ROOT, [*BOOK, *SHOWN], extra=[Environment().inputs])


def test(arguments: Sequence[str]) -> None:
    """All fast tests, side by side; then those of the built pages, where there are pages and a browser."""
    data(named_in_tests())
    inputs, proof = test_inputs(), proof_inputs()  # as they are now: what is edited from here on is untested
    with timed("tests"):
        closing = pytest(*SIDE_BY_SIDE, *arguments)
    reason = why_no_browser_tests()
    if reason is None:
        with timed("browser"):
            closing += "\n" + pytest("-m", "browser", *SIDE_BY_SIDE, *arguments)
    else:
        for file in browser_tests():
            say(f"skipped {file}: {reason}", step="browser")
    if not arguments:
        stamp_of("test").write(inputs, closing=closing)
        stamp_of("proof").write(proof, made=[BUILD / "parity.json"])
    print(closing_table())


def test_slow(arguments: Sequence[str]) -> None:
    """The tests that take minutes, one after the other."""
    data(named_in_tests())
    with timed("slow tests"):
        pytest("-m", "slow", *arguments)


def stamp_of(step: str) -> Stamp:
    return Stamp(BUILD / ".stamps" / f"{step}.json")


def test_inputs() -> str:
    html = stamp_of("book").read().get("when", "not built")
    return digest(ROOT, TESTS, extra=[Environment().inputs, html, str(browser())])


def why_no_browser_tests() -> str | None:
    """Why the built pages cannot be checked here, if they cannot."""
    if browser() is None:
        return "no Chromium on the path; install the package chromium"
    if not (HTML / "index.html").is_file():
        return "the book is not built; run make book first"
    return None


def browser_tests() -> list[str]:
    """The files with tests that need a browser."""
    return [name for name in in_tests("test_*.py") if "mark.browser" in (ROOT / name).read_text("utf-8")]


def named_in_tests() -> set[str]:
    """The sources of data or weights whose names stand as strings in the tests."""
    from textbook_code.data.sources import SOURCES

    names = set()
    for file in in_tests("*.py"):
        for node in ast.walk(ast.parse((ROOT / file).read_text("utf-8"))):
            if isinstance(node, ast.Constant) and node.value in SOURCES:
                names.add(node.value)
    return names


def named_in_pages() -> set[str]:
    """The sources of data or weights that the pages name."""
    from execute import Book

    return {name for page in Book(ROOT).pages for name in page.data}


def lint() -> None:
    """Style, types, spelling, and numbers typed by hand; all of them, before the first is mended."""
    checks = {
        "style": [tool("ruff"), "check", "."],
        "format": [tool("ruff"), "format", "--check", "."],
        "types": [tool("mypy")],
        "spelling": [tool("codespell")],
        "numbers": [sys.executable, "book/_tools/lint_numbers.py"],
    }
    failed = []
    for name, command in checks.items():
        say(" ".join(Path(part).name if i == 0 else part for i, part in enumerate(command)), step=name)
        if subprocess.run(command, cwd=ROOT, check=False).returncode:
            failed.append(name)
    if failed:
        raise StepError(f"not clean: {', '.join(failed)}")


def serve() -> None:
    """The HTML on a local port, until interrupted."""
    if not (HTML / "index.html").is_file():
        make_book(pdf=False)
    port = os.environ.get("PORT", "8000")
    say(f"http://localhost:{port}  (Ctrl-C ends it)", step="serve")
    command = [sys.executable, "-m", "http.server", port, "--bind", "127.0.0.1", "--directory", str(HTML)]
    subprocess.run(command, check=False)


def experiment(arguments: Sequence[str]) -> None:
    if not arguments:
        raise StepError("name the experiment: make experiment NAME=…")
    run([sys.executable, "-m", "textbook_code.recorded", "run", *arguments])


def clean() -> None:
    """Remove what was built."""
    caches = [".pytest_cache", ".ruff_cache", ".mypy_cache", ".hypothesis", "dist"]
    for name in ["_build", *caches]:
        if (ROOT / name).exists():
            shutil.rmtree(ROOT / name)
            say(f"removed {name}", step="clean")


# ------------------------------------------------------------------ tools


def tool(name: str) -> str:
    """A program of the environment."""
    return str(Path(sys.executable).parent / name)


def run(command: Sequence[str], *, log: str = "", env: dict[str, str] | None = None) -> None:
    """Run a program at the root; with `log` its output goes to a file, and to the screen if it fails."""
    environment = {**os.environ, **ONE_THREAD, **(env or {})}
    if not log:
        if status := subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode:
            raise StepError(f"{Path(command[0]).name} {' '.join(command[1:])} ended with status {status}")
        return
    LOGS.mkdir(parents=True, exist_ok=True)
    path = LOGS / f"{log}.log"
    with path.open("w") as file:
        status = subprocess.run(
            command, cwd=ROOT, env=environment, check=False, stdout=file, stderr=subprocess.STDOUT
        ).returncode
    if status:
        lines = re.sub(r"\x1b\[[0-9;]*m", "", path.read_text("utf-8", errors="replace")).splitlines()
        marked = [line for line in lines if "WARNING" in line or "ERROR" in line]
        raise StepError("\n".join([*(marked or lines[-40:]), *lines[-5:], f"the whole log: {path}"]))


def pytest(*arguments: str, log: str = "") -> str:
    """Run the tests and return pytest's own closing line."""
    command = [sys.executable, "-m", "pytest", *arguments]
    if log:
        run(command, log=log)
        return ""
    process = subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, **ONE_THREAD}, stdout=subprocess.PIPE, text=True, bufsize=1
    )
    last = ""
    assert process.stdout is not None
    for line in process.stdout:
        print(line, end="", flush=True)
        last = line.strip() or last
    if status := process.wait():
        raise StepError(f"pytest ended with status {status}: {last}")
    return last


@contextmanager
def only_one(lock: Path) -> Iterator[None]:
    """Two builds of one folder at once would trip over each other: the second waits."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another build is at work here; waiting for it", step="lock")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def up_to_date(command: str, arguments: Sequence[str]) -> str | None:
    """What to say where nothing has to be done; decided without importing the book's libraries."""
    if FORCE or arguments or not Environment().is_ready():
        return None
    if command in ("book", "html", "pdf"):
        stamp = stamp_of(command)
        without_latex = stamp.read().get("without_latex", False)
        if stamp.holds(book_inputs()) and not (without_latex and not missing_latex()):
            made = "\n".join(f"  {path}" for path in stamp.read()["made"])
            note = "\n  no PDF, because there is no LaTeX" if without_latex else ""
            return f"{command}: up to date, built from these very files\n{made}{note}"
    if command == "test" and stamp_of("test").holds(test_inputs()):
        kept = stamp_of("test").read()
        return f"test: these very files passed at {kept['when']} (FORCE=1 runs them again)\n{kept['closing']}"
    return None


def main(arguments: Sequence[str]) -> int:
    command, *rest = arguments or ["--help"]
    commands: dict[str, Callable[[], None]] = {
        "book": make_book,
        "html": lambda: make_book(pdf=False),
        "pdf": lambda: make_book(html=False),
        "serve": serve,
        "test": lambda: test(rest),
        "test-slow": lambda: test_slow(rest),
        "lint": lint,
        "bench": lambda: run([sys.executable, "-m", "benchmarks", *rest]),
        "ledger": lambda: run(
            [sys.executable, "-m", "pytest", "-q", "--update-ledger", "--collect-only"], log="ledger"
        ),
        "experiment": lambda: experiment(rest),
        "clean": clean,
        # steps by themselves, for the checks on a clean machine
        "environment": lambda: None,
        "fetch": lambda: data(named_in_tests() | named_in_pages()),
        "pages": pages,
    }
    if command not in commands:
        print(__doc__)
        return 0 if command in ("--help", "-h", "help") else 2
    try:
        if (nothing := up_to_date(command, rest)) is not None:
            print(nothing)
            return 0
        if command != "clean":
            environment(arguments)
        commands[command]()
    except StepError as error:
        print(f"\n{error}\n\nmake {command}: stopped; the same command goes on from here", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\nInterrupted. What was finished is kept; `make {command}` goes on from there.")
        return 130
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # told to end, it takes its programs with it
    sys.exit(main(sys.argv[1:]))
