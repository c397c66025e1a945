"""Exercises of the page on a tiny model.

Book: tiny-model
"""

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from textbook_code.data.people import model_input
from textbook_code.exercises.framework import Exercise
from textbook_code.exercises.judge import as_number, number_problem, slips_of, tensor_problem
from textbook_code.models.vision.tiny_vit import TinyViTConfig

_SHAPES = (
    (4, 64, 4, 128),
    (4, 32, 2, 256),
    (8, 128, 4, 128),
    (8, 64, 2, 512),
    (4, 96, 1, 96),
    (2, 16, 8, 16),
)


def _check_peak(answer: Callable[..., Any]) -> str | None:
    for patch, D, H, F in _SHAPES:
        config = TinyViTConfig(patch_size=patch, d_model=D, num_heads=H, d_ff=F)
        N = config.num_patches
        what = f"N = {N}, D = {D}, H = {H}, F = {F}"
        got, x, S = answer(N, D, H, F), N * D, H * N * N
        if problem := number_problem(got, config.peak_activation_bytes, what):
            slips = {
                "the scores are counted for one head only": max(
                    3072 + x, 4 * x + N * N, 2 * x + 2 * N * N, 3 * x + N * N, 2 * x + N * F
                ),
                "the softmax reads the scores and writes as many weights: both live": max(
                    3072 + x, 4 * x + S, 2 * x + S, 3 * x + S, 2 * x + N * F
                ),
                "the residual x waits for its sum: it lives all the time": max(
                    3072, 3 * x + S, x + 2 * S, 2 * x + S, x + N * F
                ),
                "the values wait for the weights: they live through the softmax": max(
                    3072 + x, 4 * x + S, x + 2 * S, 3 * x + S, 2 * x + N * F
                ),
                "that is the sum of all, as if nothing were ever freed": 3072 + x + 4 * x + 2 * S + N * F,
            }
            value = as_number(got)
            return next((f"{what}: {said}." for said, wrong in slips.items() if value == wrong), problem)
    return None


def _check_fold(answer: Callable[..., Any]) -> str | None:
    for inputs, outputs in ((5, 3), (4, 4), (7, 2)):
        eps = 1e-5
        weight, bias = torch.randn(outputs, inputs).double(), torch.randn(outputs).double()
        gamma, beta, mean = torch.randn(3, inputs).double()
        var = torch.rand(inputs).double() * 1e-4  # small, so that eps counts
        result = answer(*(p.clone() for p in (weight, bias, gamma, beta, mean, var)), eps)
        what = f"{inputs} inputs, {outputs} outputs"
        if not isinstance(result, tuple) or len(result) != 2:
            return "expected the pair (weight, bias)."
        a = gamma / (var + eps).sqrt()
        c = beta - a * mean
        if problem := tensor_problem(result[0], weight * a, f"{what}: weight"):
            without = weight * gamma / var.sqrt()
            if isinstance(result[0], Tensor) and result[0].shape == without.shape:
                if torch.allclose(result[0], without):
                    return f"{what}: weight: ε is missing under the root."
                if torch.allclose(result[0], weight * gamma / (var + eps)):
                    return f"{what}: weight: divided by the variance and not by its root."
            return problem
        if problem := tensor_problem(result[1], bias + weight @ c, f"{what}: bias"):
            scaled = bias + (weight * a) @ c
            if isinstance(result[1], Tensor) and result[1].shape == scaled.shape:
                if torch.allclose(result[1], scaled):
                    return f"{what}: bias: c goes through the old weight, which a has not scaled yet."
                if torch.allclose(result[1], bias + c[: len(bias)]):
                    return f"{what}: bias: c is added as it is; it has to go through the weight."
            return problem
    return None


def _check_split(answer: Callable[..., Any]) -> str | None:
    groups = [f"concept-{i % 400}" for i in range(2000)]
    first = answer(list(groups))
    if not isinstance(first, list) or len(first) != len(groups) or not {*first} <= {"train", "test"}:
        return 'expected a list with "train" or "test" for each of the groups.'
    sides: dict[str, set[str]] = {}
    for group, side in zip(groups, first, strict=True):
        sides.setdefault(group, set()).add(side)
    if torn := [group for group, both in sides.items() if len(both) > 1]:
        return f"{len(torn)} of 400 concepts are on both sides, such as {torn[0]!r}."
    share = sum(both == {"test"} for both in sides.values()) / len(sides)
    if not 0.1 < share < 0.3:
        return f"{share:.0%} of the concepts are in the test; a fifth was asked for."
    shuffled = list(groups)
    random.Random(1).shuffle(shuffled)
    later = [*shuffled[:700], "a-new-concept"]
    moved = [g for g, side in zip(later, answer(later), strict=True) if g in sides and {side} != sides[g]]
    if moved:
        return f"{moved[0]!r} changes sides when other pictures come, go or stand in another order."
    return None


def _check_standard_error(answer: Callable[..., Any]) -> str | None:
    g = torch.Generator().manual_seed(3)
    for count, views in ((80, 1), (50, 12)):
        known = torch.rand(count, generator=g) < 0.75
        right, groups = known.repeat_interleave(views), [f"g{i // views}" for i in range(count * views)]
        p = known.double().mean().item()
        expected, naive = (p * (1 - p) / count) ** 0.5, (p * (1 - p) / (count * views)) ** 0.5
        got = as_number(answer(right.clone(), list(groups), 4000))
        what = f"{count} groups of {views}"
        if got is None:
            return f"{what}: expected a number."
        if abs(got - expected) > 0.12 * expected:
            if abs(got - naive) < 0.12 * naive:
                return (
                    f"{what}: got {got:.4f}: pictures are drawn; twelve views of one thing count as twelve."
                )
            if abs(got - expected / count**0.5) < 0.15 * expected / count**0.5:
                return f"{what}: got {got:.4f}: the spread of the draws is the error; do not divide it again."
            return f"{what}: got {got:.4f}, expected about {expected:.4f}."
    return None


def _check_input(answer: Callable[..., Any]) -> str | None:
    for n in (1, 3):
        images = torch.randint(0, 256, (n, 32, 32, 3), dtype=torch.uint8)
        got, want = answer(images.clone()), model_input(images)
        if problem := tensor_problem(got, want, f"{n} pictures"):
            if isinstance(got, Tensor) and got.shape == want.shape:
                if torch.allclose(got.float().flatten().sort()[0], want.flatten().sort()[0], atol=1e-5):
                    return f"{n} pictures: the right numbers in the wrong places: `view` moves no axis."
                wrapped = (images - 128).permute(0, 3, 1, 2).float() / 128
                if torch.allclose(got.float(), wrapped):
                    return f"{n} pictures: bytes have no sign: 100 − 128 is 228 before it becomes a float."
            return problem
    return None


_PEAK = """
    def peak_bytes(N, D, H, F):
        x = N * D  # the residual, and each of queries, keys and values
        scores = H * N * N
        return max(
            3 * 32 * 32 + x,  # the image and its patches
            4 * x + scores,  # the scores: x, q, k, v are alive
            2 * x + 2 * scores,  # the softmax: x and v wait
            3 * x + scores,  # the weighted values
            2 * x + N * F,  # the second matrix of the feed-forward network
        )
"""

_FOLD = """
    def fold(weight, bias, gamma, beta, mean, var, eps):
        a = gamma / (var + eps).sqrt()
        c = beta - a * mean
        return weight * a, bias + weight @ c
"""

_SPLIT = """
    import hashlib

    def split(groups):
        def place(group):
            return int(hashlib.sha256(group.encode()).hexdigest(), 16) % 100
        return ["test" if place(group) < 20 else "train" for group in groups]
"""

_ERROR = """
    import torch

    def standard_error(right, groups, draws):
        names = sorted(set(groups))
        place = torch.tensor([names.index(group) for group in groups])
        hits = torch.zeros(len(names)).index_add(0, place, right.float())
        sizes = torch.zeros(len(names)).index_add(0, place, torch.ones(len(place)))
        drawn = torch.randint(len(names), (draws, len(names)))
        return (hits[drawn].sum(1) / sizes[drawn].sum(1)).std().item()
"""

_INPUT = """
    def prepared(images):
        return (images.permute(0, 3, 1, 2).float() - 128) / 128
"""

_BUGGY_INPUT = """
    def prepared(images):
        x = (images - 128).float() / 128
        return x.view(-1, 3, 32, 32)
"""


EXERCISES = (
    Exercise(
        name="tiny-model/split",
        title="A split that does not leak",
        stars=1,
        statement="""
            Write `split(groups)`: for each picture's group, "train" or "test", a fifth of the groups in the
            test. No group may be on both sides, and which side it is on may depend on its name alone, so that
            a picture that comes later moves no other.
        """,
        answer="split",
        starter="""
            def split(groups):
                raise NotImplementedError
        """,
        solution=_SPLIT,
        wrong=(
            """
            def split(groups):
                return ["test" if i % 5 == 0 else "train" for i, _ in enumerate(groups)]
            """,
            """
            def split(groups):
                names = list(dict.fromkeys(groups))
                return ["test" if names.index(group) % 5 == 0 else "train" for group in groups]
            """,
            """
            import random

            def split(groups):
                side = {group: "test" if random.random() < 0.2 else "train" for group in groups}
                return [side[group] for group in groups]
            """,
            """
            def split(groups):
                return ["train" for group in groups]
            """,
        ),
        check=_check_split,
        hint="Take a checksum of the name, such as sha256, and look at it modulo 100.",
    ),
    Exercise(
        name="tiny-model/fold",
        title="BatchNorm into the matrix behind it",
        stars=2,
        statement=r"""
            A layer computes $W\,\mathrm{BatchNorm}(x) + b$ in evaluation. Give the weight and the bias of one
            linear map that does the same: `fold(weight, bias, gamma, beta, mean, var, eps)` returns the pair.
        """,
        answer="fold",
        starter="""
            def fold(weight, bias, gamma, beta, mean, var, eps):
                raise NotImplementedError
        """,
        solution=_FOLD,
        wrong=slips_of(
            _FOLD,
            ("(var + eps).sqrt()", "var.sqrt()"),
            ("(var + eps).sqrt()", "(var + eps)"),
            ("bias + weight @ c", "bias + (weight * a) @ c"),
            ("beta - a * mean", "beta - mean"),
            ("weight * a,", "a[:, None] * weight.T,"),
        ),
        check=_check_fold,
        hint="Write BatchNorm as a ⊙ x + c first, with its own a and c.",
    ),
    Exercise(
        name="tiny-model/find-the-bug",
        title="Find the bugs",
        stars=2,
        statement="""
            This preparation runs, and the model behind it guesses. It takes bytes, `(n, 32, 32, 3)`, and is
            to give what the model was trained on: `(n, 3, 32, 32)`, each value (rgb − 128) / 128. Mend it.
        """,
        answer="prepared",
        starter=_BUGGY_INPUT,
        solution=_INPUT,
        wrong=(
            """
            def prepared(images):
                return ((images.float() - 128) / 128).view(-1, 3, 32, 32)
            """,
            """
            def prepared(images):
                return (images - 128).permute(0, 3, 1, 2).float() / 128
            """,
            """
            def prepared(images):
                return images.permute(0, 3, 1, 2).float() / 255
            """,
            """
            def prepared(images):
                return (images.permute(0, 3, 2, 1).float() - 128) / 128
            """,
        ),
        check=_check_input,
        hint="There are two: what does a byte do below zero, and in which order do the numbers lie?",
    ),
    Exercise(
        name="tiny-model/peak-memory",
        title="The fullest moment",
        stars=2,
        statement="""
            Give the most bytes of activations alive at once for a model with BatchNorm folded and ReLU, in
            int8, one operation after another: `peak_bytes(N, D, H, F)` for images of 32 × 32 × 3. All heads
            are computed together, and no operation writes over what it reads.
        """,
        answer="peak_bytes",
        starter="""
            def peak_bytes(N, D, H, F):
                raise NotImplementedError
        """,
        solution=_PEAK,
        wrong=slips_of(
            _PEAK,
            ("scores = H * N * N", "scores = N * N"),
            ("2 * x + 2 * scores,", "2 * x + scores,"),
            ("2 * x + 2 * scores,", "x + 2 * scores,"),
            ("2 * x + N * F,", "x + N * F,"),
        ),
        check=_check_peak,
        hint="What an operation reads, what it writes, and what waits for a later one: x waits for its sum.",
    ),
    Exercise(
        name="tiny-model/standard-error",
        title="How far to trust it",
        stars=3,
        statement="""
            `right` says of each picture whether the model was right, `groups` what it shows. Write
            `standard_error(right, groups, draws)`, the standard deviation of the accuracy over so many
            bootstrap draws, in which twelve views of one person count as one person.
        """,
        answer="standard_error",
        starter="""
            import torch

            def standard_error(right, groups, draws):
                raise NotImplementedError
        """,
        solution=_ERROR,
        wrong=(
            """
            import torch

            def standard_error(right, groups, draws):
                drawn = torch.randint(len(right), (draws, len(right)))
                return right.float()[drawn].mean(1).std().item()
            """,
            """
            def standard_error(right, groups, draws):
                p = right.float().mean().item()
                return (p * (1 - p) / len(right)) ** 0.5
            """,
            *slips_of(_ERROR, (".std().item()", ".std().item() / len(names) ** 0.5")),
        ),
        check=_check_standard_error,
        hint="Draw as many groups as there are, with replacement, and take all pictures of each.",
    ),
)
