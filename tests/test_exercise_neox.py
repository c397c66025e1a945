"""The reference of the exercise that ends Part 1 is GPT-NeoX, as transformers computes it."""

from __future__ import annotations

import pytest
import torch
import transformers
from parity import loud_

from textbook_code.exercises import evaluate
from textbook_code.exercises.encoder_decoder_family import _SLIPS, neox_logits
from textbook_code.exercises.framework import find

SIZES = {"num_heads": 3, "rotary_dim": 6, "theta": 500.0, "norm_eps": 1e-2}


def published(model: transformers.GPTNeoXForCausalLM) -> dict[str, torch.Tensor]:
    """The weights under the names of the published files, where the head is called `embed_out`."""
    names = {"lm_head.weight": "embed_out.weight"}
    return {names.get(name, name.removeprefix("gpt_neox.")): p for name, p in model.state_dict().items()}


def reference() -> transformers.GPTNeoXForCausalLM:
    config = transformers.GPTNeoXConfig(
        vocab_size=47,
        hidden_size=36,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=60,
        hidden_act="gelu",
        rope_parameters={"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5},
        layer_norm_eps=1e-2,
        use_parallel_residual=True,
        attention_bias=True,
        tie_word_embeddings=False,
    )
    return loud_(transformers.GPTNeoXForCausalLM(config)).eval()


def test_the_exercise_and_its_solution_compute_what_the_reference_computes():
    model = reference()  # in float32: its rotary tables are, whatever its weights
    params = published(model)
    tokens = torch.randint(47, (2, 33), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        want = model(tokens).logits
        torch.testing.assert_close(neox_logits(tokens, params, **SIZES), want, atol=1e-4, rtol=1e-4)
        exercise = find("encoder-decoder-family/next-family")
        solved = evaluate(exercise, exercise.solution)(tokens, params, *SIZES.values())
        torch.testing.assert_close(solved, want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("slip", _SLIPS)
def test_each_mistake_that_the_check_names_is_one(slip):
    model = reference().double()
    params = published(model)
    tokens = torch.randint(47, (2, 33), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        right, wrong = neox_logits(tokens, params, **SIZES), neox_logits(tokens, params, **SIZES, slip=slip)
    assert float((right - wrong).abs().max()) > 1e-4  # the check allows 1e-9
