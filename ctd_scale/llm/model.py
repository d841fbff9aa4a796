"""The preference model: a causal LM that reads spliced continuous tokens and answers with vectors and text.

Shapes: batch x length text and continuous tokens, token_dim H (hidden size), cond_dim C.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ctd_scale.llm.collator import LLMBatch
from ctd_scale.llm.losses import sampled_softmax_loss, softmax_loss


class TokenAdapter(nn.Module):
    """Brings continuous tokens to the scale of word embeddings: normalised, scaled, plus a learned correction."""

    def __init__(self, token_dim: int, scale: float) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((token_dim,), scale))
        self.correction = nn.Linear(token_dim, token_dim, bias=False)
        nn.init.zeros_(self.correction.weight)

    def forward(self, tokens: Float[Tensor, "tokens token_dim"]) -> Float[Tensor, "tokens token_dim"]:
        unit = F.rms_norm(tokens, tokens.shape[-1:])
        adapted: Tensor = self.scale * (unit + self.correction(unit))
        return adapted


class PreferenceHead(nn.Module):
    """Linear map of the hidden state at an item's last continuous token to the preference, and what it is scored by:
    item vectors (learned with it, or frozen) and a learned temperature."""

    def __init__(
        self, token_dim: int, vectors: Float[Tensor, "items cond_dim"], temperature: float, learn_vectors: bool
    ) -> None:
        super().__init__()
        self.project = nn.Linear(token_dim, vectors.shape[1], bias=False)
        self.vectors = nn.Parameter(vectors.clone(), requires_grad=learn_vectors)
        self.log_temperature = nn.Parameter(torch.tensor(temperature).log().reshape(1))

    @property
    def temperature(self) -> Float[Tensor, ""]:
        return self.log_temperature.float().exp().squeeze(0)


class PreferenceLM(nn.Module):
    """`lm` is any Hugging Face causal LM; its word embeddings stay frozen (28M values that history text needs no
    change of, and whose dense gradient would cost more than the rest)."""

    def __init__(self, lm: Any, adapter: TokenAdapter, head: PreferenceHead) -> None:
        super().__init__()
        self.lm = lm
        self.adapter = adapter
        self.head = head
        lm.get_input_embeddings().weight.requires_grad_(False)
        if lm.get_output_embeddings() is not None:
            lm.get_output_embeddings().weight.requires_grad_(False)

    def embed(self, batch: LLMBatch) -> Float[Tensor, "batch length token_dim"]:
        """Word embeddings with the continuous tokens in the places kept for them."""
        words = self.lm.get_input_embeddings()(batch.input_ids)
        flat = words.reshape(-1, words.shape[-1])
        tokens = self.adapter(batch.token_values.to(words.dtype)).to(words.dtype)
        flat = flat.index_copy(0, batch.token_positions, tokens)
        return flat.reshape(words.shape)

    def hidden(self, batch: LLMBatch) -> Float[Tensor, "flat token_dim"]:
        """Last hidden states, flat over rows and columns."""
        states = self.lm.base_model(inputs_embeds=self.embed(batch), use_cache=False).last_hidden_state
        return states.reshape(-1, states.shape[-1])

    def preferences(self, batch: LLMBatch) -> Float[Tensor, "preferences cond_dim"]:
        projected: Tensor = self.head.project(self.hidden(batch)[batch.preference_positions])
        return projected.float()

    def forward(self, batch: LLMBatch, negatives: Tensor | None = None) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """Sums (not means) of the preference loss over positions and of the LM loss over answer tokens."""
        hidden = self.hidden(batch)
        preferences = self.head.project(hidden[batch.preference_positions]).float()
        vectors, temperature = self.head.vectors.float(), self.head.temperature
        if negatives is None:
            preference = softmax_loss(preferences, vectors, batch.targets, temperature).sum()
        else:
            preference = sampled_softmax_loss(preferences, vectors, batch.targets, temperature, negatives).sum()
        # The vocabulary's logits cost as much as several layers: only where an answer token is predicted.
        logits = self.lm.get_output_embeddings()(hidden[batch.answer_positions]).float()
        text = F.cross_entropy(logits, batch.answer_ids, reduction="sum")
        return preference, text


def word_scale(lm: Any) -> float:
    """Root mean square of the word embeddings: the scale that the continuous tokens should come in."""
    return float(lm.get_input_embeddings().weight.detach().float().square().mean().sqrt())


def build_preference_lm(
    lm: Any, vectors: Float[Tensor, "items cond_dim"], temperature: float, learn_vectors: bool
) -> PreferenceLM:
    """A preference model on top of a causal LM, with fresh adapter and head."""
    token_dim = int(lm.get_input_embeddings().weight.shape[1])
    return PreferenceLM(
        lm, TokenAdapter(token_dim, word_scale(lm)), PreferenceHead(token_dim, vectors, temperature, learn_vectors)
    )
