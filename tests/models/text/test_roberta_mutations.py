"""What RoBERTa has of its own is tested for: each of these planted bugs must make the comparison fail.

The bugs of the encoder itself are planted in ``test_bert_mutations.py``. Beside each verdict stands what a
gentle test would have said: the library's own initialisation, float32, 1e-5, outputs only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
import transformers
from parity import Errors, ParityError, compare, loud_
from references import ROBERTA_PAD, padded_on_the_left, roberta_batch, roberta_config
from torch import Tensor, nn

from textbook_code.layers.positions import token_positions
from textbook_code.models.text.roberta import Roberta, RobertaForMaskedLM, RobertaForSequenceClassification

Model = RobertaForMaskedLM | RobertaForSequenceClassification
Mutation = Callable[[Model, pytest.MonkeyPatch], None]
MUTATIONS: dict[str, tuple[type[Model], Mutation]] = {}
BATCHES = {"right": roberta_batch(), "left": padded_on_the_left(roberta_batch())}


def mutation(name: str, of: type[Model] = RobertaForMaskedLM) -> Callable[[Mutation], Mutation]:
    def register(plant: Mutation) -> Mutation:
        MUTATIONS[name] = (of, plant)
        return plant

    return register


def positions(name: str, wrong: Callable[[Roberta, int, Tensor], Tensor]) -> None:
    @mutation(name)
    def plant(model: Model, patch: pytest.MonkeyPatch) -> None:
        patch.setattr(Roberta, "positions", lambda self, T, mask: self.pos_embed.at(wrong(self, T, mask)))


positions("positions from 0, as BERT's", lambda m, T, mask: torch.arange(T))
positions(
    "positions from the padding's own",
    lambda m, T, mask: torch.where(mask, token_positions(mask) + ROBERTA_PAD, ROBERTA_PAD),
)
positions(
    "positions one too far",
    lambda m, T, mask: (torch.where(mask, token_positions(mask) + 2 + ROBERTA_PAD, 0)).clamp(max=45),
)
positions("positions of the places, not the tokens", lambda m, T, mask: torch.arange(T) + ROBERTA_PAD + 1)
positions(
    "positions counted from the end",
    lambda m, T, mask: torch.where(mask, mask.flip(1).cumsum(1).flip(1) + ROBERTA_PAD, ROBERTA_PAD),
)


@mutation("another segment")
def _(model: Model, patch: pytest.MonkeyPatch) -> None:
    table = model.roberta.segment_embed
    patch.setattr(table, "forward", lambda segments, name: F.embedding(segments + 1, table.weight))


@mutation("no segment")
def _(model: Model, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(model.roberta.segment_embed, "forward", lambda segments, name: torch.zeros(()))


@mutation("BERT's epsilon")
def _(model: Model, patch: pytest.MonkeyPatch) -> None:
    for module in model.modules():
        if hasattr(module, "norm_eps"):
            patch.setattr(module, "norm_eps", 1e-12)


@mutation("epsilon of the head left at its default")
def _(model: Model, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(model.mlm_head.norm, "norm_eps", 1e-5)


@mutation("norm of the head missing")
def _(model: Model, patch: pytest.MonkeyPatch) -> None:
    patch.setitem(model.mlm_head._modules, "norm", nn.Identity())


@mutation("norm of the head before its GELU")
def _(model: Model, patch: pytest.MonkeyPatch) -> None:
    head = model.mlm_head
    patch.setattr(
        head, "forward", lambda h, table: table.attend(F.gelu(head.norm(head.dense(h)))) + head.bias
    )


@mutation("bias of the vocabulary dropped")
def _(model: Model, patch: pytest.MonkeyPatch) -> None:
    patch.setitem(model.mlm_head._parameters, "bias", torch.zeros_like(model.mlm_head.bias).requires_grad_())


@mutation("the two norms swapped")
def _(model: Model, patch: pytest.MonkeyPatch) -> None:
    for block in model.roberta.blocks:
        first, second = block.attn_norm, block.ffn_norm
        patch.setitem(block._modules, "attn_norm", second)
        patch.setitem(block._modules, "ffn_norm", first)


@mutation("norm of the embeddings missing")
def _(model: Model, patch: pytest.MonkeyPatch) -> None:
    patch.setitem(model.roberta._modules, "embed_norm", nn.Identity())


def classifier(name: str, wrong: Callable[[RobertaForSequenceClassification, Tensor], Tensor]) -> None:
    @mutation(name, RobertaForSequenceClassification)
    def plant(model: Model, patch: pytest.MonkeyPatch) -> None:
        patch.setattr(
            model,
            "forward",
            lambda tokens, token_mask: wrong(model, model.roberta(tokens, token_mask=token_mask)),
        )


classifier("head without tanh", lambda m, h: m.classifier(m.dense(h[:, 0])))
classifier("head with DistilBERT's ReLU", lambda m, h: m.classifier(m.dense(h[:, 0]).relu()))
classifier("head without its dense layer", lambda m, h: m.classifier(h[:, 0].tanh() + 0 * m.dense(h[:, 0])))
classifier("head reads the last place", lambda m, h: m.classifier(m.dense(h[:, -1]).tanh()))
classifier("head reads the mean", lambda m, h: m.classifier(m.dense(h.mean(1)).tanh()))


def judge(name: str | None, of: type[Model] = RobertaForMaskedLM, *, loud: bool) -> tuple[float, str | None]:
    """Run the harness on a model with the bug in it: as it is, or as gentle as a careless test."""
    of, plant = MUTATIONS[name] if name else (of, None)
    classifies = of is RobertaForSequenceClassification
    batches = {side: b for side, b in BATCHES.items() if not (classifies and side == "left")}

    @contextmanager
    def mutate(model: Model) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            if plant:
                plant(model, patch)
            yield

    def ours(m: Model) -> dict[str, Tensor]:
        out = {side: m(b.tokens, token_mask=b.token_mask) for side, b in batches.items()}
        return out if classifies else {side: batches[side].real(x) for side, x in out.items()}

    def theirs(r: transformers.PreTrainedModel) -> dict[str, Tensor]:
        out = {side: r(b.tokens, attention_mask=b.token_mask.long()).logits for side, b in batches.items()}
        return out if classifies else {side: batches[side].real(x) for side, x in out.items()}

    reference_class = getattr(transformers, of.__name__)
    tolerances: dict[str, float | None] = {}
    if loud:
        reference = loud_(reference_class(roberta_config())).double()
    else:
        torch.manual_seed(0)
        reference = reference_class(roberta_config(layer_norm_eps=1e-5, initializer_range=0.02))
        tolerances = {"tolerance_forward": 1e-5, "tolerance_backward": None}
    try:
        errors: Errors = compare(
            of.from_hf,
            reference,
            ours=ours,
            theirs=theirs,
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
    request.node.user_properties.append(("mutation", {f"RoBERTa: {name}": outcome}))
    assert math.isfinite(error), "the mutant does not compute: it proves nothing"
    assert tensor is not None, f"the harness lets {name!r} pass with an error of {error:.3g}"


@pytest.mark.parametrize("loud", [True, False])
@pytest.mark.parametrize("of", [RobertaForMaskedLM, RobertaForSequenceClassification])
def test_without_a_bug_both_pass(of, loud):
    """So that a verdict above is due to the bug."""
    assert judge(None, of, loud=loud)[1] is None
