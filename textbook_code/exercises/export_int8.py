"""Exercises of the page on export and INT8.

Book: export-int8
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from textbook_code.compression import integer
from textbook_code.compression.quantize import Affine
from textbook_code.exercises.framework import Exercise
from textbook_code.exercises.judge import slips_of, tensor_problem


def _bytes(*shape: int, low: int = -128) -> Tensor:
    return torch.randint(low, 128, shape, dtype=torch.int8)


def _kernel(
    x: Tensor, weight: Tensor, bias: Tensor, x_zero: int, real: float, y_zero: int, low: int
) -> Tensor:
    """The right answer, by the package."""
    out = integer.fully_connected(
        x.numpy(), weight.numpy(), bias.numpy(), integer.Rescale.of(real),
        x_zero=x_zero, out_zero=y_zero, low=low,
    )  # fmt: skip
    return torch.from_numpy(out)


def _check_affine(answer: Callable[..., Any]) -> str | None:
    for low, high in ((-1.0, 3.0), (0.0, 5.1), (0.5, 2.0), (-7.0, -3.0), (-0.3, 0.5)):
        result = answer(low, high)
        what = f"the range from {low} to {high}"
        if not isinstance(result, tuple) or len(result) != 2:
            return f"{what}: expected the pair (scale, zero point)."
        scale, zero = result
        right = Affine.of_range(torch.tensor(low), torch.tensor(high))
        if not isinstance(zero, int):
            return f"{what}: the zero point is to be an int, so that zero is exact; got {zero!r}."
        if abs(float(scale) / float(right.scale) - 1) > 1e-4:
            if low > 0 or high < 0:
                return f"{what}: scale {float(scale):.6g}; zero has to be in the range too."
            if abs(float(scale) / ((high - low) / 256) - 1) < 1e-4:
                return f"{what}: 256 integers have 255 steps between them."
            if abs(float(scale) / (max(abs(low), abs(high)) / 127) - 1) < 1e-4:
                return f"{what}: that scale is symmetric and leaves integers unused."
            return f"{what}: scale {float(scale):.6g} is not right."
        if not -128 <= zero <= 127:
            return f"{what}: zero point {zero} is no int8."
        if abs(zero - int(right.zero)) > 0:
            return f"{what}: zero point {zero} is not right; the low end is to be held as -128."
    return None


def _check_fold_zero(answer: Callable[..., Any]) -> str | None:
    for rows, width, outs, zero in ((3, 5, 2, 7), (4, 64, 9, -100), (1, 128, 3, 0)):
        x, weight = _bytes(rows, width), _bytes(outs, width, low=-127)
        bias = torch.randint(-5000, 5000, (outs,), dtype=torch.int32)
        what = f"{width} inputs, zero point {zero}"
        folded = answer(weight.clone(), bias.clone(), zero)
        want = bias - zero * weight.int().sum(1)
        if not isinstance(folded, Tensor) or folded.dtype != torch.int32:
            got = folded.dtype if isinstance(folded, Tensor) else type(folded).__name__
            return f"{what}: expected an int32 tensor, got {got}."
        if folded.shape != want.shape:
            return f"{what}: expected a bias for each output, {tuple(want.shape)}, got {tuple(folded.shape)}."
        if zero and not torch.equal(folded, want):
            if torch.equal(folded, 2 * bias - want):
                return f"{what}: the sign is wrong: the zero point is subtracted from the input."
            wrapped = (zero * weight.sum(1, dtype=torch.int8)).int()
            if torch.equal(folded, bias - wrapped):
                return f"{what}: the sum of bytes has overflowed a byte."
        if problem := tensor_problem(folded, want, what):
            return problem
        left = x.int() @ weight.int().T + folded
        if not torch.equal(left, (x.int() - zero) @ weight.int().T + bias):
            return f"{what}: with this bias the product is not the one with the zero point."
    return None


def _check_bug(answer: Callable[..., Any]) -> str | None:
    for rows, width, outs, x_zero, y_zero, real in (
        (5, 48, 7, 3, -128, 0.004),
        (4, 64, 5, -60, -20, 0.002),
        (3, 8, 4, 0, 5, 0.03),
    ):
        x, weight = _bytes(rows, width), _bytes(outs, width, low=-127)
        bias = torch.randint(-2000, 2000, (outs,), dtype=torch.int32)
        mantissa, shift = integer.quantize_multiplier(real)
        what = f"{width} inputs, zero points {x_zero} and {y_zero}"
        got = answer(x.clone(), weight.clone(), bias.clone(), x_zero, mantissa, shift, y_zero)
        want = _kernel(x, weight, bias, x_zero, real, y_zero, low=y_zero)
        if problem := tensor_problem(got, want, what):
            if not isinstance(got, Tensor) or got.shape != want.shape or got.dtype != want.dtype:
                return problem
            if torch.equal(got, _kernel(x, weight, bias, x_zero, real, y_zero, low=-128)):
                return f"{what}: without the ReLU: what is below the zero point stands for less than zero."
            if torch.equal(got, _kernel(x, weight, bias, x_zero, real, y_zero, low=max(0, y_zero))):
                return f"{what}: the ReLU clamps at the byte 0, which does not stand for 0."
            if (got.int() - want.int()).abs().max() <= 1:
                return f"{what}: some outputs are one too small: a shift alone rounds down."
            return problem
    return None


def _check_straight_through(answer: Callable[..., Any]) -> str | None:
    for scale, zero in ((0.02, 5), (0.01, -128), (0.5, 0)):
        x = torch.randn(400) * 2
        upstream = torch.randn(400)
        leaf = x.clone().requires_grad_()
        Affine(torch.tensor(scale), torch.tensor(float(zero))).fake(leaf).backward(upstream)
        want = leaf.grad
        assert want is not None
        got = answer(x.clone(), upstream.clone(), scale, zero)
        what = f"scale {scale}, zero point {zero}"
        if problem := tensor_problem(got, want, what):
            if isinstance(got, Tensor) and got.shape == want.shape:
                if torch.equal(got, upstream):
                    return f"{what}: what was clipped has no gradient."
                if not got.any():
                    return f"{what}: that is the true derivative, with which nothing can be learned."
                if torch.equal(got, upstream * (want == 0)):
                    return f"{what}: the mask is the wrong way round."
            return problem
    return None


def _check_softmax(answer: Callable[..., Any]) -> str | None:
    for scale, rows, width in ((0.05, 6, 64), (0.4, 5, 10), (1.3, 7, 64), (0.02, 2, 1)):
        q = _bytes(rows, width)
        table = torch.from_numpy(integer.softmax_table(scale).copy())
        got = answer(q.clone(), table.clone())
        what = f"rows of {width} with scale {scale}"
        if not isinstance(got, Tensor) or got.dtype != torch.int8 or got.shape != q.shape:
            kind = f"{got.dtype} {tuple(got.shape)}" if isinstance(got, Tensor) else type(got).__name__
            return f"{what}: expected int8 of the shape {tuple(q.shape)}, got {kind}."
        reference = torch.from_numpy(integer.softmax(q.numpy(), np.asarray(table)))
        apart = (got.int() - reference.int()).abs().max()
        if apart > 1:
            if ((got.int() < -100) & (reference.int() > 100)).any():
                return f"{what}: a weight of one has wrapped around; the largest byte is 127."
            e = table[(q.int().amax(-1, keepdim=True) - q.int())]
            down = (256 * e // e.sum(-1, keepdim=True) - 128).clamp(max=127)
            if torch.equal(got.int(), down.int()):
                return f"{what}: rounded down, not to the nearest."
            return f"{what}: off by {int(apart)} steps."
        e = table[(q.int().amax(-1, keepdim=True) - q.int())].double()
        exact = (256 * e / e.sum(-1, keepdim=True)).clamp(max=255) - 128
        if (got.double() - exact).abs().max() > 0.51:
            return f"{what}: more than half a step from the exact value: round to the nearest."
    return None


_AFFINE = """
    def affine(low, high):
        low, high = min(low, 0.0), max(high, 0.0)
        scale = (high - low) / 255
        return scale, round(-128 - low / scale)
"""

_FOLD = """
    def fold_zero(weight, bias, x_zero):
        return bias - x_zero * weight.int().sum(1, dtype=bias.dtype)
"""

_KERNEL = """
    import torch

    def linear_relu(x, weight, bias, x_zero, mantissa, shift, y_zero):
        a = (x.long() - x_zero) @ weight.long().T + bias
        a = (a << max(shift, 0)) * mantissa
        a = (a + torch.where(a < 0, 1 - 2**30, 2**30)).div(2**31, rounding_mode="trunc")
        right = max(-shift, 0)
        rest = a & (2**right - 1)
        half = (2**right - 1 >> 1) + (a < 0).long()
        a = (a >> right) + (rest > half).long()
        return (a + y_zero).clamp(y_zero, 127).to(torch.int8)
"""

_BUGGY_KERNEL = """
    import torch

    def linear_relu(x, weight, bias, x_zero, mantissa, shift, y_zero):
        a = (x.long() - x_zero) @ weight.long().T + bias
        a = (a << max(shift, 0)) * mantissa
        a = (a + torch.where(a < 0, 1 - 2**30, 2**30)).div(2**31, rounding_mode="trunc")
        a = a >> max(-shift, 0)
        return (a + y_zero).clamp(0, 127).to(torch.int8)
"""

_STRAIGHT = """
    def gradient(x, upstream, scale, zero):
        q = (x / scale).round() + zero
        return upstream * ((q >= -128) & (q <= 127))
"""

_SOFTMAX = """
    import torch

    def softmax(q, table):
        difference = q.amax(-1, keepdim=True).long() - q.long()
        e = table[difference]
        total = e.sum(-1, keepdim=True)
        out = (256 * e + total // 2) // total - 128
        return out.clamp(max=127).to(torch.int8)
"""


EXERCISES = (
    Exercise(
        name="export-int8/affine",
        title="A scale and a zero point",
        stars=1,
        statement=r"""
            Given the smallest and the largest number of a tensor, return the scale and the zero point of its
            int8 form, asymmetric, with all integers from −128 to 127 in use. Zero has to be exact, also where
            it lies outside the numbers seen; the zero point is a Python `int`.
        """,
        answer="affine",
        starter="""
            def affine(low, high):
                raise NotImplementedError
        """,
        solution=_AFFINE,
        wrong=slips_of(
            _AFFINE,
            ("low, high = min(low, 0.0), max(high, 0.0)", "pass"),
            ("/ 255", "/ 256"),
            ("round(-128 - low / scale)", "-128 - low / scale"),
            ("round(-128 - low / scale)", "round(-low / scale)"),
            ("(high - low) / 255", "max(-low, high) / 127"),
        ),
        check=_check_affine,
        hint="Widen the range to zero first. Which integer stands for the low end?",
    ),
    Exercise(
        name="export-int8/fold-zero",
        title="A zero point that costs nothing",
        stars=2,
        statement=r"""
            `weight` is `(D_out, D_in)` int8, `bias` `(D_out,)` int32, and the input of the layer has the zero
            point `x_zero`. Return the int32 bias $b'$ with which $W q + b' = W (q - z) + b$ for every input
            $q$, so that the kernel need not know $z$.
        """,
        answer="fold_zero",
        starter="""
            def fold_zero(weight, bias, x_zero):
                raise NotImplementedError
        """,
        solution=_FOLD,
        wrong=slips_of(
            _FOLD,
            ("bias - ", "bias + "),
            (".int().sum(1, dtype=bias.dtype)", ".sum(1, dtype=weight.dtype).int()"),
            ("bias - x_zero * weight.int().sum(1, dtype=bias.dtype)", "bias.clone()"),
        ),
        check=_check_fold_zero,
        hint="Multiply out. Which sum does not depend on q, and over which axis does it go?",
    ),
    Exercise(
        name="export-int8/find-the-bug",
        title="Find the bugs",
        stars=2,
        statement=r"""
            This kernel multiplies bytes, rescales by `mantissa` · 2^(`shift` − 31) with the two roundings of
            TensorFlow Lite, and has a ReLU fused in. It runs, and a model with it is biased. Mend it, so that
            it agrees with `fully_connected` in every bit. The first rounding is right.
        """,
        answer="linear_relu",
        starter=_BUGGY_KERNEL,
        solution=_KERNEL,
        wrong=(
            _BUGGY_KERNEL.replace("clamp(0, 127)", "clamp(y_zero, 127)"),
            _KERNEL.replace("clamp(y_zero, 127)", "clamp(0, 127)"),
            _KERNEL.replace("clamp(y_zero, 127)", "clamp(-128, 127)"),
            _KERNEL.replace(".clamp(y_zero, 127)", ""),
        ),
        check=_check_bug,
        hint="One mistake is in the second rounding. For the other: which byte stands for zero?",
    ),
    Exercise(
        name="export-int8/straight-through",
        title="The gradient of a rounding",
        stars=2,
        statement=r"""
            A tensor `x` is rounded to int8 with `scale` and `zero` and back. `upstream` is the gradient of
            the loss with respect to the result. Return the straight-through gradient with respect to `x`.
        """,
        answer="gradient",
        starter="""
            def gradient(x, upstream, scale, zero):
                raise NotImplementedError
        """,
        solution=_STRAIGHT,
        wrong=slips_of(
            _STRAIGHT,
            ("upstream * ((q >= -128) & (q <= 127))", "upstream"),
            ("upstream * ((q >= -128) & (q <= 127))", "upstream * 0"),
            (" + zero", ""),
            ("* ((q", "* ~((q"),
            ("(q >= -128) & (q <= 127)", "q <= 127"),
        ),
        check=_check_straight_through,
        hint="As if the rounding were the identity, but for the numbers that were clipped.",
    ),
    Exercise(
        name="export-int8/softmax-table",
        title="Softmax from a table",
        stars=3,
        statement=r"""
            `table` holds $e^{-s d}$ times $2^{31}$ for $d = 0, \dots, 255$ as int64, and `q`, `(T, S)` int8,
            the scores. Return the softmax of each row as int8 with the scale 1/256 and the zero point −128,
            rounded to the nearest, with integers only: no float, no call of `exp` or `softmax`. A weight of
            one is to be shown as 127.
        """,
        answer="softmax",
        starter="""
            import torch

            def softmax(q, table):
                raise NotImplementedError
        """,
        solution=_SOFTMAX,
        wrong=slips_of(
            _SOFTMAX,
            (" + total // 2", ""),
            (".clamp(max=127)", ""),
            ("256 * e", "255 * e"),
            ("e.sum(-1, keepdim=True)", "e.sum()"),
        ),
        check=_check_softmax,
        hint=(
            "The table is indexed by the distance to the row's largest score. "
            "To round a quotient, add half the divisor first."
        ),
    ),
)
