"""An int8 model, run in NumPy one operation after the other: the runtime that all others are compared with.

In this file: `Interpreter`, which reads a `Graph` and looks up for each operation the function of
`textbook_code.compression.integer` that it stands for. It is slow, and it hides nothing: every tensor in
between can be asked for.

Reference: TensorFlow Lite Micro's reference kernels, equal to the last bit.

Book: deploy-interpreter
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from textbook_code.compression import integer
from textbook_code.compression.integer import Rescale
from textbook_code.deploy.graph import Graph, Op, Tensor, UnsupportedOpError, read
from textbook_code.deploy.tflite import as_int8

Kernel = Callable[["Interpreter", Op, list[Any]], Any]


class Interpreter:
    """Runs the operations of a model in order.

    Args:
        model: a graph of int8 activations with one input and one output, or a .tflite file of one.

    Raises:
        FileNotFoundError, GraphError: as `read`.
        UnsupportedOpError: an operation without a kernel; the message names it and its layer.

    Book: deploy-interpreter
    """

    def __init__(self, model: Graph | str | Path | bytes) -> None:
        graph = self.graph = model if isinstance(model, Graph) else read(model)
        for op in graph.ops:
            if op.kind not in KERNELS:
                raise UnsupportedOpError(
                    f"model: no kernel for {op.kind} in layer {graph.layer(op)!r}; "
                    f"there is one for {', '.join(sorted(KERNELS))}"
                )
            for index in (i for i in (*op.inputs, *op.outputs) if i >= 0):
                if graph.tensors[index].dtype not in ("int8", "int32"):
                    raise UnsupportedOpError(
                        f"model: {op.kind} in layer {graph.layer(op)!r} works on "
                        f"{graph.tensors[index].dtype}, expected int8"
                    )

    def run(self, image: NDArray[np.int8]) -> dict[int, Any]:
        """Every tensor of one run, by its index.

        Args:
            image: int8 of the input's shape.

        Raises:
            ValueError: another shape or dtype.

        Book: deploy-interpreter
        """
        wanted = self.graph.tensors[self.graph.inputs[0]]
        if image.shape != wanted.shape or image.dtype != np.int8:
            raise ValueError(f"image: expected int8 {wanted.shape}, got {image.dtype} {image.shape}")
        values: dict[int, Any] = {t.index: t.data for t in self.graph.tensors if t.data is not None}
        values[self.graph.inputs[0]] = image
        for op in self.graph.ops:
            given = [values[i] if i >= 0 else None for i in op.inputs]
            out = KERNELS[op.kind](self, op, given)
            values[op.outputs[0]] = out.reshape(self.graph.tensors[op.outputs[0]].shape)
        return values

    def logits(self, images: NDArray[np.uint8]) -> NDArray[np.int8]:
        """The output byte of each picture.

        Args:
            images: (n, height, width, 3) uint8.

        Raises:
            TypeError: another dtype.
            ValueError: another shape.

        Book: deploy-interpreter
        """
        if images.dtype != np.uint8:
            raise TypeError(f"images: expected uint8, got {images.dtype}")
        out = [self.run(image[None])[self.graph.outputs[0]].item() for image in as_int8(images)]
        return np.array(out, dtype=np.int8)

    def tensors(self, op: Op) -> tuple[list[Tensor], Tensor]:
        """The inputs that are there, and the output."""
        return [self.graph.tensors[i] for i in op.inputs if i >= 0], self.graph.tensors[op.outputs[0]]


def _scale(tensor: Tensor) -> np.float32:
    return np.float32(tensor.scale[0])


def _zero(tensor: Tensor) -> int:
    return int(tensor.zero_point[0])


def _product_scale(a: Tensor, b: Tensor, out: Tensor) -> Any:
    """s_a s_b / s_y, one or one a channel, in double precision as the reference has it."""
    scales = np.array(b.scale, dtype=np.float64)
    return float(_scale(a)) * (scales if len(scales) > 1 else scales[0]) / float(_scale(out))


def _clamp(op: Op, out: Tensor) -> tuple[int, int]:
    """The bounds of a fused activation."""
    activation = op.options.get("fused_activation_function", "NONE")
    zero, scale = _zero(out), float(_scale(out))
    bounds = {"NONE": (-math.inf, math.inf), "RELU": (0, math.inf), "RELU6": (0, 6)}
    if activation not in bounds:
        raise UnsupportedOpError(f"{op.kind}: expected one of {', '.join(bounds)}, got {activation}")
    low, high = (zero + bound / scale for bound in bounds[activation])
    return int(max(-128, low)), int(min(127, high + 0.5))


def _matrix(kernel: Callable[..., Any]) -> Kernel:
    def call(self: Interpreter, op: Op, given: list[Any]) -> Any:
        inputs, out = self.tensors(op)
        bias = given[2] if len(given) > 2 else None
        low, high = _clamp(op, out)
        x = given[0] if kernel is integer.patch_conv else given[0].reshape(-1, given[1].shape[-1])
        rescale = Rescale.of(_product_scale(inputs[0], inputs[1], out))
        return kernel(
            x, given[1], bias, rescale, x_zero=_zero(inputs[0]), out_zero=_zero(out), low=low, high=high
        )

    return call


def _patch_conv(self: Interpreter, op: Op, given: list[Any]) -> Any:
    stride, window = (op.options["stride_h"], op.options["stride_w"]), given[1].shape[1:3]
    if stride != window:
        layer = self.graph.layer(op)
        raise UnsupportedOpError(f"CONV_2D in layer {layer!r}: expected the stride {window}, got {stride}")
    return _matrix(integer.patch_conv)(self, op, given)


def _batch_matmul(self: Interpreter, op: Op, given: list[Any]) -> Any:
    (a, b), out = self.tensors(op)
    x, y = given
    x = x.swapaxes(-1, -2) if op.options.get("adj_x") else x
    y = y.swapaxes(-1, -2) if op.options.get("adj_y") else y
    rescale = Rescale.of(_product_scale(a, b, out))
    return integer.batch_matmul(x, y, rescale, a_zero=_zero(a), b_zero=_zero(b), out_zero=_zero(out))


def _softmax(self: Interpreter, op: Op, given: list[Any]) -> Any:
    (x,), out = self.tensors(op)
    if (out.scale, out.zero_point) != ((1 / 256,), (-128,)):
        raise UnsupportedOpError(f"SOFTMAX: expected an output at 1/256 and -128, got {out.scale}")
    return integer.softmax(given[0], integer.softmax_table(x.scale[0], op.options.get("beta", 1.0)))


def _pair(kernel: Callable[..., Any], **options: Any) -> Kernel:
    def call(self: Interpreter, op: Op, given: list[Any]) -> Any:
        three = [*self.tensors(op)[0], self.tensors(op)[1]]
        if kernel is not integer.squared_difference:
            low, high = _clamp(op, three[2])
            options.update(low=low, high=high)
        zeros = tuple(_zero(t) for t in three)
        if kernel is integer.multiply:
            a, b, y = (float(_scale(t)) for t in three)
            return kernel(*given, Rescale.of(a * b / y), zeros=zeros, **options)
        x, y = (_broadcastable(g, len(three[2].shape)) for g in given)
        return kernel(x, y, scales=tuple(t.scale[0] for t in three), zeros=zeros, **options)

    return call


def _broadcastable(x: Any, axes: int) -> Any:
    return x.reshape((1,) * (axes - x.ndim) + x.shape)


def _mean(self: Interpreter, op: Op, given: list[Any]) -> Any:
    (x, _), out = self.tensors(op)
    axes = tuple(sorted({int(axis) % given[0].ndim for axis in given[1].ravel()}))
    rescale = Rescale.of(float(_scale(x)) / float(_scale(out)))
    return integer.mean(given[0], axes, rescale, x_zero=_zero(x), out_zero=_zero(out))


def _rsqrt(self: Interpreter, op: Op, given: list[Any]) -> Any:
    (x,), out = self.tensors(op)
    rescale = Rescale.of(1.0 / float(np.sqrt(_scale(x)) * _scale(out)))
    return integer.rsqrt(given[0], rescale, x_zero=_zero(x), out_zero=_zero(out))


def _hard_swish(self: Interpreter, op: Op, given: list[Any]) -> Any:
    (x,), out = self.tensors(op)
    return integer.hard_swish(given[0], scales=(x.scale[0], out.scale[0]), zeros=(_zero(x), _zero(out)))


def _reshape(self: Interpreter, op: Op, given: list[Any]) -> Any:
    return given[0]


def _transpose(self: Interpreter, op: Op, given: list[Any]) -> Any:
    return given[0].transpose(given[1])


KERNELS: dict[str, Kernel] = {
    "CONV_2D": _patch_conv,
    "FULLY_CONNECTED": _matrix(integer.fully_connected),
    "BATCH_MATMUL": _batch_matmul,
    "SOFTMAX": _softmax,
    "ADD": _pair(integer.add),
    "SUB": _pair(integer.add, sign=-1),
    "MUL": _pair(integer.multiply),
    "SQUARED_DIFFERENCE": _pair(integer.squared_difference),
    "MEAN": _mean,
    "RSQRT": _rsqrt,
    "HARD_SWISH": _hard_swish,
    "RESHAPE": _reshape,
    "TRANSPOSE": _transpose,
}
"""What each operation is computed with."""
