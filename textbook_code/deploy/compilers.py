"""C compilers: which there are, how to call them, and the generated network as a function in Python.

In this file: the command of each compiler we use (`zig` from PyPI, which builds for every target; the
machine's own; the one for Arm microcontrollers), `build`, which runs one and keeps what it said, and `CNet`.

Book: deploy-c
"""

import ctypes
import hashlib
import importlib.util
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from textbook_code.data.store import cache_root
from textbook_code.weights import moved_into_place

STRICT = ("-std=c99", "-Wall", "-Wextra", "-Werror", "-pedantic", "-Wconversion")
"""What every generated file compiles with, under GCC and Clang.

Book: deploy-c
"""


class CompilerMissingError(RuntimeError):
    """No such compiler here; the message says how to install it.

    Book: deploy-c
    """


class CompileError(RuntimeError):
    """A compiler refused.

    Args:
        command: what was run.
        diagnostics: what it wrote.

    Book: deploy-c
    """

    def __init__(self, command: Sequence[str], diagnostics: str) -> None:
        self.command, self.diagnostics = tuple(command), diagnostics
        super().__init__(f"{' '.join(command)}\n{diagnostics}")


def zig() -> list[str]:
    """The command of the C compiler in the package ziglang: Clang, with the headers of every target.

    Raises:
        CompilerMissingError: the package is not installed.

    Book: deploy-c
    """
    if importlib.util.find_spec("ziglang") is None:
        raise CompilerMissingError('ziglang is missing: pip install "textbook_code[deploy]"')
    return [sys.executable, "-m", "ziglang", "cc"]


def native() -> list[str]:
    """The command of a C compiler for this machine: gcc, clang, or else `zig`.

    Raises:
        CompilerMissingError: there is none of them.

    Book: deploy-c
    """
    for name in ("gcc", "clang"):
        if found := shutil.which(name):
            return [found]
    try:
        return zig()
    except CompilerMissingError:
        raise CompilerMissingError(
            'no C compiler: expected gcc or clang on the path, or pip install "textbook_code[deploy]"'
        ) from None


def arm_none_eabi() -> list[str]:
    """The command of GCC for Arm microcontrollers without an operating system.

    Raises:
        CompilerMissingError: it is not on the path.

    Book: deploy-mcu
    """
    found = shutil.which("arm-none-eabi-gcc")
    if found is None:
        raise CompilerMissingError(
            "arm-none-eabi-gcc is not installed: apt-get install gcc-arm-none-eabi libnewlib-arm-none-eabi"
        )
    return [found]


def build(
    command: Sequence[str], sources: Sequence[Path | str], output: Path | str, flags: Sequence[str] = ()
) -> str:
    """Compile and link; the output appears whole or not at all.

    Args:
        command: from `zig`, `native` or `arm_none_eabi`.
        sources: C files; the folders they lie in are searched for headers.
        output: the program, object or library.
        flags: further options, behind the sources (so that `-lm` works).

    Returns:
        What the compiler wrote: its warnings, or nothing.

    Raises:
        FileNotFoundError: a source is not there.
        CompileError: the compiler refused.

    Book: deploy-c
    """
    files = [Path(source) for source in sources]
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"sources: expected a C file, found none at {file}")
    include = [f"-I{folder}" for folder in dict.fromkeys(str(file.parent) for file in files)]
    output = Path(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    with moved_into_place(output) as partial:
        line = [*command, *include, *map(str, files), *flags, "-o", str(partial)]
        done = subprocess.run(line, capture_output=True, text=True, errors="replace")
        if done.returncode:
            raise CompileError(line, done.stdout + done.stderr)
    return done.stdout + done.stderr


def host(sources: Sequence[Path | str], output: Path | str, flags: Sequence[str] = ("-O2",)) -> str:
    """Compile for this machine with `native`; arguments, result and errors as of `build`.

    Book: deploy-c
    """
    return build(native(), sources, output, flags)


class CNet:
    """The C that is generated from a model, compiled for this machine and called from Python.

    Args:
        tflite_path: an int8 model.
        kernels: "plain" or "fast".
        flags: how to compile it.
        command: the compiler; None is `native`.
        folder: where libraries are kept, each under a name made from its sources and flags; None is `c` in
            the package's cache.

    Raises:
        CompilerMissingError: there is no compiler.
        UnsupportedOpError: see `generate`.

    Book: deploy-c
    """

    def __init__(
        self,
        tflite_path: Path | str,
        kernels: str = "plain",
        *,
        flags: Sequence[str] = ("-O2", "-DNET_TRACE"),
        command: Sequence[str] | None = None,
        folder: Path | str | None = None,
    ) -> None:
        from textbook_code.deploy.c_codegen import generate

        command = native() if command is None else list(command)
        keep = Path(folder) if folder is not None else cache_root() / "c"
        keep.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as work:
            self.generated = generate(tflite_path, Path(work) / "net", kernels=kernels)
            key = hashlib.sha256(repr((command, tuple(flags))).encode())
            for source in sorted(self.generated.files):
                key.update(source.name.encode() + source.read_bytes())
            self.path = keep / f"net-{key.hexdigest()[:20]}{_SUFFIX}"
            if not self.path.exists():
                sources = [file for file in self.generated.files if file.suffix == ".c"]
                build(command, sources, self.path, [*STRICT, *flags, "-shared", "-fPIC"])

    @property
    def arena_bytes(self) -> int:
        """Memory that it writes, but for the stack.

        Book: deploy-c
        """
        return self.generated.arena_bytes

    @property
    def constant_bytes(self) -> int:
        """Memory that it only reads: weights, biases, factors, tables.

        Book: deploy-c
        """
        return self.generated.flash_bytes

    @cached_property
    def _library(self) -> Any:
        library = ctypes.CDLL(str(self.path))
        library.person_logit.restype = ctypes.c_int8
        library.person.restype = ctypes.c_int
        return library

    def logits(self, images: np.ndarray) -> np.ndarray:
        """The output of each image, in steps.

        Args:
            images: (n, 32, 32, 3) uint8, rgb.

        Returns:
            (n,) int8.

        Raises:
            TypeError: no uint8 array.
            ValueError: another shape.

        Book: deploy-c
        """
        call = self._library.person_logit
        return np.array([call(pixels) for pixels in self._pointers(images)], np.int8)

    def persons(self, images: np.ndarray) -> np.ndarray:
        """The decision on each image: (n, 32, 32, 3) uint8 to (n,) bool; errors as of `logits`.

        Book: deploy-c
        """
        call = self._library.person
        return np.array([call(pixels) == 1 for pixels in self._pointers(images)], bool)

    def attention(self, images: np.ndarray) -> np.ndarray:
        """How much each patch was attended to in the last block, summed over heads and queries.

        Args:
            images: (n, 32, 32, 3) uint8, rgb.

        Returns:
            (n, N) int32, in 1/256.

        Raises:
            ValueError: another shape, or the library was built without `-DNET_TRACE`.

        Book: deploy-c
        """
        if not hasattr(self._library, "person_attention"):
            raise ValueError("flags: expected -DNET_TRACE among them, without which no attention is kept")
        seen = self._library.person_attention
        seen.restype = ctypes.POINTER(ctypes.c_int32 * self.generated.num_patches)
        rows = []
        for pixels in self._pointers(images):
            self._library.person_logit(pixels)
            rows.append(np.array(seen().contents, np.int32))
        return np.array(rows, np.int32).reshape(-1, self.generated.num_patches)

    def _pointers(self, images: np.ndarray) -> list[Any]:
        shape = self.generated.input_shape
        images = np.asarray(images)
        if images.dtype != np.uint8:
            raise TypeError(f"images: expected uint8, got {images.dtype}")
        if images.ndim != 4 or images.shape[1:] != shape:
            raise ValueError(f"images: expected shape (n, {', '.join(map(str, shape))}), got {images.shape}")
        size = int(np.prod(shape))
        return [(ctypes.c_uint8 * size).from_buffer_copy(image.tobytes()) for image in images]


_SUFFIX = {"win32": ".dll", "darwin": ".dylib"}.get(sys.platform, ".so")
