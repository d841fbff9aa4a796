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
from jaxtyping import Float, Int
from numpy import ndarray
from torch import Tensor, nn

from ctd_scale.batches import InteractionLog
from ctd_scale.config import RunConfig
from ctd_scale.config_baselines import SequentialConfig
from ctd_scale.llm.losses import ChunkedCrossEntropy, logits_at_a_time
from ctd_scale.sequence import ALL, LAST, Block, FrequencyFilter, SequenceEncoder, left_padded, prefixes
from ctd_scale.tasks import Task, by_length


class SequenceModel(nn.Module):
    """Item and place embeddings, blocks, and the inner product with the items. Sequences are padded on the left, so
    that the newest item always has the last place."""

    def __init__(self, num_items: int, config: SequentialConfig) -> None:
        super().__init__()
        self.config, self.padding = config, num_items
        dim = config.embed_dim
        self.items = nn.Embedding(num_items + 1, dim, padding_idx=num_items)
        blocks = [
            Block(
                dim,
                config.dropout,
                config.num_heads,
                config.alpha,
                FrequencyFilter(dim, config.max_history, config.low_frequencies) if config.alpha else None,
            )
            for _ in range(config.num_blocks)
        ]
        self.encoder = SequenceEncoder(dim, config.max_history, config.dropout, blocks)
        nn.init.normal_(self.items.weight, std=0.02)
        with torch.no_grad():
            self.items.weight[num_items] = 0

    def encode(
        self, items: Int[Tensor, "batch length"], wanted: slice = ALL
    ) -> Float[Tensor, "batch wanted embed_dim"]:
        """States after the last block, which works for the wanted places alone."""
        states: Tensor = self.encoder(self.items(items), items != self.padding, wanted)
        return states

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
