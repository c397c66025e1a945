"""What a student learns from its teacher.

B batch, T length, V vocabulary, D d_model.

Book: distilbert-loss
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from textbook_code.layers.checks import expect_bool, expect_shape

from .objectives import IGNORE, token_loss


class DistillationLoss(NamedTuple):
    """The triple loss and its three parts, before they are weighted.

    Attributes:
        total: what is to be minimised.
        soft: cross-entropy with the teacher's softened distribution, times T².
        hard: cross-entropy with the masked tokens themselves.
        cosine: one minus the cosine between the hidden states of student and teacher.

    Book: distilbert-loss
    """

    total: Tensor
    soft: Tensor
    hard: Tensor
    cosine: Tensor


def soft_loss(student: Tensor, teacher: Tensor, *, temperature: float = 2.0) -> Tensor:
    r"""How far the student's softened distribution is from the teacher's, in nats.

    $$\mathcal L_\text{soft} = \frac{\tau^2}{n} \sum_{i=1}^{n} \mathrm{KL}\Bigl(
    \mathrm{softmax}(t_i / \tau) \,\Big\|\, \mathrm{softmax}(s_i / \tau) \Bigr)$$

    for logits t of the teacher and s of the student at n positions. It differs from the cross-entropy with
    the teacher's distribution by the entropy of that distribution, which is a constant to the student, so the
    gradients are the same; and it is 0 where both agree. The factor τ² keeps the gradient's size as τ grows.
    Paper: Hinton et al. (2015), section 2.

    Args:
        student: (n, V) logits.
        teacher: (n, V) logits; no gradient flows into them.
        temperature: τ.

    Raises:
        ValueError: shapes differ, there is no position, or the temperature is not positive.

    Book: distilbert-loss
    """
    expect_shape("student", student, "n V")
    expect_shape("teacher", teacher, "n V", n=student.size(0), V=student.size(1))
    if not len(student):
        raise ValueError("student: expected logits of at least one position, got none")
    if not temperature > 0:
        raise ValueError(f"temperature: expected a positive number, got {temperature}")
    ours, theirs = (F.log_softmax(x / temperature, dim=-1) for x in (student, teacher.detach()))
    return F.kl_div(ours, theirs, log_target=True, reduction="batchmean") * temperature**2


def one_logit_soft_loss(student: Tensor, teacher: Tensor, *, temperature: float = 2.0) -> Tensor:
    r"""`soft_loss` of two answers that share one logit, yes against no.

    A logit z is the difference of two, so that the softened distribution is that of $(0, z)$,

    $$\mathrm{softmax}(0, z / \tau) = \bigl(1 - \sigma(z / \tau),\; \sigma(z / \tau)\bigr).$$

    Args:
        student: (n,) logits.
        teacher: (n,) logits; no gradient flows into them.
        temperature: τ.

    Raises:
        ValueError: as `soft_loss`.

    Book: person-distill
    """
    expect_shape("student", student, "n")
    expect_shape("teacher", teacher, "n", n=student.size(0))
    two = [torch.stack([torch.zeros_like(z), z], dim=-1) for z in (student, teacher)]
    return soft_loss(two[0], two[1], temperature=temperature)


def cosine_loss(student: Tensor, teacher: Tensor) -> Tensor:
    r"""One minus the cosine of the angle between two hidden states, averaged over n positions.

    $$\mathcal L_\text{cos} = \frac1n \sum_{i=1}^{n} \Bigl(1 - \frac{h_i \cdot g_i}
    {\lVert h_i \rVert \, \lVert g_i \rVert}\Bigr)$$

    Args:
        student: (n, D) hidden states h of the last layer.
        teacher: (n, D) hidden states g; no gradient flows into them.

    Raises:
        ValueError: shapes differ, or there is no position.

    Book: distilbert-loss
    """
    expect_shape("student", student, "n D")
    expect_shape("teacher", teacher, "n D", n=student.size(0), D=student.size(1))
    if not len(student):
        raise ValueError("student: expected hidden states of at least one position, got none")
    return (1 - F.cosine_similarity(student, teacher.detach(), dim=-1)).mean()


def distillation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    targets: Tensor,
    *,
    student_hidden: Tensor,
    teacher_hidden: Tensor,
    token_mask: Tensor | None = None,
    temperature: float = 2.0,
    soft_weight: float = 5.0,
    hard_weight: float = 2.0,
    cosine_weight: float = 1.0,
    soft_at_masked: bool = False,
) -> DistillationLoss:
    r"""DistilBERT's triple loss.

    $$\mathcal L = \alpha_\text{soft}\, \mathcal L_\text{soft} + \alpha_\text{hard}\, \mathcal L_\text{MLM}
    + \alpha_\text{cos}\, \mathcal L_\text{cos}$$

    with the weights 5, 2 and 1 of the published training script. The hard loss is taken at the masked
    positions, the others at all real tokens. Paper: Sanh et al. (2019), section 3.

    Args:
        student_logits, teacher_logits: (B, T, V).
        targets: (B, T), the tokens behind the masks and −100 elsewhere.
        student_hidden, teacher_hidden: (B, T, D) of the last layer; both as wide as the other.
        token_mask: (B, T) bool, True = real token; all are real when left out.
        temperature: τ of the soft loss.
        soft_weight, hard_weight, cosine_weight: the three α, not negative. What weighs 0 is still reported.
        soft_at_masked: take the soft loss at the masked positions alone.

    Raises:
        TypeError: the targets are not integers, or the mask is not boolean.
        ValueError: shapes differ, a weight is negative, or no position has a target.

    Book: distilbert-loss
    """
    expect_shape("student_logits", student_logits, "B T V")
    B, T, V = student_logits.shape
    expect_shape("teacher_logits", teacher_logits, "B T V", B=B, T=T, V=V)
    expect_shape("student_hidden", student_hidden, "B T D", B=B, T=T)
    expect_shape("teacher_hidden", teacher_hidden, "B T D", B=B, T=T, D=student_hidden.size(2))
    weights = {"soft_weight": soft_weight, "hard_weight": hard_weight, "cosine_weight": cosine_weight}
    for name, weight in weights.items():
        if not weight >= 0:
            raise ValueError(f"{name}: expected 0 or more, got {weight}")
    hard = token_loss(student_logits, targets)
    real = torch.ones_like(targets, dtype=torch.bool) if token_mask is None else token_mask
    expect_bool("token_mask", real)
    expect_shape("token_mask", real, "B T", B=B, T=T)
    at = targets != IGNORE if soft_at_masked else real
    soft = soft_loss(student_logits[at], teacher_logits[at], temperature=temperature)
    cosine = cosine_loss(student_hidden[real], teacher_hidden[real])
    total = soft_weight * soft + hard_weight * hard + cosine_weight * cosine
    return DistillationLoss(total, soft, hard, cosine)
