"""BART's five ways to spoil a document, from which the model is to restore it.

Each takes one document (T,) without its special tokens, which the caller puts around what comes out, and
returns another, often of another length. `bart_noise` is the mixture that the published weights were trained
with. Paper: Lewis et al. (2020), section 2.2.

T length of the document.

Book: bart-noise
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from textbook_code.layers.checks import expect_ids, expect_shape


def token_masking(
    tokens: Tensor, *, mask_id: int, rate: float = 0.3, generator: torch.Generator | None = None
) -> Tensor:
    """Replace each token by the mask with probability `rate`: A B C D → A _ C _. The length stays.

    Raises:
        TypeError: the tokens are not integers.
        ValueError: not one axis, or a rate outside [0, 1].

    Book: bart-noise
    """
    _check(tokens, rate)
    return torch.where(_draw(tokens, generator) < rate, mask_id, tokens)


def token_deletion(tokens: Tensor, *, rate: float = 0.3, generator: torch.Generator | None = None) -> Tensor:
    """Leave out each token with probability `rate`: A B C D → A C. Where one is missing must be found out.

    Raises:
        TypeError: the tokens are not integers.
        ValueError: not one axis, or a rate outside [0, 1].

    Book: bart-noise
    """
    _check(tokens, rate)
    return tokens[_draw(tokens, generator) >= rate]


def text_infilling(
    tokens: Tensor,
    *,
    mask_id: int,
    rate: float = 0.3,
    mean_span: float = 3.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Replace spans by one mask each: A B C D E → A _ D _ E. How many tokens a mask stands for is unknown.

    Lengths are drawn from

    $$\ell \sim \mathrm{Poisson}(\mu)$$

    until they cover round(rT) tokens, the last one being cut to fit; a span of length 0 puts a mask where
    nothing is missing. The order of spans and remaining tokens is drawn uniformly, so that two masks may
    stand side by side.

    Args:
        tokens: (T,) integer ids.
        mask_id: the id of the mask.
        rate: share of the tokens that is replaced.
        mean_span: μ.
        generator: source of randomness.

    Raises:
        TypeError: the tokens are not integers.
        ValueError: not one axis, a rate outside [0, 1], or a mean that is not positive.

    Book: bart-noise
    """
    _check(tokens, rate)
    if not mean_span > 0:
        raise ValueError(f"mean_span: expected a positive length, got {mean_span}")
    lengths, left = [], round(rate * len(tokens))
    while left:
        length = min(int(torch.poisson(torch.tensor(float(mean_span)), generator=generator)), left)
        lengths.append(length)
        left -= length
    kept = len(tokens) - sum(lengths)
    # kept tokens and spans in a row, the spans at a random set of its places
    is_span = torch.zeros(kept + len(lengths), dtype=torch.bool)
    is_span[torch.randperm(len(is_span), generator=generator)[: len(lengths)]] = True
    ids, out, at, spans = tokens.tolist(), [], 0, iter(lengths)
    for span in is_span.tolist():
        out.append(mask_id if span else ids[at])
        at += next(spans) if span else 1
    return tokens.new_tensor(out)


def sentence_permutation(
    tokens: Tensor, *, end_ids: Sequence[int], generator: torch.Generator | None = None
) -> Tensor:
    """Put the sentences into a random order: A B . C D . → C D . A B . The length stays.

    Args:
        tokens: (T,) integer ids.
        end_ids: ids that end a sentence; what follows the last of them is a sentence too.
        generator: source of randomness.

    Raises:
        TypeError: the tokens are not integers.
        ValueError: not one axis, or no `end_ids`.

    Book: bart-noise
    """
    _check(tokens)
    if not len(end_ids):
        raise ValueError("end_ids: expected the ids that end a sentence, got none")
    ends = torch.isin(tokens, tokens.new_tensor(list(end_ids))).nonzero().flatten() + 1
    sentences = [part for part in tokens.tensor_split(ends.cpu()) if len(part)]
    order = torch.randperm(len(sentences), generator=generator).tolist()
    return torch.cat([sentences[i] for i in order]) if order else tokens.clone()


def document_rotation(tokens: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
    """Let the document begin at a token drawn uniformly: A B C D → C D A B. The length stays.

    Raises:
        TypeError: the tokens are not integers.
        ValueError: not one axis.

    Book: bart-noise
    """
    _check(tokens)
    start = int(torch.randint(max(len(tokens), 1), (), generator=generator))
    return tokens.roll(-start)


def bart_noise(
    tokens: Tensor,
    *,
    mask_id: int,
    end_ids: Sequence[int],
    rate: float = 0.3,
    mean_span: float = 3.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The mixture of the large BART: all sentences permuted, then 30 % of the tokens infilled.

    Paper: Lewis et al. (2020), section 5.1.

    Args:
        tokens: (T,) integer ids.
        mask_id, rate, mean_span: as in `text_infilling`.
        end_ids: as in `sentence_permutation`.
        generator: source of randomness.

    Raises:
        TypeError, ValueError: as the two.

    Book: bart-noise
    """
    permuted = sentence_permutation(tokens, end_ids=end_ids, generator=generator)
    return text_infilling(permuted, mask_id=mask_id, rate=rate, mean_span=mean_span, generator=generator)


def _draw(tokens: Tensor, generator: torch.Generator | None) -> Tensor:
    """Uniform numbers; drawn on the CPU, so that every device sees the same."""
    return torch.rand(tokens.shape, generator=generator).to(tokens.device)


def _check(tokens: Tensor, rate: float = 0.0) -> None:
    expect_shape("tokens", tokens, "T")
    expect_ids("tokens", tokens)
    if not 0 <= rate <= 1:
        raise ValueError(f"rate: expected a share in [0, 1], got {rate}")
