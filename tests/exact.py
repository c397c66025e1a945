"""References that round to float32 inside, made exact, so that float64 can be compared with float64.

transformers computes RMSNorm, Cohere's LayerNorm and the rotary angles in float32 whatever the dtype.
`exact_` replaces the norms by torch's own, in the dtype of their input, and the angles by the same formulas
in float64; it checks that each replaced value is the one that it replaces, to float32's precision.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ExactRMSNorm(nn.Module):
    def __init__(self, theirs: nn.Module) -> None:
        super().__init__()
        self.weight, self.eps = theirs.weight, theirs.variance_epsilon

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class ExactLayerNorm(ExactRMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, None, self.eps)


class ExactRotary(nn.Module):
    """Cosines and sines in float64, with each angle in both halves, or in both of a pair."""

    def __init__(self, theirs: nn.Module, *, interleaved: bool) -> None:
        super().__init__()
        self.interleaved = interleaved
        self.rope = dict(theirs.config.rope_parameters)
        self.head_dim = 2 * theirs.inv_freq.numel()
        torch.testing.assert_close(self.frequencies().float(), theirs.inv_freq.float(), rtol=1e-6, atol=0)

    def frequencies(self) -> Tensor:
        i = torch.arange(0, self.head_dim, 2, dtype=torch.float64)
        omega = 1 / self.rope["rope_theta"] ** (i / self.head_dim)
        if self.rope["rope_type"] == "default":
            return omega
        assert self.rope["rope_type"] == "llama3"
        old, low, high = (
            self.rope[key]
            for key in ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor")
        )
        stretched = []
        for w in omega.tolist():  # one wave at a time, as the paper's code does
            length = 2 * math.pi / w
            if length > old / low:
                stretched.append(w / self.rope["factor"])
            elif length < old / high:
                stretched.append(w)
            else:
                smooth = (old / length - low) / (high - low)
                stretched.append((1 - smooth) * w / self.rope["factor"] + smooth * w)
        return torch.tensor(stretched, dtype=torch.float64)

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        angle = position_ids[..., None].double() * self.frequencies()
        angle = angle.repeat_interleave(2, -1) if self.interleaved else torch.cat([angle, angle], -1)
        return angle.cos().to(x.dtype), angle.sin().to(x.dtype)


def exact_(model: Any) -> Any:
    """Replace the modules that round; parameters and their names stay. Returns the model."""
    replaced = 0
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            new: nn.Module | None = None
            match type(child).__name__:
                case "LlamaRMSNorm" | "MistralRMSNorm":
                    new = ExactRMSNorm(child)
                    probe = torch.randn(3, child.weight.numel())
                    torch.testing.assert_close(new(probe), child.to(probe.dtype)(probe), rtol=1e-5, atol=1e-6)
                case "CohereLayerNorm":
                    new = ExactLayerNorm(child)
                    probe = torch.randn(3, child.weight.numel())
                    torch.testing.assert_close(new(probe), child.to(probe.dtype)(probe), rtol=1e-5, atol=1e-5)
                case "LlamaRotaryEmbedding" | "MistralRotaryEmbedding":
                    new = ExactRotary(child, interleaved=False)
                case "CohereRotaryEmbedding":
                    new = ExactRotary(child, interleaved=True)
            if new is not None:
                setattr(module, name, new)
                replaced += 1
    assert replaced, "nothing in the model rounds"
    return model
