"""Each operation of the graph as one call of a plain kernel.

Book: deploy-c-kernels
"""

import math
from collections.abc import Callable, Sequence

from textbook_code.compression.integer import Rescale, softmax_table
from textbook_code.deploy.c_codegen.program import (
    Linear,
    Program,
    Step,
    UnsupportedOpError,
    clamp,
    factor,
    linear,
    scale,
    zero,
)
from textbook_code.deploy.c_codegen.tables import hard_swish_table, requantize_table, rsqrt_table
from textbook_code.deploy.graph import Graph, Op, Tensor

AXES = 4
"""As many as the kernels have loops."""


class Plain:
    """Builds a `Program`; RESHAPE takes no step, its output is another name of its input.

    Args:
        graph: of int8 tensors.

    Book: deploy-c-kernels
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.program = Program(graph)
        self.same: dict[int, int] = {}  # reshaped tensor → the buffer that holds it

    def build(self) -> Program:
        """Every operation in order.

        Raises:
            UnsupportedOpError: an operation without a kernel, or with options that its kernel has not.
        """
        self.image()
        for number, op in enumerate(self.graph.ops):
            self.op(number, op)
        return self.program

    def image(self) -> None:
        """Add the step that turns the bytes of the picture into the first tensor."""
        tensor = self.graph.tensors[self.graph.inputs[0]]
        call = f"net_image(rgb, {{t{tensor.index}}}, PERSON_IMAGE_BYTES);"
        comment = f"the picture, less 128: {_dims(tensor.shape)}"
        self.program.steps.append(Step("IMAGE", call, (), tensor.index, comment))

    def op(self, number: int, op: Op) -> None:
        """Add the step of one operation."""
        graph = self.graph
        method: Callable[[int, Op], None] | None = getattr(self, f"_{op.kind.lower()}", None)
        if method is None:
            known = ", ".join(sorted(name[1:].upper() for name in _METHODS))
            raise UnsupportedOpError(
                f"{op.kind} in layer {graph.layer(op)!r}: no kernel for it, only for {known}"
            )
        for index in (op.inputs[0], *op.outputs):
            tensor = graph.tensors[index]
            if tensor.dtype != "int8" or len(tensor.scale) != 1:
                raise UnsupportedOpError(
                    f"{op.kind} in layer {graph.layer(op)!r}: expected int8 with one scale, got "
                    f"{tensor.dtype} with {len(tensor.scale)} (tensor {index}, {tensor.name!r})"
                )
        method(number, op)

    def buffer(self, index: int) -> int:
        """The buffer that a tensor lies in."""
        return self.same.get(index, index)

    def tensors(self, op: Op) -> tuple[list[Tensor], Tensor]:
        """The inputs that are there, and the output."""
        tensors = self.graph.tensors
        return [tensors[i] for i in op.inputs if i >= 0], tensors[op.outputs[0]]

    def add(
        self,
        number: int,
        op: Op,
        kernel: str,
        operands: Sequence[int],
        last: str,
        *,
        macs: int = 0,
        in_place: Sequence[int] = (),
        tail: str = "",
    ) -> None:
        """A step: `kernel(operands…, last, output tail)`."""
        inputs, out = self.tensors(op)
        names, reads = [], []
        for index in operands:
            tensor, place = self.graph.tensors[index], self.buffer(index)
            if tensor.data is None:
                names.append(f"{{t{place}}}")
                reads.append(place)
            else:
                names.append(self.program.array(f"c{index}", "int8_t", tensor.data, self.graph.layer(op)))
        whole = [i for i in in_place if i in operands and self.graph.tensors[i].data is None]
        whole = [i for i in whole if self.graph.tensors[i].size == out.size]
        shapes = ", ".join(_dims(self.graph.tensors[i].shape) for i in operands)
        if op.kind in ("FULLY_CONNECTED", "CONV_2D"):
            shapes += f" by {_dims(inputs[1].shape)}"
        self.program.steps.append(
            Step(
                op.kind,
                f"{kernel}({', '.join([*names, last, f'{{t{out.index}}}'])}{tail});",
                tuple(reads),
                out.index,
                f"{number} {op.kind} {self.graph.layer(op)}: {shapes} -> {_dims(out.shape)}",
                macs,
                in_place=self.buffer(whole[0]) if whole else None,
            )
        )

    def refuse(self, op: Op, reason: str) -> UnsupportedOpError:
        """The error of an operation that has a kernel, but not for this case."""
        return UnsupportedOpError(f"{op.kind} in layer {self.graph.layer(op)!r}: {reason}")

    def linear_lines(self, number: int, maps: Linear, rows: int, comment: str) -> list[str]:
        """The initialiser of a `struct net_linear`, whose arrays are added."""
        array = self.program.array
        return [
            f".weight = {array(f'weight{number}', 'int8_t', maps.weight, comment)},",
            f".bias = {array(f'bias{number}', 'int32_t', maps.bias)},",
            f".multiplier = {array(f'multiplier{number}', 'int32_t', maps.multiplier)},",
            f".shift = {array(f'shift{number}', 'int8_t', maps.shift)},",
            f".rows = {rows}, .inputs = {maps.inputs}, .outputs = {maps.outputs},",
            f".zero_y = {maps.zero}, .low = {maps.low}, .high = {maps.high},",
        ]

    def _conv_2d(self, number: int, op: Op) -> None:
        (x, weight, *_), out = self.tensors(op)
        maps = linear(self.graph, op)
        _, height, width, channels = x.shape
        _, window_height, window_width, depth = weight.shape
        _, rows, columns, _ = out.shape
        stride = (op.options["stride_h"], op.options["stride_w"])
        fits = (rows - 1) * stride[0] + window_height <= height
        fits = fits and (columns - 1) * stride[1] + window_width <= width
        dilated = (op.options.get("dilation_h_factor", 1), op.options.get("dilation_w_factor", 1)) != (1, 1)
        if x.shape[0] != 1 or depth != channels or dilated or not fits:
            raise self.refuse(
                op, f"only whole windows of one image, got {x.shape} by {weight.shape}, stride {stride}"
            )
        lines = [
            ".linear = {",
            *(
                f"    {line}"
                for line in self.linear_lines(number, maps, rows * columns, self.graph.layer(op))
            ),
            "},",
            f".width = {width}, .channels = {channels}, .rows_y = {rows}, .width_y = {columns},",
            f".window_height = {window_height}, .window_width = {window_width},",
            f".stride_height = {stride[0]}, .stride_width = {stride[1]},",
        ]
        name = self.program.struct(f"conv{number}", "net_conv", lines, 72)
        macs = rows * columns * maps.weight.size
        self.add(number, op, "net_conv_2d", [x.index], f"&{name}", macs=macs)

    def _fully_connected(self, number: int, op: Op) -> None:
        (x, *_), _ = self.tensors(op)
        maps = linear(self.graph, op)
        if op.options.get("weights_format", 0) or x.size % maps.inputs:
            raise self.refuse(op, f"expected rows of {maps.inputs} and plain weights, got {x.shape}")
        rows = x.size // maps.inputs
        lines = self.linear_lines(number, maps, rows, self.graph.layer(op))
        name = self.program.struct(f"linear{number}", "net_linear", lines, 40)
        self.add(number, op, "net_fully_connected", [x.index], f"&{name}", macs=rows * maps.weight.size)

    def _batch_matmul(self, number: int, op: Op) -> None:
        (a, b), out = self.tensors(op)
        if op.options.get("adj_x") or len(b.scale) != 1 or b.dtype != "int8":
            raise self.refuse(op, "expected two int8 operands with one scale, the first not transposed")
        transposed = bool(op.options.get("adj_y"))
        rows, inner = a.shape[-2:]
        columns = out.shape[-1]
        batch = out.size // (rows * columns)
        if a.size != batch * rows * inner or b.size != batch * inner * columns:
            raise self.refuse(op, f"expected equal batches, got {a.shape} by {b.shape}")
        multiplier, shift = factor(scale(a) * scale(b) / scale(out))
        lines = [
            f".batch = {batch}, .rows = {rows}, .inner = {inner}, .columns = {columns},",
            f".transposed = {int(transposed)},",
            f".zero_a = {zero(a)}, .zero_b = {zero(b)}, .zero_y = {zero(out)},",
            f".y = {{{multiplier}, {shift}}},",
        ]
        name = self.program.struct(f"matmul{number}", "net_matmul", lines, 40)
        self.add(
            number,
            op,
            "net_batch_matmul",
            [a.index, b.index],
            f"&{name}",
            macs=batch * rows * inner * columns,
        )

    def _softmax(self, number: int, op: Op) -> None:
        (x,), out = self.tensors(op)
        columns = x.shape[-1]
        if (scale(out), zero(out)) != (1 / 256, -128) or columns > 4095:
            raise self.refuse(op, f"expected an output of scale 1/256, zero point -128, rows up to 4095, got "
                                  f"{scale(out)}, {zero(out)}, {columns}")  # fmt: skip
        table = softmax_table(scale(x), op.options.get("beta", 1.0))
        exponential = self.program.array(f"exponential{number}", "int32_t", table)
        rows = x.size // columns
        lines = [f".exponential = {exponential}, .rows = {rows}, .columns = {columns},"]
        name = self.program.struct(f"softmax{number}", "net_softmax", lines, 12)
        self.add(number, op, "net_softmax", [x.index], f"&{name}", in_place=[x.index])
        self.program.seen = (len(self.program.steps) - 1, columns)

    def _pair(self, number: int, op: Op, bits: int, real: Sequence[float]) -> None:
        (a, b), out = self.tensors(op)
        if len(b.scale) != 1 or b.dtype != "int8":
            raise self.refuse(op, f"expected int8 with one scale, got {b.dtype} (tensor {b.index})")
        size = _padded(self, op, out.shape)
        low, high = clamp(op, out)
        factors = ", ".join(
            f".{k} = {{{m}, {s}}}" for k, (m, s) in zip("aby", map(factor, real), strict=True)
        )
        lines = [
            f".size = {_braces(size)},",
            f".step_a = {_braces(_steps(self, op, a.shape, size))},",
            f".step_b = {_braces(_steps(self, op, b.shape, size))},",
            f".zero_a = {zero(a)}, .zero_b = {zero(b)}, .zero_y = {zero(out)}, .bits = {bits},",
            f"{factors},",
            f".low = {low}, .high = {high},",
        ]
        name = self.program.struct(f"pair{number}", "net_pair", lines, 96)
        whole = [t.index for t in (a, b) if t.size == out.size]
        kernel = f"net_{op.kind.lower()}"
        self.add(number, op, kernel, [a.index, b.index], f"&{name}", in_place=whole)

    def _add(self, number: int, op: Op) -> None:
        (a, b), out = self.tensors(op)
        twice = 2 * max(scale(a), scale(b))
        self._pair(number, op, 20, (scale(a) / twice, scale(b) / twice, twice / (scale(out) * 2**20)))

    _sub = _add

    def _squared_difference(self, number: int, op: Op) -> None:
        (a, b), out = self.tensors(op)
        twice = 2 * max(scale(a), scale(b))
        last = twice * twice / (scale(out) * 2**14)
        self._pair(number, op, 7, (scale(a) / twice, scale(b) / twice, last))

    def _mul(self, number: int, op: Op) -> None:
        (a, b), out = self.tensors(op)
        self._pair(number, op, 0, (1.0, 1.0, scale(a) * scale(b) / scale(out)))

    def _mean(self, number: int, op: Op) -> None:
        (x, where), out = self.tensors(op)
        if where.data is None:
            raise self.refuse(op, "expected constant axes")
        axes = sorted({int(axis) % len(x.shape) for axis in where.data.ravel()})
        axes = [axis for axis in axes if x.shape[axis] > 1] or axes[:1]
        if axes != list(range(axes[0], axes[-1] + 1)):
            raise self.refuse(op, f"expected axes side by side, got {axes} of {x.shape}")
        outer, inner = math.prod(x.shape[: axes[0]]), math.prod(x.shape[axes[-1] + 1 :])
        count = x.size // (outer * inner)
        rescale = Rescale.of(scale(x) / scale(out))
        bits = min(count.bit_length() - 1, 32, 31 + int(rescale.shift))
        multiplier = (int(rescale.mantissa) << bits) // count  # the division, rounded down as the reference
        lines = [
            f".outer = {outer}, .count = {count}, .inner = {inner},",
            f".zero_x = {zero(x)}, .zero_y = {zero(out)},",
            f".y = {{{multiplier}, {int(rescale.shift) - bits}}},",
        ]
        name = self.program.struct(f"mean{number}", "net_mean", lines, 28)
        self.add(number, op, "net_mean", [x.index], f"&{name}")

    def _transpose(self, number: int, op: Op) -> None:
        (x, order), out = self.tensors(op)
        if order.data is None:
            raise self.refuse(op, "expected a constant permutation")
        steps = [math.prod(x.shape[axis + 1 :]) for axis in range(len(x.shape))]
        moved = [steps[int(axis)] for axis in order.data.ravel()]
        size = _padded(self, op, out.shape)
        padded = [0] * (AXES - len(moved)) + moved
        lines = [f".size = {_braces(size)}, .step = {_braces(padded)},"]
        name = self.program.struct(f"transpose{number}", "net_transpose", lines, 32)
        self.add(number, op, "net_transpose", [x.index], f"&{name}")

    def _reshape(self, number: int, op: Op) -> None:
        self.same[op.outputs[0]] = self.buffer(op.inputs[0])

    def _table(self, number: int, op: Op) -> None:
        (x,), out = self.tensors(op)
        make = {"RSQRT": rsqrt_table, "HARD_SWISH": hard_swish_table, "QUANTIZE": requantize_table}[op.kind]
        try:
            name = self.program.array(f"table{number}", "int8_t", make(x, out), f"{op.kind} of each byte")
        except ValueError as error:
            raise self.refuse(op, str(error)) from error
        self.add(number, op, "net_lookup", [x.index], name, in_place=[x.index], tail=f", {out.size}")

    _rsqrt = _hard_swish = _quantize = _table


_METHODS = [
    "_conv_2d", "_fully_connected", "_batch_matmul", "_softmax", "_add", "_sub", "_squared_difference",
    "_mul", "_mean", "_transpose", "_reshape", "_rsqrt", "_hard_swish", "_quantize",
]  # fmt: skip


def _dims(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape)) or "1"


def _braces(values: Sequence[int]) -> str:
    return f"{{{', '.join(map(str, values))}}}"


def _padded(plain: Plain, op: Op, shape: Sequence[int]) -> list[int]:
    if len(shape) > AXES:
        raise plain.refuse(op, f"expected at most {AXES} axes, got {tuple(shape)}")
    return [1] * (AXES - len(shape)) + list(shape)


def _steps(plain: Plain, op: Op, shape: Sequence[int], size: Sequence[int]) -> list[int]:
    """How far apart the elements of an operand lie along each axis of the result."""
    padded = _padded(plain, op, shape)
    if any(mine not in (1, full) for mine, full in zip(padded, size, strict=True)):
        raise plain.refuse(op, f"cannot repeat {tuple(shape)} to {tuple(size)}")
    return [0 if n == 1 else math.prod(padded[axis + 1 :]) for axis, n in enumerate(padded)]
