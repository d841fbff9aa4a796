"""From windows and histories to the tensors of one forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy import ndarray
from torch import Tensor

from ctd_scale.llm.prompts import Prompts


@dataclass(frozen=True)
class LLMBatch:
    """Right-padded lines of one or more rows, each row read after the same head. All positions are flat:
    line * length + column.

    Where every line holds one row, no attention mask is needed: in a causal model nothing before a pad ever sees it.
    Where lines hold several, `places` gives each token's place in its own row, from 0 (padding: 0 too).
    `recent` are the items that a preference has read, the latest first, -1 where there were fewer.
    """

    head_ids: Int[Tensor, "head"]
    input_ids: Int[Tensor, "batch length"]
    token_positions: Int[Tensor, "tokens"]
    token_values: Float[Tensor, "tokens token_dim"]
    preference_positions: Int[Tensor, "preferences"]
    recent: Int[Tensor, "preferences recent"]
    targets: Int[Tensor, "preferences"]
    answer_positions: Int[Tensor, "answers"]
    answer_ids: Int[Tensor, "answers"]
    places: Int[Tensor, "batch length"] | None = None

    def to(self, device: torch.device) -> LLMBatch:
        tensors = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: tensor.to(device) for name, tensor in tensors.items() if tensor is not None})


@dataclass(frozen=True)
class Row:
    """One history to read. Preferences are wanted after the inputs `first`, ..., each with its target."""

    items: Int[ndarray, "history"]
    targets: Int[ndarray, "supervised"]
    answer_item: int = -1
    user: int = -1

    @property
    def first(self) -> int:
        return len(self.items) - len(self.targets)


def latest_items(items: Int[ndarray, "history"], count: int) -> Int[ndarray, "history recent"]:
    """After each item of a history the latest `count`, itself first, -1 where there are fewer."""
    before = np.concatenate([np.full(count - 1, -1, np.int64), items])
    return np.lib.stride_tricks.sliding_window_view(before, count)[:, ::-1]


class Collator:
    """Builds batches from rows; holds the prompts and the (memory-mapped) continuous tokens."""

    def __init__(
        self,
        prompts: Prompts,
        item_tokens: Float[ndarray, "items ways token_dim"],
        user_tokens: Float[ndarray, "users ways token_dim"] | None = None,
    ) -> None:
        self.prompts = prompts
        self.item_tokens = item_tokens
        self.user_tokens = user_tokens
        self.num_ways = item_tokens.shape[1]
        self.block_sizes = np.diff(prompts.title_offsets) + self.num_ways

    def num_blocks(self, row: Row) -> int:
        """Groups of `num_ways` continuous tokens in the row: one per item, and one of its user."""
        return len(row.items) + int(self.user_tokens is not None and row.user >= 0)

    def sizes(self, rows: Sequence[Row]) -> Int[ndarray, "rows"]:
        """Tokens of each row, text and continuous together, without the head."""
        prompts = self.prompts
        return np.array(
            [
                (self.num_ways if self.user_tokens is not None and row.user >= 0 else 0)
                + int(self.block_sizes[row.items].sum())
                + (len(prompts.tail) + len(prompts.answer(row.answer_item)) if row.answer_item >= 0 else 0)
                for row in rows
            ]
        )

    def __call__(self, rows: Sequence[Row], length: int | None = None) -> LLMBatch:
        """Tensors of these rows, one a line, padded to `length` (default: the longest row)."""
        return self.packed([[row] for row in rows], length)

    def packed(self, lines: Sequence[Sequence[Row]], length: int | None = None) -> LLMBatch:
        """Tensors of lines, the rows of each laid end to end, padded to `length` (default: the longest line)."""
        rows = [row for line in lines for row in line]
        sizes, most = self.sizes(rows), max(len(row.items) for row in rows)
        starts, number = [], 0
        for line in lines:
            starts.append(np.cumsum([0, *sizes[number : number + len(line)]]))
            number += len(line)
        longest = int(length if length is not None else max(line[-1] for line in starts))
        ids = np.full(len(lines) * longest, self.prompts.pad_id, np.int64)
        places = np.zeros(len(lines) * longest, np.int64)
        bases = np.concatenate([index * longest + line[:-1] for index, line in enumerate(starts)])
        tokens: list[ndarray] = []
        values: list[ndarray] = []
        wanted: list[ndarray] = []
        recent: list[ndarray] = []
        answer_positions: list[ndarray] = []
        answer_ids: list[ndarray] = []
        for row, base, size in zip(rows, bases.tolist(), sizes.tolist(), strict=True):
            places[base : base + size] = np.arange(size)
            column = base
            if self.user_tokens is not None and row.user >= 0:
                tokens.append(column + np.arange(self.num_ways))
                values.append(np.asarray(self.user_tokens[row.user]))
                column += self.num_ways
            ends = column + np.cumsum(self.block_sizes[row.items])
            for item, end in zip(row.items.tolist(), ends.tolist(), strict=True):
                title = self.prompts.title(item)
                ids[end - self.num_ways - len(title) : end - self.num_ways] = title
            tokens.append((ends[:, None] - self.num_ways + np.arange(self.num_ways)).ravel())
            values.append(self.item_tokens[row.items].reshape(-1, self.item_tokens.shape[2]))
            wanted.append(ends[row.first :] - 1)
            recent.append(latest_items(row.items, most)[row.first :])
            if row.answer_item >= 0:
                column = int(ends[-1])
                tail, answer = self.prompts.tail, self.prompts.answer(row.answer_item)
                ids[column : column + len(tail)] = tail
                column += len(tail)
                ids[column : column + len(answer)] = answer
                answer_positions.append(column - 1 + np.arange(len(answer)))
                answer_ids.append(answer)
        empty = np.zeros(0, np.int64)
        return LLMBatch(
            head_ids=torch.from_numpy(self.prompts.head.astype(np.int64)),
            input_ids=torch.from_numpy(ids.reshape(len(lines), longest)),
            token_positions=torch.from_numpy(np.concatenate(tokens)),
            token_values=torch.from_numpy(np.concatenate(values).astype(np.float32)),
            preference_positions=torch.from_numpy(np.concatenate(wanted)),
            recent=torch.from_numpy(np.concatenate(recent)),
            targets=torch.from_numpy(np.concatenate([row.targets for row in rows]).astype(np.int64)),
            answer_positions=torch.from_numpy(np.concatenate([empty, *answer_positions])),
            answer_ids=torch.from_numpy(np.concatenate([empty, *answer_ids]).astype(np.int64)),
            places=torch.from_numpy(places.reshape(len(lines), longest)) if len(rows) > len(lines) else None,
        )
