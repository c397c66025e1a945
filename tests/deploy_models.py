"""A tiny model and pictures for the tests of deployment."""

from __future__ import annotations

import numpy as np
import torch

from textbook_code.deploy.tflite import as_float
from textbook_code.models.vision.tiny_vit import TinyViT, TinyViTConfig

SMALL = TinyViTConfig(patch_size=8, d_model=12, num_layers=1, num_heads=3, d_ff=20)


def channels_first(images: np.ndarray) -> torch.Tensor:
    """What the model reads."""
    return torch.from_numpy(as_float(images).transpose(0, 3, 1, 2).copy())


def pictures(n: int, seed: int) -> np.ndarray:
    """Smooth pictures of many brightnesses, so that logits differ."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (n, 4, 4, 3)).repeat(8, 1).repeat(8, 2)
    noisy = coarse * rng.uniform(0.2, 1, (n, 1, 1, 1)) + rng.normal(0, 9, coarse.shape)
    return np.clip(noisy, 0, 255).astype(np.uint8)


IMAGES, CALIBRATION = pictures(60, 1), pictures(64, 2)


def loud(config: TinyViTConfig) -> TinyViT:
    """A model whose every part matters: no weight, bias or running average at its plain start."""
    torch.manual_seed(3)
    model = TinyViT(config).eval()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("running_var"):
                tensor.copy_(0.5 + torch.rand_like(tensor))
            elif tensor.dim() == 1:
                tensor.copy_(0.3 * torch.randn_like(tensor) + (1.0 if "norm.weight" in name else 0.0))
        model.pos_embed.copy_(0.5 * torch.randn_like(model.pos_embed))
        model.head.weight.copy_(4 * torch.randn_like(model.head.weight))
        model.head.bias.sub_(model(channels_first(CALIBRATION)).mean())  # both verdicts occur
    return model
