"""SASRec (Kang and McAuley, 2018) and BSARec (Shin et al., 2024), both with the softmax over all items.

BSARec adds to each attention layer a filter over the sequence: low frequencies as they are, high ones rescaled by a
learned factor per dimension. Without the filter's share (`alpha = 0`) it is SASRec in the same form.

The filter hears the whole sequence, its end included, so BSARec may only be trained on the last place of a prefix;
SASRec is causal and trains on all places at once.
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

NOTHING = -1  # a place without a target


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
        self, states: Float[Tensor, "batch length embed_dim"], real: Bool[Tensor, "batch length"]
    ) -> Float[Tensor, "batch length embed_dim"]:
        length = states.shape[1]
        states = states * real[..., None]
        low = self.low_pass[-length:, -length:] @ states
        filtered: Tensor = low + self.beta.square() * (states - low)
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
        self.project = nn.Linear(config.embed_dim, 3 * config.embed_dim)
        self.leave = nn.Linear(config.embed_dim, config.embed_dim)

    def forward(
        self, states: Float[Tensor, "batch length embed_dim"], real: Bool[Tensor, "batch length"]
    ) -> Float[Tensor, "batch length embed_dim"]:
        batch, length, dim = states.shape
        parts = self.project(states).reshape(batch, length, 3, self.heads, dim // self.heads)
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        places = torch.arange(length, device=states.device)
        # Padding hears itself: a row that may hear nothing would be NaN.
        heard = (places[:, None] >= places) & real[:, None, None, :] | (places[:, None] == places)
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=heard, dropout_p=dropout)
        left: Tensor = self.leave(mixed.transpose(1, 2).reshape(batch, length, dim))
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
        self, states: Float[Tensor, "batch length embed_dim"], real: Bool[Tensor, "batch length"]
    ) -> Float[Tensor, "batch length embed_dim"]:
        mixed = self.attention_norm(states + self.dropout(self.attention(states, real)))
        if self.alpha:
            filtered = self.filter_norm(states + self.dropout(self.filter(states, real)))
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

    def encode(self, items: Int[Tensor, "batch length"]) -> Float[Tensor, "batch length embed_dim"]:
        real = items != self.padding
        states = self.dropout(self.norm(self.items(items) + self.places.weight[-items.shape[1] :]))
        for block in self.blocks:
            states = block(states, real)
        return states

    def forward(self, items: Int[Tensor, "batch length"], targets: Int[Tensor, "batch length"]) -> Float[Tensor, ""]:
        """Cross-entropy over all items, summed over the places that have a target."""
        wanted = targets != NOTHING
        states = self.encode(items)[wanted]
        vectors = self.items.weight[: self.padding]
        loss: Tensor = ChunkedCrossEntropy.apply(states, vectors, targets[wanted], logits_at_a_time(vectors))
        return loss

    def score(self, users: ndarray, histories: list[ndarray]) -> Float[Tensor, "batch items"]:
        """The logits after each history."""
        items = torch.from_numpy(left_padded(histories, self.config.max_history, self.padding))
        states = self.encode(items.to(self.items.weight.device))[:, -1]
        return states @ self.items.weight[: self.padding].T


def sequential_task(log: InteractionLog, config: RunConfig, name: str) -> Task:
    """Every training prefix once an epoch: for BSARec as a sample of its own, for SASRec as places of the user's
    windows of `max_history` items."""
    settings: SequentialConfig = getattr(config.baselines, name)
    seed = config.seed
    model = SequenceModel(log.num_items, settings)
    users, ends, firsts = samples(log.train_lengths(), settings)

    def collate(chosen: ndarray, random: np.random.Generator) -> tuple[Tensor, ...]:
        inputs, targets = [], []
        for number in chosen.tolist():
            sequence = np.asarray(log.train_sequence(int(users[number])))
            start, end = max(0, int(ends[number]) - settings.max_history), int(ends[number])
            inputs.append(sequence[start:end])
            wanted = sequence[start + 1 : end + 1].astype(np.int64)
            wanted[: max(0, int(firsts[number]) - start)] = NOTHING
            targets.append(wanted)
        padded = (
            left_padded(inputs, settings.max_history, model.padding),
            left_padded(targets, settings.max_history, NOTHING),
        )
        return torch.from_numpy(padded[0]), torch.from_numpy(padded[1])

    lengths = np.minimum(ends, settings.max_history)
    return Task(
        model=model,
        steps=lambda epoch: by_length(lengths, settings.batch_size, np.random.default_rng((seed, 41, epoch))),
        collate=collate,
        supervised=lambda batch: int((batch[1] != NOTHING).sum()),
    )


def samples(train_lengths: ndarray, config: SequentialConfig) -> tuple[ndarray, ndarray, ndarray]:
    """(user, end, first) of each: inputs are the `max_history` items before `end`, the inputs from `first` on are
    supervised. Every input that has a successor is supervised once."""
    users, ends, firsts = [], [], []
    for user, length in enumerate(train_lengths.tolist()):
        stride = 1 if config.alpha else config.max_history
        for end in range(length - 1, 0, -stride):
            users.append(user)
            ends.append(end)
            firsts.append(end - 1 if config.alpha else max(0, end - config.max_history))
    return np.array(users, np.int64), np.array(ends, np.int64), np.array(firsts, np.int64)


def left_padded(rows: list[ndarray], limit: int, value: int) -> Int[ndarray, "batch length"]:
    """The last `limit` entries of each row, aligned at the end."""
    length = max(1, min(limit, max(len(row) for row in rows)))
    out = np.full((len(rows), length), value, np.int64)
    for index, row in enumerate(rows):
        kept = row[-length:]
        out[index, length - len(kept) :] = kept
    return out
