"""Parameters and operations by formula equal the counted ones, for every published size of the encoders."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from textbook_code.models.text.bert import BertConfig, BertForMaskedLM, EncoderConfig
from textbook_code.models.text.distilbert import DistilBertConfig, DistilBertForMaskedLM
from textbook_code.models.text.roberta import RobertaConfig, RobertaForMaskedLM

BERT_SIZES = ["bert_tiny", "bert_mini", "bert_small", "bert_medium", "bert_base", "bert_large", "minilm_l6"]
ROBERTA_SIZES = ["roberta_base", "roberta_large", "xlm_roberta_base", "xlm_roberta_large"]
SIZES = [
    *((BertForMaskedLM, BertConfig, size) for size in [*BERT_SIZES, "multilingual_e5_small"]),
    *((RobertaForMaskedLM, RobertaConfig, size) for size in ROBERTA_SIZES),
    (DistilBertForMaskedLM, DistilBertConfig, "distilbert_base"),
]
NAMES = [size for _, _, size in SIZES]
ODD = {"vocab_size": 97, "d_model": 35, "num_layers": 3, "num_heads": 5, "d_ff": 53, "max_seq_len": 41}


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())  # a tied tensor is one parameter


def reference_of(kind: type, config: EncoderConfig) -> transformers.PreTrainedModel:
    """What transformers builds of the config that we would write beside the weights."""
    theirs = kind(config).config_to_hf()
    architecture = getattr(transformers, theirs.pop("architectures")[0])
    return architecture(architecture.config_class(**theirs))


def counted_flops(kind: type, config: EncoderConfig, T: int) -> int:
    """By torch's counter, which does not know every attention kernel: so attention is written out."""
    with torch.device("meta"):
        model = kind(config).eval().requires_grad_(False)
        tokens = torch.ones(1, T, dtype=torch.long)
        with FlopCounterMode(display=False) as counter:
            body = getattr(model, next(name for name, _ in model.named_children()))
            hidden, weights = body(tokens, need_weights=True)
            logits = model.mlm_head(hidden, body.token_embed)
    assert len(weights) == config.num_layers and logits.shape == (1, T, config.vocab_size)
    return counter.get_total_flops()


@pytest.mark.parametrize(("kind", "config_class", "size"), SIZES, ids=NAMES)
def test_parameters(kind, config_class, size):
    config = getattr(config_class, size)()
    with torch.device("meta"):
        assert config.num_parameters() == count(kind(config)) == count(reference_of(kind, config))


@pytest.mark.parametrize(("kind", "config_class", "size"), SIZES, ids=NAMES)
def test_operations(kind, config_class, size):
    config = getattr(config_class, size)()
    for T in (1, 512):  # a T + b T² has two unknowns
        assert config.flops(T) == counted_flops(kind, config, T)


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        (BertForMaskedLM, BertConfig(**ODD, num_segments=3)),
        (RobertaForMaskedLM, RobertaConfig(**ODD, num_segments=3, pad_id=4)),
        (DistilBertForMaskedLM, DistilBertConfig(**ODD)),
    ],
)
def test_sizes_that_are_not_multiples_of_each_other(kind, config):
    assert config.num_parameters() == count(kind(config))
    assert config.flops(37) == counted_flops(kind, config, 37)
    for T in (0, 42):
        with pytest.raises(ValueError, match=rf"T: expected 1 to 41 tokens \(max_seq_len\), got {T}"):
            config.flops(T)


@pytest.mark.parametrize(
    ("config", "theirs"),
    [
        # the published config.json files, as far as they bear on the size
        (
            RobertaConfig.roberta_base(),
            {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "vocab_size": 50265},
        ),
        (
            RobertaConfig.roberta_large(),
            {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "vocab_size": 50265},
        ),
        (
            RobertaConfig.xlm_roberta_base(),
            {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "vocab_size": 250002},
        ),
        (
            RobertaConfig.xlm_roberta_large(),
            {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "vocab_size": 250002},
        ),
    ],
)
def test_the_published_robertas(config, theirs):
    published = {
        **theirs,
        "intermediate_size": 4 * theirs["hidden_size"],
        "max_position_embeddings": 514,
        "type_vocab_size": 1,
        "layer_norm_eps": 1e-5,
        "hidden_dropout_prob": 0.1,
        "attention_probs_dropout_prob": 0.1,
        "pad_token_id": 1,
        "hidden_act": "gelu",
        "model_type": "xlm-roberta" if theirs["vocab_size"] == 250002 else "roberta",
    }
    assert RobertaForMaskedLM.config_from_hf(published) == config


def test_the_published_distilbert():
    assert (
        DistilBertForMaskedLM.config_from_hf(transformers.DistilBertConfig().to_dict()) == DistilBertConfig()
    )
    assert DistilBertConfig() == DistilBertConfig.distilbert_base()


@pytest.mark.parametrize("size", NAMES)
def test_a_size_can_be_changed(size):
    config_class = next(c for _, c, name in SIZES if name == size)
    config = getattr(config_class, size)(vocab_size=100, dropout=0.0)
    assert (config.vocab_size, config.dropout) == (100, 0.0)
    assert config.d_model == getattr(config_class, size)().d_model
