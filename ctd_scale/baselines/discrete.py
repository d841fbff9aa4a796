"""P5 and TIGER on our backbone: the LLM reads the history as discrete item ids and writes the next one.

Every prefix is trained in one causal pass. Recommendations come from a beam search that the trie of existing ids
constrains, over the whole catalogue: what cannot be an item is never written.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from torch import Tensor, nn
from transformers import DynamicCache

from ctd_scale.artifacts import Run
from ctd_scale.baselines.codes import (
    Codes,
    CodeTrie,
    collaborative_codes,
    random_codes,
    semantic_codes,
    sequential_codes,
)
from ctd_scale.batches import InteractionLog
from ctd_scale.config import RunConfig
from ctd_scale.config_baselines import DiscreteConfig
from ctd_scale.llm.backbone import backbone_folder, compute_dtype, load_causal_lm, load_text_tokenizer
from ctd_scale.llm.model import word_scale
from ctd_scale.llm.prompts import make_prompts
from ctd_scale.llm.windows import training_windows
from ctd_scale.tasks import Task, by_length

NOTHING = -1  # a place without a symbol
CHUNK_TITLES, TITLE_TOKENS = 256, 32


class DiscreteLM(nn.Module):
    """A causal LM over the symbols of item ids; its word embeddings are frozen, symbols and their places are learned,
    and a symbol's embedding is also its output weight."""

    head_ids: Tensor

    def __init__(
        self,
        lm: Any,
        head_ids: Int[ndarray, "head"],
        codes: Codes,
        config: DiscreteConfig,
        max_history: int,
        half_precision: bool = False,
    ) -> None:
        super().__init__()
        self.lm, self.codes, self.trie, self.config = lm, codes, CodeTrie(codes), config
        self.max_history, self.half_precision = max_history, half_precision
        lm.requires_grad_(True)
        lm.get_input_embeddings().weight.requires_grad_(False)
        if lm.get_output_embeddings() is not None:
            lm.get_output_embeddings().weight.requires_grad_(False)
        token_dim, scale = lm.get_input_embeddings().weight.shape[1], word_scale(lm)
        self.register_buffer("head_ids", torch.from_numpy(head_ids.astype(np.int64)), persistent=False)
        self.symbols = nn.Parameter(scale * torch.randn(codes.alphabet, token_dim))
        self.places = nn.Parameter(torch.zeros(codes.length, token_dim))

    def embed(self, symbols: Int[Tensor, "batch length"]) -> Float[Tensor, "batch length token_dim"]:
        """Symbols of whole items with their place within an item's word."""
        places = torch.arange(symbols.shape[1], device=symbols.device) % self.codes.length
        return self.symbols[symbols.clamp_min(0)] + self.places[places]

    def read(
        self, embedded: Float[Tensor, "batch length token_dim"]
    ) -> tuple[Float[Tensor, "batch length token_dim"], DynamicCache]:
        """States after the instruction, which is read once, and what follows; keys and values of both."""
        cache = DynamicCache(config=self.lm.config)
        words = self.lm.get_input_embeddings()(self.head_ids[None])
        self.lm.base_model(inputs_embeds=words, past_key_values=cache, use_cache=True)
        cache.batch_repeat_interleave(len(embedded))
        read = self.lm.base_model(inputs_embeds=embedded, past_key_values=cache, use_cache=True)
        return read.last_hidden_state, cache

    def read_beams(
        self,
        embedded: Float[Tensor, "batch beams token_dim"],
        paths: Bool[Tensor, "batch beams read"],
        cache: DynamicCache,
    ) -> Float[Tensor, "batch beams token_dim"]:
        """States after one more symbol of each beam, all beams of a history in one row: a beam sees what is before
        the `read` latest symbols, and of these its own. So no history's keys are held once a beam."""
        before = cache.get_seq_length() + paths.shape[1] - paths.shape[2]
        place = before + int(paths[0, 0].sum()) - 1
        dtype = torch.bfloat16 if self.half_precision else embedded.dtype
        hidden = torch.zeros(paths.shape, dtype=dtype, device=paths.device)
        hidden.masked_fill_(~paths, torch.finfo(dtype).min)
        read = self.lm.base_model(
            inputs_embeds=embedded,
            position_ids=torch.full(paths.shape[:2], place, device=paths.device),
            attention_mask=F.pad(hidden, (before, 0))[:, None],
            past_key_values=cache,
            use_cache=True,
        )
        states: Tensor = read.last_hidden_state
        return states

    def logits(self, states: Float[Tensor, "*rows token_dim"]) -> Float[Tensor, "*rows alphabet"]:
        return (states @ self.symbols.T.to(states.dtype)).float()

    def forward(self, symbols: Int[Tensor, "batch length"]) -> Float[Tensor, ""]:
        """Cross-entropy of every symbol after the first item, summed; right-padded with -1."""
        states, _ = self.read(self.embed(symbols[:, :-1]))
        targets = symbols[:, 1:].clone()
        targets[:, : self.codes.length - 1] = NOTHING
        wanted = targets != NOTHING
        return F.cross_entropy(self.logits(states[wanted]), targets[wanted], reduction="sum")

    def score(self, users: ndarray, histories: list[ndarray]) -> Float[Tensor, "batch items"]:
        """Log-probabilities of the `beams` best items after each history, -inf for all others."""
        scores = torch.full((len(histories), len(self.codes.symbols)), -torch.inf)
        for rows, items, log_probs in self.searched(histories, constrained=True):
            row, beam = np.nonzero(items >= 0)
            scores[torch.from_numpy(rows[row]), torch.from_numpy(items[row, beam])] = log_probs.cpu()[row, beam]
        return scores

    def searched(self, histories: list[ndarray], constrained: bool) -> Iterator[tuple[ndarray, ndarray, Tensor]]:
        """(rows, items [rows, beams], log-probabilities) of histories of the same length at a time; -1 is no item."""
        kept = [history[-self.max_history :] for history in histories]
        lengths = np.array([len(history) for history in kept])
        for length in np.unique(lengths):
            rows = np.flatnonzero(lengths == length)
            for part in np.array_split(rows, -(-len(rows) // self.config.inference_batch)):
                symbols = np.stack([self.codes.symbols[kept[row]].ravel() for row in part])
                device = self.symbols.device
                with torch.autocast(device.type, torch.bfloat16, enabled=self.half_precision):
                    found = self.beam_search(torch.from_numpy(symbols).to(device), constrained)
                yield part, *found

    def beam_search(
        self, history: Int[Tensor, "batch length"], constrained: bool
    ) -> tuple[Int[ndarray, "batch beams"], Float[Tensor, "batch beams"]]:
        """The most probable words after the history, best first. Without the constraint some may be no item (-1)."""
        batch, alphabet = len(history), self.codes.alphabet
        states, cache = self.read(self.embed(history))
        states = states[:, -1:]
        totals = torch.zeros(batch, 1, device=history.device)
        nodes = np.zeros((batch, 1), np.int64)
        paths = torch.zeros(batch, 1, 0, dtype=torch.bool, device=history.device)
        for place in range(self.codes.length):
            log_probs = self.logits(states).log_softmax(dim=2)
            if constrained:
                allowed = torch.from_numpy(self.trie.allowed(np.maximum(nodes.ravel(), 0))).to(history.device)
                log_probs = log_probs.masked_fill(~allowed.view_as(log_probs), -torch.inf)
            candidates = (totals[:, :, None] + log_probs).flatten(1)
            width = min(self.config.beams, candidates.shape[1])
            totals, chosen = candidates.topk(width, dim=1)
            parent, symbol = (chosen // alphabet), chosen % alphabet
            before = np.take_along_axis(nodes, parent.cpu().numpy(), axis=1)
            nodes = self.trie.step(before.ravel(), symbol.cpu().numpy().ravel()).reshape(batch, width)
            # What is not allowed only fills up the width: it leads nowhere.
            nodes = np.where(np.isneginf(totals.cpu().numpy()), -1, nodes)
            if place + 1 < self.codes.length:
                own = torch.eye(width, dtype=torch.bool, device=history.device).expand(batch, -1, -1)
                paths = torch.cat([paths[torch.arange(batch)[:, None], parent], own], dim=2)
                states = self.read_beams(self.symbols[symbol] + self.places[place], paths, cache)
        return self.trie.item(nodes.ravel()).reshape(nodes.shape), totals


def assign_codes(name: str, run: Run, config: RunConfig, config_hash: str) -> None:
    """interactions -> codes/NAME: the words of the items. Made once, since clusters may come out otherwise on another
    machine: whoever trains, goes on or ranks reads the same."""
    interactions, started = run.fetch("interactions"), time.perf_counter()
    codes = make_codes(name, InteractionLog.load(interactions.path), config)
    inputs = {interactions.name: interactions.digest}
    facts = {"training_seconds": round(time.perf_counter() - started, 1)}
    with run.publish(f"codes/{name}", config_hash=config_hash, inputs=inputs, facts=facts) as folder:
        codes.save(folder)


def discrete_task(log: InteractionLog, config: RunConfig, name: str, codes: Codes) -> Task:
    """Windows of `llm.max_history` items as in the LLM stage, each item as its word."""
    settings: DiscreteConfig = getattr(config.baselines, name)
    backbone = backbone_folder(config.llm)
    text_tokenizer = load_text_tokenizer(backbone)
    head_ids = make_prompts(text_tokenizer, log.catalogue, 1).head
    lm = load_causal_lm(backbone, config.llm.num_hidden_layers)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    half_precision = compute_dtype(config.llm.dtype, device) == torch.bfloat16
    model = DiscreteLM(lm, head_ids, codes, settings, config.llm.max_history, half_precision)
    if codes.digits:
        words = text_tokenizer([str(digit) for digit in range(codes.alphabet)], add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            model.symbols.copy_(lm.get_input_embeddings()(torch.tensor([word[-1] for word in words])))

    def steps(epoch: int) -> list[ndarray]:
        windows = training_windows(log.train_lengths(), config.llm, config.seed, epoch)
        rows = np.stack([windows.users, windows.starts, windows.lengths], axis=1)
        random = np.random.default_rng((config.seed, 44, epoch))
        return [rows[step] for step in by_length(windows.lengths, settings.batch_size, random)]

    def collate(rows: ndarray, random: np.random.Generator) -> tuple[Tensor, ...]:
        longest = int(rows[:, 2].max()) + 1
        symbols = np.full((len(rows), longest * codes.length), NOTHING, np.int64)
        for number, (user, start, length) in enumerate(rows.tolist()):
            items = np.asarray(log.train_sequence(user)[start : start + length + 1])
            symbols[number, : len(items) * codes.length] = codes.symbols[items].ravel()
        return (torch.from_numpy(symbols),)

    return Task(
        model=model,
        steps=steps,
        collate=collate,
        supervised=lambda batch: int((batch[0][:, codes.length :] != NOTHING).sum()),
        groups=[
            {"params": [each for each in lm.parameters() if each.requires_grad]},
            {"params": [model.symbols, model.places], "lr": settings.symbol_learning_rate},
        ],
        half_precision=half_precision,
    )


def make_codes(name: str, log: InteractionLog, config: RunConfig) -> Codes:
    """The ids that the rival of that name gives to the items."""
    if name == "p5_random":
        return random_codes(log.num_items, config.seed)
    if name == "p5_sequential":
        return sequential_codes(log)
    if name == "p5_collaborative":
        return collaborative_codes(log, config.seed)
    backbone = backbone_folder(config.llm)
    lm, text_tokenizer = load_causal_lm(backbone, config.llm.num_hidden_layers), load_text_tokenizer(backbone)
    return semantic_codes(title_vectors(log, lm, text_tokenizer), config.seed)


@torch.inference_mode()
def title_vectors(log: InteractionLog, lm: Any, text_tokenizer: Any) -> Float[ndarray, "items token_dim"]:
    """Mean of the LM's last states over category and title, before it is trained on anything; every direction has
    unit variance, since a few large ones would otherwise decide all clusters."""
    catalogue, states = log.catalogue, []
    texts = [
        f"{category} {title}".strip() for category, title in zip(catalogue.categories, catalogue.titles, strict=True)
    ]
    for start in range(0, len(texts), CHUNK_TITLES):
        encoded = text_tokenizer(
            texts[start : start + CHUNK_TITLES], add_special_tokens=False, truncation=True, max_length=32
        )
        lengths = np.array([len(ids) for ids in encoded["input_ids"]])
        ids = np.zeros((len(lengths), max(1, lengths.max())), np.int64)
        for row, words in zip(ids, encoded["input_ids"], strict=True):
            row[: len(words)] = words
        read = lm.base_model(input_ids=torch.from_numpy(ids)).last_hidden_state.float()
        kept = torch.from_numpy(np.arange(ids.shape[1]) < lengths[:, None]).float()[..., None]
        states.append(((read * kept).sum(dim=1) / kept.sum(dim=1).clamp_min(1)).numpy())
    vectors = np.concatenate(states)
    return np.asarray((vectors - vectors.mean(axis=0)) / vectors.std(axis=0).clip(1e-6))


@torch.inference_mode()
def valid_share(model: DiscreteLM, histories: list[ndarray]) -> float:
    """Share of the beams that are items when nothing constrains them."""
    found = [items for _, items, _ in model.searched(histories, constrained=False)]
    return float(np.concatenate([(items >= 0).ravel() for items in found]).mean())


def id_facts(model: DiscreteLM, histories: list[ndarray]) -> dict[str, float]:
    """What ids cost: symbols per item, symbols that the vocabulary lacked, beams that are items without the trie."""
    added = 0 if model.codes.digits else model.codes.alphabet
    return {
        "id_length": model.codes.length,
        "added_symbols": added,
        "valid_share": round(valid_share(model, histories), 4),
    }
