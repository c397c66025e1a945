"""Beam search: the bookkeeping of the hypotheses, apart from any model.

    score(y) = log p(y) / |y|^length_penalty

B batch, K beams, V vocabulary, N tokens at most. Papers: Graves (2012) and Sutskever et al. (2014) for
the search, Wu et al. (2016) for the division by the length. Reference: transformers, `generate` with
`num_beams` (its default, `early_stopping=False`).

Book: generate-beam
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from textbook_code.layers.checks import expect_shape


class Beams:
    r"""K hypotheses for each row of a batch, continued token by token.

    A hypothesis is worth the sum of its log-probabilities. In each step all continuations of the K
    hypotheses compete, and the best K that do not end live on. One that ends, by a stop token or at N
    tokens, is kept if it stood among the best K and if its score

    $$\mathrm{score}(y) = \frac{1}{|y|^{\lambda}} \sum_t \log p(y_t \mid y_{<t})$$

    is among the best K of those that have ended; the length $|y|$ counts the stop token. A row is done
    when K have ended and the best that still lives, at its present length, scores no better than the
    worst of them.
    That rule may miss a longer hypothesis whose score would have risen under the division by its length.

    Args:
        batch_size: B.
        num_beams: K.
        max_new_tokens: N.
        stop_tokens: ids that end a hypothesis.
        length_penalty: λ; 0 compares sums, 1 means over tokens, larger values favour length.
        pad_id: what stands behind the end.
        device: where the state is kept.

    Book: generate-beam
    """

    def __init__(
        self,
        batch_size: int,
        num_beams: int,
        max_new_tokens: int,
        *,
        stop_tokens: Sequence[int] = (),
        length_penalty: float = 1.0,
        pad_id: int = 0,
        device: torch.device | str | None = None,
    ) -> None:
        B, K, N = batch_size, num_beams, max_new_tokens
        self.K, self.N, self.length_penalty, self.length = K, N, length_penalty, 0
        self.stop = torch.tensor(tuple(stop_tokens), dtype=torch.long, device=device)
        self.first_row = torch.arange(B, device=device)[:, None] * K  # of each row's beams
        self.tokens = torch.full((B, K, N), pad_id, device=device)  # the living, and below the ended
        self.log_probs = torch.full((B, K), -math.inf, device=device)
        self.log_probs[:, 0] = 0  # all K are the same empty text: one of them counts
        self.ended = self.tokens.clone()
        self.scores = torch.full((B, K), -math.inf, device=device)
        self.row_done = torch.zeros(B, dtype=torch.bool, device=device)

    @property
    def done(self) -> bool:
        """Whether no row can improve."""
        return self.length == self.N or bool(self.row_done.all())

    def advance(self, log_probs: Tensor) -> tuple[Tensor, Tensor]:
        """Continue by one token.

        Args:
            log_probs: (B·K, V), of the next token of each living hypothesis.

        Returns:
            The tokens (B·K,) to feed next, and for each the row (B·K,) of the hypothesis that it
            continues: the caches move there.

        Raises:
            ValueError: the shape differs, or the search is over.

        Book: generate-beam
        """
        B, K = self.log_probs.shape
        expect_shape("log_probs", log_probs, "rows V", rows=B * K)
        if self.done:
            raise ValueError(f"log_probs: expected none, the search ended after {self.length} tokens")
        V = log_probs.size(-1)
        total = self.log_probs[:, :, None] + log_probs.view(B, K, V)
        # K continuations that go on are among these, even if every hypothesis meets every stop token
        most = min(max(2, 1 + len(self.stop)) * K, K * V)
        total, choice = total.flatten(1).topk(most)  # (B, M)
        beam, token = choice // V, choice % V
        tokens = self.tokens.gather(1, beam[..., None].expand(-1, -1, self.N))
        tokens[..., self.length] = token
        self.length += 1
        ends = torch.isin(token, self.stop) | (self.length == self.N)
        self._keep_ended(tokens[:, :K], total[:, :K], ends[:, :K])

        self.log_probs, best = total.masked_fill(ends, -math.inf).topk(K)
        self.tokens = tokens.gather(1, best[..., None].expand(-1, -1, self.N))
        within_reach = self.log_probs[:, 0] / self.length**self.length_penalty > self.scores[:, -1]
        self.row_done |= ~within_reach
        rows = self.first_row + beam.gather(1, best)
        return token.gather(1, best).flatten(), rows.flatten()

    def _keep_ended(self, tokens: Tensor, total: Tensor, ends: Tensor) -> None:
        score = total / self.length**self.length_penalty
        score = score.masked_fill(~ends | self.row_done[:, None], -math.inf)
        self.scores, best = torch.cat([self.scores, score], dim=1).topk(self.K)
        ended = torch.cat([self.ended, tokens], dim=1)
        self.ended = ended.gather(1, best[..., None].expand(-1, -1, self.N))

    def best(self) -> tuple[Tensor, Tensor]:
        """The best ended hypothesis of each row, (B, N) padded behind its end, and its score (B,).

        Book: generate-beam
        """
        return self.ended[:, 0], self.scores[:, 0]
