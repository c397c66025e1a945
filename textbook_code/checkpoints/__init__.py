"""What was trained here: small models that come with the package, and what is known of each.

    from textbook_code import checkpoints
    checkpoints.names()
    BertForMaskedLM.from_pretrained("bert-shakespeare").float()

A checkpoint is a folder with `config.json`, `model.safetensors` in half precision and, where the model reads
text, `tokenizer.json`. `manifest.json` says of each which recorded experiment made it, and how good it was.

Book: recorded-experiments
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_HOME = Path(__file__).resolve().parent
_MANIFEST = "manifest.json"
_CONFIG, _WEIGHTS, _TOKENIZER = "config.json", "model.safetensors", "tokenizer.json"
MAX_BYTES = 1_000_000
"""The most that the weights of one checkpoint may take."""


class CheckpointFileError(ValueError):
    """A model that cannot be kept as a checkpoint, or a checkpoint that is not what the manifest says.

    Book: recorded-experiments
    """


def names() -> list[str]:
    """The checkpoints there are.

    Book: recorded-experiments
    """
    return sorted(manifest())


def manifest() -> dict[str, dict[str, Any]]:
    """What is known of each checkpoint, by its name.

    `class`, `experiment`, `arm` and `seed` it comes from; `metric` with its `value` and `interval`; the
    `sha256` and `bytes` of its weights; `files` with the sha256 of every file; and `sample`, a figure that is
    quickly computed again.

    Book: recorded-experiments
    """
    file = _HOME / _MANIFEST
    return json.loads(file.read_text("utf-8")) if file.is_file() else {}


def path(name: str) -> Path:
    """The folder of checkpoint `name`.

    Raises:
        FileNotFoundError: there is none of that name; those there are are named.

    Book: recorded-experiments
    """
    if name not in manifest():
        known = ", ".join(names()) or "there is none"
        raise FileNotFoundError(f"name: got {name!r}, expected a checkpoint of this package: {known}")
    return _HOME / name


def verify(name: str) -> None:
    """Check every file of a checkpoint against the manifest.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        CheckpointFileError: a file is missing, changed, or not in the manifest.

    Book: recorded-experiments
    """
    folder, entry = path(name), manifest()[name]
    there = {file.name for file in folder.iterdir()} if folder.is_dir() else set()
    if there != set(entry["files"]):
        raise CheckpointFileError(
            f"{name}: holds {sorted(there)}, the manifest names {sorted(entry['files'])}"
        )
    for file, expected in entry["files"].items():
        if _sha256(folder / file) != expected:
            raise CheckpointFileError(f"{name}: {file} is not the file of the manifest")


def export(model: Any, folder: str | Path, *, tokenizer: Any = None) -> Path:
    """Write a model in half precision, with its config and tokenizer, for `from_pretrained`.

    Args:
        model: of a class with `Pretrained`.
        folder: made if need be; files of these names are replaced.
        tokenizer: of the library `tokenizers`.

    Returns:
        The folder.

    Raises:
        CheckpointFileError: the weights are not finite in half precision, or take more than `MAX_BYTES`.

    Book: recorded-experiments
    """
    import torch

    from textbook_code.weights import save_safetensors

    folder = Path(folder)
    halves = {}
    for key, tensor in model.to_hf_state_dict().items():
        halves[key] = tensor.detach().half() if tensor.is_floating_point() else tensor.detach()
        if not bool(torch.isfinite(halves[key]).all()):
            raise CheckpointFileError(
                f"model: {key} is not finite in half precision, largest {tensor.abs().max()}"
            )
    size = sum(tensor.nbytes for tensor in halves.values())
    if size > MAX_BYTES:
        raise CheckpointFileError(
            f"model: expected at most {MAX_BYTES:,} bytes in half precision, got {size:,}"
        )
    folder.mkdir(parents=True, exist_ok=True)
    save_safetensors(halves, folder / _WEIGHTS)
    config = model.config_to_hf() | {"dtype": "float16"}
    (folder / _CONFIG).write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    if tokenizer is not None:
        tokenizer.save(str(folder / _TOKENIZER), pretty=False)
    written = (folder / _WEIGHTS).stat().st_size
    if written > MAX_BYTES:  # with the names of the tensors
        shutil.rmtree(folder)
        raise CheckpointFileError(f"model: expected a file of at most {MAX_BYTES:,} bytes, got {written:,}")
    return folder


def save(
    model: Any,
    name: str,
    *,
    experiment: str,
    arm: str,
    seed: int,
    metric: str,
    value: float,
    interval: list[float] | None = None,
    sample: float | None = None,
    tokenizer: Any = None,
) -> Path:
    """Keep a model as checkpoint `name` of this package, in place of one of that name.

    Args:
        model: of a class with `Pretrained`.
        name: by which `from_pretrained` finds it.
        experiment, arm, seed: what made it.
        metric: what was measured; `value` and `interval`: what came out.
        sample: a figure that a test computes again.
        tokenizer: of the library `tokenizers`, where the model reads text.

    Raises:
        CheckpointFileError: as `export`; the name is not one of lower-case letters, figures and hyphens.

    Book: recorded-experiments
    """
    with tempfile.TemporaryDirectory() as folder:
        export(model, folder, tokenizer=tokenizer)
        known = {"experiment": experiment, "arm": arm, "seed": seed}
        measured = {"metric": metric, "value": value, "interval": interval, "sample": sample}
        return adopt(folder, name, {"class": type(model).__name__, **known, **measured})


def adopt(folder: str | Path, name: str, entry: Mapping[str, Any]) -> Path:
    """Copy what `export` wrote into the package, and note it in the manifest.

    Raises:
        CheckpointFileError: the name is not one of lower-case letters, figures and hyphens.

    Book: recorded-experiments
    """
    if not name.replace("-", "").isalnum() or name != name.lower():
        raise CheckpointFileError(f"name: expected lower-case letters, figures and hyphens, got {name!r}")
    target, partial = _HOME / name, _HOME / f".{name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(folder, partial)
    for file in partial.iterdir():
        file.chmod(0o644)  # safetensors lets none but its owner read what it writes
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)
    files = {file.name: _sha256(file) for file in sorted(target.iterdir())}
    weights = {"sha256": files[_WEIGHTS], "bytes": (target / _WEIGHTS).stat().st_size}
    everything = manifest() | {name: {**entry, **weights, "files": files}}
    text = json.dumps({key: everything[key] for key in sorted(everything)}, indent=1)
    draft = _HOME / f".{_MANIFEST}.partial"
    draft.write_text(text + "\n", "utf-8")
    draft.replace(_HOME / _MANIFEST)
    return target


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
