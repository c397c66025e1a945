"""The parity harness: how a model is shown to compute what the published implementation computes.

A parity test builds the reference at tiny size, fills it with *loud* random weights, loads those
weights into our model, and compares outputs and gradients::

    @parity_row("bert", "masked-lm", "transformers.BertForMaskedLM", page="bert-heads")
    def test_masked_lm(parity):
        reference = loud_(transformers.BertForMaskedLM(config)).double()
        batch = ragged_batch(...)
        parity.check(
            BertForMaskedLM.from_hf, reference,
            ours=lambda m: {"logits": batch.real(m(batch.tokens, token_mask=batch.token_mask))},
            theirs=lambda r: {"logits": batch.real(r(batch.tokens, attention_mask=batch.token_mask).logits)},
        )

``parity_row`` declares the row of ``book/appendix/parity-ledger.json`` that the test fills;
``tests/conftest.py`` carries the errors seen to the build folder.

Why loud? With a library's own initialisation biases are 0, norms do nothing and scores are tiny: a
model without biases, or with two norms swapped, then computes the same numbers (measured in
``tests/models/text/test_bert_mutations.py``).
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import re
import tempfile
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
LEDGER = ROOT / "book" / "appendix" / "parity-ledger.json"
ROWS = pytest.StashKey[list[dict[str, Any]]]()  # on pytest's config: the rows of all collected tests

Outputs = dict[str, Tensor]
Forward = Callable[[Any], Outputs]
Load = Callable[[Any], Any]


# ------------------------------------------------------------------------------------------------
# The weights and the inputs


@torch.no_grad()
def loud_(model: nn.Module, *, seed: int = 0) -> nn.Module:
    """Fill every parameter so that its absence, or its being elsewhere, is heard; returns the model.

    Norm weights 1 + 0.3 z, biases 0.3 z, matrices and kernels 1.5 z / √fan_in, everything else
    (embeddings, position tables, class tokens, gates) z, with z standard normal; running means 0.3 z
    and variances 1 + 0.3 |z|. Tied parameters are filled once, where they are first met.
    """
    generator = torch.Generator().manual_seed(seed)
    filled: set[int] = set()

    def z(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like)

    for module in model.modules():
        kind = type(module).__name__
        for name, p in module.named_parameters(recurse=False):
            if id(p) in filled:
                continue
            filled.add(id(p))
            if name.endswith("bias"):
                p.copy_(0.3 * z(p))
            elif "Norm" in kind and name.endswith("weight"):
                p.copy_(1 + 0.3 * z(p))
            elif name.endswith("weight") and p.ndim >= 2 and not isinstance(module, nn.Embedding):
                fan_in = p.shape[0] if kind == "Conv1D" else p[0].numel()  # Conv1D keeps (in, out)
                p.copy_(1.5 * z(p) / fan_in**0.5)
            else:
                p.copy_(z(p))
        for name, b in module.named_buffers(recurse=False):
            if name == "running_mean":
                b.copy_(0.3 * z(b))
            elif name == "running_var":
                b.copy_(1 + 0.3 * z(b).abs())
    return model


@dataclass(frozen=True)
class Batch:
    """Tokens with ragged right padding and every segment id."""

    tokens: Tensor  # (B, T) long
    token_mask: Tensor  # (B, T) bool, True = real token
    segments: Tensor  # (B, T) long

    def real(self, x: Tensor) -> Tensor:
        """Keep the positions of real tokens: (B, T, ...) -> (N, ...)."""
        return x[self.token_mask]


def ragged_batch(
    vocab_size: int,
    lengths: Sequence[int],
    *,
    max_len: int | None = None,
    num_segments: int = 2,
    pad_id: int = 0,
    seed: int = 1,
) -> Batch:
    """One row for each length; no real token is ``pad_id``, and each row has segments 0, 1, … in runs."""
    generator = torch.Generator().manual_seed(seed)
    T = max_len or max(lengths)
    length = torch.tensor(lengths)[:, None]  # (B, 1)
    token_mask = torch.arange(T)[None, :] < length
    tokens = torch.randint(vocab_size - 1, token_mask.shape, generator=generator)
    tokens += tokens >= pad_id
    segments = torch.arange(T)[None, :] * num_segments // length  # real tokens get 0 … num_segments - 1
    return Batch(
        tokens.masked_fill(~token_mask, pad_id), token_mask, segments.clamp(max=num_segments - 1).contiguous()
    )


# ------------------------------------------------------------------------------------------------
# The comparison


class ParityError(AssertionError):
    """The two models differ; ``error`` is the largest error seen and ``tensor`` the place it was seen in."""

    def __init__(self, message: str, *, error: float, tensor: str) -> None:
        super().__init__(message)
        self.error = error
        self.tensor = tensor


@dataclass(frozen=True)
class Errors:
    """The largest errors seen; ``backward`` is None where no gradient was compared."""

    forward: float
    backward: float | None


def error_of(got: Tensor, want: Tensor, name: str = "tensor") -> float:
    """max |got - want| / (1 + |want|): at most t exactly where an allclose with atol = rtol = t holds."""
    if got.shape != want.shape:
        raise ParityError(
            f"{name}: ours has shape {tuple(got.shape)}, the reference {tuple(want.shape)}",
            error=float("inf"),
            tensor=name,
        )
    if got.dtype != want.dtype:
        raise ParityError(
            f"{name}: ours is {got.dtype}, the reference {want.dtype}", error=float("inf"), tensor=name
        )
    if got.numel() == 0:
        raise ParityError(f"{name}: nothing to compare, the tensor is empty", error=float("inf"), tensor=name)
    got, want = got.detach(), want.detach()
    error = float(((got - want).abs() / (1 + want.abs())).max())
    return error if error == error else float("inf")  # NaN is the largest error


def compare(
    load: Load,
    reference: nn.Module,
    *,
    ours: Forward,
    theirs: Forward,
    tolerance_forward: float = 1e-10,
    tolerance_backward: float | None = 1e-10,
    zero_gradient: Sequence[str] = (),
    mutate: Callable[[Any], contextlib.AbstractContextManager[Any]] | None = None,
    seed: int = 7,
) -> Errors:
    """Load the reference's weights into our model, compare outputs and gradients, or raise ParityError.

    ``ours`` and ``theirs`` run a model and name the outputs to compare (of real tokens only). The
    gradients are those of one random weighted sum of all outputs. They are mapped by ``load`` itself:
    a copy of the reference that holds its gradients as weights is loaded into our model, so the same
    rules carry both.

    Args:
        zero_gradient: patterns (full match, our names) of the parameters whose gradient is zero by
            mathematics, such as ``.*k_proj.bias``: softmax ignores a shift common to a row. They are
            checked to be zero. Any other zero gradient is an error: nothing tested that parameter.
        mutate: a context that plants a bug in our model, for the tests of this harness.
    """
    reference.eval()
    model = load(reference).eval()
    with mutate(model) if mutate else contextlib.nullcontext():
        got = ours(model)
        want = theirs(reference)
        if got.keys() != want.keys():
            raise ValueError(
                f"ours names the outputs {sorted(got)}, theirs {sorted(want)}: name the same ones"
            )
        forward = {name: error_of(got[name], want[name], name) for name in want}
        for name, x in want.items():
            if float(x.detach().abs().max()) < 1e-3:
                raise ValueError(f"{name}: the reference's output is all zero and would prove nothing")
        worst_forward = _judge("forward", forward, tolerance_forward)
        if tolerance_backward is None:
            return Errors(worst_forward, None)
        for m, outputs in ((model, got), (reference, want)):
            m.zero_grad(set_to_none=True)
            _weighted_sum(outputs, seed).backward()
    gradients = dict(load(_with_gradients_as_weights(reference)).named_parameters())
    backward: dict[str, float] = {}
    unseen = []
    for name, p in model.named_parameters():
        grad = torch.zeros_like(p) if p.grad is None else p.grad
        expected = gradients[name].detach()
        backward[name] = error_of(grad, expected, name)
        largest = float(expected.abs().max())
        if any(re.fullmatch(pattern, name) for pattern in zero_gradient):
            backward[name] = max(backward[name], largest, float(grad.abs().max()))
        elif largest < 1e-6:
            unseen.append(name)
    worst_backward = _judge("gradient of", backward, tolerance_backward)
    if unseen:
        raise ValueError(
            f"the outputs compared do not depend on {', '.join(unseen)}: compare an output that does, "
            "or, where the gradient is zero by mathematics, name it in zero_gradient"
        )
    return Errors(worst_forward, worst_backward)


def _weighted_sum(outputs: Outputs, seed: int) -> Tensor:
    total: Tensor | float = 0.0
    generator = torch.Generator().manual_seed(seed)
    for name in sorted(outputs):
        x = outputs[name]
        total = total + (torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x) * x).sum()
    assert isinstance(total, Tensor)
    return total


@torch.no_grad()
def _with_gradients_as_weights(reference: nn.Module) -> nn.Module:
    gradients = [p.grad for p in reference.parameters()]
    reference.zero_grad(set_to_none=True)
    twin = copy.deepcopy(reference)  # keeps the ties
    for p, grad in zip(twin.parameters(), gradients, strict=True):
        p.copy_(torch.zeros_like(p) if grad is None else grad)
    return twin


def _judge(what: str, errors: Mapping[str, float], tolerance: float) -> float:
    """The largest error, or a ParityError that lists the worst tensors first."""
    ranked = sorted(errors.items(), key=lambda item: -item[1])
    name, worst = ranked[0]
    if worst > tolerance:
        wrong = [f"  {what} {n}: error {e:.3g}" for n, e in ranked if e > tolerance]
        shown = "\n".join(wrong[:8] + ([f"  … and {len(wrong) - 8} more"] if len(wrong) > 8 else []))
        raise ParityError(
            f"{len(wrong)} of {len(errors)} tensors differ by more than {tolerance:g}:\n{shown}",
            error=worst,
            tensor=name,
        )
    return worst


def check_loading(load: Load, make_reference: Callable[[], nn.Module], *, tied: Collection[str] = ()) -> None:
    """The weights load strictly, both ways.

    Every number of ours comes from the reference (two references with other weights give two models
    that agree nowhere); a tensor too many or too few on the reference's side raises and names it;
    ``to_hf_state_dict`` gives back the reference's state, bit for bit, less those of its keys that
    are ``tied`` to another.
    """
    first, second = loud_(make_reference(), seed=1), loud_(make_reference(), seed=2)
    model, other = load(first), load(second)
    theirs = dict(other.named_parameters())
    same = [name for name, p in model.named_parameters() if bool((p == theirs[name]).any())]
    assert not same, f"not (wholly) loaded from the reference: {same}"

    extra = copy.deepcopy(first)
    extra.register_parameter("surplus_weight", nn.Parameter(torch.ones(2)))
    with pytest.raises(Exception, match="surplus_weight"):
        load(extra)

    one_of_each = {re.sub(r"\.\d+\.", ".i.", name): name for name, _ in first.named_parameters()}
    for name in [name for name in one_of_each.values() if name not in tied]:
        missing = copy.deepcopy(first)
        owner, _, leaf = name.rpartition(".")
        setattr(missing.get_submodule(owner), leaf, None)
        with pytest.raises(Exception, match="no tensor"):
            load(missing)

    back, state = model.to_hf_state_dict(), first.state_dict()
    for name in tied:
        del state[name]
    assert back.keys() == state.keys(), f"keys that differ: {sorted(back.keys() ^ state.keys())}"
    changed = [name for name in state if not torch.equal(back[name], state[name])]
    assert not changed, f"changed on the way back: {changed}"


# ------------------------------------------------------------------------------------------------
# The ledger


@dataclass(frozen=True)
class Row:
    """One line of the parity ledger: what is compared with what, and how closely."""

    id: str
    model: str
    head: str
    reference: str
    dtype: str
    tolerance_forward: float
    tolerance_backward: float | None
    weights: str
    page: str

    @property
    def reference_version(self) -> str:
        if "/" in self.reference:  # a repository whose numbers are kept in tests/golden
            return golden_commit(self.reference.rpartition(".")[0])
        return version(self.reference.partition(".")[0]).partition("+")[0]  # 2.14.1+cpu is 2.14.1

    def entry(self, test: str) -> dict[str, Any]:
        """The row as the ledger holds it."""
        return {**asdict(self), "reference_version": self.reference_version, "test": test}


def golden_commit(repository: str) -> str:
    """The commit that made the golden numbers of a repository, `owner/name`."""
    for path in sorted((ROOT / "tests" / "golden").glob("*.npz")):
        with np.load(path) as file:
            meta = json.loads(str(file["meta"]))
        if meta["repository"] == repository:
            return str(meta["commit"])[:7]
    raise ValueError(f"reference: no file in tests/golden was made by {repository!r}")


def parity_row(
    model: str,
    head: str,
    reference: str,
    *,
    page: str,
    dtype: str = "float64",
    weights: str = "random",
    tolerance: float | None = None,
    backward: bool = True,
) -> pytest.MarkDecorator:
    """Declare the ledger row that a test fills by calling ``parity.check`` or ``parity.record``.

    Args:
        reference: the published implementation, ``package.Class``; its version comes from the package. Or
            ``owner/name.Class`` of a repository, whose numbers lie in ``tests/golden``.
        page: label of the section of the book that shows the row.
        tolerance: forward and backward; 1e-10 in float64, 1e-4 in float32 when not given.
    """
    if weights not in ("random", "real"):
        raise ValueError(f"weights: expected 'random' or 'real', got {weights!r}")
    tolerance = tolerance or {"float64": 1e-10, "float32": 1e-4}[dtype]
    row = Row(
        id=f"{model}/{head}",
        model=model,
        head=head,
        reference=reference,
        dtype=dtype,
        tolerance_forward=tolerance,
        tolerance_backward=tolerance if backward else None,
        weights=weights,
        page=page,
    )
    return pytest.mark.parity_row(row)


@dataclass
class Parity:
    """The fixture ``parity``: compares at the row's tolerances and remembers the largest errors seen."""

    row: Row
    seen: list[Errors] = field(default_factory=list)

    def check(self, load: Load, reference: nn.Module, **kwargs: Any) -> Errors:
        """``compare`` at the row's dtype and tolerances."""
        dtype = next(reference.parameters()).dtype
        if dtype != getattr(torch, self.row.dtype):
            raise ValueError(f"the row {self.row.id} says {self.row.dtype}, the reference is {dtype}")
        try:
            errors = compare(
                load,
                reference,
                tolerance_forward=self.row.tolerance_forward,
                tolerance_backward=self.row.tolerance_backward,
                **kwargs,
            )
        except ParityError as failed:
            self.seen.append(Errors(failed.error, None))
            raise
        self.seen.append(errors)
        return errors

    def record(
        self, got: Mapping[str, Tensor], want: Mapping[str, Tensor], *, gradients: bool = False
    ) -> None:
        """Compare tensors that the test has computed itself (a function, a layer, real weights)."""
        errors = {name: error_of(got[name], want[name], name) for name in want}
        tolerance = self.row.tolerance_backward if gradients else self.row.tolerance_forward
        assert tolerance is not None, f"{self.row.id} declares no tolerance for gradients"
        worst = max(errors.values())
        self.seen.append(Errors(0.0, worst) if gradients else Errors(worst, None))
        _judge("gradient of" if gradients else "forward", errors, tolerance)

    def result(self) -> dict[str, Any]:
        """What this run saw, as the book's build reads it."""
        backward = [e.backward for e in self.seen if e.backward is not None]
        return {
            "forward_error": max(e.forward for e in self.seen),
            "backward_error": max(backward) if backward else None,
            "tolerance": self.row.tolerance_forward,
            "tolerance_backward": self.row.tolerance_backward,
            "reference_version": self.row.reference_version,
        }


def build_file(name: str) -> Path:
    """A file of the build folder: ``_build`` at the root, or where TEXTBOOK_CODE_BUILD says."""
    return Path(os.environ.get("TEXTBOOK_CODE_BUILD", ROOT / "_build")) / name


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def write_json(path: Path, data: Any) -> None:
    """Write to a temporary name in the same folder, then move into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as f:
        f.write(json.dumps(data, indent=2, ensure_ascii=False, allow_nan=True) + "\n")
    Path(f.name).chmod(0o644)
    Path(f.name).replace(path)


def declared_rows(items: Iterable[pytest.Item]) -> list[dict[str, Any]]:
    """The rows that collected tests declare, sorted by id; two tests may not declare the same."""
    rows: dict[str, dict[str, Any]] = {}
    for item in items:
        for marker in item.iter_markers("parity_row"):
            row = marker.args[0].entry(item.nodeid)
            if row["id"] in rows:
                both = f"{rows[row['id']]['test']} and {row['test']}"
                raise pytest.UsageError(f"two tests declare the parity row {row['id']}: {both}")
            rows[row["id"]] = row
    return [rows[key] for key in sorted(rows)]


def file_of(row: Mapping[str, Any]) -> str:
    return str(row["test"]).partition("::")[0]


def ledger_problems(
    declared: Sequence[Mapping[str, Any]],
    committed: Sequence[Mapping[str, Any]],
    *,
    was_collected: Callable[[str], bool],
) -> list[str]:
    """How the tests' rows and the committed ones differ.

    A committed row is missed only where its test's file was collected (or is gone), so that a run of
    some files can be checked too. Another version of the reference is no difference: it is shown with
    the errors.
    """
    ours, theirs = ({row["id"]: row for row in rows} for rows in (declared, committed))
    problems = []
    if [row["id"] for row in committed] != sorted(theirs):
        problems.append("the rows are not sorted by id, or one appears twice")
    for key, row in ours.items():
        if key not in theirs:
            problems.append(f"{key} is declared by {row['test']} and not in the ledger")
            continue
        for name in row:
            if name != "reference_version" and row[name] != theirs[key].get(name):
                problems.append(
                    f"{key}: {name} is {row[name]!r} in the test, {theirs[key].get(name)!r} in the ledger"
                )
        problems += [
            f"{key}: the ledger has an unknown field {name!r}" for name in theirs[key].keys() - row.keys()
        ]
    for key, row in theirs.items():
        if key not in ours and was_collected(file_of(row)):
            problems.append(f"{key} is in the ledger, and no test declares it (it named {row['test']})")
    return problems


def was_asked_for(config: pytest.Config, file: str) -> bool:
    """Whether this run collected the whole of ``file``, or would have if it were still there."""
    path = ROOT / file
    asked = (Path(config.invocation_params.dir, arg) for arg in config.args)
    return not path.exists() or any(path.is_relative_to(place) for place in asked)
