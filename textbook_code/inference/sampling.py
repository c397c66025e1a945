"""How the next token is drawn from the logits: temperature, top-k, top-p.

    logits / temperature  →  top-k  →  top-p  →  softmax  →  draw

B batch, V vocabulary. Papers: Fan et al. (2018) for top-k, Holtzman et al. (2020) for top-p.
Reference: transformers, TemperatureLogitsWarper, TopKLogitsWarper and TopPLogitsWarper, in this order.

Book: generate-sampling
"""

import math

import torch
from torch import Tensor

from textbook_code.layers.checks import expect_shape


def top_k_filter(logits: Tensor, k: int) -> Tensor:
    r"""Keep the k likeliest tokens; all others get probability 0.

    $$\ell'_i = \begin{cases} \ell_i & \ell_i \ge \ell_{(k)} \\ -\infty & \text{else} \end{cases}$$

    with $\ell_{(k)}$ the k-th largest logit; tokens that tie with it are kept. Paper: Fan et al. (2018).

    Args:
        logits: (B, V).
        k: at least 1; from V on, nothing is filtered.

    Raises:
        ValueError: k is below 1.

    Book: generate-top-k
    """
    expect_shape("logits", logits, "B V")
    check_filters(top_k=k)
    kth = logits.topk(min(k, logits.size(-1))).values[:, -1:]  # (B, 1)
    return logits.masked_fill(logits < kth, -math.inf)


def top_p_filter(logits: Tensor, p: float) -> Tensor:
    r"""Keep the smallest set of tokens whose probability is p or more (nucleus sampling).

    With the tokens in the order of falling probability $q_1 \ge q_2 \ge \dots$, token j is kept while
    those before it do not suffice:

    $$q_1 + \dots + q_{j-1} < p .$$

    Paper: Holtzman et al. (2020).

    Args:
        logits: (B, V).
        p: above 0, at most 1; with 1 nothing is filtered.

    Raises:
        ValueError: p is outside (0, 1].

    Book: generate-top-p
    """
    expect_shape("logits", logits, "B V")
    check_filters(top_p=p)
    if p == 1:  # the sum of all but the last may round to 1
        return logits
    ordered, order = logits.sort(descending=True, stable=True)
    q = ordered.softmax(-1)
    spare = q.cumsum(-1) - q >= p  # those before it suffice
    spare[:, 0] = False
    return logits.masked_fill(torch.zeros_like(spare).scatter(-1, order, spare), -math.inf)


def filtered_logits(
    logits: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> Tensor:
    r"""The logits of the distribution that is drawn from: temperature, then top-k, then top-p.

    The temperature τ divides the logits, so that $p'_i \propto p_i^{1/\tau}$: below 1 the likely
    tokens gain, above 1 the unlikely ones.

    Args:
        logits: (B, V).
        temperature: τ > 0.
        top_k: see `top_k_filter`; no filter when left out.
        top_p: see `top_p_filter`; no filter when left out.

    Returns:
        (B, V), −∞ where a token cannot be drawn; float32 at least.

    Raises:
        ValueError: the temperature is not positive, or a filter's argument is out of its range.

    Book: generate-sampling
    """
    if not temperature > 0:
        raise ValueError(
            f"temperature: expected more than 0 to sample (0 means greedy: no draw), got {temperature}"
        )
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    if top_k is not None:
        logits = top_k_filter(logits, top_k)
    if top_p is not None:
        logits = top_p_filter(logits, top_p)
    return logits


def next_tokens(
    logits: Tensor,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Choose one token a row: the likeliest at temperature 0, else a draw.

    Args:
        logits: (B, V).
        temperature: 0 for greedy, else as in `filtered_logits`, like the two filters.
        top_k: see `top_k_filter`.
        top_p: see `top_p_filter`.
        generator: of the random numbers; torch's own when left out.

    Returns:
        (B,) int64.

    Raises:
        ValueError: see `filtered_logits`.

    Book: generate-sampling
    """
    expect_shape("logits", logits, "B V")
    if temperature == 0:
        return logits.argmax(-1)
    probabilities = filtered_logits(logits, temperature, top_k, top_p).softmax(-1)
    return torch.multinomial(probabilities, 1, generator=generator)[:, 0]


def check_filters(*, top_k: int | None = None, top_p: float | None = None) -> None:
    """Raise unless the filters' arguments are in their ranges.

    Raises:
        ValueError: `top_k` is below 1, or `top_p` outside (0, 1].

    Book: generate-sampling
    """
    if top_k is not None and (isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1):
        raise ValueError(f"top_k: expected an integer of at least 1, got {top_k!r}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p: expected more than 0 and at most 1, got {top_p!r}")
