"""Several documents in one row of fixed length, none of which sees the others.

N rows, L their length.

Book: gpt-packing
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from textbook_code.layers.checks import expect_ids, expect_shape


class Packed(NamedTuple):
    """Documents in rows.

    Attributes:
        tokens: (N, L) long, filled up with the padding id.
        document_ids: (N, L) long, the document's place in the list that was packed; −1 for padding. Made for
            `layers.masks.document_mask` and `objectives.causal_lm_targets`.
        positions: (N, L) long, from 0 in every document; 0 for padding.

    Book: gpt-packing
    """

    tokens: Tensor
    document_ids: Tensor
    positions: Tensor

    @property
    def token_mask(self) -> Tensor:
        """(N, L) bool, True = real token."""
        return self.document_ids >= 0

    @property
    def share(self) -> float:
        """How much of the rows is real: 1 minus the waste."""
        return self.token_mask.double().mean().item()


def pack(
    documents: Sequence[Tensor | Sequence[int]], length: int, *, pad_id: int = 0, split: bool = False
) -> Packed:
    """Put documents into rows of one length, each into the first row that has room for it.

    In training that row costs as much as one that is half padding, and with `document_mask` and positions
    that begin anew every document is computed as if it were alone.

    Args:
        documents: the ids of each, at least one.
        length: L.
        pad_id: fills the rest of a row.
        split: cut a document that is longer than L into pieces of L, each of which then counts as a document
            by itself; without it such a document is refused.

    Returns:
        As few rows as first-fit needs, in the order in which they were opened.

    Raises:
        TypeError: ids that are not integers.
        ValueError: no documents, one that is empty, or one that is too long.

    Book: gpt-packing
    """
    if length < 1:
        raise ValueError(f"length: expected at least 1 token, got {length}")
    if not len(documents):
        raise ValueError("documents: expected at least one, got none")
    pieces: list[Tensor] = []
    for index, document in enumerate(documents):
        name = f"documents[{index}]"
        ids = document if isinstance(document, Tensor) else torch.tensor(document, dtype=_kind(document))
        expect_shape(name, ids, "T")
        expect_ids(name, ids)
        if not len(ids):
            raise ValueError(f"{name}: expected at least one token, got an empty document")
        if len(ids) > length and not split:
            raise ValueError(
                f"{name}: expected at most length = {length} tokens, got {len(ids)}; split=True cuts it"
            )
        pieces.extend(ids.split(length))

    used: list[int] = []  # how full each row is
    places: list[tuple[int, int]] = []  # of each piece: its row, and where in it
    for piece in pieces:
        row = next((i for i, full in enumerate(used) if full + len(piece) <= length), len(used))
        if row == len(used):
            used.append(0)
        places.append((row, used[row]))
        used[row] += len(piece)

    tokens = torch.full((len(used), length), pad_id)
    document_ids = torch.full_like(tokens, -1)
    positions = torch.zeros_like(tokens)
    for number, (piece, (row, start)) in enumerate(zip(pieces, places, strict=True)):
        here = slice(start, start + len(piece))
        tokens[row, here] = piece.to(tokens)
        document_ids[row, here] = number
        positions[row, here] = torch.arange(len(piece))
    return Packed(tokens, document_ids, positions)


def _kind(document: Sequence[int]) -> torch.dtype | None:
    """An empty list would become floats, and be refused for that rather than for being empty."""
    return None if len(document) else torch.long
