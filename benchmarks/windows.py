"""A window of 256 in a text of 4,096, beside torch's kernel on the whole square."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from textbook_code.layers.local_attention import windowed_attention
from textbook_code.layers.masks import sliding_window_mask

LENGTH, WINDOW, HEADS, WIDTH = 4096, 256, 8, 64
WHAT = f"Window of {WINDOW}, forward, 1 × {LENGTH}"
KERNEL = "torch, scaled_dot_product_attention"
PEERS = {
    "masked": f"{KERNEL}, the window as a mask",
    "whole": f"{KERNEL}, no mask (another function)",
    "causal": f"{KERNEL}, causal (another function)",
}


def build(who: str, ours: str, *, length: int = LENGTH) -> tuple[Callable[[], Tensor], Tensor]:
    """The work to time, and its output.

    Two of the peers compute another function and so have no output to compare: theirs is the kernel's with
    the mask, so that what is compared is always ours with torch's.
    """
    draws = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, HEADS, length, WIDTH, generator=draws) for _ in range(3))
    mask = sliding_window_mask(length, window=WINDOW)

    def kernel(**how: Any) -> Callable[[], Tensor]:
        return lambda: F.scaled_dot_product_attention(q, k, v, **how)

    works = {
        ours: lambda: windowed_attention(q, k, v, window=WINDOW),
        "masked": kernel(attn_mask=mask),
        "whole": kernel(),
        "causal": kernel(is_causal=True),
    }

    def work() -> Tensor:
        with torch.inference_mode():
            return works[who]()

    return work, works[who]() if who == ours else works["masked"]()
