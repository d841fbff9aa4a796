"""What the words of a title and category say of an item, as one vector: fixed features of the item vectors."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from scipy.sparse import csr_matrix
from torch import Tensor

from ctd_scale.llm.prompts import Prompts


def describe_items(prompts: Prompts, words: Float[Tensor, "vocabulary token_dim"]) -> Float[Tensor, "items token_dim"]:
    """Mean of the word embeddings of each item's answer (its category and title), each word weighed by how rare it is,

        x_i = sum_w idf(w) e_w / sum_w idf(w),  idf(w) = log( (items + 1) / (items that have w + 1) ),

    without the mean over all items, at unit length. The words that all answers share weigh nothing. An item without
    a word of its own gets zeros.
    """
    count = len(prompts.answer_offsets) - 1
    ids = np.asarray(prompts.answers)
    offsets = np.asarray(prompts.answer_offsets)
    shape = (count, len(words))
    said = csr_matrix((np.ones(len(ids), np.float32), ids, offsets), shape, copy=True)  # it sorts in place
    said.sum_duplicates()
    frequency = np.bincount(said.indices, minlength=len(words))
    rarity = np.log((count + 1) / (frequency + 1)).astype(np.float32)
    weighed = said.multiply(rarity).tocsr()
    total = np.asarray(weighed.sum(axis=1)).ravel()
    known = total > 0
    means = np.zeros((count, words.shape[1]), np.float32)
    table = words.detach().float().cpu().numpy()
    means[known] = (weighed @ table)[known] / total[known, None]
    if known.any():
        means[known] -= means[known].mean(axis=0)
    return F.normalize(torch.from_numpy(means), dim=1)
