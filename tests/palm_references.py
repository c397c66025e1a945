"""PaLM's references at tiny size, and how their weights come into our model."""

from __future__ import annotations

from typing import Any

import palm_pytorch.palm_pytorch as public
import torch
import transformers
import transformers.models.cohere.modeling_cohere as cohere
from parity import Batch, loud_
from torch import Tensor, nn

from textbook_code.models.text.palm import PalmConfig, PalmForCausalLM
from textbook_code.weights import Rule, rename


def build_public(depth: int = 3) -> nn.Sequential:
    """palm_pytorch's PaLM: heads of 10 on a width of 36, and a last width that is not 4 D."""
    return loud_(public.PaLM(dim=36, num_tokens=97, depth=depth, dim_head=10, heads=5, ff_mult=3))


def in_float64(net: nn.Sequential) -> nn.Sequential:
    """Its frequencies are a float32 buffer: widen them by their formula, not by their bits."""
    net = net.double()
    for module in net.modules():
        if isinstance(module, public.RotaryEmbedding):
            i = torch.arange(0, 10, 2, dtype=torch.float64)
            torch.testing.assert_close(module.inv_freq, 10_000 ** (-i / 10), rtol=1e-6, atol=0)
            module.inv_freq.copy_(10_000 ** (-i / 10))
    return net


COHERE: tuple[Rule, ...] = (
    ("model.embed_tokens.weight", "palm.token_embed.weight"),
    ("model.layers.{i}.input_layernorm.weight", "palm.blocks.{i}.norm.weight"),
    ("model.layers.{i}.self_attn.o_proj.weight", "palm.blocks.{i}.attn.out_proj.weight"),
    ("model.layers.{i}.self_attn.{p}_proj.weight", "palm.blocks.{i}.attn.{p}_proj.weight"),
    ("model.layers.{i}.mlp.{p}_proj.weight", "palm.blocks.{i}.ffn.{p}_proj.weight"),
    ("model.norm.weight", "palm.final_norm.weight"),
)


def build_cohere(**changes: Any) -> transformers.CohereForCausalLM:
    sizes = {
        "vocab_size": 97,
        "hidden_size": 30,
        "intermediate_size": 53,
        "num_hidden_layers": 3,
        "num_attention_heads": 5,
        "num_key_value_heads": 1,
        "max_position_embeddings": 41,
        "layer_norm_eps": 1e-2,
        "logit_scale": 30**-0.5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
        "eos_token_id": 7,
    }
    return loud_(transformers.CohereForCausalLM(transformers.CohereConfig(**{**sizes, **changes})))


def halves(weight: Tensor, head_dim: int) -> Tensor:
    """From (pair, pair, …) to (first of each, second of each), head by head."""
    return weight.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).reshape_as(weight)


def from_cohere(reference: transformers.CohereForCausalLM) -> PalmForCausalLM:
    theirs = reference.config
    config = PalmConfig(
        vocab_size=theirs.vocab_size,
        d_model=theirs.hidden_size,
        num_layers=theirs.num_hidden_layers,
        num_heads=theirs.num_attention_heads,
        head_dim=theirs.hidden_size // theirs.num_attention_heads,
        d_ff=theirs.intermediate_size,
        max_seq_len=theirs.max_position_embeddings,
        rope_theta=theirs.rope_parameters["rope_theta"],
        norm_eps=theirs.layer_norm_eps,
    )
    assert theirs.num_key_value_heads == 1 and theirs.logit_scale == theirs.hidden_size**-0.5
    model = PalmForCausalLM(config).to(reference.dtype)
    state = {
        name: halves(tensor, config.head_dim) if name.endswith(("q_proj.weight", "k_proj.weight")) else tensor
        for name, tensor in reference.state_dict().items()
    }
    tied = {"lm_head.weight": "model.embed_tokens.weight"}
    model.load_state_dict(rename(state, COHERE, expected=model.state_dict(), tied=tied))
    return model


def compared(batch: Batch) -> dict[str, Any]:
    positions = (batch.token_mask.long().cumsum(1) - 1).clamp(min=0)
    known = {"attention_mask": batch.token_mask.long(), "position_ids": positions}
    return {
        "ours": lambda m: {"logits": batch.real(m(batch.tokens, token_mask=batch.token_mask))},
        "theirs": lambda r: {"logits": batch.real(r(batch.tokens, **known).logits)},
    }


def turned_wide(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
) -> tuple[Tensor, Tensor]:
    """Its function without the step into float32."""
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return q * cos + cohere.rotate_half(q) * sin, k * cos + cohere.rotate_half(k) * sin
