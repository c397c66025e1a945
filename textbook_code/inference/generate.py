"""Text from a language model: greedy, sampled or by beam search, with a cache.

    prefill: the prompt in one pass  →  logits of its last position
    decode:  one token a pass, its keys and values appended to the cache

B batch, S prompt (or source), N new tokens, K beams, V vocabulary.
Reference: transformers, `generate`.

Book: generation
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from textbook_code.layers.checks import expect_bool, expect_ids, expect_shape

from .beam import Beams
from .sampling import check_filters, next_tokens


def generate(
    model: nn.Module,
    tokens: Tensor,
    *,
    token_mask: Tensor | None = None,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    num_beams: int = 1,
    length_penalty: float = 1.0,
    stop_tokens: Sequence[int] = (),
    pad_id: int = 0,
    generator: torch.Generator | None = None,
    use_cache: bool = True,
) -> Tensor:
    """Continue each row of `tokens`, or, by an encoder-decoder, answer it.

    The model runs in eval mode without gradients and is left as it was, also by an interruption.

    Args:
        model: decoder-only (`forward` and `make_cache`) or encoder-decoder (`encode`, `decode` and
            `make_cache`).
        tokens: (B, S) prompts; for an encoder-decoder the source texts.
        token_mask: (B, S) bool, True = real token. For a decoder-only, padding stands on the left, so
            that each row's next token follows its last.
        max_new_tokens: N at most.
        temperature: 0 takes the likeliest token (greedy); above 0, tokens are drawn, see
            `sampling.filtered_logits`.
        top_k: draw among the k likeliest.
        top_p: draw among the smallest set of this probability.
        num_beams: with more than 1, beam search, see `beam.Beams`.
        length_penalty: of beam search.
        stop_tokens: ids that end a row; the others go on.
        pad_id: what stands behind a row's end.
        generator: of the random numbers, for a repeatable draw.
        use_cache: keep keys and values; without, each step computes the whole text again.

    Returns:
        (B, N) int64, the new tokens only: in each row up to and with its stop token, then `pad_id`. N is
        smaller than `max_new_tokens` where all rows ended earlier.

    Raises:
        TypeError: the model is of neither kind, or an argument is of another type.
        ValueError: a prompt is empty, all padding, or padded within or on the right; prompt and new
            tokens do not fit into the model's context; an argument is out of its range, or is of no use
            beside the others.

    Book: generation
    """
    if num_beams == 1:
        if length_penalty != 1.0:
            raise ValueError(f"length_penalty: expected 1.0 without num_beams, got {length_penalty}")
        steps = stream(
            model,
            tokens,
            token_mask=token_mask,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            stop_tokens=stop_tokens,
            pad_id=pad_id,
            generator=generator,
            use_cache=use_cache,
        )
        return torch.stack(list(steps), dim=1)

    _expect_count("num_beams", num_beams)
    if (temperature, top_k, top_p) != (0.0, None, None):
        raise ValueError(
            f"num_beams: expected 1 with sampling, got {num_beams} beside "
            f"temperature={temperature}, top_k={top_k}, top_p={top_p}"
        )
    decoder, stop = _prepare(model, tokens, token_mask, max_new_tokens, stop_tokens, use_cache)
    beams = Beams(
        tokens.size(0),
        num_beams,
        max_new_tokens,
        stop_tokens=stop,
        length_penalty=length_penalty,
        pad_id=pad_id,
        device=tokens.device,
    )
    with _undisturbed(list(model.modules())):
        logits = decoder.start().repeat_interleave(num_beams, dim=0)  # (B·K, V)
        decoder.expand(num_beams)
        while True:
            new, rows = beams.advance(logits.to(_wide(logits)).log_softmax(-1))
            if beams.done:
                break
            decoder.reorder(rows)
            logits = decoder.step(new)
    ended, _ = beams.best()
    return ended[:, : _longest(ended, stop)].clone()  # a tensor that autograd takes again


def stream(
    model: nn.Module,
    tokens: Tensor,
    *,
    token_mask: Tensor | None = None,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop_tokens: Sequence[int] = (),
    pad_id: int = 0,
    generator: torch.Generator | None = None,
    use_cache: bool = True,
) -> Iterator[Tensor]:
    """As `generate`, but each token is given as soon as it is chosen.

    Arguments are checked at the call, not at the first token. Between two tokens the model's mode and
    the gradients' are the caller's own, and the iterator may be left at any time.

    Yields:
        (B,) int64, the next token of each row; `pad_id` for a row that has ended.

    Raises:
        TypeError: see `generate`.
        ValueError: see `generate`.

    Book: generate-stream
    """
    if not temperature >= 0:
        raise ValueError(f"temperature: expected 0 (greedy) or more, got {temperature}")
    check_filters(top_k=top_k, top_p=top_p)
    if temperature == 0 and (top_k, top_p) != (None, None):
        raise ValueError(
            "temperature: expected more than 0 with a filter (at 0 the likeliest token is taken, and nothing "
            f"is drawn), got 0 beside top_k={top_k}, top_p={top_p}"
        )
    decoder, stop = _prepare(model, tokens, token_mask, max_new_tokens, stop_tokens, use_cache)
    how: dict[str, Any] = {
        "temperature": temperature, "top_k": top_k, "top_p": top_p, "generator": generator
    }  # fmt: skip
    return _steps(model, decoder, tokens, max_new_tokens, stop, pad_id, how)


def _steps(
    model: nn.Module,
    decoder: "_Decoder",
    tokens: Tensor,
    max_new_tokens: int,
    stop_tokens: tuple[int, ...],
    pad_id: int,
    how: dict[str, Any],
) -> Iterator[Tensor]:
    stop = torch.tensor(stop_tokens, dtype=torch.long, device=tokens.device)
    ended = torch.zeros(tokens.size(0), dtype=torch.bool, device=tokens.device)
    modules, new = list(model.modules()), None  # hundreds: found once, not in each step
    for _ in range(max_new_tokens):
        with _undisturbed(modules):  # not around the yield: the caller may train in between
            logits = decoder.start() if new is None else decoder.step(new)
            new = next_tokens(logits, **how)
        yield new.masked_fill(ended, pad_id)  # made out here, it is a tensor that autograd takes
        if stop_tokens:
            ended |= torch.isin(new, stop)
            if ended.all():
                return


class _Decoder(Protocol):
    """A model in the middle of its texts: what greedy, sampling and beam search share."""

    def start(self) -> Tensor:
        """Read the prompt; (B, V) logits of the first new token."""

    def step(self, new: Tensor) -> Tensor:
        """Append one token a row, (B,); (B, V) logits of the next."""

    def expand(self, num_beams: int) -> None:
        """Repeat each row, one after the other, after `start`."""

    def reorder(self, rows: Tensor) -> None:
        """Continue these rows, of the same prompts, instead."""


class _DecoderOnly:
    """The prompt is the beginning of the text."""

    def __init__(
        self, model: Any, tokens: Tensor, token_mask: Tensor | None, max_new: int, use_cache: bool
    ) -> None:
        self.model, self.text, self.cache = model, tokens.long(), None
        self.mask = None
        if token_mask is not None and not token_mask.all():  # without padding the model is spared the mask
            self.mask = nn.functional.pad(token_mask, (0, max_new), value=True)
        if use_cache:  # the last token is not fed again
            self.cache = model.make_cache(tokens.size(0), tokens.size(1) + max_new - 1)
        self.length = tokens.size(1)

    def start(self) -> Tensor:
        return self._logits(self.text)

    def step(self, new: Tensor) -> Tensor:
        self.length += 1
        if self.cache is not None:
            return self._logits(new[:, None])
        self.text = torch.cat([self.text, new[:, None]], dim=1)
        return self._logits(self.text)

    def _logits(self, tokens: Tensor) -> Tensor:
        mask = None if self.mask is None else self.mask[:, : self.length]
        return self.model(tokens, token_mask=mask, cache=self.cache, num_logits=1)[:, -1]

    def expand(self, num_beams: int) -> None:
        rows = torch.arange(self.text.size(0), device=self.text.device).repeat_interleave(num_beams)
        self.mask = None if self.mask is None else self.mask[rows]
        self.reorder(rows)

    def reorder(self, rows: Tensor) -> None:  # rows of one prompt share its mask
        if self.cache is None:
            self.text = self.text[rows]
        for layer in self.cache or ():
            layer.reorder(rows)


class _EncoderDecoder:
    """The prompt is read by the encoder, once; the text begins with the start token."""

    def __init__(
        self, model: Any, tokens: Tensor, token_mask: Tensor | None, max_new: int, use_cache: bool
    ) -> None:
        self.model, self.source, self.cache = model, tokens, None
        self.mask = token_mask if token_mask is not None and not token_mask.all() else None
        if use_cache:
            self.cache = model.make_cache(tokens.size(0), max_new, tokens.size(1))
        self.text = torch.full_like(tokens[:, :1], model.config.decoder_start_id, dtype=torch.long)

    def start(self) -> Tensor:
        self.context = self.model.encode(self.source, token_mask=self.mask)
        return self._logits(self.text)

    def step(self, new: Tensor) -> Tensor:
        if self.cache is not None:
            return self._logits(new[:, None])
        self.text = torch.cat([self.text, new[:, None]], dim=1)
        return self._logits(self.text)

    def _logits(self, target: Tensor) -> Tensor:
        return self.model.decode(
            target, self.context, context_mask=self.mask, cache=self.cache, num_logits=1
        )[:, -1]

    def expand(self, num_beams: int) -> None:
        rows = torch.arange(self.text.size(0), device=self.text.device).repeat_interleave(num_beams)
        self.context = self.context[rows]
        self.mask = None if self.mask is None else self.mask[rows]
        for _, cross in self.cache or ():
            cross.reorder(rows)
        self.reorder(rows)

    def reorder(self, rows: Tensor) -> None:  # rows of one source share its context and its cross-keys
        if self.cache is None:
            self.text = self.text[rows]
        for own, _ in self.cache or ():
            own.reorder(rows)


def _prepare(
    model: Any,
    tokens: Tensor,
    token_mask: Tensor | None,
    max_new_tokens: int,
    stop_tokens: Iterable[int],
    use_cache: bool,
) -> tuple[_Decoder, tuple[int, ...]]:
    """Check what generate and stream share, and pick the decoder."""
    both = all(hasattr(model, name) for name in ("encode", "decode", "make_cache"))
    if not both and not hasattr(model, "make_cache"):
        raise TypeError(
            "model: expected a decoder-only language model (it has make_cache) or an encoder-decoder (it has "
            f"encode, decode and make_cache), got {type(model).__name__}"
        )
    expect_ids("tokens", tokens)
    expect_shape("tokens", tokens, "B S")
    B, S = tokens.shape
    if B == 0 or S == 0:
        raise ValueError(f"tokens: expected at least one prompt of at least one token, got shape {(B, S)}")
    if token_mask is not None:
        expect_bool("token_mask", token_mask)
        expect_shape("token_mask", token_mask, "B S", B=B, S=S)
        empty = (~token_mask.any(1)).nonzero().flatten().tolist()
        if empty:
            raise ValueError(f"token_mask: expected a real token in every row, got none in rows {empty}")
    _expect_count("max_new_tokens", max_new_tokens)

    context = getattr(model.config, "max_seq_len", None)  # T5 has none: its positions are distances
    V = model.config.vocab_size
    if both:
        if context is not None and max(S, max_new_tokens) > context:
            raise ValueError(
                f"tokens, max_new_tokens: expected at most {context} each (max_seq_len), "
                f"got a source of {S} and {max_new_tokens} new tokens"
            )
    else:
        if context is not None and S + max_new_tokens > context:
            raise ValueError(
                f"tokens, max_new_tokens: expected at most {context} together (max_seq_len), "
                f"got a prompt of {S} and {max_new_tokens} new tokens"
            )
        if token_mask is not None and (token_mask[:, :-1] & ~token_mask[:, 1:]).any():
            raise ValueError(
                "token_mask: expected padding on the left only, so that new tokens follow the prompt's last, "
                "got padding behind a real token"
            )
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= V:
        raise ValueError(f"tokens: expected ids from 0 to {V - 1} (vocab_size - 1), got {low} to {high}")
    stop = tuple(int(token) for token in stop_tokens)
    outside = [token for token in stop if not 0 <= token < V]
    if outside:
        raise ValueError(f"stop_tokens: expected ids from 0 to {V - 1} (vocab_size - 1), got {outside}")
    decoder = _EncoderDecoder if both else _DecoderOnly
    return decoder(model, tokens, token_mask, max_new_tokens, use_cache), stop


def _expect_count(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}: expected an integer of at least 1, got {value!r}")


@contextmanager
def _undisturbed(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Eval mode without gradients; afterwards every module is in the mode it was in."""
    training = [module for module in modules if module.training]
    for module in training:
        module.training = False
    try:
        with torch.inference_mode():  # no_grad, and cheaper: a step is a thousand small operations
            yield
    finally:
        for module in training:
            module.training = True


def _wide(logits: Tensor) -> torch.dtype:
    return torch.promote_types(logits.dtype, torch.float32)


def _longest(ended: Tensor, stop_tokens: tuple[int, ...]) -> int:
    """Length of the longest row, up to and with its first stop token."""
    stop = torch.tensor(stop_tokens, dtype=torch.long, device=ended.device)
    running = torch.isin(ended, stop).cumsum(1) == 0  # before the stop token
    return min(int(running.sum(1).max()) + 1, ended.size(1))
