"""The models of the first part beside their published implementations, all of one modest size.

Four blocks (an encoder-decoder: two and two) of width 256 with eight heads, a feed-forward width of 1,024
and 4,096 words; whatever else a family has is as its own default. The reference is built first, with random
weights, and ours takes them over.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from textbook_code.models.text.bart import BartForConditionalGeneration
from textbook_code.models.text.distilbert import DistilBertForMaskedLM
from textbook_code.models.text.gpt import GptForCausalLM
from textbook_code.models.text.llama import LlamaForCausalLM
from textbook_code.models.text.mt5 import Mt5ForConditionalGeneration
from textbook_code.models.text.palm import PalmForCausalLM
from textbook_code.models.text.roberta import RobertaForMaskedLM
from textbook_code.models.text.t5 import T5ForConditionalGeneration

BATCH, LENGTH, VOCAB = 4, 128, 4096
BERT_LIKE = {
    "vocab_size": VOCAB,
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "intermediate_size": 1024,
}
T5_LIKE = {
    "vocab_size": VOCAB,
    "d_model": 256,
    "d_kv": 32,
    "d_ff": 1024,
    "num_layers": 2,
    "num_heads": 8,
    "decoder_start_token_id": 0,
}


@dataclass(frozen=True)
class Family:
    """`called`: the name in a row; `peer`: what it is compared with; `reference` builds that."""

    called: str
    peer: str
    ours: Any
    reference: Callable[[], nn.Module]
    two_texts: bool = False


def _transformers(architecture: str, config: str, **sizes: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import transformers

        model = getattr(transformers, architecture)(
            getattr(transformers, config)(**sizes, attn_implementation="sdpa")
        )
        model.config.use_cache = False  # nobody reads on behind these texts
        return model

    return build


def _palm() -> nn.Module:
    from palm_pytorch import PaLM

    return PaLM(dim=256, num_tokens=VOCAB, depth=4, dim_head=32, heads=8, ff_mult=4)


FAMILIES = {
    "roberta": Family(
        "RoBERTa",
        "transformers, RobertaForMaskedLM (SDPA)",
        RobertaForMaskedLM,
        _transformers("RobertaForMaskedLM", "RobertaConfig", **BERT_LIKE),
    ),
    "distilbert": Family(
        "DistilBERT",
        "transformers, DistilBertForMaskedLM (SDPA)",
        DistilBertForMaskedLM,
        _transformers(
            "DistilBertForMaskedLM",
            "DistilBertConfig",
            vocab_size=VOCAB,
            dim=256,
            n_layers=4,
            n_heads=8,
            hidden_dim=1024,
        ),
    ),
    "gpt": Family(
        "GPT-2",
        "transformers, GPT2LMHeadModel (SDPA)",
        GptForCausalLM,
        _transformers(
            "GPT2LMHeadModel",
            "GPT2Config",
            vocab_size=VOCAB,
            n_embd=256,
            n_layer=4,
            n_head=8,
            n_positions=512,
            bos_token_id=0,
            eos_token_id=0,
        ),
    ),
    "llama": Family(
        "LLaMA",
        "transformers, LlamaForCausalLM (SDPA)",
        LlamaForCausalLM,
        _transformers("LlamaForCausalLM", "LlamaConfig", **BERT_LIKE, num_key_value_heads=2),
    ),
    "palm": Family("PaLM", "palm_pytorch, PaLM", PalmForCausalLM, _palm),
    "t5": Family(
        "T5",
        "transformers, T5ForConditionalGeneration (SDPA)",
        T5ForConditionalGeneration,
        _transformers("T5ForConditionalGeneration", "T5Config", **T5_LIKE),
        two_texts=True,
    ),
    "mt5": Family(
        "mT5",
        "transformers, MT5ForConditionalGeneration (SDPA)",
        Mt5ForConditionalGeneration,
        _transformers(
            "MT5ForConditionalGeneration",
            "MT5Config",
            **T5_LIKE,
            feed_forward_proj="gated-gelu",
            tie_word_embeddings=False,
        ),
        two_texts=True,
    ),
    "bart": Family(
        "BART",
        "transformers, BartForConditionalGeneration (SDPA)",
        BartForConditionalGeneration,
        _transformers(
            "BartForConditionalGeneration",
            "BartConfig",
            vocab_size=VOCAB,
            d_model=256,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=8,
            decoder_attention_heads=8,
            encoder_ffn_dim=1024,
            decoder_ffn_dim=1024,
        ),
        two_texts=True,
    ),
}


class Published(nn.Module):
    """A reference that is called as ours is, and gives what ours gives: the logits."""

    def __init__(self, reference: nn.Module) -> None:
        super().__init__()
        self.reference = reference

    def forward(self, tokens: Tensor, target: Tensor | None = None) -> Tensor:
        more = {} if target is None else {"decoder_input_ids": target}
        output = self.reference(tokens, **more)
        return output if isinstance(output, Tensor) else output.logits
