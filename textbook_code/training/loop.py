"""A training loop that can be killed at any moment and goes on as if nothing had happened.

    run = train(model, loss_fn, batch_at, steps=1000, optimizer=optimizer, folder="runs/first")

The model, its loss and its data come in as arguments; the loop adds what every run needs: accumulated
gradients, clipping, a schedule, a log, evaluations, checkpoints, and an orderly end on Ctrl-C.

Book: gpt-training
"""

from __future__ import annotations

import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor, nn

from .checkpoint import checkpoints, load_checkpoint, optimizer_options, save_checkpoint

LossFn = Callable[[nn.Module, Any], Tensor]
"""Model and batch to a scalar loss, the mean over what is predicted."""

BatchAt = Callable[[int, torch.Generator], Any]
"""The number of a batch and a source of randomness to that batch."""

_LOG, _CHECKPOINTS, _LOCK = "log.jsonl", "checkpoints", ".lock"


class TrainingError(ArithmeticError):
    """The loss or a gradient is not a finite number: it says at which step, and what is kept.

    Book: gpt-training
    """


@dataclass(frozen=True)
class Run:
    """What a training run came to.

    Attributes:
        step: how many steps are done in all.
        log: every line of the log: `step`, `loss`, `lr`, `grad_norm`, `tokens_per_s`, and after an evaluation
            `step` and `eval`.
        resumed_from: the step of the checkpoint that it went on from, None where it began anew.
        interrupted: whether it was asked to end before its last step.

    Book: gpt-training
    """

    step: int
    log: list[dict[str, Any]] = field(repr=False)
    resumed_from: int | None = None
    interrupted: bool = False

    @property
    def losses(self) -> list[float]:
        """The training loss of each logged step."""
        return [line["loss"] for line in self.log if "loss" in line]

    def evaluated(self, name: str) -> list[tuple[int, float]]:
        """(step, value) of each evaluation of `name`."""
        return [
            (line["step"], line["eval"][name]) for line in self.log if "eval" in line and name in line["eval"]
        ]


def train(
    model: nn.Module,
    loss_fn: LossFn,
    batch_at: BatchAt,
    *,
    steps: int,
    optimizer: torch.optim.Optimizer,
    schedule: Callable[[int], float] | None = None,
    max_grad_norm: float | None = 1.0,
    accumulate: int = 1,
    autocast: torch.dtype | None = None,
    seed: int = 0,
    folder: str | Path | None = None,
    checkpoint_every: int | None = None,
    resume: bool = True,
    config: Mapping[str, Any] | None = None,
    evaluate: Callable[[nn.Module, int], Mapping[str, float]] | None = None,
    eval_every: int | None = None,
    log_every: int = 1,
    count_tokens: Callable[[Any], int] | None = None,
    progress: bool | None = None,
) -> Run:
    r"""Train a model for so many steps, or for what is left of them.

    Step s (from 0) takes the batches $b_{sk}, \dots, b_{sk + k - 1}$ for `accumulate` = k, and with the
    schedule λ and the optimizer's own learning rate η

    $$g = \nabla_\theta \frac1k \sum_{i < k} \ell(\theta, b_{sk + i}), \qquad
    \hat g = g \cdot \min\Bigl(1, \frac{c}{\lVert g \rVert}\Bigr), \qquad
    \theta \leftarrow \mathrm{opt}\bigl(\theta, \hat g, \eta\,\lambda(s)\bigr).$$

    A run in a `folder` that is killed and started again by the same call, on such a machine with as many
    threads, gives the same weights and the same log, bit for bit, as one that was not: the checkpoint holds
    the weights, the optimizer, the step, and the state of every random generator, and a batch depends on its
    number and the generator alone.

    Args:
        model: trained in place, in train mode; what has `requires_grad` off stays as it is.
        loss_fn: `(model, batch) -> loss`, a scalar, the mean over what the batch predicts.
        batch_at: `(number, generator) -> batch`, on the model's device; it draws from the generator alone.
        steps: updates in all, with those of earlier calls in this folder.
        optimizer: over the model's parameters.
        schedule: step (from 0) to a factor of the learning rate, see `optim.schedules`; constant without.
        max_grad_norm: c, to which a longer gradient is shortened; None leaves it.
        accumulate: batches a step; the gradients of their means are averaged.
        autocast: `torch.bfloat16` computes the forward pass in it; weights and updates keep their dtype.
        seed: of the generator that `batch_at` is given. Dropout draws from torch's global one, which is the
            caller's to seed before the model is made.
        folder: gets `log.jsonl` and `checkpoints/`; without it nothing is written.
        checkpoint_every: steps between checkpoints; one is always written at the end. The last two are kept.
        resume: go on from the newest whole checkpoint in `folder`; with False a folder that has one is
            refused.
        config: JSON-able; kept in the checkpoint and compared when a run goes on.
        evaluate: `(model, step) -> {name: value}`, called in eval mode, without gradients and with a copy of
            torch's random state, so that evaluating more often changes nothing else.
        eval_every: steps between evaluations; there is also one at the end.
        log_every: steps between lines of the log.
        count_tokens: batch to the number of its tokens; the size of its first tensor if left out.
        progress: show a bar; if left out, where standard error is a terminal.

    Returns:
        What was done; after Ctrl-C, which ends the run after the present step and a checkpoint, with
        `interrupted`.

    Raises:
        TrainingError: the loss or the gradient's norm is not finite. Nothing is written, nothing updated.
        CheckpointError: the checkpoint is of another model, optimizer, schedule or config, or all of them are
            damaged.
        FileExistsError: `resume` is False and the folder holds a run; or another process is at it.
        TypeError, ValueError: an argument is of the wrong kind or outside its range.

    Book: gpt-training
    """
    _check(locals())
    device = next(model.parameters()).device
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    limit = math.inf if max_grad_norm is None else max_grad_norm
    count_tokens = count_tokens or _first_size
    generator = torch.Generator().manual_seed(seed)
    base_lr = [float(group["lr"]) for group in optimizer.param_groups]

    with ExitStack() as stack:
        keeper = _Keeper(folder, resume, model, optimizer, generator, config, schedule)
        stack.enter_context(keeper)
        start = keeper.resumed_from or 0
        stack.callback(_set_lr, optimizer, base_lr)  # so that the optimizer can be handed in again
        stop = stack.enter_context(_asked_to_stop())
        show = stack.enter_context(_bar(start, steps, progress))
        saved = keeper.resumed_from
        model.train()
        step, tokens, began = start, 0, time.perf_counter()
        while step < steps and not stop.is_set():
            factor = 1.0 if schedule is None else float(schedule(step))
            _set_lr(optimizer, [lr * factor for lr in base_lr])
            optimizer.zero_grad(set_to_none=True)
            loss = 0.0
            for number in range(step * accumulate, (step + 1) * accumulate):
                batch = batch_at(number, generator)
                with torch.autocast(device.type, autocast, enabled=autocast is not None):
                    part = loss_fn(model, batch)
                _check_loss(part)
                (part / accumulate).backward()
                loss += part.item() / accumulate
                tokens += count_tokens(batch)
            norm = float(nn.utils.clip_grad_norm_(trained, limit))
            if not (math.isfinite(loss) and math.isfinite(norm)):
                raise TrainingError(
                    f"step {step + 1}: the loss is {loss} and the gradient's norm {norm}, expected finite "
                    f"numbers; the weights are those after step {step}, {keeper.says(saved)}"
                )
            optimizer.step()
            step += 1

            if step % log_every == 0 or step == steps:
                seconds = time.perf_counter() - began
                speed, tokens, began = round(tokens / seconds, 1), 0, time.perf_counter()
                lr = optimizer.param_groups[0]["lr"]
                keeper.note(step=step, loss=loss, lr=lr, grad_norm=norm, tokens_per_s=speed)
            paused = time.perf_counter()
            if evaluate and (step == steps or (eval_every and step % eval_every == 0)):
                keeper.note(step=step, eval=_evaluate(evaluate, model, step))
            if checkpoint_every and step % checkpoint_every == 0:
                keeper.save(step)
                saved = step
            began += time.perf_counter() - paused
            show(step, loss)
        if step != saved:
            keeper.save(step)
        return Run(step, keeper.log, keeper.resumed_from, interrupted=step < steps)


def _set_lr(optimizer: torch.optim.Optimizer, rates: list[float]) -> None:
    for group, lr in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = lr


class _Keeper:
    """The run's folder: its log and its checkpoints. Without a folder the log is kept in memory alone."""

    def __init__(
        self,
        folder: str | Path | None,
        resume: bool,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        generator: torch.Generator,
        config: Mapping[str, Any] | None,
        schedule: Callable[[int], float] | None,
    ) -> None:
        self.folder = None if folder is None else Path(folder)
        self.resume, self.schedule = resume, schedule
        self.parts: dict[str, Any] = {"model": model, "optimizer": optimizer, "generator": generator}
        self.config = json.loads(json.dumps(dict(config or {})))
        self.options: list[dict[str, Any]] = []
        self.log: list[dict[str, Any]] = []
        self.resumed_from: int | None = None
        self.file: IO[str] | None = None

    def __enter__(self) -> _Keeper:
        if self.folder is None:
            return self
        from filelock import FileLock, Timeout

        self.folder.mkdir(parents=True, exist_ok=True)
        self.lock = FileLock(self.folder / _LOCK)  # the system gives it back if this process is killed
        try:
            self.lock.acquire(timeout=0)
        except Timeout as error:
            raise FileExistsError(f"folder: another process is training in {self.folder}") from error
        try:
            self._begin(self.folder)
        except BaseException:
            self.lock.release()
            raise
        return self

    def _begin(self, folder: Path) -> None:
        if not self.resume and checkpoints(folder / _CHECKPOINTS):
            raise FileExistsError(
                f"folder: {folder} holds a run already; expected an empty folder with resume=False"
            )
        self.options = optimizer_options(
            self.parts["optimizer"]
        )  # before the schedule changes the learning rate
        state = load_checkpoint(folder / _CHECKPOINTS, check=self._other_run, **self.parts)
        self.resumed_from = None if state is None else state["step"]
        done = self.resumed_from or 0
        self.log = [line for line in _lines(folder / _LOG) if line["step"] <= done]
        partial = folder / f".{_LOG}.partial"  # steps after the checkpoint will be done, and logged, again
        partial.write_text("".join(map(_line, self.log)), "utf-8")
        partial.replace(folder / _LOG)
        self.file = (folder / _LOG).open("a", encoding="utf-8")

    def _other_run(self, state: Mapping[str, Any]) -> list[str]:
        """In what the loop's own settings differ from those of the checkpoint."""
        was, now = state["extra"]["config"], self.config
        wrong = [
            f"config.{key}: {was.get(key)!r} in the checkpoint, got {now.get(key)!r}"
            for key in sorted({*was, *now})
            if was.get(key) != now.get(key)
        ]
        factor, step = self._factor(state["step"]), state["step"]
        if factor != state["extra"]["factor"]:
            wrong.append(
                f"schedule: its factor at step {step - 1} was {state['extra']['factor']}, got {factor}"
            )
        return wrong

    def _factor(self, step: int) -> float:
        """What the schedule said of the last of so many steps."""
        return 1.0 if self.schedule is None or step < 1 else float(self.schedule(step - 1))

    def __exit__(self, *_: object) -> None:
        if self.file:
            self.file.close()
        if self.folder:
            self.lock.release()

    def note(self, **line: Any) -> None:
        """Add a line to the log and have it on the disk's side of this process."""
        self.log.append(line)
        if self.file:
            self.file.write(_line(line))
            self.file.flush()

    def save(self, step: int) -> None:
        if self.folder:
            extra = {"config": self.config, "factor": self._factor(step)}
            save_checkpoint(self.folder / _CHECKPOINTS, step, options=self.options, extra=extra, **self.parts)

    def says(self, saved: int | None) -> str:
        """Where the last good state is, in words."""
        if self.folder is None:
            return "nothing is kept on disk"
        return "no checkpoint is written yet" if saved is None else f"the last checkpoint is of step {saved}"


def _line(line: Mapping[str, Any]) -> str:
    return json.dumps(line) + "\n"


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of a log, whose last one may have been cut off."""
    for line in path.read_text("utf-8").splitlines() if path.is_file() else ():
        try:
            yield json.loads(line)
        except ValueError:
            return


def _evaluate(
    evaluate: Callable[[nn.Module, int], Mapping[str, float]], model: nn.Module, step: int
) -> dict[str, float]:
    """Evaluate in eval mode; the random state and the mode are afterwards as they were."""
    modes, device = {module: module.training for module in model.modules()}, next(model.parameters()).device
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
            return {name: float(value) for name, value in evaluate(model, step).items()}
    finally:
        for module, training in modes.items():
            module.training = training


def _check_loss(loss: Any) -> None:
    if not isinstance(loss, Tensor):
        raise TypeError(f"loss_fn: expected it to return a tensor, got {type(loss).__name__}")
    if loss.numel() != 1 or not loss.requires_grad:
        kind = "without a gradient" if loss.numel() == 1 else f"of shape {tuple(loss.shape)}"
        raise ValueError(f"loss_fn: expected a scalar that depends on the model, got a tensor {kind}")


def _check(given: Mapping[str, Any]) -> None:
    """Of the arguments of `train`: the numbers in their ranges."""
    for name, least in (("steps", 0), ("accumulate", 1), ("log_every", 1)):
        _expect_count(name, given[name], least)
    for name in ("checkpoint_every", "eval_every"):
        if given[name] is not None:
            _expect_count(name, given[name], 1)
    if given["max_grad_norm"] is not None and not given["max_grad_norm"] > 0:
        raise ValueError(f"max_grad_norm: expected a positive number or None, got {given['max_grad_norm']}")
    if given["autocast"] not in (None, torch.bfloat16):
        raise ValueError(
            f"autocast: expected torch.bfloat16 or None, got {given['autocast']} (float16 would need its "
            "loss scaled)"
        )
    if given["checkpoint_every"] is not None and given["folder"] is None:
        raise ValueError("checkpoint_every: expected a folder to write checkpoints to, got folder=None")
    if given["eval_every"] is not None and given["evaluate"] is None:
        raise ValueError("eval_every: expected a function to evaluate, got evaluate=None")
    if not any(True for _ in given["model"].parameters()):
        raise ValueError("model: expected parameters to train, got a model without any")


def _expect_count(name: str, value: Any, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name}: expected a whole number of at least {least}, got {value!r}")


def _first_size(batch: Any) -> int:
    """Elements of the first tensor in a batch; 0 where there is none."""
    if isinstance(batch, Tensor):
        return batch.numel()
    parts: Iterable[Any] = batch.values() if isinstance(batch, Mapping) else batch
    return next((part.numel() for part in parts if isinstance(part, Tensor)), 0)


@contextmanager
def _asked_to_stop() -> Iterator[threading.Event]:
    """Set by the first Ctrl-C (or SIGTERM); the second one ends the program as ever."""
    stop = threading.Event()
    before: dict[int, Any] = {}

    def ask(*_: object) -> None:
        stop.set()
        restore()

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    if threading.current_thread() is threading.main_thread():  # signals reach no other
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, ask)
    try:
        yield stop
    finally:
        restore()


@contextmanager
def _bar(start: int, steps: int, progress: bool | None) -> Iterator[Callable[[int, float], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    hidden = not console.is_terminal if progress is None else not progress
    with Progress(*columns, console=console, transient=True, disable=hidden) as bar:
        task = bar.add_task("training", total=steps, completed=start)
        yield lambda step, loss: bar.update(task, completed=step, description=f"loss {loss:.4f}")
