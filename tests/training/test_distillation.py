"""DistilBERT's triple loss against its formula, written out position by position."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from textbook_code.training.distillation import cosine_loss, distillation_loss, soft_loss
from textbook_code.training.objectives import IGNORE

B, T, V, D = 3, 7, 11, 5


def parts(seed: int = 0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return 2 * torch.randn(*shape, dtype=torch.double, generator=generator)

    targets = torch.randint(V, (B, T), generator=generator)
    targets[torch.rand(B, T, generator=generator) < 0.6] = IGNORE
    targets[0, 0] = 4
    mask = torch.arange(T) < torch.tensor([[7], [5], [6]])
    return {
        "student_logits": draw(B, T, V),
        "teacher_logits": draw(B, T, V),
        "targets": torch.where(mask, targets, IGNORE),
        "student_hidden": draw(B, T, D),
        "teacher_hidden": draw(B, T, D),
        "token_mask": mask,
    }


@given(seed=st.integers(0, 10_000), tau=st.floats(0.5, 8), at_masked=st.booleans())
def test_the_triple_loss_is_its_formula(seed: int, tau: float, at_masked: bool) -> None:
    given_ = parts(seed)
    loss = distillation_loss(**given_, temperature=tau, soft_at_masked=at_masked)
    soft, hard, cosine = [], [], []
    for b in range(B):
        for t in range(T):
            if not given_["token_mask"][b, t]:
                continue
            s, y = given_["student_logits"][b, t], int(given_["targets"][b, t])
            p = [math.exp(x / tau) for x in given_["teacher_logits"][b, t]]
            q = [math.exp(x / tau) for x in s]
            p, q = [x / sum(p) for x in p], [x / sum(q) for x in q]
            if y != IGNORE or not at_masked:
                soft.append(tau**2 * sum(a * math.log(a / c) for a, c in zip(p, q, strict=True)))
            if y != IGNORE:
                hard.append(-math.log(math.exp(s[y]) / sum(math.exp(x) for x in s)))
            h, g = given_["student_hidden"][b, t], given_["teacher_hidden"][b, t]
            cosine.append(1 - float(h @ g) / math.sqrt(float(h @ h) * float(g @ g)))
    means = [sum(values) / len(values) for values in (soft, hard, cosine)]
    assert [loss.soft.item(), loss.hard.item(), loss.cosine.item()] == pytest.approx(means, rel=1e-9)
    assert loss.total.item() == pytest.approx(5 * means[0] + 2 * means[1] + means[2], rel=1e-9)


def test_the_weights_weigh() -> None:
    loss = distillation_loss(**parts(), soft_weight=0.5, hard_weight=0.0, cosine_weight=3.0)
    torch.testing.assert_close(loss.total, 0.5 * loss.soft + 3 * loss.cosine)


def test_gradients_are_those_of_the_cross_entropy_with_soft_targets() -> None:
    given_ = parts()
    student, teacher = given_["student_logits"][0].requires_grad_(), given_["teacher_logits"][0]
    (ours,) = torch.autograd.grad(soft_loss(student, teacher, temperature=3.0), student)
    cross_entropy = -((teacher / 3).softmax(-1) * (student / 3).log_softmax(-1)).sum(-1).mean() * 9
    (theirs,) = torch.autograd.grad(cross_entropy, student)
    torch.testing.assert_close(ours, theirs)
    # (q − p) τ / n: of one size, whatever the temperature, for logits that are small beside it
    torch.testing.assert_close(ours, ((student / 3).softmax(-1) - (teacher / 3).softmax(-1)) * 3 / T)


def test_a_student_that_is_its_teacher_loses_nothing_softly() -> None:
    given_ = parts()
    given_ |= {"student_logits": given_["teacher_logits"], "student_hidden": given_["teacher_hidden"]}
    loss = distillation_loss(**given_)
    assert loss.soft.item() == pytest.approx(0, abs=1e-12)
    assert loss.cosine.item() == pytest.approx(0, abs=1e-12)
    assert cosine_loss(given_["student_hidden"][0], -given_["student_hidden"][0]).item() == pytest.approx(2)


def test_no_gradient_reaches_the_teacher_and_none_comes_from_padding() -> None:
    given_ = parts()
    for name in ("student_logits", "teacher_logits", "student_hidden", "teacher_hidden"):
        given_[name].requires_grad_()
    distillation_loss(**given_).total.backward()
    assert given_["teacher_logits"].grad is None
    assert given_["teacher_hidden"].grad is None
    for name in ("student_logits", "student_hidden"):
        touched = given_[name].grad.abs().sum(-1) > 0
        assert torch.equal(touched, given_["token_mask"])


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"student_logits": torch.ones(T, V)}, ValueError, r"student_logits: expected shape \(B, T, V\)"),
        ({"teacher_logits": torch.ones(B, T, V + 1)}, ValueError, r"teacher_logits: expected .* V = 11"),
        ({"teacher_hidden": torch.ones(B, T, D + 1)}, ValueError, r"teacher_hidden: expected .* D = 5"),
        ({"token_mask": torch.ones(B, T)}, TypeError, "token_mask: expected a bool tensor"),
        ({"token_mask": torch.ones(B, 2).bool()}, ValueError, r"token_mask: expected shape .*got \(3, 2\)"),
        ({"targets": torch.full((B, T), IGNORE)}, ValueError, "targets: expected at least one position"),
        ({"temperature": 0.0}, ValueError, "temperature: expected a positive number, got 0.0"),
        ({"soft_weight": -1.0}, ValueError, r"soft_weight: expected 0 or more, got -1.0"),
        ({"cosine_weight": float("nan")}, ValueError, "cosine_weight: expected 0 or more, got nan"),
        ({"token_mask": torch.zeros(B, T).bool()}, ValueError, "student: expected logits of at least one"),
    ],
)
def test_bad_input(changes, error, message: str) -> None:
    with pytest.raises(error, match=message):
        distillation_loss(**(parts() | changes))


def test_bad_input_of_the_cosine() -> None:
    with pytest.raises(ValueError, match="student: expected hidden states of at least one position"):
        cosine_loss(torch.ones(0, D), torch.ones(0, D))
