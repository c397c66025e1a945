"""Generation on the smallest models: against the written-out loop, rows against themselves alone, errors."""

from __future__ import annotations

import itertools
import weakref

import pytest
import torch
from tiny_models import TinyCausal, TinyEncoderDecoder
from torch import Tensor, nn

from textbook_code.inference.generate import generate, stream
from textbook_code.models.text.bert import Bert, BertConfig

PROMPTS = torch.tensor([[5, 9, 2, 14], [7, 7, 1, 20], [11, 3, 28, 0]])
SEEDS = range(4)


def tiny(kind: str, seed: int = 0) -> nn.Module:
    return (TinyCausal if kind == "decoder-only" else TinyEncoderDecoder)(seed).eval()


def all_logits(model: nn.Module, prompts: Tensor, new: Tensor) -> Tensor:
    """The logits (B, N, V) from which each of the new tokens was chosen, in one pass without a cache."""
    with torch.no_grad():
        if hasattr(model, "encode"):
            start = torch.full_like(new[:, :1], model.config.decoder_start_id)
            return model.decode(torch.cat([start, new[:, :-1]], 1), model.encode(prompts))
        logits = model(torch.cat([prompts, new], 1))
        return logits[:, prompts.size(1) - 1 : -1]


@pytest.fixture(params=["decoder-only", "encoder-decoder"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy_takes_the_likeliest_token_each_time(kind: str, seed: int, use_cache: bool) -> None:
    model = tiny(kind, seed)
    new = generate(model, PROMPTS, max_new_tokens=12, use_cache=use_cache)
    assert new.shape == (3, 12)
    assert new.equal(all_logits(model, PROMPTS, new).argmax(-1))
    assert new.unique().numel() > 3, "the texts are not all one token"


def test_sampling_repeats_with_its_generator_and_with_or_without_a_cache(kind: str) -> None:
    model = tiny(kind)

    def draw(seed: int, **how: object) -> Tensor:
        return generate(
            model, PROMPTS, max_new_tokens=10, generator=torch.Generator().manual_seed(seed), **how
        )

    one = draw(1, temperature=8.0, top_k=20, top_p=0.95)
    assert one.equal(draw(1, temperature=8.0, top_k=20, top_p=0.95))
    assert one.equal(draw(1, temperature=8.0, top_k=20, top_p=0.95, use_cache=False))
    assert not one.equal(draw(2, temperature=8.0, top_k=20, top_p=0.95))
    assert not one.equal(draw(1, temperature=0.0))
    assert draw(1, temperature=8.0, top_k=1).equal(draw(1, temperature=0.0))


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("num_beams", [1, 3])
def test_left_padding_changes_nothing(use_cache: bool, num_beams: int) -> None:
    model = tiny("decoder-only", 1)
    lengths = (2, 6, 4)
    prompts = [torch.arange(length) * 5 % 29 for length in lengths]
    batch = torch.full((3, 6), 17)
    mask = torch.zeros(3, 6, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        batch[row, -len(prompt) :], mask[row, -len(prompt) :] = prompt, True
    how = {"max_new_tokens": 9, "use_cache": use_cache, "num_beams": num_beams, "stop_tokens": [12]}
    together = generate(model, batch, token_mask=mask, **how)
    for row, prompt in enumerate(prompts):
        alone = generate(model, prompt[None], **how)[0]
        assert together[row, : len(alone)].equal(alone)
        assert (together[row, len(alone) :] == 0).all()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("num_beams", [1, 3])
def test_padding_of_the_source_changes_nothing(side: str, num_beams: int) -> None:
    model = tiny("encoder-decoder", 1)
    source = torch.tensor([[5, 9, 2, 14]])
    padding = torch.full((1, 3), 17)
    parts = (padding, source) if side == "left" else (source, padding)
    mask = torch.cat([part == source if part is source else part < 0 for part in parts], 1)
    how = {"max_new_tokens": 9, "num_beams": num_beams}
    padded = generate(model, torch.cat(parts, 1), token_mask=mask, **how)
    assert padded.equal(generate(model, source, **how))
    assert not padded.equal(generate(model, torch.cat(parts, 1), **how)), "the mask matters here"


def test_the_prompt_is_read_once_and_only_the_last_logits_are_computed() -> None:
    model = tiny("decoder-only")
    generate(model, PROMPTS, max_new_tokens=5)
    assert model.fed == [4, 1, 1, 1, 1]
    assert model.asked == [1] * 5
    model.fed.clear()
    generate(model, PROMPTS, max_new_tokens=5, use_cache=False)
    assert model.fed == [4, 5, 6, 7, 8]
    model.fed.clear()
    generate(model, PROMPTS, max_new_tokens=5, num_beams=2)
    assert model.fed == [4, 1, 1, 1, 1]


@pytest.mark.parametrize("num_beams", [1, 3])
def test_the_source_is_encoded_and_its_keys_are_projected_once(num_beams: int) -> None:
    model = tiny("encoder-decoder")
    projected = []
    model.cross.k_proj.register_forward_hook(lambda *_: projected.append(1))
    generate(model, PROMPTS, max_new_tokens=6, num_beams=num_beams)
    assert model.encoded == len(projected) == 1


def test_a_row_ends_with_its_stop_token_and_the_others_go_on(kind: str) -> None:
    model = tiny(kind, 2)
    free = generate(model, PROMPTS, max_new_tokens=12)
    stop = [int(free[0, 3]), int(free[1, 5])]
    got = generate(model, PROMPTS, max_new_tokens=12, stop_tokens=stop, pad_id=-1)
    ends = []
    for row, whole in zip(got, free, strict=True):
        hits = [i for i, token in enumerate(whole.tolist()) if token in stop]
        end = hits[0] + 1 if hits else 12
        assert row[:end].equal(whole[:end])
        assert (row[end:] == -1).all()
        ends.append(end)
    assert got.size(1) == max(ends)
    assert len(set(ends)) > 1


def test_generation_is_over_when_every_row_has_ended(kind: str) -> None:
    model = tiny(kind, 2)
    first = generate(model, PROMPTS, max_new_tokens=1)
    got = generate(model, PROMPTS, max_new_tokens=12, stop_tokens=first[:, 0].unique().tolist())
    assert got.equal(first)


def test_streaming_gives_the_same_tokens_one_by_one(kind: str) -> None:
    model = tiny(kind, 3)
    how = {"max_new_tokens": 8, "temperature": 2.0, "stop_tokens": [4], "pad_id": 1}
    whole = generate(model, PROMPTS, generator=torch.Generator().manual_seed(0), **how)
    steps = list(stream(model, PROMPTS, generator=torch.Generator().manual_seed(0), **how))
    assert all(step.shape == (3,) for step in steps)
    assert torch.stack(steps, 1).equal(whole)


# --------------------------------------------------------------------------- nothing is left behind


def test_the_models_mode_is_left_as_it_was_and_dropout_is_off(kind: str) -> None:
    model = TinyCausal(0) if kind == "decoder-only" else TinyEncoderDecoder(0)
    model.train()
    model.attn.eval()  # a mixture, as when part of a model is frozen
    modes = [module.training for module in model.modules()]
    for num_beams in (1, 2):
        trained = generate(model, PROMPTS, max_new_tokens=8, num_beams=num_beams)
        assert [module.training for module in model.modules()] == modes
        assert trained.equal(generate(tiny(kind), PROMPTS, max_new_tokens=8, num_beams=num_beams))


def test_between_two_tokens_the_caller_may_train() -> None:
    model = TinyCausal(0).train()
    loss = None
    for new in stream(model, PROMPTS, max_new_tokens=3):
        assert model.training
        assert torch.is_grad_enabled()
        loss = model(new[:, None]).square().mean()
        loss.backward()
    assert loss is not None
    assert model.embed.weight.grad is not None


def test_new_tokens_can_be_trained_on(kind: str) -> None:
    for num_beams in (1, 2):
        new = generate(tiny(kind), PROMPTS, max_new_tokens=3, num_beams=num_beams)
        table = nn.Embedding(29, 4)
        table(new).sum().backward()
        assert table.weight.grad is not None


@pytest.mark.parametrize("num_beams", [1, 2])
def test_an_interruption_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch, num_beams: int) -> None:
    model, caches = TinyCausal(0).train(), []
    make, calls = model.make_cache, itertools.count()

    def make_cache(*sizes: int):
        cache = make(*sizes)
        caches.append(weakref.ref(cache[0]))
        return cache

    def interrupt(*_: object) -> None:
        if next(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(model, "make_cache", make_cache)
    handle = model.attn.register_forward_hook(interrupt)
    try:
        generate(model, PROMPTS, max_new_tokens=8, num_beams=num_beams)
    except KeyboardInterrupt as error:
        error.__traceback__ = None
    else:
        pytest.fail("it was not interrupted")
    handle.remove()
    assert all(module.training for module in model.modules())
    assert torch.is_grad_enabled()
    assert [cache() for cache in caches] == [None], "the cache is gone"
    after = generate(model, PROMPTS, max_new_tokens=8, num_beams=num_beams)
    assert after.equal(generate(TinyCausal(0), PROMPTS, max_new_tokens=8, num_beams=num_beams))


def test_a_stream_may_be_left() -> None:
    model = TinyCausal(0).train()
    steps = stream(model, PROMPTS, max_new_tokens=8)
    next(steps)
    del steps
    assert all(module.training for module in model.modules())
    assert torch.is_grad_enabled()


# --------------------------------------------------------------------------- bad input


def masked(*rows: str) -> dict:
    return {"token_mask": torch.tensor([[mark == "x" for mark in row] for row in rows])}


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"max_new_tokens": 21}, "at most 24 together .*got a prompt of 4 and 21 new tokens"),
        ({"tokens": torch.ones(1, 25, dtype=torch.long)}, "at most 24 together .* prompt of 25 and 3 new"),
        ({"tokens": torch.ones(2, 0, dtype=torch.long)}, r"at least one token, got shape \(2, 0\)"),
        ({"tokens": torch.ones(0, 2, dtype=torch.long)}, r"at least one prompt .* got shape \(0, 2\)"),
        ({"tokens": torch.tensor([1, 2])}, r"tokens: expected shape \(B, S\), got \(2,\)"),
        ({"tokens": torch.tensor([[1, 29]])}, "tokens: expected ids from 0 to 28 .*, got 1 to 29"),
        (masked("xxxx", "____", "_xxx"), r"a real token in every row, got none in rows \[1\]"),
        (masked("xxxx", "xxx_", "_xxx"), "padding on the left only.* got padding behind a real token"),
        (masked("xxxx", "_x_x", "_xxx"), "padding on the left only.* got padding behind a real token"),
        (masked("xxxx"), r"token_mask: expected shape \(B, S\) with B = 3, S = 4, got \(1, 4\)"),
        ({"temperature": -0.5}, r"temperature: expected 0 \(greedy\) or more, got -0.5"),
        ({"temperature": float("nan")}, r"temperature: expected 0 \(greedy\) or more, got nan"),
        ({"top_p": 0.9}, "temperature: expected more than 0 with a filter"),
        ({"top_k": 4}, "temperature: expected more than 0 with a filter"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p: expected more than 0 and at most 1, got 0.0"),
        ({"temperature": 1.0, "top_p": 1.5}, "top_p: expected more than 0 and at most 1, got 1.5"),
        ({"temperature": 1.0, "top_k": 0}, "top_k: expected an integer of at least 1, got 0"),
        ({"num_beams": 2, "temperature": 1.0}, "num_beams: expected 1 with sampling, got 2"),
        ({"num_beams": 2, "top_k": 3}, "num_beams: expected 1 with sampling, got 2"),
        ({"num_beams": 0}, "num_beams: expected an integer of at least 1, got 0"),
        ({"length_penalty": 0.7}, "length_penalty: expected 1.0 without num_beams, got 0.7"),
        ({"max_new_tokens": 0}, "max_new_tokens: expected an integer of at least 1, got 0"),
        ({"stop_tokens": [3, 29, -1]}, r"stop_tokens: expected ids from 0 to 28 .*, got \[29, -1\]"),
    ],
)
def test_bad_values(how: dict, message: str) -> None:
    how = {"tokens": PROMPTS, "max_new_tokens": 3} | how
    with pytest.raises(ValueError, match=message):
        generate(tiny("decoder-only"), **how)


def test_a_source_and_a_target_each_have_the_context_for_themselves() -> None:
    model = tiny("encoder-decoder")
    assert generate(model, torch.ones(1, 24, dtype=torch.long), max_new_tokens=24).shape == (1, 24)
    with pytest.raises(ValueError, match=r"at most 24 each .*got a source of 25 and 3 new tokens"):
        generate(model, torch.ones(1, 25, dtype=torch.long), max_new_tokens=3)
    with pytest.raises(ValueError, match=r"at most 24 each .*got a source of 4 and 25 new tokens"):
        generate(model, PROMPTS, max_new_tokens=25)
    with pytest.raises(ValueError, match=r"a real token in every row, got none in rows \[0\]"):
        generate(model, PROMPTS, max_new_tokens=3, **masked("____", "xxxx", "xx__"))


def test_the_whole_context_can_be_used() -> None:
    model = tiny("decoder-only")
    assert generate(model, PROMPTS, max_new_tokens=20).shape == (3, 20)


def test_bad_types() -> None:
    model = tiny("decoder-only")
    bert = Bert(BertConfig(vocab_size=9, d_model=4, num_layers=1, num_heads=1, d_ff=4, max_seq_len=8))
    with pytest.raises(TypeError, match=r"model: expected a decoder-only language model .*, got Bert"):
        generate(bert, PROMPTS, max_new_tokens=3)
    with pytest.raises(TypeError, match="tokens: expected a tensor of integer ids"):
        generate(model, PROMPTS.float(), max_new_tokens=3)
    with pytest.raises(TypeError, match=r"tokens: expected a tensor of integer ids.*got list"):
        generate(model, [[1, 2]], max_new_tokens=3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="token_mask: expected a bool tensor"):
        generate(model, PROMPTS, token_mask=torch.ones_like(PROMPTS), max_new_tokens=3)


def test_a_stream_checks_at_the_call_not_at_the_first_token() -> None:
    with pytest.raises(ValueError, match="got a prompt of 4 and 40 new tokens"):
        stream(tiny("decoder-only"), PROMPTS, max_new_tokens=40)
