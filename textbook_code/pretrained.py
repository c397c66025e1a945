"""One mixin for every model: weights in, weights out, in the published format.

A model class states three tables: which config field has which name elsewhere, which values
its code takes for granted, and which tensor has which name. Everything else is here.

Book: bert-weights
"""

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor, nn

from .weights import (
    Packed,
    Rule,
    WeightError,
    invert,
    load_safetensors,
    moved_into_place,
    rename,
    save_safetensors,
)

_CONFIG, _WEIGHTS, _INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"


class Pretrained(nn.Module if TYPE_CHECKING else object):  # type: ignore[misc]
    """`from_hf`, `from_pretrained`, `save_pretrained` and `to_hf_state_dict` for a model class.

    A subclass is an `nn.Module` that takes its config as first argument and keeps it as
    `self.config`, and sets:

    - `config_class`: its frozen dataclass;
    - `hf_architecture`: the name that a `config.json` carries for it;
    - `hf_config`: our field → their key;
    - `hf_assumes`: their key → the one value that this code implements;
    - `hf_weights`: rules, their tensor name → ours;
    - `hf_tied`: their tensors that repeat another one.

    Book: bert-weights
    """

    config_class: ClassVar[type]
    hf_architecture: ClassVar[str]
    hf_config: ClassVar[Mapping[str, str]]
    hf_assumes: ClassVar[Mapping[str, Any]]
    hf_weights: tuple[Rule | Packed, ...]
    hf_tied: Mapping[str, str] = {}  # these two of a class, or of a model where its config decides
    config: Any

    @classmethod
    def config_from_hf(cls, theirs: Mapping[str, Any]) -> Any:
        """Translate a `config.json`.

        Raises:
            WeightError: it describes another architecture, or lacks a field.

        Book: bert-weights
        """
        for key, value in cls.hf_assumes.items():
            if theirs.get(key, value) != value:
                raise WeightError(f"config: {cls.__name__} needs {key} = {value!r}, got {theirs[key]!r}")
        missing = [key for key in cls.hf_config.values() if key not in theirs]
        if missing:
            raise WeightError(f"config: {cls.__name__} needs the fields {missing}, which are missing")
        return cls.config_class(**{ours: theirs[key] for ours, key in cls.hf_config.items()})

    @classmethod
    def from_hf_config(cls, theirs: Mapping[str, Any]) -> Self:
        """A model of the size that a `config.json` asks for, with weights yet to come.

        Raises:
            WeightError: it describes another architecture, or lacks a field.

        Book: bert-weights
        """
        return cls(cls.config_from_hf(theirs))

    def config_to_hf(self) -> dict[str, Any]:
        """Our config under the published names.

        Book: bert-weights
        """
        ours = {field.name: getattr(self.config, field.name) for field in fields(self.config)}
        named = {key: ours[field] for field, key in self.hf_config.items()}
        return {"architectures": [self.hf_architecture], **self.hf_assumes, **named}

    def load_hf_state_dict(self, state_dict: Mapping[str, Tensor]) -> Self:
        """Take over every tensor of the published implementation, in its dtype.

        Raises:
            WeightError: a tensor is left over, missing, or of another shape; the model is unchanged.

        Book: bert-weights
        """
        renamed = rename(state_dict, self.hf_weights, expected=self.state_dict(), tied=self.hf_tied)
        floating = next(tensor for tensor in renamed.values() if tensor.is_floating_point())
        self.to(floating.dtype).load_state_dict(renamed)
        return self

    def to_hf_state_dict(self) -> dict[str, Tensor]:
        """Our tensors under the published names.

        Book: bert-weights
        """
        return invert(self.state_dict(), self.hf_weights)

    @classmethod
    def from_hf(cls, hf_model: Any) -> Self:
        """Build from a model object of the reference library, which is not imported.

        Args:
            hf_model: has `config.to_dict()` and `state_dict()`.

        Returns:
            The model in eval mode, with the same weights.

        Raises:
            WeightError: the model is of another architecture.

        Book: bert-weights
        """
        model = cls.from_hf_config(hf_model.config.to_dict())
        return model.load_hf_state_dict(hf_model.state_dict()).eval()

    @classmethod
    def from_pretrained(
        cls, path_or_name: str | Path, *, revision: str | None = None, **options: Any
    ) -> Self:
        """Read `config.json` and safetensors from a folder, from this package, or from the Hub.

        Args:
            path_or_name: a folder; the name of a source (`textbook-code fetch --list`); that of a model
                trained here (`textbook_code.checkpoints`), which is in half precision; or a model on the
                Hugging Face Hub, `owner/name`.
            revision: the commit on the Hub; pin it where a result must be repeatable.
            **options: keyword arguments of the class itself, such as `pooler=False` of `Bert`.

        Returns:
            The model in eval mode.

        Raises:
            FileNotFoundError: there is no such folder, source or model, or a file is missing in it.
            WeightError: the files do not fit this class, or are damaged.

        Book: bert-weights
        """
        folder = _locate(path_or_name, revision)
        config_file = folder / _CONFIG
        if not config_file.is_file():
            raise FileNotFoundError(f"path_or_name: expected {_CONFIG} in {folder}, found none")
        try:
            theirs = json.loads(config_file.read_text("utf-8"))
        except ValueError as error:
            raise WeightError(f"{config_file}: not readable as JSON ({error})") from error
        if not isinstance(theirs, dict):
            raise WeightError(f"{config_file}: expected a JSON object, got {type(theirs).__name__}")
        model = cls(cls.config_from_hf(theirs), **options) if options else cls.from_hf_config(theirs)
        state_dict = _read_weights(folder)
        try:
            return model.load_hf_state_dict(state_dict).eval()
        except WeightError as error:
            holds = ", ".join(theirs.get("architectures") or ["no architecture"])
            raise WeightError(
                f"{folder}: {cls.__name__} reads a {cls.hf_architecture}, {_CONFIG} names {holds}; {error}"
            ) from error

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write `config.json` and `model.safetensors` in the published format.

        The reference library and `from_pretrained` both read the folder. Each file is moved
        into place when it is whole.

        Book: bert-weights
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_safetensors(self.to_hf_state_dict(), folder / _WEIGHTS)
        with moved_into_place(folder / _CONFIG) as partial:
            partial.write_text(json.dumps(self.config_to_hf(), indent=2) + "\n", "utf-8")
        return folder


def _locate(path_or_name: str | Path, revision: str | None) -> Path:
    """The folder that holds the model, fetched if need be."""
    if Path(path_or_name).is_dir():
        return Path(path_or_name)
    from . import checkpoints
    from .data.sources import SOURCES, fetch

    name = str(path_or_name)
    if name in SOURCES:
        return fetch(name)
    if name in (kept := checkpoints.names()):
        return checkpoints.path(name)
    known = f"neither a folder nor a source ({', '.join(sorted(SOURCES))})"
    known += f" nor a checkpoint of this package ({', '.join(kept)})" if kept else ""
    if name.count("/") > 1 or name.startswith((".", "/", "~")) or isinstance(path_or_name, Path):
        raise FileNotFoundError(f"path_or_name: {name!r} is {known}")
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(name, revision=revision, allow_patterns=[_CONFIG, "*.safetensors", _INDEX])
        )
    except Exception as error:  # the Hub's client raises many kinds; the reader needs one
        raise FileNotFoundError(
            f"path_or_name: {name!r} is {known}, and the Hub failed ({type(error).__name__}: {error})"
        ) from error


def _read_weights(folder: Path) -> dict[str, Tensor]:
    """One safetensors file, or the shards that an index names."""
    index = folder / _INDEX
    if not index.is_file():
        return load_safetensors(folder / _WEIGHTS)
    tensors: dict[str, torch.Tensor] = {}
    for shard in sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values())):
        tensors |= load_safetensors(folder / Path(shard).name)
    return tensors
