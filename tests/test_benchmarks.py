"""The benchmarks: turns are fair, ratios have their interval, and what is compared computes the same."""

import importlib.util
import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent

# the package in the checkout's `benchmarks`, without putting the source tree on the import path
_spec = importlib.util.spec_from_file_location("benchmarks", ROOT / "benchmarks" / "__init__.py")
assert _spec and _spec.loader
sys.modules["benchmarks"] = importlib.util.module_from_spec(_spec)

from benchmarks import measure, subjects, windows  # noqa: E402

RESULTS = json.loads((ROOT / "benchmarks" / "results.json").read_text("utf-8"))


@pytest.mark.parametrize("model", ["attention", "bert"])
@pytest.mark.parametrize("peer", [subjects.TRANSFORMERS, subjects.TORCH])
def test_peers_compute_what_ours_does(model: str, peer: str) -> None:
    case = subjects.Case(model, "forward", 2, 7)
    _, ours = subjects.build(case, subjects.OURS)
    work, theirs = subjects.build(case, peer)
    assert ours.std() > 0.01
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(work(), ours, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", subjects.FAMILIES)
def test_published_families_compute_what_ours_do(family: str) -> None:
    case = subjects.Case(family, "step", 2, 7)
    _, ours = subjects.build(case, subjects.OURS)
    step, theirs = subjects.build(case, subjects.PUBLISHED)
    assert ours.std() > 0.01
    assert ours.shape == (2, 7, 4096)
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)
    assert torch.isfinite(step()), "what it kept from its evaluation does not keep it from training"


def test_both_write_the_same_tokens() -> None:
    case = subjects.CASES[-3]
    assert (case.mode, case.model) == ("decode", "float32")
    _, ours = subjects.build(case, subjects.OURS)
    _, theirs = subjects.build(case, subjects.TRANSFORMERS)
    assert ours.shape == (1, 32)
    assert theirs.equal(ours)


def test_the_window_computes_what_torch_does_with_its_mask() -> None:
    _, ours = windows.build(subjects.OURS, subjects.OURS, length=700)
    work, masked = windows.build("masked", subjects.OURS, length=700)
    assert ours.shape == (1, 8, 700, 64)
    torch.testing.assert_close(ours, masked, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(work(), masked)
    for other in ("whole", "causal"):  # other functions, timed for what they cost
        work, output = windows.build(other, subjects.OURS, length=700)
        assert torch.equal(output, masked)
        assert (work() - masked).abs().max() > 0.1


@pytest.mark.parametrize("who", [subjects.OURS, subjects.TRANSFORMERS, subjects.TORCH])
def test_a_training_step_reaches_every_parameter(who: str, monkeypatch: pytest.MonkeyPatch) -> None:
    changed: list[torch.Tensor] = []
    monkeypatch.setattr(torch.Tensor, "sub_", lambda p, *_, **__: changed.append(p))
    work, _ = subjects.build(subjects.Case("bert", "step", 2, 7), who)
    assert torch.isfinite(work())
    # the tables of words, positions and segments with their norm; 16 parameters a layer, 12 where q, k
    # and v are stacked in one
    assert len(changed) == 5 + 6 * (12 if who == subjects.TORCH else 16)
    assert all(parameter.grad is None for parameter in changed)


def test_every_work_has_its_turn_in_every_round() -> None:
    calls: list[str] = []
    works = {name: (lambda name=name: calls.append(name) or sum(range(200_000))) for name in "abc"}
    seconds = measure.interleaved(works, rounds=4)
    assert {len(times) for times in seconds.values()} == {4}
    assert min(min(times) for times in seconds.values()) > 0
    timed = calls[6:]  # after two calls of each
    assert len(timed) % 12 == 0
    turn = len(timed) // 12  # calls in one turn
    rounds = [timed[i : i + 3 * turn : turn] for i in range(0, len(timed), 3 * turn)]
    assert all(sorted(order) == ["a", "b", "c"] for order in rounds)


def test_a_ratio_is_the_median_of_pairs_with_its_interval() -> None:
    draws = random.Random(1)
    slow_spells = [draws.choice((1.0, 4.0)) for _ in range(41)]  # the machine's, which meet both alike
    ours = [spell * draws.gauss(1, 0.02) for spell in slow_spells]
    peer = [spell * draws.gauss(1.2, 0.02) for spell in slow_spells]
    middle, low, high = measure.ratio(ours, peer)
    assert low < middle < high
    assert middle == pytest.approx(1.2, abs=0.03)
    assert high - low < 0.05


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_peak_memory_sees_a_tensor_that_is_gone_at_the_end() -> None:
    code = f"""
        import sys
        import torch
        sys.path.append({str(ROOT)!r})  # behind the installed package
        from benchmarks.measure import own_peak
        print(own_peak(lambda: (torch.ones(8 << 20), None)[1]))
    """
    done = subprocess.run(
        [sys.executable, "-c", dedent(code)],
        cwd=ROOT,
        env={**os.environ, **measure.GIVE_BACK},
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(done.stdout) == pytest.approx(32 << 20, rel=0.1)


def test_weights_of_pages(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "s.css").write_text("x" * 100)
    (tmp_path / "s.js").write_text("x" * 1000)
    (tmp_path / "index.html").write_text('<link rel="stylesheet" href="s.css?v=1"><img src="p.png">')
    (tmp_path / "a" / "b.html").write_text('<script src="../s.js"></script><link href="../s.css">')
    pages, shared = measure.page_weights(tmp_path)
    assert list(pages) == ["a/b.html", "index.html"]
    assert pages["index.html"] == (tmp_path / "index.html").stat().st_size
    assert shared == 1100


def test_the_import_is_light() -> None:
    assert 0 < measure.import_time("textbook_code", rounds=3) < 0.05
    assert measure.import_time("json", rounds=1) > 0


def test_the_committed_results_are_whole() -> None:
    expected = [(case.what, case.peer(who)) for case in subjects.CASES for who in case.peers]
    assert len(expected) == 8 * 2 + 8 * 2 + 2 + 3
    assert [(row["what"], row["peer"]) for row in RESULTS["rows"]] == expected
    for row in RESULTS["rows"]:
        assert row["low"] <= row["ratio"] <= row["high"], row
    assert RESULTS["command"] == "make bench"
    ratios = {  # to the faster of the peers
        case: min(row["ratio"] for row in RESULTS["rows"] if row["what"] == case.what)
        for case in subjects.CASES
        if case.mode != "window"
    }
    assert min(ratios.values()) >= 0.95, "readability costs more than five per cent somewhere"
    models = [ratio for case, ratio in ratios.items() if case.mode != "decode"]
    assert math.prod(models) ** (1 / len(models)) >= 0.99, "slower than the peers on the whole"
    assert all(ratio > 1 for case, ratio in ratios.items() if case.mode == "decode")
    window = {row["peer"]: row["ratio"] for row in RESULTS["rows"] if row["what"] == windows.WHAT}
    assert window[windows.PEERS["whole"]] >= 4, "an eighth of the keys, and not a quarter of the time"
    assert window[windows.PEERS["causal"]] >= 2
