"""Converted weights against what their containers' own libraries read out of them."""

from __future__ import annotations

import json
import math
import shutil
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from onnx_float import float_session
from safetensors import safe_open
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from textbook_code.data import convert
from textbook_code.data.corpora import udhr_articles, udhr_languages
from textbook_code.data.errors import BadArchiveError
from textbook_code.data.sources import fetch
from textbook_code.data.text import chat_prompt, load_tokenizer, news_sentences, shakespeare_text

SCRIPTS = [
    *("eng", "fra", "rus", "arb", "heb", "hin", "ben", "tha", "kor", "jpn", "cmn_hans", "ell_monotonic"),
    *("amh", "kat", "tam", "vie"),
]


def quiet(done: float) -> None:
    """Progress that nobody wants to see."""


@pytest.fixture(scope="module")
def declarations() -> dict[str, str]:
    folder = fetch("udhr")
    return {code: "\n".join(udhr_articles(folder, code)) for code in SCRIPTS}


# The file format


def test_a_written_file_is_read_by_the_library(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    arrays = {
        "a.weight": rng.standard_normal((3, 5), np.float32),
        "b": rng.standard_normal(7).astype(np.float32),
    }
    arrays["c.turned"] = arrays["a.weight"].T  # not contiguous
    told: list[float] = []
    path = tmp_path / "model.safetensors"
    made = [(name, array.shape, lambda array=array: array) for name, array in arrays.items()]
    convert.write_safetensors(path, made, told.append)
    back = load_file(path)
    assert back.keys() == arrays.keys()
    assert all(np.array_equal(back[name], arrays[name]) for name in arrays)
    assert told == sorted(told) and told[-1] == 1.0 and len(told) == 3
    with safe_open(path, "np") as file:
        assert file.metadata() == {"format": "pt"}


def test_a_tensor_of_another_shape_is_refused(tmp_path: Path) -> None:
    made = [("a", (2, 3), lambda: np.zeros((3, 2), np.float32))]
    with pytest.raises(ValueError, match=r"a has the shape \(3, 2\), expected \(2, 3\)"):
        convert.write_safetensors(tmp_path / "x", made, quiet)


# SmolLM2


@pytest.fixture(scope="module")
def smollm2() -> Path:
    return fetch("smollm2")


@pytest.fixture(scope="module")
def packed(smollm2: Path) -> dict[str, np.ndarray]:
    """A few tensors of the GGUF file, dequantised by its library, as they stand there."""
    reader = gguf.GGUFReader(smollm2 / "model.gguf")
    wanted = {"blk.0.attn_v.weight", "blk.29.attn_q.weight", "blk.29.attn_k.weight", "blk.29.ffn_down.weight"}
    wanted |= {"blk.7.attn_norm.weight", "output_norm.weight"}
    chosen = [tensor for tensor in reader.tensors if tensor.name in wanted]
    found = {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in chosen}
    assert found.keys() == wanted
    return found


def test_smollm2_keeps_every_value(smollm2: Path, packed: dict[str, np.ndarray]) -> None:
    with safe_open(smollm2 / "model.safetensors", "np") as file:
        for theirs, ours in {
            "blk.0.attn_v": "layers.0.self_attn.v_proj",
            "blk.29.ffn_down": "layers.29.mlp.down_proj",
            "blk.7.attn_norm": "layers.7.input_layernorm",
            "output_norm": "norm",
        }.items():
            assert np.array_equal(file.get_tensor(f"model.{ours}.weight"), packed[f"{theirs}.weight"])
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118
        assert len(list(file.keys())) == 272
    blocks = packed["blk.29.ffn_down.weight"].reshape(-1, 32)
    assert max(len(set(block)) for block in blocks[:500]) <= 16  # it still stands on its 4-bit grid


def test_rows_put_back_turn_by_halves_as_they_turned_by_pairs(
    smollm2: Path, packed: dict[str, np.ndarray]
) -> None:
    """Scores q·k at two positions, once with GGUF's rows and pairs, once with ours and halves."""
    with safe_open(smollm2 / "model.safetensors", "np") as file:
        ours = {p: file.get_tensor(f"model.layers.29.self_attn.{p}_proj.weight") for p in "qk"}
    x = np.random.default_rng(0).standard_normal((2, 576))
    angles = np.array([[3.0], [11.0]]) * 100_000.0 ** (-np.arange(0, 64, 2) / 64)  # (2, 32)
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]

    def by_pairs(rows: np.ndarray) -> np.ndarray:
        heads = (x @ rows.T).reshape(2, -1, 32, 2)
        even, odd = heads[..., 0], heads[..., 1]
        return np.stack([even * cos - odd * sin, odd * cos + even * sin], -1).reshape(2, -1, 64)

    def by_halves(rows: np.ndarray) -> np.ndarray:
        heads = (x @ rows.T).reshape(2, -1, 2, 32)
        low, high = heads[:, :, 0], heads[:, :, 1]
        return np.concatenate([low * cos - high * sin, high * cos + low * sin], -1)

    def scores(q: np.ndarray, k: np.ndarray) -> np.ndarray:
        return np.einsum("hd,hd->h", q[0], k[1].repeat(3, 0))

    theirs = scores(*(by_pairs(packed[f"blk.29.attn_{p}.weight"]) for p in "qk"))
    mine = scores(*(by_halves(ours[p]) for p in "qk"))
    left_alone = scores(*(by_halves(packed[f"blk.29.attn_{p}.weight"]) for p in "qk"))
    np.testing.assert_allclose(mine, theirs, rtol=1e-10, atol=1e-10)
    assert np.abs(left_alone - theirs).max() > 1  # the test would notice rows left in GGUF's order


def test_smollm2_s_config_is_its_metadata(smollm2: Path) -> None:
    config = json.loads((smollm2 / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    published = {
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3, "vocab_size": 49152, "rope_theta": 1e5, "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True, "max_position_embeddings": 8192, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    assert {key: config[key] for key in published} == published


def test_smollm2_s_tokenizer_loses_nothing_and_splits_digits(
    smollm2: Path, declarations: dict[str, str]
) -> None:
    tokenizer = load_tokenizer(smollm2)
    for text in declarations.values():
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert [t.lstrip("Ġ") for t in tokenizer.encode("in 31415").tokens] == ["in", "", "3", "1", "4", "1", "5"]
    prompt = chat_prompt([{"role": "user", "content": "Hi"}])
    ids = tokenizer.encode(prompt).ids
    assert ids.count(1) == 3 and ids.count(2) == 2  # every mark is one token
    assert tokenizer.decode(ids, skip_special_tokens=False) == prompt


@pytest.mark.slow
def test_smollm2_is_what_transformers_reads_from_the_same_file(
    smollm2: Path, declarations: dict[str, str]
) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    config = AutoConfig.from_pretrained(smollm2, gguf_file="model.gguf")
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config)
    theirs = load_gguf_checkpoint(str(smollm2 / "model.gguf"), return_tensors=True, model_to_load=empty)
    with safe_open(smollm2 / "model.safetensors", "pt") as file:
        assert set(theirs["tensors"]) == set(file.keys())
        for name, tensor in theirs["tensors"].items():
            assert torch.equal(torch.as_tensor(tensor), file.get_tensor(name)), name
    ours = AutoConfig.from_pretrained(smollm2)
    for key in ("rope_parameters", "num_key_value_heads", "head_dim", "tie_word_embeddings"):
        assert getattr(ours, key) == getattr(config, key)

    tokenizer, reference = (
        load_tokenizer(smollm2),
        AutoTokenizer.from_pretrained(smollm2, gguf_file="model.gguf"),
    )
    chat = [{"role": "user", "content": "Why is the sky blue in 2024?"}]
    longer = [
        {"role": "system", "content": "Be brief."},
        *chat,
        {"role": "assistant", "content": "It scatters."},
    ]
    for messages in (chat, longer, longer[:2]):
        for answer in (True, False):
            theirs = reference.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer)
            assert chat_prompt(messages, answer=answer) == theirs
    prompt = chat_prompt(longer)
    texts = [*declarations.values(), prompt, shakespeare_text(fetch("shakespeare"), "hamlet")]
    for text in texts:
        assert tokenizer.encode(text).ids == reference(text)["input_ids"]


def test_a_gguf_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "bert")
    writer.add_tokenizer_model("bert")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(BadArchiveError, match="holds no LLaMA"):
        convert.smollm2(tmp_path, tmp_path, quiet)


# The tagger


def test_the_tagger_is_what_its_graph_computes_before_it_rounds(tmp_path: Path) -> None:
    """Real sentences through onnxruntime and through the converted weights: the same logits and tags."""
    import onnxruntime
    from transformers import DistilBertForTokenClassification

    folder = fetch("distilbert-tagger")
    exact, rounded = float_session(folder / "model.onnx"), onnxruntime.InferenceSession(folder / "model.onnx")
    model = DistilBertForTokenClassification.from_pretrained(folder).eval()
    tokenizer = load_tokenizer(folder)
    tags = json.loads((folder / "labels.json").read_text())["tags"]
    furthest = 0.0
    for text in ["He have a dog.", *news_sentences(fetch("bbc-news"), 8)]:
        ids = np.array([tokenizer.encode(text).ids])
        given = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
        with torch.no_grad():
            ours = model(torch.from_numpy(ids)).logits.numpy()
        theirs = exact.run(None, given)[0]
        np.testing.assert_allclose(ours, theirs, atol=1e-4)  # logits of up to 20
        assert (ours.argmax(-1) == theirs.argmax(-1)).all()
        furthest = max(furthest, float(np.abs(rounded.run(None, given)[0] - theirs).max()))
        if text.startswith("He have"):
            tag = int(ours[0, 2].argmax())
            assert tags[tag] == "$REPLACE_has" == model.config.id2label[tag]
    assert furthest > 1  # the graph as it is: its rounding is what the bridges take away


def test_labels_that_do_not_fit_the_tagger_are_refused(tmp_path: Path) -> None:
    folder = fetch("distilbert-tagger")
    (tmp_path / "model.onnx").symlink_to(folder / "model.onnx")
    (tmp_path / "labels.json").write_text('{"tags": ["$KEEP"]}')
    with pytest.raises(BadArchiveError, match="names 1 tags, expected 213"):
        convert.distilbert_tagger(tmp_path, tmp_path, quiet)


def test_a_graph_of_another_kind_is_refused(tmp_path: Path) -> None:
    import onnx

    graph = onnx.helper.make_graph([], "empty", [], [])
    onnx.save(onnx.helper.make_model(graph), tmp_path / "model.onnx")
    (tmp_path / "labels.json").write_text('{"tags": []}')
    with pytest.raises(BadArchiveError, match=r"holds no DistilBERT: it lacks 'distilbert\.embeddings"):
        convert.distilbert_tagger(tmp_path, tmp_path, quiet)


# multilingual-e5


@pytest.fixture(scope="module")
def e5() -> Path:
    return fetch("e5-multilingual")


def test_q4_0_is_the_library_s() -> None:
    packed = np.random.default_rng(0).integers(0, 256, (5, 4 * 18), np.uint8)
    packed.reshape(-1, 18)[:, 1] &= 0x3B  # scales that are neither infinite nor nan
    theirs = gguf.quants.dequantize(packed, gguf.GGMLQuantizationType.Q4_0)
    assert np.array_equal(convert.q4_0(packed.reshape(-1)), theirs.reshape(-1))


def test_e5_s_tensors_are_at_the_file_s_places(e5: Path) -> None:
    """Found again in the raw file by their bytes, without its directory."""
    data = (e5 / "model.bin").read_bytes()
    with safe_open(e5 / "model.safetensors", "np") as file:
        bias = file.get_tensor("encoder.layer.11.output.LayerNorm.bias")
        word = file.get_slice("embeddings.word_embeddings.weight")
        assert word.get_shape() == [250037, 384]
        key = file.get_tensor("encoder.layer.3.attention.self.key.weight")
        key_bias = file.get_tensor("encoder.layer.3.attention.self.key.bias")
    assert data.endswith(bias.tobytes())  # the last tensor of the directory
    at = data.index(key_bias.tobytes())
    raw = np.frombuffer(data[:at][-384 * 384 // 32 * 18 :], np.uint8).reshape(1, -1)
    found = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType.Q4_0)
    assert np.array_equal(key, found.reshape(384, 384))


@pytest.mark.slow
def test_e5_finds_an_article_s_translation(e5: Path) -> None:
    """The 30 articles in French, each looked for among the 30 in English."""
    from transformers import BertModel

    model, loaded = BertModel.from_pretrained(e5, add_pooling_layer=False, output_loading_info=True)
    assert not any(loaded.values())
    tokenizer = load_tokenizer(e5)
    folder = fetch("udhr")

    def embedded(code: str) -> torch.Tensor:
        rows = []
        for article in udhr_articles(folder, code):
            ids = torch.tensor([tokenizer.encode(f"query: {article[:120]}").ids])
            with torch.no_grad():
                rows.append(model(ids).last_hidden_state.mean(1)[0])
        return torch.nn.functional.normalize(torch.stack(rows), dim=-1)

    best = (embedded("fra") @ embedded("eng").T).argmax(1)
    assert (best == torch.arange(30)).float().mean() > 0.9


def likeliest(text: str, scores: dict[str, float]) -> list[str]:
    """Viterbi by hand: the split of ``text`` into pieces with the greatest sum of scores."""
    best: list[tuple[float, int]] = [(0.0, 0)]
    for end in range(1, len(text) + 1):
        starts = range(max(0, end - 20), end)
        best.append(max((best[s][0] + scores.get(text[s:end], -math.inf), s) for s in starts))
    pieces, end = [], len(text)
    while end:
        start = best[end][1]
        pieces.append(text[start:end])
        end = start
    return pieces[::-1]


def test_e5_s_tokenizer_takes_the_likeliest_pieces(e5: Path, declarations: dict[str, str]) -> None:
    tokenizer = load_tokenizer(e5)
    model = json.loads((e5 / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    scores = dict(model["vocab"][4:])
    compared = 0
    for code in ("eng", "fra", "rus", "hin", "cmn_hans", "kor"):
        for word in tokenizer.normalizer.normalize_str(declarations[code][:800]).split():
            encoding = tokenizer.encode(word, add_special_tokens=False)
            if 3 in encoding.ids:  # no piece fits: not a matter of scores
                continue
            mine = likeliest(f"▁{word}", scores)
            total = sum(scores[piece] for piece in encoding.tokens)
            assert "".join(encoding.tokens) == f"▁{word}"
            assert sum(scores[piece] for piece in mine) == pytest.approx(total, abs=1e-3)
            compared += 1
    assert compared > 300


def test_e5_s_normalisation_and_special_tokens(e5: Path) -> None:
    tokenizer = load_tokenizer(e5)
    assert tokenizer.encode("a").ids[0] == 0 and tokenizer.encode("a").ids[-1] == 2
    assert tokenizer.encode("a", "b").tokens == ["<s>", "▁a", "</s>", "</s>", "▁b", "</s>"]
    assert tokenizer.encode("<mask> <pad>", add_special_tokens=False).ids == [250001, 1]
    same = [("ﬁne  day\n", "fine day"), ("e\u0301t\u00e9", "été"), ("a\u200bb", "a b"), ("a\x07b", "ab")]
    for one, other in same:
        assert tokenizer.encode(one).ids == tokenizer.encode(other).ids
    assert tokenizer.normalizer.normalize_str("～ＡＢＣ") == "～ABC"  # the wide tilde stays, wide letters go


@pytest.mark.parametrize("damage", ["magic", "short", "table"])
def test_a_file_that_is_not_e5_is_refused(damage: str, e5: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    if damage == "magic":
        path.write_bytes(b"GGUF" + bytes(100))
        message = "begins with b'GGUF'"
    elif damage == "short":
        path.write_bytes((e5 / "model.bin").read_bytes()[:5000])
        message = "the file ends after 5000 bytes"
    else:
        shutil.copy(e5 / "model.bin", path)
        with path.open("r+b") as file:
            file.seek(44)
            count = struct.unpack("<5iQ", file.read(28))
            file.seek(44 + 28 + 4 * (2 * count[0] + 1) + count[5] + 8)
            file.write(struct.pack("<I", ord("x")))  # the first entry: now it normalises x to nothing
        message = "normalises 'x' to '', which we do not"
    with pytest.raises(BadArchiveError, match=message):
        convert.e5_multilingual(tmp_path, tmp_path, quiet)


# GPT-2's vocabulary


def test_gpt2_s_tokenizer_is_its_two_files(declarations: dict[str, str]) -> None:
    folder = fetch("gpt2-bpe")
    tokenizer = load_tokenizer(folder)
    assert tokenizer.get_vocab() == json.loads((folder / "encoder.json").read_text(encoding="utf-8"))
    assert tokenizer.get_vocab_size() == 50257
    assert tokenizer.encode("Hello world<|endoftext|>").ids == [15496, 995, 50256]
    for text in declarations.values():
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_every_converter_is_used_and_every_use_exists() -> None:
    from textbook_code.data.sources import SOURCES

    used = {source.conversion.converter for source in SOURCES.values() if source.conversion}
    assert used == convert.CONVERTERS.keys()


def test_all_languages_survive_both_byte_level_vocabularies(smollm2: Path) -> None:
    """The first article of every fourth version."""
    folder = fetch("udhr")
    tokenizers: list[Tokenizer] = [load_tokenizer(smollm2), load_tokenizer(fetch("gpt2-bpe"))]
    texts = [udhr_articles(folder, lang.code)[0] for lang in udhr_languages(folder)[::4]]
    for tokenizer in tokenizers:
        for text, encoding in zip(texts, tokenizer.encode_batch(texts), strict=True):
            assert tokenizer.decode(encoding.ids) == text
