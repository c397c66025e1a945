"""Positions that turn queries and keys: RoPE, its two layouts, a part of a head, and more axes than one.

    q'_i = R^i q_i,  k'_j = R^j k_j    so that    q'_iᵀ k'_j = q_iᵀ R^{j-i} k_j

B batch, T length, H heads, D d_model, Dh head_dim, A axes.

Paper: Su et al. (2024). Reference: transformers, LlamaRotaryEmbedding (halves), GPTNeoXAttention (a part),
RoFormerSelfAttention (neighbours), Qwen2VLRotaryEmbedding (three axes), Qwen2VLVisionRotaryEmbedding (two).

Book: llama-rope, rope-layouts
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..checks import expect_divides, expect_ids
from .scaling import Scaling


class RotaryPositions(nn.Module):
    r"""RoPE: a query or key at position t is turned, pair by pair, by angles that grow with t.

    $$\begin{pmatrix} x'_i \\ x'_{i+D_h/2} \end{pmatrix} =
      \begin{pmatrix} \cos t\omega_i & -\sin t\omega_i \\ \sin t\omega_i & \cos t\omega_i \end{pmatrix}
      \begin{pmatrix} x_i \\ x_{i+D_h/2} \end{pmatrix},
      \qquad \omega_i = \theta^{-2i/D_h}, \quad 0 \le i < D_h/2$$

    so that the product of a turned query and a turned key depends on their distance alone. The
    pairs are (i, i + Dh/2), the layout of the published LLaMA weights in their usual format. With a
    `fraction`, the first R channels stand for the head, and the others are left as they are.
    Paper: Su et al. (2024). Reference: transformers, LlamaRotaryEmbedding, GPTNeoXRotaryEmbedding.

    Args:
        head_dim: Dh, even.
        theta: θ.
        scaling: how the frequencies are stretched for longer contexts; not at all when left out.
        fraction: the share of the head that is turned, R = fraction · Dh, even.

    Raises:
        ValueError: `head_dim` or the turned width is odd, or θ is not positive.

    Book: llama-rope, rope-partial
    """

    def __init__(
        self,
        head_dim: int,
        *,
        theta: float = 10_000.0,
        scaling: Scaling | None = None,
        fraction: float = 1.0,
    ) -> None:
        super().__init__()
        _expect_pairs(head_dim, theta)
        width = round(head_dim * fraction)
        if not 0 < fraction <= 1 or abs(width - head_dim * fraction) > 1e-6 or width < 2 or width % 2:
            raise ValueError(
                f"fraction: expected an even number of the {head_dim} channels, got {fraction}, "
                f"which is {head_dim * fraction:g}"
            )
        self.head_dim, self.theta, self.scaling, self.width = head_dim, theta, scaling, width

    def frequencies(self, device: torch.device | str | None = None) -> Tensor:
        """ω, (R/2,), radians a position, in the widest float of the device.

        Book: llama-rope
        """
        omega = _geometric(self.width, self.theta, device)
        return omega if self.scaling is None else self.scaling(omega)

    def forward(self, positions: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the positions, each repeated for both halves of what is turned.

        They are not kept in a buffer, which `.to(torch.bfloat16)` would round.

        Args:
            positions: (T,) integers, or (B, T) where the rows differ.
            dtype: of the result; the widest float when left out (`rotate` rounds it).

        Returns:
            Two tensors, (T, R) or (B, 1, T, R), where R = Dh if all of the head is turned.

        Raises:
            TypeError: the positions are not integers.
            ValueError: they have another number of axes.

        Book: llama-rope
        """
        expect_ids("positions", positions)
        if positions.dim() not in (1, 2):
            raise ValueError(f"positions: expected shape (T,) or (B, T), got {tuple(positions.shape)}")
        angle = positions[..., None] * self.frequencies(positions.device)  # (…, T, R/2)
        return _turns(angle, dtype, 1.0 if self.scaling is None else self.scaling.gain)

    def extra_repr(self) -> str:
        part = "" if self.width == self.head_dim else f", turned={self.width}"
        return f"{self.head_dim}, theta={self.theta:g}, scaling={self.scaling}{part}"


class AxialRotaryPositions(nn.Module):
    r"""RoPE on a grid: each of A axes turns its own share of the planes, with all speeds on each.

    With $n = D_h / 2A$ planes an axis, plane $a n + i$ is turned at place $(t_1, \ldots, t_A)$ by

    $$t_a\, \theta^{-i/n}, \qquad 0 \le i < n, \quad 0 \le a < A,$$

    so that the score of two patches depends on how many rows and how many columns lie between them.
    Pairs are halves, (j, j + Dh/2). Reference: transformers, Qwen2VLVisionRotaryEmbedding.

    Args:
        head_dim: Dh, a multiple of 2 A.
        axes: A; 2 for the rows and columns of an image.
        theta: θ.

    Raises:
        ValueError: the width does not divide into pairs for each axis, or θ is not positive.

    Book: rope-2d
    """

    def __init__(self, head_dim: int, *, axes: int = 2, theta: float = 10_000.0) -> None:
        super().__init__()
        _expect_pairs(head_dim, theta)
        expect_divides("axes", axes, "the number of planes head_dim / 2", head_dim // 2)
        self.head_dim, self.axes, self.theta = head_dim, axes, theta

    def frequencies(self, device: torch.device | str | None = None) -> Tensor:
        """ω of one axis, (Dh / 2A,), radians a position.

        Book: rope-2d
        """
        return _geometric(self.head_dim // self.axes, self.theta, device)

    def forward(self, positions: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """Cosines and sines of places on the grid.

        Args:
            positions: (A, T) integers, or (A, B, T) where the rows of the batch differ.
            dtype: of the result; the widest float when left out.

        Returns:
            Two tensors, (T, Dh) or (B, 1, T, Dh).

        Raises:
            TypeError: the positions are not integers.
            ValueError: they are not of that shape.

        Book: rope-2d
        """
        _expect_axes(positions, self.axes)
        angle = positions[..., None] * self.frequencies(positions.device)  # (A, …, T, n)
        return _turns(torch.cat(angle.unbind(0), dim=-1), dtype)

    def extra_repr(self) -> str:
        return f"{self.head_dim}, axes={self.axes}, theta={self.theta:g}"


class MultimodalRotaryPositions(nn.Module):
    r"""M-RoPE: one row of speeds, of which the first planes count time, the next rows, the last columns.

    With sections $n_1 + \ldots + n_A = D_h / 2$, plane i belongs to the axis a(i) in whose section it lies,
    and is turned by $t_{a(i)}\, \theta^{-2i/D_h}$. A word has the same number on all axes, and for it this is
    `RotaryPositions`; an image's patches share a time and have a row and a column each.
    Pairs are halves. Paper: Wang et al. (2024). Reference: transformers, Qwen2VLRotaryEmbedding.

    Args:
        head_dim: Dh, even.
        sections: how many planes each axis has; (16, 24, 24) in Qwen2-VL, where Dh = 128.
        theta: θ.

    Raises:
        ValueError: the sections do not sum to Dh/2, one is empty, the width is odd, or θ is not positive.

    Book: m-rope
    """

    def __init__(self, head_dim: int, sections: Sequence[int], *, theta: float = 10_000.0) -> None:
        super().__init__()
        _expect_pairs(head_dim, theta)
        if min(sections, default=0) < 1 or sum(sections) != head_dim // 2:
            raise ValueError(
                f"sections: expected positive numbers that sum to head_dim / 2 = {head_dim // 2}, "
                f"got {tuple(sections)}"
            )
        self.head_dim, self.sections, self.theta = head_dim, tuple(sections), theta

    def frequencies(self, device: torch.device | str | None = None) -> Tensor:
        """ω, (Dh/2,), radians a position.

        Book: m-rope
        """
        return _geometric(self.head_dim, self.theta, device)

    def forward(self, positions: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """Cosines and sines of tokens that have a place on each axis.

        Args:
            positions: (A, T) integers, or (A, B, T) where the rows of the batch differ.
            dtype: of the result; the widest float when left out.

        Returns:
            Two tensors, (T, Dh) or (B, 1, T, Dh).

        Raises:
            TypeError: the positions are not integers.
            ValueError: they are not of that shape.

        Book: m-rope
        """
        _expect_axes(positions, len(self.sections))
        angle = positions[..., None] * self.frequencies(positions.device)  # (A, …, T, Dh/2)
        sections = angle.split(self.sections, dim=-1)
        return _turns(torch.cat([part[a] for a, part in enumerate(sections)], dim=-1), dtype)

    def extra_repr(self) -> str:
        return f"{self.head_dim}, sections={self.sections}, theta={self.theta:g}"


def grid_positions(rows: int, columns: int) -> Tensor:
    """Row and column of each patch of an image, read line by line: (2, rows · columns) int64.

    Raises:
        ValueError: there is no patch.

    Book: rope-2d
    """
    if rows < 1 or columns < 1:
        raise ValueError(f"rows, columns: expected at least one of each, got {rows} and {columns}")
    return torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).T


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (i, i + R/2) of queries or keys (B, H, T, Dh) by the angles of its position.

    `cos` and `sin` are those of a rotary module, of width R. Where R is less than Dh, the first R channels
    are turned, and the others stay.

    Raises:
        ValueError: shapes do not fit.

    Book: llama-rope, rope-partial
    """
    _expect_turns(x, cos, sin)
    width = cos.size(-1)
    if width < x.size(-1):
        return torch.cat([rotate(x[..., :width], cos, sin), x[..., width:]], dim=-1)
    first, second = x.chunk(2, dim=-1)
    return x * cos.to(x.dtype) + torch.cat([-second, first], dim=-1) * sin.to(x.dtype)


def rotate_neighbours(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (2i, 2i + 1) of queries or keys (B, H, T, Dh): the paper's layout.

    `cos` and `sin` are those that `rotate` takes, each angle once in either half. The package's models turn
    halves; weights made for neighbours are permuted once (`halves_from_neighbours`).

    Raises:
        ValueError: shapes do not fit.

    Book: rope-layouts
    """
    _expect_turns(x, cos, sin)
    width = cos.size(-1)
    if width < x.size(-1):
        return torch.cat([rotate_neighbours(x[..., :width], cos, sin), x[..., width:]], dim=-1)
    cos, sin = (t.to(x.dtype)[..., : width // 2].repeat_interleave(2, dim=-1) for t in (cos, sin))
    swapped = torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)
    return x * cos + swapped * sin


def halves_from_neighbours(rows: Tensor, num_heads: int, *, width: int | None = None) -> Tensor:
    r"""Reorder the rows of W^Q or W^K, or of their bias, made for turning neighbours, so that halves serve.

    In each head, row $2i$ goes to $i$ and row $2i + 1$ to $i + R/2$: then
    `rotate(x @ new.T)` is `rotate_neighbours(x @ old.T)` with its channels in that order, and all scores
    are the same.

    Args:
        rows: (H · Dh, …), a weight or a bias; H is the number of heads that it makes.
        num_heads: H.
        width: R, how many of a head's first channels are turned; all when left out.

    Raises:
        ValueError: the heads do not divide the rows, or the width is odd or too large.

    Book: rope-layouts
    """
    return _reordered(rows, num_heads, width, lambda order: order)


def neighbours_from_halves(rows: Tensor, num_heads: int, *, width: int | None = None) -> Tensor:
    """The way back: `halves_from_neighbours` undone, with its arguments.

    Raises:
        ValueError: the heads do not divide the rows, or the width is odd or too large.

    Book: rope-layouts
    """
    return _reordered(rows, num_heads, width, torch.argsort)


def _reordered(rows: Tensor, num_heads: int, width: int | None, turn: Callable[[Tensor], Tensor]) -> Tensor:
    expect_divides("num_heads", num_heads, "the number of rows", rows.size(0))
    head_dim = rows.size(0) // num_heads
    width = head_dim if width is None else width
    if not 0 < width <= head_dim or width % 2:
        raise ValueError(f"width: expected an even number of the {head_dim} rows of a head, got {width}")
    pairs = torch.arange(width, device=rows.device).view(-1, 2).T.flatten()  # 0, 2, 4, …, 1, 3, 5, …
    order = torch.cat([turn(pairs), torch.arange(width, head_dim, device=rows.device)])
    return rows.unflatten(0, (num_heads, head_dim))[:, order].flatten(0, 1)


def _geometric(width: int, theta: float, device: torch.device | str | None) -> Tensor:
    on_mps = torch.device(device or "cpu").type == "mps"  # has no float64
    i = torch.arange(0, width, 2, device=device, dtype=torch.float32 if on_mps else torch.float64)
    return theta ** (-i / width)


def _turns(angle: Tensor, dtype: torch.dtype | None, gain: float = 1.0) -> tuple[Tensor, Tensor]:
    angle = torch.cat([angle, angle], dim=-1)  # (T, R) or (B, T, R)
    cos, sin = ((gain * wave).to(dtype or angle.dtype) for wave in (angle.cos(), angle.sin()))
    return (cos, sin) if angle.dim() == 2 else (cos[:, None], sin[:, None])


def _expect_pairs(head_dim: int, theta: float) -> None:
    if head_dim < 2 or head_dim % 2:
        raise ValueError(f"head_dim: expected an even width (they turn in pairs), got {head_dim}")
    if theta <= 0:
        raise ValueError(f"theta: expected a positive number, got {theta}")


def _expect_axes(positions: Tensor, axes: int) -> None:
    expect_ids("positions", positions)
    if positions.dim() not in (2, 3) or positions.size(0) != axes:
        raise ValueError(
            f"positions: expected shape (A, T) or (A, B, T) with A = {axes}, got {tuple(positions.shape)}"
        )


def _expect_turns(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    width = cos.size(-1)
    if cos.shape != sin.shape or cos.size(-2) != x.size(-2) or width > x.size(-1) or width % 2:
        raise ValueError(
            f"cos, sin: expected (T, Dh) = {tuple(x.shape[-2:])} at the end, or an even part of Dh, "
            f"got {tuple(cos.shape)} and {tuple(sin.shape)}"
        )
