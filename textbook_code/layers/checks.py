"""Errors that name the argument, what came and what was expected.

Book: notation
"""

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor


def expect_shape(name: str, x: Tensor, axes: str, **sizes: int) -> None:
    """Raise unless `x` has the axes named in `axes`, those given in `sizes` at that size.

    Args:
        name: the argument's name, as the caller knows it.
        x: the tensor to check.
        axes: shape letters, for example `"B T D"`.
        **sizes: the letters whose size is fixed, for example `D=32`.

    Raises:
        TypeError: `x` is not a tensor.
        ValueError: the number of axes or a fixed size differs.

    Book: notation
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
    letters = axes.split()
    fits = x.dim() == len(letters) and all(
        x.size(i) == sizes[letter] for i, letter in enumerate(letters) if letter in sizes
    )
    if not fits:
        fixed = ", ".join(f"{letter} = {size}" for letter, size in sizes.items())
        wanted = f"({', '.join(letters)})" + (f" with {fixed}" if fixed else "")
        raise ValueError(f"{name}: expected shape {wanted}, got {tuple(x.shape)}")


def expect_bool(name: str, mask: Tensor) -> None:
    """Raise unless `mask` is a boolean tensor (True = may attend, or a real token).

    Raises:
        TypeError: `mask` is not a tensor, or not of dtype bool.

    Book: attention-masks
    """
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"{name}: expected a bool tensor in which True means yes, got {got}")


def expect_dtype(name: str, x: Tensor, dtype: torch.dtype) -> None:
    """Raise unless `x` has the floating `dtype` that it is computed with.

    Under autocast any floating tensor will do, and packed (quantised) weights decide nothing.

    Raises:
        TypeError: the dtype differs.

    Book: notation
    """
    if x.dtype == dtype:  # also on the meta device, which knows no autocast
        return
    free = torch.is_autocast_enabled(x.device.type) or not dtype.is_floating_point
    if not (free and x.is_floating_point()):
        raise TypeError(f"{name}: expected {dtype}, got {x.dtype}")


def expect_ids(name: str, ids: Tensor) -> None:
    """Raise unless `ids` is a tensor of integers that can index a table.

    Raises:
        TypeError: `ids` is not a tensor, or not of dtype int64 or int32.

    Book: bert-embeddings
    """
    if not isinstance(ids, Tensor) or ids.dtype not in (torch.int64, torch.int32):
        got = ids.dtype if isinstance(ids, Tensor) else type(ids).__name__
        raise TypeError(f"{name}: expected a tensor of integer ids (int64 or int32), got {got}")


def expect_sizes(config: Any) -> None:
    """Raise unless every integer field of a config, a dataclass, is at least 1.

    Fields called `…_id` are no sizes (a token may have the id 0), nor are those whose default is a
    float (a dropout may be given as 0).

    Raises:
        ValueError: a size is zero or negative.

    Book: notation
    """
    for field in fields(config):
        value = getattr(config, field.name)
        is_size = type(value) is int and type(field.default) is not float and not field.name.endswith("_id")
        if is_size and value < 1:
            raise ValueError(f"{field.name}: expected at least 1, got {value}")


def expect_divides(name: str, divisor: int, of_name: str, of: int) -> None:
    """Raise unless the positive integer `divisor` divides `of` without a rest.

    Raises:
        ValueError: it does not divide, or is not positive.

    Book: attention-multi-head
    """
    if divisor < 1 or of % divisor:
        raise ValueError(f"{name}: expected a positive divisor of {of_name} = {of}, got {divisor}")
