"""Weights as their makers packed them, turned once into safetensors under the published names.

Three of the sources carry models in containers made for another program: a GGUF file, an ONNX graph, a
single binary blob. A converter reads one such file and writes ``model.safetensors`` in float32, with
``config.json`` and ``tokenizer.json`` beside it. It changes no value: a quantised number becomes the float it
stands for, so the model still lives on its 4-bit or 8-bit grid.

A converter is called as ``convert(folder, into, tell)``: it reads verified files in ``folder``, writes into
the empty folder ``into``, and tells how much is done, from 0 to 1.

Book: data-and-licences
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from textbook_code.data.errors import BadArchiveError
from textbook_code.extras import require

Tell = Callable[[float], object]
Floats = NDArray[np.float32]
Made = tuple[str, tuple[int, ...], Callable[[], Floats]]
"""A tensor to be written: its name, its shape, and what computes it when its turn comes."""


def smollm2(folder: Path, into: Path, tell: Tell) -> None:
    """A LLaMA out of its GGUF file, as ``LlamaForCausalLM`` names it.

    GGUF stores the query and key projections with the rows of each head reordered, pair by pair, for a
    rotary embedding that turns neighbours (2i, 2i + 1). The published one turns the halves
    (i, i + head_dim / 2), so the rows are put back. The output head is tied to the embedding and stored once.

    Raises:
        BadArchiveError: the file is not such a model.
        ImportError: the library ``gguf`` is missing.

    Book: data-and-licences
    """
    gguf = require("gguf", extra="weights")
    reader = gguf.GGUFReader(folder / "model.gguf")
    meta = {name: field.contents() for name, field in reader.fields.items()}
    if meta["general.architecture"] != "llama" or meta["tokenizer.ggml.model"] != "gpt2":
        raise BadArchiveError(f"{folder / 'model.gguf'} holds no LLaMA with a byte-level BPE tokenizer.")
    q_heads, kv_heads = meta["llama.attention.head_count"], meta["llama.attention.head_count_kv"]

    def tensor(found: Any, heads: int) -> Callable[[], Floats]:
        def make() -> Floats:
            values = gguf.quants.dequantize(found.data, found.tensor_type).astype(np.float32, copy=False)
            return halves_from_pairs(values, heads) if heads else values

        return make

    tensors = []
    for found in reader.tensors:
        heads = {"attn_q": q_heads, "attn_k": kv_heads}.get(found.name.split(".")[-2], 0)
        shape = tuple(int(size) for size in reversed(found.shape))  # GGUF counts the innermost first
        tensors.append((_llama_name(found.name), shape, tensor(found, heads)))
    write_safetensors(into / "model.safetensors", tensors, tell)

    _write_json(
        into / "config.json",
        {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": meta["llama.vocab_size"],
            "hidden_size": meta["llama.embedding_length"],
            "intermediate_size": meta["llama.feed_forward_length"],
            "num_hidden_layers": meta["llama.block_count"],
            "num_attention_heads": q_heads,
            "num_key_value_heads": kv_heads,
            "head_dim": meta["llama.rope.dimension_count"],
            "hidden_act": "silu",
            "max_position_embeddings": meta["llama.context_length"],
            "rope_theta": meta["llama.rope.freq_base"],
            "rms_norm_eps": _short(meta["llama.attention.layer_norm_rms_epsilon"]),
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": "output.weight" not in {found.name for found in reader.tensors},
            "bos_token_id": meta["tokenizer.ggml.bos_token_id"],
            "eos_token_id": meta["tokenizer.ggml.eos_token_id"],
            "pad_token_id": meta["tokenizer.ggml.padding_token_id"],
        },
    )
    _gguf_tokenizer(meta).save(str(into / "tokenizer.json"), pretty=False)


def halves_from_pairs(weight: Floats, heads: int) -> Floats:
    """Rows of each head from GGUF's order 0, h, 1, h + 1, … back to 0, 1, 2, …, with h half the head.

    Book: data-and-licences
    """
    rows, *rest = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, *rest)
    return pairs.swapaxes(1, 2).reshape(weight.shape)


_LLAMA_PARTS = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
_LLAMA_ENDS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}


def _llama_name(name: str) -> str:
    """``blk.3.attn_q.weight`` is published as ``model.layers.3.self_attn.q_proj.weight``."""
    if name in _LLAMA_ENDS:
        return _LLAMA_ENDS[name]
    _, layer, part, kind = name.split(".")
    return f"model.layers.{layer}.{_LLAMA_PARTS[part]}.{kind}"


def _gguf_tokenizer(meta: Mapping[str, Any]) -> Any:
    """Byte-level BPE that takes every digit for itself, as the pre-tokenizer called "smollm" does."""
    from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE

    if meta["tokenizer.ggml.pre"] != "smollm":
        raise BadArchiveError(
            f"the GGUF file asks for the pre-tokenizer {meta['tokenizer.ggml.pre']!r}, expected 'smollm'."
        )
    pieces, control = meta["tokenizer.ggml.tokens"], 3
    merges = [tuple(merge.split(" ")) for merge in meta["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(BPE({piece: i for i, piece in enumerate(pieces)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = meta["tokenizer.ggml.token_type"]
    special = [piece for piece, kind in zip(pieces, kinds, strict=True) if kind == control]
    tokenizer.add_special_tokens([AddedToken(piece, normalized=False, special=True) for piece in special])
    return tokenizer


# What the converters share


def write_safetensors(path: Path, tensors: Sequence[Made], tell: Tell) -> None:
    """Write a safetensors file tensor by tensor, so that no more than one of them is in memory.

    The format is the length of a header in 8 bytes, the header in JSON with each tensor's type, shape and
    place, and the tensors' bytes one behind the other.

    Raises:
        ValueError: a tensor has another shape than was announced.

    Book: data-and-licences
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape, _ in tensors:
        start, end = end, end + 4 * int(np.prod(shape))
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the tensors begin on a multiple of 8
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, shape, make in tensors:
            values = np.ascontiguousarray(make(), dtype="<f4")
            if values.shape != shape:
                raise ValueError(f"{name} has the shape {values.shape}, expected {shape}.")
            file.write(values.data)
            tell(header[name]["data_offsets"][1] / end)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _short(value: float) -> float:
    """The shortest decimal number that float32 stores as this one: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


CONVERTERS: dict[str, Callable[[Path, Path, Tell], None]] = {
    "smollm2": smollm2,
}
"""Every converter by the name that a source gives it."""
