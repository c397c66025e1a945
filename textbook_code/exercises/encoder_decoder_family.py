"""Exercises of the page on BART and mT5, and of the whole part.

Book: encoder-decoder-family
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from textbook_code.exercises.framework import Exercise
from textbook_code.exercises.judge import as_numbers, number_problem, tensor_problem, vector_problem
from textbook_code.layers.masks import causal_mask
from textbook_code.layers.positions import RotaryPositions, rotate
from textbook_code.models.text.mt5 import Mt5Config


def _check_infill(answer: Callable[..., Any]) -> str | None:
    mask_id = 3
    text = list(range(10, 22))
    for spans, what in (
        ([(2, 3)], "one span of 3"),
        ([(0, 1), (5, 2), (10, 2)], "spans of 1, 2 and 2, at the front and at the end"),
        ([(4, 0)], "one empty span"),
        ([(0, 0), (12, 0)], "empty spans before the first and behind the last token"),
        ([(3, 2), (5, 0), (5, 1)], "spans that touch, one of them empty"),
        ([], "no span"),
    ):
        expected, at = [], 0
        for start, length in spans:
            expected += [*text[at:start], mask_id]
            at = start + length
        expected += text[at:]
        got = answer(list(text), list(spans), mask_id)
        values = as_numbers(got)
        if values is None:
            return f"{what}: expected a list of token ids."
        if len(values) != len(expected):
            return f"{what}: {len(values)} tokens came out, not {len(expected)}."
        for place, (value, right) in enumerate(zip(values, expected, strict=True)):
            if value != right:
                return f"{what}: entry {place} is {value:g}, not {right}."
    return None


def _check_epochs(answer: Callable[..., Any]) -> str | None:
    for sizes, alpha, draws in (
        ([900.0, 90.0, 10.0], 1.0, 5_000),
        ([900.0, 90.0, 10.0], 0.3, 5_000),
        ([400.0, 400.0], 0.0, 800),
        ([1e6, 2e4, 3e3, 5e2], 0.5, 2_000_000),
    ):
        powers = [size**alpha for size in sizes]
        expected = [draws * power / sum(powers) / size for power, size in zip(powers, sizes, strict=True)]
        got = answer(list(sizes), alpha, draws)
        what = f"sizes {', '.join(f'{s:g}' for s in sizes)}, alpha {alpha:g}, {draws:,} draws"
        scaled = as_numbers(got)
        if scaled is not None and len(scaled) == len(expected):
            got = [value / right for value, right in zip(scaled, expected, strict=True)]
            if problem := vector_problem(got, [1.0] * len(expected), "", tol=1e-6):
                share = [draws * p / sum(powers) for p in powers]
                if all(abs(v - s) < 1e-6 * s for v, s in zip(scaled, share, strict=True)):
                    return f"{what}: these are draws of each language, not passes through its text."
                number = problem.split("number ")[1].split(",")[0]
                return f"{what}: entry {number} of the answer is not right."
            continue
        return vector_problem(got, expected, what)
    return None


def _check_table_share(answer: Callable[..., Any]) -> str | None:
    odd = Mt5Config(
        vocab_size=1_000, d_model=60, num_layers=3, num_heads=4, head_dim=10, d_ff=100, num_buckets=8
    )
    for name, config in (
        ("mT5-small", Mt5Config.mt5_small()),
        ("mT5-xxl", Mt5Config.mt5_xxl()),
        ("a small model", odd),
    ):
        tables = 2 * config.vocab_size * config.d_model
        expected = tables / config.num_parameters()
        fields = ("vocab_size", "d_model", "num_layers", "num_heads", "head_dim", "d_ff", "num_buckets")
        got = answer(*(getattr(config, field) for field in fields))
        if number_problem(got, expected, name, rel=1e-9) is None:
            continue
        one = tables / 2
        if number_problem(got, one / (config.num_parameters() - one), name, rel=1e-9) is None:
            return f"{name}: this is the share of one table, in a model that ties the two."
        if number_problem(got, one / config.num_parameters(), name, rel=1e-9) is None:
            return f"{name}: the output layer is a table too."
        return number_problem(got, expected, name, rel=1e-9)
    return None


def _check_last_end(answer: Callable[..., Any]) -> str | None:
    eos = 2
    tokens = torch.tensor(
        [[0, 5, 6, 2, 7, 8, 2, 1, 1], [0, 5, 2, 1, 1, 1, 1, 1, 1], [0, 4, 4, 4, 4, 4, 4, 4, 2]]
    )
    hidden = torch.randn(3, 9, 4, dtype=torch.float64)
    real = tokens != 1
    padded_with_ends = tokens.masked_fill(~real, eos)  # some batches are filled up with eos
    last = [6, 2, 8]
    for ids, what in ((tokens, "two ends in the first text"), (padded_with_ends, "padding that is eos too")):
        got = answer(hidden.clone(), ids.clone(), real.clone(), eos)
        expected = hidden[torch.arange(3), torch.tensor(last)]
        if problem := tensor_problem(got, expected, what, tol=1e-9):
            return problem
    return None


Params = Mapping[str, Tensor]


def neox_logits(
    tokens: Tensor,
    params: Params,
    num_heads: int,
    rotary_dim: int,
    theta: float,
    norm_eps: float,
    *,
    slip: str = "",
) -> Tensor:
    """GPT-NeoX as the exercise describes it, (B, T) to logits (B, T, V); with `slip`, one usual mistake.

    Book: encoder-decoder-family
    """

    def linear(name: str, x: Tensor) -> Tensor:
        return F.linear(x, params[name + ".weight"], params[name + ".bias"])

    def norm(name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], params[name + ".weight"], params[name + ".bias"], norm_eps)

    T = tokens.size(1)
    num_layers = 1 + max(int(name.split(".")[1]) for name in params if name.startswith("layers."))
    x = F.embedding(tokens, params["embed_in.weight"])  # (B, T, D)
    turned = x.size(-1) // num_heads if slip == "rotary on the whole head" else rotary_dim
    cos, sin = RotaryPositions(turned, theta=theta)(torch.arange(T), x.dtype)

    def turn(y: Tensor) -> Tensor:
        if slip == "pairs (2i, 2i + 1)":
            pairs = y[..., :turned].unflatten(-1, (-1, 2)).mT.flatten(-2)
            out = rotate(pairs, cos, sin).unflatten(-1, (2, -1)).mT.flatten(-2)
            return torch.cat([out, y[..., turned:]], dim=-1)
        return torch.cat([rotate(y[..., :turned], cos, sin), y[..., turned:]], dim=-1)

    def attend(name: str, y: Tensor) -> Tensor:
        packed = linear(name + ".query_key_value", y)  # (B, T, 3 D)
        if slip == "queries, keys and values in three blocks":
            q, k, v = packed.unflatten(-1, (3, num_heads, -1)).permute(2, 0, 3, 1, 4)
        else:
            q, k, v = packed.unflatten(-1, (num_heads, 3, -1)).permute(3, 0, 2, 1, 4)
        scores = turn(q) @ turn(k).mT / q.size(-1) ** 0.5  # (B, H, T, T)
        if slip != "no causal mask":
            scores = scores.masked_fill(~causal_mask(T), -torch.inf)
        return linear(name + ".dense", (scores.softmax(-1) @ v).transpose(1, 2).flatten(2))

    for i in range(num_layers):
        at = f"layers.{i}."
        first, second = at + "input_layernorm", at + "post_attention_layernorm"
        attended = attend(at + "attention", norm(first, x))
        base = x + attended if slip == "one half after the other" else x
        y = norm(first if slip == "one norm for both halves" else second, base)
        wide = F.gelu(
            linear(at + "mlp.dense_h_to_4h", y), approximate="tanh" if slip == "tanh GELU" else "none"
        )
        x = x + attended + linear(at + "mlp.dense_4h_to_h", wide)
    return F.linear(norm("final_layer_norm", x), params["embed_out.weight"])


_SLIPS = (
    "rotary on the whole head",
    "pairs (2i, 2i + 1)",
    "queries, keys and values in three blocks",
    "no causal mask",
    "one half after the other",
    "one norm for both halves",
    "tanh GELU",
)


def _neox_params(V: int, D: int, F_: int, num_layers: int) -> dict[str, Tensor]:
    """Loud random weights under the published names."""
    shapes: dict[str, tuple[int, ...]] = {"embed_in.weight": (V, D)}
    for i in range(num_layers):
        for name, out, into in (
            ("attention.query_key_value", 3 * D, D),
            ("attention.dense", D, D),
            ("mlp.dense_h_to_4h", F_, D),
            ("mlp.dense_4h_to_h", D, F_),
        ):
            shapes[f"layers.{i}.{name}.weight"], shapes[f"layers.{i}.{name}.bias"] = (out, into), (out,)
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"layers.{i}.{name}.weight"] = shapes[f"layers.{i}.{name}.bias"] = (D,)
    shapes |= {"final_layer_norm.weight": (D,), "final_layer_norm.bias": (D,), "embed_out.weight": (V, D)}
    params = {}
    for name, shape in shapes.items():
        z = torch.randn(shape, dtype=torch.float64)
        if name == "embed_in.weight":
            params[name] = z
        elif len(shape) == 2:
            params[name] = 1.5 * z / shape[1] ** 0.5
        else:
            params[name] = (1 if "norm" in name and name.endswith("weight") else 0) + 0.3 * z
    return params


def _check_next_family(answer: Callable[..., Any]) -> str | None:
    V, D, num_heads, theta, norm_eps = 47, 36, 3, 500.0, 1e-2
    for rotary_dim, num_layers in ((4, 1), (6, 3)):
        params = _neox_params(V, D, 60, num_layers)
        tokens = torch.randint(V, (2, 33))
        given = {name: tensor.clone() for name, tensor in params.items()}
        sizes = (num_heads, rotary_dim, theta, norm_eps)
        expected = neox_logits(tokens, params, *sizes)
        got = answer(tokens.clone(), given, *sizes)
        what = (
            f"{num_layers} layers, rotary_dim={rotary_dim}" if num_layers > 1 else f"rotary_dim={rotary_dim}"
        )
        if problem := tensor_problem(got, expected, what, tol=1e-9):
            for slip in _SLIPS:
                if tensor_problem(got, neox_logits(tokens, params, *sizes, slip=slip), "", tol=1e-9) is None:
                    return f"this is what a model with this mistake computes: {slip}."
            return problem
    return None


_NEOX_HEAD = """
import torch
import torch.nn.functional as F

def neox(tokens, params, num_heads, rotary_dim, theta, norm_eps):
    T, r = tokens.size(1), rotary_dim

    def linear(name, x):
        return F.linear(x, params[name + ".weight"], params[name + ".bias"])

    def norm(name, x):
        return F.layer_norm(x, x.shape[-1:], params[name + ".weight"], params[name + ".bias"], norm_eps)

    x = F.embedding(tokens, params["embed_in.weight"])
    omega = theta ** (-torch.arange(0, r, 2, dtype=x.dtype) / r)
    angle = torch.arange(T, dtype=x.dtype)[:, None] * omega  # (T, r/2)
    cos, sin = angle.cos(), angle.sin()
    causal = torch.ones(T, T, dtype=torch.bool).tril()

    def turn(y):
        first, second, rest = y[..., : r // 2], y[..., r // 2 : r], y[..., r:]
        return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)

    def attend(name, y):
        packed = linear(name + ".query_key_value", y)
"""
_NEOX_TAIL = """
        scores = turn(q) @ turn(k).mT / q.size(-1) ** 0.5
        scores = scores.masked_fill(~causal, float("-inf"))
        return linear(name + ".dense", (scores.softmax(-1) @ v).transpose(1, 2).flatten(2))

    i = 0
    while f"layers.{i}.input_layernorm.weight" in params:
        at = f"layers.{i}."
        attended = attend(at + "attention", norm(at + "input_layernorm", x))
        y = norm(at + "post_attention_layernorm", BASE)
        y = linear(at + "mlp.dense_4h_to_h", F.gelu(linear(at + "mlp.dense_h_to_4h", y)))
        x = x + attended + y
        i += 1
    return F.linear(norm("final_layer_norm", x), params["embed_out.weight"])
"""
_BY_HEAD = """        q, k, v = packed.unflatten(-1, (num_heads, 3, -1)).permute(3, 0, 2, 1, 4)"""
_IN_BLOCKS = """        q, k, v = packed.unflatten(-1, (3, num_heads, -1)).permute(2, 0, 3, 1, 4)"""


def _neox_source(split: str, base: str) -> str:
    return _NEOX_HEAD.rstrip() + "\n" + split + _NEOX_TAIL.replace("BASE", base)


EXERCISES = (
    Exercise(
        name="encoder-decoder-family/infill",
        title="Text infilling by hand",
        stars=1,
        statement=r"""
            Write the last step of text infilling: the spans are drawn already. `spans` is a list of pairs
            `(start, length)` in the text's own positions, in order and without overlap; each span is
            replaced by **one** `mask_id`, however long it is. A span of length 0 inserts a mask in front of
            the token at `start`. Return the list of ids.
        """,
        answer="infill",
        starter="""
            def infill(tokens, spans, mask_id):
                return tokens
        """,
        solution="""
            def infill(tokens, spans, mask_id):
                out, at = [], 0
                for start, length in spans:
                    out += tokens[at:start]  # what was kept since the last span
                    out.append(mask_id)
                    at = start + length
                return out + tokens[at:]
        """,
        wrong=(
            """
            def infill(tokens, spans, mask_id):
                out = list(tokens)
                for start, length in spans:
                    out[start : start + length] = [mask_id] * length
                return out
            """,
            """
            def infill(tokens, spans, mask_id):
                out = list(tokens)
                for start, length in spans:
                    out[start : start + length] = [mask_id]
                return out
            """,
        ),
        check=_check_infill,
        hint="After the first replacement, positions in the text and in the output are no longer the same.",
    ),
    Exercise(
        name="encoder-decoder-family/epochs",
        title="How often is each text read?",
        stars=1,
        statement=r"""
            Languages have `sizes` examples each and are drawn by equation {eq}`eq-mt5-mixture` with
            exponent `alpha`. Training takes `draws` examples in all. Return, for each language, how many
            times each of its examples is read on average.
        """,
        answer="epochs",
        starter="""
            def epochs(sizes, alpha, draws):
                return [draws / sum(sizes) for size in sizes]
        """,
        solution="""
            def epochs(sizes, alpha, draws):
                powers = [size**alpha for size in sizes]
                return [draws * power / sum(powers) / size for power, size in zip(powers, sizes)]
        """,
        wrong=(
            """
            def epochs(sizes, alpha, draws):
                powers = [size**alpha for size in sizes]
                return [draws * power / sum(powers) for power in powers]
            """,
            """
            def epochs(sizes, alpha, draws):
                powers = [size ** (1 - alpha) for size in sizes]
                return [draws * power / sum(powers) / size for power, size in zip(powers, sizes)]
            """,
        ),
        check=_check_epochs,
        hint="With alpha = 1 all languages are read equally often, whatever their size.",
    ),
    Exercise(
        name="encoder-decoder-family/table-share",
        title="The share of the tables",
        stars=2,
        statement=r"""
            Return which share of an mT5's parameters stands in its two tables, the input's and the output's.
            The rest is: in each of `num_layers` encoder blocks four projections between $D$ and
            $I = H D_h$, three matrices of $D F$, and two norms; in each of as many decoder blocks the same
            with four projections and one norm more; in each stack a final norm and a table of
            `num_buckets` $\times\, H$ relative biases. There are no other biases, and a norm has one vector.
        """,
        answer="table_share",
        starter="""
            def table_share(vocab_size, d_model, num_layers, num_heads, head_dim, d_ff, num_buckets):
                return vocab_size * d_model / (12 * num_layers * d_model**2)
        """,
        solution="""
            def table_share(vocab_size, d_model, num_layers, num_heads, head_dim, d_ff, num_buckets):
                projections, ffn = 4 * d_model * num_heads * head_dim, 3 * d_model * d_ff
                encoder = num_layers * (projections + ffn + 2 * d_model)
                decoder = num_layers * (2 * projections + ffn + 3 * d_model)
                rest = encoder + decoder + 2 * (d_model + num_buckets * num_heads)
                tables = 2 * vocab_size * d_model
                return tables / (tables + rest)
        """,
        wrong=(
            """
            def table_share(vocab_size, d_model, num_layers, num_heads, head_dim, d_ff, num_buckets):
                projections, ffn = 4 * d_model * num_heads * head_dim, 3 * d_model * d_ff
                encoder = num_layers * (projections + ffn + 2 * d_model)
                decoder = num_layers * (2 * projections + ffn + 3 * d_model)
                rest = encoder + decoder + 2 * (d_model + num_buckets * num_heads)
                return vocab_size * d_model / (vocab_size * d_model + rest)
            """,
            """
            def table_share(vocab_size, d_model, num_layers, num_heads, head_dim, d_ff, num_buckets):
                blocks = 2 * num_layers * (4 * d_model * num_heads * head_dim + 3 * d_model * d_ff)
                return 2 * vocab_size * d_model / (2 * vocab_size * d_model + blocks)
            """,
        ),
        check=_check_table_share,
        hint="A decoder block has two attentions; neither table is tied to the other.",
    ),
    Exercise(
        name="encoder-decoder-family/last-end",
        title="Where BART's classifier reads",
        stars=2,
        statement=r"""
            BART classifies a text by the decoder's hidden state at the last `eos_id` among the real tokens.
            Write this choice for `hidden` (B, T, D), `tokens` (B, T) and a boolean `token_mask` (B, T), True
            = real token. A text may contain several ends, and padding may be filled with `eos_id` as well.
            Return (B, D).
        """,
        answer="at_last_end",
        starter="""
            import torch

            def at_last_end(hidden, tokens, token_mask, eos_id):
                return hidden[:, -1]
        """,
        solution="""
            import torch

            def at_last_end(hidden, tokens, token_mask, eos_id):
                T = tokens.size(1)
                ends = (tokens == eos_id) & token_mask
                last = (ends * torch.arange(T)).amax(dim=1)  # (B,), the greatest place of an end
                return hidden[torch.arange(len(last)), last]
        """,
        wrong=(
            """
            import torch

            def at_last_end(hidden, tokens, token_mask, eos_id):
                first = (tokens == eos_id).long().argmax(dim=1)
                return hidden[torch.arange(len(first)), first]
            """,
            """
            import torch

            def at_last_end(hidden, tokens, token_mask, eos_id):
                last = ((tokens == eos_id) * torch.arange(tokens.size(1))).amax(dim=1)
                return hidden[torch.arange(len(last)), last]
            """,
        ),
        check=_check_last_end,
        hint="`argmax` of a row of zeros and ones finds the first one; you want the last that is real.",
    ),
    Exercise(
        name="encoder-decoder-family/next-family",
        title="Write the next family from its paper",
        stars=3,
        statement=r"""
            GPT-NeoX {cite}`black2022gptneox` is not in the package. Write it as a function from tokens (B, T)
            to logits (B, T, V). With $E$ for `embed_in`, $W$ for `embed_out`, and as many layers
            $\ell = 0, 1, \dots$ as `params` holds,

            $$
            \begin{aligned}
            x_0 &= E[\mathrm{tokens}] , \\
            x_{\ell+1} &= x_\ell + \mathrm{Attn}_\ell\big(\mathrm{LN}^1_\ell(x_\ell)\big)
              + \mathrm{FFN}_\ell\big(\mathrm{LN}^2_\ell(x_\ell)\big) , \\
            \mathrm{logits} &= \mathrm{LN}(x_L)\, W^\top .
            \end{aligned}
            $$

            $\mathrm{LN}^1$ is `input_layernorm`, $\mathrm{LN}^2$ `post_attention_layernorm`; all norms are
            LayerNorms with both vectors and `norm_eps`. FFN is `dense_h_to_4h`, the exact GELU,
            `dense_4h_to_h`. Attention is causal, divides by $\sqrt{D_h}$, and all its maps have biases. The
            $3D$ outputs of `query_key_value` are ordered by head: the $D_h$ queries of head 0, its $D_h$
            keys, its $D_h$ values, then head 1. RoPE turns only the first $r$ = `rotary_dim` numbers of each
            query and key, in pairs $(i, i + r/2)$, by $t\,\theta^{-2i/r}$; the others stay.
        """,
        answer="neox",
        starter="""
            import torch
            import torch.nn.functional as F

            def neox(tokens, params, num_heads, rotary_dim, theta, norm_eps):
                # params, under the published names:
                #   embed_in.weight (V, D)      final_layer_norm.{weight,bias}      embed_out.weight (V, D)
                #   layers.0.input_layernorm.{weight,bias}
                #   layers.0.post_attention_layernorm.{weight,bias}
                #   layers.0.attention.query_key_value.{weight,bias}    (3 D, D), ordered by head
                #   layers.0.attention.dense.{weight,bias}
                #   layers.0.mlp.dense_h_to_4h.{weight,bias}
                #   layers.0.mlp.dense_4h_to_h.{weight,bias}            and so on for layers.1, …
                raise NotImplementedError  # return logits (B, T, V)
        """,
        solution=_neox_source(_BY_HEAD, "x"),
        wrong=(
            _neox_source(_BY_HEAD, "x + attended"),
            _neox_source(_IN_BLOCKS, "x"),
            _neox_source(_BY_HEAD, "x").replace("F.gelu(linear", "F.relu(linear"),
            _neox_source(_BY_HEAD, "x").replace("post_attention_layernorm", "input_layernorm"),
        ),
        check=_check_next_family,
        hint=(
            "Start with one layer and T = 1, where attention returns its value: then the norms, the order of "
            "the packed rows and the head must be right already."
        ),
    ),
)
