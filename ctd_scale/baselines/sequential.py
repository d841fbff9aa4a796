"""SASRec (Kang and McAuley, 2018) and BSARec (Shin et al., 2024), both with the softmax over all items.

BSARec adds to each attention layer a filter over the sequence: low frequencies as they are, high ones rescaled by a
learned factor per dimension. Without the filter's share (`alpha = 0`) it is SASRec in the same form.

Both train on the last place of every prefix, which is where they are asked. The filter hears the whole sequence, its
end included, so BSARec could be trained in no other way. SASRec, which is causal, could train on all places of a
sequence at once, as its authors do: on Beauty that is far worse (docs/log.md).
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from torch import Tensor, nn

from ctd_scale.baselines.task import Task, by_length
from ctd_scale.batches import InteractionLog
from ctd_scale.config import RunConfig
from ctd_scale.config_baselines import SequentialConfig
from ctd_scale.llm.losses import ChunkedCrossEntropy, logits_at_a_time

ALL, LAST = slice(None), slice(-1, None)  # places of a sequence


class FrequencyFilter(nn.Module):
    """`low(x) + beta^2 (x - low(x))`, low = the lowest frequencies of the discrete Fourier transform over
    `max_history` places (BSARec, eq. 8 to 10). Places before the sequence are zero.

    A low pass is linear: one matrix [places, places], of which a short sequence needs the last rows and columns.
    """

    low_pass: Tensor

    def __init__(self, config: SequentialConfig) -> None:
        super().__init__()
        self.beta = nn.Parameter(torch.randn(config.embed_dim))
        self.register_buffer("low_pass", low_pass_matrix(config.max_history, config.low_frequencies), persistent=False)

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

    def __init__(self, config: SequentialConfig) -> None:
        super().__init__()
        self.heads, self.dropout = config.num_heads, config.dropout
        self.query = nn.Linear(config.embed_dim, config.embed_dim)
        self.heard = nn.Linear(config.embed_dim, 2 * config.embed_dim)
        self.leave = nn.Linear(config.embed_dim, config.embed_dim)

    def forward(
        self, states: Float[Tensor, "batch length embed_dim"], real: Bool[Tensor, "batch length"], wanted: slice
    ) -> Float[Tensor, "batch wanted embed_dim"]:
        batch, length, dim = states.shape
        query = self.query(states[:, wanted]).reshape(batch, -1, self.heads, dim // self.heads).transpose(1, 2)
        key, value = self.heard(states).reshape(batch, length, 2, self.heads, -1).permute(2, 0, 3, 1, 4)
        places = torch.arange(length, device=states.device)
        # Padding hears itself: a row that may hear nothing would be NaN.
        asking = places[wanted, None]
        hears = (asking >= places) & real[:, None, None, :] | (asking == places)
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=hears, dropout_p=dropout)
        left: Tensor = self.leave(mixed.transpose(1, 2).reshape(batch, -1, dim))
        return left


class Block(nn.Module):
    """`alpha` of the filter and the rest of the attention, then a feed-forward layer; each added and normalised."""

    def __init__(self, config: SequentialConfig) -> None:
        super().__init__()
        dim = config.embed_dim
        self.alpha, self.dropout = config.alpha, nn.Dropout(config.dropout)
        self.attention, self.attention_norm = Attention(config), nn.LayerNorm(dim, eps=1e-12)
        if config.alpha:
            self.filter, self.filter_norm = FrequencyFilter(config), nn.LayerNorm(dim, eps=1e-12)
        self.enter, self.leave = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        self.feed_forward_norm = nn.LayerNorm(dim, eps=1e-12)

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


class SequenceModel(nn.Module):
    """Item and place embeddings, blocks, and the inner product with the items. Sequences are padded on the left, so
    that the newest item always has the last place."""

    def __init__(self, num_items: int, config: SequentialConfig) -> None:
        super().__init__()
        self.config, self.padding = config, num_items
        self.items = nn.Embedding(num_items + 1, config.embed_dim, padding_idx=num_items)
        self.places = nn.Embedding(config.max_history, config.embed_dim)
        self.norm, self.dropout = nn.LayerNorm(config.embed_dim, eps=1e-12), nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList([Block(config) for _ in range(config.num_blocks)])
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
        with torch.no_grad():
            self.items.weight[num_items] = 0

    def encode(
        self, items: Int[Tensor, "batch length"], wanted: slice = ALL
    ) -> Float[Tensor, "batch wanted embed_dim"]:
        """States after the last block, which works for the wanted places alone."""
        real = items != self.padding
        states = self.dropout(self.norm(self.items(items) + self.places.weight[-items.shape[1] :]))
        for block in self.blocks[:-1]:
            states = block(states, real, ALL)
        left: Tensor = self.blocks[-1](states, real, wanted)
        return left

    def forward(self, items: Int[Tensor, "batch length"], targets: Int[Tensor, "batch"]) -> Float[Tensor, ""]:
        """Cross-entropy over all items of what follows each row, summed."""
        vectors = self.items.weight[: self.padding]
        states = self.encode(items, LAST)[:, 0]
        loss: Tensor = ChunkedCrossEntropy.apply(states, vectors, targets, logits_at_a_time(vectors))
        return loss

    def score(self, users: ndarray, histories: list[ndarray]) -> Float[Tensor, "batch items"]:
        """The logits after each history."""
        items = torch.from_numpy(left_padded(histories, self.config.max_history, self.padding))
        states = self.encode(items.to(self.items.weight.device), LAST)[:, 0]
        return states @ self.items.weight[: self.padding].T


def sequential_task(log: InteractionLog, config: RunConfig, name: str) -> Task:
    """Every training prefix once an epoch, each a sample of its own."""
    settings: SequentialConfig = getattr(config.baselines, name)
    seed = config.seed
    model = SequenceModel(log.num_items, settings)
    users, ends = prefixes(log.train_lengths())

    def collate(chosen: ndarray, random: np.random.Generator) -> tuple[Tensor, ...]:
        pairs = zip(users[chosen].tolist(), ends[chosen].tolist(), strict=True)
        inputs, targets = [], []
        for user, end in pairs:
            sequence = log.train_sequence(user)
            inputs.append(np.asarray(sequence[max(0, end - settings.max_history) : end]))
            targets.append(int(sequence[end]))
        return torch.from_numpy(left_padded(inputs, settings.max_history, model.padding)), torch.tensor(targets)

    lengths = np.minimum(ends, settings.max_history)
    return Task(
        model=model,
        steps=lambda epoch: by_length(lengths, settings.batch_size, np.random.default_rng((seed, 41, epoch))),
        collate=collate,
        supervised=lambda batch: len(batch[1]),
    )


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
