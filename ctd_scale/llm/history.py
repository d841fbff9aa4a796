"""Train what reads the items of a history, and the item vectors with it, before the LLM is there.

Attention over item vectors wants another training than an LLM: every prefix for itself, hundreds of them a step, many
epochs, much dropout. Trained beside the LLM it stays far behind what it reaches alone (docs/log.md), and alone it is
cheap. The LLM then learns what to add.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from numpy import ndarray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ctd_scale import training
from ctd_scale.artifacts import Artifact, Run
from ctd_scale.batches import InteractionLog, NodeArrays
from ctd_scale.config import LLMConfig, RunConfig
from ctd_scale.llm.backbone import backbone_folder, load_text_tokenizer
from ctd_scale.llm.descriptions import describe_items
from ctd_scale.llm.losses import sampled_softmax_loss, softmax_loss
from ctd_scale.llm.model import PreferenceHead
from ctd_scale.llm.prompts import make_prompts
from ctd_scale.llm.reader import HistoryReader
from ctd_scale.llm.vectors import initial_vectors
from ctd_scale.sequence import latest_first, prefixes
from ctd_scale.tasks import FACTS, WEIGHTS, Task, by_length, restore, train_task

VECTOR_SCALE = 0.02  # of the vectors at the start: small beside what the reader says of them
HISTORY, READER = "history.safetensors", "reader."


class HistoryModel(nn.Module):
    """A preference head without an LLM: b(v_1, v_2, ...) alone, trained with the vectors v."""

    def __init__(self, head: PreferenceHead, config: LLMConfig) -> None:
        super().__init__()
        self.head, self.config = head, config
        head.project.requires_grad_(False)

    def forward(
        self, recent: Int[Tensor, "batch length"], targets: Int[Tensor, "batch"], seeds: Int[Tensor, "batch"]
    ) -> Float[Tensor, ""]:
        """The preference loss, summed. In a large catalogue negatives are drawn from the first of `seeds`, which all
        rows of a step share: each worker draws the same."""
        head, items = self.head, len(self.head.vectors)
        preferences = head.begin(recent)
        if items <= self.config.full_softmax_limit or not len(targets):
            return softmax_loss(preferences, head.item_vectors(), targets, head.temperature)
        random = np.random.default_rng(int(seeds[0]))
        drawn = torch.from_numpy(random.integers(0, items, self.config.sampled_negatives)).to(targets.device)
        return sampled_softmax_loss(preferences, head.item_vectors, items, targets, head.temperature, drawn)

    def score(self, users: ndarray, histories: list[ndarray]) -> Float[Tensor, "batch items"]:
        """The cosine of what each history says with every item."""
        recent = torch.from_numpy(latest_first(histories, self.config.max_history)).to(self.head.vectors.device)
        return F.normalize(self.head.begin(recent), dim=1) @ F.normalize(self.head.item_vectors(), dim=1).T


def new_head(
    config: RunConfig, embeddings: ndarray, descriptions: Float[Tensor, "items text_dim"] | None
) -> PreferenceHead:
    """A head without an LLM, the same on every worker and on every start."""
    training.seed_all(config.seed)
    llm, history = config.llm, config.history
    return PreferenceHead(
        1,
        initial_vectors(torch.tensor(np.asarray(embeddings)), llm, VECTOR_SCALE),
        llm.temperature,
        learn_vectors=llm.item_vectors != "collaborative",
        recency=False,
        descriptions=descriptions,
        reader=HistoryReader(llm.preference_dim, llm.max_history, history.num_blocks, history.dropout),
    )


def history_task(log: InteractionLog, config: RunConfig, head: PreferenceHead) -> Task:
    """Every training prefix once an epoch. Raises ValueError where there is none."""
    users, ends = prefixes(log.train_lengths())
    if not len(users):
        raise ValueError("no user has two training interactions or more, so there is nothing to predict")
    most = config.llm.max_history

    def collate(chosen: ndarray, random: np.random.Generator) -> tuple[Tensor, ...]:
        read, targets = [], []
        for user, end in zip(users[chosen].tolist(), ends[chosen].tolist(), strict=True):
            sequence = log.train_sequence(user)
            read.append(np.asarray(sequence[max(0, end - most) : end]))
            targets.append(int(sequence[end]))
        seeds = torch.full((len(chosen),), int(random.integers(1 << 62)))
        return torch.from_numpy(latest_first(read, most)), torch.tensor(targets), seeds

    lengths, batch_size, seed = np.minimum(ends, most), config.history.batch_size, config.seed
    return Task(
        model=HistoryModel(head, config.llm),
        steps=lambda epoch: by_length(lengths, batch_size, np.random.default_rng((seed, 45, epoch))),
        collate=collate,
        supervised=lambda batch: len(batch[1]),
    )


def train_history(run: Run, config: RunConfig, config_hash: str) -> None:
    """interactions, embeddings -> models/history: reader, temperature and item vectors, descriptions merged into these,
    under the names that they have in a preference head. Empty where `history.num_blocks` is 0."""
    interactions, embeddings = run.fetch("interactions"), run.fetch("embeddings")
    run.require_made_from(embeddings, interactions)
    inputs = {artifact.name: artifact.digest for artifact in (interactions, embeddings)}
    facts: dict[str, Any] = {"num_blocks": config.history.num_blocks}
    found: dict[str, Tensor] = {}
    if config.history.num_blocks:
        arguments = {
            "config": config.model_dump(),
            "backbone": str(backbone_folder(config.llm)),
            "interactions": str(interactions.path),
            "embeddings": str(embeddings.path),
        }
        export = training.run_training(
            train_loop, arguments, run=run, stage="history", key=config_hash, resources=config.resources.history
        )
        facts |= {**json.loads((export / FACTS).read_text()), **training.usage(run, "history")}
        head = load_untrained(arguments)[2]
        restore(HistoryModel(head, config.llm), load_file(export / WEIGHTS))
        with torch.no_grad():
            found = {name: value for name, value in head.state_dict().items() if name.startswith((READER, "log_"))}
            found["vectors"] = head.item_vectors().contiguous()
    with run.publish("models/history", config_hash=config_hash, inputs=inputs, facts=facts) as folder:
        if found:
            save_file(found, folder / HISTORY)


def history_weights(history: Artifact) -> Path | None:
    """The file of a published reader, or None where there is none."""
    return history.path / HISTORY if (history.path / HISTORY).exists() else None


def load_untrained(arguments: dict[str, Any]) -> tuple[RunConfig, InteractionLog, PreferenceHead]:
    """The settings, what is trained on, and what is trained."""
    config, log = RunConfig.model_validate(arguments["config"]), InteractionLog.load(Path(arguments["interactions"]))
    descriptions = None
    if config.llm.item_vectors == "joined":
        text_tokenizer = load_text_tokenizer(Path(arguments["backbone"]))
        descriptions = describe_items(make_prompts(text_tokenizer, log.catalogue, config.llm.max_title_tokens))
    embeddings = NodeArrays.load(Path(arguments["embeddings"])).items
    return config, log, new_head(config, embeddings, descriptions)


def train_loop(arguments: dict[str, Any]) -> None:
    """One worker: its share of every global batch."""
    device = training.prepare_worker(arguments, int(arguments["config"]["seed"]))
    config, log, head = load_untrained(arguments)
    train_task(
        history_task(log, config, head),
        config.history,
        log,
        arguments,
        seed=config.seed,
        mask_seen=config.evaluation.mask_seen,
        device=device,
    )
