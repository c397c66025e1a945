"""Inference in integers: what an int8 kernel computes, in NumPy, to the last bit.

In this file: the rescaling of an accumulator by a fraction that is held in one int32; the kernels of a tiny
vision transformer (matrix products, sums, means, softmax, and what LayerNorm is made of); and a LayerNorm of
our own in one step. All but that one have the rounding of TensorFlow Lite's reference kernels, which those
of TensorFlow Lite Micro and the C of `deploy` have as well. Nothing in a kernel is a float; the scales are
turned into integers before.

A number x is held as q = round(x / s) + z, with the scale s and the zero point z. Qm.n is a fixed-point
number of n bits behind the point: an int32 holding x · 2ⁿ, with the size of x below 2ᵐ.
Papers: Jacob et al. (2018); Jacob and Warden (2015, gemmlowp).

Book: integer-multiplier
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

INT32_MAX = 2**31 - 1
INT32_MIN = -(2**31)

Integers = NDArray[np.int64]
Bytes = NDArray[np.int8]
Numbers = NDArray[Any] | np.integer[Any] | float


def _int64(x: Numbers) -> Integers:
    out = np.asarray(x)
    if not np.issubdtype(out.dtype, np.integer):
        raise TypeError(f"expected integers, got {out.dtype}")
    return out.astype(np.int64)


def _saturate(x: Integers) -> Integers:
    return np.clip(x, INT32_MIN, INT32_MAX)


def quantize_multiplier(real: float) -> tuple[int, int]:
    r"""A positive factor as a 31-bit mantissa and a power of two.

    $$r = m\, 2^{e - 31}, \qquad 2^{30} \le m < 2^{31},$$

    within a relative error of 2⁻³¹. A factor under 2⁻³² gives (0, 0).

    Returns:
        The mantissa m and the shift e.

    Raises:
        ValueError: the factor is negative, not finite, or 2³⁰ or more.

    Book: integer-multiplier
    """
    if not (math.isfinite(real) and 0 <= real < 2**30):
        raise ValueError(f"real: expected a factor from 0 to 2^30, got {real}")
    fraction, shift = math.frexp(real)
    mantissa = math.floor(fraction * 2**31 + 0.5)
    if mantissa == 2**31:
        mantissa, shift = 2**30, shift + 1
    return (mantissa, shift) if shift >= -31 else (0, 0)


def high_multiply(a: Numbers, b: Numbers) -> Integers:
    r"""The high half of twice the product, $\lfloor a b / 2^{31} \rceil$: a product of two Q0.31.

    Ties go up, as in gemmlowp; the one overflow, (−2³¹)², saturates.

    Book: integer-multiplier
    """
    product = _int64(a) * _int64(b)
    nudged = product + np.where(product >= 0, 1 << 30, 1 - (1 << 30))
    quotient = np.where(nudged >= 0, nudged >> 31, -(-nudged >> 31))  # C divides towards zero
    return np.minimum(quotient, INT32_MAX)


def rounding_divide(x: Numbers, exponent: Numbers) -> Integers:
    r"""$\lfloor x / 2^e \rceil$ with ties away from zero.

    Book: integer-multiplier
    """
    x, e = _int64(x), _int64(exponent)
    mask = (np.int64(1) << e) - 1
    return (x >> e) + ((x & mask) > (mask >> 1) + (x < 0))


def multiply_by_quantized_multiplier(x: Numbers, mantissa: Numbers, shift: Numbers) -> Integers:
    r"""$x\, m\, 2^{e - 31}$ in int32, rounded twice: after the product and after the shift.

    The two roundings are TensorFlow Lite's. They differ from one rounding by one, in a few of a thousand
    values, so who wants equal bits has to make both.

    Book: integer-multiplier
    """
    x, e = _int64(x), _int64(shift)
    shifted = x << np.maximum(e, 0)
    shifted = ((shifted - INT32_MIN) & 0xFFFFFFFF) + INT32_MIN  # an int32 wraps
    return rounding_divide(high_multiply(shifted, mantissa), np.maximum(-e, 0))


@dataclass(frozen=True, eq=False)
class Rescale:
    """A factor, or one for each channel, that integers can be multiplied by.

    Book: integer-multiplier
    """

    mantissa: Integers
    shift: Integers

    @classmethod
    def of(cls, real: Numbers) -> "Rescale":
        """From positive real factors; see `quantize_multiplier`."""
        factors = np.asarray(real, dtype=np.float64)
        pairs = [quantize_multiplier(float(r)) for r in factors.ravel()]
        mantissa, shift = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
        return cls(mantissa.reshape(factors.shape), shift.reshape(factors.shape))

    def __call__(self, x: Numbers) -> Integers:
        """The integers nearest to the products, but for the double rounding."""
        return multiply_by_quantized_multiplier(x, self.mantissa, self.shift)


def to_int8(x: Integers, *, zero: int = 0, low: int = -128, high: int = 127) -> Bytes:
    """Add the zero point, clamp, and store in a byte.

    A fused ReLU is no more than a `low` at the zero point.

    Book: integer-multiplier
    """
    return np.clip(x + zero, low, high).astype(np.int8)


def fold_zero(weight: Numbers, bias: Numbers | None, zero: int) -> Integers:
    r"""The bias that makes up for the zero point of the input: $b_o - z \sum_i W_{oi}$.

    Args:
        weight: (D_out, …) int8, symmetric, so without a zero point of its own.

    Book: integer-multiplier
    """
    w = _int64(weight)
    return (0 if bias is None else _int64(bias)) - zero * w.reshape(len(w), -1).sum(1)


def fully_connected(
    x: Numbers,
    weight: Numbers,
    bias: Numbers | None,
    rescale: Rescale,
    *,
    x_zero: int,
    out_zero: int,
    low: int = -128,
    high: int = 127,
) -> Bytes:
    r"""A matrix product in int8 with an int32 accumulator.

    $$q_y = z_y + \Big\lfloor \tfrac{s_x s_o}{s_y} \Big( b_o + \textstyle\sum_i W_{oi}\, (q_i - z_x) \Big)
    \Big\rceil$$

    Args:
        x: (…, D_in) int8.
        weight: (D_out, D_in) int8 with a scale for each row, or one.
        bias: (D_out,) int32 at the scale s_x s_o, or None.
        rescale: s_x s_o / s_y, for each output or one.

    Returns:
        (…, D_out) int8.

    Book: integer-multiplier
    """
    accumulator = _int64(x) @ _int64(weight).T + fold_zero(weight, bias, x_zero)
    return to_int8(rescale(accumulator), zero=out_zero, low=low, high=high)


def patch_conv(
    image: Numbers,
    weight: Numbers,
    bias: Numbers | None,
    rescale: Rescale,
    *,
    x_zero: int,
    out_zero: int,
    low: int = -128,
    high: int = 127,
) -> Bytes:
    """A convolution whose windows tile the image: a matrix product over patches.

    Args:
        image: (B, height, width, C) int8.
        weight: (D_out, P, P, C) int8.

    Returns:
        (B, height / P, width / P, D_out) int8.

    Raises:
        ValueError: the patches do not tile the image.

    Book: integer-multiplier
    """
    x, w = _int64(image), _int64(weight)
    (b, height, width, c), (out, p, p2, _) = x.shape, w.shape
    if height % p or width % p2:
        raise ValueError(f"image: expected a multiple of the patch {p} x {p2}, got {height} x {width}")
    patches = x.reshape(b, height // p, p, width // p2, p2, c).transpose(0, 1, 3, 2, 4, 5)
    flat = patches.reshape(b, height // p, width // p2, -1)
    return fully_connected(
        flat, w.reshape(out, -1), bias, rescale, x_zero=x_zero, out_zero=out_zero, low=low, high=high
    )


def batch_matmul(
    a: Numbers, b: Numbers, rescale: Rescale, *, a_zero: int, b_zero: int, out_zero: int
) -> Bytes:
    r"""A product of two activations, (…, T, K) with (…, K, S), each with a zero point.

    Book: integer-multiplier
    """
    return to_int8(rescale((_int64(a) - a_zero) @ (_int64(b) - b_zero)), zero=out_zero)


def _common_scale(a_scale: float, b_scale: float) -> float:
    return 2 * max(float(a_scale), float(b_scale))


def add(
    a: Numbers,
    b: Numbers,
    *,
    scales: tuple[float, float, float],
    zeros: tuple[int, int, int],
    sign: int = 1,
    low: int = -128,
    high: int = 127,
) -> Bytes:
    r"""The sum, or with `sign` −1 the difference, of two tensors of different scales.

    Both are brought to the scale $2\max(s_a, s_b) / 2^{20}$, where a sum keeps the bits that a byte has not.

    Args:
        scales: s_a, s_b, s_y.
        zeros: z_a, z_b, z_y.

    Book: integer-multiplier
    """
    twice = _common_scale(scales[0], scales[1])
    first = Rescale.of(scales[0] / twice)((_int64(a) - zeros[0]) << 20)
    second = Rescale.of(scales[1] / twice)((_int64(b) - zeros[1]) << 20)
    out = Rescale.of(twice / (float(scales[2]) * 2**20))(first + sign * second)
    return to_int8(out, zero=zeros[2], low=low, high=high)


def squared_difference(
    a: Numbers, b: Numbers, *, scales: tuple[float, float, float], zeros: tuple[int, int, int]
) -> Bytes:
    r"""$(a - b)^2$, with both brought to the scale $2\max(s_a, s_b) / 2^7$ first; arguments as of `add`.

    Book: integer-layer-norm
    """
    twice = _common_scale(scales[0], scales[1])
    first = Rescale.of(scales[0] / twice)((_int64(a) - zeros[0]) << 7)
    second = Rescale.of(scales[1] / twice)((_int64(b) - zeros[1]) << 7)
    out = Rescale.of(twice * twice / (float(scales[2]) * 2**14))((first - second) ** 2)
    return to_int8(out, zero=zeros[2])


def multiply(
    a: Numbers,
    b: Numbers,
    rescale: Rescale,
    *,
    zeros: tuple[int, int, int],
    low: int = -128,
    high: int = 127,
) -> Bytes:
    r"""The product of two tensors, element by element; `rescale` is $s_a s_b / s_y$.

    Book: integer-layer-norm
    """
    product = (_int64(a) - zeros[0]) * (_int64(b) - zeros[1])
    return to_int8(rescale(product), zero=zeros[2], low=low, high=high)


def mean(x: Numbers, axes: tuple[int, ...], rescale: Rescale, *, x_zero: int, out_zero: int) -> Bytes:
    r"""The mean over `axes`, which are dropped; `rescale` is $s_x / s_y$.

    The division by the number of elements goes into the mantissa, rounded down.

    Book: integer-multiplier
    """
    q = _int64(x)
    count = math.prod(q.shape[axis] for axis in axes)
    shift = min(count.bit_length() - 1, 32, 31 + int(rescale.shift))
    scaled = Rescale((rescale.mantissa << shift) // count, rescale.shift - shift)
    return to_int8(scaled(q.sum(axes) - x_zero * count), zero=out_zero)


# The softmax: fixed-point functions on int32, as in gemmlowp.


def _shift_left(x: Integers, bits: int) -> Integers:
    return _saturate(x << bits)


def _exp_quarter(a: Integers) -> Integers:
    """exp(a) for a in [−1/4, 0) as Q0.31: Taylor's series around −1/8 up to the fourth power."""
    x = a + (1 << 28)
    x2 = high_multiply(x, x)
    x3, x4 = high_multiply(x2, x), high_multiply(x2, x2)
    third = np.int64(715827883)  # 1/3
    tail = rounding_divide(high_multiply(rounding_divide(x4, 2) + x3, third) + x2, 1)
    at_eighth = np.int64(1895147668)  # exp(−1/8)
    return at_eighth + high_multiply(at_eighth, x + tail)


def exp_negative(a: Numbers) -> Integers:
    r"""$e^a$ for $a \le 0$, from Q5.26 to Q0.31.

    The number is split into quarters and a rest in [−1/4, 0). The rest goes through a polynomial. The bits of
    the number of quarters each stand for a factor $e^{-1/4}, e^{-1/2}, e^{-1}, \dots, e^{-16}$, which is
    multiplied on where the bit is set: a logarithm's worth of products instead of a table.

    Args:
        a: int32 not above 0, in units of 2⁻²⁶.

    Raises:
        ValueError: a number above 0.

    Book: integer-softmax
    """
    x = _int64(a)
    if (x > 0).any():
        raise ValueError(f"a: expected numbers up to 0, got {int(x.max())}")
    quarter = np.int64(1 << 24)
    rest = (x & (quarter - 1)) - quarter
    out = _exp_quarter(_shift_left(rest, 5))
    quarters = rest - x
    powers = (1672461947, 1302514674, 790015084, 290630308, 39332535, 720401, 242)  # of e^−¼, e^−½, … e^−16
    for bit, factor in enumerate(powers, start=24):
        out = np.where(quarters & (np.int64(1) << bit), high_multiply(out, factor), out)
    return np.where(x == 0, INT32_MAX, out)


def reciprocal(a: Numbers) -> Integers:
    r"""$1 / (1 + a)$ for $0 \le a < 1$, from Q0.31 to Q0.31, by Newton and Raphson.

    With $d = (1 + a) / 2$ the iteration $x \leftarrow x + x (1 - d x)$ doubles the number of right bits. It
    starts from the line $48/17 - 32/17\, d$, which is within 1/17 of 1/d, so three times are enough for 31.

    Book: integer-softmax
    """
    half = (_int64(a) + INT32_MAX + 1) >> 1  # d in Q0.31
    x = 1515870810 + high_multiply(half, -1010580540)  # in Q2.29
    for _ in range(3):
        rest = (1 << 29) - high_multiply(half, x)
        x = x + _shift_left(high_multiply(x, rest), 2)
    return _shift_left(x, 1)  # 2 / 2d: halved by reading Q2.29 as Q1.30


@lru_cache(maxsize=64)
def softmax_table(scale: float, beta: float = 1.0) -> Integers:
    r"""$e^{-s d}$ in Q0.31 for the 256 differences $d = 0 \dots 255$ to a row's maximum.

    Two int8 differ by no more than 255, so everything before the sum is one table of 1 KiB for each softmax:
    the same bits as computing the exponential anew, at the price of a load. Differences that Q5.26 cannot
    hold, s d ≥ 32 or nearly so, have 0, since they count as nothing.

    Args:
        scale: of the input.
        beta: a factor of the logits.

    Book: integer-softmax
    """
    mantissa, shift = quantize_multiplier(min(float(beta) * float(scale) * 2**26, 2**31 - 1.0))
    if shift < 0:
        raise ValueError(f"scale: expected at least 2^-26, got {scale}")
    limit = math.floor(31 * 2**26 / 2**shift)
    difference = np.arange(256, dtype=np.int64)
    kept = np.minimum(difference, limit)
    table = np.where(difference <= limit, exp_negative(high_multiply(-kept << shift, mantissa)), 0)
    table.setflags(write=False)
    return table


def softmax(x: Numbers, table: Integers) -> Bytes:
    r"""Softmax over the last axis in integers; the output has scale 1/256 and zero point −128.

    $$q_y = -128 + \Big\lfloor 256\, \frac{e^{-s (m - q)}}{\sum e^{-s (m - q)}} \Big\rceil, \qquad
    m = \max q,$$

    clamped to 127, so that a probability of one is shown as 255/256. The exponentials are Q0.31, their sum
    is Q12.19, which holds rows of up to 4095. The sum is normalised to [1, 2) by its leading zeros, its
    reciprocal taken by `reciprocal`, and the normalisation undone by the last shift.

    Args:
        x: int8.
        table: of `softmax_table`.

    Raises:
        ValueError: more than 4,095 numbers in a row.

    Book: integer-softmax
    """
    q = _int64(x)
    if q.shape[-1] > 4095:
        raise ValueError(f"x: expected at most 4095 numbers in a row, got {q.shape[-1]}")
    e = table[q.max(-1, keepdims=True) - q]
    total = rounding_divide(e, 12).sum(-1, keepdims=True)
    zeros = 32 - np.frexp(total.astype(np.float64))[1].astype(np.int64)  # leading zeros of an int32
    inverse = reciprocal((total << zeros) - (np.int64(1) << 31))
    return to_int8(rounding_divide(high_multiply(inverse, e), 12 - zeros + 31 - 8), zero=-128)


# LayerNorm.


def inverse_sqrt(x: int) -> tuple[int, int]:
    r"""$1/\sqrt x$ of a positive int32 as a mantissa and a shift, by Newton and Raphson in Q3.28.

    $$y \leftarrow y\, (3 - x y^2) / 2$$

    Returns:
        m and e as of `quantize_multiplier`: $1/\sqrt x \approx m\, 2^{e-31}$.

    Raises:
        ValueError: not from 1 to 2³¹ − 1.

    Book: integer-layer-norm
    """
    if not 1 <= x <= INT32_MAX:
        raise ValueError(f"x: expected an integer from 1 to 2^31 - 1, got {x}")
    if x == 1:
        return INT32_MAX, 0
    right = 11
    while x >= 1 << 29:
        x, right = x // 4, right + 1
    pairs = (32 - x.bit_length() - 1) // 2 - 1  # bring x to [2²⁷, 2²⁹)
    x, right = x << 2 * pairs, right - pairs
    half, three_halves = rounding_divide(x >> 1, 1), (1 << 28) + (1 << 27)
    y: Any = np.int64(1 << 28)
    for _ in range(5):
        cube = _shift_left(high_multiply(high_multiply(y, y), y), 6)
        y = _shift_left(high_multiply(three_halves, y) - high_multiply(half, cube), 3)
    mantissa = int(high_multiply(y, 1518500250))  # √2 / 2
    return (mantissa, -right) if right >= 0 else (mantissa << -right, 0)


def rsqrt(x: Numbers, rescale: Rescale, *, x_zero: int, out_zero: int) -> Bytes:
    r"""$1/\sqrt{x}$ element by element; `rescale` is $1 / (\sqrt{s_x}\, s_y)$. Zero gives the largest byte.

    Raises:
        ValueError: an element below the zero point.

    Book: integer-layer-norm
    """
    q = _int64(x) - x_zero
    if (q < 0).any():
        raise ValueError(f"x: expected bytes from the zero point {x_zero} up, got {int(q.min()) + x_zero}")
    values = {0: 127}
    for value in {int(v) for v in np.unique(q)} - {0}:
        mantissa, shift = inverse_sqrt(value)
        data = multiply_by_quantized_multiplier(1, mantissa, shift + 20)
        out = multiply_by_quantized_multiplier(data, rescale.mantissa, rescale.shift - 20)
        values[value] = int(to_int8(out, zero=out_zero))
    lookup: Callable[[int], int] = values.__getitem__
    return np.vectorize(lookup, otypes=[np.int8])(q)


@dataclass(frozen=True, eq=False)
class LayerNormInt8:
    r"""LayerNorm in one step from int8 to int8, where TensorFlow Lite makes a dozen operations of it.

    With $d_i = D q_i - \sum_j q_j$ the zero point and the scale of the input cancel, but for ε:

    $$\frac{x_i - \mu}{\sqrt{\sigma^2 + \varepsilon}} = \frac{d_i}{\sqrt{v}}, \qquad
      v = \tfrac1D \textstyle\sum_j d_j^2 + \varepsilon D^2 / s_x^2$$

    The sums are exact. Rounded are v, which has as many bits behind the point as leave it an int32, the
    reciprocal root, the normalised number (to 14 bits behind the point), γ (to 12 bits) and the result.

    Args:
        gamma: (D,) γ in 12 bits.
        beta: (D,) β at the scale of the products n γ.
        fraction: bits of v behind the point, an even number.
        epsilon: ε D² / s_x² with so many bits; at least 1, so that equal numbers are divided by something.
        rescale: from the scale of the products to that of the output.
        out_zero: zero point of the output.

    Book: integer-layer-norm
    """

    gamma: Integers
    beta: Integers
    fraction: int
    epsilon: int
    rescale: Rescale
    out_zero: int

    @classmethod
    def of(
        cls,
        weight: Numbers,
        bias: Numbers,
        *,
        norm_eps: float,
        x_scale: float,
        out_scale: float,
        out_zero: int,
    ) -> "LayerNormInt8":
        """From γ, β and ε of a float LayerNorm, and the scales.

        Raises:
            ValueError: γ and β are no vectors of one length, at most 360 long, or ε D² / s_x² is too large.

        Book: integer-layer-norm
        """
        gamma, beta = np.asarray(weight, dtype=np.float64), np.asarray(bias, dtype=np.float64)
        if gamma.ndim != 1 or gamma.shape != beta.shape or not 1 <= len(gamma) <= 360:
            raise ValueError(
                "weight, bias: expected two vectors of one length from 1 to 360, "
                f"got {gamma.shape} and {beta.shape}"
            )
        largest = len(gamma) ** 2 * 2**14  # of D² σ² / s_x², since a byte is within 128 of any mean
        fraction = (31 - largest.bit_length()) // 2 * 2
        epsilon = max(1, round(norm_eps * len(gamma) ** 2 / x_scale**2 * 2**fraction))
        if epsilon > 2**30:
            raise ValueError(f"norm_eps: expected less than the variances, got {norm_eps} with s = {x_scale}")
        step = max(float(np.abs(gamma).max()), 1e-12) / 2047
        unit = step / 2**14  # of a product
        offset = np.clip(np.rint(beta / unit), -(2**30), 2**30)
        return cls(
            np.rint(gamma / step).astype(np.int64),
            offset.astype(np.int64),
            fraction,
            epsilon,
            Rescale.of(unit / out_scale),
            out_zero,
        )

    def __call__(self, x: Numbers) -> Bytes:
        """Normalise the last axis.

        Raises:
            ValueError: the last axis has another length.

        Book: integer-layer-norm
        """
        q = _int64(x)
        width = len(self.gamma)
        if q.shape[-1] != width:
            raise ValueError(f"x: expected a last axis of {width}, got {q.shape}")
        d = width * q - q.sum(-1, keepdims=True)
        squares = (d * d).sum(-1) << self.fraction
        v = np.minimum((squares + width // 2) // width + self.epsilon, INT32_MAX)
        roots = np.array([inverse_sqrt(int(one)) for one in v.ravel()]).reshape(*v.shape, 2)
        shift = roots[..., 1:] + 14 + self.fraction // 2
        normal = multiply_by_quantized_multiplier(d, roots[..., :1], shift)  # in Q17.14
        return to_int8(self.rescale(normal * self.gamma + self.beta), zero=self.out_zero)


# Hardswish.


def _high_multiply16(a: Integers, b: int) -> Integers:
    product = a * b
    nudged = product + np.where(product >= 0, 1 << 14, 1 - (1 << 14))
    return np.minimum(np.where(nudged >= 0, nudged >> 15, -(-nudged >> 15)), 2**15 - 1)


def _shift_left16(a: Integers, bits: int) -> Integers:
    return np.clip(a << bits, -(2**15), 2**15 - 1)


def hard_swish(x: Numbers, *, scales: tuple[float, float], zeros: tuple[int, int]) -> Bytes:
    r"""$x \min(\max(x + 3, 0), 6) / 6$ in int16, as TensorFlow Lite's reference has it.

    Args:
        scales: s_x, s_y.
        zeros: z_x, z_y.

    Book: integer-multiplier
    """

    def factor(real: np.floating[Any]) -> tuple[int, int]:
        mantissa, shift = quantize_multiplier(float(real))
        return min((mantissa + (1 << 15)) >> 16, 2**15 - 1), shift

    fine = np.float32(1 / 128) * np.float32(scales[0])
    out_mantissa, out_shift = factor(fine / np.float32(scales[1]))
    gate_mantissa, gate_shift = factor(fine / np.float32(3 / 32768))
    value = (_int64(x) - zeros[0]) << 7
    gate = _shift_left16(value, gate_shift - 1) if gate_shift > 0 else value
    gate = _high_multiply16(gate, gate_mantissa)  # x / 3 in Q0.15, saturated to (−1, 1)
    gate = _shift_left16(gate, 1) if gate_shift > 0 else rounding_divide(gate, -gate_shift)
    gate = (gate + (1 << 15)) >> 1
    product = gate * _high_multiply16(value, out_mantissa)
    product = np.where(product >= 0, product >> 15, -(-product >> 15))
    return to_int8(rounding_divide(product, max(-out_shift, 0)), zero=zeros[1])
