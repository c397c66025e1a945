"""Beam search: on a tree worked by hand, against trying out every text, and its limits."""

from __future__ import annotations

import itertools

import pytest
import torch
from tiny_models import TinyCausal
from torch import Tensor

from textbook_code.inference.beam import Beams
from textbook_code.inference.generate import generate

A, B, END = 0, 1, 2
TREE = {  # text so far -> probabilities of A, B and the end
    (): (0.5, 0.4, 0.1),
    (A,): (0.3, 0.3, 0.4),
    (B,): (0.05, 0.9, 0.05),
    (A, A): (0.4, 0.3, 0.3),
    (A, B): (0.3, 0.3, 0.4),
    (B, A): (0.2, 0.2, 0.6),
    (B, B): (0.1, 0.2, 0.7),
}


def search(num_beams: int, **how: float) -> tuple[list[int], float]:
    beams = Beams(1, num_beams, 3, stop_tokens=[END], pad_id=9, **how)  # type: ignore[arg-type]
    texts: list[tuple[int, ...]] = [()] * num_beams
    while not beams.done:
        log_probs = torch.tensor([TREE.get(text, (1 / 3,) * 3) for text in texts]).log()
        new, rows = beams.advance(log_probs)
        texts = [(*texts[row], token) for row, token in zip(rows.tolist(), new.tolist(), strict=True)]
    text, score = beams.best()
    return text[0].tolist(), float(score.exp())


def test_one_beam_is_greedy_and_two_find_the_likelier_text() -> None:
    # greedy goes to A (0.5) and ends (0.4): 0.20; B B end has 0.4 · 0.9 · 0.7 = 0.252
    assert search(1, length_penalty=0.0) == ([A, END, 9], pytest.approx(0.2))
    assert search(2, length_penalty=0.0) == ([B, B, END], pytest.approx(0.252))


def test_the_penalty_divides_the_logarithm_by_the_length_with_the_stop_token() -> None:
    text, score = search(2, length_penalty=1.0)
    assert text == [B, B, END]
    assert score == pytest.approx(0.252 ** (1 / 3))
    # short texts are favoured, but the shortest is kept only where it is among the best K
    assert search(2, length_penalty=-2.0) == ([A, END, 9], pytest.approx(0.2**4))
    assert search(3, length_penalty=-2.0) == ([END, 9, 9], pytest.approx(0.1))


def scored(model: TinyCausal, prompt: Tensor, text: tuple[int, ...], penalty: float) -> float:
    with torch.no_grad():
        logits = model(torch.cat([prompt, torch.tensor([text])], 1))
    log_probs = logits.log_softmax(-1)[0, prompt.size(1) - 1 : -1]
    return float(log_probs[torch.arange(len(text)), torch.tensor(text)].sum()) / len(text) ** penalty


@pytest.mark.parametrize("penalty", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("seed", range(4))
def test_enough_beams_find_the_best_text_of_all(penalty: float, seed: int) -> None:
    V, N, stop = 4, 3, 3
    model = TinyCausal(seed, vocab_size=V, loud=0.7).eval()
    prompt = torch.tensor([[0, 2]])
    ends_early = [(*text, stop) for n in range(N) for text in itertools.product(range(stop), repeat=n)]
    full = list(itertools.product(range(stop), repeat=N))
    best = max(ends_early + full, key=lambda text: scored(model, prompt, text, penalty))
    got = generate(
        model,
        prompt,
        max_new_tokens=N,
        num_beams=V**N,
        stop_tokens=[stop],
        length_penalty=penalty,
        pad_id=-1,
    )
    assert tuple(token for token in got[0].tolist() if token >= 0) == best


@pytest.mark.parametrize("seed", range(6))
def test_more_beams_never_keep_a_text_that_is_not_theirs(seed: int) -> None:
    """The score that the search reports is the score of the text that it gives."""
    model = TinyCausal(seed, vocab_size=11, loud=0.8).eval()
    prompt = torch.tensor([[1, 5, 3]])
    for num_beams in (2, 4, 7):
        beams = Beams(1, num_beams, 8, stop_tokens=[2, 6], length_penalty=0.9, pad_id=-1)
        texts = prompt.expand(num_beams, -1)
        while not beams.done:
            with torch.no_grad():
                new, rows = beams.advance(model(texts)[:, -1].log_softmax(-1))
            texts = torch.cat([texts[rows], new[:, None]], 1)
        text, score = beams.best()
        tokens = tuple(token for token in text[0].tolist() if token >= 0)
        assert float(score) == pytest.approx(scored(model, prompt, tokens, 0.9), abs=1e-5)
        assert (beams.scores.diff() <= 0).all(), "the best comes first"
        got = generate(
            model, prompt, max_new_tokens=8, num_beams=num_beams, stop_tokens=[2, 6], length_penalty=0.9
        )
        assert got[0].tolist() == list(tokens)


def test_two_hypotheses_are_never_the_same() -> None:
    model = TinyCausal(0, vocab_size=5, loud=0.5).eval()
    beams = Beams(1, 4, 5)
    texts = torch.tensor([[1]]).expand(4, -1)
    while not beams.done:
        with torch.no_grad():
            new, rows = beams.advance(model(texts)[:, -1].log_softmax(-1))
        texts = torch.cat([texts[rows], new[:, None]], 1)
        living = [
            tuple(text) for text, p in zip(texts.tolist(), beams.log_probs[0], strict=True) if p.isfinite()
        ]
        assert len(set(living)) == len(living)
    assert len(set(map(tuple, beams.ended[0].tolist()))) == 4


def test_rows_of_a_batch_do_not_mix() -> None:
    model = TinyCausal(1, loud=0.8).eval()
    prompts = torch.tensor([[5, 9], [7, 1], [2, 2]])
    how = {"max_new_tokens": 9, "num_beams": 3, "stop_tokens": [4, 8, 15], "pad_id": 0}
    together = generate(model, prompts, **how)
    for row, prompt in zip(together, prompts, strict=True):
        alone = generate(model, prompt[None], **how)[0]
        assert row[: len(alone)].equal(alone)
        assert (row[len(alone) :] == 0).all()


def test_an_ended_search_takes_no_more() -> None:
    beams = Beams(1, 2, 1)
    beams.advance(torch.zeros(2, 5))
    with pytest.raises(ValueError, match="log_probs: expected none, the search ended after 1 tokens"):
        beams.advance(torch.zeros(2, 5))
    with pytest.raises(ValueError, match=r"log_probs: expected shape \(rows, V\) with rows = 2"):
        Beams(1, 2, 1).advance(torch.zeros(3, 5))
