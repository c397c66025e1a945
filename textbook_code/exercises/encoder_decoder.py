"""Exercises of the page on encoder-decoder models.

Book: encoder-decoder
"""

import math
from collections.abc import Callable
from typing import Any

import torch

from textbook_code.exercises.framework import Exercise
from textbook_code.exercises.judge import as_numbers, number_problem, tensor_problem
from textbook_code.layers.masks import key_mask
from textbook_code.models.text.t5 import DecoderBlock, T5Config


def _check_shift_right(answer: Callable[..., Any]) -> str | None:
    labels = torch.tensor([[11, 12, 1, -100, -100], [13, 14, 15, 16, 1]])
    for start_id, pad_id in ((0, 0), (2, 3)):
        given = labels.clone()
        first = torch.full((2, 1), start_id)
        expected = torch.cat([first, labels[:, :-1]], dim=1)
        expected = torch.where(expected == -100, pad_id, expected)
        got = answer(given, start_id, pad_id)
        if not given.equal(labels):
            return "the labels that came in were changed: work on a copy."
        if problem := tensor_problem(got, expected, f"start_id={start_id}, pad_id={pad_id}"):
            return problem
    return None


def _check_cut_spans(answer: Callable[..., Any]) -> str | None:
    text = list(range(10, 20))
    for spans, source, target in (
        ([(2, 2), (8, 1)], [10, 11, 99, 14, 15, 16, 17, 98, 19], [99, 12, 13, 98, 18, 97]),
        ([(0, 3)], [99, 13, 14, 15, 16, 17, 18, 19], [99, 10, 11, 12, 98]),
        ([(1, 1), (3, 1), (9, 1)], [10, 99, 12, 98, *range(14, 19), 97], [99, 11, 98, 13, 97, 19, 96]),
    ):
        got = answer(list(text), list(spans), [99, 98, 97, 96])
        if not isinstance(got, tuple | list) or len(got) != 2:
            return "expected the pair (source, target)."
        for what, value, right in (("source", got[0], source), ("target", got[1], target)):
            if as_numbers(value) != right:
                return f"spans {spans}: the {what} is {value}, not {right}."
    return None


def _check_bucket(answer: Callable[..., Any]) -> str | None:
    for buckets, max_distance in ((16, 128), (32, 128), (6, 23)):
        exact = buckets // 2
        for n in (0, 1, exact - 1, exact, exact + 1, 20, 60, 90, 91, 112, 113, max_distance, 1000):
            right = n
            if n >= exact:
                step = math.log(n / exact) / math.log(max_distance / exact) * (buckets - exact)
                right = min(buckets - 1, exact + int(step))
            case = f"distance {n} with {buckets} buckets up to {max_distance}"
            if problem := number_problem(answer(n, buckets, max_distance), right, case):
                return problem
    return None


def _check_count_parameters(answer: Callable[..., Any]) -> str | None:
    for name in ("t5_small", "t5_v1_1_small", "t5_11b", "t5_v1_1_xxl"):
        c = getattr(T5Config, name)()
        given = (c.vocab_size, c.d_model, c.num_layers, c.num_heads, c.head_dim, c.d_ff, c.gated, c.tied)
        if problem := number_problem(answer(*given), c.num_parameters(), name, rel=1e-12):
            return problem
    return None


def _check_decoder_block(answer: Callable[..., Any]) -> str | None:
    sizes: dict[str, Any] = {"d_model": 20, "num_heads": 3, "head_dim": 5, "d_ff": 28, "norm_eps": 1e-2}
    for gated in (False, True):
        block = DecoderBlock(T5Config(**sizes, gated=gated, dropout=0.4)).double().eval()
        with torch.no_grad():
            for p in block.parameters():
                p.copy_(torch.randn(p.shape) / (3 if p.dim() > 1 else 1))
        x, context = torch.randn(2, 6, 20).double(), torch.randn(2, 7, 20).double()
        bias, real = torch.randn(3, 6, 6).double(), torch.arange(7) < torch.tensor([[7], [4]])
        with torch.no_grad():
            right, _ = block(x, context, score_bias=bias, cross_mask=key_mask(real))
            got = answer(block, x.clone(), context.clone(), bias.clone(), real.clone())
        kind = "gated" if gated else "plain"
        if problem := tensor_problem(got, right, f"with a {kind} feed-forward layer", tol=1e-9):
            return problem
    return None


_BLOCK = """
            import torch

            def heads(x, linear, num_heads):
                return linear(x).unflatten(-1, (num_heads, -1)).transpose(1, 2)  # (B, H, T, Dh)

            def attend(attn, x, source, bias, allowed):
                q = heads(x, attn.q_proj, attn.num_heads)
                k = heads(source, attn.k_proj, attn.num_heads)
                v = heads(source, attn.v_proj, attn.num_heads)
                scores = (q @ k.mT{scale} + bias).masked_fill(~allowed, float("-inf"))
                out = scores.softmax(-1) @ v
                return attn.out_proj(out.transpose(1, 2).flatten(2))

            def decoder_block(block, x, context, bias, source_mask):
                T = x.size(1)
                earlier = torch.ones(T, T, dtype=torch.bool).tril()
                seen = source_mask[:, None, None, :]
                normed = block.attn_norm(x)
                x = x + attend(block.attn, normed, normed, bias, {earlier})
                x = x + attend(block.cross_attn, block.cross_norm(x), {source}, 0.0, {seen})
                return x + block.ffn(block.ffn_norm(x))
        """


def _block(**changes: str) -> str:
    parts = {"scale": "", "earlier": "earlier", "source": "context", "seen": "seen", **changes}
    text = _BLOCK
    for name, value in parts.items():
        text = text.replace("{" + name + "}", value)
    return text


EXERCISES = (
    Exercise(
        name="encoder-decoder/shift-right",
        title="What the decoder reads",
        stars=1,
        statement=r"""
            From labels of shape `(B, T)`, in which −100 asks for nothing, make what the decoder reads:
            `start_id` first, then the labels without the last one, and `pad_id` wherever a label of −100
            would be read. Leave the labels you were given as they are.
        """,
        answer="shift_right",
        starter="""
            import torch

            def shift_right(labels, start_id, pad_id):
                return labels
        """,
        solution="""
            import torch

            def shift_right(labels, start_id, pad_id):
                start = labels.new_full((labels.size(0), 1), start_id)
                shifted = torch.cat([start, labels[:, :-1]], dim=1)
                return shifted.masked_fill(shifted == -100, pad_id)
        """,
        wrong=(
            """
            import torch

            def shift_right(labels, start_id, pad_id):
                shifted = labels.roll(1, dims=1)
                return shifted.masked_fill(shifted == -100, pad_id)
            """,
            """
            import torch

            def shift_right(labels, start_id, pad_id):
                start = labels.new_full((labels.size(0), 1), start_id)
                return torch.cat([start, labels[:, :-1]], dim=1)
            """,
        ),
        check=_check_shift_right,
        hint="Position t reads the label of position t − 1; what does position 0 read, and what of −100?",
    ),
    Exercise(
        name="encoder-decoder/cut-spans",
        title="Cut the spans out",
        stars=1,
        statement=r"""
            `tokens` is a list of ids, `spans` a list of pairs (start, length) in the order of the text, none
            touching another, and `sentinels` the ids to use, in their order. Return the source, in which each
            span has given way to its sentinel, and the target: each sentinel followed by its span, and one
            more sentinel at the end.
        """,
        answer="cut_spans",
        starter="""
            def cut_spans(tokens, spans, sentinels):
                raise NotImplementedError  # return source, target
        """,
        solution="""
            def cut_spans(tokens, spans, sentinels):
                source, target, at = [], [], 0
                for sentinel, (start, length) in zip(sentinels, spans):
                    source += tokens[at:start] + [sentinel]
                    target += [sentinel] + tokens[start : start + length]
                    at = start + length
                return source + tokens[at:], target + [sentinels[len(spans)]]
        """,
        wrong=(
            """
            def cut_spans(tokens, spans, sentinels):
                source, target, at = [], [], 0
                for sentinel, (start, length) in zip(sentinels, spans):
                    source += tokens[at:start] + [sentinel]
                    target += [sentinel] + tokens[start : start + length]
                    at = start + length
                return source + tokens[at:], target
            """,
            """
            def cut_spans(tokens, spans, sentinels):
                source, target, at = [], [], 0
                for sentinel, (start, length) in zip(sentinels, spans):
                    source += tokens[at:start] + [sentinel] * length
                    target += [sentinel] + tokens[start : start + length]
                    at = start + length
                return source + tokens[at:], target + [sentinels[len(spans)]]
            """,
        ),
        check=_check_cut_spans,
        hint="A span leaves one sentinel, however long it is; how does the decoder say that it has finished?",
    ),
    Exercise(
        name="encoder-decoder/bucket",
        title="The bucket of a distance",
        stars=2,
        statement=r"""
            Write the bucket of a distance `n` ≥ 0 in one direction that has `buckets` of them: exact for
            the first half, then in equal steps of the logarithm up to `max_distance`, and the last one for
            all that is farther.
        """,
        answer="bucket",
        starter="""
            import math

            def bucket(n, buckets, max_distance):
                return min(n, buckets - 1)
        """,
        solution="""
            import math

            def bucket(n, buckets, max_distance):
                exact = buckets // 2
                if n < exact:
                    return n
                share = math.log(n / exact) / math.log(max_distance / exact)
                return min(buckets - 1, exact + int(share * (buckets - exact)))
        """,
        wrong=(
            """
            import math

            def bucket(n, buckets, max_distance):
                exact = buckets // 2
                if n < exact:
                    return n
                share = math.log(n / exact) / math.log(max_distance / exact)
                return min(buckets - 1, exact + round(share * (buckets - exact)))
            """,
            """
            import math

            def bucket(n, buckets, max_distance):
                exact = buckets // 2
                if n < exact:
                    return n
                share = (n - exact) / (max_distance - exact)
                return min(buckets - 1, exact + int(share * (buckets - exact)))
            """,
            """
            import math

            def bucket(n, buckets, max_distance):
                exact = buckets // 2
                if n < exact:
                    return n
                share = math.log(n) / math.log(max_distance)
                return min(buckets - 1, exact + int(share * (buckets - exact)))
            """,
        ),
        check=_check_bucket,
        hint="At buckets / 2 the share of the way is 0, at max_distance 1; a step counts when it is done.",
    ),
    Exercise(
        name="encoder-decoder/count-parameters",
        title="The parameters of T5",
        stars=2,
        statement=r"""
            Write the number of parameters of a T5 with `num_layers` blocks in each stack and 32 buckets in
            each stack's table of relative biases. A norm has a scale and nothing else, no layer has a bias;
            each stack has a norm at its end; a gated feed-forward layer has three matrices; an untied head
            has a table of its own. Predict the number for T5-small before you run it.
        """,
        answer="count_parameters",
        starter="""
            def count_parameters(vocab_size, d_model, num_layers, num_heads, head_dim, d_ff, gated, tied):
                raise NotImplementedError
        """,
        solution="""
            def count_parameters(vocab_size, d_model, num_layers, num_heads, head_dim, d_ff, gated, tied):
                tables = vocab_size * d_model * (1 if tied else 2) + 2 * 32 * num_heads
                attention = 4 * d_model * num_heads * head_dim
                ffn = (3 if gated else 2) * d_model * d_ff
                encoder = num_layers * (attention + ffn + 2 * d_model) + d_model
                decoder = num_layers * (2 * attention + ffn + 3 * d_model) + d_model
                return tables + encoder + decoder
        """,
        wrong=(
            """
            def count_parameters(vocab_size, d_model, num_layers, num_heads, head_dim, d_ff, gated, tied):
                tables = vocab_size * d_model * (1 if tied else 2) + 2 * 32 * num_heads
                ffn = (3 if gated else 2) * d_model * d_ff
                encoder = num_layers * (4 * d_model**2 + ffn + 2 * d_model) + d_model
                decoder = num_layers * (8 * d_model**2 + ffn + 3 * d_model) + d_model
                return tables + encoder + decoder
            """,
            """
            def count_parameters(vocab_size, d_model, num_layers, num_heads, head_dim, d_ff, gated, tied):
                tables = vocab_size * d_model * (1 if tied else 2) + 2 * 32 * num_heads * num_layers
                attention = 4 * d_model * num_heads * head_dim
                ffn = (3 if gated else 2) * d_model * d_ff
                encoder = num_layers * (attention + ffn + 2 * d_model) + d_model
                decoder = num_layers * (2 * attention + ffn + 3 * d_model) + d_model
                return tables + encoder + decoder
            """,
        ),
        check=_check_count_parameters,
        hint="The heads need not be as wide as the model together; one table of biases serves a stack.",
    ),
    Exercise(
        name="encoder-decoder/decoder-block",
        title="A decoder block of T5",
        stars=3,
        statement=r"""
            `block` is a {py:class}`~textbook_code.models.text.t5.DecoderBlock` with trained weights: use its
            modules `attn_norm`, `cross_norm`, `ffn_norm`, `ffn`, and of `attn` and `cross_attn` the four
            projections and `num_heads`, but not their forward passes. Compute its output for the target's
            vectors `x` $(B, T, D)$, the context $(B, S, D)$, the bias $(H, T, T)$ of the target's own
            distances, and the boolean `source_mask` $(B, S)$, True = real token.
        """,
        answer="decoder_block",
        starter="""
            def decoder_block(block, x, context, bias, source_mask):
                return x + block.ffn(block.ffn_norm(x))
        """,
        solution=_block(),
        wrong=(
            _block(scale=" * q.size(-1) ** -0.5"),
            _block(earlier="earlier | True"),
            _block(source="block.cross_norm(context)"),
            _block(seen="(seen | True)"),
        ),
        check=_check_decoder_block,
        hint="The context has been normalised by its own stack; which attention has a causal mask, which a "
        "bias, and what divides the scores?",
    ),
)
