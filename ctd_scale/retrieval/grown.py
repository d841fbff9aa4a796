"""Vectors of a catalogue that grew after its index was built."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float32, Int
from numpy import ndarray


class GrownVectors:
    """Rows of a large, memory-mapped array followed by rows of a small one, which is not worth a copy of both. Rows are
    taken by slice or by index, as from an array."""

    def __init__(
        self, built: Float32[ndarray, "built dim"] | GrownVectors, added: Float32[ndarray, "added dim"]
    ) -> None:
        self._built, self._added = built, added
        self.shape: tuple[int, int] = (len(built) + len(added), built.shape[1])

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice | Int[ndarray, "*shape"]) -> Float32[ndarray, "*shape dim"]:
        if isinstance(rows, slice):
            rows = np.arange(*rows.indices(len(self)))
        found = np.asarray(self._built[np.minimum(rows, len(self._built) - 1)])
        later = rows >= len(self._built)
        if later.any():
            found[later] = self._added[rows[later] - len(self._built)]
        return found
