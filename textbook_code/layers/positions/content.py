"""Terms of the score in which a distance meets what stands there: Shaw's tables, DeBERTa's places.

    Shaw       q_i · (k_j + a^K_{j-i}),  and  v_j + a^V_{j-i}  is what is fetched
    DeBERTa    q_i · k_j  +  q_i · k^r_{i-j}  +  k_j · q^r_{i-j}

There is a score for each of a few distances first, and then each distance is put where it occurs: no tensor
of T × S vectors is made.

B batch, H heads, T queries, S keys, Dh head_dim, k the longest distance that Shaw's tables tell apart.

Papers: Shaw et al. (2018), Huang et al. (2019) for the skewing, He et al. (2021) for DeBERTa.

Book: shaw-positions, deberta-positions
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import expect_shape
from .relative import offsets


def skew(x: Tensor) -> Tensor:
    r"""From columns by distance to columns by key: (…, T, S + T − 1) → (…, T, S).

    Column c of row t belongs to the distance $j - i = c - (S - 1)$; the T queries are the last of the S
    positions. Nothing is computed: the rows are laid end to end, a number longer each, and cut anew.

    Raises:
        ValueError: there are fewer keys than queries.

    Book: shaw-positions
    """
    T, S = x.size(-2), x.size(-1) - x.size(-2) + 1
    if not 0 < T <= S:
        raise ValueError(f"x: expected (…, T, S + T - 1) with 1 <= T <= S, got {tuple(x.shape)}")
    row = F.pad(x, (0, 1)).flatten(-2)[..., T - 1 : -1]
    return row.unflatten(-1, (T, S + T - 1))[..., :S]


def unskew(x: Tensor) -> Tensor:
    """The way back, with zeros at distances that a row does not have: (…, T, S) → (…, T, S + T − 1).

    Raises:
        ValueError: there are fewer keys than queries.

    Book: shaw-positions
    """
    T, S = x.shape[-2:]
    if not 0 < T <= S:
        raise ValueError(f"x: expected (…, T, S) with 1 <= T <= S, got {tuple(x.shape)}")
    row = F.pad(F.pad(x, (0, T - 1)).flatten(-2), (T - 1, 1))
    return row.unflatten(-1, (T, S + T))[..., :-1]


def relative_scores(q: Tensor, table: Tensor, S: int) -> Tensor:
    r"""Shaw's second term, $q_i \cdot a_{\mathrm{clip}(j - i)}$, for all pairs, unscaled.

    The queries meet the $2k + 1$ vectors of the table, not those of all pairs; longer distances take the
    outermost one. That is T (2k + 1) Dh products a head in place of T S Dh.

    Args:
        q: (B, H, T, Dh), the last T of S positions.
        table: (2k + 1, Dh), the distances −k to k.
        S: how many keys there are.

    Returns:
        (B, H, T, S).

    Raises:
        ValueError: shapes do not fit.

    Book: shaw-positions
    """
    expect_shape("q", q, "B H T Dh")
    T, k = q.size(2), _clip_of(table, q.size(3))
    before, behind = min(k, S - 1), min(k, T - 1)  # how far apart they are at most
    x = q @ table[k - before : k + behind + 1].T  # (B, H, T, before + 1 + behind)
    far = x[..., :1].expand(*x.shape[:-1], S - 1 - before), x[..., -1:].expand(*x.shape[:-1], T - 1 - behind)
    return skew(torch.cat([far[0], x, far[1]], dim=-1))


def relative_values(weights: Tensor, table: Tensor) -> Tensor:
    r"""Shaw's part of the output, $\sum_j w_{ij}\, a_{\mathrm{clip}(j - i)}$.

    The weights of equal distance are summed first, so that each vector of the table is used once a query.

    Args:
        weights: (B, H, T, S).
        table: (2k + 1, Dh), the distances −k to k.

    Returns:
        (B, H, T, Dh).

    Raises:
        ValueError: shapes do not fit.

    Book: shaw-positions
    """
    expect_shape("weights", weights, "B H T S")
    T, S = weights.shape[-2:]
    k = _clip_of(table, table.size(-1))
    before, behind = min(k, S - 1), min(k, T - 1)
    x = unskew(weights)  # (B, H, T, S + T - 1)
    far_before, x, far_behind = x.split([S - 1 - before, before + 1 + behind, T - 1 - behind], dim=-1)
    ends = far_before.sum(-1, keepdim=True), far_behind.sum(-1, keepdim=True)
    rows = table[k - before : k + behind + 1]
    return x @ rows + ends[0] * rows[0] + ends[1] * rows[-1]


def _clip_of(table: Tensor, head_dim: int) -> int:
    expect_shape("table", table, "distances Dh", Dh=head_dim)
    if table.size(0) % 2 == 0:
        raise ValueError(f"table: expected 2k + 1 rows, the distances -k to k, got {table.size(0)}")
    return table.size(0) // 2


def disentangled_index(
    T: int, S: int, span: int, *, max_distance: int | None = None, device: torch.device | str | None = None
) -> Tensor:
    r"""Which of DeBERTa's 2·span places each pair has, (T, S) int64; the T queries are the last of S.

    It is $\mathrm{clip}(\beta(i - j) + \mathtt{span},\; 0,\; 2\,\mathtt{span} - 1)$: query minus key. In the
    first version $\beta(n) = n$. With a `max_distance`, as in the second and third, distances above
    $m = \lfloor \mathtt{span} / 2 \rfloor$ share logarithmic buckets:

    $$\beta(n) = \begin{cases} n & |n| \le m \\
      \operatorname{sign}(n) \Big( m + \Big\lceil (m - 1)
      \frac{\ln(|n| / m)}{\ln((\mathtt{max\_distance} - 1) / m)} \Big\rceil \Big) & \text{else.} \end{cases}$$

    Paper: He et al. (2021). Reference: transformers, make_log_bucket_position.

    Args:
        T: how many queries there are.
        S: how many keys there are.
        span: places on either side.
        max_distance: the distance that reaches the last bucket; every place is one distance when left out.
        device: of the result.

    Raises:
        ValueError: there are fewer keys than queries, no place, or `max_distance` lies within the exact ones.

    Book: deberta-positions
    """
    _expect_span(span, max_distance)
    offset = -offsets(T, S, device=device)
    if max_distance is not None:
        m = span // 2
        # float32, as published: a wider float would move some distances across a bucket's border
        share = (offset.abs().clamp(min=m) / m).log() / torch.tensor((max_distance - 1) / m).log()
        far = offset.sign() * (m + (share * (m - 1)).ceil().long())
        offset = torch.where(offset.abs() <= m, offset, far)
    return (offset + span).clamp(0, 2 * span - 1)


def disentangled_scores(q: Tensor, k: Tensor, place_q: Tensor, place_k: Tensor, index: Tensor) -> Tensor:
    r"""DeBERTa's two further terms, $q_i \cdot k^r_{n(i,j)} + k_j \cdot q^r_{n(i,j)}$, unscaled.

    Content looks at a place, and a place at content. The reference's code reads both at the index of i − j;
    the paper writes the second with that of j − i.

    Args:
        q: (B, H, T, Dh).
        k: (B, H, S, Dh).
        place_q: (H, 2·span, Dh), the places' queries.
        place_k: (H, 2·span, Dh), the places' keys.
        index: (T, S) int64, n, of `disentangled_index`.

    Returns:
        (B, H, T, S).

    Raises:
        ValueError: shapes do not fit.

    Book: deberta-positions
    """
    expect_shape("q", q, "B H T Dh")
    B, H, T, Dh = q.shape
    expect_shape("k", k, "B H S Dh", B=B, H=H, Dh=Dh)
    for name, x in (("place_q", place_q), ("place_k", place_k)):
        expect_shape(name, x, "H places Dh", H=H, Dh=Dh)
    S = k.size(2)
    expect_shape("index", index, "T S", T=T, S=S)
    c2p = (q @ place_k.transpose(-2, -1)).gather(-1, index.expand(B, H, T, S))
    p2c = (k @ place_q.transpose(-2, -1)).gather(-1, index.T.expand(B, H, S, T))
    return c2p + p2c.transpose(-2, -1)


def _expect_span(span: int, max_distance: int | None) -> None:
    if span < 1:
        raise ValueError(f"span: expected at least 1, got {span}")
    if max_distance is not None and (span < 2 or max_distance - 1 <= span // 2):
        raise ValueError(
            f"max_distance: expected more than the {span // 2 + 1} distances that have places of their own "
            f"(and a span of at least 2), got {max_distance} with span={span}"
        )
