"""Weights from files and from other implementations: all of them, or an error.

Book: bert-weights
"""

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

Rule = tuple[str, str | None]
"""Their name and ours, with `{fields}` in common; ours is None where a tensor is not needed."""

_FIELD = re.compile(r"\\\{(\w+)\\\}")


@dataclass(frozen=True)
class Packed:
    """A rule for one tensor of theirs that holds several of ours, one below the other.

    Read from right to left it stacks them again, bit for bit.

    Args:
        theirs: a template, as in a plain rule.
        ours: the templates of its parts, in their order; each part takes as many rows as ours has.
        transposed: whether they store matrices as (in, out), where `nn.Linear` has (out, in); a
            vector is not affected.

    Book: gpt-weights
    """

    theirs: str
    ours: tuple[str, ...]
    transposed: bool = False

    def unpack(self, tensor: Tensor, sizes: Sequence[int]) -> list[Tensor]:
        """Cut their tensor into ours, of `sizes` rows.

        Book: gpt-weights
        """
        return list((tensor.t() if self.transposed else tensor).split(list(sizes)))

    def pack(self, parts: Sequence[Tensor]) -> Tensor:
        """Put ours together as theirs.

        Book: gpt-weights
        """
        whole = parts[0] if len(parts) == 1 else torch.cat(list(parts))
        return whole.t() if self.transposed else whole


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


def _match(
    key: str, rules: Sequence[tuple[re.Pattern[str], Rule | Packed]]
) -> tuple[Rule | Packed | None, dict[str, str]]:
    """The first rule that matches the whole key, and what its fields stand for."""
    for pattern, rule in rules:
        if match := pattern.fullmatch(key):
            return rule, match.groupdict()
    return None, {}


def rename(
    state_dict: Mapping[str, Tensor],
    rules: Iterable[Rule | Packed],
    *,
    expected: Mapping[str, Tensor],
    tied: Mapping[str, str] | None = None,
) -> dict[str, Tensor]:
    """Rename every tensor by the rules, or raise and say all that is wrong.

    A rule is a pair of templates, `("layer.{i}.query.{p}", "blocks.{i}.q_proj.{p}")`; the first
    that matches a whole key is used. A rule whose second half is None names a tensor that is
    knowingly left out; a `Packed` rule cuts one tensor into several.

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
    compiled = [(_pattern(rule.theirs if isinstance(rule, Packed) else rule[0]), rule) for rule in rules]
    wrong: list[str] = []
    renamed: dict[str, Tensor] = {}
    for key, tensor in state_dict.items():
        if tied and key in tied:
            twin = state_dict.get(tied[key])
            if twin is None or not torch.equal(twin, tensor):
                wrong.append(f"{key}: expected it to equal {tied[key]}, to which this model ties it")
            continue
        rule, fields = _match(key, compiled)
        if rule is None:
            wrong.append(f"{key}: no rule names it")
            continue
        templates = rule.ours if isinstance(rule, Packed) else rule[1:]
        names = [template.format(**fields) for template in templates if template is not None]
        known = [name for name in names if name in expected and name not in renamed]
        for name in names:
            if name in renamed:
                wrong.append(f"{key}: a second tensor for {name}")
            elif name not in expected:
                wrong.append(f"{key}: the model has no {name}")
        parts = [tensor] * len(names)
        if names and len(known) == len(names):
            shape = _packed_shape([expected[name] for name in names], rule)
            if tensor.shape != shape:
                for_all = ", ".join(names)
                wrong.append(f"{key}: expected shape {shape} for {for_all}, got {tuple(tensor.shape)}")
            elif isinstance(rule, Packed):
                parts = rule.unpack(tensor, [expected[name].size(0) for name in names])
        renamed |= dict(zip(names, parts, strict=True))
    wrong += [f"{ours}: no tensor for it" for ours in expected if ours not in renamed]
    if wrong:
        shown = "\n  ".join(wrong[:20]) + (f"\n  and {len(wrong) - 20} more" if len(wrong) > 20 else "")
        raise WeightError(f"state_dict: {len(wrong)} of its tensors do not fit the model\n  {shown}")
    return renamed


def _packed_shape(parts: Sequence[Tensor], rule: Rule | Packed) -> tuple[int, ...]:
    """The shape of the tensor of theirs that holds these of ours."""
    shape = tuple(parts[0].shape)
    if len(parts) > 1:
        shape = (sum(part.size(0) for part in parts), *shape[1:])
    return shape[::-1] if isinstance(rule, Packed) and rule.transposed else shape


def invert(state_dict: Mapping[str, Tensor], rules: Iterable[Rule | Packed]) -> dict[str, Tensor]:
    """Rename our tensors to their names: the rules, read from right to left.

    Raises:
        WeightError: a tensor of ours that no rule produces, or a part without which theirs is not
            whole.

    Book: bert-weights
    """
    compiled: list[tuple[re.Pattern[str], Rule | Packed]] = []
    for rule in rules:
        templates = rule.ours if isinstance(rule, Packed) else rule[1:]
        compiled += [(_pattern(template), rule) for template in templates if template is not None]
    renamed: dict[str, Tensor] = {}
    for key, tensor in state_dict.items():
        found, fields = _match(key, compiled)
        if found is None:
            raise WeightError(f"{key}: no rule leads to it")
        if not isinstance(found, Packed):
            renamed[found[0].format(**fields)] = tensor
            continue
        names = [template.format(**fields) for template in found.ours]
        if lacking := [name for name in names if name not in state_dict]:
            raise WeightError(f"{key}: expected {', '.join(lacking)} beside it")
        renamed[found.theirs.format(**fields)] = found.pack([state_dict[name] for name in names])
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
