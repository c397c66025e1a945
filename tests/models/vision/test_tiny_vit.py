"""The tiny vision transformer computes what timm's VisionTransformer computes, and folds without a change."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from parity import ParityError, check_loading, compare, loud_, parity_row
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from textbook_code.layers.feed_forward import ACTIVATIONS
from textbook_code.models.vision.tiny_vit import TinyViT, TinyViTBlock, TinyViTConfig, fold
from textbook_code.weights import WeightError

CONFIG = TinyViTConfig(
    image_size=15,
    patch_size=5,
    in_channels=2,
    d_model=28,
    num_layers=3,
    num_heads=4,
    d_ff=42,
    norm="layer",
    norm_eps=1e-2,
)
BATCH = replace(CONFIG, norm="batch", num_layers=2)
IMAGES = torch.randn(5, 2, 15, 15, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


class TokenNorm(nn.BatchNorm1d):
    """torch's BatchNorm as timm wants it: of (B, N, D)."""

    def __init__(self, width: int, eps: float, **kwargs: Any) -> None:
        super().__init__(width, eps=eps, **kwargs)
        self.num_batches_tracked = None

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.reshape(-1, x.size(-1))).reshape(x.shape)


def build_reference(config: TinyViTConfig = CONFIG) -> VisionTransformer:
    norm = nn.LayerNorm if config.norm == "layer" else TokenNorm
    return VisionTransformer(
        img_size=config.image_size,
        patch_size=config.patch_size,
        in_chans=config.in_channels,
        num_classes=1,
        global_pool="avg",
        class_token=False,
        fc_norm=False,
        embed_dim=config.d_model,
        depth=config.num_layers,
        num_heads=config.num_heads,
        mlp_ratio=config.d_ff / config.d_model,
        norm_layer=partial(norm, eps=config.norm_eps),
        act_layer=nn.ReLU,
    )


def load(reference: nn.Module, config: TinyViTConfig = CONFIG) -> TinyViT:
    return TinyViT(config).load_hf_state_dict(reference.state_dict())


COMPARED = {
    "ours": lambda m: {"logits": m(IMAGES)},
    "theirs": lambda r: {"logits": r(IMAGES).squeeze(-1)},
    "zero_gradient": [r".*k_proj\.bias"],
}


@parity_row(
    "tiny-vit", "one logit, LayerNorm", "timm.models.vision_transformer.VisionTransformer", page="tiny-vit"
)
def test_with_layer_norm(parity):
    parity.check(load, loud_(build_reference()).double(), **COMPARED)


@parity_row(
    "tiny-vit",
    "one logit, BatchNorm, evaluated",
    "timm.models.vision_transformer.VisionTransformer",
    page="tiny-vit-norm",
)
def test_with_batch_norm(parity):
    parity.check(partial(load, config=BATCH), loud_(build_reference(BATCH)).double(), **COMPARED)


@parity_row(
    "tiny-vit",
    "one logit, BatchNorm, in training",
    "timm.models.vision_transformer.VisionTransformer",
    page="tiny-vit-norm",
)
def test_with_batch_norm_in_training(parity):
    """Outputs, gradients and the running averages after three batches."""
    theirs = loud_(build_reference(BATCH)).double().train()
    ours = load(theirs, BATCH).train()
    for step in range(3):
        images = IMAGES.roll(step, 0) * (1 + step)
        got, want = ours(images), theirs(images).squeeze(-1)
        parity.record({"logits": got}, {"logits": want})
    for model, logits in ((ours, got), (theirs, want)):
        model.zero_grad()
        (logits * torch.arange(1.0, 6.0, dtype=torch.float64)).sum().backward()
    after = load(theirs, BATCH)
    moved = dict(ours.named_buffers())
    assert len(moved) == 2 * (2 * 2 + 1)
    parity.record(moved, dict(after.named_buffers()))
    for p in theirs.parameters():
        p.data = p.grad
    gradients = dict(load(theirs, BATCH).named_parameters())
    parity.record({n: p.grad for n, p in ours.named_parameters()}, gradients, gradients=True)
    assert float(gradients["blocks.0.attn_norm.weight"].abs().max()) > 1e-3


@pytest.mark.parametrize("config", [CONFIG, BATCH], ids=lambda c: c.norm)
def test_weights_load_strictly_both_ways(config):
    check_loading(partial(load, config=config), partial(build_reference, config))


# ------------------------------------------------------------------------------------------------
# Planted bugs

Mutation = Callable[[TinyViT, pytest.MonkeyPatch], None]
MUTATIONS: dict[str, Mutation] = {}


def mutation(name: str) -> Callable[[Mutation], Mutation]:
    def register(plant: Mutation) -> Mutation:
        MUTATIONS[name] = plant
        return plant

    return register


def block_forward(name: str, forward: Callable[..., Tensor]) -> None:
    @mutation(name)
    def plant(model: TinyViT, patch: pytest.MonkeyPatch) -> None:
        patch.setattr(TinyViTBlock, "forward", lambda b, x, *, need_weights: (forward(b, x), x))


block_forward("norms swapped", lambda b, x: (y := x + b.attn(b.ffn_norm(x))) + b.ffn(b.attn_norm(y)))
block_forward("post-norm", lambda b, x: b.ffn_norm((y := b.attn_norm(x + b.attn(x))) + b.ffn(y)))
block_forward("both halves side by side", lambda b, x: x + b.attn(b.attn_norm(x)) + b.ffn(b.ffn_norm(x)))
block_forward("no sum around attention", lambda b, x: (y := b.attn(b.attn_norm(x))) + b.ffn(b.ffn_norm(y)))
block_forward("sum taken after the norm", lambda b, x: (n := b.attn_norm(x)) + b.attn(n) + b.ffn(n))


def read_out(name: str, pooled: Callable[[TinyViT, Tensor], Tensor]) -> None:
    @mutation(name)
    def plant(model: TinyViT, patch: pytest.MonkeyPatch) -> None:
        def forward(images: Tensor) -> Tensor:
            x = model.patch_embed(images) + model.pos_embed
            for block in model.blocks:
                x = block(x)[0]
            return model.head(pooled(model, x)).squeeze(-1)

        patch.setattr(model, "forward", forward)


read_out("average before the norm", lambda m, x: m.final_norm(x.mean(1)))
read_out("first patch in place of the average", lambda m, x: m.final_norm(x)[:, 0])
read_out("largest in place of the average", lambda m, x: m.final_norm(x).amax(1))
read_out("no last norm", lambda m, x: x.mean(1))


@mutation("no positions")
def _(model: TinyViT, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(model.pos_embed, "data", torch.zeros_like(model.pos_embed))


@mutation("positions column by column")
def _(model: TinyViT, patch: pytest.MonkeyPatch) -> None:
    turned = model.pos_embed.data.view(1, 3, 3, -1).transpose(1, 2).reshape(1, 9, -1)
    patch.setattr(model.pos_embed, "data", turned)


@mutation("scores not scaled")
def _(model: TinyViT, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(model.blocks[1].attn, "scale", 1.0)


@mutation("scores scaled by the width of all heads")
def _(model: TinyViT, patch: pytest.MonkeyPatch) -> None:
    for block in model.blocks:
        patch.setattr(block.attn, "scale", CONFIG.d_model**-0.5)


@mutation("another activation")
def _(model: TinyViT, patch: pytest.MonkeyPatch) -> None:
    patch.setitem(ACTIVATIONS, "relu", ACTIVATIONS["gelu"])


@mutation("another epsilon")
def _(model: TinyViT, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(model.blocks[0].ffn_norm, "norm_eps", 1e-5)
    patch.setattr(model.final_norm, "norm_eps", 1e-5)


@mutation("patches without bias")
def _(model: TinyViT, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(model.patch_embed.proj.bias, "data", torch.zeros(CONFIG.d_model, dtype=torch.float64))


@mutation("one head for all")
def _(model: TinyViT, patch: pytest.MonkeyPatch) -> None:
    for block in model.blocks:
        patch.setattr(block.attn, "num_heads", 1)
        patch.setattr(block.attn, "num_kv_heads", 1)
        patch.setattr(block.attn, "head_dim", CONFIG.d_model)


# BatchNorm in evaluation is affine and commutes with the average: there that one would be no bug
PLANTED = [(CONFIG, name) for name in [None, *MUTATIONS]]
PLANTED += [(BATCH, name) for name in [None, *MUTATIONS] if name != "average before the norm"]


@pytest.mark.parametrize(("config", "name"), PLANTED, ids=[f"{c.norm}-{n or 'none'}" for c, n in PLANTED])
def test_a_planted_bug_is_caught(config, name):
    @contextmanager
    def mutate(model: TinyViT):
        with pytest.MonkeyPatch.context() as patch:
            if name:
                MUTATIONS[name](model, patch)
            yield

    reference = loud_(build_reference(config)).double()
    if name is None:
        compare(partial(load, config=config), reference, mutate=mutate, **COMPARED)
        return
    with pytest.raises(ParityError):
        compare(partial(load, config=config), reference, mutate=mutate, **COMPARED)


# ------------------------------------------------------------------------------------------------
# Folding


def loud_model(config: TinyViTConfig) -> TinyViT:
    return loud_(TinyViT(config).double()).eval()


@pytest.mark.parametrize("config", [CONFIG, BATCH], ids=lambda c: c.norm)
def test_folding_changes_no_logit(config):
    model = loud_model(config)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    folded = fold(model)
    assert folded.config.norm == ("none" if config.norm == "batch" else "layer")
    assert not folded.config.scale_scores
    assert not folded.training
    expected = model(IMAGES)
    assert float(expected.abs().max()) > 0.1
    torch.testing.assert_close(folded(IMAGES), expected, rtol=1e-11, atol=1e-11)
    maps, folded_maps = model.attended(IMAGES)[1], folded.attended(IMAGES)[1]
    for ours, theirs in zip(folded_maps, maps, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()), "the model is left alone"


def test_nothing_but_linear_maps_is_left():
    kinds = {type(m).__name__ for m in fold(loud_model(BATCH)).modules()}
    assert not kinds & {"TokenBatchNorm", "LayerNorm"}
    assert "LayerNorm" in {type(m).__name__ for m in fold(loud_model(CONFIG)).modules()}


def test_folding_twice_changes_nothing():
    once = fold(loud_model(BATCH))
    again = fold(once)
    assert again.config == once.config
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), once.parameters(), strict=True))


def test_folding_needs_the_running_averages_of_every_norm():
    """A norm passed over would be heard."""
    for name in ("blocks.1.attn_norm", "blocks.0.ffn_norm", "final_norm"):
        model = loud_model(BATCH)
        folded = fold(model)
        model.get_submodule(name).running_mean.add_(0.5)
        assert float((fold(model)(IMAGES) - folded(IMAGES)).abs().max()) > 1e-3, name


# ------------------------------------------------------------------------------------------------
# Behaviour


def test_patches_and_their_positions_may_change_places_together():
    model = loud_model(CONFIG)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(1))
    tiles = IMAGES.unfold(2, 5, 5).unfold(3, 5, 5).reshape(5, 2, 9, 5, 5)
    shuffled = tiles[:, :, order].view(5, 2, 3, 3, 5, 5).transpose(3, 4).reshape(5, 2, 15, 15)
    expected = model(IMAGES)
    assert float((model(shuffled) - expected).abs().max()) > 1e-2
    model.pos_embed.data = model.pos_embed.data[:, order]
    torch.testing.assert_close(model(shuffled), expected)


def test_evaluated_images_do_not_see_each_other():
    for config in (CONFIG, BATCH):
        model = loud_model(config)
        alone = torch.cat([model(image[None]) for image in IMAGES])
        torch.testing.assert_close(model(IMAGES), alone)


def test_the_fused_path_of_training_is_the_written_out_one():
    model = loud_model(CONFIG)
    torch.testing.assert_close(model.train()(IMAGES), model.eval()(IMAGES), rtol=1e-12, atol=1e-12)


def test_attention_weights_are_those_of_each_layer():
    logits, maps = loud_model(CONFIG).attended(IMAGES)
    assert logits.shape == (5,)
    assert [m.shape for m in maps] == [(5, 4, 9, 9)] * 3
    for weights in maps:
        torch.testing.assert_close(weights.sum(-1), torch.ones(5, 4, 9, dtype=torch.float64))
    assert not torch.allclose(maps[0], maps[1])


@pytest.mark.parametrize("config", [CONFIG, BATCH, replace(BATCH, activation="hardswish")], ids=str)
def test_saved_and_read_again(config, tmp_path):
    model = loud_(TinyViT(config)).eval()
    for saved in (model, fold(model)):
        saved.save_pretrained(tmp_path)
        again = TinyViT.from_pretrained(tmp_path)
        assert again.config == saved.config
        assert torch.equal(again(IMAGES.float()), saved(IMAGES.float()))


# ------------------------------------------------------------------------------------------------
# Bad input


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch_size": 5}, "patch_size: expected a positive divisor of image_size = 32, got 5"),
        ({"num_heads": 3}, "num_heads: expected a positive divisor of d_model = 64, got 3"),
        ({"norm": "rms"}, "norm: expected one of batch, layer, none, got 'rms'"),
        ({"activation": "mish"}, r"activation: expected one of \[.*'relu'.*\], got 'mish'"),
        ({"num_layers": 0}, "num_layers: expected at least 1, got 0"),
        ({"d_ff": -1}, "d_ff: expected at least 1, got -1"),
    ],
)
def test_a_bad_config_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        TinyViTConfig(**changes)


def test_bad_images_are_refused():
    model = TinyViT(CONFIG)
    with pytest.raises(ValueError, match=r"images: expected shape \(B, C, H, W\) with C = 2, H = 15"):
        model(torch.zeros(1, 2, 16, 16))
    with pytest.raises(ValueError, match="images: expected shape"):
        model(torch.zeros(2, 15, 15))
    with pytest.raises(TypeError, match=r"images: expected torch.float32, got torch.uint8"):
        model(torch.zeros(1, 2, 15, 15, dtype=torch.uint8))
    with pytest.raises(TypeError, match="images: expected a tensor, got list"):
        model([[0.0]])


def test_other_weights_are_refused():
    with pytest.raises(WeightError, match="pos_embed"):
        load(build_reference(), replace(CONFIG, patch_size=3))
    with pytest.raises(WeightError, match="running_mean"):
        load(build_reference(), BATCH)
