"""Firmware for a Cortex-M: a project that a reader can open, built and run under QEMU.

In this file: the boards, the generator of the project, and the two commands that it is built and run with.
The C of the network comes from `textbook_code.deploy.c_codegen`; what stands around it, the start-up code,
the linker script, the way in and out, is in the folder `firmware` beside this file and is copied as it is.

A project has no library beneath it: no operating system, no C library, no memory to allocate. It builds with
`arm-none-eabi-gcc`, or with the clang of the package `ziglang`, and runs on three boards that QEMU knows.
QEMU counts instructions, never milliseconds.

Book: deploy-mcu
"""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

import numpy as np

from textbook_code.deploy import c_codegen, compilers, graph

__all__ = [
    "BOARDS", "IMAGE_BYTES", "INSTRUCTIONS_PER_TICK", "Board", "EmulatorMissingError", "FirmwareError",
    "McuRun", "Project", "StepCost", "build", "elf_sizes", "images_as_bytes", "project", "run",
]  # fmt: skip

IMAGE_BYTES = 3072
"""32 × 32 pixels of red, green and blue."""

INSTRUCTIONS_PER_TICK = 40
"""Under `-icount shift=0` an instruction takes one nanosecond of QEMU's time, and a tick 1 s / 25 MHz."""

_FIRMWARE = Path(__file__).parent / "firmware"
_TOOLCHAINS = ("gcc", "zig")
_IO = ("semihost", "uart")
_ADD = {  # the resolver's method for each kind of operation, as TFLite Micro names them
    "ADD": "AddAdd", "BATCH_MATMUL": "AddBatchMatMul", "CONV_2D": "AddConv2D",
    "FULLY_CONNECTED": "AddFullyConnected", "HARD_SWISH": "AddHardSwish", "MEAN": "AddMean", "MUL": "AddMul",
    "RELU": "AddRelu", "RESHAPE": "AddReshape", "RSQRT": "AddRsqrt", "SOFTMAX": "AddSoftmax",
    "SQUARED_DIFFERENCE": "AddSquaredDifference", "SUB": "AddSub", "TRANSPOSE": "AddTranspose",
}  # fmt: skip


class FirmwareError(RuntimeError):
    """A program that could not be built, did not fit, or did not run to its end.

    Book: deploy-mcu
    """


class EmulatorMissingError(FirmwareError, compilers.CompilerMissingError):
    """QEMU is not installed; the message says how to get it.

    Book: deploy-mcu
    """


@dataclass(frozen=True)
class Board:
    """A board that QEMU emulates, and how to compile for its core.

    Args:
        name: of the machine, for `qemu-system-arm -M`.
        cpu: the core.
        gcc: the flags of `arm-none-eabi-gcc`.
        zig: the flags of `python -m ziglang cc`.
        dsp: whether the core has the dual multiply-accumulate.

    Book: deploy-mcu
    """

    name: str
    cpu: str
    gcc: tuple[str, ...]
    zig: tuple[str, ...]
    dsp: bool


def _board(name: str, cpu: str, fpu: str, *, dsp: bool) -> Board:
    gcc = (f"-mcpu={cpu}", "-mthumb", *((f"-mfpu={fpu}", "-mfloat-abi=hard") if fpu else ()))
    abi = "eabihf" if fpu else "eabi"
    zig = (f"--target=thumb-freestanding-{abi}", f"-mcpu={cpu.replace('-', '_')}")
    return Board(name, cpu, gcc, zig, dsp)


BOARDS: Mapping[str, Board] = MappingProxyType(
    {
        board.name: board
        for board in (
            _board("mps2-an500", "cortex-m7", "fpv5-sp-d16", dsp=True),
            _board("mps2-an386", "cortex-m4", "fpv4-sp-d16", dsp=True),
            _board("mps2-an385", "cortex-m3", "", dsp=False),
        )
    }
)
"""The boards by name: Cortex-M7, M4 and M3."""


@dataclass(frozen=True)
class Project:
    """A firmware project on disk, as `project` has written it.

    Args:
        folder: where it is.
        board: the name of its board.
        toolchain: "gcc" or "zig".
        kernels: which kernels the network was generated with.
        flash, ram, stack: the bytes that the linker script gives.

    Book: deploy-mcu
    """

    folder: Path
    board: str
    toolchain: str
    kernels: str
    flash: int
    ram: int
    stack: int

    @classmethod
    def open(cls, folder: str | Path) -> Project:
        """The project in `folder`.

        Raises:
            FirmwareError: there is none.

        Book: deploy-mcu
        """
        path = Path(folder) / "project.json"
        try:
            return cls(folder=Path(folder), **json.loads(path.read_text("utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise FirmwareError(
                f"folder: {folder} holds no firmware project ({path.name}: {error})"
            ) from error


@dataclass(frozen=True)
class StepCost:
    """What one kind of operation takes, all its steps together.

    Args:
        steps: how many there are.
        macs: multiply-accumulates.
        instructions: of one image.

    Book: deploy-c-simd
    """

    steps: int
    macs: int
    instructions: float


@dataclass(frozen=True)
class McuRun:
    """What a run under QEMU gave.

    Args:
        cpu: the core.
        logits: int8, one an image.
        instructions: of one image, the largest number.
        per_image: int64, of each image.
        flash_bytes: code, constants, and the starting values of variables.
        static_ram_bytes: variables, arena, image and the whole reserved stack.
        stack_bytes: how much of the stack was ever used.
        steps: with `profile`, what each kind of operation takes of one image, averaged.

    Book: deploy-mcu
    """

    cpu: str
    logits: np.ndarray
    instructions: int
    per_image: np.ndarray = field(repr=False)
    flash_bytes: int
    static_ram_bytes: int
    stack_bytes: int
    steps: Mapping[str, StepCost] = field(default_factory=dict)


def project(
    tflite_path: str | Path,
    folder: str | Path,
    *,
    board: str = "mps2-an500",
    kernels: str = "fast",
    toolchain: str = "gcc",
    flash: int = 256 * 1024,
    ram: int = 64 * 1024,
    stack: int = 4096,
    force: bool = False,
) -> Project:
    """Write a firmware project for an int8 model: the network in C, and all that a bare chip needs around it.

    It is written beside its place and moved there when it is whole.

    Args:
        tflite_path: the int8 model.
        folder: where to; its parents are made.
        board: a name in `BOARDS`.
        kernels: as `c_codegen.generate` has them, "plain" or "fast".
        toolchain: "gcc" for `arm-none-eabi-gcc`, "zig" for `python -m ziglang cc`.
        flash, ram, stack: bytes; the linker refuses a program that needs more.
        force: replace an earlier project in `folder`. Anything else there is never replaced.

    Returns:
        The project.

    Raises:
        ValueError: an unknown board, kernel set or toolchain, or sizes that make no chip.
        FileExistsError: something is in the way.
        GraphError, UnsupportedOpError: the model is damaged, or has an operation that no C is made of.

    Book: deploy-mcu
    """
    _one_of("board", board, BOARDS)
    _one_of("toolchain", toolchain, _TOOLCHAINS)
    for name, value, least in (("flash", flash, 1024), ("ram", ram, 1024), ("stack", stack, 64)):
        if value < least or value % 8:
            raise ValueError(f"{name}: expected a multiple of 8 bytes, at least {least:,}, got {value}")
    if stack >= ram:
        raise ValueError(f"stack: expected less than the ram of {ram:,} bytes, got {stack:,}")
    target = Path(folder)
    if target.exists() and not (_is_empty(target) or (force and (target / "project.json").is_file())):
        why = "" if force else "; force=True replaces an earlier project"
        raise FileExistsError(f"folder: {target} exists{why}")
    made = Project(target, board, toolchain, kernels, flash, ram, stack)
    with _folder_into_place(target) as new:
        c_codegen.generate(tflite_path, new / "net", kernels=kernels)
        model = Path(tflite_path).read_bytes()
        for source in sorted(_FIRMWARE.iterdir()):
            if source.name not in ("flash.ld", "Makefile", "README.md"):
                shutil.copyfile(source, new / source.name)
        words = _words(made, model)
        for name in ("flash.ld", "Makefile", "README.md"):
            (new / name).write_text(_filled((_FIRMWARE / name).read_text("utf-8"), words), "utf-8")
        _write_tflite_micro(model, new / "tflite_micro")
        about = {
            key: getattr(made, key) for key in ("board", "toolchain", "kernels", "flash", "ram", "stack")
        }
        (new / "project.json").write_text(json.dumps(about, indent=1) + "\n", "utf-8")
    return made


def build(
    project: Project | str | Path, *, cpu: str | None = None, io: str = "semihost", profile: bool = False
) -> Path:
    """Compile and link a project; the same command as in its Makefile.

    Args:
        project: the project, or its folder.
        cpu: another core of `BOARDS` than the project's own.
        io: "semihost" or "uart".
        profile: count what each kind of operation takes.

    Returns:
        The program, an ELF file in the project's folder `build`.

    Raises:
        CompilerMissingError: no compiler.
        FirmwareError: what the compiler said, or by how many bytes the program does not fit.

    Book: deploy-mcu
    """
    made = project if isinstance(project, Project) else Project.open(project)
    board = _board_of(made, cpu)
    _one_of("io", io, _IO)
    name = f"firmware-{board.cpu}{'-uart' if io == 'uart' else ''}{'-profile' if profile else ''}.elf"
    output = made.folder / "build" / name
    files = ("startup.c", "memory.c", "main.c", f"io_{io}.c")
    sources = [*(made.folder / file for file in files), *sorted((made.folder / "net").glob("*.c"))]
    flags = [*_flags(made.toolchain, board), "-T", str(made.folder / "flash.ld")]
    if profile:
        flags.append("-DNET_PROFILE")
    try:
        compilers.build(_compiler(made.toolchain), sources, output, [*flags, *_libraries(made.toolchain)])
    except compilers.CompileError as error:
        raise FirmwareError(_why_not_built(error.diagnostics, made)) from error
    return output


def run(
    project: Project | str | Path,
    images: np.ndarray,
    *,
    cpu: str | None = None,
    io: str = "semihost",
    profile: bool = False,
    timeout: float = 600.0,
) -> McuRun:
    """Build a project and run it under QEMU on images.

    Args:
        project: the project, or its folder.
        images: (n, 32, 32, 3) uint8.
        cpu: another core of `BOARDS` than the project's own.
        io: "semihost" hands the images over in a file, "uart" sends them over the serial port.
        profile: also count what each kind of operation takes.
        timeout: seconds after which QEMU is ended.

    Returns:
        Logits, instructions, and the memory that the program takes.

    Raises:
        CompilerMissingError, EmulatorMissingError: no compiler, or no QEMU.
        FirmwareError: the program did not build, faulted, or said something else than was expected.
        TypeError, ValueError: images of another kind.

    Book: deploy-mcu
    """
    made = project if isinstance(project, Project) else Project.open(project)
    if io == "uart" and profile:
        raise ValueError(
            'profile: expected io="semihost", since over a wire the program never ends; got "uart"'
        )
    data = images_as_bytes(images)
    emulator = _qemu()
    board = _board_of(made, cpu)
    program = build(made, cpu=cpu, io=io, profile=profile)
    command = [
        emulator, "-M", board.name, "-cpu", board.cpu, "-display", "none", "-monitor", "none",
        "-icount", "shift=0", "-kernel", str(program.resolve()),
    ]  # fmt: skip
    if io == "semihost":
        text = _semihosted(command, data, timeout)
    else:
        text = _over_the_wire(command, data, len(images), timeout)
    found = re.findall(r"logit (-?\d+) person ([01]) ticks (\d+) stack (\d+)", text)
    if len(found) != len(images):
        raise FirmwareError(
            f"{board.cpu}: {len(found)} of {len(images)} images came back; it said {text[-300:].strip()!r}"
        )
    steps: dict[str, StepCost] = {}
    for kind, macs, ticks in re.findall(r"step (\S+) macs (\d+) ticks (\d+)", text):
        cost = int(ticks) * INSTRUCTIONS_PER_TICK / len(images)
        so_far = steps.get(kind, StepCost(0, 0, 0))
        steps[kind] = StepCost(so_far.steps + 1, so_far.macs + int(macs), so_far.instructions + cost)
    per_image = np.array([int(ticks) * INSTRUCTIONS_PER_TICK for _, _, ticks, _ in found], np.int64)
    flash_bytes, ram_bytes = elf_sizes(program)
    return McuRun(
        cpu=board.cpu,
        logits=np.array([int(logit) for logit, *_ in found], np.int8),
        instructions=int(per_image.max(initial=0)),
        per_image=per_image,
        flash_bytes=flash_bytes,
        static_ram_bytes=ram_bytes,
        stack_bytes=max((int(stack) for *_, stack in found), default=0),
        steps=steps,
    )


def elf_sizes(program: str | Path) -> tuple[int, int]:
    """What a 32-bit ELF file takes of flash and of RAM, in bytes.

    A section that is loaded takes flash; one that may be written takes RAM; a variable with a starting value
    takes both.

    Raises:
        FirmwareError: it is no 32-bit little-endian ELF file, or it is cut short.

    Book: deploy-mcu
    """
    data = Path(program).read_bytes()
    if data[:6] != b"\x7fELF\x01\x01":
        raise FirmwareError(f"program: {program} is no 32-bit little-endian ELF file")
    try:
        (offset,) = struct.unpack_from("<I", data, 32)
        size, count = struct.unpack_from("<HH", data, 46)
        flash = ram = 0
        for i in range(count):
            _, kind, flags, _, _, length = struct.unpack_from("<6I", data, offset + i * size)
            if flags & 2:  # it has a place in memory
                flash += length if kind != 8 else 0  # 8: no bits in the file, only zeros to be
                ram += length if flags & 1 else 0
    except struct.error as error:
        raise FirmwareError(f"program: {program} is cut short") from error
    return flash, ram


def images_as_bytes(images: np.ndarray) -> bytes:
    """The bytes of (n, 32, 32, 3) uint8 images, one after the other.

    Raises:
        TypeError: no array of uint8.
        ValueError: another shape, or no image at all.

    Book: deploy-mcu
    """
    array = np.asarray(images)
    if array.dtype != np.uint8:
        raise TypeError(f"images: expected uint8, got {array.dtype}")
    if array.ndim != 4 or array.shape[1:] != (32, 32, 3) or not len(array):
        raise ValueError(f"images: expected shape (n, 32, 32, 3) with n ≥ 1, got {array.shape}")
    return np.ascontiguousarray(array).tobytes()


def _one_of(name: str, value: str, known: Mapping[str, Board] | tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name}: expected one of {', '.join(known)}, got {value!r}")


def _board_of(made: Project, cpu: str | None) -> Board:
    if cpu is None:
        return BOARDS[made.board]
    by_cpu = {board.cpu: board for board in BOARDS.values()}
    _one_of("cpu", cpu, by_cpu)
    return by_cpu[cpu]


def _flags(toolchain: str, board: Board) -> list[str]:
    common = [
        "-std=c99", "-O2", "-ffreestanding", "-ffunction-sections", "-fdata-sections", "-Wall", "-Wextra",
        "-Wl,--gc-sections", "-Wl,--entry=reset",
    ]  # fmt: skip
    if toolchain == "zig":
        return [*board.zig, *common]
    # gcc would turn the loops of memory.c into calls of themselves
    return [*board.gcc, *common, "-fno-tree-loop-distribute-patterns", "-nostdlib"]


def _libraries(toolchain: str) -> list[str]:
    """What a compiler needs for arithmetic that the core lacks; clang's is linked without being asked."""
    return ["-lgcc"] if toolchain == "gcc" else []


def _compiler(toolchain: str) -> list[str]:
    return compilers.zig() if toolchain == "zig" else compilers.arm_none_eabi()


def _qemu() -> str:
    path = shutil.which("qemu-system-arm")
    if path is None:
        raise EmulatorMissingError("qemu-system-arm is not installed: apt-get install qemu-system-arm")
    return path


def _why_not_built(stderr: str, made: Project) -> str:
    """The compiler's message in a sentence; a program that is too large says by how much."""
    over = re.search(
        r"region [`'](\w+)' overflowed by (\d+) bytes|region '(\w+)': overflowed by (\d+) bytes", stderr
    )
    if over:
        region, by = (over[1] or over[3]), int(over[2] or over[4])
        has = made.flash if region == "FLASH" else made.ram
        return f"{region}: the program needs {by:,} bytes more than the {has:,} that there are"
    return f"the program did not build: {stderr.strip()[-2000:]}"


def _semihosted(command: list[str], data: bytes, timeout: float) -> str:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "images.rgb").write_bytes(data)
        semihosting = ["-serial", "null", "-semihosting-config", "enable=on,target=native"]
        try:
            done = subprocess.run(
                [*command, *semihosting], cwd=folder, capture_output=True, text=True, timeout=timeout,
                stdin=subprocess.DEVNULL,
            )  # fmt: skip
        except subprocess.TimeoutExpired as error:
            raise FirmwareError(f"QEMU did not come to an end within {timeout:g} s") from error
    if done.returncode:
        raise FirmwareError(
            f"QEMU ended with status {done.returncode}: {(done.stderr or done.stdout)[-500:]}"
        )
    return done.stdout + done.stderr  # semihosting writes to the second


def _over_the_wire(command: list[str], data: bytes, lines: int, timeout: float) -> str:
    """Send the images to the serial port, and read until as many lines have come back."""
    with subprocess.Popen(
        [*command, "-serial", "stdio"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    ) as emulator:  # fmt: skip
        assert emulator.stdin and emulator.stdout
        clock = threading.Timer(timeout, emulator.kill)
        clock.start()
        wire = emulator.stdin

        def send() -> None:
            with suppress(OSError):  # the program has ended before it read all
                wire.write(data)
                wire.flush()

        sender = threading.Thread(target=send, daemon=True)
        sender.start()
        try:
            got = b"".join(line for _, line in zip(range(lines), emulator.stdout, strict=False))
        finally:
            clock.cancel()
            emulator.kill()
            sender.join()
    return got.decode("ascii", "replace")


def _is_empty(folder: Path) -> bool:
    return folder.is_dir() and not any(folder.iterdir())


@contextmanager
def _folder_into_place(target: Path) -> Iterator[Path]:
    """Give a new folder beside `target`, which takes its place when the block has ended well."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    old = target.with_name(f".{target.name}.{os.getpid()}.old")
    try:
        partial.mkdir()
        yield partial
        if target.exists():
            target.rename(old)
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _filled(text: str, words: Mapping[str, str]) -> str:
    """Put words in place of @NAMES@; one that is not known is an error and not a text."""
    return re.sub(r"@([A-Z_]+)@", lambda found: words[found[1]], text)


def _words(made: Project, model: bytes) -> dict[str, str]:
    board = BOARDS[made.board]
    compiler = "arm-none-eabi-gcc" if made.toolchain == "gcc" else "python -m ziglang cc"
    return {
        "BOARD": board.name,
        "CPU": board.cpu,
        "COMPILER": compiler,
        "FLAGS": " ".join(["-I.", "-Inet", *_flags(made.toolchain, board), "-T", "flash.ld"]),
        "LIBRARIES": " ".join(_libraries(made.toolchain)),
        "FLASH": str(made.flash),
        "RAM": str(made.ram),
        "STACK": str(made.stack),
        "KERNELS": made.kernels,
        "MODEL_BYTES": f"{len(model):,}",
    }


def _write_tflite_micro(model: bytes, folder: Path) -> None:
    """The same model for readers who use TFLite Micro's C++: the file as an array, and the operations."""
    kinds = sorted({op.kind for op in graph.read(model).ops})
    unknown = [kind for kind in kinds if kind not in _ADD]
    if unknown:
        raise FirmwareError(f"op_resolver.h: no resolver method is known for {', '.join(unknown)}")
    folder.mkdir()
    rows = (model[i : i + 16] for i in range(0, len(model), 16))
    table = "\n".join("    " + ", ".join(f"0x{byte:02x}" for byte in row) + "," for row in rows)
    (folder / "model_data.h").write_text(_MODEL_H, "utf-8")
    (folder / "model_data.cc").write_text(
        f'#include "model_data.h"\n\nalignas(16) const unsigned char g_person_model[] = {{\n{table}\n}};\n'
        f"const unsigned int g_person_model_size = {len(model)};\n",
        "utf-8",
    )
    adds = "\n".join(f"    TF_LITE_ENSURE_STATUS(ops.{_ADD[kind]}());" for kind in kinds)
    (folder / "op_resolver.h").write_text(_RESOLVER_H.format(count=len(kinds), adds=adds), "utf-8")


_MODEL_H = """\
// The .tflite file as an array. TFLite Micro reads it in place and wants it aligned.
#ifndef MODEL_DATA_H_
#define MODEL_DATA_H_

extern const unsigned char g_person_model[];
extern const unsigned int g_person_model_size;

#endif
"""

_RESOLVER_H = """\
// The kernels that this model needs; the linker leaves out all others.
#ifndef OP_RESOLVER_H_
#define OP_RESOLVER_H_

#include "tensorflow/lite/micro/micro_mutable_op_resolver.h"

using PersonOps = tflite::MicroMutableOpResolver<{count}>;

inline TfLiteStatus AddPersonOps(PersonOps &ops) {{
{adds}
    return kTfLiteOk;
}}

#endif
"""
