"""Balanced batches of several sources, the loss of one logit, and the measures of a model."""

from __future__ import annotations

import json

import pytest
import torch
from sklearn.metrics import balanced_accuracy_score, log_loss, roc_auc_score
from torch import Tensor, nn

from textbook_code.data.people import Pictures, augment, examination, model_input
from textbook_code.training.distillation import one_logit_soft_loss, soft_loss
from textbook_code.training.pictures import balanced_batches, examined, examined_logits, one_logit_loss


def plain(n: int, people: int, value: int, source: str) -> Pictures:
    """The first `people` of n pictures show one; people are `value` bright, the others 10 more."""
    labels = torch.arange(n) < people
    pixels = torch.full((n, 4, 36, 36), 255, dtype=torch.uint8)
    pixels[:, :3] = torch.where(labels, value, value + 10).to(torch.uint8)[:, None, None, None]
    return Pictures(pixels, labels, [f"{source}-{i // 2}" for i in range(n)], source)


SOURCES = {"many": plain(200, 190, 40, "many"), "few": plain(10, 2, 120, "few")}


def brightness(images: Tensor) -> Tensor:
    return (images * 128 + 128).mean((1, 2, 3)).round()


def test_each_source_has_its_share_and_each_answer_half_of_it():
    batch_at = balanced_batches({"many": 3, "few": 1}, SOURCES, batch_size=40, strength=0.0)
    generator = torch.Generator().manual_seed(0)
    counts: dict[int, int] = {}
    for number in range(50):
        images, labels = batch_at(number, generator)
        assert images.shape == (40, 3, 32, 32)
        assert labels.dtype == torch.float32
        bright = brightness(images)
        assert int((bright > 100).sum()) == 10, "a quarter is of the small source"
        person = (bright == 40) | (bright == 120)
        assert torch.equal(person, labels.bool())
        for value in bright.tolist():
            counts[int(value)] = counts.get(int(value), 0) + 1
    assert sum(counts.values()) == 2000
    for value, share in {40: 0.375, 50: 0.375, 120: 0.125, 130: 0.125}.items():
        assert counts[value] / 2000 == pytest.approx(share, abs=0.035)


@pytest.mark.parametrize("size", [2, 7, 64])
def test_odd_shares_fill_the_batch(size):
    batch_at = balanced_batches({"many": 0.7, "few": 0.3}, SOURCES, batch_size=size)
    images, labels = batch_at(0, torch.Generator().manual_seed(0))
    assert len(images) == len(labels) == size


def test_all_pictures_are_drawn_and_the_generator_decides():
    numbered = plain(30, 15, 0, "numbered")
    for i in range(30):
        numbered.pixels[i, :3] = 5 + 8 * i
    batch_at = balanced_batches({"a": 1}, {"a": numbered}, batch_size=32, strength=0.0)
    first = [batch_at(i, g)[0] for g in [torch.Generator().manual_seed(1)] for i in range(20)]
    again = [batch_at(9, g)[0] for g in [torch.Generator().manual_seed(1)] for _ in range(20)]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert {int(v) for x in first for v in brightness(x)} == {5 + 8 * i for i in range(30)}


def test_augmentation_is_that_of_augment():
    alone = {"few": SOURCES["few"]}
    strong = balanced_batches({"few": 1}, alone, batch_size=16)(0, torch.Generator().manual_seed(0))[0]
    weak = balanced_batches({"few": 1}, alone, batch_size=16, strength=0.0)
    assert float(strong.std((1, 2, 3)).min()) > 0, "noise"
    assert float(weak(0, torch.Generator().manual_seed(0))[0].std((2, 3)).max()) < 1e-5
    ground = torch.full((1, 3, 40, 40), 7, dtype=torch.uint8)
    clear = Pictures(torch.zeros(4, 4, 36, 36, dtype=torch.uint8), torch.arange(4) < 2, list("abcd"), "clear")
    batch_at = balanced_batches({"c": 1}, {"c": clear}, batch_size=60, backgrounds=ground, strength=0.0)
    on_ground = brightness(batch_at(0, torch.Generator().manual_seed(0))[0]) == 7
    assert 8 < int(on_ground.sum()) < 35, "a third of the transparent pictures"
    assert augment(clear, torch.Generator()).shape == (4, 3, 32, 32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shares": {}}, "shares: expected one or more sources with a positive share"),
        ({"shares": {"many": 0}}, "shares: expected one or more sources with a positive share"),
        ({"shares": {"none": 1}}, "pictures: expected those of 'none', got many, few"),
        ({"batch_size": 1}, "batch_size: expected at least 2, got 1"),
        ({"pictures": {"many": SOURCES["many"][:9]}}, "expected people and others in 'many', got one"),
    ],
)
def test_bad_batches_are_refused(arguments, message):
    good = {"shares": {"many": 1}, "pictures": SOURCES, "batch_size": 8}
    with pytest.raises(ValueError, match=message):
        balanced_batches(**(good | arguments))


class Bright(nn.Module):
    """Says yes to what is darker than 45 of 255, with a dropout that evaluation turns off."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.3))
        self.drop = nn.Dropout(0.9)

    def forward(self, images: Tensor) -> Tensor:
        return self.drop(self.scale * (45 - (images * 128 + 128).mean((1, 2, 3))))


def test_the_loss_is_the_cross_entropy_of_the_logits():
    logits, labels = torch.tensor([2.0, -1.0, 0.5]), torch.tensor([1.0, 0.0, 0.0])
    loss = one_logit_loss(lambda images: images[:, 0, 0, 0], (logits.view(3, 1, 1, 1), labels))
    expected = log_loss(labels.numpy(), torch.sigmoid(logits).double().numpy())
    assert loss.item() == pytest.approx(expected, rel=1e-6)


def test_a_model_is_examined_as_it_will_be_used():
    pictures = plain(60, 40, 40, "a")
    pictures.pixels[50:, :3] = 43  # ten others that it takes for people
    model = Bright().train()
    logits = examined_logits(model, pictures, batch_size=7)
    assert model.training, "left as it was"
    expected = model.eval()(model_input(examination(pictures)))
    torch.testing.assert_close(logits, expected)
    assert not logits.requires_grad
    found = examined(model, pictures)
    labels, yes = pictures.labels.numpy(), (logits > 0).numpy()
    assert (found["pictures"], found["groups"]) == (60, 30)
    assert found["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(labels, yes), abs=1e-4) == 0.75
    assert found["sensitivity"] == 1.0
    assert found["specificity"] == 0.5
    assert found["roc_area"] == pytest.approx(roc_auc_score(labels, logits.numpy()), abs=1e-4)
    chances = torch.sigmoid(logits).double().numpy()
    assert found["loss"] == pytest.approx(log_loss(labels, chances), abs=1e-4)
    low, high = found["interval"]
    assert 0.5 <= low < 0.75 < high <= 1
    assert json.loads(json.dumps(found)) == found
    with pytest.raises(ValueError, match="pictures: expected at least one, got none"):
        examined_logits(model, pictures[:0])


# ------------------------------------------------------------------------------------------------
# Distillation of one logit


def test_one_logit_is_two_of_which_one_is_zero():
    generator = torch.Generator().manual_seed(0)
    student, teacher = (3 * torch.randn(9, dtype=torch.float64, generator=generator) for _ in range(2))
    student.requires_grad_()
    loss = one_logit_soft_loss(student, teacher, temperature=3.0)
    p, q = torch.sigmoid(teacher / 3), torch.sigmoid(student / 3)
    by_hand = 9 * (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).mean()
    torch.testing.assert_close(loss, by_hand)
    shifted = torch.stack([torch.full((9,), 5.0, dtype=torch.float64), 5 + student], -1)
    teachers = torch.stack([torch.zeros(9, dtype=torch.float64), teacher], -1)
    torch.testing.assert_close(loss, soft_loss(shifted, teachers, temperature=3.0))
    loss.backward()
    torch.testing.assert_close(
        student.grad, 3 * (q - p).detach() / 9, msg="τ² / τ: the gradient keeps its size"
    )


def test_a_student_that_agrees_has_nothing_to_learn():
    logits = torch.tensor([-2.0, 0.0, 4.0])
    assert one_logit_soft_loss(logits, logits).item() == pytest.approx(0, abs=1e-7)
    teacher = logits.clone().requires_grad_()
    one_logit_soft_loss(logits.clone().requires_grad_(), teacher).backward()
    assert teacher.grad is None


def test_bad_logits_are_refused():
    with pytest.raises(ValueError, match=r"student: expected shape \(n\), got \(3, 1\)"):
        one_logit_soft_loss(torch.zeros(3, 1), torch.zeros(3))
    with pytest.raises(ValueError, match=r"teacher: expected shape \(n\) with n = 3, got \(2,\)"):
        one_logit_soft_loss(torch.zeros(3), torch.zeros(2))
    with pytest.raises(ValueError, match="temperature: expected a positive number, got 0"):
        one_logit_soft_loss(torch.zeros(3), torch.zeros(3), temperature=0)
