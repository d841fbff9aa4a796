"""What the items of a history say in the space of their vectors: attention over all of them, beside the latest as they
are.

Widths: histories of like length are read together, padded to one of a few widths, since most are short.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ctd_scale.sequence import LAST, Block, SequenceEncoder

RECENT = 4  # latest items whose vectors are added as they are
LEAST_WIDTH = 4  # shorter histories are padded to it
# How much the latest item's vector weighs before anything is learned, and each earlier one beside it.
LATEST, EARLIER = 0.3, 0.6


class HistoryReader(nn.Module):
    """`T s(v_1, v_2, ...) + sum_k a_k v_k` over the vectors v of what was read, v_k that of the k-th latest: s are
    post-normed blocks of self-attention, as in SASRec, T is linear."""

    def __init__(self, dim: int, max_history: int, num_blocks: int, dropout: float = 0.0) -> None:
        super().__init__()
        blocks = [Block(dim, dropout) for _ in range(num_blocks)]
        self.encoder = SequenceEncoder(dim, max_history, dropout, blocks)
        self.turn, self.dropout = nn.Linear(dim, dim), nn.Dropout(dropout)
        self.recency = nn.Parameter(LATEST * EARLIER ** torch.arange(RECENT))

    def forward(
        self,
        vectors_of: Callable[[Int[Tensor, "items"]], Float[Tensor, "items dim"]],
        recent: Int[Tensor, "histories recent"],
    ) -> Float[Tensor, "histories dim"]:
        """`recent` are the items, the latest first, -1 where there are fewer; `vectors_of` gives the vectors of some.

        Which widths there are does not depend on the batch: under ZeRO 3 every call of a layer gathers its weights
        from all workers, so all must make as many.
        """
        items = recent[:, : self.encoder.max_history].flip(1)  # the newest last
        known, where = items.clamp_min(0).unique(return_inverse=True)
        vectors, lengths = vectors_of(known), (items >= 0).sum(dim=1)
        parts, order, shorter = [], [], 0
        for width in history_widths(self.encoder.max_history):
            rows = torch.nonzero((lengths > shorter) & (lengths <= width)).flatten()
            real = items[rows, -width:] >= 0
            parts.append(self._read(vectors[where[rows, -width:]] * real[:, :, None], real))
            order.append(rows)
            shorter = width
        said: Tensor = torch.cat(parts)[torch.cat(order).argsort()]
        return said

    def _read(
        self, vectors: Float[Tensor, "rows width dim"], real: Bool[Tensor, "rows width"]
    ) -> Float[Tensor, "rows dim"]:
        said = self.turn(self.encoder(vectors, real, LAST)[:, 0])
        latest = self.dropout(vectors[:, -RECENT:].flip(1))
        begun: Tensor = said + (self.recency[: latest.shape[1], None] * latest).sum(dim=1)
        return begun


def reader_of(weights: Mapping[str, Tensor], prefix: str, dropout: float = 0.0) -> HistoryReader | None:
    """The reader whose weights these are, under names that begin with `prefix`; none where there are no such."""
    own = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
    if not own:
        return None
    max_history, dim = own["encoder.places"].shape
    blocks = {name.split(".")[2] for name in own if name.startswith("encoder.blocks.")}
    reader = HistoryReader(dim, max_history, len(blocks), dropout)
    reader.load_state_dict(own)
    return reader


def history_widths(max_history: int) -> list[int]:
    """To how many items histories are padded: doubled from the least to `max_history`."""
    widths = [LEAST_WIDTH]
    while widths[-1] < max_history:
        widths.append(2 * widths[-1])
    return [*widths[:-1], max_history]
