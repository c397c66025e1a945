"""The models that come with the package: as the manifest says, loadable, and as good as was measured."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path

import pytest
import torch

from textbook_code import checkpoints, recorded
from textbook_code.checkpoints import MAX_BYTES, CheckpointFileError
from textbook_code.models.text.bert import BertConfig, BertForMaskedLM
from textbook_code.pretrained import Pretrained
from textbook_code.recorded import RecordError

NAMES = checkpoints.names()
CONFIG = BertConfig(vocab_size=61, d_model=12, num_layers=2, num_heads=3, d_ff=17, max_seq_len=19)


def class_of(name: str) -> type[Pretrained]:
    """The class that the manifest names, looked for in the files of the models."""
    wanted = checkpoints.manifest()[name]["class"]
    for room in ("text", "vision"):
        folder = Path(import_module(f"textbook_code.models.{room}").__file__).parent
        for path in sorted(folder.glob("*.py")):
            module = import_module(f"textbook_code.models.{room}.{path.stem}")
            if wanted in vars(module):
                return vars(module)[wanted]
    raise AssertionError(f"no model class {wanted}")


# ------------------------------------------------------------------ those of the package


def test_what_is_there_is_what_the_manifest_names() -> None:
    home = Path(checkpoints.__file__).parent
    folders = {path.name for path in home.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders == set(NAMES)
    total = sum(file.stat().st_size for name in NAMES for file in (home / name).iterdir())
    assert total <= 25_000_000


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_is_as_the_manifest_says(name: str) -> None:
    checkpoints.verify(name)
    entry = checkpoints.manifest()[name]
    weights = checkpoints.path(name) / "model.safetensors"
    assert entry["bytes"] == weights.stat().st_size <= MAX_BYTES
    assert entry["sha256"] == entry["files"]["model.safetensors"]
    kept = recorded.load(entry["experiment"])
    arm = kept.runs[entry["arm"]]
    assert entry["value"] == arm[entry["metric"]]
    wanted = recorded.experiment(entry["experiment"]).CHECKPOINT
    assert (wanted["name"], wanted["arm"], wanted["metric"]) == (name, entry["arm"], entry["metric"])
    assert entry["interval"] == (arm[wanted["interval"]] if "interval" in wanted else None)


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_loads_and_is_as_good_as_it_was(name: str) -> None:
    model = class_of(name).from_pretrained(name)
    assert {p.dtype for p in model.parameters()} == {torch.float16}
    entry = checkpoints.manifest()[name]
    module = recorded.experiment(entry["experiment"])
    assert hasattr(module, "sample") == (entry["sample"] is not None)
    if entry["sample"] is not None:
        # half precision moves a weight by 5e-4 of itself, and a mean loss by less than that
        assert module.sample(module.CONFIG, model.float()) == pytest.approx(entry["sample"], rel=2e-3)


# ------------------------------------------------------------------ keeping one


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder in place of the package's."""
    monkeypatch.setattr(checkpoints, "_HOME", tmp_path / "kept")
    (tmp_path / "kept").mkdir()
    return tmp_path / "kept"


def small() -> BertForMaskedLM:
    torch.manual_seed(0)
    return BertForMaskedLM(CONFIG).eval()


FROM = {"experiment": "toy", "arm": "seed-0", "seed": 0, "metric": "loss", "value": 1.5}


def test_a_model_is_kept_in_half_precision_and_found_by_its_name(home: Path) -> None:
    from tokenizers import Tokenizer, models

    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="b"))
    folder = checkpoints.save(
        small(), "bert-toy", **FROM, interval=[1.4, 1.6], sample=0.5, tokenizer=tokenizer
    )
    assert folder == checkpoints.path("bert-toy") == home / "bert-toy"
    assert {path.name for path in home.iterdir()} == {"bert-toy", "manifest.json"}
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors", "tokenizer.json"}
    entry = checkpoints.manifest()["bert-toy"]
    assert FROM.items() <= entry.items()
    assert all(file.stat().st_mode & 0o044 == 0o044 for file in folder.iterdir()), "everybody may read it"
    assert (entry["class"], entry["interval"], entry["sample"]) == ("BertForMaskedLM", [1.4, 1.6], 0.5)
    checkpoints.verify("bert-toy")

    again = BertForMaskedLM.from_pretrained("bert-toy")
    tokens = torch.randint(61, (2, 9))
    expected = small().half().float()  # rounded, then computed in full precision
    assert torch.equal(again.float()(tokens), expected(tokens))
    assert not torch.equal(again(tokens), small()(tokens))
    assert Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab() == {"a": 0, "b": 1}

    checkpoints.save(small(), "bert-toy", **(FROM | {"value": 2.5}))
    assert checkpoints.manifest()["bert-toy"]["value"] == 2.5
    assert "tokenizer.json" not in checkpoints.manifest()["bert-toy"]["files"]


def test_what_is_too_large_or_not_finite_is_refused(home: Path) -> None:
    large = BertForMaskedLM(BertConfig(vocab_size=5200, d_model=96, num_layers=1, num_heads=3, d_ff=17))
    with pytest.raises(CheckpointFileError, match=r"expected at most 1,000,000 bytes in half .*got 1,\d"):
        checkpoints.save(large, "large", **FROM)
    broken = small()
    broken.bert.token_embed.weight.data[3, 4] = 1e5  # more than half precision holds
    with pytest.raises(CheckpointFileError, match=r"word_embeddings.weight is not finite in half precision"):
        checkpoints.save(broken, "broken", **FROM)
    with pytest.raises(CheckpointFileError, match=r"name: expected lower-case letters.*got '../up'"):
        checkpoints.save(small(), "../up", **FROM)
    assert list(home.iterdir()) == []


def test_a_changed_file_is_seen(home: Path) -> None:
    folder = checkpoints.save(small(), "bert-toy", **FROM)
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(data)
    with pytest.raises(
        CheckpointFileError, match=r"bert-toy: model.safetensors is not the file of the manifest"
    ):
        checkpoints.verify("bert-toy")
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointFileError, match=r"bert-toy: holds \['config.json'\], the manifest names"):
        checkpoints.verify("bert-toy")


def test_a_name_that_is_unknown_is_told_those_there_are(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match=r"got 'bert-toi', expected a checkpoint .*: there is none"):
        checkpoints.path("bert-toi")
    checkpoints.save(small(), "bert-toy", **FROM)
    with pytest.raises(FileNotFoundError, match="expected a checkpoint of this package: bert-toy"):
        checkpoints.path("bert-toi")
    with pytest.raises(
        FileNotFoundError, match=r"neither a folder nor a source .*nor a checkpoint .*bert-toy"
    ):
        BertForMaskedLM.from_pretrained("./bert-toi")


# ------------------------------------------------------------------ from an experiment

TOY = """
import torch
from textbook_code.models.text.bert import BertConfig, BertForMaskedLM

ABOUT = "A model is drawn."
CONFIG = {"seeds": [0, 1], "steps": 2, "sizes": [61, 12, 2, 3, 17, 19]}
DATA = []
TOLERANCE = {"loss": 1e-6, "results": 1e-6}
REPLAY = ["model/seed-1"]
CHECKPOINT = {"name": "drawn", "arm": "model/seed-1", "metric": "size", "interval": "range"}


def arms(config):
    return [f"model/seed-{seed}" for seed in config["seeds"]]


def run(config, arm, *, steps=None, log):
    torch.manual_seed(int(arm[-1]))
    model = BertForMaskedLM(BertConfig(*config["sizes"]))
    for step in range(steps or config["steps"]):
        log(1 / (step + 1), of=config["steps"])
    results = {"size": sample(config, model), "range": [0.0, 1.0]}
    if steps is not None:
        return {}
    return (results, model) if arm == CHECKPOINT["arm"] else results


def sample(config, model):
    return round(model.bert.token_embed.weight.float().std().item(), 6)


def summarise(config, runs):
    return {"size": runs["model/seed-1"]["size"]}
"""


@pytest.fixture
def toy(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "experiments").mkdir()
    (tmp_path / "_build").mkdir()
    file = tmp_path / "experiments" / "toy.py"
    file.write_text(TOY)
    monkeypatch.setattr(recorded, "folder", lambda: tmp_path / "experiments")
    monkeypatch.chdir(tmp_path)
    return file


def test_running_an_experiment_keeps_its_model_and_repeating_it_does_not(
    toy: Path, home: Path, capsys
) -> None:
    assert recorded.main(["run", "toy"]) == 0
    assert "drawn: the package carries it" in capsys.readouterr().out
    entry = checkpoints.manifest()["drawn"]
    torch.manual_seed(1)
    expected = BertForMaskedLM(CONFIG)
    kept = recorded.load("toy")
    assert entry["value"] == entry["sample"] == kept.runs["model/seed-1"]["size"]
    assert (entry["seed"], entry["arm"], entry["interval"]) == (1, "model/seed-1", [0.0, 1.0])
    again = BertForMaskedLM.from_pretrained("drawn")
    assert torch.equal(again.bert.token_embed.weight, expected.bert.token_embed.weight.half())
    assert list(Path("_build/experiments").iterdir()) == []

    before = (home / "manifest.json").stat().st_mtime_ns, json.dumps(checkpoints.manifest())
    assert recorded.main(["verify", "toy"]) == 0
    assert recorded.replay("toy", steps=2)
    assert ((home / "manifest.json").stat().st_mtime_ns, json.dumps(checkpoints.manifest())) == before


def test_an_experiment_that_returns_the_wrong_thing_is_told(toy: Path) -> None:
    toy.write_text(TOY.replace("(results, model) if arm == CHECKPOINT", "results if arm == CHECKPOINT"))
    with pytest.raises(RecordError, match=r"run: expected of model/seed-1 a pair .*, got dict"):
        recorded.record("toy", quiet=True)
    toy.write_text(
        TOY.replace(
            'return (results, model) if arm == CHECKPOINT["arm"] else results', "return results, model"
        )
    )
    with pytest.raises(RecordError, match="run: expected of model/seed-0 its results alone, got tuple"):
        recorded.record("toy", quiet=True)
    toy.write_text(TOY.replace('"metric": "size"', '"metric": "loss"'))
    assert recorded.main(["run", "toy"]) == 2


def test_an_interrupted_run_still_has_its_model(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toy.write_text(TOY.replace("[0, 1]", "[1, 0]"))  # the checkpoint's arm comes first
    whole = recorded._with_model

    def stop(module, arm, returned):
        if arm == "model/seed-0":
            raise KeyboardInterrupt
        return whole(module, arm, returned)

    monkeypatch.setattr(recorded, "_with_model", stop)
    assert recorded.main(["run", "toy"]) == 130
    assert checkpoints.names() == []
    monkeypatch.setattr(recorded, "_with_model", whole)
    assert recorded.main(["run", "toy"]) == 0
    assert checkpoints.names() == ["drawn"]
