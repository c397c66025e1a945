"""64-bit Arm, as in a telephone or a small Linux board: the same C as a program, and ONNX Runtime.

In this file: a static program made by the package ziglang on any machine, run natively where the processor
is an Arm and under QEMU's user-mode emulation elsewhere; and an Arm Python with ONNX Runtime in a folder,
made of Debian's packages and PyPI's wheels without being root. Emulation says what is computed, and nothing
of how long it takes.

    python -m textbook_code.deploy.arm setup FOLDER      make that folder (Debian 12, apt-get, network)

Book: deploy-arm
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from textbook_code.deploy import c_codegen, compilers
from textbook_code.deploy.mcu import EmulatorMissingError, images_as_bytes

ONNXRUNTIME = "1.23.2"
"""The last version of ONNX Runtime that was seen to run under qemu-user; newer ones crash there."""

TARGET = ("--target=aarch64-linux-musl", "-static")
"""What makes of zig's clang a compiler for 64-bit Arm with its own C library inside the program."""

_DEBIAN = "bookworm"  # whose Python is 3.11
_PACKAGES = (
    "libc6", "libgcc-s1", "libstdc++6", "zlib1g", "libexpat1", "libssl3", "libffi8", "libbz2-1.0", "liblzma5",
    "python3.11-minimal", "libpython3.11-minimal", "libpython3.11-stdlib",
)  # fmt: skip
_WHEELS = (f"onnxruntime=={ONNXRUNTIME}", "numpy")
_PLATFORMS = ("manylinux_2_28_aarch64", "manylinux_2_27_aarch64", "manylinux2014_aarch64", "any")

_MAIN = """\
/* Images from standard input, 3072 bytes each; to standard output the logit of each, one a line. */
#include <stdio.h>

#include "net.h"

int main(void)
{
    static uint8_t rgb[PERSON_IMAGE_BYTES];
    size_t came;
    while ((came = fread(rgb, 1, sizeof rgb, stdin)) == sizeof rgb)
        printf("%d\\n", person_logit(rgb));
    return came != 0; /* an image that is not whole */
}
"""

_SESSION = """\
import sys
import numpy as np
import onnxruntime
images = np.load(sys.argv[2])
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
name = session.get_inputs()[0].name
out = [session.run(None, {name: images[i : i + 1]})[0].ravel()[0] for i in range(len(images))]
np.save(sys.argv[3], np.array(out, np.float32))
"""


class ArmError(RuntimeError):
    """An Arm program or environment that could not be made, or did not run to its end.

    Book: deploy-arm
    """


def is_native() -> bool:
    """Whether this machine runs 64-bit Arm Linux programs itself.

    Book: deploy-arm
    """
    return sys.platform == "linux" and platform.machine() in ("aarch64", "arm64")


def emulator() -> list[str]:
    """The command that runs a 64-bit Arm program here: nothing on an Arm, else QEMU.

    Raises:
        EmulatorMissingError: this is no Arm, and QEMU is not installed.

    Book: deploy-arm
    """
    if is_native():
        return []
    for name in ("qemu-aarch64-static", "qemu-aarch64"):
        if found := shutil.which(name):
            return [found]
    raise EmulatorMissingError("qemu-aarch64-static is not installed: apt-get install qemu-user-static")


def build(
    tflite_path: str | Path, output: str | Path, *, kernels: str = "plain", flags: Sequence[str] = ("-O3",)
) -> Path:
    """Make a static 64-bit Arm Linux program of an int8 model; it needs nothing on the machine it runs on.

    Args:
        tflite_path: the model.
        output: the program; it appears whole or not at all.
        kernels: "plain" or "fast".
        flags: how to optimise.

    Raises:
        CompilerMissingError: the package ziglang is missing.
        CompileError: it refused.
        GraphError, UnsupportedOpError: see `c_codegen.generate`.

    Book: deploy-arm
    """
    with tempfile.TemporaryDirectory() as work:
        generated = c_codegen.generate(tflite_path, Path(work) / "net", kernels=kernels)
        main = Path(work) / "main.c"
        main.write_text(_MAIN, "utf-8")
        sources = [main, *(file for file in generated.files if file.suffix == ".c")]
        include = f"-I{generated.folder}"
        compilers.build(compilers.zig(), sources, output, [include, "-s", *TARGET, *compilers.STRICT, *flags])
    return Path(output)


def run(program: str | Path, images: np.ndarray, *, timeout: float = 600.0) -> np.ndarray:
    """Run a program of `build` on images, natively or emulated.

    Args:
        program: the file.
        images: (n, 32, 32, 3) uint8.
        timeout: seconds.

    Returns:
        (n,) int8 logits.

    Raises:
        FileNotFoundError: no such program.
        EmulatorMissingError: no way to run it here.
        ArmError: it did not end well, or not within the time, or said something else than was expected.
        TypeError, ValueError: images of another kind.

    Book: deploy-arm
    """
    data, path = images_as_bytes(images), Path(program)
    if not path.is_file():
        raise FileNotFoundError(f"program: there is no {path}")
    said = _output([*emulator(), str(path.resolve())], data=data, timeout=timeout).split()
    if len(said) != len(images):
        raise ArmError(f"{path.name}: expected {len(images)} logits, got {len(said)}")
    return np.array([int(word) for word in said], np.int8)


def setup(folder: str | Path) -> Path:
    """Put an Arm Python 3.11 with NumPy and ONNX Runtime into a folder, without being root.

    Debian's packages for arm64 are downloaded and unpacked, not installed, and PyPI's wheels likewise; about
    150 MB. On an Arm there is nothing to do but `pip install onnxruntime`.

    Args:
        folder: a new one; it appears whole or not at all.

    Returns:
        The folder.

    Raises:
        FileExistsError: something is there.
        ArmError: this is no Debian 12, apt-get or dpkg is missing, or a download failed.

    Book: deploy-arm
    """
    target = Path(folder)
    if target.exists():
        raise FileExistsError(f"folder: {target} exists")
    for tool in ("apt-get", "dpkg"):
        if shutil.which(tool) is None:
            raise ArmError(f"{tool} is not installed: this environment is made of Debian's packages")
    release = platform.freedesktop_os_release().get("VERSION_CODENAME", "no Debian")
    if release != _DEBIAN:
        raise ArmError(f"expected Debian 12 ({_DEBIAN}), whose Python is 3.11, got {release}")
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        _unpack_debian(partial)
        _unpack_wheels(partial)
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def run_onnx(
    folder: str | Path, onnx_path: str | Path, images: np.ndarray, *, timeout: float = 600.0
) -> np.ndarray:
    """Run an ONNX model on the Arm ONNX Runtime of `setup`.

    Args:
        folder: as made by `setup`.
        onnx_path: a model that takes (1, 3, 32, 32) float32, each value (rgb − 128) / 128.
        images: (n, 32, 32, 3) uint8.
        timeout: seconds.

    Returns:
        (n,) float32 logits.

    Raises:
        FileNotFoundError: no such environment or model.
        EmulatorMissingError, ArmError, TypeError, ValueError: as of `run`.

    Book: deploy-arm
    """
    images_as_bytes(images)  # only to refuse what is no image
    root, model = Path(folder).resolve(), Path(onnx_path).resolve()
    python = root / "root/usr/bin/python3.11"
    if not python.is_file():
        raise FileNotFoundError(f"folder: {folder} holds no Arm Python; setup makes one")
    if not model.is_file():
        raise FileNotFoundError(f"onnx_path: there is no {onnx_path}")
    libraries = ":".join(str(root / "root" / part / "aarch64-linux-gnu") for part in ("lib", "usr/lib"))
    command = [str(python), "-c", _SESSION, str(model)]
    if not is_native():
        inside = ["-cpu", "neoverse-n1", "-L", str(root / "root"), "-E", f"LD_LIBRARY_PATH={libraries}"]
        command = [*emulator(), *inside, *command]
    environment = {
        "PYTHONHOME": str(root / "root/usr"),
        "PYTHONPATH": str(root / "site"),
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
    }
    with tempfile.TemporaryDirectory() as work:
        given, got = Path(work) / "images.npy", Path(work) / "logits.npy"
        np.save(given, (images.transpose(0, 3, 1, 2).astype(np.float32) - 128) / 128)
        _output([*command, str(given), str(got)], environment=environment, timeout=timeout)
        return np.asarray(np.load(got), np.float32)


def _unpack_debian(partial: Path) -> None:
    for place in ("apt/state/lists/partial", "apt/cache/archives/partial", "debs", "root"):
        (partial / place).mkdir(parents=True)
    apt = [
        "apt-get", "-o", f"Dir::State={partial / 'apt/state'}", "-o", f"Dir::Cache={partial / 'apt/cache'}",
        "-o", "APT::Architecture=arm64", "-o", "APT::Architectures=arm64",
        "-o", "Dir::State::status=/dev/null", "-o", "APT::Sandbox::User=root",
    ]  # fmt: skip
    _output([*apt, "update"], timeout=600)
    _output([*apt, "download", *_PACKAGES], cwd=partial / "debs", timeout=600)
    for package in sorted((partial / "debs").glob("*.deb")):
        _output(["dpkg", "-x", str(package), str(partial / "root")], timeout=60)
    shutil.rmtree(partial / "apt")
    shutil.rmtree(partial / "debs")


def _unpack_wheels(partial: Path) -> None:
    wheels = partial / "wheels"
    platforms = [word for name in _PLATFORMS for word in ("--platform", name)]
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:"]
    pip += ["--python-version", "3.11", "--implementation", "cp", *platforms, "-d", str(wheels), *_WHEELS]
    _output(pip, timeout=600)
    for wheel in sorted(wheels.glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(partial / "site")
    shutil.rmtree(wheels)


def _output(
    command: Sequence[str],
    *,
    data: bytes = b"",
    cwd: Path | None = None,
    environment: Mapping[str, str] | None = None,
    timeout: float,
) -> str:
    """What a command writes; an error with what it said where it ends badly."""
    try:
        done = subprocess.run(
            list(command), input=data, capture_output=True, cwd=cwd, timeout=timeout,
            env=None if environment is None else {**os.environ, **environment},
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise ArmError(f"{Path(command[0]).name} did not come to an end within {timeout:g} s") from error
    if done.returncode:
        said = done.stderr.decode("utf-8", "replace").strip()[-800:]
        raise ArmError(f"{Path(command[0]).name} ended with status {done.returncode}: {said}")
    return done.stdout.decode("utf-8", "replace")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line: `setup FOLDER`.

    Book: deploy-arm
    """
    parser = argparse.ArgumentParser(prog="python -m textbook_code.deploy.arm", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("setup", help="an Arm Python with ONNX Runtime").add_argument("folder", type=Path)
    given = parser.parse_args(arguments)
    try:
        print(f"{setup(given.folder)}: Python 3.11 and onnxruntime {ONNXRUNTIME} for 64-bit Arm")
    except (ArmError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
