"""Exercises of the page on contexts longer than those trained on.

Book: longer-contexts
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from textbook_code.exercises.framework import Exercise
from textbook_code.exercises.judge import number_problem, tensor_problem
from textbook_code.layers.positions import NTKScaling, RotaryPositions, YarnScaling, alibi_slopes, rotate


def _check_alibi_window(answer: Callable[..., Any]) -> str | None:
    slopes = alibi_slopes(8).tolist()
    for slope, share in [*((m, 0.99) for m in slopes), (0.25, 0.9), (0.05, 0.5), (0.7, 0.1)]:
        exact = -math.log(1 - share) / slope
        expected, what = math.ceil(exact), f"slope {slope:g}, a share of {share:g}"
        got = answer(slope, share)
        if problem := number_problem(got, expected, what, rel=1e-9):
            slips = {
                "that is the distance of the last of them; the nearest key has distance 0": expected - 1,
                "a whole number of keys is asked for, rounded up": exact,
                "that is the share which lies beyond them": math.ceil(-math.log(share) / slope),
            }
            for slip, value in slips.items():
                if value != expected and number_problem(got, value, "", rel=1e-9) is None:
                    return f"{what}: {slip}."
            return problem
    return None


def _check_unseen_turns(answer: Callable[..., Any]) -> str | None:
    for head_dim, theta, context in ((64, 1e5, 8192), (128, 1e4, 2048), (128, 5e5, 8192), (16, 1e4, 64)):
        turns = context * RotaryPositions(head_dim, theta=theta).frequencies() / (2 * math.pi)
        expected = int((turns < 1).sum())
        what = f"heads of {head_dim}, theta={theta:g}, a context of {context}"
        got = answer(head_dim, theta, context)
        if problem := number_problem(got, expected, what, rel=1e-9):
            slips = {
                "those are the planes that come round": head_dim // 2 - expected,
                "that counts planes which turn by less than one radian": int((turns * 2 * math.pi < 1).sum()),
                "each plane is two channels, and was counted twice": 2 * expected,
            }
            for slip, value in slips.items():
                if value != expected and number_problem(got, value, "", rel=1e-9) is None:
                    return f"{what}: {slip}."
            return problem
    return None


def _check_ntk_theta(answer: Callable[..., Any]) -> str | None:
    for head_dim, theta, factor in ((128, 1e4, 4.0), (64, 1e5, 8.0), (16, 1e4, 2.0), (96, 5e5, 1.0)):
        slowed = NTKScaling(factor)(RotaryPositions(head_dim, theta=theta).frequencies())
        expected = float(slowed[1]) ** (-head_dim / 2)  # ω'_1 = θ'^(-2/Dh)
        what = f"heads of {head_dim}, theta={theta:g}, factor={factor:g}"
        got = answer(head_dim, theta, factor)
        if problem := number_problem(got, expected, what, rel=1e-6):
            slips = {
                "with that base the slowest plane is slowed by less than the factor": theta * factor,
                "the planes number Dh/2, and the last one is Dh/2 - 1": theta
                * factor ** (head_dim / 2 / (head_dim / 2 - 2)),
                "that base turns faster, not slower": theta * factor ** (-head_dim / (head_dim - 2)),
            }
            for slip, value in slips.items():
                if not math.isclose(value, expected) and number_problem(got, value, "", rel=1e-6) is None:
                    return f"{what}: {slip}."
            return problem
    return None


def _check_yarn(answer: Callable[..., Any]) -> str | None:
    for head_dim, theta, factor, original, fast, slow in (
        (64, 1e5, 4.0, 8192, 32.0, 1.0),
        (128, 1e4, 16.0, 4096, 32.0, 1.0),
        (96, 1e4, 2.0, 8192, 20.0, 2.0),
    ):
        omega = RotaryPositions(head_dim, theta=theta).frequencies()
        scaling = YarnScaling(factor, original, fast, slow)
        expected = scaling(omega)
        what = f"heads of {head_dim}, theta={theta:g}, factor={factor:g}, trained on {original}"
        got = answer(head_dim, theta, factor, original, fast, slow)
        if not (isinstance(got, tuple | list) and len(got) == 2):
            return f"{what}: expected a pair of frequencies and a factor on cosines and sines."
        slowed, gain = got
        if problem := tensor_problem(slowed, expected, f"{what}, frequencies", tol=1e-9):
            if isinstance(slowed, Tensor) and slowed.shape == expected.shape:
                if torch.allclose(slowed.double(), omega / factor):
                    return f"{what}: every plane is slowed; the fast ones are to be left alone."
                if torch.allclose(slowed.double(), omega + omega / factor - expected):
                    return f"{what}: the fast planes are slowed and the slow ones are left alone."
            return problem
        if problem := number_problem(gain, scaling.gain, f"{what}, the factor on cosines and sines"):
            if number_problem(gain, scaling.gain**2, "") is None:
                return f"{what}: that is the factor on the scores, the square of the one asked for."
            return problem
    return None


def _check_self_extend(answer: Callable[..., Any]) -> str | None:
    for T, head_dim, theta, window, group in ((40, 8, 1e4, 12, 4), (33, 6, 500.0, 8, 3), (20, 4, 1e4, 32, 4)):
        q, k = torch.randn(2, T, head_dim, dtype=torch.float64)
        t = torch.arange(T)
        distance = t[:, None] - t
        far = t[:, None] // group - t // group + window - window // group
        expected = _scores_at(q, k, theta, torch.where(distance < window, distance, far))
        what = f"{T} places, window={window}, group={group}"
        got = answer(q.clone(), k.clone(), theta, window, group)
        if isinstance(got, Tensor) and got.shape == (T, T) and got.is_floating_point():
            got = got.tril()  # later keys are masked anyway
        if problem := tensor_problem(got, expected.tril(), what, tol=1e-6):
            slips = {
                "the distances jump at the window's edge; far queries are to be moved on": torch.where(
                    distance < window, distance, t[:, None] // group - t // group
                ),
                "near keys are grouped too; within the window distances are exact": far,
                "the edge belongs to the far keys: at the distance of the window itself they are grouped": (
                    torch.where(distance <= window, distance, far)
                ),
            }
            for slip, at in slips.items():
                other = _scores_at(q, k, theta, at).tril()
                if (
                    isinstance(got, Tensor)
                    and got.shape == other.shape
                    and torch.allclose(got.double(), other)
                ):
                    return f"{what}: {slip}."
            return problem
    return None


def _scores_at(q: Tensor, k: Tensor, theta: float, distance: Tensor) -> Tensor:
    """The scaled scores of a query (T, Dh) and a key at these distances (T, T), pair by pair."""
    T, Dh = q.shape
    cos, sin = RotaryPositions(Dh, theta=theta)(distance.flatten())
    turned = rotate(q.repeat_interleave(T, 0)[None, None], cos, sin)[0, 0].view(T, T, Dh)
    return (turned * k).sum(-1) / Dh**0.5


_YARN = """
import math
import torch

def yarn(head_dim, theta, factor, original, fast, slow):
    def plane(turns):
        return head_dim / 2 * math.log(original / (2 * math.pi * turns)) / math.log(theta)

    a, b = math.floor(plane(fast)), math.ceil(plane(slow))
    i = torch.arange(head_dim // 2, dtype=torch.float64)
    omega = theta ** (-2 * i / head_dim)
    slowed = ((i - a) / (b - a)).clamp(0, 1)  # how much of the slower one
    gain = 0.1 * math.log(factor) + 1
    return (1 - slowed) * omega + slowed * omega / factor, gain
"""

_SELF_EXTEND = """
import torch

def turn(x, positions, theta):  # (T, Dh)
    Dh = x.shape[-1]
    omega = theta ** (-torch.arange(0, Dh, 2, dtype=torch.float64) / Dh)
    angle = positions[:, None] * omega
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)

def self_extend(q, k, theta, window, group):
    t = torch.arange(q.shape[0])
    near = turn(q, t, theta) @ turn(k, t, theta).T
    moved = t // group + window - window // group
    far = turn(q, moved, theta) @ turn(k, t // group, theta).T
    distance = t[:, None] - t
    return torch.where(distance < window, near, far) / q.shape[-1] ** 0.5
"""

EXERCISES = (
    Exercise(
        name="longer-contexts/alibi-window",
        title="How far an ALiBi head looks",
        stars=1,
        statement=r"""
            All keys have the same content and there are as many as one likes. Write how many of the nearest
            keys, the one at distance 0 included, hold at least the share `share` of the weight of a head
            with the slope `slope`. Which slope of a model with eight heads is the first whose window at
            99 % is longer than 1,000?
        """,
        answer="window",
        starter="""
            import math

            def window(slope, share):
                raise NotImplementedError
        """,
        solution="""
            import math

            def window(slope, share):
                return math.ceil(-math.log(1 - share) / slope)
        """,
        wrong=(
            """
            import math

            def window(slope, share):
                return -math.log(1 - share) / slope
            """,
            """
            import math

            def window(slope, share):
                return math.ceil(-math.log(1 - share) / slope) - 1
            """,
            """
            import math

            def window(slope, share):
                return math.ceil(-math.log(share) / slope)
            """,
        ),
        check=_check_alibi_window,
        hint="The weights are a geometric series; how much of its sum do the first n terms hold?",
    ),
    Exercise(
        name="longer-contexts/unseen-turns",
        title="Hands that never came round",
        stars=1,
        statement=r"""
            Count the planes of a rotary head that make less than one turn in the context trained on, from
            `head_dim`, `theta` and `context`. How many are there in LLaMA 1 ($D_h = 128$, $\theta = 10^4$,
            2,048 tokens), and in SmolLM2 ($D_h = 64$, $\theta = 10^5$, 8,192 tokens)?
        """,
        answer="unseen",
        starter="""
            import math

            def unseen(head_dim, theta, context):
                raise NotImplementedError
        """,
        solution="""
            import math

            def unseen(head_dim, theta, context):
                speeds = [theta ** (-2 * i / head_dim) for i in range(head_dim // 2)]
                return sum(context * speed / (2 * math.pi) < 1 for speed in speeds)
        """,
        wrong=(
            """
            def unseen(head_dim, theta, context):
                speeds = [theta ** (-2 * i / head_dim) for i in range(head_dim // 2)]
                return sum(context * speed < 1 for speed in speeds)
            """,
            """
            import math

            def unseen(head_dim, theta, context):
                speeds = [theta ** (-2 * i / head_dim) for i in range(head_dim // 2)]
                return sum(context * speed / (2 * math.pi) >= 1 for speed in speeds)
            """,
        ),
        check=_check_unseen_turns,
        hint="A plane that turns by ω radians a token has turned by context · ω radians; a turn is 2π.",
    ),
    Exercise(
        name="longer-contexts/ntk-theta",
        title="The base that keeps one end and moves the other",
        stars=2,
        statement=r"""
            Write the base $\theta'$ for which the fastest plane keeps its speed and the slowest one becomes
            `factor` times slower. What is it for LLaMA 1 and a context four times as long?
        """,
        answer="ntk_theta",
        starter="""
            def ntk_theta(head_dim, theta, factor):
                raise NotImplementedError
        """,
        solution="""
            def ntk_theta(head_dim, theta, factor):
                return theta * factor ** (head_dim / (head_dim - 2))
        """,
        wrong=(
            """
            def ntk_theta(head_dim, theta, factor):
                return theta * factor
            """,
            """
            def ntk_theta(head_dim, theta, factor):
                return theta * factor ** (-head_dim / (head_dim - 2))
            """,
            """
            def ntk_theta(head_dim, theta, factor):
                return theta * factor ** (head_dim / (head_dim - 4))
            """,
        ),
        check=_check_ntk_theta,
        hint="The last plane is i = Dh/2 - 1. Write its speed with both bases, and ask for their ratio.",
    ),
    Exercise(
        name="longer-contexts/yarn",
        title="YaRN's frequencies and its factor",
        stars=2,
        statement=r"""
            Write YaRN as it was released. The plane that makes $r$ turns in the original context $T_0$ is
            $i(r) = \frac{D_h}{2} \ln(\frac{T_0}{2\pi r}) / \ln\theta$; the ramp runs from
            $\lfloor i(\mathtt{fast}) \rfloor$, where planes are left alone, to
            $\lceil i(\mathtt{slow}) \rceil$, where they are slowed in full. Return the frequencies,
            `(Dh/2,)` in double precision, and the factor on cosines and sines.
        """,
        answer="yarn",
        starter="""
            import math
            import torch

            def yarn(head_dim, theta, factor, original, fast, slow):
                raise NotImplementedError
        """,
        solution=_YARN,
        wrong=(
            _YARN.replace(
                "(1 - slowed) * omega + slowed * omega / factor",
                "slowed * omega + (1 - slowed) * omega / factor",
            ),
            _YARN.replace("math.floor(plane(fast)), math.ceil(plane(slow))", "plane(fast), plane(slow)"),
            _YARN.replace("0.1 * math.log(factor) + 1", "(0.1 * math.log(factor) + 1) ** 2"),
            _YARN.replace(" / factor, gain", " / factor"),
        ),
        check=_check_yarn,
        hint="Both ends of the ramp are places among the planes; the share rises in a straight line between.",
    ),
    Exercise(
        name="longer-contexts/self-extend",
        title="Only distances that were seen",
        stars=3,
        statement=r"""
            Self-Extend changes no frequency. Keys nearer than `window` are scored at their exact distance.
            For the others places are counted in groups: the key at $j$ stands at $\lfloor j/G \rfloor$, the
            query at $i$ at $\lfloor i/G \rfloor + w - \lfloor w/G \rfloor$. Write the scores, divided by
            $\sqrt{D_h}$, from queries and keys `(T, Dh)` that are not turned yet; what stands above the
            diagonal is not looked at. Up to which length does a model trained on $T_0$ meet no distance that
            it has not seen?
        """,
        answer="self_extend",
        starter="""
            import torch

            def self_extend(q, k, theta, window, group):
                raise NotImplementedError
        """,
        solution=_SELF_EXTEND,
        wrong=(
            _SELF_EXTEND.replace("moved = t // group + window - window // group", "moved = t // group"),
            _SELF_EXTEND.replace("torch.where(distance < window, near, far)", "far"),
            _SELF_EXTEND.replace("distance < window", "distance <= window"),
        ),
        check=_check_self_extend,
        hint="Compute both score matrices, each with its own places, and choose between them pair by pair.",
    ),
)
