"""What DistilBERT has of its own is tested for: each of these planted bugs must make the comparison fail.

The bugs of attention and feed-forward are planted in ``test_bert_mutations.py``. Beside each verdict stands
what a gentle test would have said: the library's own initialisation, float32, 1e-5, outputs only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
import transformers
from parity import Errors, ParityError, compare, loud_
from references import bert_batch, distilbert_config
from torch import Tensor, nn

from textbook_code.models.text.distilbert import (
    DistilBertForMaskedLM,
    DistilBertForSequenceClassification,
    DistilBlock,
)

Model = DistilBertForMaskedLM | DistilBertForSequenceClassification
Mutation = Callable[[Model, pytest.MonkeyPatch], None]
MUTATIONS: dict[str, tuple[type[Model], Mutation]] = {}
BATCH = bert_batch()
EPS = 1e-2


def mutation(name: str, of: type[Model] = DistilBertForMaskedLM) -> Callable[[Mutation], Mutation]:
    def register(plant: Mutation) -> Mutation:
        MUTATIONS[name] = (of, plant)
        return plant

    return register


@mutation("positions off by two")
def _(model: Model, patch: pytest.MonkeyPatch) -> None:
    table = model.distilbert.pos_embed
    patch.setattr(table, "forward", lambda T: type(table).forward(table, T, start=2))


@mutation("positions left out")
def _(model: Model, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(model.distilbert.pos_embed, "forward", lambda T: torch.zeros(()))


@mutation("norm of the embeddings missing")
def _(model: Model, patch: pytest.MonkeyPatch) -> None:
    patch.setitem(model.distilbert._modules, "embed_norm", nn.Identity())


@mutation("the two norms swapped")
def _(model: Model, patch: pytest.MonkeyPatch) -> None:
    for block in model.distilbert.blocks:
        first, second = block.attn_norm, block.ffn_norm
        patch.setitem(block._modules, "attn_norm", second)
        patch.setitem(block._modules, "ffn_norm", first)


@mutation("epsilon of one norm wrong")
def _(model: Model, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(model.distilbert.blocks[1].ffn_norm, "norm_eps", 1e-5)


def block(name: str, wrong: Callable[[DistilBlock, Tensor, Tensor], Tensor]) -> None:
    @mutation(name)
    def plant(model: Model, patch: pytest.MonkeyPatch) -> None:
        patch.setattr(
            DistilBlock,
            "forward",
            lambda self, x, *, attn_mask, need_weights: (wrong(self, x, attn_mask), None),
        )


def pre_norm(b: DistilBlock, x: Tensor, mask: Tensor) -> Tensor:
    x = x + b.attn(b.attn_norm(x), attn_mask=mask)
    return x + b.ffn(b.ffn_norm(x))


def inner_residual_left_out(b: DistilBlock, x: Tensor, mask: Tensor) -> Tensor:
    x = b.attn_norm(b.attn(x, attn_mask=mask))
    return b.ffn_norm(x + b.ffn(x))


def residual_from_the_input(b: DistilBlock, x: Tensor, mask: Tensor) -> Tensor:
    y = b.attn_norm(x + b.attn(x, attn_mask=mask))
    return b.ffn_norm(x + b.ffn(y))


block("pre-norm instead of post-norm", pre_norm)
block("no residual round the attention", inner_residual_left_out)
block("second residual from the block's input", residual_from_the_input)
block("padding not masked", lambda b, x, mask: b.ffn_norm((y := b.attn_norm(x + b.attn(x))) + b.ffn(y)))


@mutation("a block left out")
def _(model: Model, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(model.distilbert.blocks[1], "forward", lambda x, **kw: (x, None))


@mutation("blocks in reverse order")
def _(model: Model, patch: pytest.MonkeyPatch) -> None:
    patch.setitem(model.distilbert._modules, "blocks", nn.ModuleList(reversed(model.distilbert.blocks)))


@mutation("GELU by tanh in the blocks")
def _(model: Model, patch: pytest.MonkeyPatch) -> None:
    for b in model.distilbert.blocks:
        patch.setattr(b.ffn, "activation", "gelu_tanh")


def head(name: str, wrong: Callable[[nn.Module, Tensor, nn.Module], Tensor]) -> None:
    @mutation(name)
    def plant(model: Model, patch: pytest.MonkeyPatch) -> None:
        m = model.mlm_head
        patch.setattr(m, "forward", lambda h, table: wrong(m, h, table))


head(
    "GELU by tanh in the head",
    lambda m, h, t: t.attend(m.norm(F.gelu(m.dense(h), approximate="tanh"))) + m.bias,
)
head("norm of the head missing", lambda m, h, t: t.attend(F.gelu(m.dense(h))) + m.bias)
head("norm of the head before its GELU", lambda m, h, t: t.attend(F.gelu(m.norm(m.dense(h)))) + m.bias)
head("bias of the vocabulary dropped", lambda m, h, t: t.attend(m.norm(F.gelu(m.dense(h)))) + 0 * m.bias)
head("head without its dense layer", lambda m, h, t: t.attend(m.norm(F.gelu(h))) + m.bias)


@mutation("output table not tied")
def _(model: Model, patch: pytest.MonkeyPatch) -> None:
    copied = nn.Parameter(model.distilbert.token_embed.weight.detach().clone())  # equal, but trained apart
    patch.setattr(model.distilbert.token_embed, "attend", lambda x: F.linear(x, copied))


def classifier(name: str, wrong: Callable[[DistilBertForSequenceClassification, Tensor], Tensor]) -> None:
    @mutation(name, DistilBertForSequenceClassification)
    def plant(model: Model, patch: pytest.MonkeyPatch) -> None:
        patch.setattr(
            model,
            "forward",
            lambda tokens, token_mask: wrong(model, model.distilbert(tokens, token_mask=token_mask)),
        )


classifier("head with BERT's tanh", lambda m, h: m.classifier(m.dense(h[:, 0]).tanh()))
classifier("head without ReLU", lambda m, h: m.classifier(m.dense(h[:, 0])))
classifier("head reads the mean", lambda m, h: m.classifier(m.dense(h.mean(1)).relu()))
classifier("head reads the second token", lambda m, h: m.classifier(m.dense(h[:, 1]).relu()))


def judge(
    name: str | None, of: type[Model] = DistilBertForMaskedLM, *, loud: bool
) -> tuple[float, str | None]:
    """Run the harness on a model with the bug in it: as it is, or as gentle as a careless test."""
    of, plant = MUTATIONS[name] if name else (of, None)
    eps = EPS if loud else 1e-12

    @contextmanager
    def mutate(model: Model) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            if plant:
                plant(model, patch)
            yield

    def load(reference: transformers.PreTrainedModel) -> Model:
        config = replace(of.config_from_hf(reference.config.to_dict()), norm_eps=eps)
        return of(config).load_hf_state_dict(reference.state_dict()).eval()

    def named(logits: Tensor) -> dict[str, Tensor]:
        return {"logits": BATCH.real(logits) if logits.ndim == 3 else logits}

    reference_class = getattr(transformers, of.__name__)
    tolerances: dict[str, float | None] = {}
    if loud:
        reference = loud_(reference_class(distilbert_config())).double()
        for module in reference.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = eps
    else:
        torch.manual_seed(0)
        reference = reference_class(distilbert_config(initializer_range=0.02))
        tolerances = {"tolerance_forward": 1e-5, "tolerance_backward": None}
    try:
        errors: Errors = compare(
            load,
            reference,
            ours=lambda m: named(m(BATCH.tokens, token_mask=BATCH.token_mask)),
            theirs=lambda r: named(r(BATCH.tokens, attention_mask=BATCH.token_mask.long()).logits),
            zero_gradient=[r".*\.k_proj\.bias"],
            mutate=mutate,
            **tolerances,
        )
    except ParityError as failed:
        return failed.error, failed.tensor
    return max(errors.forward, errors.backward or 0.0), None


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_planted_bug_is_caught(name, request):
    error, tensor = judge(name, loud=True)
    gentle_error, gentle_tensor = judge(name, loud=False)
    outcome = {
        "error": error,
        "tensor": tensor,
        "caught": tensor is not None,
        "gentle_error": gentle_error,
        "gentle_caught": gentle_tensor is not None,
    }
    request.node.user_properties.append(("mutation", {f"DistilBERT: {name}": outcome}))
    assert math.isfinite(error), "the mutant does not compute: it proves nothing"
    assert tensor is not None, f"the harness lets {name!r} pass with an error of {error:.3g}"


@pytest.mark.parametrize("loud", [True, False])
@pytest.mark.parametrize("of", [DistilBertForMaskedLM, DistilBertForSequenceClassification])
def test_without_a_bug_both_pass(of, loud):
    """So that a verdict above is due to the bug."""
    assert judge(None, of, loud=loud)[1] is None
