"""Exercises of the page on LLaMA and PaLM.

Book: modern-decoders
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from textbook_code.exercises.framework import Exercise
from textbook_code.exercises.judge import number_problem, tensor_problem
from textbook_code.layers.attention import attention
from textbook_code.layers.positions import Llama3Scaling, RotaryPositions, rotate
from textbook_code.models.text.llama import LlamaConfig, swiglu_width
from textbook_code.models.text.palm import Block, PalmConfig


def _check_swiglu_width(answer: Callable[..., Any]) -> str | None:
    for d_model, multiple_of in ((4096, 256), (5120, 256), (8192, 256), (576, 256), (768, 1), (97, 64)):
        what = f"d_model={d_model}, multiple_of={multiple_of}"
        got, expected = answer(d_model, multiple_of), swiglu_width(d_model, multiple_of=multiple_of)
        if problem := number_problem(got, expected, what, rel=1e-9):
            if got == 4 * d_model:
                return f"{what}: that is the plain layer's width; here there are three matrices."
            if got == expected - multiple_of:
                return f"{what}: one multiple too small; round up."
            return problem
    return None


def _check_cache_bytes(answer: Callable[..., Any]) -> str | None:
    sizes = [
        getattr(LlamaConfig, name)() for name in ("llama1_65b", "llama2_70b", "llama31_8b", "smollm2_135m")
    ]
    wide = replace(LlamaConfig.smollm2_135m(), head_dim=80)  # its heads together are wider than the stream
    for c in (*sizes, wide):
        for batch_size, tokens, bytes_each in ((1, 1, 2), (7, 2048, 2), (3, 100, 4)):
            expected = 2 * c.num_layers * c.num_kv_heads * c.head_dim * batch_size * tokens * bytes_each
            got = answer(
                c.num_layers, c.num_heads, c.num_kv_heads, c.head_dim, batch_size, tokens, bytes_each
            )
            what = (
                f"{c.num_layers} layers, {c.num_heads} query heads and {c.num_kv_heads} key heads of "
                f"{c.head_dim}, {batch_size} texts of {tokens} tokens, {bytes_each} bytes each"
            )
            if problem := number_problem(got, expected, what, rel=1e-9):
                slips = {
                    "keys are counted, and not values": expected / 2,
                    "that counts a key head for each query head": expected * c.num_heads / c.num_kv_heads,
                    "that is one text of the batch": expected / batch_size,
                    "those are numbers, not bytes": expected / bytes_each,
                }
                for slip, value in slips.items():
                    if value != expected and number_problem(got, value, "", rel=1e-9) is None:
                        return f"{what}: {slip}."
                return problem
    return None


def _check_rotate(answer: Callable[..., Any]) -> str | None:
    for shape, theta in (((2, 3, 7, 8), 10_000.0), ((1, 1, 33, 10), 500.0), ((2, 1, 5, 2), 1e5)):
        x = torch.randn(shape, dtype=torch.float64)
        positions = torch.arange(shape[2]) + 4
        expected = rotate(x, *RotaryPositions(shape[3], theta=theta)(positions))
        what = f"x of shape {shape} with theta={theta:g}, positions from 4 on"
        got = answer(x.clone(), positions.clone(), theta)
        if problem := tensor_problem(got, expected, what, tol=1e-6):
            if isinstance(got, Tensor) and got.shape == expected.shape:
                back = rotate(x, *RotaryPositions(shape[3], theta=theta)(-positions))
                if torch.allclose(got.to(x), back, atol=1e-6):
                    return f"{what}: it turns the other way; the minus stands in the first row."
                if torch.allclose(got.to(x), _neighbours(x, positions, theta), atol=1e-6):
                    return f"{what}: it pairs the neighbours 2i and 2i + 1; here i goes with i + Dh/2."
            return problem
    return None


def _neighbours(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    halves = torch.cat([x[..., ::2], x[..., 1::2]], -1)
    first, second = rotate(halves, *RotaryPositions(x.size(-1), theta=theta)(positions)).chunk(2, -1)
    return torch.stack([first, second], -1).flatten(-2)


def _check_stretch(answer: Callable[..., Any]) -> str | None:
    for head_dim, theta, scaling in (
        (128, 5e5, Llama3Scaling()),
        (64, 5e5, Llama3Scaling(factor=32.0)),
        (96, 1e4, Llama3Scaling(factor=5.0, low=2.0, high=7.0, original=1000)),
    ):
        omega = RotaryPositions(head_dim, theta=theta).frequencies()
        expected = scaling(omega)
        what = f"heads of {head_dim}, theta={theta:g}, {scaling}"
        got = answer(omega.clone(), scaling.factor, scaling.low, scaling.high, scaling.original)
        # relative, since the slowest frequencies are tiny
        ratio = got / expected if isinstance(got, Tensor) and got.shape == expected.shape else got
        if problem := tensor_problem(
            ratio, torch.ones_like(expected), f"{what}, over what is right", tol=1e-6
        ):
            if isinstance(got, Tensor) and got.shape == expected.shape:
                if torch.allclose(got, omega / scaling.factor):
                    return f"{what}: every hand was slowed; the fast ones are to be left alone."
                if (got > omega * (1 + 1e-6)).any():
                    return f"{what}: some hand was made faster: hold s between 0 and 1."
            return problem
    return None


def _check_parallel_block(answer: Callable[..., Any]) -> str | None:
    config = PalmConfig(d_model=24, num_heads=3, head_dim=10, d_ff=40, norm_eps=1e-2)
    block = Block(config).double().eval()
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=1.0 if parameter.dim() == 1 else parameter.size(1) ** -0.5)
    params = {name: p.detach() for name, p in block.named_parameters()}
    x, positions = torch.randn(2, 9, config.d_model, dtype=torch.float64), torch.arange(9)
    rotary = RotaryPositions(config.head_dim)(positions)
    with torch.no_grad():
        expected = block(x, rotary=rotary)
        got = answer(x.clone(), dict(params), config.num_heads, config.norm_eps)
        if problem := tensor_problem(got, expected, "two texts of 9 tokens", tol=1e-9):
            if not (isinstance(got, Tensor) and got.shape == expected.shape):
                return problem
            for slip, value in _slips(block, x, rotary).items():
                if torch.allclose(got.to(x), value, atol=1e-9):
                    return f"those are the numbers of {slip}."
            return problem
    return None


def _slips(block: Block, x: Tensor, rotary: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """The usual mistakes, computed."""
    u, attn, ffn = block.norm(x), block.attn, block.ffn
    serial = x + attn(u, causal=True, rotary=rotary)
    swapped = ffn.down_proj(nn.functional.silu(ffn.up_proj(u)) * ffn.gate_proj(u))
    attended = attn(u, causal=True, rotary=rotary)
    q, k, v = (
        p(u).unflatten(-1, (-1, attn.head_dim)).transpose(1, 2)
        for p in (attn.q_proj, attn.k_proj, attn.v_proj)
    )
    value_turned = attention(rotate(q, *rotary), rotate(k, *rotary), rotate(v, *rotary), causal=True)[0]
    return {
        "a block whose halves follow one another": serial + ffn(block.norm(serial)),
        "a block that looks ahead": x + attn(u, rotary=rotary) + ffn(u),
        "a block without positions": x + attn(u, causal=True) + ffn(u),
        "a block that bends up and not gate": x + attended + swapped,
        "a block that leaves the residual out": attended + ffn(u),
        "a block that adds to the normalised vector": u + attended + ffn(u),
        "a block that turns the values too": x
        + attn.out_proj(value_turned.transpose(1, 2).flatten(2))
        + ffn(u),
    }


_BLOCK = """
import torch
import torch.nn.functional as F

def turn(x):
    T, Dh = x.shape[-2:]
    omega = 10_000.0 ** (-torch.arange(0, Dh, 2, dtype=x.dtype) / Dh)
    angle = torch.arange(T, dtype=x.dtype)[:, None] * omega
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * angle.cos() - second * angle.sin(),
                      first * angle.sin() + second * angle.cos()], dim=-1)

def block(x, params, num_heads, norm_eps):
    B, T, D = x.shape
    linear = lambda name, u: F.linear(u, params[name + ".weight"])
    u = F.layer_norm(x, (D,), params["norm.weight"], None, norm_eps)
    q = linear("attn.q_proj", u).view(B, T, num_heads, -1).transpose(1, 2)  # (B, H, T, Dh)
    k = linear("attn.k_proj", u)[:, None]  # (B, 1, T, Dh): one head for all
    v = linear("attn.v_proj", u)[:, None]
    scores = turn(q) @ turn(k).transpose(-2, -1) / q.size(-1) ** 0.5
    hidden = torch.ones(T, T, dtype=torch.bool).triu(1)
    weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
    attended = linear("attn.out_proj", (weights @ v).transpose(1, 2).flatten(2))
    wide = F.silu(linear("ffn.gate_proj", u)) * linear("ffn.up_proj", u)
    return x + attended + linear("ffn.down_proj", wide)
"""

_ROTATE = """
import torch

def rotate(x, positions, theta):
    Dh = x.shape[-1]
    omega = theta ** (-torch.arange(0, Dh, 2, dtype=torch.float64) / Dh)  # (Dh/2,)
    angle = positions[:, None] * omega  # (T, Dh/2)
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    first, second = x[..., : Dh // 2], x[..., Dh // 2 :]
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)
"""

_STRETCH = """
import math
import torch

def stretch(frequencies, factor, low, high, original):
    turns = original * frequencies / (2 * math.pi)
    s = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - s) * frequencies / factor + s * frequencies
"""

EXERCISES = (
    Exercise(
        name="modern-decoders/swiglu-width",
        title="The width of a gated layer",
        stars=1,
        statement=r"""
            Write the hidden width of a SwiGLU layer that has the parameters of a plain layer of width $4D$:
            $\frac83 D$, cut to an integer, then rounded up to the next multiple of `multiple_of`. What is it
            for LLaMA 1 with $D = 4096$ and multiples of 256?
        """,
        answer="width",
        starter="""
            def width(d_model, multiple_of):
                raise NotImplementedError
        """,
        solution="""
            def width(d_model, multiple_of):
                exact = 8 * d_model // 3
                return -(-exact // multiple_of) * multiple_of
        """,
        wrong=(
            """
            def width(d_model, multiple_of):
                return 8 * d_model // 3 // multiple_of * multiple_of
            """,
            """
            def width(d_model, multiple_of):
                return 4 * d_model
            """,
            """
            def width(d_model, multiple_of):
                return (8 * d_model // 3 // multiple_of + 1) * multiple_of
            """,
        ),
        check=_check_swiglu_width,
        hint="Rounding up is rounding down a negative number; a multiple stays as it is.",
    ),
    Exercise(
        name="modern-decoders/cache-bytes",
        title="The bytes of a conversation",
        stars=1,
        statement=r"""
            Write how many bytes the cache of a decoder holds for a batch of texts, from its sizes. Then
            predict: how many texts of 2,048 tokens take as much memory as the 16-bit weights of the largest
            LLaMA 1, and of the largest LLaMA 2?
        """,
        answer="cache_bytes",
        starter="""
            def cache_bytes(
                num_layers, num_heads, num_kv_heads, head_dim, batch_size, tokens, bytes_each
            ):
                raise NotImplementedError
        """,
        solution="""
            def cache_bytes(
                num_layers, num_heads, num_kv_heads, head_dim, batch_size, tokens, bytes_each
            ):
                per_token = 2 * num_layers * num_kv_heads * head_dim  # a key and a value
                return per_token * batch_size * tokens * bytes_each
        """,
        wrong=(
            """
            def cache_bytes(
                num_layers, num_heads, num_kv_heads, head_dim, batch_size, tokens, bytes_each
            ):
                return num_layers * num_kv_heads * head_dim * batch_size * tokens * bytes_each
            """,
            """
            def cache_bytes(
                num_layers, num_heads, num_kv_heads, head_dim, batch_size, tokens, bytes_each
            ):
                return 2 * num_layers * num_heads * head_dim * batch_size * tokens * bytes_each
            """,
            """
            def cache_bytes(
                num_layers, num_heads, num_kv_heads, head_dim, batch_size, tokens, bytes_each
            ):
                return 2 * num_layers * num_kv_heads * head_dim * tokens * bytes_each
            """,
        ),
        check=_check_cache_bytes,
        hint="What is stored for one token, in one layer, by one key head? Who has how many of them?",
    ),
    Exercise(
        name="modern-decoders/rotate",
        title="Turn queries and keys",
        stars=2,
        statement=r"""
            Write RoPE: turn each pair $(i, i + D_h/2)$ of `x`, of shape `(B, H, T, Dh)`, by the angle
            $t\,\theta^{-2i/D_h}$, where $t$ is the entry of `positions`, `(T,)`, for that place. The
            package's layers stay shut.
        """,
        answer="rotate",
        starter="""
            import torch

            def rotate(x, positions, theta):
                raise NotImplementedError
        """,
        solution=_ROTATE,
        wrong=(
            *(
                _ROTATE.replace(right, slip)
                for right, slip in (
                    (
                        "first * cos - second * sin, first * sin + second * cos",
                        "first * cos + second * sin, second * cos - first * sin",
                    ),
                    ("torch.arange(0, Dh, 2, dtype=torch.float64) / Dh", "torch.arange(Dh // 2) / Dh"),
                    ("positions[:, None] * omega", "torch.arange(x.shape[2])[:, None] * omega"),
                )
            ),
            """
            import torch

            def rotate(x, positions, theta):
                Dh = x.shape[-1]
                omega = theta ** (-torch.arange(0, Dh, 2, dtype=torch.float64) / Dh)
                angle = positions[:, None] * omega
                cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
                first, second = x[..., ::2], x[..., 1::2]
                turned = [first * cos - second * sin, first * sin + second * cos]
                return torch.stack(turned, dim=-1).flatten(-2)
            """,
        ),
        check=_check_rotate,
        hint="Angles are (T, Dh/2): they broadcast over B and H. Which half gets the minus?",
    ),
    Exercise(
        name="modern-decoders/stretch",
        title="A slower clock",
        stars=2,
        statement=r"""
            Write the stretching of LLaMA 3.1: a frequency $\omega$ makes $n = T_0\,\omega / 2\pi$ turns over
            the original context, and becomes $(1 - s)\,\omega / \mathtt{factor} + s\,\omega$ with
            $s = (n - \mathtt{low}) / (\mathtt{high} - \mathtt{low})$, held between 0 and 1. Predict the
            period of the slowest hand of LLaMA 3.1 8B before you compute it.
        """,
        answer="stretch",
        starter="""
            import math
            import torch

            def stretch(frequencies, factor, low, high, original):
                raise NotImplementedError
        """,
        solution=_STRETCH,
        wrong=tuple(
            _STRETCH.replace(right, slip)
            for right, slip in (
                (".clamp(0, 1)", ""),
                ("(1 - s) * frequencies / factor + s * frequencies", "frequencies / factor"),
                (
                    "(1 - s) * frequencies / factor + s * frequencies",
                    "s * frequencies / factor + (1 - s) * frequencies",
                ),
                (" / (2 * math.pi)", ""),
            )
        ),
        check=_check_stretch,
        hint="Fast hands make many turns: for them s is 1, and nothing changes.",
    ),
    Exercise(
        name="modern-decoders/parallel-block",
        title="The next family, from its paper",
        stars=3,
        statement=r"""
            You have LLaMA's block; write PaLM's from its paper's description, so that it gives the package's
            numbers: $y = x + \mathrm{Attn}(u) + \mathrm{SwiGLU}(u)$ with $u = \mathrm{LN}(x)$, a norm with a
            scale and no bias; causal attention in which all query heads read one key and value head; RoPE
            with $\theta = 10000$ on queries and keys, in halves, positions from 0; no biases. The weights
            come in a dict under the package's names, `norm.weight`, `attn.q_proj.weight`,
            `attn.out_proj.weight`, `ffn.gate_proj.weight` and so on, each matrix as
            `torch.nn.functional.linear` takes it; `x` is `(B, T, D)`. The package's layers stay shut;
            everything in `torch` is open.
        """,
        answer="block",
        starter="""
            import torch
            import torch.nn.functional as F

            def block(x, params, num_heads, norm_eps):
                raise NotImplementedError
        """,
        solution=_BLOCK,
        wrong=tuple(
            _BLOCK.replace(right, slip)
            for right, slip in (
                (
                    "    wide = F.silu",
                    "    x = x + attended\n"
                    '    u = F.layer_norm(x, (D,), params["norm.weight"], None, norm_eps)\n'
                    "    attended = 0\n    wide = F.silu",
                ),
                ('scores.masked_fill(hidden, float("-inf"))', "scores"),
                ("turn(q) @ turn(k)", "q @ k"),
                (
                    'F.silu(linear("ffn.gate_proj", u)) * linear("ffn.up_proj", u)',
                    'F.silu(linear("ffn.up_proj", u)) * linear("ffn.gate_proj", u)',
                ),
                (
                    'F.layer_norm(x, (D,), params["norm.weight"], None, norm_eps)',
                    'F.rms_norm(x, (D,), params["norm.weight"], norm_eps)',
                ),
                ("q.size(-1) ** 0.5", "D ** 0.5"),
                ("return x + attended", "return u + attended"),
            )
        ),
        check=_check_parallel_block,
        hint="Both halves read u, and both are added to x. Which heads are there to be scaled by?",
    ),
)
