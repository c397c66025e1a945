"""Renaming is all or nothing, files are whole or refused, and a model goes to a folder and back."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import huggingface_hub
import pytest
import torch
import transformers
from parity import loud_
from references import bert_config
from torch import Tensor

from textbook_code.models.text.bert import (
    Bert,
    BertConfig,
    BertForMaskedLM,
    BertForPreTraining,
    BertForSequenceClassification,
    BertForTokenClassification,
)
from textbook_code.weights import Packed, WeightError, invert, load_safetensors, rename, save_safetensors

RULES = (
    ("enc.layer.{i}.lin.{p}", "blocks.{i}.fc.{p}"),
    ("enc.norm.weight", "norm.weight"),
    ("enc.norm.gamma", "norm.weight"),
    ("enc.norm.bias", "norm.bias"),
    ("enc.ids", None),
)
OURS = {
    "blocks.0.fc.weight": torch.zeros(2, 3),
    "blocks.11.fc.bias": torch.zeros(5),
    "norm.weight": torch.zeros(7),
}
THEIRS = {
    "enc.layer.0.lin.weight": torch.ones(2, 3),
    "enc.layer.11.lin.bias": torch.ones(5),
    "enc.norm.weight": torch.ones(7),
}


# ------------------------------------------------------------------------------------------------
# rename


def test_rename_gives_exactly_what_is_expected():
    renamed = rename({**THEIRS, "enc.ids": torch.arange(9)}, RULES, expected=OURS)
    assert renamed.keys() == OURS.keys()
    assert all(bool((tensor == 1).all()) for tensor in renamed.values())
    assert renamed["norm.weight"] is THEIRS["enc.norm.weight"]
    back = invert(renamed, RULES)
    assert back.keys() == THEIRS.keys() and all(back[key] is THEIRS[key] for key in back)


def without(key: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in THEIRS.items() if name != key}


@pytest.mark.parametrize(
    ("theirs", "message"),
    [
        ({**THEIRS, "enc.extra": torch.zeros(1)}, r"enc\.extra: no rule names it"),
        ({**THEIRS, "xenc.norm.weight": torch.zeros(7)}, r"xenc\.norm\.weight: no rule names it"),
        ({**THEIRS, "enc.norm.weight.x": torch.zeros(7)}, r"enc\.norm\.weight\.x: no rule names it"),
        ({**THEIRS, "enc.layer.x.lin.bias": torch.zeros(5)}, r"enc\.layer\.x\.lin\.bias: no rule names it"),
        ({**THEIRS, "encXnorm.weight": torch.zeros(7)}, r"encXnorm\.weight: no rule names it"),
        ({**THEIRS, "enc.norm.bias": torch.zeros(7)}, r"enc\.norm\.bias: the model has no norm\.bias"),
        ({**THEIRS, "enc.layer.1.lin.bias": torch.zeros(5)}, r"the model has no blocks\.1\.fc\.bias"),
        ({**THEIRS, "enc.norm.gamma": torch.zeros(7)}, r"enc\.norm\.gamma: a second tensor for norm\.weight"),
        (without("enc.norm.weight"), r"norm\.weight: no tensor for it"),
        ({}, r"3 of its tensors do not fit"),
        (
            {**THEIRS, "enc.layer.0.lin.weight": torch.zeros(3, 2)},
            r"enc\.layer\.0\.lin\.weight: expected shape \(2, 3\) for blocks\.0\.fc\.weight, got \(3, 2\)",
        ),
    ],
)
def test_rename_is_all_or_nothing(theirs, message):
    with pytest.raises(WeightError, match=message):
        rename(theirs, RULES, expected=OURS)


def test_rename_says_all_that_is_wrong_at_once():
    theirs = {**without("enc.norm.weight"), "enc.extra": torch.zeros(1), "enc.more": torch.zeros(1)}
    with pytest.raises(WeightError) as caught:
        rename(theirs, RULES, expected=OURS)
    for name in ("enc.extra", "enc.more", "norm.weight", "3 of its tensors"):
        assert name in str(caught.value)
    many = {**THEIRS, **{f"other.{i}": torch.zeros(1) for i in range(500)}}
    with pytest.raises(WeightError, match=r"and 480 more") as caught:
        rename(many, RULES, expected=OURS)
    assert len(str(caught.value).splitlines()) < 30


def test_tied_tensors_must_be_equal_and_are_dropped():
    tied = {"head.weight": "enc.norm.weight"}
    renamed = rename({**THEIRS, "head.weight": torch.ones(7)}, RULES, expected=OURS, tied=tied)
    assert renamed.keys() == OURS.keys()
    with pytest.raises(WeightError, match=r"head\.weight: expected it to equal enc\.norm\.weight"):
        rename({**THEIRS, "head.weight": torch.zeros(7)}, RULES, expected=OURS, tied=tied)


def test_invert_loses_nothing():
    with pytest.raises(WeightError, match=r"surplus\.weight: no rule leads to it"):
        invert({**OURS, "surplus.weight": torch.zeros(1)}, RULES)


# ------------------------------------------------------------------------------------------------
# Packed


QKV = ("b.{i}.q.{p}", "b.{i}.k.{p}", "b.{i}.v.{p}")
PACKED = (
    Packed("h.{i}.qkv.{p}", QKV, transposed=True),
    Packed("h.{i}.out.{p}", ("b.{i}.o.{p}",), transposed=True),
    Packed("h.{i}.stack", ("b.{i}.one", "b.{i}.two")),
)


def packed_pair() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Ours, with parts of unequal height (as with shared key heads), and theirs."""
    ours = {
        "b.3.q.weight": torch.randn(6, 5),
        "b.3.k.weight": torch.randn(2, 5),
        "b.3.v.weight": torch.randn(2, 5),
        "b.3.q.bias": torch.randn(6),
        "b.3.k.bias": torch.randn(2),
        "b.3.v.bias": torch.randn(2),
        "b.3.o.weight": torch.randn(5, 6),
        "b.3.one": torch.randn(3, 4, 2),
        "b.3.two": torch.randn(1, 4, 2),
    }
    theirs = {
        "h.3.qkv.weight": torch.cat([ours[f"b.3.{n}.weight"].T for n in "qkv"], dim=1),
        "h.3.qkv.bias": torch.cat([ours[f"b.3.{n}.bias"] for n in "qkv"]),
        "h.3.out.weight": ours["b.3.o.weight"].T,
        "h.3.stack": torch.cat([ours["b.3.one"], ours["b.3.two"]]),
    }
    return ours, theirs


def test_a_packed_tensor_is_cut_and_put_together_again_bit_for_bit():
    ours, theirs = packed_pair()
    renamed = rename(theirs, PACKED, expected={name: torch.empty_like(x) for name, x in ours.items()})
    assert renamed.keys() == ours.keys() and all(torch.equal(renamed[name], ours[name]) for name in ours)
    back = invert(ours, PACKED)
    assert back.keys() == theirs.keys() and all(torch.equal(back[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("h.3.qkv.weight", torch.zeros(10, 5), r"expected shape \(5, 10\) for .*q.*k.*v.*, got \(10, 5\)"),
        ("h.3.qkv.bias", torch.zeros(9), r"h\.3\.qkv\.bias: expected shape \(10,\) for"),
        ("h.3.out.weight", torch.zeros(5, 6), r"h\.3\.out\.weight: expected shape \(6, 5\)"),
        ("h.3.stack", torch.zeros(4, 2, 4), r"h\.3\.stack: expected shape \(4, 4, 2\)"),
        ("h.4.stack", torch.zeros(4, 4, 2), r"the model has no b\.4\.one\n.*the model has no b\.4\.two"),
        ("h.3.qkv.weight", None, r"b\.3\.k\.weight: no tensor for it"),
    ],
)
def test_a_packed_tensor_that_does_not_fit_is_named(name, value, message):
    ours, theirs = packed_pair()
    theirs = {key: x for key, x in theirs.items() if key != name} | ({} if value is None else {name: value})
    with pytest.raises(WeightError, match=message):
        rename(theirs, PACKED, expected=ours)


def test_a_part_that_is_missing_is_named_on_the_way_back():
    ours, _ = packed_pair()
    del ours["b.3.k.weight"]
    with pytest.raises(WeightError, match=r"b\.3\.q\.weight: expected b\.3\.k\.weight beside it"):
        invert(ours, PACKED)


# ------------------------------------------------------------------------------------------------
# Files


def test_a_file_comes_back_bit_for_bit(tmp_path):
    state = {
        "a": torch.randn(3, 5),
        "b": torch.randn(7, 2).T,
        "c": torch.arange(4),
        "d": torch.ones(2).half(),
    }
    save_safetensors(state, tmp_path / "model.safetensors")
    back = load_safetensors(tmp_path / "model.safetensors")
    assert back.keys() == state.keys()
    assert all(torch.equal(back[k], state[k]) and back[k].dtype == state[k].dtype for k in state)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize(
    "damage", ["cut short", "cut in the header", "empty", "text", "header", "one byte less"]
)
def test_a_damaged_file_is_refused_by_name(tmp_path, damage):
    path = tmp_path / "model.safetensors"
    save_safetensors({"a": torch.randn(30, 50)}, path)
    whole = path.read_bytes()
    path.write_bytes(
        {
            "cut short": whole[: len(whole) // 2],
            "cut in the header": whole[:20],
            "empty": b"",
            "text": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 90868376\n",
            "header": whole[:8] + b"\xff" * 40 + whole[48:],
            "one byte less": whole[:-1],
        }[damage]
    )
    with pytest.raises(
        WeightError, match=r"model\.safetensors: not a whole safetensors file \([\d,]+ bytes; "
    ):
        load_safetensors(path)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"path: expected a safetensors file, found none at .*gone"):
        load_safetensors(tmp_path / "gone.safetensors")
    with pytest.raises(FileNotFoundError, match="found none at"):
        load_safetensors(tmp_path)


def test_a_save_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    save_safetensors({"a": torch.zeros(3)}, path)
    before = path.read_bytes()

    def full(tensors, filename, metadata):
        Path(filename).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        save_safetensors({"a": torch.ones(3)}, path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


# ------------------------------------------------------------------------------------------------
# A model in a folder


def tiny(kind: type = Bert, **kwargs: object) -> Bert:
    config = BertConfig(
        vocab_size=97, d_model=35, num_layers=3, num_heads=5, d_ff=53, max_seq_len=41, num_segments=3,
        norm_eps=1e-2, dropout=0.07, attn_dropout=0.03,
    )  # fmt: skip
    return loud_(kind(config, **kwargs)).eval()


TOKENS = torch.tensor([[1, 5, 96, 2], [3, 3, 0, 0]])
MODELS = [
    Bert,
    BertForMaskedLM,
    BertForPreTraining,
    BertForSequenceClassification,
    BertForTokenClassification,
]


def outputs(model: torch.nn.Module) -> tuple[Tensor, ...]:
    out = model(TOKENS)
    return out if isinstance(out, tuple) else (out,)


@pytest.mark.parametrize("kind", MODELS)
def test_a_folder_and_back(tmp_path, kind):
    model = tiny(kind, **({"num_classes": 7} if "Classification" in kind.__name__ else {}))
    folder = tmp_path / "deep" / "down"
    assert model.save_pretrained(folder) == folder
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]
    again = kind.from_pretrained(str(folder))
    assert again.config == model.config and not again.training
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(outputs(again), outputs(model), strict=True))


@pytest.mark.parametrize("kind", MODELS)
def test_the_reference_reads_what_we_write(tmp_path, kind):
    extra = {"num_classes": 7} if "Classification" in kind.__name__ else {}
    model = tiny(kind, **extra)
    model.save_pretrained(tmp_path)
    reference, info = getattr(transformers, kind.hf_architecture).from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not any(info.values()), info
    config = reference.config
    assert (config.layer_norm_eps, config.type_vocab_size, config.hidden_dropout_prob) == (1e-2, 3, 0.07)
    assert config.attention_probs_dropout_prob == 0.03
    if extra:
        assert config.num_labels == 7
    theirs = reference.eval()(TOKENS)
    theirs = [theirs.last_hidden_state] if kind is Bert else list(theirs.values())
    for ours, expected in zip(outputs(model), theirs, strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", MODELS)
def test_we_read_what_the_reference_writes(tmp_path, kind):
    extra = {"num_labels": 7} if "Classification" in kind.__name__ else {}
    reference = loud_(getattr(transformers, kind.hf_architecture)(bert_config(**extra))).eval()
    reference.save_pretrained(tmp_path)
    ours, direct = kind.from_pretrained(tmp_path), kind.from_hf(reference)
    assert ours.config == direct.config
    assert all(torch.equal(a, b) for a, b in zip(outputs(ours), outputs(direct), strict=True))


def test_shards_are_read_together(tmp_path):
    reference = loud_(transformers.BertModel(bert_config()))
    reference.save_pretrained(tmp_path, max_shard_size="40KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 2
    ours = Bert.from_pretrained(tmp_path)
    assert all(
        torch.equal(a, b) for a, b in zip(outputs(ours), outputs(Bert.from_hf(reference)), strict=True)
    )
    shards[1].unlink()
    with pytest.raises(FileNotFoundError, match=re.escape(shards[1].name)):
        Bert.from_pretrained(tmp_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_weights_keep_their_dtype(tmp_path, dtype):
    reference = loud_(transformers.BertModel(bert_config())).to(dtype)
    reference.save_pretrained(tmp_path)
    for ours in (Bert.from_hf(reference), Bert.from_pretrained(tmp_path)):
        assert {p.dtype for p in ours.parameters()} == {dtype}
        state = reference.state_dict()
        assert all(torch.equal(tensor, state[key]) for key, tensor in ours.to_hf_state_dict().items())


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if value != "DROP"}))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"model_type": "roberta"}, WeightError, r"config: Bert needs model_type = 'bert', got 'roberta'"),
        ({"hidden_act": "gelu_new"}, WeightError, r"config: Bert needs hidden_act = 'gelu', got 'gelu_new'"),
        (
            {"position_embedding_type": "relative_key"},
            WeightError,
            r"position_embedding_type = 'absolute', got",
        ),
        ({"is_decoder": True}, WeightError, r"config: Bert needs is_decoder = False, got True"),
        ({"hidden_size": "DROP"}, WeightError, r"config: Bert needs the fields \['hidden_size'\]"),
        ({"num_hidden_layers": 4}, WeightError, r"blocks\.3\.attn\.q_proj\.weight: no tensor for it"),
        ({"num_hidden_layers": 2}, WeightError, r"encoder\.layer\.2\..*: the model has no blocks\.2\."),
        (
            {"intermediate_size": 54},
            WeightError,
            r"expected shape \(54, 35\) for blocks\.0\.ffn\.fc1\.weight, got",
        ),
        (
            {"num_attention_heads": 4},
            ValueError,
            r"num_heads: expected a positive divisor of d_model = 35, got 4",
        ),
    ],
)
def test_a_config_that_does_not_fit(tmp_path, changes, error, message):
    tiny().save_pretrained(tmp_path)
    edit_config(tmp_path, **changes)
    with pytest.raises(error, match=message):
        Bert.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("saved", "read"),
    [
        (Bert, BertForMaskedLM),
        (BertForMaskedLM, Bert),
        (BertForMaskedLM, BertForPreTraining),
        (BertForSequenceClassification, BertForTokenClassification),
        (BertForTokenClassification, BertForSequenceClassification),
    ],
)
def test_a_checkpoint_with_another_head_is_refused(tmp_path, saved, read):
    tiny(saved).save_pretrained(tmp_path)
    wants = f"{read.__name__} reads a {read.hf_architecture}, config.json names {saved.hf_architecture};"
    with pytest.raises(WeightError, match=wants):
        read.from_pretrained(tmp_path)


def test_a_model_of_another_architecture_is_refused():
    roberta = transformers.RobertaModel(transformers.RobertaConfig(hidden_size=24, num_hidden_layers=1))
    with pytest.raises(WeightError, match=r"config: Bert needs model_type = 'bert', got 'roberta'"):
        Bert.from_hf(roberta)
    untied = loud_(transformers.BertForMaskedLM(bert_config(tie_word_embeddings=False)))
    with pytest.raises(WeightError, match=r"cls\.predictions\.decoder\.weight: expected it to equal"):
        BertForMaskedLM.from_hf(untied)


def test_damaged_folders(tmp_path):
    tiny().save_pretrained(tmp_path)
    weights, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1000])
    with pytest.raises(WeightError, match=r"model\.safetensors: not a whole safetensors file"):
        Bert.from_pretrained(tmp_path)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors"):
        Bert.from_pretrained(tmp_path)
    weights.write_bytes(whole)
    config.write_text(config.read_text()[:-20])
    with pytest.raises(WeightError, match=r"config\.json: not readable as JSON"):
        Bert.from_pretrained(tmp_path)
    config.write_text("[]")
    with pytest.raises(WeightError, match=r"config\.json: expected a JSON object, got list"):
        Bert.from_pretrained(tmp_path)
    config.unlink()
    with pytest.raises(FileNotFoundError, match=r"path_or_name: expected config\.json in "):
        Bert.from_pretrained(tmp_path)


def test_a_failed_save_leaves_the_old_folder(tmp_path, monkeypatch):
    model = tiny()
    model.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    other = loud_(tiny(), seed=5)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError, match="No space"):
        other.save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.fixture
def no_hub(monkeypatch):
    asked = []

    def refuse(name, **kwargs):
        asked.append((name, kwargs))
        raise huggingface_hub.errors.LocalEntryNotFoundError("no network here")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    return asked


@pytest.mark.parametrize("name", ["minilmm", "nobody/nothing", "bert-base-uncased"])
def test_an_unknown_pretrained_name(name, no_hub):
    with pytest.raises(FileNotFoundError) as caught:
        Bert.from_pretrained(name, revision="abc")
    message = str(caught.value)
    assert message.startswith(f"path_or_name: {name!r} is neither a folder nor a source (")
    assert "minilm" in message and "and the Hub failed (LocalEntryNotFoundError: no network here)" in message
    ((asked, kwargs),) = no_hub
    assert asked == name and kwargs["revision"] == "abc"
    assert not any(pattern.endswith((".bin", ".pt", ".pkl", "*")) for pattern in kwargs["allow_patterns"])


@pytest.mark.parametrize("name", ["./gone", "/gone/model", "a/b/c", Path("gone"), "~/gone"])
def test_a_folder_that_is_not_there_is_not_asked_of_the_hub(name, no_hub):
    with pytest.raises(
        FileNotFoundError, match=r"path_or_name: .*is neither a folder nor a source \(.*minilm"
    ):
        Bert.from_pretrained(name)
    assert no_hub == []


def test_the_hub_gives_a_folder(tmp_path, monkeypatch):
    model = tiny()
    model.save_pretrained(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **kwargs: os.fspath(tmp_path))
    again = Bert.from_pretrained("owner/model")
    assert all(torch.equal(a, b) for a, b in zip(outputs(again), outputs(model), strict=True))


def test_a_pre_training_checkpoint_serves_its_parts(tmp_path):
    """As BERT was released: both heads in one file, and in the oldest, norms called gamma and beta."""
    whole = tiny(BertForPreTraining)
    whole.save_pretrained(tmp_path)
    encoder, words = Bert.from_pretrained(tmp_path), BertForMaskedLM.from_pretrained(tmp_path)
    hidden = whole.bert(TOKENS)
    assert torch.equal(encoder(TOKENS), hidden) and torch.equal(encoder.pool(hidden), whole.bert.pool(hidden))
    assert torch.equal(words(TOKENS), whole(TOKENS)[0])

    state = load_safetensors(tmp_path / "model.safetensors")
    greek = {
        key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for key, tensor in state.items()
    }
    assert greek.keys() != state.keys()
    save_safetensors(greek, tmp_path / "model.safetensors")
    for kind, expected in [(BertForPreTraining, whole), (Bert, encoder), (BertForMaskedLM, words)]:
        pairs = zip(outputs(kind.from_pretrained(tmp_path)), outputs(expected), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
