"""The preference model: a causal LM that reads spliced continuous tokens and answers with vectors and text.

Shapes: batch x length text and continuous tokens, token_dim H (hidden size), cond_dim C.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import DynamicCache

from ctd_scale.llm.collator import LLMBatch
from ctd_scale.llm.losses import sampled_softmax_loss, softmax_loss
from ctd_scale.llm.reader import RECENT, HistoryReader

# How much the latest item's vector weighs in a preference before anything is learned, and each earlier one beside it.
LATEST, EARLIER = 3.2, 0.6


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


class ProjectionAdapter(nn.Module):
    """One token out of a collaborative embedding: a small network (CoLLM, LLaRA), at the scale of word embeddings.

    An embedding of zeros stands for none and gives zeros.
    """

    def __init__(self, embed_dim: int, token_dim: int, scale: float) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((token_dim,), scale))
        self.enter, self.leave = nn.Linear(embed_dim, token_dim), nn.Linear(token_dim, token_dim)

    def forward(self, embeddings: Float[Tensor, "tokens embed_dim"]) -> Float[Tensor, "tokens token_dim"]:
        unit = F.rms_norm(embeddings, embeddings.shape[-1:])
        projected = self.leave(F.gelu(self.enter(unit)))
        adapted: Tensor = self.scale * F.rms_norm(projected, projected.shape[-1:])
        return adapted * (embeddings != 0).any(dim=1, keepdim=True)


class PreferenceHead(nn.Module):
    """From the hidden state h at an item's last continuous token to the preference, and what it is scored by: item
    vectors (learned with it, or frozen) and a learned temperature.

    With `descriptions` x, fixed features of the items, the vectors are `q_i = v_i + P x_i`, P learned: items that few
    have chosen share what their words have in common with others.

    `c = W h + b(v_1, v_2, ...)`, v_k the vector of the k-th latest item: a preference begins at what was chosen last,
    and W h says what to change. b is what a `reader` makes of the history, or with `recency` alone
    `sum_k a_k v_k / |v_k|`, or nothing.
    """

    descriptions: Tensor

    def __init__(
        self,
        token_dim: int,
        vectors: Float[Tensor, "items cond_dim"],
        temperature: float,
        *,
        learn_vectors: bool,
        recency: bool,
        dropout: float = 0.0,
        descriptions: Float[Tensor, "items text_dim"] | None = None,
        reader: HistoryReader | None = None,
    ) -> None:
        super().__init__()
        self.dropout, self.reader = nn.Dropout(dropout), reader
        self.project = nn.Linear(token_dim, vectors.shape[1], bias=False)
        self.vectors = nn.Parameter(vectors.clone(), requires_grad=learn_vectors)
        self.log_temperature = nn.Parameter(torch.tensor(temperature).log().reshape(1))
        begins = recency and reader is None
        self.recency = nn.Parameter(LATEST * EARLIER ** torch.arange(RECENT)) if begins else None
        self.describe = None
        if descriptions is not None:
            self.register_buffer("descriptions", descriptions, persistent=False)
            self.describe = nn.Linear(descriptions.shape[1], vectors.shape[1], bias=False)
            nn.init.normal_(self.describe.weight, std=float(vectors.std()))

    def item_vectors(self, items: Int[Tensor, "*shape"] | None = None) -> Float[Tensor, "*shape cond_dim"]:
        """What preferences are compared with: of these items, or of all."""
        own: Tensor = self.vectors if items is None else F.embedding(items, self.vectors)
        if self.describe is None:
            return own
        words = self.descriptions if items is None else F.embedding(items, self.descriptions)
        return own + self.describe(words.to(self.describe.weight.dtype)).to(own.dtype)

    def forward(
        self, states: Float[Tensor, "preferences token_dim"], recent: Int[Tensor, "preferences recent"]
    ) -> Float[Tensor, "preferences cond_dim"]:
        preferences: Tensor = self.project(self.dropout(states))
        if self.reader is None and self.recency is None:
            return preferences
        return preferences + self.begin(recent).to(preferences.dtype)

    def begin(self, recent: Int[Tensor, "preferences recent"]) -> Float[Tensor, "preferences cond_dim"]:
        """b(v_1, v_2, ...), without the LLM."""
        if self.reader is not None:
            read: Tensor = self.reader(self.item_vectors, recent)
            return read
        assert self.recency is not None, "there is nothing to begin with"
        items = recent[:, :RECENT]
        latest = F.normalize(self.item_vectors(items.clamp_min(0)).float(), dim=-1)
        weights = self.recency.float()[: items.shape[1]] * (items >= 0)
        return (weights[:, :, None] * latest).sum(dim=1)

    @property
    def temperature(self) -> Float[Tensor, ""]:
        return self.log_temperature.float().exp().squeeze(0)


class PreferenceLM(nn.Module):
    """`lm` is any Hugging Face causal LM; its word embeddings stay frozen (28M values that history text needs no
    change of, and whose dense gradient would cost more than the rest)."""

    def __init__(
        self, lm: Any, adapter: TokenAdapter | ProjectionAdapter, head: PreferenceHead, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.lm = lm
        self.adapter = adapter
        self.head = head
        self.dropout = nn.Dropout(dropout)
        lm.get_input_embeddings().weight.requires_grad_(False)
        if lm.get_output_embeddings() is not None:
            lm.get_output_embeddings().weight.requires_grad_(False)

    def words(self, ids: Int[Tensor, "*places"]) -> Float[Tensor, "*places token_dim"]:
        embedded: Tensor = self.lm.get_input_embeddings()(ids)
        return embedded

    def embed(self, batch: LLMBatch) -> Float[Tensor, "batch length token_dim"]:
        """Word embeddings of the rows, without the head, with the continuous tokens in the places kept for them."""
        words = self.words(batch.input_ids)
        flat = words.reshape(-1, words.shape[-1])
        tokens = self.adapter(batch.token_values.to(words.dtype)).to(words.dtype)
        flat = self.dropout(flat.index_copy(0, batch.token_positions, tokens))
        return flat.reshape(words.shape)

    def read_head(self, head_ids: Int[Tensor, "head"]) -> DynamicCache:
        """Keys and values of the instruction with which every row begins."""
        cache = DynamicCache(config=self.lm.config)
        self.lm.base_model(inputs_embeds=self.words(head_ids[None]), past_key_values=cache, use_cache=True)
        return cache

    def hidden(self, batch: LLMBatch, head: DynamicCache | None = None) -> Float[Tensor, "flat token_dim"]:
        """Last hidden states, flat over rows and columns (the head's are left out).

        The head is read once and not once a row; gradients are the same. `head` is what `read_head` gave, where the
        weights have not changed since. Layers that are computed again in the backward pass take no keys and values
        from elsewhere, so with gradient checkpointing every row reads the head.
        """
        rows, head_length = self.embed(batch), len(batch.head_ids)
        if self.training and self.lm.is_activation_checkpointing:
            words = self.words(batch.head_ids).expand(len(rows), -1, -1)
            places = packed_places(batch, self.lm.config, rows.dtype, head_is_read=False)
            read = self.lm.base_model(inputs_embeds=torch.cat([words, rows], dim=1), use_cache=False, **places)
            states = read.last_hidden_state[:, head_length:]
        else:
            cache = self.read_head(batch.head_ids) if head is None else copy.deepcopy(head)
            cache.batch_repeat_interleave(len(rows))
            places = packed_places(batch, self.lm.config, rows.dtype, head_is_read=True)
            read = self.lm.base_model(inputs_embeds=rows, past_key_values=cache, use_cache=True, **places)
            states = read.last_hidden_state
        return states.reshape(-1, states.shape[-1])

    def preferences(self, batch: LLMBatch, head: DynamicCache | None = None) -> Float[Tensor, "preferences cond_dim"]:
        preferences: Tensor = self.head(self.hidden(batch, head)[batch.preference_positions], batch.recent)
        return preferences.float()

    def word_logits(self, states: Float[Tensor, "states token_dim"]) -> Float[Tensor, "states vocabulary"]:
        """What the LM would say after these states; Gemma bounds its logits, Granite and Cohere scale them."""
        logits: Tensor = self.lm.get_output_embeddings()(states).float()
        config = self.lm.config.get_text_config()
        logits = (
            logits * (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
        )
        bound = getattr(config, "final_logit_softcapping", None)
        return logits if bound is None else bound * torch.tanh(logits / bound)

    def forward(self, batch: LLMBatch, negatives: Tensor | None = None) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """Sums (not means) of the preference loss over positions and of the LM loss over answer tokens."""
        hidden = self.hidden(batch)
        preferences = self.head(hidden[batch.preference_positions], batch.recent)
        vectors, temperature = self.head.item_vectors, self.head.temperature
        if negatives is None:
            preference = softmax_loss(preferences, vectors(), batch.targets, temperature)
        else:
            items = len(self.head.vectors)
            preference = sampled_softmax_loss(preferences, vectors, items, batch.targets, temperature, negatives)
        # The vocabulary's logits cost as much as several layers: only where an answer token is predicted.
        logits = self.word_logits(hidden[batch.answer_positions])
        return preference, F.cross_entropy(logits, batch.answer_ids, reduction="sum")


def packed_places(batch: LLMBatch, config: Any, dtype: torch.dtype, *, head_is_read: bool) -> dict[str, Any]:
    """`position_ids` and `attention_mask` with which every row of a packed line is read as if it stood alone behind
    the head; nothing where no line is packed. With `head_is_read` the head's keys are there already, otherwise it
    begins every line.

    The mask is additive [batch, 1, queries, keys], which transformers takes as it is; layers with a sliding window
    see only the places within it.
    """
    if batch.places is None:
        return {}
    head = torch.arange(len(batch.head_ids), device=batch.places.device).expand(len(batch.places), -1)
    # Row 0 is the head, which all rows see. Padding is a row of one token each.
    key_rows = torch.cat([torch.zeros_like(head), (batch.places == 0).cumsum(dim=1)], dim=1)
    key_places = torch.cat([head, batch.places + head.shape[1]], dim=1)
    first = head.shape[1] if head_is_read else 0
    query_rows, query_places = key_rows[:, first:, None], key_places[:, first:, None]
    ago = query_places - key_places[:, None, :]
    seen = ((key_rows[:, None, :] == query_rows) | (key_rows[:, None, :] == 0)) & (ago >= 0)

    def additive(allowed: Tensor) -> Tensor:
        mask = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
        return mask.masked_fill(~allowed, torch.finfo(dtype).min)[:, None]

    text_config = config.get_text_config()
    window = getattr(text_config, "sliding_window", None)
    full = additive(seen)
    mask: Tensor | dict[str, Tensor] = full
    if window is not None and int(ago.max()) >= window:
        # Of the head such a layer keeps only what its next query may see.
        forgotten = max(0, head.shape[1] - (window - 1)) if head_is_read else 0
        sliding = additive((seen & (ago < window))[:, :, forgotten:])
        layers = getattr(text_config, "layer_types", None)
        mask = {"full_attention": full, "sliding_attention": sliding} if layers else sliding
    return {"position_ids": key_places[:, first:], "attention_mask": mask}


def word_scale(lm: Any) -> float:
    """Root mean square of the embedded words: the scale that the continuous tokens should come in. Measured behind
    the embedding layer, because some models (Gemma) scale there."""
    layer = lm.get_input_embeddings()
    with torch.no_grad():
        return float(layer(torch.arange(len(layer.weight), device=layer.weight.device)).float().square().mean().sqrt())


def build_preference_lm(
    lm: Any,
    vectors: Float[Tensor, "items cond_dim"],
    temperature: float,
    *,
    learn_vectors: bool,
    projected_dim: int | None = None,
    recency: bool = True,
    input_dropout: float = 0.0,
    head_dropout: float = 0.0,
    descriptions: Float[Tensor, "items text_dim"] | None = None,
    reader: HistoryReader | None = None,
) -> PreferenceLM:
    """A preference model on top of a causal LM, with fresh adapter and head. With `projected_dim` item tokens are
    embeddings of that size, which the adapter projects; `recency`, `descriptions` and `reader` are those of the
    head."""
    token_dim, scale = int(lm.get_input_embeddings().weight.shape[1]), word_scale(lm)
    adapter = (
        TokenAdapter(token_dim, scale) if projected_dim is None else ProjectionAdapter(projected_dim, token_dim, scale)
    )
    head = PreferenceHead(
        token_dim,
        vectors,
        temperature,
        learn_vectors=learn_vectors,
        recency=recency,
        dropout=head_dropout,
        descriptions=descriptions,
        reader=reader,
    )
    return PreferenceLM(lm, adapter, head, dropout=input_dropout)
