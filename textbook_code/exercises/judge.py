"""What the checks of the exercises are made of: compare an answer, and say in one sentence what is wrong.

Each `…_problem` returns None when the answer is right.

Book: exercises-how
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def number_problem(got: Any, expected: float, what: str, *, rel: float = 1e-6) -> str | None:
    """None when `got` is the number expected, to a relative `rel`.

    Book: exercises-how
    """
    value = as_number(got)
    if value is None:
        return f"{what}: got {_brief(got)}, expected a number."
    if not math.isclose(value, expected, rel_tol=rel):
        return f"{what}: {value:,.10g} is not right."
    return None


def vector_problem(got: Any, expected: Sequence[float], what: str, *, tol: float = 1e-3) -> str | None:
    """None when `got` holds the numbers expected, each to within `tol`.

    Book: exercises-how
    """
    values = as_numbers(got)
    if values is None:
        return f"{what}: expected {len(expected)} numbers, got {_brief(got)}."
    if len(values) != len(expected):
        return f"{what}: expected {len(expected)} numbers, got {len(values)}."
    for place, (value, wanted) in enumerate(zip(values, expected, strict=True), start=1):
        if not math.isclose(value, wanted, abs_tol=tol):
            return f"{what}: number {place}, {value:.4g}, is not right."
    return None


def tensor_problem(got: Any, expected: Tensor, what: str, *, tol: float = 1e-5) -> str | None:
    """None when `got` is the tensor expected: its shape, its kind of dtype, its values to within `tol`.

    Book: exercises-how
    """
    if not isinstance(got, Tensor):
        return f"{what}: expected a tensor, got {_brief(got)}."
    if got.shape != expected.shape:
        return f"{what}: expected the shape {tuple(expected.shape)}, got {tuple(got.shape)}."
    if _kind(got) != _kind(expected):
        return f"{what}: expected {_kind(expected)} values, got {_kind(got)} ({got.dtype})."
    if _kind(got) == "floating-point" and not got.isfinite().all():
        return f"{what}: it holds nan or infinity."
    right = torch.isclose(got.double(), expected.double(), rtol=tol, atol=tol)
    if not right.all():
        index = tuple((~right).nonzero()[0].tolist())
        share = f"{int((~right).sum())} of {right.numel()} values are wrong"
        return (
            f"{what}: {share}, the first at {list(index)}: {_show(got[index])}, not {_show(expected[index])}."
        )
    return None


def as_number(value: Any) -> float | None:
    """`value` as a float, or None when it is no number (neither is a bool or a text).

    Book: exercises-how
    """
    if isinstance(value, bool | str):
        return None
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        return None


def as_numbers(values: Any) -> list[float] | None:
    """`values` as floats, or None when it is not a sequence of numbers.

    Book: exercises-how
    """
    try:
        numbers = [as_number(value) for value in values]
    except TypeError:
        return None
    return None if None in numbers else [number for number in numbers if number is not None]


def _kind(tensor: Tensor) -> str:
    if tensor.dtype == torch.bool:
        return "boolean"
    return "floating-point" if tensor.is_floating_point() else "integer"


def _show(scalar: Tensor) -> str:
    return f"{scalar.item():.4g}" if scalar.is_floating_point() else str(scalar.item())


def _brief(value: Any) -> str:
    if value is None:
        return "None"
    return (
        f"{type(value).__name__} {value!r}"
        if isinstance(value, str | bool | list | tuple)
        else f"a {type(value).__name__}"
    )


def slips_of(solution: str, *changes: tuple[str, str]) -> tuple[str, ...]:
    """Wrong answers made of a right one: the solution with the first of a pair replaced by the second.

    Raises:
        AssertionError: the solution does not hold what is to be replaced.

    Book: exercises-how
    """
    for right, _ in changes:
        assert right in solution, right
    return tuple(solution.replace(right, wrong) for right, wrong in changes)
