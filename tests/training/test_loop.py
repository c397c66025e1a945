"""The training loop: its steps written out by hand, kill -9 at any moment, Ctrl-C, damage, strangers."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from textbook_code.optim.schedules import warmup_linear
from textbook_code.training import loop
from textbook_code.training.checkpoint import CheckpointError, checkpoints
from textbook_code.training.loop import TrainingError, train

PROGRAM = """
import os, sys, tempfile
import torch
from torch import nn
from textbook_code.optim.schedules import warmup_cosine
from textbook_code.training.loop import train

def work(folder, steps=STEPS):
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(7, 33), nn.GELU(), nn.Dropout(0.3), nn.Linear(33, 5))

    def loss_fn(model, batch):
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    def batch_at(number, generator):
        x = torch.randn(11, 7, generator=generator)
        return x, (x.sum(1) > number % 3).long()

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    run = train(
        model, loss_fn, batch_at, steps=steps, optimizer=optimizer, schedule=warmup_cosine(20, STEPS),
        max_grad_norm=0.5, accumulate=2, folder=folder, checkpoint_every=9, eval_every=25, config={"a": [1]},
        evaluate=lambda model, step: {"out": model(torch.ones(1, 7)).sum().item() + torch.rand(()).item()},
    )
    print("ended", run.step, run.interrupted, run.resumed_from, flush=True)

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a process that has used a GPU cannot be forked
with tempfile.TemporaryDirectory() as folder:
    work(folder, steps=1)  # imports what is imported late, once for all children
for line in sys.stdin:  # a run each, in a child of this process, so that torch is imported once
    pid = os.fork()
    if pid == 0:
        torch.set_num_threads(1)
        work(line.strip())
        os._exit(0)
    print(pid, flush=True)
    print(os.waitpid(pid, 0)[1], flush=True)
""".replace("STEPS", "150")


def log_of(folder: Path) -> list[str]:
    path = folder / "log.jsonl"
    return path.read_text("utf-8").splitlines() if path.is_file() else []


def without_speed(lines: list[str]) -> list[dict]:
    return [{k: v for k, v in json.loads(line).items() if k != "tokens_per_s"} for line in lines]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the test forks")
def test_killed_at_any_moment_it_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    runs = subprocess.Popen(
        [sys.executable, program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert runs.stdin and runs.stdout

    def start(folder: Path) -> int:
        runs.stdin.write(f"{folder}\n")
        runs.stdin.flush()
        return int(runs.stdout.readline())

    def until(folder: Path, lines: int) -> None:
        deadline = time.monotonic() + 60
        while len(log_of(folder)) < lines:
            assert time.monotonic() < deadline, "the run stands still"
            time.sleep(0.001)

    assert runs.stdout.readline() == "ended 1 False None\n"
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    start(whole)
    assert runs.stdout.readline() == "ended 150 False None\n"
    assert runs.stdout.readline() == "0\n"

    draws, resumed = random.Random(), []
    for lines in (4, 30, 60, 61, 110, 140):  # the first is before any checkpoint
        pid = start(broken)
        until(broken, lines)
        time.sleep(draws.uniform(0, 0.02))
        os.kill(pid, signal.SIGKILL)
        assert int(runs.stdout.readline()) == signal.SIGKILL
        resumed.append(len(checkpoints(broken / "checkpoints")))
    start(broken)
    last = runs.stdout.readline().split()
    assert last[:3] == ["ended", "150", "False"]
    assert int(last[3]) >= 99
    assert runs.stdout.readline() == "0\n"
    runs.stdin.close()
    assert runs.wait(10) == 0

    assert without_speed(log_of(broken)) == without_speed(log_of(whole))
    assert len(log_of(whole)) == 150 + 6
    ends = [checkpoints(folder / "checkpoints") for folder in (whole, broken)]
    assert [[path.name for path in end] for end in ends] == [["step-00000144", "step-00000150"]] * 2
    for name in ("model.safetensors", "optimizer.safetensors"):  # also the states of all generators
        ours, theirs = (load_file(end[-1] / name) for end in ends)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    left = {path.name for path in (broken / "checkpoints").iterdir()}
    assert left == {"step-00000144", "step-00000150"}, "nothing half-written is left"


# ------------------------------------------------------------------ a run in this process


@dataclass(frozen=True)
class TinyConfig:
    width: int = 13
    dropout: float = 0.0


class Tiny(nn.Module):
    def __init__(self, config: TinyConfig) -> None:
        super().__init__()
        self.config = config
        self.fc1, self.fc2 = nn.Linear(5, config.width), nn.Linear(config.width, 3)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        return self.fc2(self.dropout(torch.tanh(self.fc1(x))))


def batch_at(number: int, generator: torch.Generator):
    x = torch.randn(6, 5, generator=generator)
    return {"x": x, "y": (x[:, 0] > 0).long() + number % 2}


def loss_fn(model: nn.Module, batch) -> torch.Tensor:
    return nn.functional.cross_entropy(model(batch["x"]), batch["y"])


def setting(lr: float = 0.1, kind=torch.optim.SGD, seed: int = 0, **config):
    torch.manual_seed(seed)
    model = Tiny(TinyConfig(**config))
    return {
        "model": model,
        "loss_fn": loss_fn,
        "batch_at": batch_at,
        "optimizer": kind(model.parameters(), lr=lr),
    }


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_the_steps_are_those_written_out_by_hand() -> None:
    run_of = setting(lr=0.3)
    schedule = warmup_linear(3, 8)
    run = train(**run_of, steps=8, schedule=schedule, max_grad_norm=0.25, accumulate=3, seed=5)

    model, generator = setting()["model"], torch.Generator().manual_seed(5)
    for step, line in enumerate(run.log):
        losses = [loss_fn(model, batch_at(3 * step + i, generator)) for i in range(3)]
        loss = sum(losses) / 3
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        norm = torch.cat([g.flatten() for g in gradients]).norm()
        for p, g in zip(model.parameters(), gradients, strict=True):
            p.data -= 0.3 * schedule(step) * g * min(1.0, 0.25 / norm.item())
        assert line["step"] == step + 1
        assert line["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert line["grad_norm"] == pytest.approx(norm.item(), rel=1e-5)
        assert line["lr"] == 0.3 * schedule(step)
    assert max(line["grad_norm"] for line in run.log) > 0.25, "clipping took part"
    torch.testing.assert_close(weights(run_of["model"]), weights(model), rtol=1e-4, atol=1e-6)
    assert (run.step, run.interrupted, run.resumed_from) == (8, False, None)
    assert run.losses == [line["loss"] for line in run.log]
    assert run_of["optimizer"].param_groups[0]["lr"] == 0.3, "the optimizer's own rate is given back"


def test_without_a_limit_nothing_is_clipped() -> None:
    free, wide = setting(lr=0.3), setting(lr=0.3)
    train(**free, steps=5, max_grad_norm=None)
    train(**wide, steps=5, max_grad_norm=1e9)
    assert torch.equal(weights(free["model"]), weights(wide["model"]))
    tight = setting(lr=0.3)
    train(**tight, steps=5, max_grad_norm=1e-3)
    assert not torch.allclose(weights(free["model"]), weights(tight["model"]), atol=1e-3)


def test_evaluating_and_logging_change_nothing_else() -> None:
    plain, watched = setting(dropout=0.4), setting(dropout=0.4)
    modes = []

    def evaluate(model: nn.Module, step: int) -> dict[str, float]:
        modes.append((model.training, torch.is_grad_enabled()))
        return {"noise": torch.randn(()).item(), "step": step}

    torch.manual_seed(1)
    train(**plain, steps=7)
    torch.manual_seed(1)
    run = train(**watched, steps=7, evaluate=evaluate, eval_every=3, log_every=2)
    assert torch.equal(weights(plain["model"]), weights(watched["model"]))
    assert set(modes) == {(False, False)}
    assert watched["model"].training
    assert run.evaluated("step") == [(3, 3.0), (6, 6.0), (7, 7.0)]
    assert [line["step"] for line in run.log if "loss" in line] == [2, 4, 6, 7]


def test_tokens_are_counted_and_bfloat16_computes_only_the_forward_pass(monkeypatch) -> None:
    clock = iter(range(1000))
    monkeypatch.setattr(loop.time, "perf_counter", lambda: float(next(clock)))
    parts = setting()
    seen = []

    def loss(model: nn.Module, batch) -> torch.Tensor:
        out = model(batch["x"])
        seen.append(out.dtype)
        return nn.functional.cross_entropy(out.float(), batch["y"])

    parts["loss_fn"] = loss
    run = train(**parts, steps=2, accumulate=2, autocast=torch.bfloat16)
    assert set(seen) == {torch.bfloat16}
    assert {p.dtype for p in parts["model"].parameters()} == {torch.float32}
    assert run.log[0]["tokens_per_s"] == 2 * 6 * 5  # two batches' first tensors in one tick
    run = train(**setting(), steps=1, count_tokens=lambda batch: 40)
    assert run.log[0]["tokens_per_s"] == 40


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_ends_the_run_and_harms_nothing(tmp_path: Path, bad: float) -> None:
    parts = setting()

    def broken(model: nn.Module, batch) -> torch.Tensor:
        return loss_fn(model, batch) * (bad if batch["step"] == 7 else 1.0)

    parts |= {"loss_fn": broken, "batch_at": lambda n, g: {**batch_at(n, g), "step": n}}
    with pytest.raises(
        TrainingError, match=r"step 8: the loss is (nan|inf).*weights are those after step 7.*is of step 6"
    ):
        train(**parts, steps=20, folder=tmp_path, checkpoint_every=3, schedule=warmup_linear(2, 20))
    assert [path.name for path in checkpoints(tmp_path / "checkpoints")] == ["step-00000003", "step-00000006"]
    assert len(log_of(tmp_path)) == 7
    good = setting()
    train(**good, steps=7, schedule=warmup_linear(2, 20))
    assert torch.equal(weights(parts["model"]), weights(good["model"]))
    assert parts["optimizer"].param_groups[0]["lr"] == 0.1
    with pytest.raises(TrainingError, match=r"step 8.*nothing is kept on disk"):
        train(**(setting() | {"loss_fn": broken, "batch_at": parts["batch_at"]}), steps=20)


def test_a_gradient_that_is_not_finite_is_seen_too() -> None:
    parts = setting()
    parts["loss_fn"] = lambda model, batch: (model(batch["x"]) * 0).abs().sqrt().sum()  # 0, with slope inf
    before = weights(parts["model"])
    with pytest.raises(TrainingError, match=r"step 1: the loss is 0\.0 and the gradient's norm nan"):
        train(**parts, steps=3)
    assert torch.equal(weights(parts["model"]), before)


def test_ctrl_c_saves_and_the_same_call_goes_on(tmp_path: Path) -> None:
    def interrupting(number: int, generator: torch.Generator):
        if number == 11 and not checkpoints(tmp_path / "checkpoints"):
            os.kill(os.getpid(), signal.SIGINT)
        return batch_at(number, generator)

    before = signal.getsignal(signal.SIGINT)
    first = setting(kind=torch.optim.AdamW, dropout=0.2) | {"batch_at": interrupting}
    torch.manual_seed(2)
    run = train(**first, steps=30, folder=tmp_path, schedule=warmup_linear(3, 30))
    assert (run.step, run.interrupted) == (12, True), "the step in hand was done first"
    assert signal.getsignal(signal.SIGINT) is before
    second = setting(kind=torch.optim.AdamW, dropout=0.2)
    run = train(**second, steps=30, folder=tmp_path, schedule=warmup_linear(3, 30))
    assert (run.step, run.interrupted, run.resumed_from) == (30, False, 12)

    whole = setting(kind=torch.optim.AdamW, dropout=0.2)
    torch.manual_seed(2)
    train(**whole, steps=30, schedule=warmup_linear(3, 30))
    assert torch.equal(weights(second["model"]), weights(whole["model"]))
    assert len(run.losses) == 30
    again = train(**second, steps=30, folder=tmp_path, schedule=warmup_linear(3, 30))
    assert (again.step, again.resumed_from, again.losses) == (30, 30, run.losses), (
        "there is nothing left to do"
    )


def test_a_second_ctrl_c_ends_at_once(tmp_path: Path) -> None:
    def impatient(number: int, generator: torch.Generator):
        if number == 3:
            signal.raise_signal(signal.SIGINT)  # each is handled before the next, as two key presses are
            signal.raise_signal(signal.SIGINT)
        return batch_at(number, generator)

    with pytest.raises(KeyboardInterrupt):
        train(**(setting() | {"batch_at": impatient}), steps=30, folder=tmp_path)


def finished(folder: Path, **other) -> None:
    train(**setting(kind=torch.optim.AdamW), steps=9, folder=folder, checkpoint_every=3, **other)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 17}, r"model.config.width: 13 in the checkpoint, got 17\n.*fc1.bias: \(13,\) float32 in"),
        ({"dropout": 0.5}, "model.config.dropout: 0.0 in the checkpoint, got 0.5"),
        ({"kind": torch.optim.SGD}, "optimizer: the checkpoint holds the state of AdamW, got SGD"),
        ({"lr": 0.2}, "optimizer.lr: 0.1 in group 0 of the checkpoint, got 0.2"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path, changes, message: str) -> None:
    finished(tmp_path)
    log = log_of(tmp_path)
    parts = setting(**({"kind": torch.optim.AdamW} | changes), seed=4)
    before = weights(parts["model"])
    with pytest.raises(CheckpointError, match=message):
        train(**parts, steps=12, folder=tmp_path)
    assert torch.equal(weights(parts["model"]), before)
    assert log_of(tmp_path) == log
    assert len(checkpoints(tmp_path / "checkpoints")) == 2


def test_another_config_or_schedule_is_refused(tmp_path: Path) -> None:
    finished(tmp_path, config={"data": "plays", "seed": 1})
    parts = setting(kind=torch.optim.AdamW)
    with pytest.raises(CheckpointError, match=r"config\.data: 'plays' in the checkpoint, got 'poems'"):
        train(**parts, steps=12, folder=tmp_path, config={"data": "poems", "seed": 1})
    with pytest.raises(CheckpointError, match=r"schedule: its factor at step 8 was 1\.0, got 0\.36"):
        train(
            **parts,
            steps=12,
            folder=tmp_path,
            schedule=warmup_linear(1, 12),
            config={"data": "plays", "seed": 1},
        )
    other = nn.Sequential(nn.Linear(5, 3))
    parts |= {"model": other, "optimizer": torch.optim.AdamW(other.parameters(), lr=0.1)}
    with pytest.raises(CheckpointError, match="model: the checkpoint holds a Tiny, got a Sequential"):
        train(**parts, steps=12, folder=tmp_path, config={"data": "plays", "seed": 1})


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json", "SHA256SUMS"])
@pytest.mark.parametrize("how", ["cut", "changed", "gone"])
def test_a_damaged_checkpoint_is_reported_and_the_one_before_it_used(
    tmp_path: Path, name: str, how: str
) -> None:
    finished(tmp_path)
    newest = checkpoints(tmp_path / "checkpoints")[-1]
    data = (newest / name).read_bytes()
    (newest / name).unlink()
    if how != "gone":
        middle = len(data) // 2
        other = (
            data[:middle] if how == "cut" else data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
        )
        (newest / name).write_bytes(other)
    parts = setting(kind=torch.optim.AdamW)
    with pytest.warns(UserWarning, match=r"going back to step-00000006: .*step-00000009"):
        run = train(**parts, steps=9, folder=tmp_path, checkpoint_every=3)
    assert run.resumed_from == 6
    left = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert left == ["step-00000006", "step-00000009", "step-00000009.damaged"]
    whole = setting(kind=torch.optim.AdamW)
    train(**whole, steps=9)
    assert torch.equal(weights(parts["model"]), weights(whole["model"]))
    assert len(log_of(tmp_path)) == 9


def test_with_every_checkpoint_damaged_nothing_begins_anew(tmp_path: Path) -> None:
    finished(tmp_path)
    for path in checkpoints(tmp_path / "checkpoints"):
        (path / "state.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"every checkpoint is damaged: .*state.json is damaged"):
        train(**setting(kind=torch.optim.AdamW), steps=12, folder=tmp_path)


def test_a_checkpoint_that_cannot_be_written_leaves_the_earlier_ones(tmp_path: Path, monkeypatch) -> None:
    finished(tmp_path)
    names = [path.name for path in checkpoints(tmp_path / "checkpoints")]

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("textbook_code.training.checkpoint._save", full)
    with pytest.raises(OSError, match="No space left"):
        train(**setting(kind=torch.optim.AdamW), steps=12, folder=tmp_path)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == names


def test_a_folder_in_use_is_refused(tmp_path: Path) -> None:
    finished(tmp_path)
    with pytest.raises(FileExistsError, match="holds a run already; expected an empty folder"):
        train(**setting(kind=torch.optim.AdamW), steps=12, folder=tmp_path, resume=False)

    def second(number: int, generator: torch.Generator):
        with pytest.raises(FileExistsError, match="another process is training"):
            train(**setting(), steps=1, folder=tmp_path / "other")
        return batch_at(number, generator)

    train(**(setting() | {"batch_at": second}), steps=1, folder=tmp_path / "other")


def test_tied_weights_and_frozen_ones_are_kept(tmp_path: Path) -> None:
    def tied():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 3))
        model[1].weight = model[0].weight
        model[2].bias.requires_grad_(False)
        return {
            "model": model,
            "loss_fn": loss_fn,
            "batch_at": batch_at,
            "optimizer": torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1),
        }

    train(**tied(), steps=4, folder=tmp_path)
    resumed, whole = tied(), tied()
    train(**resumed, steps=8, folder=tmp_path)
    train(**whole, steps=8)
    assert torch.equal(weights(resumed["model"]), weights(whole["model"]))
    assert resumed["model"][0].weight is resumed["model"][1].weight


def test_an_optimizer_with_plain_values_is_kept_and_one_with_others_refused(tmp_path: Path) -> None:
    asgd = {"kind": torch.optim.ASGD, "lr": 0.05}
    train(**setting(**asgd), steps=4, folder=tmp_path / "asgd")
    resumed, whole = setting(**asgd), setting(**asgd)
    train(**resumed, steps=8, folder=tmp_path / "asgd")
    train(**whole, steps=8)
    assert torch.equal(weights(resumed["model"]), weights(whole["model"]))

    class Odd(torch.optim.SGD):
        def step(self, closure=None):
            self.state[self.param_groups[0]["params"][0]]["history"] = [torch.ones(1)]
            return super().step(closure)

    with pytest.raises(
        TypeError, match=r"optimizer: expected tensors and plain values .*got list as history"
    ):
        train(**setting(kind=Odd), steps=1, folder=tmp_path / "odd")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"steps": -1}, ValueError, "steps: expected a whole number of at least 0, got -1"),
        ({"steps": 2.0}, ValueError, r"steps: expected a whole number of at least 0, got 2\.0"),
        ({"accumulate": 0}, ValueError, "accumulate: expected a whole number of at least 1, got 0"),
        ({"log_every": 0}, ValueError, "log_every: .* at least 1, got 0"),
        ({"checkpoint_every": 0, "folder": "x"}, ValueError, "checkpoint_every: .* at least 1, got 0"),
        ({"checkpoint_every": 5}, ValueError, "checkpoint_every: expected a folder"),
        ({"eval_every": 5}, ValueError, "eval_every: expected a function to evaluate"),
        ({"max_grad_norm": 0.0}, ValueError, "max_grad_norm: expected a positive number or None, got 0.0"),
        ({"autocast": torch.float16}, ValueError, "autocast: expected torch.bfloat16 or None, got torch.fl"),
        ({"loss_fn": lambda m, b: 1.0}, TypeError, "loss_fn: expected it to return a tensor, got float"),
        (
            {"loss_fn": lambda m, b: m(b["x"])},
            ValueError,
            r"loss_fn: expected a scalar .*of shape \(6, 3\)",
        ),
        (
            {"loss_fn": lambda m, b: torch.ones(())},
            ValueError,
            "loss_fn: expected a scalar that depends on the model, got a tensor without a gradient",
        ),
        ({"model": nn.ReLU()}, ValueError, "model: expected parameters to train"),
    ],
)
def test_bad_input(changes, error, message: str) -> None:
    with pytest.raises(error, match=message):
        train(**({**setting(), "steps": 2} | changes))
