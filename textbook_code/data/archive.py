"""Read the named members of an archive, and nothing else.

An archive is foreign: its names may lead outside the folder, its entries may be links, its files may be
larger than they say. So nothing is ever extracted. Each member that the registry names is copied, byte by
byte and never further than its pinned size, to the local name that the registry gives it, and its sha256 is
taken on the way.

Book: data-and-licences
"""

from __future__ import annotations

import hashlib
import lzma
import shutil
import stat
import subprocess
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, NamedTuple

from textbook_code.data.errors import BadArchiveError, ToolMissingError, WrongHashError

if TYPE_CHECKING:
    from textbook_code.data.sources import Member

_CHUNK = 1 << 20
_BROKEN = (zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, EOFError)


class FileStamp(NamedTuple):
    """Size in bytes and sha256 of one unpacked file.

    Book: data-and-licences
    """

    size: int
    sha256: str


class _Entry(NamedTuple):
    name: str
    regular: bool  # a plain file: not a folder, a link or a device
    folder: bool
    open: Callable[[], AbstractContextManager[IO[bytes]]]


def sha256_of(path: Path) -> str:
    """Sha256 of a file's bytes, in hexadecimal.

    Book: data-and-licences
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def manifest_sha256(files: dict[str, FileStamp]) -> str:
    """One sha256 for many files: that of the lines ``<sha256>  <path>``, sorted by path.

    It is what ``sha256sum`` prints, so a reader can check it by hand.

    Book: data-and-licences
    """
    lines = "".join(f"{files[path].sha256}  {path}\n" for path in sorted(files))
    return hashlib.sha256(lines.encode()).hexdigest()


def unpack(archive: Path, root: str, members: Sequence[Member], into: Path) -> dict[str, FileStamp]:
    """Copy ``members``, found below ``root`` in ``archive``, into the folder ``into`` and verify them.

    Returns size and sha256 of each written file by its path in ``into``.

    Raises:
        BadArchiveError: the archive is damaged, lacks a member, has one twice, or a member is a link or has a
            path that leads outside the folder.
        WrongHashError: a member's bytes are not those the registry pins.

    Book: data-and-licences
    """
    written: dict[Member, dict[str, FileStamp]] = {member: {} for member in members}
    try:
        with _entries(archive) as entries:
            for entry in entries:
                if entry.folder or not entry.name.startswith(root):
                    continue
                relative = entry.name.removeprefix(root)
                member = next((m for m in members if _matches(relative, m.path)), None)
                if member is None:
                    continue
                local = _local_name(archive, entry, relative, member)
                found = written[member]
                if local in found:
                    raise BadArchiveError(f"{archive.name} holds {entry.name!r} twice; expected it once.")
                room = member.size - sum(file.size for file in found.values())
                found[local] = _copy(entry, into / local, room)
    except _BROKEN as error:
        raise BadArchiveError(f"{archive.name} is damaged or cut short: {error}") from error
    for member, found in written.items():
        _verify(archive, root, member, found)
    return {local: file for found in written.values() for local, file in found.items()}


def _matches(relative: str, pattern: str) -> bool:
    """Match part by part, so that ``*`` never crosses a ``/``."""
    parts, patterns = relative.split("/"), pattern.split("/")
    return len(parts) == len(patterns) and all(map(fnmatchcase, parts, patterns))


def _local_name(archive: Path, entry: _Entry, relative: str, member: Member) -> str:
    if not entry.regular:
        raise BadArchiveError(
            f"{archive.name}: {entry.name!r} is a link or a device; only plain files are unpacked."
        )
    parts = relative.split("/")
    if any(part in ("", ".", "..") or "\\" in part or ":" in part for part in parts):
        raise BadArchiveError(
            f"{archive.name}: the path {entry.name!r} leads outside the folder; not unpacked."
        )
    return f"{member.local}/{relative}" if member.many else member.local


def _copy(entry: _Entry, target: Path, room: int) -> FileStamp:
    """Copy at most ``room`` bytes and one more, which is enough to see that the file is too long."""
    target.parent.mkdir(parents=True, exist_ok=True)
    digest, size = hashlib.sha256(), 0
    with entry.open() as source, target.open("xb") as file:
        while chunk := source.read(min(_CHUNK, room + 1 - size)):
            digest.update(chunk)
            size += len(chunk)
            file.write(chunk)
    return FileStamp(size, digest.hexdigest())


def _verify(archive: Path, root: str, member: Member, found: dict[str, FileStamp]) -> None:
    where = f"{archive.name}: {root}{member.path}"
    if not found:
        raise BadArchiveError(f"{where} is not in the archive.")
    if len(found) != member.count:
        raise BadArchiveError(f"{where}: the archive holds {len(found)} such files, expected {member.count}.")
    if member.many:
        prefix = f"{member.local}/"
        got = manifest_sha256({path.removeprefix(prefix): file for path, file in found.items()})
    else:
        got = found[member.local].sha256
    if got != member.sha256:
        raise WrongHashError(f"{where} has sha256 {got}, expected {member.sha256}.")


@contextmanager
def _entries(archive: Path) -> Iterator[Iterator[_Entry]]:
    """Yield the entries of a zip (wheel), a tar (sdist, npm package) or a Debian package."""
    if archive.suffix == ".deb":
        with _deb_payload(archive) as stream, tarfile.open(fileobj=stream, mode="r|") as tar:
            yield _tar_entries(tar)
    elif zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as bundle:
            yield _zip_entries(bundle)
    else:
        with tarfile.open(archive, mode="r:*") as tar:
            yield _tar_entries(tar)


def _zip_entries(bundle: zipfile.ZipFile) -> Iterator[_Entry]:
    for info in bundle.infolist():
        kind = stat.S_IFMT(info.external_attr >> 16)  # 0 where the archive was not made on Unix
        yield _Entry(info.filename, kind in (0, stat.S_IFREG), info.is_dir(), partial(bundle.open, info))


def _tar_entries(tar: tarfile.TarFile) -> Iterator[_Entry]:
    for info in tar:
        yield _Entry(info.name.removeprefix("./"), info.isreg(), info.isdir(), partial(_tar_open, tar, info))


def _tar_open(tar: tarfile.TarFile, info: tarfile.TarInfo) -> IO[bytes]:
    file = tar.extractfile(info)
    assert file is not None  # only asked of plain files
    return file


@contextmanager
def _deb_payload(archive: Path) -> Iterator[IO[bytes]]:
    """The tar inside a Debian package, decompressed by dpkg-deb, which knows every compression in use."""
    tool = shutil.which("dpkg-deb")
    if tool is None:
        raise ToolMissingError("dpkg-deb is not installed; a Debian package can only be read where it is.")
    command = [tool, "--fsys-tarfile", str(archive)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        yield process.stdout
        while process.stdout.read(_CHUNK):  # let it end by itself, else its status means nothing
            pass
    if process.returncode != 0:
        raise BadArchiveError(f"{archive.name} is not a Debian package that dpkg-deb can read.")
