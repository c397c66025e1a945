"""From an int8 .tflite model to C99 that needs nothing: no float, no library, no allocation.

In this file: `generate`, which writes the folder, and what it says about it. The C is meant to be read: one
line for each operation, the weights as arrays, the kernels as they would stand in a textbook (`"plain"`), or
so that a Cortex-M4 needs little more than one instruction for a product (`"fast"`). Both give the same bits.

Book: deploy-c
"""

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from textbook_code.deploy.c_codegen import emit
from textbook_code.deploy.c_codegen.fast import Fast
from textbook_code.deploy.c_codegen.plain import Plain
from textbook_code.deploy.c_codegen.program import Program, Step
from textbook_code.deploy.graph import Graph, UnsupportedOpError, read

__all__ = ["Budget", "Generated", "OverBudgetError", "UnsupportedOpError", "generate"]

FILES = {"plain": ("kernels.h", "kernels.c"), "fast": ("fast.h", "fast.c", "dsp.h", "kernels.h", "kernels.c")}
"""The files that each set of kernels consists of; the first is included by the rest."""


class OverBudgetError(ValueError):
    """The model does not fit; the message says by how much.

    Book: deploy-c
    """


@dataclass(frozen=True)
class Budget:
    """How much a device has room for.

    Args:
        flash: bytes for constants; the code comes to a few kilobytes beside them.
        ram: bytes for the arena.

    Book: deploy-c
    """

    flash: int = 250 * 1024
    ram: int = 64 * 1024


@dataclass(frozen=True)
class Generated:
    """What was written.

    Args:
        folder: where.
        files: all of them; the `.c` ones are to be compiled together.
        kernels: "plain" or "fast".
        macs: multiply-accumulates of one inference.
        flash_bytes: of constants, on a 32-bit machine.
        arena_bytes: of all that is written, but for the stack.
        arena_bound: `lower_bound` of the arena.
        input_shape: height, width, channels.
        num_patches: columns of the last softmax, 0 without one.
        output_scale: one step of the logit.
        output_zero: the logit that is zero.
        steps: the calls in order.

    Book: deploy-c
    """

    folder: Path
    files: tuple[Path, ...]
    kernels: str
    macs: int
    flash_bytes: int
    arena_bytes: int
    arena_bound: int
    input_shape: tuple[int, int, int]
    num_patches: int
    output_scale: float
    output_zero: int
    steps: tuple[Step, ...]


def generate(
    tflite_path: Path | str, folder: Path | str, *, kernels: str = "plain", budget: Budget | None = None
) -> Generated:
    """Write `net.h`, `net.c`, `weights.h`, `weights.c` and the kernels.

    Args:
        tflite_path: a model of int8 tensors, whose input is one image (1, height, width, channels) at scale
            1/128 and zero point 0, and whose output is one logit.
        folder: it is made if it is not there; files of these names in it are replaced, all at once or none.
        kernels: "plain" or "fast".
        budget: None for no limit.

    Returns:
        What was written, with its sizes.

    Raises:
        FileNotFoundError: no such model.
        GraphError: no whole .tflite file.
        UnsupportedOpError: an operation that cannot be generated, or another input or output.
        OverBudgetError: it needs more than the budget.
        ValueError: unknown kernels.

    Book: deploy-c
    """
    if kernels not in FILES:
        raise ValueError(f"kernels: expected one of {', '.join(FILES)}, got {kernels!r}")
    graph = read(tflite_path)
    shape = _check(graph)
    program = _program(graph, kernels)
    flash = sum(constant.size for constant in program.constants.values())
    out = graph.tensors[graph.outputs[0]]
    written, arena = emit.net(
        program,
        include=FILES[kernels][0],
        facts={"rgb": shape[0] * shape[1] * shape[2], "flash": flash},
        source=Path(tflite_path).name,
        output_scale=out.scale[0],
        output_zero=out.zero_point[0],
    )
    written |= emit.weights(program, FILES[kernels][0])
    if budget is not None:
        _check_budget(budget, flash, arena.size)
    folder = Path(folder)
    files = _write(folder, written, FILES[kernels])
    return Generated(
        folder,
        files,
        kernels,
        program.macs,
        flash,
        arena.size,
        arena.bound,
        shape,
        program.seen[1] if program.seen else 0,
        out.scale[0],
        out.zero_point[0],
        tuple(program.steps),
    )


def _program(graph: Graph, kernels: str) -> Program:
    return (Fast if kernels == "fast" else Plain)(graph).build()


def _check(graph: Graph) -> tuple[int, int, int]:
    """The shape of the image, if the model takes one as we store it and gives one logit."""
    if len(graph.inputs) != 1 or len(graph.outputs) != 1:
        raise UnsupportedOpError(
            f"expected one input and one output, got {len(graph.inputs)} and {len(graph.outputs)}"
        )
    image, out = graph.tensors[graph.inputs[0]], graph.tensors[graph.outputs[0]]
    if image.dtype != "int8" or len(image.shape) != 4 or image.shape[0] != 1:
        raise UnsupportedOpError(
            f"input {image.name!r}: expected int8 (1, height, width, channels), got {image.dtype} "
            f"{image.shape}"
        )
    if image.scale != (1 / 128,) or image.zero_point != (0,):
        raise UnsupportedOpError(
            f"input {image.name!r}: expected scale 1/128 and zero point 0, so that a pixel's byte less 128 "
            f"is the input, got {image.scale} and {image.zero_point}"
        )
    if out.dtype != "int8" or out.size != 1 or len(out.scale) != 1:
        raise UnsupportedOpError(f"output {out.name!r}: expected one int8, got {out.dtype} {out.shape}")
    _, height, width, channels = image.shape
    return height, width, channels


def _check_budget(budget: Budget, flash: int, ram: int) -> None:
    over = []
    for what, needs, has in (("flash", flash, budget.flash), ("ram", ram, budget.ram)):
        if needs > has:
            over.append(f"{what}: needs {needs:,} bytes, {needs - has:,} more than the {has:,} of the budget")
    if over:
        raise OverBudgetError("; ".join(over))


def _write(folder: Path, written: dict[str, str], kernels: tuple[str, ...]) -> tuple[Path, ...]:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".writing-") as work:
        for name, text in written.items():
            (Path(work) / name).write_text(text)
        for name in kernels:
            shutil.copyfile(emit.KERNELS / name, Path(work) / name)
        names = [*written, *kernels]
        for name in names:  # only once all are whole
            (Path(work) / name).replace(folder / name)
    return tuple(folder / name for name in names)
