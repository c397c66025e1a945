"""Exercises of the page on the GPT series.

Book: decoder-only
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from textbook_code.exercises.framework import Exercise
from textbook_code.exercises.judge import number_problem, tensor_problem
from textbook_code.layers.feed_forward import FeedForward
from textbook_code.layers.masks import causal_mask, sliding_window_mask
from textbook_code.models.text.gpt import GptConfig, GptForCausalLM


def _check_bits_per_character(answer: Callable[..., Any]) -> str | None:
    for B, T, V, per_token in ((1, 2, 2, 1.0), (3, 9, 17, 2.5), (2, 33, 5, 4.25)):
        logits, tokens = 3 * torch.randn(B, T, V), torch.randint(V, (B, T))
        characters = round(B * (T - 1) * per_token)
        nats = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")
        expected = nats.item() / math.log(2) / characters
        got = answer(logits.clone(), tokens.clone(), characters)
        what = f"with {B} texts of {T} tokens and {characters} characters"
        if number_problem(got, expected, what, rel=1e-4) is None:
            continue
        own = F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="sum").item()
        slips = {
            "that is in nats, not in bits.": expected * math.log(2),
            "that is for each token, not for each character.": expected * characters / (B * (T - 1)),
            "that scores each token by the logits at its own place, which have already seen it.": own
            / math.log(2)
            / characters,
        }
        for said, value in slips.items():
            if number_problem(got, value, "", rel=1e-4) is None:
                return f"{what}: {said}"
        return number_problem(got, expected, what, rel=1e-4)
    return None


def _check_last_token(answer: Callable[..., Any]) -> str | None:
    hidden = torch.randn(4, 6, 5)
    right = torch.arange(6) < torch.tensor([[6], [4], [1], [5]])
    for token_mask, what in (
        (torch.ones_like(right), "without padding"),
        (right, "with padding on the right"),
        (right.flip(1), "with padding on the left"),
        (torch.cat([right[:2], right.flip(1)[2:]]), "with padding on either side"),
    ):
        expected = torch.stack([row[mask][-1] for row, mask in zip(hidden, token_mask, strict=True)])
        if problem := tensor_problem(answer(hidden.clone(), token_mask.clone()), expected, what):
            return problem
    return None


def _check_count_pairs(answer: Callable[..., Any]) -> str | None:
    for T, window, num_layers in ((6, 2, 2), (10, 3, 5), (7, 7, 4), (64, 1, 3), (12, 40, 3), (2048, 256, 96)):
        dense, banded = causal_mask(T), sliding_window_mask(T, window=window)
        expected = sum(int((banded if i % 2 else dense).sum()) for i in range(num_layers))
        got = answer(T, window, num_layers)
        what = f"T = {T}, window = {window}, {num_layers} layers"
        if number_problem(got, expected, what, rel=1e-12) is None:
            continue
        swapped = sum(int((dense if i % 2 else banded).sum()) for i in range(num_layers))
        if num_layers % 2 and number_problem(got, swapped, "", rel=1e-12) is None:
            return f"{what}: the first layer is dense, the second has the band."
        full = (num_layers - num_layers // 2) * T * T + num_layers // 2 * T * min(window, T)
        if number_problem(got, full, "", rel=1e-12) is None:
            return f"{what}: the first tokens see fewer than the window, and no token sees a later one."
        return number_problem(got, expected, what, rel=1e-12)
    return None


def _check_count_parameters(answer: Callable[..., Any]) -> str | None:
    odd: dict[str, Any] = {
        "vocab_size": 1000,
        "d_model": 60,
        "num_layers": 3,
        "num_heads": 4,
        "d_ff": 100,
        "max_seq_len": 37,
    }
    for name, config in (
        ("GPT-2", GptConfig()),
        ("GPT-1", GptConfig.gpt1()),
        ("a small GPT-2", GptConfig(**odd)),
        ("a small GPT-1", GptConfig(**odd, pre_norm=False)),
    ):
        with torch.device("meta"):  # shapes without memory
            model = GptForCausalLM(config)
        expected = sum(p.numel() for p in model.parameters())
        sizes = (config.vocab_size, config.max_seq_len, config.d_model, config.num_layers, config.d_ff)
        got = answer(*sizes, config.pre_norm)
        if number_problem(got, expected, name, rel=1e-12) is None:
            continue
        table = config.vocab_size * config.d_model
        if number_problem(got, expected + table, "", rel=1e-12) is None:
            return f"{name}: the output layer is the token table itself; it is not counted again."
        for sign, said in ((1, "a final norm"), (-1, "the final norm")):
            if number_problem(got, expected + sign * 2 * config.d_model, "", rel=1e-12) is None:
                return f"{name}: {said} is {'too many' if sign > 0 else 'missing'}."
        return number_problem(got, expected, name, rel=1e-12)
    return None


def _check_gpt3(answer: Callable[..., Any]) -> str | None:
    sizes: dict[str, Any] = {"vocab_size": 31, "d_model": 24, "num_layers": 4, "num_heads": 3, "d_ff": 40}
    for window, what in ((None, "GPT-2 (window=None)"), (3, "GPT-3 (window=3)")):
        config = GptConfig(**sizes, max_seq_len=11, norm_eps=1e-2, window=window)
        model = GptForCausalLM(config).double().eval()
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=1.0 if parameter.dim() == 1 else parameter.size(1) ** -0.5)
        params = {name.removeprefix("gpt."): p.detach() for name, p in model.named_parameters()}
        tokens = torch.randint(31, (2, 9))
        with torch.no_grad():
            expected = model(tokens)
            got = answer(tokens.clone(), dict(params), 4, 3, 1e-2, window)
        if problem := tensor_problem(got, expected, what, tol=1e-9):
            return _known_slip(model, tokens, got) or problem
    return None


def _known_slip(model: GptForCausalLM, tokens: Tensor, got: Any) -> str | None:
    """Name the model that `got` does belong to, if it is one of the usual ones."""
    config, slips = model.config, {}
    with torch.no_grad():
        gpt = model.gpt
        final, gpt.final_norm = gpt.final_norm, None
        assert final is not None
        slips["without the final norm"] = model(tokens)
        gpt.final_norm = final
        halves = [part for part in gpt.modules() if isinstance(part, FeedForward)]
        for part in halves:
            part.activation = "gelu"
        slips["with the exact GELU"] = model(tokens)
        for part in halves:
            part.activation = "gelu_tanh"
        if config.window is not None:
            x = gpt.token_embed(tokens) + gpt.pos_embed(tokens.size(1))
            band = sliding_window_mask(tokens.size(1), window=config.window)
            for everywhere in (True, False):
                h = x
                for i, block in enumerate(gpt.blocks):
                    h, _ = block(h, attn_mask=band if everywhere or i % 2 == 0 else None)
                where = "in every layer" if everywhere else "in the first, third, … layer"
                slips[f"with the band {where}"] = gpt.token_embed.attend(final(h))
    for said, output in slips.items():
        if tensor_problem(got, output, "", tol=1e-9) is None:
            return f"this is what the model computes {said}."
    return None


_GPT_HEAD = """
    import torch
    import torch.nn.functional as F

    def gpt(tokens, params, num_layers, num_heads, norm_eps, window):
        def linear(name, x):
            return F.linear(x, params[name + ".weight"], params[name + ".bias"])

        def norm(name, x):
            return F.layer_norm(x, x.shape[-1:], params[name + ".weight"], params[name + ".bias"], norm_eps)

        def attend(name, x, mask):
            q, k, v = (
                linear(f"{name}.{p}_proj", x).unflatten(-1, (num_heads, -1)).transpose(1, 2) for p in "qkv"
            )  # (B, H, T, Dh)
            scores = (q @ k.transpose(-2, -1) / q.size(-1) ** 0.5).masked_fill(~mask, float("-inf"))
            return linear(name + ".out_proj", (scores.softmax(-1) @ v).transpose(1, 2).flatten(2))

        def feed_forward(name, x):
            return linear(name + ".fc2", F.gelu(linear(name + ".fc1", x), approximate="tanh"))

        T = tokens.size(1)
        causal = torch.ones(T, T, dtype=torch.bool).tril()
        x = params["token_embed.weight"][tokens] + params["pos_embed.weight"][:T]  # (B, T, D)
"""
_GPT1_TAIL = """
        for i in range(num_layers):
            block = f"blocks.{i}."
            x = norm(block + "attn_norm", x + attend(block + "attn", x, causal))
            x = norm(block + "ffn_norm", x + feed_forward(block + "ffn", x))
        return x @ params["token_embed.weight"].T  # (B, T, V)
"""
_GPT3_TAIL = """
        band = causal if window is None else causal & causal.new_ones(T, T).triu(1 - window)
        for i in range(num_layers):
            block, mask = f"blocks.{i}.", band if i % 2 else causal
            x = x + attend(block + "attn", norm(block + "attn_norm", x), mask)
            x = x + feed_forward(block + "ffn", norm(block + "ffn_norm", x))
        return norm("final_norm", x) @ params["token_embed.weight"].T
"""

EXERCISES = (
    Exercise(
        name="decoder-only/bits-per-character",
        title="From logits to bits per character",
        stars=1,
        statement=r"""
            A language model reads `tokens` of shape `(B, T)` and returns `logits` of shape `(B, T, V)`; the
            row at position $t$ scores the token at $t + 1$. The predicted tokens, all but the first of each
            row, stand for `characters` characters of text. How many bits does the model need for each
            character?
        """,
        answer="bits_per_character",
        starter="""
            import torch.nn.functional as F

            def bits_per_character(logits, tokens, characters):
                return F.cross_entropy(logits.flatten(0, 1), tokens.flatten())
        """,
        solution="""
            import math

            import torch.nn.functional as F

            def bits_per_character(logits, tokens, characters):
                scores, following = logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()
                nats = F.cross_entropy(scores, following, reduction="sum").item()
                return nats / math.log(2) / characters
        """,
        wrong=(
            """
            import torch.nn.functional as F

            def bits_per_character(logits, tokens, characters):
                scores, following = logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()
                return F.cross_entropy(scores, following, reduction="sum").item() / characters
            """,
            """
            import math

            import torch.nn.functional as F

            def bits_per_character(logits, tokens, characters):
                scores, following = logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()
                return F.cross_entropy(scores, following).item() / math.log(2)
            """,
            """
            import math

            import torch.nn.functional as F

            def bits_per_character(logits, tokens, characters):
                nats = F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="sum").item()
                return nats / math.log(2) / characters
            """,
        ),
        check=_check_bits_per_character,
        hint="Shift by one, sum instead of averaging, and remember what a bit is in nats.",
    ),
    Exercise(
        name="decoder-only/last-token",
        title="The token that has seen all",
        stars=1,
        statement=r"""
            GPT-1 classifies a text by the hidden state of its last real token. Pick it out of `hidden`, of
            shape `(B, T, D)`, for each row of a boolean `token_mask` of shape `(B, T)`, True = real token.
            Padding may stand on the left in one row and on the right in another; each row has a real token.
        """,
        answer="last_token",
        starter="""
            def last_token(hidden, token_mask):
                return hidden[:, -1]
        """,
        solution="""
            import torch

            def last_token(hidden, token_mask):
                T = token_mask.size(1)
                last = torch.where(token_mask, torch.arange(T), -1).max(dim=1).values  # (B,)
                return hidden[torch.arange(len(hidden)), last]
        """,
        wrong=(
            """
            import torch

            def last_token(hidden, token_mask):
                return hidden[torch.arange(len(hidden)), token_mask.sum(dim=1) - 1]
            """,
            """
            import torch

            def last_token(hidden, token_mask):
                return hidden[torch.arange(len(hidden)), token_mask.int().argmax(dim=1)]
            """,
        ),
        check=_check_last_token,
        hint="The number of real tokens tells where the last one is on one side only.",
    ),
    Exercise(
        name="decoder-only/count-pairs",
        title="What the band saves",
        stars=2,
        statement=r"""
            Every second layer of GPT-3 has a band: the first layer is dense, the second lets each token see
            itself and the `window` − 1 tokens before it, the third is dense again. Count the pairs of query
            and key that `num_layers` layers allow for a text of `T` tokens, in closed form: no loop over
            tokens. The window may be wider than the text.
        """,
        answer="count_pairs",
        starter="""
            def count_pairs(T, window, num_layers):
                return num_layers * T * T
        """,
        solution="""
            def count_pairs(T, window, num_layers):
                w = min(window, T)
                dense = T * (T + 1) // 2
                banded = w * (w + 1) // 2 + (T - w) * w  # the first w tokens see fewer
                num_banded = num_layers // 2
                return (num_layers - num_banded) * dense + num_banded * banded
        """,
        wrong=(
            """
            def count_pairs(T, window, num_layers):
                num_banded = num_layers // 2
                return (num_layers - num_banded) * T * T + num_banded * T * min(window, T)
            """,
            """
            def count_pairs(T, window, num_layers):
                num_banded = num_layers // 2
                return (num_layers - num_banded) * T * (T + 1) // 2 + num_banded * T * min(window, T)
            """,
            """
            def count_pairs(T, window, num_layers):
                w = min(window, T)
                dense, banded = T * (T + 1) // 2, w * (w + 1) // 2 + (T - w) * w
                num_dense = num_layers // 2
                return num_dense * dense + (num_layers - num_dense) * banded
            """,
        ),
        check=_check_count_pairs,
        hint="Sum min(i, window) over the tokens i = 1 … T: a triangle, then a rectangle.",
    ),
    Exercise(
        name="decoder-only/count-parameters",
        title="The parameters of a GPT",
        stars=2,
        statement=r"""
            Write the number of parameters of a GPT language model: two tables, blocks as BERT's, and with
            `pre_norm` one more norm behind the last block. Every linear layer has a bias, every norm a scale
            and a shift; the output layer is the token table. Predict the number for GPT-2 before you run it.
        """,
        answer="count_parameters",
        starter="""
            def count_parameters(vocab_size, max_seq_len, d_model, num_layers, d_ff, pre_norm):
                raise NotImplementedError
        """,
        solution="""
            def count_parameters(vocab_size, max_seq_len, d_model, num_layers, d_ff, pre_norm):
                norm = 2 * d_model
                attention = 4 * (d_model * d_model + d_model)
                feed_forward = (d_model * d_ff + d_ff) + (d_ff * d_model + d_model)
                tables = (vocab_size + max_seq_len) * d_model
                return tables + num_layers * (attention + feed_forward + 2 * norm) + norm * pre_norm
        """,
        wrong=(
            """
            def count_parameters(vocab_size, max_seq_len, d_model, num_layers, d_ff, pre_norm):
                block = 4 * (d_model**2 + d_model) + 2 * d_model * d_ff + d_ff + d_model + 4 * d_model
                tables = (2 * vocab_size + max_seq_len) * d_model
                return tables + num_layers * block + 2 * d_model * pre_norm
            """,
            """
            def count_parameters(vocab_size, max_seq_len, d_model, num_layers, d_ff, pre_norm):
                block = 4 * (d_model**2 + d_model) + 2 * d_model * d_ff + d_ff + d_model + 4 * d_model
                return (vocab_size + max_seq_len) * d_model + num_layers * block + 2 * d_model
            """,
            """
            def count_parameters(vocab_size, max_seq_len, d_model, num_layers, d_ff, pre_norm):
                return (vocab_size + max_seq_len) * d_model + 12 * num_layers * d_model**2
            """,
        ),
        check=_check_count_parameters,
        hint="Start from the count of BERT's block, and ask of each table and norm whether GPT has it.",
    ),
    Exercise(
        name="decoder-only/next-family",
        title="From GPT-1 to GPT-3",
        stars=3,
        statement=r"""
            The starter is the whole of GPT-1, as one function of its `params`, which are named as in the
            package. Make GPT-3 of it: pre-norm blocks, the norm `final_norm` behind the last of them, and,
            where `window` is a number, a band of so many positions in the second, fourth, … layer. With
            `window=None` the same function is GPT-2. It returns the logits `(B, T, V)` and is compared with
            the package's model in double precision.
        """,
        answer="gpt",
        starter=_GPT_HEAD + _GPT1_TAIL.lstrip("\n"),
        solution=_GPT_HEAD + _GPT3_TAIL.lstrip("\n"),
        wrong=(
            _GPT_HEAD + _GPT3_TAIL.replace('norm("final_norm", x)', "x").lstrip("\n"),
            _GPT_HEAD
            + _GPT3_TAIL.replace("band if i % 2 else causal", "causal if i % 2 else band").lstrip("\n"),
            _GPT_HEAD + _GPT3_TAIL.replace("triu(1 - window)", "triu(-window)").lstrip("\n"),
            _GPT_HEAD
            + _GPT1_TAIL.replace(
                'return x @ params["token', 'return norm("final_norm", x) @ params["token'
            ).lstrip("\n"),
        ),
        check=_check_gpt3,
        hint="Move each norm to the input of its half, leave the sum alone, and add one at the end.",
    ),
)
