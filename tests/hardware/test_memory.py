"""Peak memory is what a computation holds at once, and the same each time."""

import torch
import torch.nn.functional as F

from textbook_code.hardware.memory import peak_bytes
from textbook_code.layers.attention import attention, fused_attention

MB = 1 << 20


def test_what_is_held_at_once_is_counted() -> None:
    def two_at_once() -> torch.Tensor:
        a = torch.empty(MB, dtype=torch.uint8)
        b = torch.empty(2 * MB, dtype=torch.uint8)
        del a, b
        return torch.empty(MB // 2, dtype=torch.uint8)

    def one_by_one() -> None:
        for _ in range(5):
            torch.empty(MB, dtype=torch.uint8)

    assert peak_bytes(two_at_once) == 3 * MB
    assert peak_bytes(one_by_one) == MB
    assert peak_bytes(lambda: torch.empty(MB, dtype=torch.float64)) == 8 * MB
    assert peak_bytes(lambda: None) == 0


def test_attention_stores_its_weights_and_the_fused_one_does_not() -> None:
    q, k, v = torch.randn(3, 1, 2, 512, 16)
    assert peak_bytes(lambda: attention(q, k, v)) > 2 * 2 * 512 * 512 * 4
    assert peak_bytes(lambda: fused_attention(q, k, v)) < 512 * 512 * 4


def test_it_is_the_same_each_time() -> None:
    x = torch.randn(64, 64, requires_grad=True)
    counts = {peak_bytes(lambda: F.gelu(x @ x).sum().backward()) for _ in range(3)}
    assert len(counts) == 1
