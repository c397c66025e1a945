"""What is generated, before it is written: steps that call kernels, and the constants that they need.

In this file: the records, and the parameters of each operation in the integers that the kernels take.

Book: deploy-c
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from textbook_code.compression.integer import Rescale, fold_zero
from textbook_code.deploy.graph import Graph, Op, Tensor, UnsupportedOpError

Array = NDArray[np.integer]


@dataclass(frozen=True)
class Constant:
    """An array or a struct in read-only memory.

    Args:
        name: in C.
        ctype: "int8_t", "struct net_linear", …
        values: integers, or the lines of a struct's initialiser.
        size: bytes it takes on a 32-bit machine.
        comment: what it is.
        count: of structs, 0 for one that is no array.

    Book: deploy-c
    """

    name: str
    ctype: str
    values: Array | tuple[str, ...]
    size: int
    comment: str = ""
    count: int = 0


@dataclass(frozen=True)
class Step:
    """One line of the program: a call of a kernel.

    Args:
        kind: of operation.
        call: in C, with `{t7}` where the address of buffer 7 goes.
        reads: buffers.
        writes: the buffer of the result.
        comment: where in the model it is, and its shapes.
        macs: products of two bytes that are added up.
        scratch: bytes that it needs beside them, as `{scratch}` of the call.
        in_place: the buffer it may write over, if nothing else needs that any more.

    Book: deploy-c
    """

    kind: str
    call: str
    reads: tuple[int, ...]
    writes: int
    comment: str
    macs: int = 0
    scratch: int = 0
    in_place: int | None = None


@dataclass
class Program:
    """Steps in order, constants by name, and the shape of what each buffer holds.

    Book: deploy-c
    """

    graph: Graph
    steps: list[Step] = field(default_factory=list)
    constants: dict[str, Constant] = field(default_factory=dict)
    seen: tuple[int, int] | None = None  # the last softmax: its step, its columns

    def array(self, name: str, ctype: str, values: Array, comment: str = "") -> str:
        """Add an array; returns its name."""
        values = np.ascontiguousarray(values)
        width = {"int8_t": 1, "int32_t": 4}[ctype]
        bounds = np.iinfo(np.int8 if width == 1 else np.int32)
        if values.size and not (bounds.min <= values.min() and values.max() <= bounds.max):
            raise UnsupportedOpError(f"{name}: {values.min()} to {values.max()} does not fit {ctype}")
        self.constants[name] = Constant(name, ctype, values, width * values.size, comment)
        return name

    def struct(
        self, name: str, ctype: str, lines: Sequence[str], size: int, comment: str = "", *, count: int = 0
    ) -> str:
        """Add a struct, or an array of `count`, from the lines of its initialiser; returns its name."""
        self.constants[name] = Constant(name, f"struct {ctype}", tuple(lines), size, comment, count)
        return name

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one inference."""
        return sum(step.macs for step in self.steps)


def zero(tensor: Tensor) -> int:
    """The zero point of a tensor that has one.

    Book: deploy-c
    """
    return int(tensor.zero_point[0])


def scale(tensor: Tensor) -> float:
    """The scale of a tensor that has one.

    Book: deploy-c
    """
    return float(tensor.scale[0])


def clamp(op: Op, out: Tensor) -> tuple[int, int]:
    """The bounds of a fused activation, in steps of the output.

    Raises:
        UnsupportedOpError: an activation other than ReLU and ReLU6.

    Book: deploy-c-kernels
    """
    activation = op.options.get("fused_activation_function", "NONE")
    bounds = {"NONE": (-math.inf, math.inf), "RELU": (0.0, math.inf), "RELU6": (0.0, 6.0)}
    if activation not in bounds:
        raise UnsupportedOpError(f"{op.kind}: no fused activation {activation}, only {', '.join(bounds)}")
    low, high = (zero(out) + bound / scale(out) for bound in bounds[activation])
    return int(max(-128, low)), int(min(127, math.floor(high + 0.5) if high < math.inf else 127))


def factor(real: float) -> tuple[int, int]:
    """A factor as multiplier and shift.

    Book: deploy-c-kernels
    """
    rescale = Rescale.of(real)
    return int(rescale.mantissa), int(rescale.shift)


@dataclass(frozen=True)
class Linear:
    """The integers of a matrix product with a constant matrix.

    Args:
        weight: (D_out, D_in) int8.
        bias: (D_out,), with the zero point of the input folded in.
        multiplier: (D_out,).
        shift: (D_out,).
        zero: of the output.
        low: smallest byte of the output.
        high: largest byte of the output.

    Book: deploy-c
    """

    weight: Array
    bias: Array
    multiplier: Array
    shift: Array
    zero: int
    low: int
    high: int

    @property
    def outputs(self) -> int:
        """D_out."""
        return int(self.weight.shape[0])

    @property
    def inputs(self) -> int:
        """D_in."""
        return int(self.weight.shape[1])

    def part(self, start: int, stop: int) -> "Linear":
        """The same map with some of its outputs only."""
        names = ("weight", "bias", "multiplier", "shift")
        return replace(self, **{name: getattr(self, name)[start:stop] for name in names})


def linear(graph: Graph, op: Op) -> Linear:
    """The integers of a FULLY_CONNECTED or CONV_2D.

    Raises:
        UnsupportedOpError: the weights are no constants with zero point 0, or a sum could leave an int32.

    Book: deploy-c-kernels
    """
    x, weight, out = (graph.tensors[i] for i in (op.inputs[0], op.inputs[1], op.outputs[0]))
    bias = graph.tensors[op.inputs[2]] if len(op.inputs) > 2 and op.inputs[2] >= 0 else None
    where = f"{op.kind} in layer {graph.layer(op)!r}"
    if weight.data is None or weight.dtype != "int8" or any(weight.zero_point):
        raise UnsupportedOpError(f"{where}: expected constant int8 weights with zero point 0")
    if bias is not None and (bias.data is None or bias.dtype != "int32"):
        raise UnsupportedOpError(f"{where}: expected a constant int32 bias")
    w = weight.data.reshape(weight.shape[0], -1)
    scales = np.array(weight.scale, np.float64)
    real = np.broadcast_to(scale(x) * scales / scale(out), len(w))
    rescale = Rescale.of(real)
    folded = fold_zero(w, None if bias is None else bias.data, zero(x)) + np.zeros(len(w), np.int64)
    worst = np.abs(folded) + 128 * np.abs(w.astype(np.int64)).sum(1)
    if worst.max() >= 1 << 31:
        raise UnsupportedOpError(f"{where}: a sum can reach {worst.max():,}, which an int32 does not hold")
    low, high = clamp(op, out)
    return Linear(w, folded, rescale.mantissa, rescale.shift, zero(out), low, high)
