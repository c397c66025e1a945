"""PaLM computes what its public implementations compute: palm_pytorch's, and Cohere's with one key head.

The weights of PaLM were never published. palm_pytorch follows the paper's description but for the scale
of the logits; its epsilon and θ are fixed and it knows no padding. A Cohere model with a single key/value
head computes the same function with all of these free; it turns neighbouring pairs where we turn halves, so
the rows of its query and key matrices are permuted on the way in.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
import transformers.models.cohere.modeling_cohere as cohere
from exact import exact_
from palm_references import build_cohere, build_public, compared, from_cohere, in_float64, turned_wide
from parity import check_loading, loud_, parity_row, ragged_batch
from references import padded_on_the_left
from torch import nn

from textbook_code.models.text.palm import PalmForCausalLM, z_loss

TOKENS = ragged_batch(97, (37, 37)).tokens
RIGHT = ragged_batch(97, (37, 23, 32, 3), max_len=39)
LEFT = padded_on_the_left(RIGHT)


@parity_row("palm", "causal language model", "palm_pytorch.PaLM", page="palm-block")
def test_causal_language_model(parity):
    for depth in (1, 3):
        parity.check(
            PalmForCausalLM.from_hf,
            in_float64(build_public(depth)),
            ours=lambda m: {"logits": m(TOKENS)},
            theirs=lambda r: {"logits": r(TOKENS)},
        )


def test_weights_load_strictly_both_ways():
    net = build_public()
    buffers = [name for name, _ in net.named_buffers() if name in net.state_dict()]
    assert len(buffers) == 7  # a beta of zeros for each norm, the frequencies of each block
    check_loading(PalmForCausalLM.from_hf, build_public, tied=[*buffers, "5.weight"])


def test_a_packed_matrix_that_is_short_is_refused():
    net = build_public()
    fused = net[2].fn.fused_attn_ff_proj
    fused.weight = nn.Parameter(fused.weight[:-1].detach())
    with pytest.raises(ValueError, match=r"2\.fn\.fused_attn_ff_proj\.weight: expected shape \(286, 36\)"):
        PalmForCausalLM.from_hf(net)


# ------------------------------------------------------------------------------------------------
# Cohere


@parity_row(
    "palm",
    "causal language model, as Cohere's with one key head",
    "transformers.CohereForCausalLM",
    page="palm-block",
)
def test_it_is_cohere_with_one_key_head(parity, monkeypatch):
    """Padding on both sides, scaled logits, another θ, a loud ε."""
    monkeypatch.setattr(cohere, "apply_rotary_pos_emb", turned_wide)
    for batch in (RIGHT, LEFT):
        parity.check(from_cohere, exact_(build_cohere()).double(), **compared(batch))


@parity_row(
    "palm",
    "causal language model, as Cohere's, its rounding kept",
    "transformers.CohereForCausalLM",
    page="palm-block",
    dtype="float32",
    backward=False,  # as for LLaMA: float32 is too narrow for sums over thousands of logits
)
def test_it_is_the_untouched_cohere_too(parity):
    for attention in ("eager", "sdpa"):
        for batch in (RIGHT, LEFT):
            reference = build_cohere()
            reference.set_attn_implementation(attention)
            parity.check(from_cohere, reference, **compared(batch))


# ------------------------------------------------------------------------------------------------
# The z-loss


def test_z_loss():
    """By its definition, and by its gradient: 2 · weight · log Z · softmax, over the positions' number."""
    logits = torch.randn(2, 5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    logits = (3 * logits).requires_grad_()
    normaliser = logits.exp().sum(-1)
    expected = 0.5 * (normaliser.log() ** 2).sum() / 10
    torch.testing.assert_close(z_loss(logits, weight=0.5), expected)
    z_loss(logits, weight=0.5).backward()
    torch.testing.assert_close(
        logits.grad, 2 * 0.5 * normaliser.log()[..., None] * logits.softmax(-1).detach() / 10
    )
    assert z_loss(logits).item() == pytest.approx(expected.item() * 1e-4 / 0.5)


def test_z_loss_sees_the_shift_that_cross_entropy_ignores():
    logits = torch.randn(4, 9, generator=torch.Generator().manual_seed(0))
    targets = torch.arange(4)
    torch.testing.assert_close(F.cross_entropy(logits + 50, targets), F.cross_entropy(logits, targets))
    assert z_loss(logits + 50) > 100 * z_loss(logits)
    normalised = logits.log_softmax(-1)  # Z = 1: nothing to pull
    assert float(z_loss(normalised, weight=1.0)) < 1e-12


def test_z_loss_is_computed_wide():
    half = torch.full((1, 4), 20.0, dtype=torch.float16)
    assert z_loss(half, weight=1.0).dtype == torch.float32
    assert float(z_loss(half, weight=1.0)) == pytest.approx((20 + math.log(4)) ** 2, rel=1e-5)


def test_z_loss_refuses():
    with pytest.raises(ValueError, match=r"logits: expected shape \(…, V\), got \(0, 3\)"):
        z_loss(torch.zeros(0, 3))
    with pytest.raises(ValueError, match=r"weight: expected 0 or more, got -1"):
        z_loss(torch.zeros(2, 3), weight=-1)


def test_saved_and_read_again(tmp_path):
    model = PalmForCausalLM(replace(PalmForCausalLM.from_hf(build_public()).config, scaled_logits=True))
    loud_(model).save_pretrained(tmp_path)
    again = PalmForCausalLM.from_pretrained(tmp_path)
    assert again.config == model.config
    assert torch.equal(again(TOKENS), model.eval()(TOKENS))
