"""A vision transformer small enough for a microcontroller: 32 × 32 pixels in, one logit out.

In this file: the config with the sizes that can be counted from it, the block, the model, and `fold`, which
takes out of a trained model what need not be computed at run time. It is a plain vision transformer without
a class token: the last vectors are averaged. Two choices make it fit for integers: BatchNorm, which in
evaluation is a fixed affine map and folds into the next matrix, and ReLU, which is a clamp. LayerNorm and
Hardswish are there to compare. (TinyViT is also the name of another, larger model by Wu et al., 2022.)

B batch, C channels, N patches, D d_model, H heads, F d_ff, L layers.
Paper: Dosovitskiy et al. (2021). Reference: timm's VisionTransformer with class_token=False,
global_pool="avg" and fc_norm=False.

Book: tiny-vit
"""

from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from textbook_code.layers.attention import Attention
from textbook_code.layers.checks import expect_divides, expect_sizes
from textbook_code.layers.embeddings import PatchEmbedding
from textbook_code.layers.feed_forward import ACTIVATIONS, FeedForward
from textbook_code.layers.norms import BatchNorm, LayerNorm
from textbook_code.pretrained import Pretrained
from textbook_code.weights import Packed, Rule

NORMS = ("batch", "layer", "none")


@dataclass(frozen=True)
class TinyViTConfig:
    """The sizes of a tiny vision transformer, and its two choices.

    Args:
        norm: "batch", "layer", or "none" once `fold` has taken the norms out.
        activation: "relu" or "hardswish"; any of `ACTIVATIONS` trains, but these two deploy.
        scale_scores: whether scores are divided by √Dh; False once `fold` has put that into the queries.

    Raises:
        ValueError: a size is not positive, the patches do not tile the image, the heads do not divide the
            width, or the norm is unknown.

    Book: tiny-vit
    """

    image_size: int = 32
    patch_size: int = 4
    in_channels: int = 3
    d_model: int = 64
    num_layers: int = 4
    num_heads: int = 4
    d_ff: int = 128
    norm: str = "batch"
    activation: str = "relu"
    norm_eps: float = 1e-5
    scale_scores: bool = True

    def __post_init__(self) -> None:
        expect_sizes(self)
        expect_divides("patch_size", self.patch_size, "image_size", self.image_size)
        expect_divides("num_heads", self.num_heads, "d_model", self.d_model)
        if self.norm not in NORMS:
            raise ValueError(f"norm: expected one of {', '.join(NORMS)}, got {self.norm!r}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation: expected one of {sorted(ACTIVATIONS)}, got {self.activation!r}")

    @property
    def num_patches(self) -> int:
        """N."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def patch_dim(self) -> int:
        """The numbers in one patch, C · patch_size²."""
        return self.in_channels * self.patch_size**2

    @property
    def _matrix_sizes(self) -> tuple[int, int]:
        """The weights of all matrices, and the rows that they have together: one output number each."""
        D, F, L = self.d_model, self.d_ff, self.num_layers
        weights = self.patch_dim * D + L * (4 * D * D + 2 * D * F) + D
        return weights, D + L * (5 * D + F) + 1

    @property
    def _norm_parameters(self) -> int:
        return 0 if self.norm == "none" else (2 * self.num_layers + 1) * 2 * self.d_model

    @property
    def num_parameters(self) -> int:
        r"""How many numbers are trained, the norms' included.

        $$D\,C p^2 + N D + L\,(4 D^2 + 2 D F) + D \;+\; \text{biases } D + L\,(5 D + F) + 1
          \;+\; \text{norms } (2 L + 1)\, 2 D$$

        Book: tiny-vit-sizes
        """
        weights, biases = self._matrix_sizes
        return weights + biases + self.num_patches * self.d_model + self._norm_parameters

    @property
    def macs(self) -> int:
        r"""Multiply-accumulate operations for one image, in matrix products alone.

        $$N D\,C p^2 + L\,(4 N D^2 + 2 N^2 D + 2 N D F) + D$$

        Norms, the softmax, activations and sums are not counted; with BatchNorm the first cost nothing once
        they are folded.

        Book: tiny-vit-sizes
        """
        N, D, F = self.num_patches, self.d_model, self.d_ff
        block = 4 * N * D * D + 2 * N * N * D + 2 * N * D * F
        return N * D * self.patch_dim + self.num_layers * block + D

    @property
    def peak_activation_bytes(self) -> int:
        r"""The most bytes of activations alive at once, int8, with one operation done after another.

        An operation needs all that it reads, all that it writes, and what a later one still reads. The
        greatest of these sums is, with S for image_size,

        $$\max\{\, C S^2 + N D,\;\; 4 N D + H N^2,\;\; 2 N D + 2 H N^2,\;\; 3 N D + H N^2,\;\;
          2 N D + N F \,\}$$

        for the patches, the scores (the sum, the queries, keys and values, the scores), the softmax (the
        sum, the values, scores and weights), the weighted values, and the last matrix of the feed-forward
        network; LayerNorm adds 5 N D for the values' projection, an activation that does not go into the
        matrix before it, as ReLU does, N D + 2 N F. BatchNorm is taken as folded. No operation writes over
        what it reads, and no head is computed apart: a program that does either needs less.

        Book: tiny-vit-sizes
        """
        ND, NF = self.num_patches * self.d_model, self.num_patches * self.d_ff
        scores = self.num_heads * self.num_patches**2
        alive = [
            self.in_channels * self.image_size**2 + ND,
            4 * ND + scores,  # the scores
            2 * ND + 2 * scores,  # the softmax
            3 * ND + scores,  # the weighted values; the sum after the projection, 3 ND, is less
            2 * ND + NF,
        ]
        if self.norm == "layer":
            alive.append(5 * ND)  # x, norm(x), q, k and v
        if self.activation != "relu":
            alive.append(ND + 2 * NF)
        return max(alive)

    @property
    def flash_bytes(self) -> int:
        r"""Bytes of constants of the int8 model, without the program.

        One for each weight and each number of the position table, and of a LayerNorm that stays; for each
        output number of a matrix nine: its bias and its multiplier, 32 bits each, and the multiplier's shift.

        $$D\,C p^2 + N D + L\,(4 D^2 + 2 D F) + D + 9\,(D + L\,(5 D + F) + 1)$$

        Book: tiny-vit-sizes
        """
        weights, rows = self._matrix_sizes
        norms = self._norm_parameters if self.norm == "layer" else 0
        return weights + self.num_patches * self.d_model + norms + 9 * rows


def _norm(config: TinyViTConfig) -> nn.Module:
    if config.norm == "none":
        return nn.Identity()
    if config.norm == "layer":
        return LayerNorm(config.d_model, norm_eps=config.norm_eps)
    return TokenBatchNorm(config.d_model, norm_eps=config.norm_eps)


class TokenBatchNorm(BatchNorm):
    """BatchNorm of each of the D numbers of a vector, over all patches of all images of the batch.

    In training it is torch's kernel that computes it, in an eighth of the time.

    Book: tiny-vit-norm
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (B, N, D)."""
        rows = x.flatten(0, 1)
        if not self.training:
            return super().forward(rows).view_as(x)
        kept = self.running_mean, self.running_var, self.weight, self.bias
        return F.batch_norm(rows, *kept, training=True, momentum=self.momentum, eps=self.norm_eps).view_as(x)


class TinyViTBlock(nn.Module):
    """Pre-norm attention and feed-forward network, each around a residual sum.

    Book: tiny-vit-block
    """

    def __init__(self, config: TinyViTConfig) -> None:
        super().__init__()
        self.attn_norm = _norm(config)
        self.attn = Attention(config.d_model, config.num_heads, scale=None if config.scale_scores else 1.0)
        self.ffn_norm = _norm(config)
        self.ffn = FeedForward(config.d_model, config.d_ff, activation=config.activation)

    def forward(self, x: Tensor, *, need_weights: bool = True) -> tuple[Tensor, Tensor | None]:
        """Map (B, N, D) to (B, N, D); returns with it the attention weights (B, H, N, N), if needed."""
        normed = self.attn_norm(x)
        attended, weights = (
            self.attn(normed, need_weights=True) if need_weights else (self.attn(normed), None)
        )
        x = x + attended
        return x + self.ffn(self.ffn_norm(x)), weights


class TinyViT(Pretrained, nn.Module):
    r"""Patches, blocks, an average, one logit.

    $$x = \mathrm{patches}(\mathrm{image}) + P, \qquad x \leftarrow \mathrm{block}_l(x), \qquad
      z = w \cdot \tfrac1N \textstyle\sum_n N(x)_n + b$$

    The image is taken as (rgb − 128) / 128, so that one byte of a pixel, less 128, is the signed byte that
    the integer model reads: no multiplication stands between the camera and the first layer.

    Args:
        config: the sizes.

    Book: tiny-vit
    """

    config_class = TinyViTConfig
    hf_architecture = "TinyViT"
    hf_config: ClassVar[dict[str, str]] = {field.name: field.name for field in fields(TinyViTConfig)}
    hf_assumes: ClassVar[dict[str, Any]] = {"class_token": False, "global_pool": "avg"}
    hf_weights: tuple[Rule | Packed, ...] = (
        ("pos_embed", "pos_embed"),
        ("patch_embed.proj.{p}", "patch_embed.proj.{p}"),
        ("blocks.{i}.norm1.{p}", "blocks.{i}.attn_norm.{p}"),
        Packed(
            "blocks.{i}.attn.qkv.{p}",
            ("blocks.{i}.attn.q_proj.{p}", "blocks.{i}.attn.k_proj.{p}", "blocks.{i}.attn.v_proj.{p}"),
        ),
        ("blocks.{i}.attn.proj.{p}", "blocks.{i}.attn.out_proj.{p}"),
        ("blocks.{i}.norm2.{p}", "blocks.{i}.ffn_norm.{p}"),
        ("blocks.{i}.mlp.{layer}.{p}", "blocks.{i}.ffn.{layer}.{p}"),
        ("norm.{p}", "final_norm.{p}"),
        ("head.{p}", "head.{p}"),
    )

    def __init__(self, config: TinyViTConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbedding(
            config.image_size, config.patch_size, config.d_model, in_channels=config.in_channels
        )
        self.pos_embed = nn.Parameter(torch.zeros(1, config.num_patches, config.d_model))
        self.blocks = nn.ModuleList(TinyViTBlock(config) for _ in range(config.num_layers))
        self.final_norm = _norm(config)
        self.head = nn.Linear(config.d_model, 1)
        nn.init.normal_(self.pos_embed, std=0.02)

    def forward(self, images: Tensor) -> Tensor:
        """Give each image one logit; above 0 it says yes.

        Args:
            images: (B, C, image_size, image_size), each value (rgb − 128) / 128.

        Returns:
            (B,) logits.

        Raises:
            TypeError: no tensor, or of another dtype than the weights'.
            ValueError: another shape.

        Book: tiny-vit
        """
        # what is exported is the written-out path; training takes the fused one, which is faster
        return self._run(images, need_weights=not self.training)[0]

    def attended(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """As `forward`, and with the logits the attention weights (B, H, N, N) of each layer.

        Book: tiny-vit
        """
        return self._run(images, need_weights=True)

    def _run(self, images: Tensor, *, need_weights: bool) -> tuple[Tensor, list[Any]]:
        x = self.patch_embed(images) + self.pos_embed  # (B, N, D)
        maps = []
        for block in self.blocks:
            x, weights = block(x, need_weights=need_weights)
            maps.append(weights)
        return self.head(self.final_norm(x).mean(1)).squeeze(-1), maps


@torch.no_grad()
def fold(model: TinyViT) -> TinyViT:
    r"""The same function with less to compute: BatchNorm and 1/√Dh go into the matrices behind them.

    In evaluation BatchNorm is $a \odot x + c$ with $a = \gamma / \sqrt{\sigma^2 + \varepsilon}$ and
    $c = \beta - a \odot \mu$, and a linear map of that is another linear map,

    $$W (a \odot x + c) + b = (W \operatorname{diag} a)\, x + (W c + b).$$

    The last norm commutes with the average. LayerNorm depends on its input, and stays.

    Args:
        model: it is not changed.

    Returns:
        A new model in eval mode, of the same logits up to rounding; with "batch" its norm is "none".

    Book: tiny-vit-fold
    """
    old, batch = model.config, model.config.norm == "batch"
    new = replace(old, norm="none" if batch else old.norm, scale_scores=False)
    folded = TinyViT(new).to(model.head.weight.dtype).eval()
    folded.load_state_dict({k: v for k, v in model.state_dict().items() if k in folded.state_dict()})
    pairs: list[tuple[Any, list[nn.Linear]]] = [(model.final_norm, [folded.head])]
    blocks: Any = list(zip(model.blocks, folded.blocks, strict=True))
    for before, after in blocks:
        attn = after.attn
        pairs += [(before.attn_norm, [attn.q_proj, attn.k_proj, attn.v_proj])]
        pairs += [(before.ffn_norm, [after.ffn.fc1])]
    for norm, linears in pairs if batch else []:
        a = norm.weight * (norm.running_var + norm.norm_eps).rsqrt()
        c = norm.bias - a * norm.running_mean
        for linear in linears:
            linear.bias.add_(linear.weight @ c)
            linear.weight.mul_(a)
    if old.scale_scores:
        for _, after in blocks:
            attn = after.attn
            for parameter in (attn.q_proj.weight, attn.q_proj.bias):
                parameter.mul_(attn.head_dim**-0.5)
    return folded
