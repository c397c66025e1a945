"""Each exercise has a solution that passes, and a starter and wrong answers that do not."""

import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from textbook_code.exercises import Exercise, check, evaluate, exercises, find
from textbook_code.exercises.judge import number_problem, tensor_problem, vector_problem
from textbook_code.layers.attention import Attention
from textbook_code.models.text.bert import Bert, BertConfig

ALL = list(exercises())
WRONG = [(exercise, source) for exercise in ALL for source in exercise.wrong]


def _name(value: object) -> str | None:
    return value.name if isinstance(value, Exercise) else ""


@pytest.mark.parametrize("exercise", ALL, ids=_name)
def test_solution_passes_and_starter_fails(exercise: Exercise) -> None:
    assert check(exercise.name, evaluate(exercise, exercise.solution)), exercise.name
    starter = check(exercise.name, evaluate(exercise, exercise.starter))
    assert not starter
    assert starter.message
    assert starter.hint == exercise.hint


@pytest.mark.parametrize(("exercise", "source"), WRONG, ids=_name)
def test_wrong_answer_fails_with_a_sentence_of_its_own(exercise: Exercise, source: str) -> None:
    verdict = check(exercise.name, evaluate(exercise, source))
    assert not verdict
    # the answer runs to its end, and is refused for what it says
    assert "raised" not in verdict.message
    assert "could not be judged" not in verdict.message
    assert verdict.message.endswith(".")


@pytest.mark.parametrize("exercise", ALL, ids=_name)
def test_every_exercise_is_whole(exercise: Exercise) -> None:
    assert exercise.wrong, "at least one plausible wrong answer"
    assert exercise.page == exercise.name.split("/")[0]
    assert find(exercise.name) is exercise
    assert exercise.check_line == f'check("{exercise.name}", {exercise.answer})'
    assert exercise.solution.strip() not in exercise.statement + exercise.hint
    assert max(map(len, exercise.solution.splitlines() + exercise.starter.splitlines())) <= 110


def test_names_are_unique_and_pages_climb_to_three_stars() -> None:
    assert len({exercise.name for exercise in ALL}) == len(ALL)
    for page in ("attention", "encoder-only"):
        stars = [exercise.stars for exercise in exercises(page)]
        assert stars == sorted(stars)
        assert set(stars) == {1, 2, 3}
        assert all(exercise.page == page for exercise in exercises(page))


@pytest.mark.parametrize(
    "answer", [None, "seven", 3.0, [1, 2], torch.zeros(2), lambda: 1, lambda *a, **k: None]
)
@pytest.mark.parametrize("exercise", ALL, ids=_name)
def test_nonsense_gets_a_verdict_and_never_a_traceback(exercise: Exercise, answer: object) -> None:
    verdict = check(exercise.name, answer)
    assert not verdict
    assert len(verdict.message) > 10


def test_an_answer_that_raises_gives_its_error_and_line() -> None:
    def multi_head(*_: object) -> None:
        raise ValueError("heads do not divide")

    verdict = check("attention/multi-head", multi_head)
    assert not verdict
    assert "ValueError: heads do not divide" in verdict.message
    assert "its line" in verdict.message


def test_a_verdict_reads_as_a_sentence() -> None:
    right = check("attention/scale", lambda head_dim, q_std, k_std: 1 / (q_std * k_std * head_dim**0.5))
    assert bool(right) is True
    assert str(right) == repr(right) == "✓ attention/scale: right."
    wrong = check("attention/scale", lambda head_dim, q_std, k_std: 1.0)
    assert bool(wrong) is False
    assert str(wrong).startswith(
        "✗ attention/scale: with head_dim=64, q_std=1, k_std=1: the scores have variance 64"
    )
    assert "Hint: " in str(wrong)


def test_check_is_repeatable_and_leaves_the_random_state_alone() -> None:
    corrupt = evaluate(find("encoder-only/mask-ratio"), find("encoder-only/mask-ratio").wrong[0])
    before = torch.get_rng_state()
    first, second = check("encoder-only/mask-ratio", corrupt), check("encoder-only/mask-ratio", corrupt)
    assert first == second
    assert torch.get_rng_state().equal(before)


@pytest.mark.parametrize(
    ("name", "close"),
    [
        ("attention/scal", "attention/scale"),
        ("multi-head", "attention/multi-head"),
        ("encoder/mask-ratio", "encoder-only/mask-ratio"),
        ("nothing/like-it-at-all", "attention/by-hand"),
    ],
)
def test_an_unknown_name_lists_the_close_ones(name: str, close: str) -> None:
    with pytest.raises(KeyError) as error:
        check(name, 1)
    assert repr(name) in str(error.value)
    assert close in str(error.value)


def test_an_unknown_page_and_a_wrong_type_are_named() -> None:
    with pytest.raises(KeyError, match=r"page: got 'decoder', expected one of attention, .*encoder-only"):
        list(exercises("decoder"))
    with pytest.raises(TypeError, match="name: got int"):
        check(3, 1)  # type: ignore[arg-type]


def test_an_exercise_is_checked_when_it_is_made() -> None:
    parts = {
        "title": "",
        "statement": "",
        "answer": "x",
        "starter": "",
        "solution": "",
        "wrong": (),
        "hint": "",
    }
    with pytest.raises(ValueError, match="name: got 'lonely'"):
        Exercise(name="lonely", stars=1, check=lambda x: None, **parts)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="stars: got 4"):
        Exercise(name="a/b", stars=4, check=lambda x: None, **parts)  # type: ignore[arg-type]
    with pytest.raises(NameError, match="defines no 'x'"):
        evaluate(Exercise(name="a/b", stars=1, check=lambda x: None, **parts), "y = 1")  # type: ignore[arg-type]


def test_importing_the_exercises_does_not_import_torch() -> None:
    code = "import sys, textbook_code.exercises; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_judges_accept_and_refuse() -> None:
    assert number_problem(1.0000001, 1, "n") is None
    assert number_problem(torch.tensor(2.0), 1, "n") == "n: 2 is not right."
    assert "expected a number" in str(number_problem(True, 1, "n"))
    assert vector_problem((0.1, 0.9), [0.1, 0.9], "v") is None
    assert vector_problem(torch.tensor([0.1, 0.9]), [0.1, 0.9], "v") is None
    assert "number 2" in str(vector_problem([0.1, 0.8], [0.1, 0.9], "v"))
    assert "expected 2 numbers, got 3" in str(vector_problem([1, 2, 3], [1, 2], "v"))
    assert tensor_problem(torch.ones(2), torch.ones(2) + 1e-7, "t") is None
    assert "expected the shape (2,), got (3,)" in str(tensor_problem(torch.ones(3), torch.ones(2), "t"))
    assert "expected boolean" in str(tensor_problem(torch.ones(2), torch.ones(2) > 0, "t"))
    assert "nan" in str(tensor_problem(torch.ones(2) / 0, torch.ones(2), "t"))
    assert "the first at [1]: 2, not 1" in str(
        tensor_problem(torch.tensor([1, 2]), torch.tensor([1, 1]), "t")
    )


def test_the_counts_asked_for_are_those_of_the_layer_itself() -> None:
    count = evaluate(find("attention/count"), find("attention/count").solution)
    T, D, num_heads, num_kv_heads = 11, 48, 6, 2
    layer = Attention(D, num_heads, num_kv_heads=num_kv_heads)
    with FlopCounterMode(display=False) as flops:
        layer(torch.randn(1, T, D), need_weights=True)
    counted = count(T, D, num_heads, num_kv_heads)
    assert counted["parameters"] == sum(p.numel() for p in layer.parameters())
    assert counted["flops"] == flops.get_total_flops()


def test_the_count_of_bert_base_is_the_published_one() -> None:
    count = evaluate(find("encoder-only/count-parameters"), find("encoder-only/count-parameters").solution)
    with torch.device("meta"):
        bert = Bert(BertConfig.bert_base())
    assert count(30522, 512, 2, 768, 12, 3072) == sum(p.numel() for p in bert.parameters()) == 109_482_240


def test_streamed_attention_must_not_borrow_the_fused_kernel() -> None:
    def streamed_attention(q, k, v, block_size):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    verdict = check("attention/linear-memory", streamed_attention)
    assert not verdict
    assert "fused" in verdict.message
