"""BigBird's attention computes what transformers' computes, given its random blocks."""

from __future__ import annotations

import math
from typing import Any
from unittest.mock import patch

import pytest
import torch
import transformers
from parity import error_of, loud_, parity_row
from torch import Tensor, nn
from transformers.models.big_bird.modeling_big_bird import (
    BigBirdBlockSparseAttention,
    BigBirdModel,
    BigBirdSelfAttention,
)

from textbook_code.layers.attention import Attention
from textbook_code.layers.masks import key_mask
from textbook_code.layers.sparse_attention import BigBirdAttention, bigbird_mask, random_blocks

D, H, BLOCK, R, T = 35, 5, 3, 2, 51
K_BIAS = r".*k_proj\.bias"
X = torch.randn(3, T, D, generator=torch.Generator().manual_seed(3)).double()
TOKEN_MASK = torch.arange(T) < torch.tensor([[51], [50], [20]])


def reference(kind: type[nn.Module], **kw: Any) -> nn.Module:
    config = transformers.BigBirdConfig(
        hidden_size=D,
        num_attention_heads=H,
        block_size=BLOCK,
        num_random_blocks=R,
        max_position_embeddings=T,
        attention_probs_dropout_prob=0.0,
        use_bias=True,
    )
    return loud_(kind(config, **kw)).double()


def load(r: nn.Module) -> BigBirdAttention:
    layer = BigBirdAttention(D, H, block_size=BLOCK, num_random=R).double()
    layer.out_proj = nn.Identity()  # in the reference it belongs to another module
    for name, theirs in {"q": "query", "k": "key", "v": "value"}.items():
        getattr(layer, f"{name}_proj").load_state_dict(getattr(r, theirs).state_dict())
    return layer


def block_sparse(r: nn.Module, *, training: bool) -> tuple[Tensor, Tensor]:
    """The reference's output and the random blocks that it drew."""
    mask = TOKEN_MASK.double()
    blocked, band, from_mask, to_mask = BigBirdModel.create_masks_for_block_sparse_attn(mask, BLOCK)
    drawn: list[Tensor] = []
    theirs = BigBirdBlockSparseAttention._bigbird_block_rand_mask_with_head

    def draw(self: nn.Module, **kw: Any) -> Any:
        blocks = theirs(self, **kw)
        drawn.append(torch.stack([torch.from_numpy(b).long() for b in blocks]))
        return blocks

    r.train(training)
    with patch.object(BigBirdBlockSparseAttention, "_bigbird_block_rand_mask_with_head", draw):
        out, _ = r(
            X,
            band_mask=band,
            from_mask=from_mask,
            to_mask=to_mask,
            from_blocked_mask=blocked,
            to_blocked_mask=blocked,
        )
    return out, drawn[0]


class InTraining(nn.Module):
    """The reference draws its random blocks in training only; without dropout that is all that changes."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self) -> tuple[Tensor, Tensor]:
        return block_sparse(self.inner, training=True)


@parity_row(
    "bigbird",
    "block-sparse attention",
    "transformers.BigBirdModel",
    page="sparse-bigbird",
)
def test_block_sparse_attention(parity):
    """With the random blocks that the reference drew from its own generator."""
    for seed in (0, 3):
        r = InTraining(reference(BigBirdBlockSparseAttention, seed=seed))
        _, blocks = r()
        assert blocks.shape == (H, T // BLOCK - 2, R) and len(blocks.unique(dim=0)) > 1
        parity.check(
            lambda r: load(r.inner),
            r,
            ours=lambda m, blocks=blocks: {"out": m(X, token_mask=TOKEN_MASK, blocks=blocks)[TOKEN_MASK]},
            theirs=lambda r: {"out": r()[0][TOKEN_MASK]},
            zero_gradient=[K_BIAS],
        )
        other = random_blocks(T // BLOCK, num_random=R, num_heads=H, seed=9)
        with torch.no_grad():
            ours = load(r.inner)(X, token_mask=TOKEN_MASK, blocks=other)[TOKEN_MASK]
        assert error_of(ours, r()[0][TOKEN_MASK]) > 1e-2  # other blocks, other numbers


@parity_row(
    "bigbird",
    "full attention of a short text",
    "transformers.BigBirdModel",
    page="sparse-bigbird",
)
def test_original_full(parity):
    short = (5 + 2 * R) * BLOCK
    x, real = X[:, :short], TOKEN_MASK[:, :short]
    additive = torch.zeros(3, 1, 1, short).double().masked_fill(~key_mask(real), -torch.inf)
    parity.check(
        load,
        reference(BigBirdSelfAttention),
        ours=lambda m: {"out": m(x, token_mask=real)[real]},
        theirs=lambda r: {"out": r(x, attention_mask=additive)[0][real]},
        zero_gradient=[K_BIAS],
    )


def test_the_reference_counts_its_first_block_again_where_it_does_not_train():
    """Outside training its random blocks are all block 0, which every query sees anyway.

    Ours refuses such blocks. The numbers are those of the pattern without random blocks, with log (1 + r)
    added to the scores of the first block in the rows between the first and the last.
    """
    r = reference(BigBirdBlockSparseAttention, seed=1)
    with torch.no_grad():
        theirs, blocks = block_sparse(r, training=False)
        assert not blocks.any()
        ours = load(r)
        with pytest.raises(ValueError, match="a block seen twice would count twice"):
            ours(X, blocks=blocks)
        plain = Attention(D, H).double()
        plain.out_proj = nn.Identity()
        plain.load_state_dict(ours.state_dict())
        pattern = bigbird_mask(T, blocks[..., :0], block_size=BLOCK) & key_mask(TOKEN_MASK)
        bias = torch.zeros(T, T).double()
        bias[BLOCK:-BLOCK, :BLOCK] = math.log(1 + R)
        counted = plain(X, attn_mask=pattern, score_bias=bias[None, None])
        once = plain(X, attn_mask=pattern)
    assert error_of(counted[TOKEN_MASK], theirs[TOKEN_MASK]) < 1e-10
    assert error_of(once[TOKEN_MASK], theirs[TOKEN_MASK]) > 1e-2


def test_the_reference_draws_from_the_beginning_of_a_long_text():
    """Its plan takes the random blocks of all rows from the first 2r + 5 blocks; ours from everywhere."""
    _, theirs = block_sparse(reference(BigBirdBlockSparseAttention, seed=0), training=True)
    N = T // BLOCK
    assert int(theirs.max()) < 2 * R + 5 < N
    ours = random_blocks(N, num_random=R, num_heads=H, seed=0)
    assert int(ours.max()) == N - 2
