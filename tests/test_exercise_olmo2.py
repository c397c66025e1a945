"""The block that the page on normalisation asks for is OLMo 2's, number for number."""

from __future__ import annotations

import torch
import transformers
from exact import ExactRMSNorm
from parity import loud_

from textbook_code.exercises import framework
from textbook_code.layers.positions import RotaryPositions

D, H, F, T, EPS = 24, 3, 40, 11, 1e-2


@torch.no_grad()
def test_the_solution_computes_what_olmo_2_computes():
    config = transformers.Olmo2Config(
        vocab_size=19,
        hidden_size=D,
        intermediate_size=F,
        num_hidden_layers=1,
        num_attention_heads=H,
        num_key_value_heads=H,
        rms_norm_eps=EPS,
        attn_implementation="sdpa",
    )
    layer = loud_(transformers.Olmo2ForCausalLM(config).model.layers[0]).double().eval()
    state = layer.state_dict()
    for parent in (layer, layer.self_attn):
        for name, child in list(parent.named_children()):
            if name.endswith("norm"):
                setattr(parent, name, ExactRMSNorm(child))  # theirs rounds to float32
    names = {
        "self_attn.o_proj": "attn.out_proj",
        "self_attn": "attn",
        "mlp": "ffn",
        "post_attention_layernorm": "attn_norm",
        "post_feedforward_layernorm": "ffn_norm",
    }
    params = {}
    for key, value in state.items():
        old = next(name for name in names if key.startswith(name))
        params[key.replace(old, names[old], 1)] = value
    x = torch.randn(2, T, D, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    cos, sin = RotaryPositions(D // H, theta=500_000.0)(torch.arange(T), torch.float64)
    mask = torch.zeros(T, T, dtype=torch.float64).masked_fill(torch.ones(T, T).triu(1).bool(), -torch.inf)
    theirs = layer(x, attention_mask=mask[None, None], position_embeddings=(cos[None], sin[None]))
    theirs = theirs[0] if isinstance(theirs, tuple) else theirs
    exercise = framework.find("normalisation/reordered-block")
    ours = framework.evaluate(exercise, exercise.solution)(x, params, H, EPS)
    torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=1e-10)
