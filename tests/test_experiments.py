"""The runner of recorded experiments, and the records themselves: whole, consistent and repeatable."""

import hashlib
import json
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from textbook_code import recorded
from textbook_code.recorded import Log, Recorded, RecordError

TOY = """
from pathlib import Path

import torch
from textbook_code.layers.norms import LayerNorm

ABOUT = "A line is fitted."
CONFIG = {"seeds": [0, 1], "steps": 30, "lr": 0.1}
DATA = []
TOLERANCE = {"loss": 1e-6, "results": 1e-6}
REPLAY = ["line/seed-1"]


def arms(config):
    return [f"line/seed-{seed}" for seed in config["seeds"]]


def run(config, arm, *, steps=None, log):
    if arm == "line/seed-1" and Path(__file__).with_name("stop").exists():
        raise KeyboardInterrupt
    with Path(__file__).with_name("ran").open("a") as ran:
        ran.write(arm[-1])
    torch.manual_seed(int(arm[-1]))
    slope = torch.zeros((), requires_grad=True)
    for _ in range(min(config["steps"], steps or config["steps"])):
        x = torch.randn(8)
        loss = (slope * x - 2 * x).square().mean()
        (gradient,) = torch.autograd.grad(loss, slope)
        slope.data -= config["lr"] * gradient
        log(loss.item(), of=config["steps"])
    return {} if steps else {"slope": round(slope.item(), 6), "threads": torch.get_num_threads()}


def summarise(config, runs):
    return {"slopes": [run["slope"] for run in runs.values()]}
"""
NAMES = recorded.names()


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with one small experiment, in place of the real ones."""
    (tmp_path / "experiments").mkdir()
    file = tmp_path / "experiments" / "toy.py"
    file.write_text(TOY)
    monkeypatch.setattr(recorded, "folder", lambda: tmp_path / "experiments")
    return file


def test_a_run_is_recorded_whole_and_loads_again(toy: Path) -> None:
    torch.manual_seed(5)
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    new = recorded.record("toy", quiet=True)
    path = recorded.save(new)
    assert recorded.load("toy") == new
    assert {p.name for p in path.parent.iterdir()} == {"toy.py", "toy.json", "ran"}, "no partial file is left"
    assert new.seeds == [0, 1]
    assert new.results["slopes"] == pytest.approx([2, 2], abs=0.1)
    assert {len(curve) for curve in new.curves.values()} == {30}
    assert new.runs["line/seed-0"]["threads"] == 1
    assert new.machine
    assert new.versions["torch"] == version("torch")
    assert new.command == "python -m textbook_code.recorded run toy"
    assert len(new.source_sha256) == 64
    needed = ("__init__", "layers/__init__", "layers/checks", "layers/norms")
    layer = {f"textbook_code/{name}.py" for name in needed}
    assert set(new.sources) == {"experiments/toy.py"} | layer
    # the caller's random state and threads are as before
    assert torch.get_rng_state().equal(state)
    assert torch.get_num_threads() == threads
    # one line for each list of numbers, so that a change reads as a diff
    assert any(line.count(",") >= 29 for line in path.read_text().splitlines())


def test_an_interrupted_run_goes_on_with_the_arms_that_are_left(toy: Path, tmp_path: Path) -> None:
    stop, ran, kept = toy.with_name("stop"), toy.with_name("ran"), tmp_path / "kept.json"
    stop.touch()
    with pytest.raises(KeyboardInterrupt):
        recorded.record("toy", kept=kept, quiet=True)
    stop.unlink()
    resumed = recorded.record("toy", kept=kept, quiet=True)
    assert ran.read_text() == "01", "each arm ran once"
    assert resumed.results == recorded.record("toy", quiet=True).results
    ran.unlink()
    toy.write_text(TOY + "\n# changed\n")
    recorded.record("toy", kept=kept, quiet=True)
    assert ran.read_text() == "01", "with other sources nothing is taken over"


def test_replay_repeats_the_first_steps_and_sees_a_change(toy: Path) -> None:
    recorded.save(recorded.record("toy", quiet=True))
    same = recorded.replay("toy", steps=20)
    assert same
    assert same.worst == 0
    assert same.steps == 20
    assert "within the tolerance" in str(same)
    toy.write_text(TOY.replace("2 * x)", "2.001 * x)"))
    other = recorded.replay("toy", steps=20)
    assert not other
    assert other.worst > 1e-4
    assert "beyond the tolerance" in str(other)
    toy.write_text(TOY.replace("log(loss.item()", "log(float('nan')"))
    assert not recorded.replay("toy", steps=3)
    toy.write_text(TOY.replace("range(min", "range(1 + min"))
    with pytest.raises(RecordError, match="ran 4 steps, the record has 3"):
        recorded.replay("toy", steps=3)
    with pytest.raises(RecordError, match="arms: toy has no 'circle', expected some of line/seed-0"):
        recorded.replay("toy", arms=["circle"])
    with pytest.raises(ValueError, match="steps: got 0"):
        recorded.replay("toy", steps=0)


def test_results_are_compared_within_the_tolerance(toy: Path) -> None:
    old = recorded.record("toy", quiet=True)
    assert recorded.differences(old, old) == []
    toy.write_text(TOY.replace('"lr": 0.1', '"lr": 0.11'))
    wrong = recorded.differences(old, recorded.record("toy", quiet=True))
    assert wrong
    assert wrong[0].startswith("results.slopes[0]: was ")
    toy.write_text(TOY.replace('{"slopes":', '{"gradients":'))
    assert any(
        "only in one" in line for line in recorded.differences(old, recorded.record("toy", quiet=True))
    )


def test_errors_name_what_is_missing(toy: Path) -> None:
    with pytest.raises(RecordError, match="no record of 'toy'; recorded are: none"):
        recorded.load("toy")
    with pytest.raises(RecordError, match="name: got 'toi', expected one of toy"):
        recorded.experiment("toi")
    toy.with_suffix(".json").write_text('{"name": "toy"}')
    with pytest.raises(RecordError, match=r"toy.json: not a complete record .*missing"):
        recorded.load("toy")
    toy.with_suffix(".json").write_text("{")
    with pytest.raises(RecordError, match="not a complete record"):
        recorded.load("toy")
    toy.write_text(TOY.replace("def summarise", "def summary"))
    with pytest.raises(RecordError, match="it defines no summarise"):
        recorded.experiment("toy")


def test_an_installed_package_records_nothing(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    new = recorded.record("toy", quiet=True)
    monkeypatch.setattr(recorded, "folder", lambda: recorded._PACKAGE / "_experiments")
    with pytest.raises(RecordError, match="an installed package can replay it"):
        recorded.save(new)


def test_the_command_line(toy: Path, tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "_build").mkdir()
    assert recorded.main(["replay", "toy"]) == 2
    assert "no record of 'toy'" in capsys.readouterr().err
    assert recorded.main(["run", "toy"]) == 0
    assert "2 arms" in capsys.readouterr().out
    assert recorded.main(["list"]) == 0
    assert capsys.readouterr().out == "toy: A line is fitted.\n"
    assert recorded.main(["replay", "toy", "--steps", "5"]) == 0
    assert "toy: 5 steps of line/seed-1 repeated" in capsys.readouterr().out
    assert recorded.main(["verify", "toy"]) == 0
    assert "within" in capsys.readouterr().out
    toy.write_text(TOY.replace('"lr": 0.1', '"lr": 0.05'))
    assert recorded.main(["verify", "toy"]) == 1
    assert "results.slopes[0]" in capsys.readouterr().out
    assert list((tmp_path / "_build" / "experiments").iterdir()) == [], "kept arms go when all are done"


def test_interrupting_says_how_to_go_on(toy: Path, monkeypatch, capsys: pytest.CaptureFixture) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(recorded, "record", interrupt)
    assert recorded.main(["run", "toy"]) == 130
    assert "the same command goes on" in capsys.readouterr().err


def test_a_loss_is_kept_to_six_digits_and_shown() -> None:
    shown = []
    log = Log(lambda step, total, loss: shown.append((step, total, loss)))
    log(1.23456789, of=2)
    log(torch.tensor(2.0), of=2)
    assert log.losses == [1.23457, 2.0]
    assert shown == [(1, 2, 1.23457), (2, 2, 2.0)]


# ------------------------------------------------------------------ the records of the repository


def test_every_experiment_has_its_record_and_every_record_its_experiment() -> None:
    assert sorted(path.stem for path in recorded.folder().glob("*.json")) == NAMES
    assert len(NAMES) >= 2


@pytest.mark.parametrize("name", NAMES)
def test_a_record_is_whole(name: str) -> None:
    kept: Recorded = recorded.load(name)
    module = recorded.experiment(name)
    assert kept.name == name
    assert kept.config == module.CONFIG
    assert kept.tolerance == module.TOLERANCE
    assert list(kept.runs) == list(kept.curves) == module.arms(module.CONFIG)
    assert set(module.REPLAY) <= set(kept.runs)
    lengths = [len(curve) for curve in kept.curves.values()]  # an arm of another kind may be shorter
    steps = kept.config["steps"]  # one number, or one for each kind of arm
    assert min(lengths) > 0 and max(lengths) == (max(steps.values()) if isinstance(steps, dict) else steps)
    own = (recorded.folder() / f"{name}.py").read_bytes()
    assert kept.sources[f"experiments/{name}.py"] == hashlib.sha256(own).hexdigest(), (
        "it was changed: run it again"
    )
    assert kept.cpu_seconds > 0
    text = json.dumps(kept.about + kept.machine + kept.command)
    assert "/" not in text.replace("textbook_code.recorded", ""), "no path of the machine it ran on"


@pytest.mark.parametrize("name", NAMES)
def test_what_the_book_quotes_follows_from_the_recorded_runs(name: str) -> None:
    kept, module = recorded.load(name), recorded.experiment(name)
    assert json.loads(json.dumps(module.summarise(kept.config, kept.runs))) == kept.results


@pytest.mark.parametrize("name", NAMES)
def test_the_first_twenty_steps_repeat(name: str) -> None:
    outcome = recorded.replay(name, steps=20)
    assert outcome, str(outcome)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_whole_experiment_repeats(name: str) -> None:
    assert recorded.differences(recorded.load(name), recorded.record(name, quiet=True)) == []
