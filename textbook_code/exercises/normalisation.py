"""Exercises of the page on normalisation.

Book: normalisation
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from textbook_code.exercises.framework import Exercise
from textbook_code.exercises.judge import as_numbers, number_problem, tensor_problem
from textbook_code.layers.attention import Attention
from textbook_code.layers.feed_forward import GatedFeedForward
from textbook_code.layers.norms import GroupNorm, LayerNorm, QKNorm, RMSNorm, rms_norm_backward
from textbook_code.layers.positions import RotaryPositions
from textbook_code.layers.residual import deepnorm, deepnorm_encoder_decoder


def _randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def _check_deepnorm(answer: Callable[..., Any]) -> str | None:
    for N, M in ((2, 0), (0, 12), (100, 0), (6, 6), (18, 5)):
        stacks = deepnorm_encoder_decoder(N, M) if N and M else (deepnorm(N or M),)
        expected = [number for stack in stacks for number in stack]
        what = f"{N} encoder layers, {M} decoder layers"
        got = as_numbers(answer(N, M))
        if got is None or len(got) != len(expected):
            return f"{what}: expected {len(expected)} numbers: α and β of each stack that is there."
        names = ("α", "β") if len(got) == 2 else ("the encoder's α", "its β", "the decoder's α", "its β")
        for name, value, wanted in zip(names, got, expected, strict=True):
            if number_problem(value, wanted, name, rel=1e-6):
                if abs(value * wanted - 1) < 1e-6:
                    return f"{what}: {name} is one over what it should be; α is above 1, and β below."
                if name == "the encoder's α" and abs(value - (3 * N) ** 0.25) < 1e-6:
                    return f"{what}: {name} has the form of the decoder's; the encoder's depends on both."
                return f"{what}: {name} = {value:.5g} is not right."
    return None


def _check_rms_backward(answer: Callable[..., Any]) -> str | None:
    for shape, eps in (((5, 7), 1e-6), ((2, 3, 11), 0.3), ((13,), 1e-2)):
        grad, x, weight = _randn(*shape), 1 + _randn(*shape), _randn(shape[-1])
        expected = rms_norm_backward(grad, x, weight, norm_eps=eps)
        got = answer(grad.clone(), x.clone(), weight.clone(), eps)
        what = f"x of shape {shape}, norm_eps={eps:g}"
        if not isinstance(got, tuple | list) or len(got) != 2:
            return f"{what}: expected two tensors, the gradients of x and of the weight."
        for name, mine, wanted in zip(("x", "the weight"), got, expected, strict=True):
            if problem := tensor_problem(mine, wanted, f"{what}, the gradient of {name}", tol=1e-8):
                return _explain_backward(mine, wanted, grad, x, weight, eps, what) or problem
    return None


def _explain_backward(
    got: Any, expected: Tensor, grad: Tensor, x: Tensor, weight: Tensor, eps: float, what: str
) -> str | None:
    if not isinstance(got, Tensor):
        return None
    r = (x.square().mean(-1, keepdim=True) + eps).sqrt()
    normed, g = x / r, grad * weight
    along = normed * (g * normed).mean(-1, keepdim=True)
    slips = {
        "the size is treated as a constant; it depends on x, too": g / r,
        "that is LayerNorm's: here no mean is taken off": (g - g.mean(-1, keepdim=True) - along) / r,
        "the weight is left out": (grad - normed * (grad * normed).mean(-1, keepdim=True)) / r,
        "it is not divided by the size": g - along,
        "the component along x is summed, not averaged": (g - normed * (g * normed).sum(-1, keepdim=True))
        / r,
        "the weight's gradient takes x, and not x normalised": (grad * x).reshape(-1, x.size(-1)).sum(0),
    }
    for said, value in slips.items():
        if value.shape == got.shape == expected.shape and torch.allclose(got.to(value), value, atol=1e-9):
            return f"{what}: {said}."
    return None


def _check_group_norm(answer: Callable[..., Any]) -> str | None:
    for shape, groups, eps in (((3, 12, 5), 4, 1e-2), ((2, 6, 3, 7), 2, 1e-5), ((5, 10), 5, 0.1)):
        x = 2 + _randn(*shape)
        with torch.no_grad():
            expected = GroupNorm(groups, shape[1], norm_eps=eps).double()(x)
        got = answer(x.clone(), groups, eps)
        what = f"x of shape {shape} in {groups} groups"
        if problem := tensor_problem(got, expected, what, tol=1e-8):
            if isinstance(got, Tensor) and got.shape == expected.shape:
                for said, value in _group_slips(x, groups, eps).items():
                    if torch.allclose(got.to(value), value, atol=1e-9):
                        return f"{what}: {said}."
            return problem
    return None


def _group_slips(x: Tensor, groups: int, eps: float) -> dict[str, Tensor]:
    B, C = x.shape[:2]
    flat = x.reshape(B, C, -1)

    def norm(y: Tensor, axes: tuple[int, ...], correction: int = 0) -> Tensor:
        variance, mean = torch.var_mean(y, axes, correction=correction, keepdim=True)
        return (y - mean) / (variance + eps).sqrt()

    by_turns = norm(flat.view(B, C // groups, groups, -1), (1, 3)).reshape(x.shape)
    return {
        "those are the statistics of each channel by itself": norm(flat, (2,)).reshape(x.shape),
        "those are the statistics of each place by itself": norm(
            flat.view(B, groups, C // groups, -1), (2,)
        ).reshape(x.shape),
        "the examples of the batch are mixed": norm(flat.view(B, groups, C // groups, -1), (0, 2, 3)).reshape(
            x.shape
        ),
        "channels are dealt out in turn; a group is made of neighbours": by_turns,
        "the variance divides by one too few": norm(flat.view(B, groups, -1), (2,), 1).reshape(x.shape),
    }


def _check_bugs(answer: Callable[..., Any]) -> str | None:
    for shape, eps, half in (((3, 5, 7), 1e-2, False), ((2, 4), 0.5, False), ((3, 101), 1e-5, True)):
        x = 3 + (300 if half else 1) * _randn(*shape)
        weight, bias = 1 + 0.3 * _randn(shape[-1]), 0.3 * _randn(shape[-1])
        if half:
            x, weight, bias = x.half(), weight.half(), bias.half()
        norm = LayerNorm(shape[-1], norm_eps=eps).to(x.dtype)
        with torch.no_grad():
            norm.weight.copy_(weight)
            norm.bias.copy_(bias)  # type: ignore[union-attr]
            expected = norm(x)
        got = answer(x.clone(), weight.clone(), bias.clone(), eps)
        what = f"x of shape {shape} in {str(x.dtype).removeprefix('torch.')}, norm_eps={eps:g}"
        if half and isinstance(got, Tensor) and got.dtype != torch.float16:
            return f"{what}: the result is {got.dtype}; it has to come back as it came."
        if problem := tensor_problem(got, expected, what, tol=4e-3 if half else 1e-9):
            return problem if half else _explain_bug(got, x, weight, bias, eps, what) or problem
    return None


def _explain_bug(got: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, what: str) -> str | None:
    mean = x.mean(-1, keepdim=True)
    for correction in (0, 1):
        variance = x.var(-1, correction=correction, keepdim=True)
        for outside in (False, True):
            size = variance.sqrt() + eps if outside else (variance + eps).sqrt()
            value = (x - mean) / size * weight + bias
            if (
                isinstance(got, Tensor)
                and got.shape == value.shape
                and torch.allclose(got.to(value), value, atol=1e-9)
            ):
                left = ["the variance divides by D - 1"] * correction + [
                    "ε stands outside the root"
                ] * outside
                return f"{what}: {' and '.join(left)}."
    return None


def _reordered_block(d_model: int, num_heads: int, d_ff: int, eps: float) -> nn.ModuleDict:
    def norm() -> RMSNorm:
        return RMSNorm(d_model, norm_eps=eps)

    attn = Attention(d_model, num_heads, bias=False, qk_norm=QKNorm(norm(), norm(), over="width"))
    parts = {"attn": attn, "attn_norm": norm(), "ffn": GatedFeedForward(d_model, d_ff), "ffn_norm": norm()}
    return nn.ModuleDict(parts).double()


def _check_reordered_block(answer: Callable[..., Any]) -> str | None:
    D, H, eps = 24, 3, 1e-2
    block = _reordered_block(D, H, 40, eps)
    for p in block.parameters():
        nn.init.normal_(p, mean=float(p.dim() == 1), std=0.3 if p.dim() == 1 else 1.5 * p.size(1) ** -0.5)
    params = {name.replace("qk_norm.", ""): p.detach() for name, p in block.named_parameters()}
    x, rotary = _randn(2, 9, D), RotaryPositions(D // H, theta=500_000.0)(torch.arange(9), torch.float64)
    parts: dict[str, Any] = dict(block.items())
    attn, ffn, first, second = (parts[name] for name in ("attn", "ffn", "attn_norm", "ffn_norm"))
    with torch.no_grad():
        h = x + first(attn(x, causal=True, rotary=rotary))
        expected = h + second(ffn(h))
        got = answer(x.clone(), dict(params), H, eps)
        what = "two texts of 9 tokens"
        if problem := tensor_problem(got, expected, what, tol=1e-8):
            if not (isinstance(got, Tensor) and got.shape == expected.shape):
                return problem
            pre = x + attn(first(x), causal=True, rotary=rotary)
            post = first(x + attn(x, causal=True, rotary=rotary))
            ahead = x + first(attn(x, rotary=rotary))
            slips = {
                "a pre-norm block": pre + ffn(second(pre)),
                "a post-norm block": second(post + ffn(post)),
                "a block that looks ahead": ahead + second(ffn(ahead)),
            }
            qk_norm, attn.qk_norm = attn.qk_norm, None
            bare = x + first(attn(x, causal=True, rotary=rotary))
            slips["a block without norms of queries and keys"] = bare + second(ffn(bare))
            attn.qk_norm = qk_norm
            unturned = x + first(attn(x, causal=True))
            slips["a block without positions"] = unturned + second(ffn(unturned))
            for slip, value in slips.items():
                if torch.allclose(got.to(value), value, atol=1e-8):
                    return f"those are the numbers of {slip}."
            return problem
    return None


_DEEPNORM = """
def constants(encoder_layers, decoder_layers):
    N, M = encoder_layers, decoder_layers
    if N and M:
        both = N**4 * M
        encoder = 0.81 * both ** (1 / 16), 0.87 * both ** (-1 / 16)
        return *encoder, (3 * M) ** 0.25, (12 * M) ** -0.25
    return (2 * (N + M)) ** 0.25, (8 * (N + M)) ** -0.25
"""

_RMS_BACKWARD = """
def backward(grad, x, weight, norm_eps):
    size = (x.square().mean(-1, keepdim=True) + norm_eps).sqrt()
    normed = x / size
    g = grad * weight
    grad_x = (g - normed * (g * normed).mean(-1, keepdim=True)) / size
    grad_weight = (grad * normed).reshape(-1, x.size(-1)).sum(0)
    return grad_x, grad_weight
"""

_GROUP_NORM = """
def group_norm(x, num_groups, norm_eps):
    groups = x.reshape(x.size(0), num_groups, -1)
    mean = groups.mean(-1, keepdim=True)
    variance = (groups - mean).square().mean(-1, keepdim=True)
    return ((groups - mean) / (variance + norm_eps).sqrt()).reshape(x.shape)
"""

_LAYER_NORM = """
import torch

def layer_norm(x, weight, bias, norm_eps):
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    mean = wide.mean(-1, keepdim=True)
    variance = wide.var(-1, keepdim=True, correction=0)
    y = (wide - mean) / (variance + norm_eps).sqrt()
    return (y * weight + bias).to(x.dtype)
"""

_BUGGY = """
import torch

def layer_norm(x, weight, bias, norm_eps):
    mean = x.mean(-1, keepdim=True)
    variance = x.var(-1, keepdim=True)
    y = (x - mean) / (variance.sqrt() + norm_eps)
    return y * weight + bias
"""

_REORDERED = """
import torch
import torch.nn.functional as F

def block(x, params, num_heads, norm_eps):
    B, T, D = x.shape
    Dh = D // num_heads

    def linear(name, u):
        return F.linear(u, params[name + ".weight"])

    def rms(name, u):
        size = (u.square().mean(-1, keepdim=True) + norm_eps).sqrt()
        return params[name + ".weight"] * u / size

    def heads(u):
        return u.view(B, T, num_heads, Dh).transpose(1, 2)

    omega = 500_000.0 ** (-torch.arange(0, Dh, 2, dtype=x.dtype) / Dh)
    angle = torch.arange(T, dtype=x.dtype)[:, None] * omega

    def turn(u):
        first, second = u.chunk(2, dim=-1)
        return torch.cat([first * angle.cos() - second * angle.sin(),
                          first * angle.sin() + second * angle.cos()], dim=-1)

    q = turn(heads(rms("attn.q_norm", linear("attn.q_proj", x))))
    k = turn(heads(rms("attn.k_norm", linear("attn.k_proj", x))))
    v = heads(linear("attn.v_proj", x))
    scores = q @ k.transpose(-2, -1) / Dh**0.5
    hidden = torch.ones(T, T, dtype=torch.bool).triu(1)
    weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
    mixed = (weights @ v).transpose(1, 2).reshape(B, T, D)
    h = x + rms("attn_norm", linear("attn.out_proj", mixed))
    wide = F.silu(linear("ffn.gate_proj", h)) * linear("ffn.up_proj", h)
    return h + rms("ffn_norm", linear("ffn.down_proj", wide))
"""


def _with(source: str, *slips: tuple[str, str]) -> tuple[str, ...]:
    return tuple(source.replace(right, slip) for right, slip in slips)


EXERCISES = (
    Exercise(
        name="normalisation/deepnorm",
        title="Constants for a deep stack",
        stars=1,
        statement=r"""
            Write DeepNorm's constants. For an encoder or a decoder alone, with 0 layers of the other, return
            $(\alpha, \beta)$ with $\alpha = (2N)^{1/4}$ and $\beta = (8N)^{-1/4}$. For an encoder of $N$
            layers with a decoder of $M$ return four numbers: the encoder's $0.81\,(N^4 M)^{1/16}$ and
            $0.87\,(N^4 M)^{-1/16}$, then the decoder's $(3M)^{1/4}$ and $(12M)^{-1/4}$. Predict first: how
            much louder does the stream get when a decoder of 12 layers is made sixteen times as deep?
        """,
        answer="constants",
        starter="""
            def constants(encoder_layers, decoder_layers):
                raise NotImplementedError
        """,
        solution=_DEEPNORM,
        wrong=_with(
            _DEEPNORM,
            ("(8 * (N + M)) ** -0.25", "(8 * (N + M)) ** 0.25"),
            (
                "encoder = 0.81 * both ** (1 / 16), 0.87 * both ** (-1 / 16)",
                "encoder = (3 * N) ** 0.25, (12 * N) ** -0.25",
            ),
            ("return *encoder, (3 * M) ** 0.25, (12 * M) ** -0.25", "return encoder"),
        ),
        check=_check_deepnorm,
        hint="The product of α and β does not depend on the depth of a stack that stands alone.",
    ),
    Exercise(
        name="normalisation/rms-backward",
        title="The gradient of RMSNorm",
        stars=2,
        statement=r"""
            Derive and write the gradients of $y = \gamma \odot x / \sqrt{\overline{x^2} + \varepsilon}$:
            given the gradient at $y$, `(…, D)`, return those of `x`, `(…, D)`, and of `weight`, `(D,)`, the
            latter summed over all tokens. Without autograd.
        """,
        answer="backward",
        starter="""
            def backward(grad, x, weight, norm_eps):
                raise NotImplementedError
        """,
        solution=_RMS_BACKWARD,
        wrong=_with(
            _RMS_BACKWARD,
            ("(g - normed * (g * normed).mean(-1, keepdim=True)) / size", "g / size"),
            ("(g - normed", "(g - g.mean(-1, keepdim=True) - normed"),
            ("g = grad * weight", "g = grad"),
            (".mean(-1, keepdim=True)) / size", ".sum(-1, keepdim=True)) / size"),
            ("(grad * normed)", "(grad * x)"),
        ),
        check=_check_rms_backward,
        hint="The size depends on every component: the quotient rule leaves two terms.",
    ),
    Exercise(
        name="normalisation/group-norm",
        title="Whose mean is it?",
        stars=2,
        statement=r"""
            Write GroupNorm without scale and shift, for `x` of shape `(B, C, …)` with any number of axes
            behind the channels. Neighbouring channels make a group. How many means are there for images of
            shape `(32, 64, 56, 56)` in 32 groups, and how many for BatchNorm?
        """,
        answer="group_norm",
        starter="""
            def group_norm(x, num_groups, norm_eps):
                raise NotImplementedError
        """,
        solution=_GROUP_NORM,
        wrong=(
            """
            def group_norm(x, num_groups, norm_eps):
                flat = x.flatten(2) if x.dim() > 2 else x[..., None]
                mean = flat.mean(-1, keepdim=True)
                variance = flat.var(-1, keepdim=True, correction=0)
                return ((flat - mean) / (variance + norm_eps).sqrt()).reshape(x.shape)
            """,
            """
            def group_norm(x, num_groups, norm_eps):
                groups = x.reshape(x.size(0), num_groups, -1)
                mean = groups.mean((0, 2), keepdim=True)
                variance = groups.var((0, 2), keepdim=True, correction=0)
                return ((groups - mean) / (variance + norm_eps).sqrt()).reshape(x.shape)
            """,
            """
            def group_norm(x, num_groups, norm_eps):
                groups = x.reshape(x.size(0), -1, num_groups, *x.shape[2:])
                axes = (1, *range(3, groups.dim()))
                mean = groups.mean(axes, keepdim=True)
                variance = groups.var(axes, keepdim=True, correction=0)
                return ((groups - mean) / (variance + norm_eps).sqrt()).reshape(x.shape)
            """,
            """
            def group_norm(x, num_groups, norm_eps):
                groups = x.reshape(x.size(0), num_groups, -1)
                mean, variance = groups.mean(-1, keepdim=True), groups.var(-1, keepdim=True)
                return ((groups - mean) / (variance + norm_eps).sqrt()).reshape(x.shape)
            """,
        ),
        check=_check_group_norm,
        hint="One reshape puts all that shares a mean on the last axis.",
    ),
    Exercise(
        name="normalisation/find-the-bugs",
        title="Nearly a LayerNorm",
        stars=2,
        statement=r"""
            The function below is nearly LayerNorm. With vectors of 768 numbers and $\varepsilon = 10^{-12}$
            hardly a test notices. Find what is wrong, and mend it; it also has to bear half precision, in
            which the square of 300 does not exist, and give back the dtype that it was given. The package's
            layers and `torch.nn.functional` stay shut.
        """,
        answer="layer_norm",
        starter=_BUGGY,
        solution=_LAYER_NORM,
        wrong=(
            *_with(
                _LAYER_NORM,
                ("keepdim=True, correction=0", "keepdim=True"),
                ("(variance + norm_eps).sqrt()", "(variance.sqrt() + norm_eps)"),
                (".to(x.dtype)\n", "\n"),
            ),
            _LAYER_NORM.replace("x.to(torch.promote_types(x.dtype, torch.float32))", "x").replace(
                "wide.var(-1, keepdim=True, correction=0)", "(wide - mean).square().mean(-1, keepdim=True)"
            ),
        ),
        check=_check_bugs,
        hint="Compare with the formula, symbol by symbol; then ask in which dtype each line is computed.",
    ),
    Exercise(
        name="normalisation/reordered-block",
        title="The next block, from its paper",
        stars=3,
        statement=r"""
            OLMo 2 moves the norms once more: $h = x + \mathrm{RMS}(\mathrm{Attn}(x))$ and
            $y = h + \mathrm{RMS}(\mathrm{SwiGLU}(h))$. Nothing is normalised on the way into a branch, except
            inside attention: the queries and the keys, each over its whole width before it is split into
            heads, and before RoPE (halves, $\theta = 500000$, positions from 0). Attention is causal with as
            many key heads as query heads, and there are no biases. Write the block so that it gives the
            package's numbers. The weights come in a dict, `attn.q_proj.weight`, `attn.q_norm.weight`,
            `attn.out_proj.weight`, `attn_norm.weight`, `ffn.gate_proj.weight` and so on; `x` is `(B, T, D)`,
            and all norms have the same $\varepsilon$. The package's layers stay shut; everything in `torch`
            is open.
        """,
        answer="block",
        starter="""
            import torch
            import torch.nn.functional as F

            def block(x, params, num_heads, norm_eps):
                raise NotImplementedError
        """,
        solution=_REORDERED,
        wrong=_with(
            _REORDERED,
            ('rms("attn.q_norm", linear("attn.q_proj", x))', 'linear("attn.q_proj", x)'),
            (
                'x + rms("attn_norm", linear("attn.out_proj", mixed))',
                'rms("attn_norm", x + linear("attn.out_proj", mixed))',
            ),
            ('scores.masked_fill(hidden, float("-inf"))', "scores"),
            ("500_000.0", "10_000.0"),
            (
                '    q = turn(heads(rms("attn.q_norm", linear("attn.q_proj", x))))',
                '    q = turn(heads(linear("attn.q_proj", x))).transpose(1, 2).reshape(B, T, D)\n'
                '    q = heads(rms("attn.q_norm", q))',
            ),
        ),
        check=_check_reordered_block,
        hint="The widths of the two norms inside attention say whether they come before the split.",
    ),
)
