"""Weights from files and from other implementations: all of them, or an error.

Book: bert-weights
"""

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

Rule = tuple[str, str | None]
"""Their name and ours, with `{fields}` in common; ours is None where a tensor is not needed."""

_FIELD = re.compile(r"\\\{(\w+)\\\}")


class WeightError(ValueError):
    """Weights that do not fit the model: it says which, and why.

    Book: bert-weights
    """


def _pattern(template: str) -> re.Pattern[str]:
    """`layer.{i}.{p}` matches `layer.3.weight`: {i} a number, any other field a name without dots."""

    def group(match: re.Match[str]) -> str:
        name = match.group(1)
        return f"(?P<{name}>{r'[0-9]+' if name == 'i' else r'[^.]+'})"

    return re.compile(_FIELD.sub(group, re.escape(template)))


def _rename_key(key: str, rules: Sequence[tuple[re.Pattern[str], str | None]]) -> tuple[bool, str | None]:
    """(matched, new name) by the first rule that matches the whole key."""
    for pattern, ours in rules:
        if match := pattern.fullmatch(key):
            return True, None if ours is None else ours.format(**match.groupdict())
    return False, None


def rename(
    state_dict: Mapping[str, Tensor],
    rules: Iterable[Rule],
    *,
    expected: Mapping[str, Tensor],
    tied: Mapping[str, str] | None = None,
) -> dict[str, Tensor]:
    """Rename every tensor by the rules, or raise and say all that is wrong.

    A rule is a pair of templates, `("layer.{i}.query.{p}", "blocks.{i}.q_proj.{p}")`; the first
    that matches a whole key is used. A rule whose second half is None names a tensor that is
    knowingly left out.

    Args:
        state_dict: the other implementation's tensors.
        rules: their names to ours.
        expected: our state dict: its keys must all be filled, with tensors of the same shape.
        tied: their keys that repeat another of their keys; checked to be equal, then dropped.

    Returns:
        A new dict with exactly the keys of `expected`.

    Raises:
        WeightError: a key of theirs that no rule names, two keys with one target, a key of ours
            left without a tensor, a wrong shape, or a tied pair that differs.

    Book: bert-weights
    """
    compiled = [(_pattern(theirs), ours) for theirs, ours in rules]
    wrong: list[str] = []
    renamed: dict[str, Tensor] = {}
    for key, tensor in state_dict.items():
        if tied and key in tied:
            twin = state_dict.get(tied[key])
            if twin is None or not torch.equal(twin, tensor):
                wrong.append(f"{key}: expected it to equal {tied[key]}, to which this model ties it")
            continue
        matched, ours = _rename_key(key, compiled)
        if not matched:
            wrong.append(f"{key}: no rule names it")
        elif ours is not None and ours in renamed:
            wrong.append(f"{key}: a second tensor for {ours}")
        elif ours is not None and ours not in expected:
            wrong.append(f"{key}: the model has no {ours}")
        elif ours is not None and tensor.shape != expected[ours].shape:
            wrong.append(
                f"{key}: expected shape {tuple(expected[ours].shape)} for {ours}, got {tuple(tensor.shape)}"
            )
        if ours is not None:
            renamed[ours] = tensor
    wrong += [f"{ours}: no tensor for it" for ours in expected if ours not in renamed]
    if wrong:
        shown = "\n  ".join(wrong[:20]) + (f"\n  and {len(wrong) - 20} more" if len(wrong) > 20 else "")
        raise WeightError(f"state_dict: {len(wrong)} of its tensors do not fit the model\n  {shown}")
    return renamed


def invert(state_dict: Mapping[str, Tensor], rules: Iterable[Rule]) -> dict[str, Tensor]:
    """Rename our tensors to their names: the rules, read from right to left.

    Raises:
        WeightError: a tensor of ours that no rule produces.

    Book: bert-weights
    """
    compiled = [(_pattern(ours), theirs) for theirs, ours in rules if ours is not None]
    renamed = {}
    for key, tensor in state_dict.items():
        matched, theirs = _rename_key(key, compiled)
        if not matched or theirs is None:
            raise WeightError(f"{key}: no rule leads to it")
        renamed[theirs] = tensor
    return renamed


def load_safetensors(path: str | Path) -> dict[str, Tensor]:
    """Read every tensor of a safetensors file.

    Raises:
        FileNotFoundError: there is no such file.
        WeightError: the file is damaged, cut short or of another format.

    Book: bert-weights
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"path: expected a safetensors file, found none at {path}")
    try:
        return load_file(path)
    except (SafetensorError, ValueError, OSError) as error:
        size = path.stat().st_size
        raise WeightError(
            f"{path}: not a whole safetensors file ({size:,} bytes; {error}); fetch or save it again"
        ) from error


def save_safetensors(state_dict: Mapping[str, Tensor], path: str | Path) -> None:
    """Write a safetensors file under a temporary name, then move it into place.

    Raises:
        OSError: the folder cannot be written to; an older file at `path` is left as it was.

    Book: bert-weights
    """
    from safetensors.torch import save_file

    with moved_into_place(Path(path)) as partial:
        tensors = {name: tensor.contiguous() for name, tensor in state_dict.items()}
        save_file(tensors, partial, {"format": "pt"})


@contextmanager
def moved_into_place(path: Path) -> Iterator[Path]:
    """Give a temporary name beside `path`, which becomes `path` when the block has ended well.

    Book: bert-weights
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
