"""The cache on disk: where sources live, how one comes to be there whole or not at all.

The cache is the folder named by ``TEXTBOOK_CODE_CACHE``, else ``textbook_code`` in the user's cache folder.
With ``TEXTBOOK_CODE_OFFLINE=1`` the network is never used.

    NAME-VERSION/   a source: its verified files and what was made of them, with stamps of their hashes
    archives/       verified archives that an interruption kept from being unpacked
    .work/NAME/     what is being made; emptied by whoever holds .locks/NAME.lock

Book: setup
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from textbook_code.data.archive import FileStamp, sha256_of, unpack
from textbook_code.data.download import download
from textbook_code.data.errors import (
    CacheError,
    NetworkError,
    NoSpaceError,
    NotInRegistryError,
    OfflineError,
    SourceError,
    ToolMissingError,
    WrongHashError,
)
from textbook_code.extras import require

if TYPE_CHECKING:
    from rich.console import Console

    from textbook_code.data.sources import Conversion, Route, Source

_STAMP = ".verified.json"  # of the members
_CONVERTED = ".converted.json"  # of the files made of them
_SLACK = 16 << 20  # bytes kept free beyond what a source needs


def cache_root() -> Path:
    """The folder that holds everything fetched; it need not exist yet.

    Book: setup
    """
    if chosen := os.environ.get("TEXTBOOK_CODE_CACHE"):
        return Path(chosen).expanduser().absolute()
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "textbook_code"


def is_offline() -> bool:
    """Whether ``TEXTBOOK_CODE_OFFLINE`` forbids the network.

    Book: setup
    """
    return os.environ.get("TEXTBOOK_CODE_OFFLINE", "0") not in ("", "0")


def folder_of(source: Source) -> Path:
    """Where a source lives in the cache, be it there or not.

    Book: data-and-licences
    """
    return cache_root() / f"{source.name}-{source.routes[0].version}"


def is_whole(folder: Path, source: Source, *, verify: bool = False) -> bool:
    """Whether ``folder`` holds every file of ``source`` with its verified size, or hash if ``verify``.

    Book: data-and-licences
    """
    return _holds(folder, _STAMP, source.pinned, verify) and (
        source.conversion is None or _holds(folder, _CONVERTED, source.fingerprint, verify)
    )


def _holds(folder: Path, stamp_name: str, fingerprint: str, verify: bool) -> bool:
    """Whether the stamp is of that fingerprint and each file as the stamp says."""
    try:
        stamp = json.loads((folder / stamp_name).read_text(encoding="utf-8"))
        if stamp["fingerprint"] != fingerprint:
            return False
        files = {folder / path: FileStamp(*file) for path, file in stamp["files"].items()}
        return all(
            path.stat().st_size == file.size and (not verify or sha256_of(path) == file.sha256)
            for path, file in files.items()
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


def bytes_in(folder: Path) -> int:
    """Bytes of all files below ``folder``, even while others come and go in it.

    Book: setup
    """
    total = 0
    for parent, _, names in os.walk(folder):  # unlike rglob, it shrugs when a folder has just gone
        for name in names:
            with suppress(OSError):
                total += Path(parent, name).stat().st_size
    return total


def bring(source: Source, *, progress: bool = True, verify: bool = False) -> Path:
    """Download, verify, unpack, convert, move into place; ``textbook_code.data.sources.fetch`` describes it.

    Book: data-and-licences
    """
    for module in source.conversion.needs if source.conversion else ():
        require(module, extra="weights")  # before the download, which would be for nothing
    root, folder, console = cache_root(), folder_of(source), _terminal() if progress else None
    with _clear_disk_errors(root), _lock(root, source, console):
        if is_whole(folder, source, verify=verify):  # another process brought it while we waited
            return folder
        with _work_folder(root / ".work" / source.name) as work:
            if not _holds(folder, _STAMP, source.pinned, verify):
                _unpack(source, root, folder, work, console)
            if source.conversion is not None:
                _require_space(root, source.conversion.size, source.name)
                _convert(source, source.conversion, folder, work, console)
    return folder


def _unpack(source: Source, root: Path, folder: Path, work: Path, console: Console | None) -> None:
    """The members, verified, in a folder that is moved into place in one step."""
    route, archive = _archive(source, root, work, console)
    fresh = work / "unpacked"
    try:
        files = unpack(archive, route.root, source.members, fresh)
    except Exception:  # only an interruption is worth keeping the archive for
        archive.unlink()
        raise
    _write_stamp(fresh / _STAMP, source.pinned, files)
    if folder.exists():  # damaged, or of an older registry
        folder.rename(work / "old")
    fresh.rename(folder)
    archive.unlink()


def _convert(
    source: Source, conversion: Conversion, folder: Path, work: Path, console: Console | None
) -> None:
    """The files made of the members. The stamp comes last: without it, they are made again."""
    from textbook_code.data.convert import CONVERTERS

    made = work / "converted"
    made.mkdir()
    (folder / _CONVERTED).unlink(missing_ok=True)
    with _conversion_bar(console, source) as tell:
        CONVERTERS[conversion.converter](folder, made, tell)
    names = sorted(str(path.relative_to(made)) for path in made.rglob("*") if path.is_file())
    if names != sorted(conversion.files):
        raise SourceError(f"{source.name}: the conversion wrote {names}, expected {list(conversion.files)}.")
    files = {name: FileStamp((made / name).stat().st_size, sha256_of(made / name)) for name in names}
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (made / name).replace(folder / name)
    _write_stamp(made / _CONVERTED, source.fingerprint, files)
    (made / _CONVERTED).replace(folder / _CONVERTED)


def _write_stamp(path: Path, fingerprint: str, files: dict[str, FileStamp]) -> None:
    path.write_text(json.dumps({"fingerprint": fingerprint, "files": files}, indent=1), encoding="utf-8")


def _archive(source: Source, root: Path, work: Path, console: Console | None) -> tuple[Route, Path]:
    """A verified archive: kept from an interrupted run, else downloaded by the first route that gives it."""
    shelf = root / "archives"
    for route in source.routes:
        kept = shelf / route.archive
        if kept.is_file() and sha256_of(kept) == route.sha256:
            return route, kept
    if is_offline():
        route = source.routes[0]
        raise OfflineError(
            f"{source.name} is not in the cache and TEXTBOOK_CODE_OFFLINE is set. Unset it and run "
            f"`textbook-code fetch {source.name}`, or put {route.archive} (sha256 {route.sha256}) into "
            f"{shelf}."
        )
    refusals: list[SourceError] = []
    for number, route in enumerate(source.routes):
        _require_space(root, route.size + source.size, source.name)
        attempt = work / f"route-{number}"
        attempt.mkdir()
        try:
            with _progress_bar(console, source, route) as watch:
                arrived = download(route, attempt, watch)
            _verify(arrived, route)
        except (NetworkError, NotInRegistryError, ToolMissingError, WrongHashError) as error:
            refusals.append(error)
            continue
        shelf.mkdir(exist_ok=True)
        return route, arrived.replace(shelf / route.archive)
    if len(refusals) == 1:
        raise refusals[0]
    raise SourceError("\n".join([f"No route leads to {source.name}.", *map(str, refusals)]))


def _verify(arrived: Path, route: Route) -> None:
    got = sha256_of(arrived)
    if got != route.sha256:
        raise WrongHashError(
            f"{arrived.name}, which {route.client} gave for {route.spec}, has sha256 {got} and "
            f"{arrived.stat().st_size} bytes, expected {route.sha256} and {route.size} bytes. It was thrown "
            "away. Trying again mends a cut download; if this comes back, the registry no longer has the "
            "pinned file."
        )


def _require_space(root: Path, need: int, name: str) -> None:
    need, free = need + _SLACK, shutil.disk_usage(root).free
    if free < need:
        raise NoSpaceError(
            f"{name} needs {need / 1e6:.0f} MB in {root}, and {free / 1e6:.0f} MB are free. Make room, or "
            "name another folder in TEXTBOOK_CODE_CACHE."
        )


@contextmanager
def _clear_disk_errors(root: Path) -> Iterator[None]:
    """Turn what the operating system says about the cache into what a reader can act on."""
    try:
        yield
    except OSError as error:
        advice = "or name another folder in TEXTBOOK_CODE_CACHE."
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NoSpaceError(f"The disk that holds {root} is full. Make room, {advice}") from error
        raise CacheError(f"The cache {root} cannot be used: {error}. Mend that, {advice}") from error


@contextmanager
def _lock(root: Path, source: Source, console: Console | None) -> Iterator[None]:
    """Hold the source's lock; the operating system lets go of it when a process dies."""
    from filelock import FileLock, Timeout

    locks = root / ".locks"
    locks.mkdir(parents=True, exist_ok=True)
    lock = FileLock(locks / f"{source.name}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        if console:
            console.print(f"{source.name}: another process is fetching it; we wait for it to finish.")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _work_folder(work: Path) -> Iterator[Path]:
    """An empty folder for the holder of the lock; what a killed process left in it goes first."""
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _terminal() -> Console | None:
    from rich.console import Console

    console = Console(stderr=True)
    return console if console.is_terminal else None


@contextmanager
def _progress_bar(
    console: Console | None, source: Source, route: Route
) -> Iterator[Callable[[Path], None] | None]:
    if console is None:
        yield None
        return
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bars:
        task = bars.add_task(f"{source.name} ({route.client}: {route.spec})", total=route.size)
        yield lambda folder: bars.update(task, completed=min(bytes_in(folder), route.size))


@contextmanager
def _conversion_bar(console: Console | None, source: Source) -> Iterator[Callable[[float], object]]:
    if console is None:
        yield lambda done: None
        return
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bars:
        task = bars.add_task(f"{source.name} (converting, once)", total=1.0)
        yield lambda done: bars.update(task, completed=done)
