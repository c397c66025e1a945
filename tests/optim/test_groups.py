"""Groups: each parameter once, by what it is and not by what it is called."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from textbook_code.layers.attention import Attention
from textbook_code.layers.embeddings import TokenEmbedding
from textbook_code.layers.feed_forward import FeedForward
from textbook_code.layers.norms import LayerNorm, RMSNorm
from textbook_code.layers.residual import Residual
from textbook_code.models.text.bert import BertConfig, BertForMaskedLM
from textbook_code.models.text.decoder import Block, Decoder
from textbook_code.models.text.gpt import GptConfig, GptForCausalLM
from textbook_code.models.text.llama import LlamaConfig, LlamaForCausalLM
from textbook_code.optim.adamw import AdamW
from textbook_code.optim.groups import decay_groups


def names(model: nn.Module, **more: object) -> tuple[list[str], list[str]]:
    groups = {group["weight_decay"]: group["params"] for group in decay_groups(model, 0.1, **more)}
    return tuple([name for name, _ in groups.get(decay, [])] for decay in (0.1, 0.0))


def bench() -> Decoder:
    def block() -> Block:
        attn = Residual(Attention(8, 2), lambda: LayerNorm(8))
        return Block(attn, Residual(FeedForward(8, 16), lambda: RMSNorm(8)))

    return Decoder(11, 8, [block()], final_norm=RMSNorm(8))


@pytest.mark.parametrize(
    "model",
    [
        bench(),
        GptForCausalLM(GptConfig(vocab_size=11, d_model=8, num_layers=2, num_heads=2, max_seq_len=6)),
        LlamaForCausalLM(
            LlamaConfig(vocab_size=11, d_model=8, num_layers=2, num_heads=2, num_kv_heads=1, d_ff=12)
        ),
        BertForMaskedLM(
            BertConfig(vocab_size=11, d_model=8, num_layers=2, num_heads=2, d_ff=12, max_seq_len=6)
        ),
    ],
    ids=["bench", "gpt", "llama", "bert"],
)
def test_models_of_the_package(model: nn.Module) -> None:
    decayed, spared = names(model)
    assert sorted(decayed + spared) == sorted(name for name, _ in model.named_parameters()), "each once"
    assert decayed, "something decays"
    assert all(name.endswith("weight") for name in decayed)
    inner = ("proj", "fc1", "fc2", "dense", "lm_head", "transform")
    assert all(any(part in name for part in inner) for name in decayed), decayed
    assert not [name for name in decayed if "norm" in name or "embed" in name]
    # and the other way round: a matrix that is spared is a table
    parameters = dict(model.named_parameters())
    assert all("embed" in name for name in spared if parameters[name].dim() > 1)


@pytest.mark.parametrize("head_first", [False, True])
def test_a_tied_head_is_a_table_once(head_first: bool) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            parts = {"token_embed": TokenEmbedding(7, 4), "lm_head": nn.Linear(4, 7, bias=False)}
            for name in reversed(parts) if head_first else parts:
                self.add_module(name, parts[name])
            parts["lm_head"].weight = parts["token_embed"].weight
            self.fc1 = nn.Linear(4, 4)

    decayed, spared = names(Tied())
    assert decayed == ["fc1.weight"]
    assert spared == ["lm_head.weight" if head_first else "token_embed.weight", "fc1.bias"]
    assert len(AdamW(decay_groups(Tied(), 0.1)).param_groups) == 2


def test_norms_of_several_axes_frozen_ones_and_spared_names() -> None:
    model = nn.Module()
    model.norm, model.fc1, model.fc2 = nn.LayerNorm((3, 4)), nn.Linear(4, 4), nn.Linear(4, 4)
    model.cls_token = nn.Parameter(torch.zeros(1, 1, 4))
    model.fc2.requires_grad_(False)
    assert names(model) == (["cls_token", "fc1.weight"], ["norm.weight", "norm.bias", "fc1.bias"])
    assert names(model, spared=[".*cls_token"])[0] == ["fc1.weight"]
    assert len(decay_groups(nn.LayerNorm(3), 0.1)) == 1, "no empty group"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: decay_groups(nn.Linear(2, 2), -0.1), "weight_decay: expected a number of at least 0, got"),
        (lambda: decay_groups(nn.ReLU(), 0.1), "model: expected parameters to train, got none"),
        (
            lambda: decay_groups(nn.Linear(2, 2).requires_grad_(False), 0.1),
            "model: expected parameters to train, got none",
        ),
        (
            lambda: decay_groups(nn.Linear(2, 2), 0.1, spared=["wieght"]),
            "spared: 'wieght' is the name of no parameter",
        ),
    ],
)
def test_bad_input(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
