"""Exercises of the page on generation.

Book: generation
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from textbook_code.exercises.framework import Exercise
from textbook_code.exercises.judge import as_numbers, number_problem, tensor_problem
from textbook_code.inference.beam import Beams
from textbook_code.inference.sampling import top_p_filter
from textbook_code.layers.positions import token_positions
from textbook_code.models.text.llama import LlamaConfig, LlamaForCausalLM


def _check_cache_bytes(answer: Callable[..., Any]) -> str | None:
    small = LlamaConfig(
        vocab_size=50, d_model=48, num_layers=3, num_heads=6, num_kv_heads=2, head_dim=10, d_ff=20
    )
    for name, config, batch, length, dtype in (
        ("a small model", small, 5, 7, torch.float32),
        ("SmolLM2 in float32", LlamaConfig.smollm2_135m(), 1, 1024, torch.float32),
        ("LLaMA 3, 8B, in bfloat16", LlamaConfig.llama3_8b(), 16, 8192, torch.bfloat16),
    ):
        with torch.device("meta"):  # shapes without memory
            cache = LlamaForCausalLM(config).to(dtype).make_cache(batch, length)
        expected = sum(layer.k.numel() + layer.v.numel() for layer in cache) * dtype.itemsize
        got = answer(config.num_layers, config.num_kv_heads, config.head_dim, length, batch, dtype.itemsize)
        if number_problem(got, expected, name, rel=1e-9) is None:
            continue
        for said, factor in (
            ("the values: keys alone are counted", 2),
            ("the layers", config.num_layers),
            ("the rows of the batch", batch),
            ("the bytes of a number", dtype.itemsize),
        ):
            if factor > 1 and number_problem(got, expected / factor, "", rel=1e-9) is None:
                return f"{name}: what is missing is {said}."
        return number_problem(got, expected, name, rel=1e-9)
    return None


def _check_stop(answer: Callable[..., Any]) -> str | None:
    stop, pad = [7, 4], 0
    cases = {
        "a row that ends in its middle": [[5, 7, 3, 3]],
        "a row that never ends": [[5, 3, 2, 1]],
        "a row that ends at once": [[4, 4, 7, 2]],
        "a row that ends with its last token": [[5, 2, 2, 7]],
        "several rows, each for itself": [[5, 7, 3, 3, 4], [1, 2, 3, 4, 7], [9, 9, 9, 9, 9], [7, 1, 1, 1, 1]],
    }
    for what, rows in cases.items():
        given = torch.tensor(rows)
        new = given.clone()
        expected = new.clone()
        for row in expected:
            hits = [i for i, token in enumerate(row.tolist()) if token in stop]
            if hits:
                row[hits[0] + 1 :] = pad
        got = answer(new, list(stop), pad)
        if not isinstance(got, Tensor) or got.shape != expected.shape:
            return f"{what}: expected a tensor of shape {tuple(expected.shape)}."
        if not new.equal(given):
            return f"{what}: the tokens that came in were changed; work on a copy."
        if not got.equal(expected):
            return f"{what}: {given.tolist()} became {got.tolist()}, not {expected.tolist()}."
    return None


def _check_top_p(answer: Callable[..., Any]) -> str | None:
    halves = torch.tensor([[0.5, 0.25, 0.125, 0.125], [0.125, 0.5, 0.125, 0.25]])
    random = (2 * torch.randn(6, 40)).softmax(-1)
    for probabilities, p, what in (
        (halves, 0.7, "with (1/2, 1/4, 1/8, 1/8) and p = 0.7"),
        (halves, 0.3, "with p = 0.3, less than the likeliest has alone"),
        (halves, 0.75, "with p = 0.75, which two tokens have exactly"),
        (random, 0.9, "with random rows and p = 0.9"),
        (random, 1.0, "with p = 1, which keeps all"),
    ):
        expected = top_p_filter(probabilities.log(), p).softmax(-1)
        got = answer(probabilities.clone(), p)
        if not isinstance(got, Tensor) or got.shape != probabilities.shape:
            return f"{what}: expected a tensor of shape {tuple(probabilities.shape)}."
        want, have = (expected > 0).sum(-1).tolist(), (got > 0).sum(-1).tolist()
        if want != have:
            return f"{what}: {have} tokens are kept in the rows, expected {want}."
        if problem := tensor_problem(got, expected, what, tol=1e-5):
            return problem
    return None


def _check_left_pad(answer: Callable[..., Any]) -> str | None:
    for prompts, pad in (
        ([[5, 6, 7], [8]], 0),
        ([[1, 2], [3, 4]], 9),
        ([[0, 0, 3], [4], [5, 0, 6, 7]], 0),  # the padding's id may stand in a prompt
    ):
        got = answer([list(prompt) for prompt in prompts], pad)
        if not isinstance(got, tuple | list) or len(got) != 3:
            return "expected the triple (tokens, token_mask, positions)."
        width = max(map(len, prompts))
        mask = torch.tensor([[i >= width - len(prompt) for i in range(width)] for prompt in prompts])
        tokens = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts])
        for name, value, expected in zip(
            ("tokens", "token_mask", "positions"), got, (tokens, mask, token_positions(mask)), strict=True
        ):
            what = f"{name} of prompts of {', '.join(str(len(prompt)) for prompt in prompts)} tokens"
            if not isinstance(value, Tensor) or value.shape != expected.shape:
                return f"{what}: expected a tensor of shape {tuple(expected.shape)}."
            if value.is_floating_point() or (name == "token_mask") != (value.dtype == torch.bool):
                return (
                    f"{what}: expected {'bool' if name == 'token_mask' else 'integers'}, got {value.dtype}."
                )
            if name == "positions":  # those of padding are of no account
                value, expected = value[mask], expected[mask]
            if not value.equal(expected):
                return f"{what}: got {value.tolist()}, not {expected.tolist()}."
    return None


def _check_beam_step(answer: Callable[..., Any]) -> str | None:
    K, V, stop = 3, 6, 2
    beams, scores = Beams(1, K, 9, stop_tokens=[stop]), torch.tensor([0.0, -torch.inf, -torch.inf])
    for step in range(4):
        log_probs = (2 * torch.randn(K, V)).log_softmax(-1)
        if step == 2:  # the stop token is everybody's favourite
            log_probs[:, stop] = 0.0
        tokens, rows = beams.advance(log_probs)
        expected = (beams.log_probs[0], rows, tokens)
        got = answer(scores.clone(), log_probs.clone(), stop)
        what = f"in step {step + 1} of a search with {K} beams"
        if not isinstance(got, tuple | list) or len(got) != 3:
            return "expected the triple (scores, rows, tokens)."
        for name, value, wanted in zip(("scores", "rows", "tokens"), got, expected, strict=True):
            if not isinstance(value, Tensor) or value.shape != (K,):
                return f"{what}: {name} must be a tensor of shape ({K},)."
            if name == "scores":
                if problem := tensor_problem(value, wanted, f"{what}: scores", tol=1e-5):
                    return problem
            elif as_numbers(value.tolist()) is None or value.tolist() != wanted.tolist():
                return f"{what}: {name} are {value.tolist()}, not {wanted.tolist()}."
        scores = beams.log_probs[0].clone()
    return None


EXERCISES = (
    Exercise(
        name="generation/cache-bytes",
        title="What a conversation costs",
        stars=1,
        statement=r"""
            Write the bytes of the key/value cache as a function of the number of layers, of key/value heads,
            of the width of a head, of the positions, of the rows of the batch, and of the bytes that a
            number takes. Before you run it, predict: does LLaMA 3 with 8 billion parameters need more
            memory for its weights, or for sixteen conversations of 8,192 tokens, both in bfloat16?
        """,
        answer="cache_bytes",
        starter="""
            def cache_bytes(num_layers, num_kv_heads, head_dim, length, batch_size, bytes_per_number):
                raise NotImplementedError
        """,
        solution="""
            def cache_bytes(num_layers, num_kv_heads, head_dim, length, batch_size, bytes_per_number):
                one_position = 2 * num_layers * num_kv_heads * head_dim  # keys and values
                return one_position * length * batch_size * bytes_per_number
        """,
        wrong=(
            """
            def cache_bytes(num_layers, num_kv_heads, head_dim, length, batch_size, bytes_per_number):
                return num_layers * num_kv_heads * head_dim * length * batch_size * bytes_per_number
            """,
            """
            def cache_bytes(num_layers, num_kv_heads, head_dim, length, batch_size, bytes_per_number):
                return 2 * num_layers * num_kv_heads * head_dim * length * bytes_per_number
            """,
            """
            def cache_bytes(num_layers, num_kv_heads, head_dim, length, batch_size, bytes_per_number):
                return 2 * num_layers * num_kv_heads * head_dim * length**2 * batch_size * bytes_per_number
            """,
        ),
        check=_check_cache_bytes,
        hint="Begin with one position of one row in one layer: two vectors for each key/value head.",
    ),
    Exercise(
        name="generation/stop",
        title="Each row ends for itself",
        stars=1,
        statement=r"""
            `new` holds the new tokens of a batch, integers of shape `(B, N)`. A row ends with the first
            token that is among `stop_tokens`. Return the tokens with everything behind the end of a row
            replaced by `pad_id`; the stop token itself stays. Write it without a loop over rows.
        """,
        answer="end_rows",
        starter="""
            import torch

            def end_rows(new, stop_tokens, pad_id):
                raise NotImplementedError
        """,
        solution="""
            import torch

            def end_rows(new, stop_tokens, pad_id):
                stops = torch.isin(new, torch.tensor(stop_tokens))  # (B, N)
                before = stops.cumsum(1) - stops.long()  # stop tokens that stand before each place
                return new.masked_fill(before > 0, pad_id)
        """,
        wrong=(
            """
            import torch

            def end_rows(new, stop_tokens, pad_id):
                stops = torch.isin(new, torch.tensor(stop_tokens))
                return new.masked_fill(stops.cumsum(1) > 0, pad_id)
            """,
            """
            import torch

            def end_rows(new, stop_tokens, pad_id):
                stops = torch.isin(new, torch.tensor(stop_tokens))
                return new.masked_fill(stops.roll(1, dims=1), pad_id)
            """,
            """
            import torch

            def end_rows(new, stop_tokens, pad_id):
                stops = torch.isin(new, torch.tensor(stop_tokens)).any(0)
                before = stops.cumsum(0) - stops.long()
                return new.masked_fill(before > 0, pad_id)
            """,
        ),
        check=_check_stop,
        hint="How many stop tokens stand before a place? A cumulative sum counts them, itself included.",
    ),
    Exercise(
        name="generation/top-p",
        title="The nucleus",
        stars=2,
        statement=r"""
            Write top-p for probabilities of shape `(B, V)`: keep in each row the smallest number of likeliest
            tokens that together have probability $p$ or more, give the others probability zero, and divide by
            what is left, so that each row sums to one again. The tokens stay in their places.
        """,
        answer="nucleus",
        starter="""
            import torch

            def nucleus(probabilities, p):
                return probabilities
        """,
        solution="""
            import torch

            def nucleus(probabilities, p):
                q, order = probabilities.sort(dim=-1, descending=True, stable=True)
                before = q.cumsum(-1) - q  # what the likelier ones have
                q = q.masked_fill((before >= p) & (p < 1), 0)
                kept = torch.zeros_like(probabilities).scatter(-1, order, q)  # back to their places
                return kept / kept.sum(-1, keepdim=True)
        """,
        wrong=(
            """
            import torch

            def nucleus(probabilities, p):
                q, order = probabilities.sort(dim=-1, descending=True)
                q = q.masked_fill(q.cumsum(-1) > p, 0)  # loses the token that crosses the line
                kept = torch.zeros_like(probabilities).scatter(-1, order, q)
                return kept / kept.sum(-1, keepdim=True).clamp(min=1e-9)
            """,
            """
            import torch

            def nucleus(probabilities, p):
                q, order = probabilities.sort(dim=-1, descending=True)
                q = q.masked_fill((q.cumsum(-1) - q >= p) & (p < 1), 0)
                return q / q.sum(-1, keepdim=True)
            """,
            """
            import torch

            def nucleus(probabilities, p):
                q, order = probabilities.sort(dim=-1, descending=True, stable=True)
                q = q.masked_fill((q.cumsum(-1) - q >= p) & (p < 1), 0)
                return torch.zeros_like(probabilities).scatter(-1, order, q)
            """,
        ),
        check=_check_top_p,
        hint="Sort, sum what stands before each token, compare with p, and put everything back.",
    ),
    Exercise(
        name="generation/left-pad",
        title="Prompts of different lengths",
        stars=2,
        statement=r"""
            Put prompts, lists of token ids, into one batch that a decoder can continue: the tokens `(B, S)`
            padded on the left with `pad_id`, the mask `(B, S)`, True = real token, and the positions
            `(B, S)`, which count the real tokens of each row from 0. What positions padding gets is your
            choice, but none may be negative. `pad_id` may also occur inside a prompt.
        """,
        answer="left_pad",
        starter="""
            import torch

            def left_pad(prompts, pad_id):
                raise NotImplementedError  # return tokens, token_mask, positions
        """,
        solution="""
            import torch

            def left_pad(prompts, pad_id):
                width = max(len(prompt) for prompt in prompts)
                tokens = torch.tensor([[pad_id] * (width - len(p)) + list(p) for p in prompts])
                spare = torch.tensor([width - len(p) for p in prompts])[:, None]  # (B, 1)
                positions = torch.arange(width) - spare
                return tokens, positions >= 0, positions.clamp(min=0)
        """,
        wrong=(
            """
            import torch

            def left_pad(prompts, pad_id):
                width = max(len(prompt) for prompt in prompts)
                tokens = torch.tensor([[pad_id] * (width - len(p)) + list(p) for p in prompts])
                mask = tokens != pad_id
                return tokens, mask, (mask.cumsum(-1) - 1).clamp(min=0)
            """,
            """
            import torch

            def left_pad(prompts, pad_id):
                width = max(len(prompt) for prompt in prompts)
                tokens = torch.tensor([[pad_id] * (width - len(p)) + list(p) for p in prompts])
                spare = torch.tensor([width - len(p) for p in prompts])[:, None]
                return tokens, torch.arange(width) >= spare, torch.arange(width).expand_as(tokens)
            """,
            """
            import torch

            def left_pad(prompts, pad_id):
                width = max(len(prompt) for prompt in prompts)
                tokens = torch.tensor([list(p) + [pad_id] * (width - len(p)) for p in prompts])
                length = torch.tensor([len(p) for p in prompts])[:, None]
                return tokens, torch.arange(width) < length, torch.arange(width).expand_as(tokens)
            """,
        ),
        check=_check_left_pad,
        hint="The lengths tell where the padding ends; the ids do not.",
    ),
    Exercise(
        name="generation/beam-step",
        title="One step of beam search",
        stars=3,
        statement=r"""
            Write one step of beam search for one text. `scores` of shape `(K,)` are the sums of the
            log-probabilities of the living hypotheses (at the start one of them is 0 and the others −∞),
            `log_probs` of shape `(K, V)` those of their next tokens. Return the sums of the best K
            continuations that do not end with the token `stop`, the best first, together with the row that
            each continues and its token, three tensors of shape `(K,)`.
        """,
        answer="beam_step",
        starter="""
            import torch

            def beam_step(scores, log_probs, stop):
                raise NotImplementedError  # return scores, rows, tokens
        """,
        solution="""
            import torch

            def beam_step(scores, log_probs, stop):
                K, V = log_probs.shape
                total = scores[:, None] + log_probs  # (K, V)
                total[:, stop] = -torch.inf  # what ends is put aside
                best, choice = total.flatten().topk(K)
                return best, choice // V, choice % V
        """,
        wrong=(
            """
            import torch

            def beam_step(scores, log_probs, stop):
                K, V = log_probs.shape
                best, choice = (scores[:, None] + log_probs).flatten().topk(K)
                return best, choice // V, choice % V  # lets a text go on behind its end
            """,
            """
            import torch

            def beam_step(scores, log_probs, stop):
                log_probs[:, stop] = -torch.inf
                best, tokens = log_probs.max(dim=-1)  # every hypothesis keeps one child
                return scores + best, torch.arange(len(scores)), tokens
            """,
            """
            import torch

            def beam_step(scores, log_probs, stop):
                K, V = log_probs.shape
                log_probs[:, stop] = -torch.inf
                best, choice = log_probs.flatten().topk(K)  # forgets what came before
                return best, choice // V, choice % V
            """,
        ),
        check=_check_beam_step,
        hint="All K·V continuations compete in one row; its index divided by V tells the hypothesis.",
    ),
)
