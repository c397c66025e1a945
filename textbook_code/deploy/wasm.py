"""The generated C as WebAssembly: the same integers in the reader's own browser.

WebAssembly is an instruction set for a machine that only exists in software: every current browser has one,
and so has Python's `wasmtime`. Its integers wrap and shift as a microcontroller's do, so the C that runs
on a Cortex-M needs no change, only another target. `build` compiles it into one file with the weights inside
and without a single import: such a module can compute, and nothing else. `Module` runs it from Python, which
is how its bits are compared with those of all other runtimes without a browser.

Book: deploy-wasm
"""

import tempfile
import weakref
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from textbook_code.deploy import compilers
from textbook_code.deploy.c_codegen import generate
from textbook_code.extras import require
from textbook_code.weights import moved_into_place

MAX_BYTES = 300_000
IMAGE_SHAPE = (32, 32, 3)
FLAGS = (
    "--target=wasm32-freestanding",
    "-std=c99",
    "-O3",
    "-msimd128",  # sixteen int8 in a register
    "-mbulk-memory",  # clang's own memory.fill and memory.copy, instead of a library's
    "-nostdlib",
    "-DNET_TRACE",  # keep the last block's attention
    "-Wl,--no-entry",
    "-Wl,--strip-all",  # names and paths out: the same bytes on every machine
    "-Wl,-z,stack-size=16384",
)
_GLUE = Path(__file__).with_suffix(".c")
_EXPORTS = (
    "memory",
    "pixels",
    "logit",
    "person",
    "zero_point",
    "scale_numerator",
    "scale_shift",
    "num_patches",
    "attention",
)


class WasmError(RuntimeError):
    """A module that could not be built, is too large, or is none of ours.

    Book: deploy-wasm
    """


def fraction(scale: float) -> tuple[int, int]:
    """A scale as the pair (numerator, shift): numerator / 2^shift, exactly, as every 32-bit float can be.

    >>> fraction(0.375)
    (3, 3)

    Raises:
        WasmError: not positive, or too large for a 32-bit numerator.

    Book: deploy-wasm
    """
    numerator, denominator = float(np.float32(scale)).as_integer_ratio()
    if not 0 < numerator < 2**31:
        raise WasmError(f"scale: expected a positive number below 2^31, got {scale!r}")
    return numerator, denominator.bit_length() - 1


def build(
    tflite_path: str | Path,
    output: str | Path,
    *,
    max_bytes: int = MAX_BYTES,
    progress: Callable[[str], None] | None = None,
) -> Path:
    """Compile an int8 `.tflite` into one WebAssembly module, weights included.

    The same model gives the same bytes. Nothing is written where something fails.

    Args:
        tflite_path: the quantised model.
        output: the file to write.
        max_bytes: a larger module is refused.
        progress: told what is being done.

    Returns:
        `output`.

    Raises:
        CompilerMissingError: `ziglang` is missing; the message names the extra.
        CompileError: the compiler refused.
        GraphError: not a model.
        UnsupportedOpError: an operation that cannot be generated, named with its layer.
        WasmError: the module is too large, with the excess, or the model has no attention or another input.

    Book: deploy-wasm
    """
    say = progress or (lambda step: None)
    output, model = Path(output), Path(tflite_path).name
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        say("generating C")
        net = generate(tflite_path, folder, kernels="plain")
        if net.input_shape != IMAGE_SHAPE:
            raise WasmError(f"{model}: expected an input of {IMAGE_SHAPE}, got {net.input_shape}")
        if not net.num_patches:
            raise WasmError(f"{model}: expected an attention to show, found no SOFTMAX")
        numerator, shift = fraction(net.output_scale)
        flags = (*FLAGS, f"-DSCALE_NUMERATOR={numerator}", f"-DSCALE_SHIFT={shift}")
        sources = [file for file in net.files if file.suffix == ".c"]
        say("compiling for WebAssembly")
        made = folder / "net.wasm"
        compilers.build(compilers.zig(), [*sources, _GLUE], made, flags)
        content = made.read_bytes()
    if len(content) > max_bytes:
        raise WasmError(
            f"{model}: the module has {len(content):,} bytes, {len(content) - max_bytes:,} "
            f"more than the {max_bytes:,} allowed"
        )
    output.parent.mkdir(parents=True, exist_ok=True)
    with moved_into_place(output) as partial:
        partial.write_bytes(content)
    return output


def _close(*resources: Any) -> None:
    for resource in resources:
        resource.close()


class Module:
    """A module that `build` wrote, run by `wasmtime`.

    Args:
        source: its file, or its bytes.

    Attributes:
        size: bytes of the module, weights included.
        zero_point: the logit q that stands for 0; a larger one says *person*.
        scale: one step of q, in logits.
        num_patches: N.

    Raises:
        ImportError: `wasmtime` is missing; the message names the extra.
        FileNotFoundError: no such file.
        WasmError: the file is empty or damaged, wants something imported, or lacks an export of ours.

    Book: deploy-wasm
    """

    def __init__(self, source: str | Path | bytes) -> None:
        wasmtime = require("wasmtime", extra="deploy")
        name = "source" if isinstance(source, bytes) else Path(source).name
        content = source if isinstance(source, bytes) else Path(source).read_bytes()
        if content[:4] != b"\0asm":
            found = f"it begins with {content[:4]!r}" if content else "it is empty"
            raise WasmError(f"{name}: expected a WebAssembly module, but {found}")
        engine = wasmtime.Engine()
        try:
            module = wasmtime.Module(engine, content)
        except wasmtime.WasmtimeError as error:
            raise WasmError(f"{name}: a damaged WebAssembly module ({str(error).splitlines()[0]})") from error
        if wants := [f"{each.module}.{each.name}" for each in module.imports]:
            raise WasmError(f"{name}: expected a module without imports, it wants {', '.join(wants)}")
        if lacks := sorted(set(_EXPORTS) - {each.name for each in module.exports}):
            raise WasmError(f"{name}: not a module of textbook_code, it does not export {', '.join(lacks)}")
        self._store = wasmtime.Store(engine)
        weakref.finalize(self, _close, self._store, module, engine)  # at exit before wasmtime itself is gone
        self._exports = wasmtime.Instance(self._store, module, []).exports(self._store)
        self.size = len(content)
        self.zero_point = self._call("zero_point")
        self.scale = self._call("scale_numerator") / 2 ** self._call("scale_shift")
        self.num_patches = self._call("num_patches")

    def _call(self, name: str) -> int:
        return int(self._exports[name](self._store))

    @cached_property
    def _pixels(self) -> int:
        return self._call("pixels")

    @property
    def memory_bytes(self) -> int:
        """The module's memory in bytes, in whole pages of 64 KiB: weights, arena, stack and picture.

        Book: deploy-wasm
        """
        return int(self._exports["memory"].data_len(self._store))

    def _write(self, image: np.ndarray) -> None:
        self._exports["memory"].write(self._store, image.tobytes(), self._pixels)

    def logits(self, images: Any) -> np.ndarray:
        """Run each picture; returns its quantised logit.

        Args:
            images: uint8 (n, 32, 32, 3), red green blue; an array or a tensor.

        Returns:
            (n,) int8; the logit is (q − `zero_point`) · `scale`, and q > `zero_point` says *person*.

        Raises:
            TypeError: another dtype.
            ValueError: another shape.

        Book: deploy-wasm
        """
        return self._run(images)[0]

    def attention(self, images: Any) -> np.ndarray:
        """How much the last block attended to each patch: (n, N) int32, summed over heads and queries.

        A weight of 1 counts 256, so a row sums to about 256 · H · N. Arguments and errors are those of
        `logits`.

        Book: deploy-wasm
        """
        return self._run(images)[1]

    def _run(self, images: Any) -> tuple[np.ndarray, np.ndarray]:
        pixels = np.asarray(images)
        if pixels.dtype != np.uint8:
            raise TypeError(f"images: expected uint8, got {pixels.dtype}")
        if pixels.ndim != 4 or pixels.shape[1:] != IMAGE_SHAPE:
            raise ValueError(f"images: expected a shape (n, 32, 32, 3), got {pixels.shape}")
        logits = np.empty(len(pixels), np.int8)
        maps = np.empty((len(pixels), self.num_patches), "<i4")
        for i, image in enumerate(pixels):
            self._write(image)
            logits[i] = self._call("logit")
            at = self._call("attention")
            found = self._exports["memory"].read(self._store, at, at + 4 * self.num_patches)
            maps[i] = np.frombuffer(found, "<i4")
        return logits, maps.astype(np.int32)
