"""Exercises of the page on encoder-only models.

Book: encoder-only
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from textbook_code.exercises.framework import Exercise
from textbook_code.exercises.judge import as_numbers, number_problem, tensor_problem
from textbook_code.layers.masks import key_mask
from textbook_code.models.text.bert import Bert, BertConfig, Block, mean_pool


def _check_segments(answer: Callable[..., Any]) -> str | None:
    cls, sep, pad = 101, 102, 0
    a, b = list(range(1000, 1005)), list(range(2000, 2003))
    for first, second, max_seq_len in (
        (a, b, 11),
        (a, b, 14),
        (a, b, 8),
        (a, a + b, 10),
        (a, a, 10),
        (b, b, 9),
    ):
        x, y = list(first), list(second)
        while len(x) + len(y) + 3 > max_seq_len:
            (x if len(x) > len(y) else y).pop()
        spare = max_seq_len - len(x) - len(y) - 3
        expected: dict[str, Sequence[int]] = {
            "tokens": [cls, *x, sep, *y, sep] + [pad] * spare,
            "segments": [0] * (len(x) + 2) + [1] * (len(y) + 1) + [0] * spare,
            "token_mask": [True] * (max_seq_len - spare) + [False] * spare,
        }
        case = f"with texts of {len(first)} and {len(second)} tokens and max_seq_len={max_seq_len}"
        got = answer(list(first), list(second), max_seq_len, cls, sep, pad)
        if not isinstance(got, list | tuple) or len(got) != 3:
            return "expected the triple (tokens, segments, token_mask)."
        for (what, wanted), values in zip(expected.items(), got, strict=True):
            numbers = as_numbers([int(v) if isinstance(v, bool) else v for v in values])
            if numbers is None:
                return f"{case}: {what} must be a list of {'bools' if what == 'token_mask' else 'integers'}."
            if len(numbers) != max_seq_len:
                return f"{case}: {what} has {len(numbers)} entries, expected {max_seq_len}."
            for place, (value, right) in enumerate(zip(numbers, wanted, strict=True)):
                if value != right:
                    return f"{case}: {what}[{place}] is {values[place]}, not {right}."
    return None


def _check_mean_pool(answer: Callable[..., Any]) -> str | None:
    hidden = torch.randn(4, 6, 5)
    lengths = torch.tensor([6, 4, 3, 2])[:, None]  # the last pair has an empty second text
    token_mask = torch.arange(6) < lengths
    segments = (torch.arange(6) >= 2).long() * token_mask  # padding is 0, as from a tokenizer
    padded_as_second = (torch.arange(6) >= 2).long().expand(4, 6)  # or segment 1: it must not matter
    for rows, kinds, what in (
        (slice(0, 1), segments, "a pair without padding"),
        (slice(0, 3), segments, "second texts of 4, 2 and 1 tokens"),
        (slice(0, 3), padded_as_second, "padding that carries segment 1"),
        (slice(0, 4), segments, "with a pair whose second text is empty"),
    ):
        wanted = token_mask[rows] & (kinds[rows] == 1)
        expected = mean_pool(hidden[rows], wanted)
        got = answer(hidden[rows].clone(), token_mask[rows].clone(), kinds[rows].clone())
        if problem := tensor_problem(got, expected, what):
            return problem
    return None


def _check_mask_ratio(answer: Callable[..., Any]) -> str | None:
    vocab_size, mask_id = 30_000, 4
    tokens = torch.randint(5, vocab_size, (400, 500))
    special = torch.rand(tokens.shape) < 0.1
    given = tokens.clone()
    got = answer(given, special.clone(), mask_id, vocab_size)
    if not isinstance(got, tuple | list) or len(got) != 2:
        return "expected the pair (inputs, targets)."
    inputs, targets = got
    for what, value in (("inputs", inputs), ("targets", targets)):
        if not isinstance(value, Tensor) or value.shape != tokens.shape or value.is_floating_point():
            return f"{what}: expected integers of shape {tuple(tokens.shape)}."
    if not given.equal(tokens):
        return "the tokens that came in were changed: work on a copy."
    chosen = targets != -100
    if (chosen & special).any():
        return "a special token was chosen."
    if not targets[chosen].equal(tokens[chosen]):
        return "a target is not the token that stood there."
    if not inputs[~chosen].equal(tokens[~chosen]):
        return "a token changed though its target is −100."
    share = chosen.sum().item() / (~special).sum().item()
    if abs(share - 0.15) > 0.006:
        return f"{share:.1%} of the ordinary tokens were chosen, expected 15 %."
    before, after = tokens[chosen], inputs[chosen]
    masked, kept = after == mask_id, after == before
    other = ~masked & ~kept
    shares = [kind.double().mean().item() for kind in (masked, other, kept)]
    if any(abs(share - wanted) > 0.012 for share, wanted in zip(shares, (0.8, 0.1, 0.1), strict=True)):
        return "of the chosen, {:.1%} became the mask, {:.1%} another token, and {:.1%} stayed.".format(
            *shares
        )
    if after[other].unique().numel() < 0.9 * other.sum().item():
        return "the random tokens are too few: draw one for each place, from the whole vocabulary."
    return None


def _check_count_parameters(answer: Callable[..., Any]) -> str | None:
    odd = BertConfig(
        vocab_size=1_000, d_model=60, num_layers=3, num_heads=4, d_ff=100, max_seq_len=37, num_segments=5
    )
    for name, config in (
        ("BERT-base", BertConfig()),
        ("MiniLM-L6", BertConfig.minilm_l6()),
        ("a small model", odd),
    ):
        with torch.device("meta"):  # shapes without memory
            bert = Bert(config)
        expected = _numbers_in(bert)
        fields = ("vocab_size", "max_seq_len", "num_segments", "d_model", "num_layers", "d_ff")
        got = answer(*(getattr(config, field) for field in fields))
        if number_problem(got, expected, name, rel=1e-9) is None:
            continue
        parts = {
            "the pooler": _numbers_in(bert.pooler),
            "the table of segments": _numbers_in(bert.segment_embed),
            "the table of positions": _numbers_in(bert.pos_embed),
            "the norm of the embeddings": _numbers_in(bert.embed_norm),
            "the norms of the blocks": _numbers_in(bert.blocks, "norm."),
            "the biases of the linear layers": _numbers_in(bert, ".bias") - _numbers_in(bert, "norm.bias"),
        }
        for part, numbers in parts.items():
            if number_problem(got, expected - numbers, "", rel=1e-9) is None:
                return f"{name}: just what {part} would add is missing."
        return number_problem(got, expected, name, rel=1e-9)
    return None


def _numbers_in(module: nn.Module | None, named: str = "") -> int:
    """How many numbers the parameters hold whose names contain `named`."""
    return sum(p.numel() for name, p in module.named_parameters() if named in name) if module else 0


def _check_post_norm_block(answer: Callable[..., Any]) -> str | None:
    config = BertConfig(d_model=24, num_heads=3, d_ff=40, norm_eps=1e-2, dropout=0.0)
    block = Block(config).double().eval()
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=1.0 if parameter.dim() == 1 else parameter.size(1) ** -0.5)
    params = {name: p.detach() for name, p in block.named_parameters()}
    x = torch.randn(2, 7, config.d_model, dtype=torch.float64)
    ragged = torch.arange(7) < torch.tensor([[7], [4]])
    for token_mask, what in ((torch.ones_like(ragged), "without padding"), (ragged, "with padding")):
        with torch.no_grad():
            expected = block(x, attn_mask=key_mask(token_mask))[0]
            got = answer(x.clone(), dict(params), config.num_heads, config.norm_eps, token_mask.clone())
        real = token_mask[..., None].to(x.dtype)
        if isinstance(got, Tensor) and got.shape == expected.shape:  # what stands at padding is of no account
            got, expected = torch.where(real > 0, got, 0), torch.where(real > 0, expected, 0)
        if problem := tensor_problem(got, expected, what, tol=1e-9):
            return _known_slip(block, x, token_mask, got) or problem
    return None


def _known_slip(block: Block, x: Tensor, token_mask: Tensor, got: Any) -> str | None:
    """Name the model that `got` does belong to, if it is one of the usual ones."""
    mask = key_mask(token_mask)
    with torch.no_grad():
        pre = x + block.attn(block.attn_norm(x), attn_mask=mask)
        slips = {"a pre-norm block": pre + block.ffn(block.ffn_norm(pre))}
        block.ffn.activation = "gelu_tanh"
        slips["a block with the tanh approximation of GELU"] = block(x, attn_mask=mask)[0]
        block.ffn.activation = "relu"
        slips["a block with ReLU"] = block(x, attn_mask=mask)[0]
        block.ffn.activation = "gelu"
        block.attn_norm.norm_eps = block.ffn_norm.norm_eps = 1e-5
        slips["a block with torch's default eps"] = block(x, attn_mask=mask)[0]
    real = token_mask[..., None]
    for said, output in slips.items():
        if tensor_problem(got, torch.where(real, output, 0), "", tol=1e-9) is None:
            return f"this is what {said} computes."
    return None


_HEAD = """
import torch
import torch.nn.functional as F

def block(x, params, num_heads, norm_eps, token_mask):
    def linear(name, x):
        return F.linear(x, params[name + ".weight"], params[name + ".bias"])

    def norm(name, x):
        return F.layer_norm(x, x.shape[-1:], params[name + ".weight"], params[name + ".bias"], norm_eps)

    def attend(x):
        q, k, v = (
            linear(f"attn.{name}_proj", x).unflatten(-1, (num_heads, -1)).transpose(1, 2) for name in "qkv"
        )  # (B, H, T, Dh)
        scores = q @ k.transpose(-2, -1) / q.size(-1) ** 0.5  # (B, H, T, T)
        scores = scores.masked_fill(~token_mask[:, None, None, :], float("-inf"))
        return linear("attn.out_proj", (scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
"""
_TAIL = """
    x = norm("attn_norm", x + attend(x))
    return norm("ffn_norm", x + linear("ffn.fc2", F.gelu(linear("ffn.fc1", x))))
"""
_PRE_NORM_TAIL = """
    x = x + attend(norm("attn_norm", x))
    return x + linear("ffn.fc2", F.gelu(linear("ffn.fc1", norm("ffn_norm", x))))
"""

EXERCISES = (
    Exercise(
        name="encoder-only/segments",
        title="Two texts in one row",
        stars=1,
        statement=r"""
            BERT reads a pair of texts as one row: `[CLS]`, the first text, `[SEP]`, the second text,
            `[SEP]`. Write the row for two lists of token ids, padded to `max_seq_len` with `pad_id`,
            together with the segments (0 up to and including the first `[SEP]`, 1 from there to the second,
            0 for padding) and the token mask (True = real token, the special tokens included). Where the
            pair is too long, drop the last token of the longer text, or of the second when they are equally
            long, until it fits.
        """,
        answer="pack",
        starter="""
            def pack(first, second, max_seq_len, cls_id, sep_id, pad_id):
                raise NotImplementedError  # return tokens, segments, token_mask
        """,
        solution="""
            def pack(first, second, max_seq_len, cls_id, sep_id, pad_id):
                first, second = list(first), list(second)
                while len(first) + len(second) + 3 > max_seq_len:
                    (first if len(first) > len(second) else second).pop()
                tokens = [cls_id, *first, sep_id, *second, sep_id]
                spare = max_seq_len - len(tokens)
                segments = [0] * (len(first) + 2) + [1] * (len(second) + 1) + [0] * spare
                token_mask = [True] * len(tokens) + [False] * spare
                return tokens + [pad_id] * spare, segments, token_mask
        """,
        wrong=(
            """
            def pack(first, second, max_seq_len, cls_id, sep_id, pad_id):
                tokens = [cls_id, *first, sep_id, *second, sep_id][:max_seq_len]
                spare = max_seq_len - len(tokens)
                segments = ([0] * (len(first) + 2) + [1] * (len(second) + 1))[:max_seq_len] + [0] * spare
                return tokens + [pad_id] * spare, segments, [True] * len(tokens) + [False] * spare
            """,
            """
            def pack(first, second, max_seq_len, cls_id, sep_id, pad_id):
                first, second = list(first), list(second)
                while len(first) + len(second) + 3 > max_seq_len:
                    (first if len(first) > len(second) else second).pop()
                tokens = [cls_id, *first, sep_id, *second, sep_id]
                spare = max_seq_len - len(tokens)
                segments = [0] * (len(first) + 1) + [1] * (len(second) + 2) + [0] * spare
                return tokens + [pad_id] * spare, segments, [True] * len(tokens) + [False] * spare
            """,
        ),
        check=_check_segments,
        hint="Make room first, so that both [SEP] survive; to which text does the first of them belong?",
    ),
    Exercise(
        name="encoder-only/mean-pool",
        title="The mean of the second text",
        stars=1,
        statement=r"""
            In a pair of texts, a question and a passage, say, we want the mean of the hidden states of the
            *second* text alone. Write it for `hidden` of shape `(B, T, D)`, a boolean `token_mask` of shape
            `(B, T)`, True = real token, and `segments` of shape `(B, T)`, which are 1 on the second text.
            Neither the first text nor padding may move it, whatever segment the padding carries. A pair
            whose second text is empty gives zeros.
        """,
        answer="mean_of_second",
        starter="""
            import torch

            def mean_of_second(hidden, token_mask, segments):
                return hidden.mean(dim=1)
        """,
        solution="""
            import torch

            def mean_of_second(hidden, token_mask, segments):
                wanted = (token_mask & (segments == 1))[:, :, None].to(hidden.dtype)  # (B, T, 1)
                count = wanted.sum(dim=1).clamp(min=1)  # (B, 1); an empty text is divided by 1, not by 0
                return (hidden * wanted).sum(dim=1) / count
        """,
        wrong=(
            """
            def mean_of_second(hidden, token_mask, segments):
                return (hidden * segments[:, :, None]).mean(dim=1)
            """,
            """
            def mean_of_second(hidden, token_mask, segments):
                wanted = (segments == 1)[:, :, None].to(hidden.dtype)
                return (hidden * wanted).sum(dim=1) / wanted.sum(dim=1).clamp(min=1)
            """,
            """
            def mean_of_second(hidden, token_mask, segments):
                wanted = (token_mask & (segments == 1))[:, :, None].to(hidden.dtype)
                return (hidden * wanted).sum(dim=1) / wanted.sum(dim=1)
            """,
        ),
        check=_check_mean_pool,
        hint="Each row has a divisor of its own; what is it for the emptiest row?",
    ),
    Exercise(
        name="encoder-only/mask-ratio",
        title="Choose 15 %, then 80, 10 and 10",
        stars=2,
        statement=r"""
            Prepare a batch for masked language modelling. Choose each token that is not special with
            probability 0.15; of the chosen, let 80 % become `mask_id`, 10 % a random id from `0` to
            `vocab_size - 1`, and 10 % stay as they are. Return the corrupted tokens and the targets: the
            original id where a token was chosen, −100 elsewhere. Leave the tokens you were given as they
            are.
        """,
        answer="corrupt",
        starter="""
            import torch

            def corrupt(tokens, special_mask, mask_id, vocab_size):
                raise NotImplementedError  # return inputs, targets
        """,
        solution="""
            import torch

            def corrupt(tokens, special_mask, mask_id, vocab_size):
                chosen = (torch.rand(tokens.shape) < 0.15) & ~special_mask
                fate = torch.rand(tokens.shape)  # one number decides among the three
                inputs = torch.where(chosen & (fate < 0.8), mask_id, tokens)
                inputs = torch.where(chosen & (fate >= 0.9), torch.randint_like(tokens, vocab_size), inputs)
                return inputs, torch.where(chosen, tokens, -100)
        """,
        wrong=(
            """
            import torch

            def corrupt(tokens, special_mask, mask_id, vocab_size):
                chosen = (torch.rand(tokens.shape) < 0.15) & ~special_mask
                inputs = torch.where(chosen & (torch.rand(tokens.shape) < 0.8), mask_id, tokens)
                swap = chosen & (inputs != mask_id) & (torch.rand(tokens.shape) < 0.1)
                inputs = torch.where(swap, torch.randint_like(tokens, vocab_size), inputs)
                return inputs, torch.where(chosen, tokens, -100)
            """,
            """
            import torch

            def corrupt(tokens, special_mask, mask_id, vocab_size):
                chosen = torch.rand(tokens.shape) < 0.15
                inputs = torch.where(chosen, mask_id, tokens)
                return inputs, torch.where(chosen, tokens, -100)
            """,
            """
            import torch

            def corrupt(tokens, special_mask, mask_id, vocab_size):
                chosen = (torch.rand(tokens.shape) < 0.15) & ~special_mask
                fate = torch.rand(tokens.shape)
                inputs = torch.where(chosen & (fate < 0.8), mask_id, tokens)
                inputs = torch.where(chosen & (fate >= 0.9), torch.randint_like(tokens, vocab_size), inputs)
                return inputs, torch.where(inputs != tokens, tokens, -100)
            """,
        ),
        check=_check_mask_ratio,
        hint="Draw one number for the choice and one for the fate, and cut the second at two places.",
    ),
    Exercise(
        name="encoder-only/count-parameters",
        title="The parameters of BERT",
        stars=2,
        statement=r"""
            Write the number of parameters of a BERT encoder as a function of its sizes: three embedding
            tables and their norm; in each block four projections, two norms and a feed-forward layer; and
            the pooler, one more $D \times D$ layer on `[CLS]`. Every linear layer has a bias, every norm a
            scale and a shift. Predict the number for BERT-base before you run it.
        """,
        answer="count_parameters",
        starter="""
            def count_parameters(vocab_size, max_seq_len, num_segments, d_model, num_layers, d_ff):
                raise NotImplementedError
        """,
        solution="""
            def count_parameters(vocab_size, max_seq_len, num_segments, d_model, num_layers, d_ff):
                norm = 2 * d_model
                embeddings = (vocab_size + max_seq_len + num_segments) * d_model + norm
                attention = 4 * (d_model * d_model + d_model)
                feed_forward = (d_model * d_ff + d_ff) + (d_ff * d_model + d_model)
                pooler = d_model * d_model + d_model
                return embeddings + num_layers * (attention + feed_forward + 2 * norm) + pooler
        """,
        wrong=(
            """
            def count_parameters(vocab_size, max_seq_len, num_segments, d_model, num_layers, d_ff):
                embeddings = (vocab_size + max_seq_len + num_segments + 2) * d_model
                block = 4 * (d_model**2 + d_model) + 2 * d_model * d_ff + d_ff + d_model + 4 * d_model
                return embeddings + num_layers * block
            """,
            """
            def count_parameters(vocab_size, max_seq_len, num_segments, d_model, num_layers, d_ff):
                embeddings = (vocab_size + max_seq_len + num_segments) * d_model
                block = 4 * d_model**2 + 2 * d_model * d_ff
                return embeddings + num_layers * block + d_model**2
            """,
            """
            def count_parameters(vocab_size, max_seq_len, num_segments, d_model, num_layers, d_ff):
                embeddings = (vocab_size + max_seq_len + num_segments + 2) * d_model
                block = 4 * (d_model**2 + d_model) + 8 * d_model**2 + 5 * d_model + 4 * d_model
                return embeddings + num_layers * block + d_model**2 + d_model
            """,
        ),
        check=_check_count_parameters,
        hint="Count one block line by line, with the output width of each linear layer for its bias.",
    ),
    Exercise(
        name="encoder-only/post-norm-block",
        title="A post-norm block, number for number",
        stars=3,
        statement=r"""
            Write BERT's block so that it gives the package's own numbers: multi-head self-attention over
            the real tokens, add and normalise, feed-forward with the exact GELU, add and normalise. The
            weights come in a dict under the package's names, `attn.q_proj.weight`, `attn.out_proj.bias`,
            `attn_norm.weight`, `ffn.fc1.weight`, `ffn_norm.bias` and so on, each matrix as
            `torch.nn.functional.linear` takes it; `x` is `(B, T, D)` and `token_mask` `(B, T)`, True = real
            token. The package's layers stay shut; everything in `torch` is open.
        """,
        answer="block",
        starter="""
            import torch
            import torch.nn.functional as F

            def block(x, params, num_heads, norm_eps, token_mask):
                raise NotImplementedError
        """,
        solution=_HEAD + _TAIL,
        wrong=tuple(
            (_HEAD + _TAIL).replace(right, slip)
            for right, slip in (
                ("+ attend(x))", "+ attend(x) * 0.5)"),
                (_TAIL, _PRE_NORM_TAIL),
                ('F.gelu(linear("ffn.fc1", x))', 'F.gelu(linear("ffn.fc1", x), approximate="tanh")'),
                ("~token_mask[:, None, None, :]", "~token_mask[:, None, :, None]"),
                ("norm_eps)\n", "1e-5)\n"),
            )
        ),
        check=_check_post_norm_block,
        hint="Is the sum taken before the norm or after? Which keys may be seen? Which eps were you given?",
    ),
)
