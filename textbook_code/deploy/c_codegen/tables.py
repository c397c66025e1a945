"""Functions of one byte, tabulated: 256 bytes each, with the reference's integers.

Book: deploy-c-kernels
"""

import math

import numpy as np
from numpy.typing import NDArray

from textbook_code.compression.integer import Rescale, quantize_multiplier, rsqrt, to_int8
from textbook_code.deploy.graph import Tensor

Bytes = NDArray[np.int8]


def rsqrt_table(x: Tensor, y: Tensor) -> Bytes:
    """$1/\\sqrt{x}$ for every byte; below the zero point, where no input should be, as at it.

    Book: deploy-c-kernels
    """
    real = 1.0 / float(np.sqrt(np.float32(x.scale[0])) * np.float32(y.scale[0]))
    zero = int(x.zero_point[0])
    bytes_ = np.maximum(np.arange(-128, 128), zero)
    return rsqrt(bytes_, Rescale.of(real), x_zero=zero, out_zero=int(y.zero_point[0]))


def requantize_table(x: Tensor, y: Tensor) -> Bytes:
    """Every byte at another scale and zero point.

    Book: deploy-c-kernels
    """
    rescale = Rescale.of(x.scale[0] / y.scale[0])
    return to_int8(rescale(np.arange(-128, 128) - int(x.zero_point[0])), zero=int(y.zero_point[0]))


def hard_swish_table(x: Tensor, y: Tensor) -> Bytes:
    r"""Hardswish for every byte, $x \cdot \mathrm{clamp}(x + 3, 0, 6) / 6$, in the reference's 16 bits.

    Paper: Howard et al. (2019). Reference: TensorFlow Lite's `HardSwish` for int8.

    Raises:
        ValueError: an output scale so fine that the reference refuses it too.

    Book: deploy-c-kernels
    """
    fine = np.float32(1 / 128) * np.float32(x.scale[0])  # the input with seven more bits
    output, output_shift = quantize_multiplier(float(fine / np.float32(y.scale[0])))
    gate, gate_shift = quantize_multiplier(float(fine / np.float32(3 / 32768)))
    if output_shift > 0:
        raise ValueError(f"y: expected a scale of at least {fine:.3g}, got {y.scale[0]:.3g}")
    output, gate = _sixteen(output), _sixteen(gate)
    table = []
    for byte in range(-128, 128):
        value = (byte - int(x.zero_point[0])) << 7
        scaled = _high_multiply(value, output)
        open_ = value if gate_shift <= 0 else _saturate(value << (gate_shift - 1))
        open_ = _high_multiply(open_, gate)
        if gate_shift > 0:
            open_ = _saturate(open_ << 1)
        elif gate_shift < 0:
            open_ = _divide(open_, -gate_shift)
        open_ = (open_ + (1 << 15)) >> 1  # relu6(x + 3) / 6, of 2^15
        product = _saturate(math.trunc(open_ * scaled / (1 << 15)))
        table.append(min(max(_divide(product, -output_shift) + int(y.zero_point[0]), -128), 127))
    return np.array(table, np.int8)


def _sixteen(multiplier: int) -> int:
    """The upper half of a 31-bit multiplier."""
    return 32767 if multiplier >= 2**31 - 1 - (1 << 15) else (multiplier + (1 << 15)) >> 16


def _saturate(x: int) -> int:
    return min(max(x, -(1 << 15)), (1 << 15) - 1)


def _high_multiply(x: int, y: int) -> int:
    return (1 << 15) - 1 if x == y == -(1 << 15) else (x * y + (1 << 14)) >> 15


def _divide(x: int, shift: int) -> int:
    """By 2^shift, ties away from zero."""
    mask = (1 << shift) - 1
    return (x >> shift) + ((x & mask) > (mask >> 1) + (x < 0))
