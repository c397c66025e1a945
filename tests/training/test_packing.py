"""Packing: nothing is lost, nothing is mixed, and a packed document is computed as if it were alone."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from textbook_code.layers.attention import Attention
from textbook_code.layers.masks import causal_mask, document_mask
from textbook_code.layers.positions import RotaryPositions
from textbook_code.models.text.gpt import GptConfig, GptForCausalLM, document_positions
from textbook_code.training.objectives import IGNORE, causal_lm_loss, causal_lm_targets
from textbook_code.training.packing import pack

V = 83


@given(
    documents=st.lists(st.lists(st.integers(1, V - 1), min_size=1, max_size=30), min_size=1, max_size=12),
    length=st.integers(1, 40),
)
def test_every_token_is_there_once_in_its_order(documents, length):
    packed = pack(documents, length, pad_id=0, split=True)
    assert packed.tokens.shape == packed.document_ids.shape == packed.positions.shape
    assert packed.tokens.size(1) == length
    pieces = [doc[i : i + length] for doc in documents for i in range(0, len(doc), length)]
    for number, piece in enumerate(pieces):
        here = packed.document_ids == number
        assert packed.tokens[here].tolist() == piece
        assert packed.positions[here].tolist() == list(range(len(piece)))
        assert int(here.any(1).sum()) == 1, "in one row"
    assert int(packed.token_mask.sum()) == sum(map(len, documents))
    assert bool((packed.tokens[~packed.token_mask] == 0).all())
    assert packed.share == pytest.approx(sum(map(len, documents)) / packed.tokens.numel())
    full = packed.token_mask.sum(1)
    assert all(int(a + b) > length for a, b in itertools.pairwise(full)), "first fit leaves no two"
    assert torch.equal(
        document_positions(packed.document_ids)[packed.token_mask], packed.positions[packed.token_mask]
    )


def test_the_first_row_with_room_is_taken():
    packed = pack([[1] * 5, [2] * 4, [3] * 2, [4] * 3], 8, pad_id=9)
    assert packed.tokens.tolist() == [[1, 1, 1, 1, 1, 3, 3, 9], [2, 2, 2, 2, 4, 4, 4, 9]]
    assert packed.document_ids.tolist() == [[0, 0, 0, 0, 0, 2, 2, -1], [1, 1, 1, 1, 3, 3, 3, -1]]
    assert packed.positions.tolist() == [[0, 1, 2, 3, 4, 0, 1, 0], [0, 1, 2, 3, 0, 1, 2, 0]]
    same = pack(
        [torch.tensor(ids, dtype=torch.int32) for ids in ([1] * 5, [2] * 4, [3] * 2, [4] * 3)], 8, pad_id=9
    )
    assert torch.equal(same.tokens, packed.tokens)


def documents(seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, V, (n,), generator=generator) for n in (11, 7, 19, 3, 1, 13, 5)]


def loud(model: torch.nn.Module) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * (0.5 if p.dim() > 1 else 0.3))
    return model.double().eval()


@pytest.mark.parametrize("window", [None, 4])
def test_a_packed_batch_has_the_logits_and_the_gradients_of_separate_documents(window):
    config = GptConfig(
        vocab_size=V, d_model=24, num_layers=3, num_heads=3, d_ff=41, max_seq_len=29, window=window
    )
    model = loud(GptForCausalLM(config))
    packed = pack(documents(), 29)
    assert packed.tokens.size(0) < len(documents()), "rows hold several"
    logits = model(packed.tokens, document_ids=packed.document_ids)
    alone = [model(document[None])[0] for document in documents()]
    for number, expected in enumerate(alone):
        torch.testing.assert_close(logits[packed.document_ids == number], expected, rtol=0, atol=1e-10)
    mixed = model(packed.tokens)
    assert not torch.allclose(mixed[packed.token_mask], logits[packed.token_mask], atol=1e-2)

    together = causal_lm_loss(
        logits, packed.tokens, token_mask=packed.token_mask, document_ids=packed.document_ids
    )
    predicted = [len(document) - 1 for document in documents()]
    each = [
        causal_lm_loss(x[None], d[None]) * n
        for x, d, n in zip(alone, documents(), predicted, strict=True)
        if n
    ]
    separate = sum(each) / sum(predicted)
    torch.testing.assert_close(together, separate, rtol=0, atol=1e-10)
    ours, theirs = (torch.autograd.grad(x, list(model.parameters())) for x in (together, separate))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


def test_rotary_positions_that_begin_anew():
    """The same with an attention layer by itself, its rotary angles taken at the packed positions."""
    attn, rotary = loud(Attention(24, 3)), RotaryPositions(8).double()
    table = torch.randn(V, 24, dtype=torch.double, generator=torch.Generator().manual_seed(2))
    packed = pack(documents(), 29)
    mask = document_mask(packed.document_ids) & causal_mask(29)
    out = attn(table[packed.tokens], attn_mask=mask, rotary=rotary(packed.positions))
    for number, document in enumerate(documents()):
        T = len(document)
        alone = attn(table[document[None]], attn_mask=causal_mask(T), rotary=rotary(torch.arange(T)))
        torch.testing.assert_close(out[packed.document_ids == number], alone[0], rtol=0, atol=1e-10)


def test_no_token_predicts_the_start_of_another_document_or_padding():
    packed = pack([[1, 2, 3], [4, 5], [6]], 7)
    targets = causal_lm_targets(packed.tokens, token_mask=packed.token_mask, document_ids=packed.document_ids)
    assert targets.tolist() == [[2, 3, IGNORE, 5, IGNORE, IGNORE, IGNORE]]


@pytest.mark.parametrize(
    ("given_documents", "changes", "error", "message"),
    [
        ([], {}, ValueError, "documents: expected at least one, got none"),
        ([[1], []], {}, ValueError, r"documents\[1\]: expected at least one token, got an empty document"),
        ([[1] * 9], {}, ValueError, r"documents\[0\]: expected at most length = 8 tokens, got 9; split=True"),
        ([torch.ones(3)], {}, TypeError, r"documents\[0\]: expected a tensor of integer ids.*float32"),
        ([torch.ones(3, 1).long()], {}, ValueError, r"documents\[0\]: expected shape \(T\), got \(3, 1\)"),
        ([[1]], {"length": 0}, ValueError, "length: expected at least 1 token, got 0"),
    ],
)
def test_bad_input(given_documents, changes, error, message):
    with pytest.raises(error, match=message):
        pack(given_documents, **{"length": 8, **changes})
