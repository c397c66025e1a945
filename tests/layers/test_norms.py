"""Norms against the published ones, forward and backward; their gradients by hand; QK-norm in attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from exact import ExactRMSNorm
from parity import compare, loud_, parity_row
from torch import Tensor, nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm as TheirGemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from textbook_code.layers import attention as attention_module
from textbook_code.layers.attention import Attention
from textbook_code.layers.cache import KVCache
from textbook_code.layers.norms import (
    BatchNorm,
    GemmaRMSNorm,
    GroupNorm,
    LayerNorm,
    QKNorm,
    RMSNorm,
    UnitNorm,
    layer_norm_backward,
    rms_norm_backward,
)
from textbook_code.layers.positions import RotaryPositions

EPS = 1e-2


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# ------------------------------------------------------------------------------------------------
# Parity


def load_rms(reference: nn.Module) -> nn.Module:
    kind = GemmaRMSNorm if isinstance(reference, TheirGemmaRMSNorm) else RMSNorm
    eps = reference.eps if kind is GemmaRMSNorm else reference.variance_epsilon
    ours = kind(reference.weight.numel(), norm_eps=eps).to(reference.weight.dtype)
    ours.load_state_dict(reference.state_dict())
    return ours


def run_rows(norm: nn.Module) -> dict[str, Tensor]:
    dtype = next(norm.parameters()).dtype
    small, large = 0.1 * randn(3, 5, 11, dtype=dtype), 7 + 50 * randn(2, 11, seed=1, dtype=dtype)
    return {"small": norm(small), "large": norm(large)}


@parity_row("norms", "RMSNorm of LLaMA", "transformers.LlamaForCausalLM", page="norm-rms", dtype="float32")
def test_rms_norm_of_llama(parity):
    parity.check(load_rms, loud_(LlamaRMSNorm(11, eps=EPS)), ours=run_rows, theirs=run_rows)


@parity_row("norms", "RMSNorm of Gemma", "transformers.GemmaForCausalLM", page="norm-rms", dtype="float32")
def test_rms_norm_of_gemma(parity):
    parity.check(load_rms, loud_(TheirGemmaRMSNorm(11, eps=EPS)), ours=run_rows, theirs=run_rows)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", [LlamaRMSNorm, TheirGemmaRMSNorm])
def test_in_half_precision_the_casts_stand_where_the_reference_has_them(kind, dtype):
    reference = loud_(kind(101, eps=1e-5)).to(dtype)
    x = 300 * randn(3, 101, dtype=dtype)  # whose squares overflow float16
    ours = load_rms(reference)
    assert ours(x).dtype == dtype
    assert torch.equal(ours(x), reference(x))
    other = GemmaRMSNorm if kind is LlamaRMSNorm else RMSNorm
    swapped = other(101, norm_eps=1e-5).to(dtype)
    with torch.no_grad():
        swapped.weight.copy_(ours.weight + (-1 if kind is LlamaRMSNorm else 1))
    assert not torch.equal(swapped(x), reference(x)), "the order of the casts would not be seen"


def load_group(reference: nn.Module) -> nn.Module:
    ours = GroupNorm(reference.num_groups, reference.num_channels, norm_eps=reference.eps)
    ours.to(reference.weight.dtype).load_state_dict(reference.state_dict())
    return ours


def run_channels(norm: nn.Module) -> dict[str, Tensor]:
    shapes = {"vectors": (5, 12), "sequences": (3, 12, 7), "images": (2, 12, 5, 3)}
    return {name: norm(1 + 2 * randn(*shape, seed=len(name))) for name, shape in shapes.items()}


@parity_row("norms", "GroupNorm", "torch.nn.GroupNorm", page="norm-axes")
def test_group_norm(parity):
    for groups in (1, 3, 4, 6):
        reference = loud_(nn.GroupNorm(groups, 12, eps=EPS)).double()
        parity.check(load_group, reference, ours=run_channels, theirs=run_channels)


def load_batch(reference: nn.Module) -> nn.Module:
    ours = BatchNorm(reference.num_features, norm_eps=reference.eps, momentum=reference.momentum)
    state = {name: x for name, x in reference.state_dict().items() if name != "num_batches_tracked"}
    ours.to(reference.weight.dtype).load_state_dict(state)
    return ours


@parity_row("norms", "BatchNorm", "torch.nn.BatchNorm2d", page="norm-axes")
def test_batch_norm(parity):
    reference = loud_(nn.BatchNorm2d(12, eps=EPS, momentum=0.3)).double()
    images = {"images": 1 + 2 * randn(2, 12, 5, 3)}

    def run(norm: nn.Module) -> dict[str, Tensor]:
        return {name: norm(x) for name, x in images.items()}

    parity.check(load_batch, reference, ours=run, theirs=run)  # by the running averages
    ours = load_batch(reference).train()
    reference.train()
    w = randn(2, 12, 5, 3, seed=9)
    for seed in range(3):  # three batches, so that the averages move
        x = (1 + 2 * randn(2, 12, 5, 3, seed=seed)).requires_grad_()
        got, want = ours(x), reference(x)
        parity.record({"out": got}, {"out": want})
        grads = [
            torch.autograd.grad((out * w).sum(), (x, norm.weight, norm.bias))
            for out, norm in ((got, ours), (want, reference))
        ]
        parity.record(*(dict(zip("xwb", g, strict=True)) for g in grads), gradients=True)
        for name in ("running_mean", "running_var"):
            parity.record({name: getattr(ours, name)}, {name: getattr(reference, name)})


def by_hand(norm: nn.Module, backward: Callable[..., tuple[Tensor, ...]], x: Tensor, grad: Tensor) -> Any:
    eps = norm.eps
    x = x.clone().requires_grad_()
    theirs = torch.autograd.grad((norm(x) * grad).sum(), (x, *norm.parameters()))
    ours = backward(grad, x.detach(), norm.weight.detach(), norm_eps=eps)
    names = ("x", "weight", "bias")[: len(ours)]
    return dict(zip(names, ours, strict=True)), dict(zip(names, theirs, strict=True))


@parity_row("norms", "LayerNorm's gradient by hand", "torch.nn.LayerNorm", page="norm-backward")
def test_layer_norm_backward(parity):
    norm = loud_(nn.LayerNorm(11, eps=EPS)).double()
    ours = LayerNorm(11, norm_eps=EPS).double()
    ours.load_state_dict(norm.state_dict())
    for shape in ((11,), (5, 11), (3, 5, 11)):
        x, grad = 1 + 0.3 * randn(*shape), randn(*shape, seed=1)
        parity.record({"out": ours(x)}, {"out": norm(x)})
        parity.record(*by_hand(norm, layer_norm_backward, x, grad), gradients=True)


@parity_row("norms", "RMSNorm's gradient by hand", "torch.nn.RMSNorm", page="norm-backward")
def test_rms_norm_backward(parity):
    norm = loud_(nn.RMSNorm(11, eps=EPS)).double()
    ours = RMSNorm(11, norm_eps=EPS).double()
    ours.load_state_dict(norm.state_dict())
    for shape in ((11,), (5, 11), (3, 5, 11)):
        x, grad = 1 + 0.3 * randn(*shape), randn(*shape, seed=1)
        parity.record({"out": ours(x)}, {"out": norm(x)})
        parity.record(*by_hand(norm, rms_norm_backward, x, grad), gradients=True)


class ByHand(torch.autograd.Function):
    """Ours as torch would call them, so that torch's own numerical check can judge them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.layer = bias is not None
        if bias is not None:
            return F.layer_norm(x, weight.shape, weight, bias, EPS)
        return F.rms_norm(x, weight.shape, weight, EPS)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        if ctx.layer:
            return layer_norm_backward(grad, x, weight, norm_eps=EPS)
        return *rms_norm_backward(grad, x, weight, norm_eps=EPS), None


@pytest.mark.parametrize("bias", [True, False])
def test_the_gradients_by_hand_pass_the_numerical_check(bias):
    x, weight = randn(2, 3, 5).requires_grad_(), randn(5, seed=1).requires_grad_()
    shift = randn(5, seed=2).requires_grad_() if bias else None
    assert torch.autograd.gradcheck(ByHand.apply, (x, weight, shift))


@pytest.mark.parametrize(
    "norm",
    [
        GemmaRMSNorm(6, norm_eps=EPS),
        GroupNorm(2, 6, norm_eps=EPS),
        BatchNorm(6, norm_eps=EPS),
        UnitNorm(scale=3.0),
    ],
)
def test_the_others_pass_the_numerical_check(norm):
    assert torch.autograd.gradcheck(loud_(norm).double(), (randn(3, 6).requires_grad_(),))


def test_by_hand_in_half_precision_is_computed_in_float32():
    x, grad, weight = (300 * randn(3, 101)).half(), randn(3, 101, seed=1).half(), randn(101, seed=2).half()
    for backward in (layer_norm_backward, rms_norm_backward):
        half = backward(grad, x, weight, norm_eps=1e-5)
        wide = backward(grad.double(), x.double(), weight.double(), norm_eps=1e-5)
        for got, want in zip(half, wide, strict=True):
            assert got.dtype == torch.float16
            torch.testing.assert_close(got.double(), want, rtol=2e-3, atol=1e-6)


# ------------------------------------------------------------------------------------------------
# QK-norm in attention

SIZES = {"hidden_size": 24, "num_attention_heads": 6, "num_key_value_heads": 2, "rms_norm_eps": EPS}
T = 37


def their_attention(name: str) -> nn.Module:
    """The attention of the first layer of a tiny model, loud, its norms in the dtype of their input."""
    config_type, model_type = (getattr(transformers, name + kind) for kind in ("Config", "ForCausalLM"))
    extra = {"head_dim": 8} if name == "Qwen3" else {}
    config = config_type(
        vocab_size=19,
        intermediate_size=20,
        num_hidden_layers=1,
        attention_bias=True,
        attn_implementation="sdpa",  # the eager softmax rounds to float32
        **SIZES,
        **extra,
    )
    attn = loud_(model_type(config).model.layers[0].self_attn, seed=3).double()
    for norm in ("q_norm", "k_norm"):
        theirs = getattr(attn, norm)
        exact = ExactRMSNorm(theirs)
        x = randn(3, theirs.weight.numel())
        torch.testing.assert_close(exact(x).float(), theirs(x).float(), rtol=1e-5, atol=1e-6)
        setattr(attn, norm, exact)
    return attn


def load_attention(reference: nn.Module) -> Attention:
    Dh, over = reference.head_dim, "width" if "Olmo2" in type(reference).__name__ else "head"
    widths = (6 * Dh, 2 * Dh) if over == "width" else (Dh, Dh)
    qk_norm = QKNorm(*(RMSNorm(width, norm_eps=EPS) for width in widths), over=over)
    ours = Attention(24, 6, num_kv_heads=2, head_dim=Dh, qk_norm=qk_norm).double()
    state = {
        name.replace("o_proj", "out_proj")
        .replace("q_norm", "qk_norm.q_norm")
        .replace("k_norm.w", "qk_norm.k_norm.w"): x
        for name, x in reference.state_dict().items()
    }
    ours.load_state_dict(state)
    return ours


def run_ours(attn: Attention) -> dict[str, Tensor]:
    rotary = RotaryPositions(attn.head_dim, theta=500.0)(torch.arange(T), torch.float64)
    return {"out": attn(randn(2, T, 24), causal=True, rotary=rotary)}


def run_theirs(attn: nn.Module) -> dict[str, Tensor]:
    cos, sin = RotaryPositions(attn.head_dim, theta=500.0)(torch.arange(T), torch.float64)
    mask = torch.zeros(T, T, dtype=torch.float64).masked_fill(torch.ones(T, T).triu(1).bool(), -torch.inf)
    return {"out": attn(randn(2, T, 24), (cos[None], sin[None]), mask[None, None])[0]}


@parity_row("norms", "QK-norm, each head", "transformers.Qwen3ForCausalLM", page="qk-norm")
def test_qk_norm_of_qwen3(parity):
    parity.check(load_attention, their_attention("Qwen3"), ours=run_ours, theirs=run_theirs)


@parity_row("norms", "QK-norm, whole width", "transformers.Olmo2ForCausalLM", page="qk-norm")
def test_qk_norm_of_olmo2(parity):
    parity.check(load_attention, their_attention("Olmo2"), ours=run_ours, theirs=run_theirs)


@torch.no_grad()
def test_unit_norm_in_attention_is_henrys_equation():
    g, H, Dh = 3.7, 3, 5
    attn = Attention(11, H, head_dim=Dh, scale=1.0, qk_norm=QKNorm(UnitNorm(scale=g), UnitNorm())).double()
    x = randn(2, 7, 11)
    q, k, v = (p(x).view(2, 7, H, Dh).transpose(1, 2) for p in (attn.q_proj, attn.k_proj, attn.v_proj))
    cosine = torch.nn.functional.cosine_similarity(q[:, :, :, None], k[:, :, None], dim=-1)
    out = (g * cosine).softmax(-1) @ v
    torch.testing.assert_close(attn(x), attn.out_proj(out.transpose(1, 2).flatten(2)), check_dtype=False)
    torch.testing.assert_close(UnitNorm()(x), F.normalize(x, dim=-1))
    assert torch.equal(UnitNorm()(torch.zeros(2, 3)), torch.zeros(2, 3))
    assert float((g * cosine).abs().max()) <= g


def some_qk_norms() -> dict[str, QKNorm]:
    return {
        "each head": QKNorm(RMSNorm(5), LayerNorm(5)),
        "whole width": QKNorm(RMSNorm(30), RMSNorm(10), over="width"),
        "unit": QKNorm(UnitNorm(scale=3.0), UnitNorm()),
    }


@pytest.mark.parametrize("name", some_qk_norms())
def test_attention_with_qk_norm_from_its_cache(name):
    attn = loud_(Attention(11, 6, num_kv_heads=2, head_dim=5, qk_norm=some_qk_norms()[name])).double()
    x = randn(2, 9, 11)
    whole = attn(x, causal=True)
    cache = KVCache(2, 2, 9, 5, dtype=torch.float64)
    parts = [attn(piece, causal=True, cache=cache) for piece in x.split((4, 1, 3, 1), dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), whole)
    torch.testing.assert_close(attn(x, causal=True, need_weights=True)[0], whole)
    # from another sequence, whose keys are normalised once and kept
    context, kept = randn(2, 4, 11, seed=1), KVCache(2, 2, 4, 5, dtype=torch.float64)
    first = attn(x, context, cache=kept)
    torch.testing.assert_close(attn(x, context, cache=kept), first)
    torch.testing.assert_close(attn(x, context), first)


def test_without_qk_norm_attention_is_as_it_was():
    attn = Attention(12, 3)
    assert attn.qk_norm is None
    assert {name.partition(".")[0] for name in attn.state_dict()} == {
        "q_proj",
        "k_proj",
        "v_proj",
        "out_proj",
    }


# ------------------------------------------------------------------------------------------------
# What the norms do


def test_the_gradient_is_orthogonal_to_what_the_norm_ignores():
    x, grad = randn(7, 11), randn(7, 11, seed=1)
    ones = torch.ones(11, dtype=torch.float64)
    layer = layer_norm_backward(grad, x, ones, norm_eps=0.0)[0]
    rms = rms_norm_backward(grad, x, ones, norm_eps=0.0)[0]
    zero = torch.zeros(7, dtype=torch.float64)
    torch.testing.assert_close((layer * x).sum(-1), zero)
    torch.testing.assert_close(layer.sum(-1), zero)
    torch.testing.assert_close((rms * x).sum(-1), zero)
    assert rms.sum(-1).abs().min() > 1e-3


def test_the_gradient_falls_as_the_input_grows():
    x, grad, ones = randn(7, 11), randn(7, 11, seed=1), torch.ones(11, dtype=torch.float64)
    for backward in (layer_norm_backward, rms_norm_backward):
        small, large = (backward(grad, c * x, ones, norm_eps=0.0)[0] for c in (1.0, 8.0))
        torch.testing.assert_close(8 * large, small)


def test_one_group_is_a_layer_norm_and_many_are_instance_norms():
    x = randn(3, 12, 5)
    torch.testing.assert_close(GroupNorm(1, 12).double()(x), F.layer_norm(x, (12, 5)), atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(GroupNorm(12, 12).double()(x), F.instance_norm(x), atol=1e-12, rtol=1e-12)


def test_only_batch_norm_looks_at_its_neighbours():
    x = randn(4, 12, 5)
    other = x.clone()
    other[1:] += 1
    for norm in (GroupNorm(3, 12).double(), BatchNorm(12).double().eval()):
        assert torch.equal(norm(x)[0], norm(other)[0])
    training = BatchNorm(12).double()
    assert not torch.allclose(training(x)[0], training(other)[0])


def test_batch_norm_in_evaluation_moves_nothing_and_in_training_averages():
    norm, x = BatchNorm(3, momentum=1.0).double(), 5 + 2 * randn(50, 3)
    norm.eval()(x)
    assert torch.equal(norm.running_mean, torch.zeros(3).double())
    norm.train()(x)
    torch.testing.assert_close(norm.running_mean, x.mean(0))
    torch.testing.assert_close(norm.running_var, x.var(0, correction=1))


@pytest.mark.parametrize("norm", [GroupNorm(2, 6), BatchNorm(6), UnitNorm(), GemmaRMSNorm(6), LayerNorm(6)])
def test_statistics_of_half_precision_are_taken_in_float32(norm):
    x = (300 * randn(5, 6)).half()
    got, want = norm.half()(x), norm.float()(x.float())
    assert got.dtype == torch.float16 and got.isfinite().all()
    torch.testing.assert_close(got, want.half(), rtol=2e-3, atol=2e-3)


# ------------------------------------------------------------------------------------------------
# Planted bugs


Mutate = Callable[[Any], AbstractContextManager[None]]


def planted(cls: type[nn.Module], wrong: Callable[[Any, Tensor], Tensor]) -> Mutate:
    @contextmanager
    def mutate(model: nn.Module) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cls, "forward", wrong)
            yield

    return mutate


def group_norm(
    n: Any, x: Tensor, *, correction: int = 0, tiled: bool = False, outside: bool = False
) -> Tensor:
    B, C, G = x.size(0), x.size(1), n.num_groups
    flat = x.reshape(B, C, -1)
    groups = (
        flat.view(B, C // G, G, -1).transpose(1, 2).reshape(B, G, -1) if tiled else flat.reshape(B, G, -1)
    )
    variance, mean = torch.var_mean(groups, -1, correction=correction, keepdim=True)
    y = (groups - mean) / (variance.sqrt() + n.norm_eps if outside else (variance + n.norm_eps).sqrt())
    if tiled:
        y = y.view(B, G, C // G, -1).transpose(1, 2)
    shape = (1, C, *[1] * (x.dim() - 2))
    return y.reshape(x.shape) * n.weight.view(shape) + n.bias.view(shape)


def layer_norm(n: Any, x: Tensor, *, correction: int = 0, outside: bool = False, mean: bool = True) -> Tensor:
    centred = x - x.mean(-1, keepdim=True) if mean else x
    variance = x.var(-1, correction=correction, keepdim=True)
    return (
        centred / (variance.sqrt() + n.norm_eps if outside else (variance + n.norm_eps).sqrt()) * n.weight
        + n.bias
    )


NORM_BUGS: dict[str, tuple[Callable[[], nn.Module], type[nn.Module], Callable[[Any, Tensor], Tensor]]] = {
    "layer: variance over D - 1": (
        lambda: nn.LayerNorm(11, eps=EPS), LayerNorm, lambda n, x: layer_norm(n, x, correction=1)
    ),
    "layer: ε outside the root": (
        lambda: nn.LayerNorm(11, eps=EPS), LayerNorm, lambda n, x: layer_norm(n, x, outside=True)
    ),
    "layer: mean not subtracted": (
        lambda: nn.LayerNorm(11, eps=EPS), LayerNorm, lambda n, x: layer_norm(n, x, mean=False)
    ),
    "rms: mean subtracted": (
        lambda: nn.RMSNorm(11, eps=EPS),
        RMSNorm,
        lambda n, x: F.layer_norm(x, n.weight.shape, n.weight, None, n.norm_eps),
    ),
    "rms: ε outside the root": (
        lambda: nn.RMSNorm(11, eps=EPS),
        RMSNorm,
        lambda n, x: n.weight * x / (x.square().mean(-1, keepdim=True).sqrt() + n.norm_eps),
    ),
    "group: variance over n - 1": (
        lambda: nn.GroupNorm(3, 12, eps=EPS), GroupNorm, lambda n, x: group_norm(n, x, correction=1)
    ),
    "group: ε outside the root": (
        lambda: nn.GroupNorm(3, 12, eps=EPS), GroupNorm, lambda n, x: group_norm(n, x, outside=True)
    ),
    "group: channels dealt out in turn": (
        lambda: nn.GroupNorm(3, 12, eps=EPS), GroupNorm, lambda n, x: group_norm(n, x, tiled=True)
    ),
    "group: over the batch": (
        lambda: nn.GroupNorm(3, 12, eps=EPS),
        GroupNorm,
        lambda n, x: F.batch_norm(x, None, None, n.weight, n.bias, training=True, eps=n.norm_eps),
    ),
    "group: over places only": (
        lambda: nn.GroupNorm(3, 12, eps=EPS),
        GroupNorm,
        lambda n, x: F.group_norm(x, 12, n.weight, n.bias, n.norm_eps) if x.dim() > 2 else x,
    ),
}  # fmt: skip


def load_any(reference: nn.Module) -> nn.Module:
    if isinstance(reference, nn.GroupNorm):
        return load_group(reference)
    kind = LayerNorm if isinstance(reference, nn.LayerNorm) else RMSNorm
    ours = kind(11, norm_eps=reference.eps).double()
    ours.load_state_dict(reference.state_dict())
    return ours


def compare_norm(reference: nn.Module, mutate: Any = None) -> None:
    run = run_channels if isinstance(reference, nn.GroupNorm) else run_rows
    compare(load_any, loud_(reference).double(), ours=run, theirs=run, mutate=mutate)


@pytest.mark.parametrize("name", NORM_BUGS)
def test_a_planted_bug_is_caught(name):
    make, cls, wrong = NORM_BUGS[name]
    compare_norm(make())
    with pytest.raises(AssertionError, match="tensors differ"):
        compare_norm(make(), planted(cls, wrong))


def batch_norm_bug(correction: int, running_correction: int) -> Callable[[Any, Tensor], Tensor]:
    def forward(n: Any, x: Tensor) -> Tensor:
        variance, mean = torch.var_mean(x, (0, 2, 3), correction=correction)
        n.running_mean.lerp_(mean.detach(), n.momentum)
        n.running_var.lerp_(x.var((0, 2, 3), correction=running_correction).detach(), n.momentum)
        return F.batch_norm(x, mean, variance, n.weight, n.bias, eps=n.norm_eps)

    return forward


@pytest.mark.parametrize(
    ("correction", "running_correction", "wrong"),
    [(0, 1, ""), (1, 1, "out"), (0, 0, "running_var")],
)
def test_the_two_variances_of_batch_norm_are_told_apart(correction, running_correction, wrong, monkeypatch):
    """The batch is normalised by its biased variance, and the average is one of the unbiased."""
    reference = loud_(nn.BatchNorm2d(12, eps=EPS)).double()
    ours = load_batch(reference).train()
    monkeypatch.setattr(BatchNorm, "forward", batch_norm_bug(correction, running_correction))
    x = 1 + 2 * randn(2, 12, 5, 3)
    pairs = {"out": (ours(x), reference.train()(x)), "running_var": (ours.running_var, reference.running_var)}
    differ = [name for name, (got, want) in pairs.items() if not torch.allclose(got, want, atol=1e-9)]
    assert differ == ([wrong] if wrong else [])


QK_BUGS: dict[str, Callable[[QKNorm, pytest.MonkeyPatch], None]] = {}


def qk_bug(name: str) -> Callable[[Any], Any]:
    def register(plant: Any) -> Any:
        QK_BUGS[name] = plant
        return plant

    return register


@qk_bug("norm after the rotation")
def _(norm: QKNorm, patch: pytest.MonkeyPatch) -> None:
    right, queries, keys = attention_module.rotate, norm.queries, norm.keys
    for side in ("queries", "keys"):
        patch.setattr(norm, side, lambda x: x)
    patch.setattr(
        attention_module, "rotate", lambda x, c, s: (queries if x.size(1) == 6 else keys)(right(x, c, s))
    )


for side in ("queries", "keys"):
    qk_bug(f"{side} not normalised")(lambda norm, patch, side=side: patch.setattr(norm, side, lambda x: x))


@qk_bug("the mean taken off")
def _(norm: QKNorm, patch: pytest.MonkeyPatch) -> None:
    for one in (norm.q_norm, norm.k_norm):
        patch.setattr(
            one, "forward", lambda x, n=one: F.layer_norm(x, n.weight.shape, n.weight, None, n.norm_eps)
        )


@qk_bug("statistics over the other axes")
def _(norm: QKNorm, patch: pytest.MonkeyPatch) -> None:
    def other(one: Any, x: Tensor) -> Tensor:
        axes = (1, 3) if norm.over == "head" else (3,)
        weight = one.weight if norm.over == "head" else one.weight.view(x.size(1), 1, -1)
        return x * (x.square().mean(axes, keepdim=True) + EPS).rsqrt() * weight

    patch.setattr(norm, "queries", lambda x: other(norm.q_norm, x))
    patch.setattr(norm, "keys", lambda x: other(norm.k_norm, x))


@qk_bug("values normalised too")
def _(norm: QKNorm, patch: pytest.MonkeyPatch) -> None:
    right = attention_module.fused_attention
    patch.setattr(
        attention_module,
        "fused_attention",
        lambda q, k, v, *args, **options: right(q, k, norm.keys(v), *args, **options),
    )


@pytest.mark.parametrize("name", ["Qwen3", "Olmo2"])
@pytest.mark.parametrize("bug", QK_BUGS)
def test_a_bug_in_qk_norm_is_caught(name, bug):
    @contextmanager
    def mutate(model: Attention) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            assert model.qk_norm is not None
            QK_BUGS[bug](model.qk_norm, patch)
            yield

    with pytest.raises(AssertionError, match="tensors differ"):
        compare(load_attention, their_attention(name), ours=run_ours, theirs=run_theirs, mutate=mutate)


# ------------------------------------------------------------------------------------------------
# What they refuse


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LayerNorm(0), r"^d_model: expected at least 1, got 0$"),
        (lambda: RMSNorm(-3), r"^d_model: expected at least 1, got -3$"),
        (lambda: GemmaRMSNorm(0), r"^d_model: expected at least 1, got 0$"),
        (lambda: LayerNorm(4, norm_eps=-1e-5), r"^norm_eps: expected .* not negative, got -1e-05$"),
        (lambda: RMSNorm(4, norm_eps=float("nan")), r"^norm_eps: expected .* not negative, got nan$"),
        (lambda: GemmaRMSNorm(4, norm_eps=-1.0), r"^norm_eps: expected .* not negative, got -1.0$"),
        (lambda: UnitNorm(norm_eps=-1.0), r"^norm_eps: expected .* not negative, got -1.0$"),
        (lambda: GroupNorm(5, 12), r"^num_groups: expected a positive divisor of num_channels = 12, got 5$"),
        (lambda: GroupNorm(0, 12), r"^num_groups: expected a positive divisor of num_channels = 12, got 0$"),
        (lambda: GroupNorm(1, 0), r"^num_channels: expected at least 1, got 0$"),
        (lambda: GroupNorm(1, 4, norm_eps=-1.0), r"^norm_eps: expected .* not negative, got -1.0$"),
        (lambda: BatchNorm(0), r"^num_channels: expected at least 1, got 0$"),
        (lambda: BatchNorm(4, norm_eps=-1.0), r"^norm_eps: expected .* not negative, got -1.0$"),
        (lambda: BatchNorm(4, momentum=1.5), r"^momentum: expected a number from 0 to 1, got 1.5$"),
        (lambda: QKNorm(RMSNorm(4), RMSNorm(4), over="all"), r"^over: expected 'head' .* got 'all'$"),
        (lambda: LayerNorm(4)(torch.zeros(2, 1)), r"^x: expected shape \(…, D\) with D = 4, got \(2, 1\)$"),
        (lambda: RMSNorm(4)(torch.zeros(2, 1)), r"^x: expected shape \(…, D\) with D = 4, got \(2, 1\)$"),
        (lambda: RMSNorm(1)(torch.zeros(2, 4)), r"^x: expected shape \(…, D\) with D = 1, got \(2, 4\)$"),
        (lambda: GemmaRMSNorm(4)(torch.zeros(2, 3)), r"^x: expected .* D = 4, got \(2, 3\)$"),
        (lambda: RMSNorm(4)(torch.tensor(1.0)), r"^x: expected .* D = 4, got \(\)$"),
        (lambda: GroupNorm(2, 4)(torch.zeros(2, 3, 4)), r"^x: expected .* C = 4, got \(2, 3, 4\)$"),
        (lambda: BatchNorm(4)(torch.zeros(4)), r"^x: expected .* C = 4, got \(4,\)$"),
        (
            lambda: BatchNorm(4)(torch.zeros(1, 4)),
            r"^x: expected more than one value for each channel in training, got shape \(1, 4\)$",
        ),
        (
            lambda: BatchNorm(4)(torch.zeros(1, 4, 1, 1)),
            r"^x: expected more than one value for each channel in training, got shape \(1, 4, 1, 1\)$",
        ),
        (
            lambda: layer_norm_backward(torch.zeros(2, 3), torch.zeros(2, 4), torch.ones(4), norm_eps=0.1),
            r"^grad: expected shape \(2, 4\), as x has, got \(2, 3\)$",
        ),
        (
            lambda: rms_norm_backward(torch.zeros(2, 3), torch.zeros(2, 3), torch.ones(4), norm_eps=0.1),
            r"^x: expected .* D = 4, got \(2, 3\)$",
        ),
    ],
)  # fmt: skip
def test_what_they_refuse(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_batch_norm_takes_one_example_in_evaluation():
    assert BatchNorm(4).eval()(torch.zeros(1, 4)).shape == (1, 4)
