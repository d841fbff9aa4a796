"""Every prefix of a sequence, and blocks of self-attention over sequences that are padded on the left, so that the
newest item always has the last place: those of SASRec (Kang and McAuley, 2018), and with a filter beside the attention
BSARec's (Shin et al., 2024).
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from torch import Tensor, nn

ALL, LAST = slice(None), slice(-1, None)  # places of a sequence
EPSILON = 1e-12


class FrequencyFilter(nn.Module):
    """`low(x) + beta^2 (x - low(x))`, low = the lowest frequencies of the discrete Fourier transform over
    `max_history` places (BSARec, eq. 8 to 10). Places before the sequence are zero.

    A low pass is linear: one matrix [places, places], of which a short sequence needs the last rows and columns.
    """

    low_pass: Tensor

    def __init__(self, dim: int, max_history: int, low_frequencies: int) -> None:
        super().__init__()
        self.beta = nn.Parameter(torch.randn(dim))
        self.register_buffer("low_pass", low_pass_matrix(max_history, low_frequencies), persistent=False)

    def forward(
        self, states: Float[Tensor, "batch length embed_dim"], real: Bool[Tensor, "batch length"], wanted: slice
    ) -> Float[Tensor, "batch wanted embed_dim"]:
        length = states.shape[1]
        states = states * real[..., None]
        low = self.low_pass[-length:, -length:][wanted] @ states
        filtered: Tensor = low + self.beta.square() * (states[:, wanted] - low)
        return filtered


def low_pass_matrix(length: int, frequencies: int) -> Float[Tensor, "length length"]:
    """What is left of a sequence when only the constant and the next `frequencies - 1` frequencies are kept."""
    spectrum = torch.fft.rfft(torch.eye(length), dim=0)
    spectrum[frequencies:] = 0
    return torch.fft.irfft(spectrum, n=length, dim=0)


class Attention(nn.Module):
    """Causal multi-head self-attention."""

    def __init__(self, dim: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = num_heads, dropout
        self.query, self.heard, self.leave = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)

    def forward(
        self, states: Float[Tensor, "batch length embed_dim"], real: Bool[Tensor, "batch length"], wanted: slice
    ) -> Float[Tensor, "batch wanted embed_dim"]:
        (batch, length, dim), asked = states.shape, states[:, wanted]
        # Every size is said: there may be no row at all.
        each = (self.heads, dim // self.heads)
        query = self.query(asked).reshape(batch, asked.shape[1], *each).transpose(1, 2)
        key, value = self.heard(states).reshape(batch, length, 2, *each).permute(2, 0, 3, 1, 4)
        places = torch.arange(length, device=states.device)
        # Padding hears itself: a row that may hear nothing would be NaN.
        asking = places[wanted, None]
        hears = (asking >= places) & real[:, None, None, :] | (asking == places)
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=hears, dropout_p=dropout)
        left: Tensor = self.leave(mixed.transpose(1, 2).reshape(asked.shape))
        return left


class Block(nn.Module):
    """`alpha` of the filter `low_pass` and the rest of the attention, then a feed-forward layer; each added and
    normalised. Without `alpha` there is no filter."""

    def __init__(
        self, dim: int, dropout: float, num_heads: int = 1, alpha: float = 0.0, low_pass: FrequencyFilter | None = None
    ) -> None:
        super().__init__()
        self.alpha, self.dropout = alpha, nn.Dropout(dropout)
        self.attention, self.attention_norm = Attention(dim, num_heads, dropout), nn.LayerNorm(dim, eps=EPSILON)
        if low_pass is not None:
            self.filter, self.filter_norm = low_pass, nn.LayerNorm(dim, eps=EPSILON)
        self.enter, self.leave = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        self.feed_forward_norm = nn.LayerNorm(dim, eps=EPSILON)

    def forward(
        self, states: Float[Tensor, "batch length embed_dim"], real: Bool[Tensor, "batch length"], wanted: slice
    ) -> Float[Tensor, "batch wanted embed_dim"]:
        mixed = self.attention_norm(states[:, wanted] + self.dropout(self.attention(states, real, wanted)))
        if self.alpha:
            filtered = self.filter_norm(states[:, wanted] + self.dropout(self.filter(states, real, wanted)))
            mixed = self.alpha * filtered + (1 - self.alpha) * mixed
        fed = self.dropout(self.leave(F.gelu(self.enter(mixed))))
        left: Tensor = self.feed_forward_norm(mixed + fed)
        return left


class SequenceEncoder(nn.Module):
    """Blocks over vectors, each with the embedding of its place added: places count from the newest."""

    def __init__(self, dim: int, max_history: int, dropout: float, blocks: Iterable[Block]) -> None:
        super().__init__()
        self.max_history = max_history
        self.places = nn.Parameter(torch.empty(max_history, dim))  # the newest last
        self.norm, self.dropout = nn.LayerNorm(dim, eps=EPSILON), nn.Dropout(dropout)
        self.blocks = nn.ModuleList(blocks)
        nn.init.normal_(self.places, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(
        self,
        vectors: Float[Tensor, "batch length embed_dim"],
        real: Bool[Tensor, "batch length"],
        wanted: slice = ALL,
    ) -> Float[Tensor, "batch wanted embed_dim"]:
        """States after the last block, which works for the wanted places alone."""
        states = self.dropout(self.norm(vectors + self.places[-vectors.shape[1] :]))
        for block in self.blocks[:-1]:
            states = block(states, real, ALL)
        left: Tensor = self.blocks[-1](states, real, wanted)
        return left


def prefixes(train_lengths: ndarray) -> tuple[ndarray, ndarray]:
    """(user, end) of each: the items before `end` are read, the one there is the target."""
    counts = np.maximum(train_lengths - 1, 0)
    users = np.repeat(np.arange(len(counts)), counts)
    return users, np.arange(len(users)) - np.repeat(np.cumsum(counts) - counts, counts) + 1


def left_padded(rows: list[ndarray], limit: int, value: int) -> Int[ndarray, "batch length"]:
    """The last `limit` entries of each row, aligned at the end."""
    length = max(1, min(limit, max(len(row) for row in rows)))
    out = np.full((len(rows), length), value, np.int64)
    for index, row in enumerate(rows):
        kept = row[-length:]
        out[index, length - len(kept) :] = kept
    return out


def latest_first(histories: list[ndarray], limit: int) -> Int[ndarray, "batch length"]:
    """The last `limit` items of each, the latest first, -1 behind them."""
    return left_padded(histories, limit, -1)[:, ::-1].copy()
