"""Tiny T5s of the reference library: no field at its default, sizes all different, prime if possible."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from parity import Batch, loud_, ragged_batch
from torch import Tensor, nn

T5 = {
    "vocab_size": 97,
    "d_model": 35,
    "d_kv": 11,  # 3 heads of 11 are 33: another width than d_model
    "num_heads": 3,
    "d_ff": 53,
    "num_layers": 3,
    "num_decoder_layers": 2,
    "relative_attention_num_buckets": 12,
    "relative_attention_max_distance": 23,
    "layer_norm_epsilon": 1e-2,
    "dropout_rate": 0.07,
    "pad_token_id": 2,
    "eos_token_id": 5,
    "decoder_start_token_id": 7,
}
VERSIONS: dict[str, dict[str, Any]] = {
    "1.0": {"feed_forward_proj": "relu"},
    "1.1": {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
}


def source() -> Batch:
    """Texts of 41, 29, 37 and 3 tokens, the longest row padded too: beyond the last bucket's border."""
    return ragged_batch(97, (41, 29, 37, 3), max_len=43, pad_id=2)


def target() -> Batch:
    """Targets of 35, 31, 17 and 5 tokens; each begins with the decoder's first token."""
    batch = ragged_batch(97, (35, 31, 17, 5), max_len=36, pad_id=2, seed=3)
    batch.tokens[:, 0] = 7
    return batch


def exact_norms_(model: nn.Module) -> nn.Module:
    """Put torch.nn.RMSNorm in the place of the reference's norms, which square in float32.

    The formula is the same. In float32 the two are compared as they are, see the tests in float32.
    """

    class RMSNorm(nn.RMSNorm):
        """Named so that `loud_` takes it for a norm."""

    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child).__name__ in ("T5LayerNorm", "MT5LayerNorm"):
                setattr(parent, name, RMSNorm(child.weight.shape, eps=child.variance_epsilon))
    return model


def t5_config(*, version: str = "1.0", family: str = "T5", **changes: Any) -> Any:
    return getattr(transformers, family + "Config")(**{**T5, **VERSIONS[version], **changes})


def build(
    architecture: str,
    *,
    version: str = "1.0",
    attention: str = "eager",
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    loud: bool = True,
    **changes: Any,
) -> Any:
    """The reference, tiny and loud; in float64 with exact norms.

    The head of version 1.1 is untied by hand: the library ties it whatever the config says.
    """
    family = "MT5" if architecture.startswith("MT5") else "T5"
    config = t5_config(version=version, family=family, attn_implementation=attention, **changes)
    model = getattr(transformers, architecture)(config)
    if version == "1.1" and hasattr(model, "lm_head"):
        assert model.lm_head.weight is model.shared.weight, "the library unties the head by itself now"
        model.lm_head.weight = nn.Parameter(torch.empty_like(model.lm_head.weight).normal_())
    if dtype == torch.float64:
        exact_norms_(model)
    if loud:
        loud_(model, seed=seed)
    return model.to(dtype).eval()


def outputs(logits: Tensor, batch: Batch) -> dict[str, Tensor]:
    return {"logits": batch.real(logits)}
