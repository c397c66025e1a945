"""Tiny references for the parity tests: no field at its default, sizes all different, prime if possible."""

from __future__ import annotations

import copy
from typing import Any

import torch
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


def padded_on_the_left(batch: Batch) -> Batch:
    """The same texts with their padding on the left."""

    def roll(x: torch.Tensor) -> torch.Tensor:
        lengths = batch.token_mask.sum(1).tolist()
        return torch.stack([row.roll(row.numel() - n) for row, n in zip(x, lengths, strict=True)])

    return Batch(roll(batch.tokens), roll(batch.token_mask), roll(batch.segments))


ROBERTA_PAD = 4  # published: 1; here the rows of the position table that nobody uses are 0 to 3
ROBERTA = {
    **BERT,
    "max_position_embeddings": 46,
    "pad_token_id": ROBERTA_PAD,
    "bos_token_id": 5,
    "eos_token_id": 6,
}


def roberta_config(**changes: Any) -> transformers.RobertaConfig:
    return transformers.RobertaConfig(**{**ROBERTA, **changes})


def roberta_batch() -> Batch:
    """Texts of 41 (the longest there is), 23, 32 and 3 tokens, each with segments 0, 1 and 2."""
    return ragged_batch(97, (41, 23, 32, 3), num_segments=3, pad_id=ROBERTA_PAD)


DISTILBERT = {
    "vocab_size": 97,
    "dim": 35,
    "n_layers": 3,
    "n_heads": 5,
    "hidden_dim": 53,
    "max_position_embeddings": 41,
    "dropout": 0.07,
    "attention_dropout": 0.03,
    "seq_classif_dropout": 0.11,
    "initializer_range": 0.05,
}


def distilbert_config(**changes: Any) -> transformers.DistilBertConfig:
    return transformers.DistilBertConfig(**{**DISTILBERT, **changes})


LLAMA: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 36,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "intermediate_size": 53,
    "max_position_embeddings": 41,
    "rms_norm_eps": 1e-2,
    "initializer_range": 0.05,
    "pad_token_id": 0,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 6.0,
    "low_freq_factor": 1.5,
    "high_freq_factor": 5.0,
    "original_max_position_embeddings": 29,
}
LLAMA_KINDS: dict[str, dict[str, Any]] = {
    "1, its heads all with keys of their own": {"num_key_value_heads": 6},
    "2 and 3, keys shared": {},
    "3.1, RoPE stretched": {"rope_parameters": LLAMA3_ROPE},
    "3.2, tied": {"rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": True},
}


def llama_config(**changes: Any) -> transformers.LlamaConfig:
    # the library writes into the dict of RoPE that it is given
    return transformers.LlamaConfig(**copy.deepcopy({**LLAMA, **changes}))


def mistral_config(**changes: Any) -> transformers.MistralConfig:
    """LLaMA's sizes, and a window much shorter than the texts."""
    return transformers.MistralConfig(**copy.deepcopy({**LLAMA, "sliding_window": 4, **changes}))
