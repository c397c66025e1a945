"""The sizes that follow from a config, against counts of the model itself."""

from __future__ import annotations

import math

import pytest
import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from textbook_code.models.vision.tiny_vit import TinyViT, TinyViTConfig, fold

CONFIGS = [
    TinyViTConfig(),
    TinyViTConfig(norm="layer"),
    TinyViTConfig(activation="hardswish", d_ff=384),
    TinyViTConfig(patch_size=8, d_model=96, num_heads=3, d_ff=192, num_layers=2),  # the patches are the peak
    TinyViTConfig(patch_size=8, d_model=32, num_heads=1, d_ff=32, num_layers=1),
    TinyViTConfig(patch_size=8, d_model=96, num_heads=1, d_ff=96, norm="layer", num_layers=1),
    TinyViTConfig(patch_size=8, d_model=192, num_heads=1, d_ff=192, norm="batch", num_layers=1),
    TinyViTConfig(patch_size=4, d_model=48, num_heads=1, d_ff=384, num_layers=2),
    TinyViTConfig(patch_size=4, d_model=48, num_heads=2, d_ff=48, num_layers=1, in_channels=1),
    TinyViTConfig(patch_size=2, d_model=8, num_heads=2, d_ff=8, num_layers=1),
]
IDS = [f"p{c.patch_size}-d{c.d_model}-h{c.num_heads}-f{c.d_ff}-{c.norm}-{c.activation}" for c in CONFIGS]
aten = torch.ops.aten
VIEWS = {
    aten.view.default,
    aten._unsafe_view.default,
    aten.transpose.int,
    aten.t.default,
    aten.expand.default,
    aten.alias.default,
    aten.squeeze.dim,
    aten.clone.default,  # another order in memory, which a kernel can read as it lies
    aten.mul.Tensor,  # by 1: the scale of folded scores
}


def traced(config: TinyViTConfig) -> fx.GraphModule:
    image = torch.zeros(1, config.in_channels, config.image_size, config.image_size)
    return make_fx(fold(TinyViT(config)))(image)


def peak_by_liveness(config: TinyViTConfig) -> int:
    """Every operation of the traced model in its order; what is made and will still be read is alive."""
    graph = traced(config)
    storage: dict[fx.Node, fx.Node] = {}  # each value, and the operation that wrote it
    size: dict[fx.Node, int] = {}
    steps: list[tuple[fx.Node, set[fx.Node]]] = []
    constants = {n: getattr(graph, n.target) for n in graph.graph.nodes if n.op == "get_attr"}
    for node in graph.graph.nodes:
        if node.op == "get_attr":
            continue
        inputs = [n for n in node.all_input_nodes if n not in constants and n in storage]
        if node.op == "placeholder":
            storage[node], size[node] = node, node.meta["val"].numel()
        elif node.op == "output":
            steps.append((node, {storage[n] for n in inputs}))
        elif inputs:
            fused = node.target in VIEWS or str(node.target) == "<built-in function getitem>"
            if node.target is aten.add.Tensor and node.args[1] in constants:
                fused = constants[node.args[1]].dim() == 1  # a bias; the table of positions is no such
            fused |= node.target is aten.relu.default  # a clamp at the end of the matrix before it
            if node.target is aten.mul.Tensor:
                assert node.args[1] == 1.0
            if fused:
                storage[node] = storage[inputs[0]]
                continue
            value = node.meta["val"]
            value = value[0] if isinstance(value, tuple) else value  # LayerNorm gives its statistics too
            storage[node], size[node] = node, value.numel()
            steps.append((node, {storage[n] for n in inputs}))
    last = {written: i for i, (_, read) in enumerate(steps) for written in read}
    made = {node: i for i, (node, _) in enumerate(steps)}
    return max(
        sum(size[w] for w, until in last.items() if made.get(w, -1) <= i <= until) for i in range(len(steps))
    )


@pytest.mark.parametrize("config", CONFIGS, ids=IDS)
def test_the_peak_of_activation_memory(config):
    assert config.peak_activation_bytes == peak_by_liveness(config)


def test_the_peak_of_the_default_size():
    assert TinyViTConfig().peak_activation_bytes == 40_960
    folded = fold(TinyViT(TinyViTConfig())).config
    assert folded.peak_activation_bytes == 40_960


def test_every_part_of_the_peak_is_the_greatest_somewhere():
    """Else a wrong part of the formula would not be seen."""

    def parts(c: TinyViTConfig) -> dict[str, int]:
        ND, NF, scores = c.num_patches * c.d_model, c.num_patches * c.d_ff, c.num_heads * c.num_patches**2
        alive = {"patches": 3072 + ND, "scores": 4 * ND + scores, "softmax": 2 * ND + 2 * scores}
        alive |= {"feed-forward": 2 * ND + NF}
        alive |= {"layer norm": 5 * ND} if c.norm == "layer" else {}
        return alive | ({"activation": ND + 2 * NF} if c.activation != "relu" else {})

    greatest = {max(parts(c), key=parts(c).__getitem__) for c in CONFIGS}
    assert greatest == {"patches", "scores", "softmax", "feed-forward", "layer norm", "activation"}


@pytest.mark.parametrize("config", CONFIGS, ids=IDS)
def test_parameters_and_macs(config):
    model = TinyViT(config)
    assert config.num_parameters == sum(p.numel() for p in model.parameters())
    image = torch.zeros(1, config.in_channels, config.image_size, config.image_size)
    with FlopCounterMode(display=False) as counter:
        fold(model)(image)
    assert counter.get_total_flops() == 2 * config.macs
    assert fold(model).config.num_parameters == sum(p.numel() for p in fold(model).parameters())


@pytest.mark.parametrize("config", CONFIGS, ids=IDS)
def test_flash(config):
    """A byte for a weight; for a bias nine: 32 bits, the multiplier's 32 and its shift."""
    total = 0
    for name, p in fold(TinyViT(config)).named_parameters():
        is_bias = name.endswith("bias") and "norm" not in name
        total += 9 * p.numel() if is_bias else p.numel()
    assert config.flash_bytes == total


def test_the_default_fits_into_the_budget():
    config = TinyViTConfig()
    assert config.flash_bytes <= 250_000
    assert config.peak_activation_bytes <= 65_536
    assert config.macs <= 15_000_000
    assert math.isclose(config.macs, 10.68e6, rel_tol=1e-3)
