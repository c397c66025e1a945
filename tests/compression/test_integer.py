"""The integer kernels: against TensorFlow Lite's reference kernels bit for bit, and against floats."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from textbook_code.compression import integer
from textbook_code.compression.integer import LayerNormInt8, Rescale

from . import one_op
from .one_op import Given, activation, micro, model, reference, schema

RNG = np.random.default_rng(7)


@pytest.fixture(autouse=True)
def _same_numbers_whatever_ran_before() -> None:
    RNG.bit_generator.state = np.random.default_rng(7).bit_generator.state


def some(*shape: int, low: int = -128) -> np.ndarray:
    """Bytes, the extremes among them."""
    x = RNG.integers(low, 128, shape, dtype=np.int8)
    x.flat[:2] = low, 127
    return x


def scale() -> np.float32:
    return np.float32(math.exp(RNG.uniform(-7, 0)))


def zero() -> int:
    return int(RNG.integers(-128, 128))


def check(ours: np.ndarray, content: bytes, *inputs: np.ndarray) -> None:
    """Equal to both reference implementations, and not trivially so."""
    for run in (micro, reference):
        theirs = run(content, *inputs)
        np.testing.assert_array_equal(ours.reshape(theirs.shape), theirs, err_msg=run.__name__)
    assert len(np.unique(ours)) > 1


@pytest.mark.parametrize("case", range(6))
@pytest.mark.parametrize("word", ["NONE", "RELU"])
def test_fully_connected(case: int, word: str) -> None:
    per_channel = case % 3 != 0
    x, w = some(5, 19), some(23, 19, low=-127)
    b = RNG.integers(-3000, 3000, 23, dtype=np.int32)
    sx, zx, zy = scale(), zero(), zero()
    sw = np.array([scale() for _ in range(23 if per_channel else 1)], np.float32)
    sy = np.float32(sx * sw.mean() * 19**0.5 * 60)
    tensors = [Given(x.shape, sx, zx), Given(w.shape, sw, 0, w), Given(b.shape, sx * sw, 0, b, np.int32)]
    content = model(
        "FULLY_CONNECTED", [*tensors, Given((5, 23), sy, zy)],
        activation(schema.FullyConnectedOptionsT(), word), "FullyConnectedOptions",
    )  # fmt: skip
    product = float(sx) * sw.astype(float) if per_channel else float(sx) * float(sw[0])
    ours = integer.fully_connected(
        x, w, b, Rescale.of(product / float(sy)), x_zero=zx, out_zero=zy, low=zy if word == "RELU" else -128
    )
    check(ours, content, x)


def test_fully_connected_factor_above_one() -> None:
    x, w = some(3, 4), some(5, 4, low=-127)
    for ratio in (1.7, 5.3):
        none = np.zeros(5, np.int32)
        tensors = [Given(x.shape, 1.0, 3), Given(w.shape, ratio, 0, w), Given((5,), ratio, 0, none, np.int32)]
        content = model(
            "FULLY_CONNECTED", [*tensors, Given((3, 5), 1.0, 4)],
            activation(schema.FullyConnectedOptionsT()), "FullyConnectedOptions",
        )  # fmt: skip
        ours = integer.fully_connected(x, w, None, Rescale.of(float(np.float32(ratio))), x_zero=3, out_zero=4)
        for run in (micro, reference):
            np.testing.assert_array_equal(ours, run(content, x))


@pytest.mark.parametrize("case", range(3))
def test_patch_conv(case: int) -> None:
    x, w = some(1, 8, 12, 3), some(7, 4, 4, 3, low=-127)
    b = RNG.integers(-3000, 3000, 7, dtype=np.int32)
    sx, zx, zy = scale(), zero(), zero()
    sw = np.array([scale() for _ in range(7)], np.float32)
    sy = np.float32(sx * sw.mean() * 48**0.5 * 60)
    options = activation(schema.Conv2DOptionsT(), "RELU" if case == 2 else "NONE")
    options.padding, options.strideH, options.strideW = schema.Padding.VALID, 4, 4
    options.dilationHFactor = options.dilationWFactor = 1
    tensors = [Given(x.shape, sx, zx), Given(w.shape, sw, 0, w), Given(b.shape, sx * sw, 0, b, np.int32)]
    content = model("CONV_2D", [*tensors, Given((1, 2, 3, 7), sy, zy)], options, "Conv2DOptions")
    rescale = Rescale.of(float(sx) * sw.astype(float) / float(sy))
    ours = integer.patch_conv(x, w, b, rescale, x_zero=zx, out_zero=zy, low=zy if case == 2 else -128)
    check(ours, content, x)


@pytest.mark.parametrize("case", range(4))
def test_batch_matmul(case: int) -> None:
    a, b = some(3, 6, 11), some(3, 11, 5)
    sa, sb, za, zb, zy = scale(), scale(), zero(), zero(), zero()
    sy = np.float32(sa * sb * 11**0.5 * 90)
    content = model(
        "BATCH_MATMUL",
        [Given(a.shape, sa, za), Given(b.shape, sb, zb), Given((3, 6, 5), sy, zy)],
        schema.BatchMatMulOptionsT(), "BatchMatMulOptions",
    )  # fmt: skip
    rescale = Rescale.of(float(sa) * float(sb) / float(sy))
    check(integer.batch_matmul(a, b, rescale, a_zero=za, b_zero=zb, out_zero=zy), content, a, b)


@pytest.mark.parametrize("s", [0.0015, 0.01, 0.04, 0.3, 1.028, 2.5])
def test_softmax(s: float) -> None:
    x = some(40, 64)
    x[0], x[1, 1:], x[2] = 5, -128, np.arange(64)
    content = model(
        "SOFTMAX",
        [Given(x.shape, s, 11), Given(x.shape, 1 / 256, -128)],
        _softmax_options(),
        "SoftmaxOptions",
    )
    check(integer.softmax(x, integer.softmax_table(np.float32(s))), content, x)


def _softmax_options() -> Any:
    options = schema.SoftmaxOptionsT()
    options.beta = 1.0
    return options


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("case", range(4))
def test_add(case: int, sign: int) -> None:
    a, b = some(1, 9, 8), some(1, 9, 8)
    scales = tuple(scale() for _ in range(2))
    scales = (*scales, np.float32(sum(scales)))
    zeros = zero(), zero(), zero()
    word = "RELU" if case == 3 else "NONE"
    name = "Add" if sign == 1 else "Sub"
    content = model(
        name.upper(), [Given(a.shape, s, z) for s, z in zip(scales, zeros, strict=True)],
        activation(getattr(schema, f"{name}OptionsT")(), word), f"{name}Options",
    )  # fmt: skip
    low = zeros[2] if word == "RELU" else -128
    check(integer.add(a, b, scales=scales, zeros=zeros, sign=sign, low=low), content, a, b)


@pytest.mark.parametrize("case", range(3))
def test_multiply_and_squared_difference(case: int) -> None:
    a, b = some(1, 9, 8), some(1, 9, 8)
    sa, sb = scale(), scale()
    zeros = zero(), zero(), zero()
    sy = np.float32(sa * sb * 128)
    given = [Given(a.shape, sa, zeros[0]), Given(b.shape, sb, zeros[1])]
    content = model(
        "MUL", [*given, Given(a.shape, sy, zeros[2])], activation(schema.MulOptionsT()), "MulOptions"
    )
    rescale = Rescale.of(float(sa) * float(sb) / float(sy))
    check(integer.multiply(a, b, rescale, zeros=zeros), content, a, b)
    sy = np.float32(max(sa, sb) ** 2 * 200)
    content = model(
        "SQUARED_DIFFERENCE", [*given, Given(a.shape, sy, -128)],
        schema.SquaredDifferenceOptionsT(), "SquaredDifferenceOptions",
    )  # fmt: skip
    ours = integer.squared_difference(a, b, scales=(sa, sb, sy), zeros=(*zeros[:2], -128))
    check(ours, content, a, b)


@pytest.mark.parametrize("count", [64, 49, 7])
def test_mean(count: int) -> None:
    x = some(1, count, 6)
    sx, zx, zy = scale(), 5, -7
    sy = np.float32(sx / 3)
    options = schema.ReducerOptionsT()
    options.keepDims = False
    axes = Given((1,), data=np.array([1]), dtype=np.int32)
    content = model("MEAN", [Given(x.shape, sx, zx), axes, Given((1, 6), sy, zy)], options, "ReducerOptions")
    ours = integer.mean(x, (1,), Rescale.of(float(sx) / float(sy)), x_zero=zx, out_zero=zy)
    check(ours, content, x)


@pytest.mark.parametrize("sx", [0.003, 0.02, 0.11])
def test_rsqrt(sx: float) -> None:
    x = np.arange(-128, 128, dtype=np.int8)[None]
    sx, sy = np.float32(sx), np.float32(0.01)
    content = model("RSQRT", [Given(x.shape, sx, -128), Given(x.shape, sy, -128)])
    rescale = Rescale.of(1.0 / float(np.sqrt(sx) * sy))
    ours = integer.rsqrt(x, rescale, x_zero=-128, out_zero=-128)
    np.testing.assert_array_equal(ours, micro(content, x))
    exact = 1 / np.sqrt(np.arange(1, 256) * float(sx)) / float(sy) - 128
    assert np.abs(ours[0, 1:] - np.clip(exact, -128, 127)).max() <= 0.51


@pytest.mark.parametrize("sx", [0.01, 0.03, 0.06, 0.2])
@pytest.mark.parametrize("zx", [-20, 0, 90])
def test_hard_swish(sx: float, zx: int) -> None:
    x = np.arange(-128, 128, dtype=np.int8)[None]
    sy = np.float32(sx * 0.8)
    content = model("HARD_SWISH", [Given(x.shape, sx, zx), Given(x.shape, sy, -100)])
    ours = integer.hard_swish(x, scales=(np.float32(sx), sy), zeros=(zx, -100))
    np.testing.assert_array_equal(ours, micro(content, x))
    v = (np.arange(-128, 128) - zx) * sx
    exact = np.clip(v * np.clip(v + 3, 0, 6) / 6 / float(sy) - 100, -128, 127)
    assert np.abs(ours[0] - exact).max() < 1.6  # the reference's own error


def test_litert_rounds_a_matrix_product_once_and_tflite_micro_twice() -> None:
    x, w = some(100, 64), some(64, 64, low=-127)
    sw = np.linspace(0.001, 0.01, 64).astype(np.float32)
    sx, sy = np.float32(0.03), np.float32(0.1)
    bias = Given((64,), sx * sw, 0, np.zeros(64), np.int32)
    content = model(
        "FULLY_CONNECTED", [Given(x.shape, sx, 4), Given(w.shape, sw, 0, w), bias, Given((100, 64), sy, -3)],
        activation(schema.FullyConnectedOptionsT()), "FullyConnectedOptions",
    )  # fmt: skip
    rescale = Rescale.of(float(sx) * sw.astype(float) / float(sy))
    ours = integer.fully_connected(x, w, None, rescale, x_zero=4, out_zero=-3)
    np.testing.assert_array_equal(ours, micro(content, x))
    off = np.abs(reference(content, x).astype(int) - ours)
    assert off.max() == 1 and 0 < off.mean() < 0.01


def test_the_product_of_two_scales_is_not_rounded_to_a_float() -> None:
    rng = np.random.default_rng(0)
    while True:  # a sum for which it matters
        sa, sb = np.float32(rng.uniform(0.005, 0.03)), np.float32(rng.uniform(0.001, 0.01))
        sy = np.float32(float(sa) * float(sb) * rng.uniform(100, 4000))
        sums = np.arange(120 * 120)
        double, single = (Rescale.of(p / float(sy)) for p in (float(sa) * float(sb), float(sa * sb)))
        differ = sums[(double(sums) != single(sums)) & (double(sums) < 120)]
        if len(differ):
            break
    many, rest = divmod(int(differ[0]), 120)
    a, b = np.array([[[many, rest]]], np.int8), np.array([[[120], [1]]], np.int8)
    content = model(
        "BATCH_MATMUL", [Given(a.shape, sa), Given(b.shape, sb), Given((1, 1, 1), sy)],
        schema.BatchMatMulOptionsT(), "BatchMatMulOptions",
    )  # fmt: skip
    ours, not_ours = (integer.batch_matmul(a, b, r, a_zero=0, b_zero=0, out_zero=0) for r in (double, single))
    np.testing.assert_array_equal(micro(content, a, b), ours)
    assert ours != not_ours


# Against floats.


def test_multiplier_is_the_nearest() -> None:
    for real in (1e-9, 2**-31, 0.3, 0.5, 1.0, 1.5, 1 - 2**-40, 77.7, 2.0**29):
        mantissa, shift = integer.quantize_multiplier(real)
        assert 2**30 <= mantissa < 2**31
        assert abs(mantissa * 2.0 ** (shift - 31) / real - 1) <= 2**-31
    assert integer.quantize_multiplier(0.0) == (0, 0) == integer.quantize_multiplier(2.0**-33)
    for wrong in (-0.5, math.inf, math.nan, 2.0**30):
        with pytest.raises(ValueError, match="real: expected a factor from 0"):
            integer.quantize_multiplier(wrong)


def test_rounding_of_ties() -> None:
    assert integer.rounding_divide([-6, -5, -3, -1, 1, 3, 5, 6], 1).tolist() == [-3, -3, -2, -1, 1, 2, 3, 3]
    assert integer.rounding_divide([7, -7], 0).tolist() == [7, -7]
    minimum = -(2**31)
    assert integer.high_multiply(minimum, minimum) == 2**31 - 1  # the one overflow
    assert integer.high_multiply([1, -1], 2**30).tolist() == [1, 0]
    x = RNG.integers(minimum, 2**31, 1000)
    y = RNG.integers(minimum, 2**31, 1000)
    exact = x.astype(np.longdouble) * y / 2**31
    assert np.abs(integer.high_multiply(x, y) - exact).max() <= 0.5


INT32 = st.integers(-(2**31), 2**31 - 1)


@given(INT32, INT32, st.integers(0, 31))
def test_products_and_quotients_are_those_of_python(a: int, b: int, e: int) -> None:
    """Python's integers have no size, and its fractions round as they are told."""
    away = math.floor(abs(Fraction(a, 2**e)) + Fraction(1, 2))
    assert integer.rounding_divide(a, e) == (away if a >= 0 else -away)
    product = Fraction(a * b, 2**31)
    nearest = math.floor(product + Fraction(1, 2)) if a * b >= 0 else math.ceil(product - Fraction(1, 2))
    if a * b < 0 and (product - Fraction(1, 2)).denominator == 1:  # a tie below zero goes up
        nearest = math.ceil(product)
    assert integer.high_multiply(a, b) == min(nearest, 2**31 - 1)


@given(st.integers(-(2**24), 2**24), st.floats(1e-6, 60))
def test_a_rescaled_accumulator_is_within_one(a: int, real: float) -> None:
    exact = a * real
    assert abs(int(Rescale.of(real)(a)) - exact) <= 1 + abs(exact) * 2**-30


def test_double_rounding_differs_from_one_rounding_but_rarely() -> None:
    x = RNG.integers(-20000, 20000, 20_000)
    real = 0.0037
    once = np.floor(x * real + 0.5)
    twice = Rescale.of(real)(x)
    assert np.abs(once - twice).max() <= 1
    assert np.array_equal(Rescale.of([real, 2 * real])(x[:, None])[:, 0], twice)


def test_exponential_and_reciprocal() -> None:
    a = np.concatenate([-RNG.integers(0, 2**31, 2000), [0, -1, -(2**24), -(2**31)]])
    assert np.abs(integer.exp_negative(a) / 2**31 - np.exp(a / 2**26)).max() < 3e-7
    with pytest.raises(ValueError, match="a: expected numbers up to 0, got 1"):
        integer.exp_negative([1])
    a = np.concatenate([RNG.integers(0, 2**31, 2000), [0, 2**31 - 1]])
    assert np.abs(integer.reciprocal(a) / 2**31 - 1 / (1 + a / 2**31)).max() < 4e-9


def test_softmax_is_within_half_a_step() -> None:
    for s in (0.01, 0.2, 1.1):
        q = some(500, 64)
        e = np.exp(s * (q.astype(float) - 127))
        exact = np.minimum(256 * e / e.sum(-1, keepdims=True), 255) - 128
        assert np.abs(integer.softmax(q, integer.softmax_table(s)) - exact).max() < 0.501
    with pytest.raises(ValueError, match="x: expected at most 4095"):
        integer.softmax(np.zeros((1, 4096), np.int8), integer.softmax_table(0.1))
    with pytest.raises(ValueError, match="scale: expected at least"):
        integer.softmax_table(1e-9)


def test_a_row_of_equal_scores_and_a_single_one() -> None:
    table = integer.softmax_table(0.1)
    assert set(integer.softmax(np.full((1, 64), -128, np.int8), table).ravel()) == {-128 + 4}
    assert integer.softmax(np.array([[9]], np.int8), table).item() == 127  # one is shown as 255/256


def test_inverse_square_root() -> None:
    for x in [1, 2, 3, 4, 255, 256, 2**29 - 1, 2**29, 2**31 - 1, *RNG.integers(1, 2**31, 200).tolist()]:
        mantissa, shift = integer.inverse_sqrt(x)
        assert abs(mantissa * 2.0 ** (shift - 31) * x**0.5 - 1) < 3e-6
    for wrong in (0, -1, 2**31):
        with pytest.raises(ValueError, match=f"x: expected an integer from 1 to 2\\^31 - 1, got {wrong}"):
            integer.inverse_sqrt(wrong)


@pytest.mark.parametrize("width", [3, 64, 192, 360])
@pytest.mark.parametrize("s", [0.004, 0.05, 0.5])
def test_layer_norm_against_float(width: int, s: float) -> None:
    q = some(60, width)
    q[0], q[1] = 5, 5
    q[1, 0] = 6
    gamma, beta = RNG.normal(1, 0.3, width), RNG.normal(0, 0.3, width)
    x = s * (q.astype(float) - 7)
    exact = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * gamma + beta
    step = (max(exact.max(), 0) - min(exact.min(), 0)) / 255
    zero_point = round(-128 - min(exact.min(), 0) / step)
    norm = LayerNormInt8.of(gamma, beta, norm_eps=1e-5, x_scale=s, out_scale=step, out_zero=zero_point)
    assert np.abs(norm(q) - np.clip(exact / step + zero_point, -128, 127)).max() < 0.6


def test_layer_norm_does_not_see_the_zero_point_and_divides_by_something() -> None:
    norm = LayerNormInt8.of([1.0] * 8, [0.0] * 8, norm_eps=0.0, x_scale=0.1, out_scale=0.02, out_zero=3)
    q = RNG.integers(-60, 60, (5, 8))
    np.testing.assert_array_equal(norm(q), norm(q + 50))
    assert (norm(np.full((1, 8), 9)) == 3).all()


def test_layer_norm_says_what_it_expects() -> None:
    options: dict[str, Any] = {"norm_eps": 1e-5, "x_scale": 0.1, "out_scale": 0.1, "out_zero": 0}
    with pytest.raises(ValueError, match="weight, bias: expected two vectors"):
        LayerNormInt8.of([1.0, 1.0], [0.0], **options)
    with pytest.raises(ValueError, match="norm_eps: expected less than"):
        LayerNormInt8.of([1.0], [0.0], **options | {"norm_eps": 1e9})
    with pytest.raises(ValueError, match="x: expected a last axis of 1, got"):
        LayerNormInt8.of([1.0], [0.0], **options)(np.zeros((2, 3), int))


def test_floats_are_refused() -> None:
    with pytest.raises(TypeError, match="expected integers, got float64"):
        integer.rounding_divide(np.array([0.5]), 1)
    with pytest.raises(ValueError, match="image: expected a multiple of the patch 4 x 4, got 6 x 8"):
        integer.patch_conv(some(1, 6, 8, 3), some(2, 4, 4, 3), None, Rescale.of(0.1), x_zero=0, out_zero=0)
    with pytest.raises(ValueError, match="x: expected bytes from the zero point 3 up, got 2"):
        integer.rsqrt(np.array([2]), Rescale.of(0.1), x_zero=3, out_zero=0)


@pytest.mark.parametrize(
    "mutation", ["single rounding", "ties down", "coarse reciprocal", "short polynomial"]
)
def test_the_references_would_notice(mutation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of these is a plausible kernel, and not the same bits."""
    if mutation == "single rounding":

        def once(x: Any, m: Any, e: Any) -> Any:
            return np.floor(np.asarray(x) * np.asarray(m) * 2.0 ** (np.asarray(e) - 31) + 0.5).astype(
                np.int64
            )

        monkeypatch.setattr(integer, "multiply_by_quantized_multiplier", once)
    elif mutation == "ties down":
        monkeypatch.setattr(integer, "rounding_divide", lambda x, e: np.asarray(x) >> np.asarray(e))
    elif mutation == "coarse reciprocal":
        right = integer.reciprocal
        monkeypatch.setattr(integer, "reciprocal", lambda a: right(a) >> 20 << 20)
    else:
        monkeypatch.setattr(integer, "_exp_quarter", lambda a: (1 << 31) - 1 + a)
    integer.softmax_table.cache_clear()
    try:
        with pytest.raises(AssertionError):
            for case in range(6):
                test_softmax([0.04, 0.3][case % 2])
                test_fully_connected(case, "NONE")
                test_add(case % 4, 1)
    finally:
        integer.softmax_table.cache_clear()


def test_one_op_models_run() -> None:
    """The harness is not vacuous: another scale gives other bytes."""
    x = some(2, 8)
    made = [
        one_op.micro(
            model(
                "SOFTMAX",
                [Given(x.shape, s, 0), Given(x.shape, 1 / 256, -128)],
                _softmax_options(),
                "SoftmaxOptions",
            ),
            x,
        )
        for s in (0.01, 0.02)
    ]
    assert (made[0] != made[1]).any()
