"""What a model is trained to predict: masked tokens, the next token, the spans that were cut out.

B batch, T length, V vocabulary. BART's noise is in `noising`, several documents in a row in `packing`, the
loss of a student in `distillation`.

Book: bert-mlm
"""

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from textbook_code.layers.checks import expect_bool, expect_ids, expect_shape

IGNORE = -100  # the target that torch's cross-entropy leaves out


def mask_tokens(
    tokens: Tensor,
    *,
    mask_id: int,
    vocab_size: int,
    special_mask: Tensor,
    prob: float = 0.15,
    words: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Prepare a batch for masked language modelling.

    Each ordinary token is chosen with probability `prob`. Of the chosen, 80 % become the mask
    token, 10 % a random token, and 10 % stay as they are; all chosen are to be predicted.
    Paper: Devlin et al. (2019), section 3.1 and appendix A.1.

    With `words` it is whole words that are chosen, so that no piece of a word gives away the others; what
    becomes of each of its tokens is drawn by itself. Published as BERT's later "whole word masking" weights.

    Args:
        tokens: (B, T) integer ids; left as it is.
        mask_id: the id of [MASK].
        vocab_size: V; random tokens are drawn from 0 … V − 1.
        special_mask: (B, T) bool, True where a token is never chosen ([CLS], [SEP], padding).
        prob: share of tokens, or of words, to choose.
        words: (B, T) integers, equal for the tokens of one word of a row; those of special tokens are not
            looked at and may be −1.
        generator: source of randomness.

    Returns:
        The corrupted tokens (B, T), and the targets (B, T): the original id where a token was
        chosen, −100 elsewhere.

    Raises:
        TypeError: the tokens or words are not integers, or `special_mask` is not boolean.
        ValueError: shapes differ, `mask_id` is outside the vocabulary, `prob` is not between 0 and 1, or an
            ordinary token has a negative word.

    Book: bert-mlm
    """
    expect_shape("tokens", tokens, "B T")
    expect_ids("tokens", tokens)
    expect_bool("special_mask", special_mask)
    expect_shape("special_mask", special_mask, "B T", B=tokens.size(0), T=tokens.size(1))
    if not 0 <= mask_id < vocab_size:
        raise ValueError(
            f"mask_id: expected an id from 0 to {vocab_size - 1} (vocab_size - 1), got {mask_id}"
        )
    if not 0 < prob <= 1:
        raise ValueError(f"prob: expected a share in (0, 1], got {prob}")

    def draw() -> Tensor:
        return torch.rand(tokens.shape, generator=generator, device=tokens.device)

    if words is None:
        chosen = (draw() < prob) & ~special_mask
    else:
        expect_ids("words", words)
        expect_shape("words", words, "B T", B=tokens.size(0), T=tokens.size(1))
        if bool((words < 0).logical_and(~special_mask).any()):
            raise ValueError("words: expected 0 or more for every ordinary token, got a negative number")
        # one draw a word: numbers that are far apart are first made consecutive
        _, word = words.unique(return_inverse=True)
        count = int(word.max()) + 1 if word.numel() else 1
        draws = torch.rand(tokens.size(0), count, generator=generator, device=tokens.device)
        chosen = (draws.gather(1, word) < prob) & ~special_mask
    fate = draw()
    random = torch.randint(vocab_size, tokens.shape, generator=generator, device=tokens.device)
    inputs = torch.where(chosen & (fate < 0.8), mask_id, tokens)
    inputs = torch.where(chosen & (fate >= 0.9), random.to(tokens.dtype), inputs)
    return inputs, torch.where(chosen, tokens, IGNORE)


def token_loss(logits: Tensor, targets: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    r"""The mean cross-entropy over the positions that have a target, in nats.

    With smoothing ε the target distribution is not all on the right token y but spread a little over all V:

    $$\ell = -(1 - \varepsilon) \log p_y - \frac{\varepsilon}{V} \sum_{v=1}^{V} \log p_v, \qquad
    p = \mathrm{softmax}(\text{logits}).$$

    Paper: Szegedy et al. (2016), section 7; Vaswani et al. (2017), section 5.4, with ε = 0.1.

    Args:
        logits: (B, T, V).
        targets: (B, T), the token that is to be predicted at each position, or −100 (`IGNORE`).
        label_smoothing: ε.

    Raises:
        TypeError: the targets are not integers.
        ValueError: shapes differ, ε is outside [0, 1), or no position has a target.

    Book: gpt-objective
    """
    expect_shape("logits", logits, "B T V")
    expect_ids("targets", targets)
    expect_shape("targets", targets, "B T", B=logits.size(0), T=logits.size(1))
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing: expected a share in [0, 1), got {label_smoothing}")
    if bool((targets == IGNORE).all()):
        raise ValueError(f"targets: expected at least one position to predict, all are {IGNORE}")
    # cross_entropy wants the classes second; the targets' dtype is its own affair
    return F.cross_entropy(
        logits.flatten(0, 1), targets.flatten().long(), ignore_index=IGNORE, label_smoothing=label_smoothing
    )


def causal_lm_targets(
    tokens: Tensor, *, token_mask: Tensor | None = None, document_ids: Tensor | None = None
) -> Tensor:
    r"""What each position of a decoder-only model is to predict: the next token.

    $$\text{target}_t = \text{token}_{t+1}, \qquad t < T - 1.$$

    The last position has none, nor has one whose next token is padding or belongs to another document.

    Args:
        tokens: (B, T) integer ids.
        token_mask: (B, T) bool, True = real token; all are real when left out.
        document_ids: (B, T) integers, of a packed batch (see `packing.pack`).

    Returns:
        (B, T), −100 where there is nothing to predict.

    Raises:
        TypeError: ids that are not integers, a mask that is not boolean.
        ValueError: shapes that differ.

    Book: gpt-objective
    """
    expect_shape("tokens", tokens, "B T")
    expect_ids("tokens", tokens)
    B, T = tokens.shape
    has_next = torch.ones_like(tokens, dtype=torch.bool)
    has_next[:, -1:] = False
    if token_mask is not None:
        expect_bool("token_mask", token_mask)
        expect_shape("token_mask", token_mask, "B T", B=B, T=T)
        has_next &= token_mask & token_mask.roll(-1, 1)
    if document_ids is not None:
        expect_ids("document_ids", document_ids)
        expect_shape("document_ids", document_ids, "B T", B=B, T=T)
        has_next &= document_ids == document_ids.roll(-1, 1)
    return torch.where(has_next, tokens.roll(-1, 1), IGNORE)


def causal_lm_loss(
    logits: Tensor,
    tokens: Tensor,
    *,
    token_mask: Tensor | None = None,
    document_ids: Tensor | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    r"""How surprised the model is by each next token, on average, in nats.

    $$\mathcal L = -\frac{1}{n} \sum_{t} \log p(\text{token}_{t+1} \mid \text{token}_{\le t})$$

    over the n positions that have a next token; smoothing as in `token_loss`.

    Args:
        logits: (B, T, V) of the model given `tokens`.
        tokens, token_mask, document_ids: as in `causal_lm_targets`.
        label_smoothing: ε of `token_loss`.

    Raises:
        TypeError, ValueError: as `causal_lm_targets` and `token_loss`.

    Book: gpt-objective
    """
    targets = causal_lm_targets(tokens, token_mask=token_mask, document_ids=document_ids)
    return token_loss(logits, targets, label_smoothing=label_smoothing)


def span_counts(T: int, *, rate: float = 0.15, mean_span: float = 3.0) -> tuple[int, int]:
    r"""How many tokens `span_corruption` cuts out of T, and in how many spans.

    $$n = \mathrm{round}(rT) \text{ within } 1 \dots T - 1, \qquad
    m = \mathrm{round}(n / \mu) \text{ within } 1 \dots \min(n, T - n),$$

    so that the inputs have T − n + m tokens and the targets n + m + 1, and one more each with an end token.

    Raises:
        ValueError: fewer than two tokens, a rate outside (0, 1), or a mean span below 1.

    Book: t5-objective
    """
    if T < 2:
        raise ValueError(f"tokens: expected at least 2 tokens to cut a span out of, got {T}")
    if not 0 < rate < 1:
        raise ValueError(f"rate: expected a share in (0, 1), got {rate}")
    if not mean_span >= 1:
        raise ValueError(f"mean_span: expected at least 1 token, got {mean_span}")
    cut = min(max(round(T * rate), 1), T - 1)
    return cut, min(max(round(cut / mean_span), 1), cut, T - cut)


def span_corruption(
    tokens: Tensor,
    *,
    sentinels: Sequence[int],
    rate: float = 0.15,
    mean_span: float = 3.0,
    eos_id: int | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """T5's objective: spans are cut out, and the decoder is to write them down.

    Each span of the inputs gives way to a sentinel, another one each time. The targets are the spans in
    order, each behind its sentinel, and one more sentinel at the end:

        Thank you for inviting me to your party last week
        inputs   Thank you <X> me to your party <Y> week
        targets  <X> for inviting <Y> last <Z>

    How many tokens and spans are cut is fixed by T (see `span_counts`), so that a batch stays a rectangle; a
    row starts with a token that stays and ends with a span, and the lengths of the spans and of what is
    between them are drawn uniformly among all that have the right sum. Paper: Raffel et al. (2020), sections
    3.1.4 and 3.3.4.

    Args:
        tokens: (B, T) integer ids of text without padding.
        sentinels: ids of the sentinels in the order of their use (in T5 they count down from the end of the
            vocabulary); at least one more than there are spans, and none of them in the text.
        rate: share of the tokens that is cut out.
        mean_span: mean length of a span.
        eos_id: an id that ends inputs and targets; left out if None.
        generator: source of randomness.

    Returns:
        Inputs (B, T − n + m [+ 1]) and targets (B, n + m + 1 [+ 1]).

    Raises:
        TypeError: the tokens are not integers.
        ValueError: `rate`, `mean_span` or T is out of range, there are too few sentinels, or the text holds
            one.

    Book: t5-objective
    """
    expect_shape("tokens", tokens, "B T")
    expect_ids("tokens", tokens)
    T = tokens.size(1)
    cut, spans = span_counts(T, rate=rate, mean_span=mean_span)
    if len(set(sentinels)) != len(sentinels):
        raise ValueError(f"sentinels: expected ids that differ, got {list(sentinels)}")
    if len(sentinels) < spans + 1:
        raise ValueError(f"sentinels: expected at least {spans + 1} for {spans} spans, got {len(sentinels)}")
    marks = tokens.new_tensor(list(sentinels))
    if bool(torch.isin(tokens, marks).any()):
        raise ValueError("tokens: expected text without a sentinel's id, got one that holds it")
    end = [] if eos_id is None else [tokens.new_tensor([eos_id])]
    inputs, targets = [], []
    for row in tokens:
        kept_lengths, cut_lengths = (_composition(n, spans, generator) for n in (T - cut, cut))
        lengths = [length for pair in zip(kept_lengths, cut_lengths, strict=True) for length in pair]
        pieces = row.split(lengths)  # kept, cut, kept, cut …
        kept, gone, mark = pieces[0::2], pieces[1::2], marks[:spans].split(1)
        inputs.append(torch.cat([*(x for pair in zip(kept, mark, strict=True) for x in pair), *end]))
        spelled = (x for pair in zip(mark, gone, strict=True) for x in pair)
        targets.append(torch.cat([*spelled, marks[spans : spans + 1], *end]))
    return torch.stack(inputs), torch.stack(targets)


def fill_spans(
    inputs: Tensor, targets: Tensor, *, sentinels: Sequence[int], eos_id: int | None = None
) -> list[int]:
    """Put the spans of the targets back into the inputs: `span_corruption` backwards, for one row.

    Made for what a model has written, so that it forgives: a sentinel that the targets do not name gives
    nothing, and a span that no sentinel of the inputs asks for is left out.

    Args:
        inputs: (S,) ids.
        targets: (T,) ids.
        sentinels: as in `span_corruption`.
        eos_id: ends either; what follows is left out.

    Returns:
        The ids of the whole text, without `eos_id`.

    Raises:
        ValueError: inputs or targets are not of one axis.

    Book: t5-objective
    """
    expect_shape("inputs", inputs, "S")
    expect_shape("targets", targets, "T")
    marks = set(sentinels)
    spans: dict[int, list[int]] = {}
    span: list[int] = []
    for token in _until(targets, eos_id):
        if token in marks:
            span = spans.setdefault(token, [])
        else:
            span.append(token)
    filled = (spans.get(token, []) if token in marks else [token] for token in _until(inputs, eos_id))
    return [token for part in filled for token in part]


def _until(tokens: Tensor, eos_id: int | None) -> list[int]:
    ids = tokens.tolist()
    return ids[: ids.index(eos_id)] if eos_id in ids else ids


def _composition(total: int, parts: int, generator: torch.Generator | None) -> list[int]:
    """`total` as a sum of `parts` positive numbers, all such sums equally likely: its cuts are a subset."""
    cuts = torch.randperm(total - 1, generator=generator)[: parts - 1].sort().values + 1
    ends = [0, *cuts.tolist(), total]
    return [b - a for a, b in itertools.pairwise(ends)]
