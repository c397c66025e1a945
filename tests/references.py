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
