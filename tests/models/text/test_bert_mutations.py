"""The harness is tested: each of these planted bugs must make the comparison with transformers fail.

Beside each verdict stands what a gentle test would have said: the library's own initialisation and
epsilon, float32, 1e-5, outputs only. The table of both is written to ``_build/parity-mutations.json``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
import transformers
from parity import Errors, ParityError, compare, loud_
from references import bert_batch, bert_config
from torch import Tensor, nn

from textbook_code.layers import attention as attention_module
from textbook_code.models.text import bert as bert_module
from textbook_code.models.text.bert import BertForPreTraining

BATCH = bert_batch()
Mutation = Callable[[BertForPreTraining, pytest.MonkeyPatch], None]
MUTATIONS: dict[str, Mutation] = {}


def mutation(name: str) -> Callable[[Mutation], Mutation]:
    def register(plant: Mutation) -> Mutation:
        MUTATIONS[name] = plant
        return plant

    return register


def run_ours(m: BertForPreTraining) -> dict[str, Tensor]:
    words, follows = m(BATCH.tokens, token_mask=BATCH.token_mask, segments=BATCH.segments)
    return {"words": BATCH.real(words), "follows": follows}


def run_theirs(r: transformers.BertForPreTraining) -> dict[str, Tensor]:
    out = r(BATCH.tokens, attention_mask=BATCH.token_mask.long(), token_type_ids=BATCH.segments)
    return {"words": BATCH.real(out.prediction_logits), "follows": out.seq_relationship_logits}


# ------------------------------------------------------------------------------------------------
# The bugs. Attention first: each replaces the kernel by a wrong one.


def written_out(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, *, scale: float | None = None, axis: int = -1
) -> Tensor:
    scores = q @ k.transpose(-2, -1) * (q.size(-1) ** -0.5 if scale is None else scale)
    return scores.masked_fill(~mask, torch.finfo(scores.dtype).min).softmax(axis) @ v


def kernel(name: str, wrong: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]) -> None:
    @mutation(name)
    def plant(model: BertForPreTraining, patch: pytest.MonkeyPatch) -> None:
        patch.setattr(attention_module, "fused_attention", lambda q, k, v, mask, **_: wrong(q, k, v, mask))


kernel("scores not scaled", lambda q, k, v, m: written_out(q, k, v, m, scale=1.0))
kernel(
    "scores scaled by √d_model",
    lambda q, k, v, m: written_out(q, k, v, m, scale=(q.size(1) * q.size(3)) ** -0.5),
)
kernel("keys and values swapped", lambda q, k, v, m: written_out(q, v, k, m))
kernel("queries and keys swapped", lambda q, k, v, m: written_out(k, q, v, m))
kernel("softmax over the queries", lambda q, k, v, m: written_out(q, k, v, m, axis=-2))
kernel("softmax in float32", lambda q, k, v, m: written_out(q.float(), k.float(), v.float(), m).to(q.dtype))
kernel("mask inverted", lambda q, k, v, m: written_out(q, k, v, ~m))
kernel("mask ignored", lambda q, k, v, m: written_out(q, k, v, torch.ones_like(m)))
kernel("mask on the queries, not the keys", lambda q, k, v, m: written_out(q, k, v, m.transpose(-2, -1)))
kernel("mask added as 0 and 1", lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, m.to(q.dtype)))
kernel(
    "causal mask in an encoder",
    lambda q, k, v, m: written_out(q, k, v, m & m.new_ones(m.size(-1), m.size(-1)).tril()),
)
kernel("weights without gradient", lambda q, k, v, m: written_out(q.detach(), k.detach(), v, m))


@mutation("heads interleaved")
def _(model: BertForPreTraining, patch: pytest.MonkeyPatch) -> None:
    def split(x: Tensor, num_heads: int) -> Tensor:
        return x.unflatten(-1, (-1, num_heads)).permute(0, 3, 1, 2)

    patch.setattr(attention_module, "split_heads", split)


@mutation("heads joined without moving them back")
def _(model: BertForPreTraining, patch: pytest.MonkeyPatch) -> None:
    def merge(x: Tensor) -> Tensor:
        B, H, T, Dh = x.shape
        return x.reshape(B, T, H * Dh)

    patch.setattr(attention_module, "merge_heads", merge)


def without_bias(name: str, of: str) -> None:
    @mutation(f"bias of {name} dropped")
    def plant(model: BertForPreTraining, patch: pytest.MonkeyPatch) -> None:
        for block in model.bert.blocks:
            patch.setattr(block.get_submodule(of), "bias", None)


for where in ("attn.q_proj", "attn.v_proj", "attn.out_proj", "ffn.fc1", "ffn.fc2"):
    without_bias(where, where)


# The block and the encoder.


@mutation("the two norms swapped")
def _(model: BertForPreTraining, patch: pytest.MonkeyPatch) -> None:
    for block in model.bert.blocks:
        first, second = block.attn_norm, block.ffn_norm
        patch.setitem(block._modules, "attn_norm", second)
        patch.setitem(block._modules, "ffn_norm", first)


def block_forward(name: str, forward: Callable[[nn.Module, Tensor, Tensor], Tensor]) -> None:
    @mutation(name)
    def plant(model: BertForPreTraining, patch: pytest.MonkeyPatch) -> None:
        def wrong(
            self: nn.Module, x: Tensor, *, attn_mask: Tensor, need_weights: bool
        ) -> tuple[Tensor, None]:
            return forward(self, x, attn_mask), None

        patch.setattr(bert_module.Block, "forward", wrong)


def pre_norm(block: nn.Module, x: Tensor, mask: Tensor) -> Tensor:
    x = x + block.attn(block.attn_norm(x), attn_mask=mask)
    return x + block.ffn(block.ffn_norm(x))


def no_residual(block: nn.Module, x: Tensor, mask: Tensor) -> Tensor:
    x = block.attn_norm(x + block.attn(x, attn_mask=mask))
    return block.ffn_norm(block.ffn(x))


def parallel(block: nn.Module, x: Tensor, mask: Tensor) -> Tensor:
    return block.ffn_norm(x + block.attn(block.attn_norm(x), attn_mask=mask) + block.ffn(block.attn_norm(x)))


block_forward("pre-norm instead of post-norm", pre_norm)
block_forward("no residual round the feed-forward", no_residual)
block_forward("both halves in parallel", parallel)


@mutation("GELU by tanh")
def _(model: BertForPreTraining, patch: pytest.MonkeyPatch) -> None:
    for block in model.bert.blocks:
        patch.setattr(block.ffn, "activation", "gelu_tanh")


@mutation("wrong epsilon")
def _(model: BertForPreTraining, patch: pytest.MonkeyPatch) -> None:
    for block in model.bert.blocks:
        patch.setattr(block.ffn_norm, "norm_eps", 1e-5)


@mutation("variance divided by D − 1")
def _(model: BertForPreTraining, patch: pytest.MonkeyPatch) -> None:
    def forward(self: bert_module.LayerNorm, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred / (x.var(-1, keepdim=True) + self.norm_eps).sqrt() * self.weight + self.bias

    patch.setattr(bert_module.LayerNorm, "forward", forward)


@mutation("epsilon outside the root")
def _(model: BertForPreTraining, patch: pytest.MonkeyPatch) -> None:
    def forward(self: bert_module.LayerNorm, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return (
            centred / (x.var(-1, keepdim=True, correction=0).sqrt() + self.norm_eps) * self.weight + self.bias
        )

    patch.setattr(bert_module.LayerNorm, "forward", forward)


@mutation("blocks in reverse order")
def _(model: BertForPreTraining, patch: pytest.MonkeyPatch) -> None:
    patch.setitem(model.bert._modules, "blocks", nn.ModuleList(reversed(model.bert.blocks)))


# The embeddings.


@mutation("positions off by one")
def _(model: BertForPreTraining, patch: pytest.MonkeyPatch) -> None:
    table = model.bert.pos_embed
    patch.setattr(table, "forward", lambda T: type(table).forward(table, T, start=1))


@mutation("positions left out")
def _(model: BertForPreTraining, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(model.bert.pos_embed, "forward", lambda T: torch.zeros(()))


@mutation("segments ignored")
def _(model: BertForPreTraining, patch: pytest.MonkeyPatch) -> None:
    table = model.bert.segment_embed
    patch.setattr(table, "forward", lambda segments, name: F.embedding(segments * 0, table.weight))


@mutation("norm of the embeddings missing")
def _(model: BertForPreTraining, patch: pytest.MonkeyPatch) -> None:
    patch.setitem(model.bert._modules, "embed_norm", nn.Identity())


@mutation("embeddings scaled by √d_model")
def _(model: BertForPreTraining, patch: pytest.MonkeyPatch) -> None:
    table = model.bert.token_embed
    patch.setattr(
        table, "forward", lambda tokens: F.embedding(tokens, table.weight) * math.sqrt(table.embedding_dim)
    )


# The heads.


@mutation("pooler without tanh")
def _(model: BertForPreTraining, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(model.bert, "pool", lambda hidden: model.bert.pooler(hidden[:, 0]))


@mutation("pooler reads the last position")
def _(model: BertForPreTraining, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(model.bert, "pool", lambda hidden: model.bert.pooler(hidden[:, -1]).tanh())


@mutation("bias of the vocabulary dropped")
def _(model: BertForPreTraining, patch: pytest.MonkeyPatch) -> None:
    patch.setitem(model.mlm_head._parameters, "bias", torch.zeros_like(model.mlm_head.bias).requires_grad_())


@mutation("output table not tied")
def _(model: BertForPreTraining, patch: pytest.MonkeyPatch) -> None:
    copied = nn.Parameter(model.bert.token_embed.weight.detach().clone())  # equal, but trained apart
    patch.setattr(model.bert.token_embed, "attend", lambda x: F.linear(x, copied))


@mutation("norm of the language head missing")
def _(model: BertForPreTraining, patch: pytest.MonkeyPatch) -> None:
    patch.setitem(model.mlm_head._modules, "norm", nn.Identity())


@mutation("language head norms before its GELU")
def _(model: BertForPreTraining, patch: pytest.MonkeyPatch) -> None:
    head = model.mlm_head
    patch.setattr(
        head, "forward", lambda h, table: table.attend(F.gelu(head.norm(head.dense(h)))) + head.bias
    )


# ------------------------------------------------------------------------------------------------
# The verdicts


@dataclass(frozen=True)
class Verdict:
    error: float
    tensor: str | None

    @property
    def caught(self) -> bool:
        return self.tensor is not None


def judge(plant: Mutation | None, *, loud: bool) -> Verdict:
    """Run the harness on a model with the bug in it: as it is, or as gentle as a careless test."""

    @contextmanager
    def mutate(model: BertForPreTraining) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            if plant:
                plant(model, patch)
            yield

    if loud:
        reference = loud_(transformers.BertForPreTraining(bert_config())).double()
        tolerances = {}
    else:
        torch.manual_seed(0)
        reference = transformers.BertForPreTraining(bert_config(layer_norm_eps=1e-12, initializer_range=0.02))
        tolerances = {"tolerance_forward": 1e-5, "tolerance_backward": None}
    try:
        errors: Errors = compare(
            BertForPreTraining.from_hf,
            reference,
            ours=run_ours,
            theirs=run_theirs,
            zero_gradient=[r".*\.k_proj\.bias"],
            mutate=mutate,
            **tolerances,
        )
    except ParityError as failed:
        return Verdict(failed.error, failed.tensor)
    return Verdict(max(errors.forward, errors.backward or 0.0), None)


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_planted_bug_is_caught(name, request):
    verdict, gentle = judge(MUTATIONS[name], loud=True), judge(MUTATIONS[name], loud=False)
    outcome = {
        "error": verdict.error,
        "tensor": verdict.tensor,
        "caught": verdict.caught,
        "gentle_error": gentle.error,
        "gentle_caught": gentle.caught,
    }
    request.node.user_properties.append(("mutation", {name: outcome}))
    assert math.isfinite(verdict.error), "the mutant does not compute: it proves nothing"
    assert verdict.caught, f"the harness lets {name!r} pass with an error of {verdict.error:.3g}"


@pytest.mark.parametrize("loud", [True, False])
def test_without_a_bug_both_pass(loud):
    """So that a verdict above is due to the bug."""
    assert not judge(None, loud=loud).caught


def test_loudness_is_what_catches_them():
    """The reason for the loud weights: a gentle test misses many of the same bugs."""
    missed = [name for name, plant in MUTATIONS.items() if not judge(plant, loud=False).caught]
    assert "the two norms swapped" in missed and "bias of attn.out_proj dropped" in missed
    assert len(missed) >= len(MUTATIONS) // 4, missed
