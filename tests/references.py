"""Tiny references for the parity tests: no field at its default, sizes all different, prime if possible."""

from __future__ import annotations

from typing import Any

import transformers
from parity import Batch, ragged_batch

BERT = {
    "vocab_size": 97,
    "hidden_size": 35,
    "num_hidden_layers": 3,
    "num_attention_heads": 5,
    "intermediate_size": 53,
    "max_position_embeddings": 41,
    "type_vocab_size": 3,
    "layer_norm_eps": 1e-2,
    "hidden_dropout_prob": 0.07,
    "attention_probs_dropout_prob": 0.03,
    "initializer_range": 0.05,
}


def bert_config(**changes: Any) -> transformers.BertConfig:
    return transformers.BertConfig(**{**BERT, **changes})


def bert_batch() -> Batch:
    """Texts of 37, 23, 32 and 3 tokens, each with segments 0, 1 and 2; the longest row is padded too."""
    return ragged_batch(97, (37, 23, 32, 3), max_len=39, num_segments=3)


BART: dict[str, Any] = {
    "vocab_size": 97,
    "d_model": 35,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": 5,
    "decoder_attention_heads": 5,
    "encoder_ffn_dim": 53,
    "decoder_ffn_dim": 53,
    "max_position_embeddings": 41,
    "dropout": 0.07,
    "attention_dropout": 0.03,
    "activation_dropout": 0.11,
    "classifier_dropout": 0.13,
    "bos_token_id": 5,
    "pad_token_id": 3,
    "eos_token_id": 7,
    "decoder_start_token_id": 11,
    "forced_eos_token_id": 7,
    "init_std": 0.05,
}


def bart_config(**changes: Any) -> transformers.BartConfig:
    return transformers.BartConfig(**{**BART, **changes})


def bart_batches() -> tuple[Batch, Batch]:
    """Sources of 37, 23, 32 and 3 tokens beside targets of 29, 34, 1 and 17; the longest are padded too."""
    source = ragged_batch(97, (37, 23, 32, 3), max_len=39, pad_id=3)
    return source, ragged_batch(97, (29, 34, 1, 17), max_len=36, pad_id=3, seed=2)
