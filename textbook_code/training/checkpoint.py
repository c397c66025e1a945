"""A training run on disk: written whole or not at all, and read back to the bit.

A checkpoint is a folder of four files:

    model.safetensors       the weights, under the model's own names
    optimizer.safetensors   the optimizer's tensors and the states of torch's random generators
    state.json              the step and everything that is not a tensor
    SHA256SUMS              hashes of the other three; `sha256sum -c SHA256SUMS` checks them too

Nothing in it is a pickle, so that reading a checkpoint runs no code.

Book: gpt-training
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from textbook_code.weights import load_safetensors

_WEIGHTS, _OPTIMIZER, _STATE, _SUMS = "model.safetensors", "optimizer.safetensors", "state.json", "SHA256SUMS"
_KEPT = 2  # the newest, and the one to go back to if that is damaged


class CheckpointError(ValueError):
    """A checkpoint that is damaged, or that belongs to another run: it says which, and how.

    Book: gpt-training
    """


def checkpoints(folder: str | Path) -> list[Path]:
    """The checkpoints in `folder`, oldest first; they may yet be damaged.

    Book: gpt-training
    """
    return sorted(path for path in Path(folder).glob("step-*") if path.name[5:].isdigit())


def save_checkpoint(
    folder: str | Path,
    step: int,
    *,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    generator: torch.Generator,
    options: list[dict[str, Any]] | None = None,
    extra: Mapping[str, Any] | None = None,
) -> Path:
    """Write `folder/step-…`, then remove all but the last two.

    It is written under another name, flushed to the disk and renamed: at every moment there is either no such
    checkpoint or a whole one, also after a power cut.

    Args:
        folder: where the checkpoints of this run are kept.
        step: how many steps were done.
        model, optimizer, generator: what is written of the run, beside the states of the generators of torch
            (of every device), NumPy and Python.
        options: the optimizer's settings as the run began, where a schedule has changed them since.
        extra: whatever else is to be kept, JSON-able.

    Returns:
        The checkpoint's folder.

    Raises:
        TypeError: the optimizer's state, or `extra`, holds something that is neither a tensor nor JSON-able.
        OSError: the disk is full or cannot be written to; earlier checkpoints are untouched.

    Book: gpt-training
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(".step-*.partial"):  # of a process that was killed while it wrote
        shutil.rmtree(leftover)
    target, partial = folder / f"step-{step:08d}", folder / f".step-{step:08d}.partial"
    tensors, values = _optimizer_state(optimizer)
    tensors |= _random_tensors(generator)
    state = {
        "step": step,
        "model": _description(model),
        "optimizer": {
            "class": type(optimizer).__qualname__,
            "options": optimizer_options(optimizer) if options is None else options,
            "now": optimizer_options(optimizer),
            "values": values,
        },
        "random": _random_values(),
        "extra": dict(extra or {}),
    }
    partial.mkdir()
    try:
        (partial / _STATE).write_text(json.dumps(state, indent=1) + "\n", "utf-8")
        _save(partial / _WEIGHTS, model.state_dict())
        _save(partial / _OPTIMIZER, tensors)
        sums = "".join(f"{_sha256(partial / name)}  {name}\n" for name in (_WEIGHTS, _OPTIMIZER, _STATE))
        (partial / _SUMS).write_text(sums, "utf-8")
        for path in (*partial.iterdir(), partial):
            _flush(path)
        if target.exists():
            _set_aside(target)
        partial.rename(target)
        _flush(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    for old in checkpoints(folder)[:-_KEPT]:
        shutil.rmtree(old)
    return target


def verify_checkpoint(path: str | Path) -> None:
    """Check every file of a checkpoint against its hash.

    Raises:
        CheckpointError: a file is missing, cut short or changed; it says which.

    Book: gpt-training
    """
    path = Path(path)
    try:
        lines = (path / _SUMS).read_text("utf-8").splitlines()
        sums = {name: digest for digest, name in (line.split() for line in lines)}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: no readable {_SUMS} ({error})") from error
    for name in (_WEIGHTS, _OPTIMIZER, _STATE):
        if name not in sums:
            raise CheckpointError(f"{path}: {_SUMS} does not name {name}")
        if not (path / name).is_file():
            raise CheckpointError(f"{path}: {name} is missing")
        if _sha256(path / name) != sums[name]:
            raise CheckpointError(f"{path}: {name} is damaged, its sha256 is not the one in {_SUMS}")


def load_checkpoint(
    folder: str | Path,
    *,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    generator: torch.Generator,
    check: Callable[[Mapping[str, Any]], list[str]] | None = None,
) -> dict[str, Any] | None:
    """Put the run back to its newest whole checkpoint.

    A damaged one is reported by a warning and renamed to `….damaged`, and the one before it is used. All is
    checked before anything is changed, so that a checkpoint that does not fit leaves the model as it was.

    Args:
        folder: where the checkpoints are.
        model, optimizer, generator: built as at the beginning of the run; they are changed in place, as are
            the global generators of torch, NumPy and Python.
        check: what `state.json` holds to the reasons against it, a line each.

    Returns:
        What `state.json` holds, with `step` and `extra`; None when there is no checkpoint at all.

    Raises:
        CheckpointError: all checkpoints are damaged, or it was made by another model, of other sizes, or with
            another optimizer or other settings of it.

    Book: gpt-training
    """
    damaged: dict[Path, str] = {}
    for path in reversed(checkpoints(folder)):
        try:
            verify_checkpoint(path)
        except CheckpointError as error:
            damaged[path] = str(error)
            continue
        state = _restore(path, model, optimizer, generator, check)
        if damaged:
            warnings.warn(f"going back to {path.name}: {'; '.join(damaged.values())}", stacklevel=2)
        for other in damaged:
            _set_aside(other)
        return state
    if damaged:
        raise CheckpointError("every checkpoint is damaged: " + "; ".join(damaged.values()))
    return None


def _set_aside(path: Path) -> None:
    """Rename a checkpoint, so that it is lost to nobody and taken for a whole one by nobody."""
    aside = path.with_suffix(".damaged")
    shutil.rmtree(aside, ignore_errors=True)
    path.rename(aside)


def _restore(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    generator: torch.Generator,
    check: Callable[[Mapping[str, Any]], list[str]] | None,
) -> dict[str, Any]:
    state = json.loads((path / _STATE).read_text("utf-8"))
    weights, tensors = load_safetensors(path / _WEIGHTS), load_safetensors(path / _OPTIMIZER)
    wrong = [*_other_model(state["model"], weights, model), *_other_optimizer(state["optimizer"], optimizer)]
    wrong += check(state) if check else []
    if wrong:
        shown = "\n  ".join(wrong[:20]) + (f"\n  and {len(wrong) - 20} more" if len(wrong) > 20 else "")
        raise CheckpointError(f"{path}: it is of another run\n  {shown}")
    model.load_state_dict(weights)
    _restore_optimizer(optimizer, state["optimizer"], tensors)
    _restore_random(state["random"], tensors, generator)
    return state


def _description(model: nn.Module) -> dict[str, Any]:
    """The model's class and, where it is a dataclass, its config."""
    config: Any = getattr(model, "config", None)
    known = is_dataclass(config) and not isinstance(config, type)
    return {"class": type(model).__qualname__, "config": json.loads(_json(asdict(config))) if known else None}


def _other_model(saved: Mapping[str, Any], weights: Mapping[str, Tensor], model: nn.Module) -> list[str]:
    """In what the model differs from the one that was saved, a line each."""
    here, now = _description(model), model.state_dict()
    wrong = []
    if saved["class"] != here["class"]:
        wrong.append(f"model: the checkpoint holds a {saved['class']}, got a {here['class']}")
    was, is_ = saved["config"] or {}, here["config"] or {}
    wrong += [
        f"model.config.{key}: {was.get(key)!r} in the checkpoint, got {is_.get(key)!r}"
        for key in sorted({*was, *is_})
        if was.get(key) != is_.get(key)
    ]
    for name in sorted({*weights, *now}):
        if name not in now or name not in weights:
            where = "checkpoint" if name in weights else "model"
            wrong.append(f"{name}: only in the {where}")
        elif weights[name].shape != now[name].shape or weights[name].dtype != now[name].dtype:
            wrong.append(f"{name}: {_kind(weights[name])} in the checkpoint, got {_kind(now[name])}")
    return wrong


def _kind(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def optimizer_options(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Each group's settings, with its parameters by their numbers, as JSON has them.

    Book: gpt-training
    """
    groups = optimizer.state_dict()["param_groups"]
    return json.loads(_json([{k: _plain(v) for k, v in group.items()} for group in groups]))


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, Tensor) and value.numel() == 1 else value


def _other_optimizer(saved: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> list[str]:
    kind = type(optimizer).__qualname__
    if saved["class"] != kind:
        return [f"optimizer: the checkpoint holds the state of {saved['class']}, got {kind}"]
    now = optimizer_options(optimizer)
    if len(saved["options"]) != len(now):
        return [f"optimizer: {len(saved['options'])} parameter groups in the checkpoint, got {len(now)}"]
    return [
        f"optimizer.{key}: {was.get(key)!r} in group {number} of the checkpoint, got {here.get(key)!r}"
        for number, (was, here) in enumerate(zip(saved["options"], now, strict=True))
        for key in sorted({*was, *here})
        if was.get(key) != here.get(key)
    ]


def _optimizer_state(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What the optimizer keeps of each parameter: tensors, and plain values by parameter and name."""
    tensors: dict[str, Tensor] = {}
    values: dict[str, dict[str, Any]] = {}
    for number, kept in optimizer.state_dict()["state"].items():
        for name, value in kept.items():
            if isinstance(value, Tensor):
                tensors[f"state.{number}.{name}"] = value
            elif value is None or isinstance(value, bool | int | float | str):
                values.setdefault(str(number), {})[name] = value
            else:
                raise TypeError(
                    f"optimizer: expected tensors and plain values in its state, got {type(value).__name__} "
                    f"as {name} of parameter {number}"
                )
    return tensors, values


def _restore_optimizer(
    optimizer: torch.optim.Optimizer, saved: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    """Set state and settings directly: `load_state_dict` would cast the state to the weights' dtype."""
    parameters = [(p, group) for group in optimizer.param_groups for p in group["params"]]
    optimizer.state.clear()
    for key, tensor in tensors.items():
        if key.startswith("state."):
            _, number, name = key.split(".", 2)
            parameter, group = parameters[int(number)]
            # Adam counts its steps on the CPU unless it runs as one fused kernel
            stays = name == "step" and not (group.get("fused") or group.get("capturable"))
            optimizer.state[parameter][name] = tensor if stays else tensor.to(parameter.device)
    for number, kept in saved["values"].items():
        optimizer.state[parameters[int(number)][0]].update(kept)
    for group, now in zip(optimizer.param_groups, saved["now"], strict=True):
        for name, value in now.items():
            if name != "params":
                group[name] = tuple(value) if isinstance(group.get(name), tuple) else value


def _random_tensors(generator: torch.Generator) -> dict[str, Tensor]:
    states = {"random.generator": generator.get_state(), "random.torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        states |= {f"random.cuda.{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    return states


def _random_values() -> dict[str, Any]:
    name, keys, *rest = np.random.get_state(legacy=True)
    return {"python": random.getstate(), "numpy": [name, np.asarray(keys).tolist(), *rest]}


def _restore_random(
    values: Mapping[str, Any], tensors: Mapping[str, Tensor], generator: torch.Generator
) -> None:
    generator.set_state(tensors["random.generator"])
    torch.set_rng_state(tensors["random.torch"])
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            if (state := tensors.get(f"random.cuda.{i}")) is not None:
                torch.cuda.set_rng_state(state, i)
    version, internal, gauss = values["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = values["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))


def _save(path: Path, tensors: Mapping[str, Tensor]) -> None:
    from safetensors.torch import save_file

    # copies, as tied weights share their storage, which the format forbids
    save_file({name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}, path)


def _json(value: Any) -> str:
    return json.dumps(value, default=str)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    """Make the disk itself hold a file, or a folder's list of names."""
    if path.is_dir() and os.name == "nt":
        return  # a folder cannot be opened there
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
