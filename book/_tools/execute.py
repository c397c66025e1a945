"""Execute the pages of the book that changed, or whose inputs did, side by side, into the notebook cache.

    python book/_tools/execute.py                   all pages of _toc.yml
    python book/_tools/execute.py attention …       those whose name ends so

Each page runs in a process and a kernel of its own, with one thread. What is finished is kept at once, so
that an interrupted run goes on where it stopped. Sphinx then finds every page in `_build/.jupyter_cache` and
executes nothing. `_build/execution.json` tells what ran, when, and how long it took.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

TOOLS = Path(__file__).resolve().parent
sys.path.insert(0, str(TOOLS))  # the folder of a script is not on the path where PYTHONSAFEPATH is set

import cachekey  # noqa: E402
import nbformat  # noqa: E402
import yaml  # noqa: E402
from cachekey import Inputs, inputs_of  # noqa: E402
from jupyter_cache.base import CacheBundleIn  # noqa: E402
from jupyter_cache.cache.db import NbCacheRecord, session_context  # noqa: E402
from jupyter_cache.cache.main import JupyterCacheBase  # noqa: E402
from myst_nb.core.read import is_myst_markdown_notebook, read_myst_markdown_notebook  # noqa: E402
from myst_parser.config.main import MdParserConfig  # noqa: E402

EXTENSIONS = ("colon_fence", "dollarmath", "linkify", "substitution", "tasklist")  # Jupyter Book's own
PAGE_SECONDS, MEDIAN_SECONDS, BOOK_SECONDS = 60, 30, 30 * 60  # of processor time
MANY = 16  # pages: the median of fewer says what kind of pages they are, not what the book costs
ONE_THREAD = dict.fromkeys(
    ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS"), "1"
)
KERNEL = ONE_THREAD | {
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONHASHSEED": "0",
    "HF_HUB_OFFLINE": "1",  # a page's data come through the package's own registry
    "MPLBACKEND": "module://matplotlib_inline.backend_inline",
}


class PagesFailedError(Exception):
    """Some pages could not be executed; the message shows each one's cell and traceback."""


@dataclass(frozen=True)
class Page:
    """A page with code, as it is now.

    `parts` are what its outputs depend on (see cachekey), `key` is one hash of them.
    """

    name: str
    path: Path
    notebook: nbformat.NotebookNode
    parts: dict[str, str]
    key: str

    @property
    def cells(self) -> int:
        return sum(cell.cell_type == "code" for cell in self.notebook.cells)

    @property
    def data(self) -> list[str]:
        """The sources of data or weights it names."""
        return [part.removeprefix("data:") for part in self.parts if part.startswith("data:")]

    def line(self, cell: int) -> int:
        """The line of the page that a cell's code starts on."""
        return int(self.notebook.metadata["source_map"][cell]) + 1


class Book:
    """The pages at `root`, with their outputs in `build`.

    Args:
        root: the folder of `_toc.yml`.
        build: where the cache and `execution.json` are.
        inputs: what pages depend on; by default the repository's.
    """

    def __init__(self, root: Path, build: Path | None = None, inputs: Inputs | None = None) -> None:
        self.root = root.resolve()
        self.build = build or Path(os.environ.get("TEXTBOOK_CODE_BUILD") or self.root / "_build")
        self.inputs = inputs or inputs_of(self.root)
        self.cache = JupyterCacheBase(self.build / ".jupyter_cache")

    @cached_property
    def pages(self) -> list[Page]:
        """All pages with code, in the book's order."""
        found = (self._read(name) for name in _documents(self.root / "_toc.yml"))
        return [page for page in found if page is not None]

    def _read(self, name: str) -> Page | None:
        path = self.root / f"{name}.md"
        text = path.read_text("utf-8") if path.is_file() else ""
        if not is_myst_markdown_notebook(text):
            return None
        config = MdParserConfig(enable_extensions=self._extensions)
        notebook = read_myst_markdown_notebook(text, config=config, add_source_map=True, path=str(path))
        code = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
        _, cells_hash = self.cache.create_hashed_notebook(notebook)
        parts = cachekey.parts(path, text, code, cells_hash, self.inputs)
        return Page(name, path, notebook, parts, cachekey.key(parts))

    @cached_property
    def _extensions(self) -> set[str]:
        """The syntax the pages are written in, so that the same cells are seen here and by Sphinx."""
        config = self.root / "_config.yml"
        options = (yaml.safe_load(config.read_text("utf-8")) if config.is_file() else None) or {}
        return set(options.get("parse", {}).get("myst_enable_extensions", EXTENSIONS))

    # ------------------------------------------------------------ what is done and what is to do

    def record(self, page: Page) -> dict[str, Any] | None:
        """What is kept of the last run of these very cells, whatever else has changed since."""
        try:
            return dict(self.cache.match_cache_notebook(page.notebook).data or {})
        except KeyError:
            return None

    def is_fresh(self, page: Page) -> bool:
        return (self.record(page) or {}).get("key") == page.key

    def reason(self, page: Page) -> str:
        """Why a page has to run."""
        if (record := self.record(page)) is None:
            return "its cells are new"
        changed = cachekey.changes(record.get("parts", {}), page.parts)
        named = ", ".join(changed[:3]) + (f" and {len(changed) - 3} more" if len(changed) > 3 else "")
        return f"{named} changed" if changed else "the way pages are run has changed"

    # ------------------------------------------------------------ execution

    def execute(
        self,
        pages: Sequence[Page] | None = None,
        *,
        jobs: int | None = None,
        say: Callable[[str], None] = print,
    ) -> list[str]:
        """Run the pages that are not fresh, and return their names.

        Raises:
            PagesFailedError: after all have been tried, if any failed.
        """
        with _one_at_a_time(self.build / ".execute.lock", say):
            pages = self.pages if pages is None else pages
            todo = [page for page in pages if not self.is_fresh(page)]
            todo.sort(key=lambda page: -(self.record(page) or {}).get("wall_seconds", 60.0))  # longest first
            failures = list(self._run(todo, jobs or _jobs(len(todo)), say)) if todo else []
            self._write_state({page.name for page, _ in failures})
        if failures:
            raise PagesFailedError("\n\n".join(text for _, text in failures))
        return [page.name for page in todo]

    def _run(self, todo: list[Page], jobs: int, say: Callable[[str], None]) -> Iterator[tuple[Page, str]]:
        """Run pages side by side; yields those that failed."""
        for page in todo:
            say(f"{page.name}: {self.reason(page)}")
        processes: set[subprocess.Popen[str]] = set()
        stopping = threading.Event()
        with (
            tempfile.TemporaryDirectory(prefix="pages-") as work,
            _sigterm_is_an_interrupt(),
            ThreadPoolExecutor(jobs) as pool,
        ):
            futures = {
                pool.submit(_in_process, page, Path(work) / str(i), processes, stopping): page
                for i, page in enumerate(todo)
            }
            try:
                for done, future in enumerate(as_completed(futures), 1):
                    page, result = futures[future], future.result()
                    seconds = f"{result['cpu_seconds']:.1f} s CPU, {result['wall_seconds']:.1f} s"
                    if "error" in result:
                        say(f"{page.name}: failed ({seconds})  [{done}/{len(todo)}]")
                        yield page, _failure(page, result["error"], self.root)
                    else:
                        self._keep(page, result)
                        say(f"{page.name}: {page.cells} cells, {seconds}  [{done}/{len(todo)}]")
            except BaseException:
                stopping.set()
                for process in list(processes):
                    process.terminate()
                pool.shutdown(cancel_futures=True)
                raise

    def _keep(self, page: Page, result: dict[str, Any]) -> None:
        notebook = nbformat.from_dict(result["notebook"])
        data = {
            "key": page.key,
            "parts": page.parts,
            "cells": page.cells,
            "cpu_seconds": round(result["cpu_seconds"], 2),
            "wall_seconds": round(result["wall_seconds"], 2),
            "execution_seconds": result["wall_seconds"],  # the name that myst-nb reads
            "when": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        bundle = CacheBundleIn(notebook, str(page.path))
        record = self.cache.cache_notebook_bundle(bundle, check_validity=False, overwrite=True)
        with session_context(self.cache.db) as session:  # last: a record with a key is a whole one
            session.query(NbCacheRecord).filter_by(pk=record.pk).update({"data": data})
            session.commit()

    @property
    def state(self) -> dict[str, dict[str, Any]]:
        """The content of execution.json."""
        return dict(json.loads((self.build / "execution.json").read_text("utf-8")))

    def _write_state(self, failed: set[str]) -> None:
        """Write execution.json anew from the cache; unchanged content leaves the file as it is."""
        state = {}
        for page in self.pages:
            record = self.record(page) or {}
            if page.name in failed:
                state[page.name] = {"key": page.key, "cells": page.cells, "status": "failed"}
            elif record.get("key") == page.key:
                wanted = ("key", "cpu_seconds", "wall_seconds", "cells", "when")
                state[page.name] = {name: record[name] for name in wanted} | {"status": "ok"}
        text = json.dumps(state, indent=1, sort_keys=True) + "\n"
        out = self.build / "execution.json"
        if not out.is_file() or out.read_text("utf-8") != text:
            part = out.with_name(f"{out.name}.{os.getpid()}.part")
            part.write_text(text, "utf-8")
            part.replace(out)


def over_budget(state: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What in execution.json takes longer than the book allows itself, in words."""
    seconds = {name: page["cpu_seconds"] for name, page in state.items() if "cpu_seconds" in page}
    found = [
        f"{name}: {taken:.0f} CPU-seconds, at most {PAGE_SECONDS} are allowed; make it an experiment"
        for name, taken in seconds.items()
        if taken > PAGE_SECONDS
    ]
    if len(seconds) >= MANY and (median := statistics.median(seconds.values())) > MEDIAN_SECONDS:
        found.append(f"the median page takes {median:.0f} CPU-seconds, at most {MEDIAN_SECONDS} are allowed")
    if (total := sum(seconds.values())) > BOOK_SECONDS:
        found.append(f"all pages take {total:.0f} CPU-seconds, at most {BOOK_SECONDS} are allowed")
    return found


def _documents(toc: Path) -> list[str]:
    """All documents of a table of contents, in order."""
    from sphinx_external_toc.parsing import parse_toc_yaml

    return list(parse_toc_yaml(toc))


def _jobs(pages: int) -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(int(os.environ.get("BOOK_JOBS") or cores), pages))


def _in_process(
    page: Page, work: Path, processes: set[subprocess.Popen[str]], stopping: threading.Event
) -> dict[str, Any]:
    """Run one page in a process of its own and return what run_page.py says of it."""
    if stopping.is_set():
        raise InterruptedError
    work.mkdir()
    source, out = work / "page.ipynb", work / "out.json"
    source.write_text(nbformat.writes(page.notebook), "utf-8")
    command = [sys.executable, str(TOOLS / "run_page.py"), str(source), str(page.path.parent), str(out)]
    environment = {**os.environ, **KERNEL, "IPYTHONDIR": str(work / "ipython")}  # no user's start-up files
    process = subprocess.Popen(
        command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    processes.add(process)
    try:
        said, _ = process.communicate()
    finally:
        processes.discard(process)
    if not out.is_file():
        message = f"the process that ran the page ended with status {process.returncode}\n{said}"
        return {"error": {"cell": None, "traceback": message}, "cpu_seconds": 0.0, "wall_seconds": 0.0}
    return dict(json.loads(out.read_text("utf-8")))


def _failure(page: Page, error: dict[str, Any], root: Path) -> str:
    """Page, cell, code and traceback, as an author wants to see them."""
    cell, traceback = error["cell"], error["traceback"]
    if not sys.stdout.isatty():
        traceback = re.sub(r"\x1b\[[0-9;]*m", "", traceback)
    if cell is None:
        return f"{page.path.relative_to(root)}: {traceback}"
    number = sum(c.cell_type == "code" for c in page.notebook.cells[: cell + 1])
    code = "\n".join(f"    {line}" for line in page.notebook.cells[cell].source.splitlines())
    where = f"{page.path.relative_to(root)}:{page.line(cell)}: code cell {number} of {page.cells} failed"
    return f"{where}\n\n{code}\n\n{traceback.rstrip()}"


@contextmanager
def _one_at_a_time(lock: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Two builds must not write one cache: the second waits."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another build is executing pages; waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def _sigterm_is_an_interrupt() -> Iterator[None]:
    """So that a build that is told to end takes its workers with it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(signum: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def main(names: list[str]) -> int:
    book = Book(Path.cwd())
    wanted = [page for page in book.pages if any(page.name.endswith(name) for name in names)]
    if names and not wanted:
        print(f"no page is named {', '.join(names)}; pages: {', '.join(page.name for page in book.pages)}")
        return 2
    try:
        ran = book.execute(wanted or None)
    except PagesFailedError as failed:
        print(f"\n{failed}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nInterrupted. Pages that were finished are kept; the same command goes on from there.")
        return 130
    print(f"{len(ran)} of {len(wanted or book.pages)} pages executed, the others were up to date")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
