"""The harness itself, and the ledger: the committed rows are those that the tests declare."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from parity import (
    LEDGER,
    ROWS,
    Batch,
    ParityError,
    check_loading,
    compare,
    error_of,
    ledger_problems,
    loud_,
    parity_row,
    ragged_batch,
    read_json,
    was_asked_for,
    write_json,
)
from torch import Tensor, nn

# ------------------------------------------------------------------------------------------------
# The ledger


def test_the_ledger_holds_the_rows_that_the_tests_declare(request):
    config = request.config
    problems = ledger_problems(
        config.stash[ROWS], read_json(LEDGER) or [], was_collected=lambda file: was_asked_for(config, file)
    )
    if problems:
        pytest.fail("\n".join([*problems, "`make ledger` writes the ledger anew; look at what it changes"]))


def rows(*ids: str, file: str = "tests/test_a.py", **changes: object) -> list[dict[str, object]]:
    marks = [parity_row(*i.split("/"), "torch.nn.Linear", page="attention").args[0] for i in ids]
    return [{**row.entry(f"{file}::test_{row.head}"), **changes} for row in marks]


def test_a_ledger_that_agrees():
    assert ledger_problems(rows("a/x", "a/y"), rows("a/x", "a/y"), was_collected=lambda file: True) == []
    newer = rows("a/x", reference_version="99.0")
    assert ledger_problems(newer, rows("a/x"), was_collected=lambda file: True) == []


def test_a_ledger_that_differs_says_how():
    def problems(declared, committed, collected=True):
        return "\n".join(ledger_problems(declared, committed, was_collected=lambda file: collected))

    assert "a/y is declared by tests/test_a.py::test_y and not in the ledger" in problems(
        rows("a/x", "a/y"), rows("a/x")
    )
    assert "a/y is in the ledger, and no test declares it" in problems(rows("a/x"), rows("a/x", "a/y"))
    assert problems(rows("a/x"), rows("a/x", "a/y"), collected=False) == ""
    assert "a/x: tolerance_forward is 1e-10 in the test, 0.01 in the ledger" in problems(
        rows("a/x"), rows("a/x", tolerance_forward=1e-2)
    )
    assert "a/x: the ledger has an unknown field 'surplus'" in problems(rows("a/x"), rows("a/x", surplus=1))
    assert "not sorted" in problems(rows("a/x", "a/y"), rows("a/y", "a/x"))
    assert "appears twice" in problems(rows("a/x"), rows("a/x", "a/x"))


def test_a_row_knows_its_tolerances_and_version():
    row = parity_row("gpt", "logits", "torch.nn.Linear", page="gpt", dtype="float32", backward=False).args[0]
    assert (row.id, row.tolerance_forward, row.tolerance_backward) == ("gpt/logits", 1e-4, None)
    assert row.reference_version == torch.__version__.partition("+")[0]
    with pytest.raises(ValueError, match="weights: expected 'random' or 'real', got 'fake'"):
        parity_row("gpt", "logits", "torch.nn.Linear", page="gpt", weights="fake")


PLUMBING = """
    import pytest, torch
    from parity import parity_row

    @parity_row("toy", "good", "torch.nn.Linear", page="attention")
    def test_good(parity):
        x = torch.zeros(2, dtype=torch.float64)
        parity.record({"x": x}, {"x": x + 1e-12})
        parity.record({"x": x}, {"x": x + 3e-12})
        parity.record({"x": x}, {"x": x}, gradients=True)

    @parity_row("toy", "bad", "torch.nn.Linear", page="attention")
    def test_bad(parity):
        parity.record({"x": torch.zeros(2)}, {"x": torch.ones(2)})

    @parity_row("toy", "idle", "torch.nn.Linear", page="attention")
    def test_idle(parity):
        pass

    @pytest.mark.slow
    @parity_row("toy", "skipped", "torch.nn.Linear", page="attention")
    def test_skipped(parity):
        pytest.skip("no network")

    def test_mutation(request):
        request.node.user_properties.append(("mutation", {"bug": {"error": 1.5, "caught": True}}))

    def test_without_row(parity):
        pass
"""


@pytest.mark.parametrize("workers", [0, 2])
def test_rows_and_errors_reach_the_files(tmp_path, workers):
    """A run of a small suite, in one process and on xdist's workers."""
    tests = tmp_path / "tests"
    tests.mkdir()
    for name in ("conftest.py", "parity.py"):
        shutil.copy(Path(__file__).with_name(name), tests)
    (tests / "test_toy.py").write_text(textwrap.dedent(PLUMBING))
    (tmp_path / "pytest.ini").write_text(
        "[pytest]\npythonpath = tests\naddopts = --import-mode=importlib\nmarkers = slow: slow\n"
    )
    stale = tmp_path / "_build" / "parity.json"
    write_json(stale, {"toy/gone": {"forward_error": 0.0}})

    def run(*args: str) -> str:
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *args, "tests"]
        env = {key: value for key, value in os.environ.items() if key != "TEXTBOOK_CODE_BUILD"}
        return subprocess.run(
            command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False
        ).stdout

    if not workers:
        run("--update-ledger", "--collect-only", "-m", "not slow")
        ledger = json.loads((tmp_path / "book/appendix/parity-ledger.json").read_text())
        assert [row["id"] for row in ledger] == ["toy/bad", "toy/good", "toy/idle", "toy/skipped"]
        assert ledger[1]["test"] == "tests/test_toy.py::test_good"
        assert not (tmp_path / "_build/parity-mutations.json").exists()
    output = run("-n", str(workers))
    counts = re.sub(r"\d+ warnings?, ", "", output)  # other plugins' business
    assert "4 failed, 2 passed" in counts or "3 failed, 2 passed, 1 error" in counts, output
    assert "the test declares the parity row toy/idle and compares nothing" in output
    assert "the parity row toy/skipped may not be skipped: no network" in output
    assert "the fixture `parity` needs a row" in output
    seen = json.loads(stale.read_text())
    assert seen.keys() == {"toy/bad", "toy/good"}
    assert seen["toy/good"]["forward_error"] == pytest.approx(3e-12)
    assert seen["toy/good"]["backward_error"] == 0
    assert seen["toy/bad"]["forward_error"] == 0.5
    mutations = json.loads((tmp_path / "_build/parity-mutations.json").read_text())
    assert mutations == {"bug": {"error": 1.5, "caught": True}}


# ------------------------------------------------------------------------------------------------
# The weights and the inputs


def test_loud_weights():
    model = nn.ModuleDict(
        {
            "linear": nn.Linear(400, 300),
            "conv": nn.Conv2d(16, 200, 5),
            "norm": nn.LayerNorm(5000),
            "batch": nn.BatchNorm1d(5000),
            "embed": nn.Embedding(300, 50),
        }
    )
    model.register_parameter("class_token", nn.Parameter(torch.zeros(1, 1, 5000)))
    assert loud_(model) is model
    state = model.state_dict()

    def near(name: str, mean: float, std: float) -> None:
        assert float(state[name].mean()) == pytest.approx(mean, abs=0.05), name
        assert float(state[name].std()) == pytest.approx(std, rel=0.1), name

    near("linear.weight", 0, 1.5 / 20)
    near("linear.bias", 0, 0.3)
    near("conv.weight", 0, 1.5 / 20)
    near("norm.weight", 1, 0.3)
    near("norm.bias", 0, 0.3)
    near("batch.running_mean", 0, 0.3)
    near("batch.running_var", 1 + 0.3 * (2 / torch.pi) ** 0.5, 0.3 * (1 - 2 / torch.pi) ** 0.5)
    assert float(state["batch.running_var"].min()) > 0
    near("embed.weight", 0, 1)
    near("class_token", 0, 1)


def test_tied_weights_are_filled_once_and_stay_tied():
    model = nn.ModuleDict({"embed": nn.Embedding(30, 50), "out": nn.Linear(50, 30, bias=False)})
    model["out"].weight = model["embed"].weight
    loud_(model)
    assert model["out"].weight is model["embed"].weight
    assert float(model["embed"].weight.detach().std()) == pytest.approx(
        1, rel=0.1
    )  # an embedding's, not a matrix's


def test_a_ragged_batch():
    batch = ragged_batch(11, (7, 3, 5), max_len=8, num_segments=3, pad_id=4)
    assert isinstance(batch, Batch)
    assert batch.tokens.shape == batch.token_mask.shape == batch.segments.shape == (3, 8)
    assert batch.token_mask.sum(1).tolist() == [7, 3, 5]
    assert bool((batch.tokens[~batch.token_mask] == 4).all())
    assert bool((batch.tokens[batch.token_mask] != 4).all())
    assert int(batch.tokens.min()) >= 0 and int(batch.tokens.max()) < 11
    for segments, mask in zip(batch.segments, batch.token_mask, strict=True):
        assert sorted(set(segments[mask].tolist())) == [0, 1, 2]
    assert batch.real(torch.zeros(3, 8, 2)).shape == (15, 2)


# ------------------------------------------------------------------------------------------------
# The comparison


@pytest.mark.parametrize("tolerance", [1e-3, 1e-6])
def test_the_error_means_what_allclose_means(tolerance):
    want = torch.tensor([0.0, 1.0, -50.0], dtype=torch.float64)
    for factor in (0.9, 1.1):
        got = want + factor * tolerance * (1 + want.abs())
        assert (error_of(got, want) <= tolerance) == torch.allclose(got, want, atol=tolerance, rtol=tolerance)


def test_what_cannot_be_compared_is_an_infinite_error():
    x = torch.zeros(2, 3)
    assert error_of(x + float("nan"), x) == float("inf")
    for other, message in [
        (torch.zeros(3, 2), r"y: ours has shape \(3, 2\), the reference \(2, 3\)"),
        (x.double(), r"y: ours is torch.float64, the reference torch.float32"),
    ]:
        with pytest.raises(ParityError, match=message) as caught:
            error_of(other, x, "y")
        assert caught.value.error == float("inf")
    with pytest.raises(ParityError, match="y: nothing to compare"):
        error_of(x[:0], x[:0], "y")


class Toy(nn.Module):
    """Two layers; ``unused`` is a parameter that no output depends on, ``flat`` one that cannot matter."""

    def __init__(self, *, unused: bool = False, flat: bool = False) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 5), nn.Linear(5, 2)
        self.unused = nn.Parameter(torch.zeros(2)) if unused else None
        self.flat = nn.Parameter(torch.zeros(1)) if flat else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(self.first(x).tanh())
        return y if self.flat is None else (y + self.flat).log_softmax(-1)  # a shift of all does nothing


def load_toy(reference: Toy) -> Toy:
    ours = Toy(unused=reference.unused is not None, flat=reference.flat is not None).double()
    ours.load_state_dict(reference.state_dict())
    return ours


X = torch.randn(7, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def run(model: Toy) -> dict[str, Tensor]:
    return {"y": model(X)}


def test_equal_models_pass_and_their_errors_are_returned():
    errors = compare(load_toy, loud_(Toy()).double(), ours=run, theirs=run)
    assert errors.forward == 0 and errors.backward == 0
    errors = compare(load_toy, loud_(Toy()).double(), ours=run, theirs=run, tolerance_backward=None)
    assert errors.backward is None


def test_a_wrong_output_is_named_with_its_error():
    def wrong(model: Toy) -> dict[str, Tensor]:
        return {"y": model(X) + 1e-6}

    with pytest.raises(
        ParityError, match=r"1 of 1 tensors .* more than 1e-10:\n  forward y: error \d\.\d+e-07"
    ):
        compare(load_toy, loud_(Toy()).double(), ours=wrong, theirs=run)


def test_a_wrong_gradient_is_named_the_worst_first():
    def wrong(model: Toy) -> dict[str, Tensor]:
        return {"y": model.second(model.first(X).tanh().detach())}  # right value, no way back

    with pytest.raises(ParityError, match=r"2 of 4 tensors differ") as caught:
        compare(load_toy, loud_(Toy()).double(), ours=wrong, theirs=run)
    assert caught.value.tensor.startswith("first.")
    assert "gradient of first.weight: error" in str(caught.value)


def test_a_parameter_that_nothing_tests_is_an_error():
    reference = loud_(Toy(unused=True)).double()
    with pytest.raises(ValueError, match="the outputs compared do not depend on unused"):
        compare(load_toy, reference, ours=run, theirs=run)


def test_a_gradient_that_is_zero_by_mathematics_must_be_named_and_be_zero():
    reference = loud_(Toy(flat=True)).double()
    with pytest.raises(ValueError, match="do not depend on flat"):
        compare(load_toy, reference, ours=run, theirs=run)
    compare(load_toy, reference, ours=run, theirs=run, zero_gradient=["flat"])
    with pytest.raises(ParityError, match=r"gradient of second\.bias"):
        compare(load_toy, reference, ours=run, theirs=run, zero_gradient=["flat", r"second\.bias"])


def test_outputs_that_prove_nothing_are_refused():
    reference = loud_(Toy()).double()

    def silent(model: Toy) -> dict[str, Tensor]:
        return {"y": 0 * model(X)}

    with pytest.raises(ValueError, match="y: the reference's output is all zero"):
        compare(load_toy, reference, ours=silent, theirs=silent)
    with pytest.raises(ValueError, match=r"ours names the outputs \['z'\], theirs \['y'\]"):
        compare(load_toy, reference, ours=lambda m: {"z": m(X)}, theirs=run)


class ToyWithFormat(Toy):
    def to_hf_state_dict(self) -> dict[str, Tensor]:
        return self.state_dict()


def strictly(reference: Toy, *, strict: bool = True, skip: str = "") -> ToyWithFormat:
    ours = ToyWithFormat()
    theirs = {key: value for key, value in reference.state_dict().items() if key != skip}
    wrong = (theirs.keys() ^ ours.state_dict().keys()) - {skip}
    if strict and wrong:
        raise ValueError(f"no tensor or no rule for {wrong}")
    ours.load_state_dict(theirs, strict=False)
    return ours


def test_loading_that_is_not_strict_is_caught():
    check_loading(strictly, Toy)
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        check_loading(lambda r: strictly(r, strict=False), Toy)

    def forgets(reference: Toy) -> ToyWithFormat:
        ours = strictly(reference)
        nn.init.zeros_(ours.first.bias)
        return ours

    with pytest.raises(AssertionError, match=r"not \(wholly\) loaded from the reference: \['first.bias'\]"):
        check_loading(forgets, Toy)

    class Scaled(ToyWithFormat):
        def to_hf_state_dict(self) -> dict[str, Tensor]:
            return {key: 2 * value for key, value in self.state_dict().items()}

    def scales(reference: Toy) -> ToyWithFormat:
        ours = strictly(reference)
        ours.__class__ = Scaled
        return ours

    with pytest.raises(AssertionError, match=r"changed on the way back: \['first.weight', "):
        check_loading(scales, Toy)
