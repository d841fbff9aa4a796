"""What fine-tuning the LLM and exporting preferences will need: real batches through the real model, then counting."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ctd_scale.batches import SPLITS, Catalogue, InteractionLog
from ctd_scale.config import RunConfig
from ctd_scale.estimates import Estimate, anonymous_memory, seconds_per_call
from ctd_scale.llm.backbone import compute_dtype, hidden_size, load_text_tokenizer
from ctd_scale.llm.collator import Collator, Row
from ctd_scale.llm.descriptions import TEXT_DIM
from ctd_scale.llm.history import HistoryModel, new_head
from ctd_scale.llm.prompts import Prompts, make_prompts
from ctd_scale.llm.train import new_model, parameter_groups
from ctd_scale.llm.windows import export_windows, training_windows
from ctd_scale.sequence import latest_first, prefixes

# Users whose windows are counted; the rest is taken to be alike.
SAMPLED_USERS = 50_000
# Titles are not read: each is taken to be as long as it may be.
TITLE = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen"
TITLES = 1000


def plan_llm(log: InteractionLog, config: RunConfig, backbone: Path) -> tuple[Estimate, Estimate]:
    """train_llm and export_preferences. DeepSpeed's own work is left out of the step."""
    settings = config.llm
    before = anonymous_memory()
    lengths = log.train_lengths()
    sampled = lengths[:: max(1, len(lengths) // SAMPLED_USERS)]
    scale = len(lengths) / len(sampled)
    names = [TITLE] * TITLES
    prompts = make_prompts(load_text_tokenizer(backbone), Catalogue(names, names, names), settings.max_title_tokens)
    token_dim = hidden_size(backbone)
    tokens = np.random.default_rng(0).standard_normal((TITLES, config.tokenizer.num_ways, token_dim), np.float32)
    collator = Collator(prompts, tokens)
    block = int(collator.block_sizes[0])

    trained, exported = training_windows(sampled, settings, config.seed, 0), export_windows(sampled, settings)
    read_in_training = scale * float((block * trained.lengths).sum())
    prefixes = scale * float((exported.lengths - exported.firsts).sum())
    histories = sum(len(log.split_users(split)) for split in SPLITS)
    typical = max(1, round(float(trained.lengths.mean())) if len(trained) else 1)
    per_history = block * max(1.0, float(np.minimum(lengths, settings.max_history).mean()))
    validated = min(settings.validation_users, len(log.split_users("validation")))
    read_in_validation = settings.epochs * validated * per_history
    read_in_export = scale * float((block * exported.lengths).sum()) + histories * per_history

    catalogue = min(log.num_items, settings.full_softmax_limit)
    vectors = np.random.default_rng(0).standard_normal((catalogue, settings.preference_dim)).astype(np.float32)
    model = new_model(settings, backbone, vectors, config.seed, _repeated(prompts, catalogue))
    model = model.to(compute_dtype(settings.dtype, torch.device("cpu")))
    optimizer = torch.optim.AdamW(parameter_groups(model, settings), fused=True)
    rows = _rows(collator, typical, max(1, settings.batch_tokens // (block * typical)), settings.text_every)
    batch = collator(rows)
    negatives = None
    if log.num_items > settings.full_softmax_limit:
        negatives = torch.randint(catalogue, (settings.sampled_negatives,))

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        torch.stack(model(batch, negatives)).sum().backward()
        optimizer.step()

    stepping = seconds_per_call(step, budget=10.0)
    steps = settings.epochs * read_in_training / batch.input_ids.numel()
    memory = anonymous_memory() - before
    with torch.inference_mode():
        reading = seconds_per_call(lambda: model.preferences(batch)) / batch.input_ids.numel()
        speaking = _seconds_per_text(model.lm, prompts, len(prompts.head) + block * typical, token_dim, config)
    weights = sum(parameter.numel() for parameter in model.parameters())
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    spoken = histories * speaking if settings.generate_texts else 0.0
    workers = config.resources.llm.num_workers
    return (
        Estimate(
            "train_llm",
            steps * stepping + read_in_validation * reading,
            memory + 8.0 * trainable,  # fp32 master weights beside what was measured
            4.0 * weights + 2 * 16.0 * trainable,
            f"{steps:,.0f} steps of {stepping:.2f} s, {read_in_training:,.0f} tokens an epoch",
        ),
        Estimate(
            "export_preferences",
            (read_in_export * reading + spoken) / workers,
            2.0 * weights + 3 * 4.0 * (prefixes + histories) * settings.preference_dim,
            4.0 * (prefixes + histories) * settings.preference_dim,
            f"{prefixes:,.0f} prefixes, {read_in_export * reading:.0f} s to read, {spoken:.0f} s to write texts",
        ),
    )


def plan_history(log: InteractionLog, config: RunConfig) -> Estimate:
    """train_history, for all of its epochs, most of which it may do without."""
    settings, dim, random = config.history, config.llm.preference_dim, np.random.default_rng(0)
    before = anonymous_memory()
    lengths = log.train_lengths()
    sampled = lengths[:: max(1, len(lengths) // SAMPLED_USERS)]
    ends = np.minimum(prefixes(sampled)[1], config.llm.max_history)
    ends = ends if len(ends) else np.ones(1, np.int64)  # a log of which nothing can be learned
    samples = len(lengths) / len(sampled) * len(ends)
    catalogue = min(log.num_items, config.llm.full_softmax_limit)
    if log.num_items > catalogue:
        config = config.model_copy(update={"llm": config.llm.model_copy(update={"full_softmax_limit": 0})})
    described = torch.randn(catalogue, TEXT_DIM) if config.llm.item_vectors == "joined" else None
    head = new_head(config, random.standard_normal((catalogue, dim)).astype(np.float32), described)
    model = HistoryModel(head, config.llm)
    optimizer = torch.optim.Adam([each for each in model.parameters() if each.requires_grad], fused=True)
    read = [random.integers(0, catalogue, size) for size in random.choice(ends, settings.batch_size)]
    recent = torch.from_numpy(latest_first(read, config.llm.max_history))
    targets = torch.from_numpy(random.integers(0, catalogue, settings.batch_size))

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        model(recent, targets, torch.zeros(settings.batch_size, dtype=torch.long)).backward()
        optimizer.step()

    stepping = seconds_per_call(step)
    steps = settings.epochs * samples / settings.batch_size
    # Of each further item its vector, the gradient and two moments, and what describes it.
    rest = 4.0 * (log.num_items - catalogue) * (4 * dim + (0 if described is None else TEXT_DIM))
    weights, averaged = 4.0 * log.num_items * dim, settings.ema_decay > 0
    rest += weights * (3 if averaged else 1)  # the best; the average, and what it takes the place of while it ranks
    return Estimate(
        "train_history",
        steps * stepping,
        anonymous_memory() - before + rest + 24.0 * samples,  # users, ends and lengths of all prefixes
        # Two checkpoints of weights, moments, the best twice, and the average.
        (12 if averaged else 10) * weights,
        f"at most {steps:,.0f} steps of {1000 * stepping:.0f} ms, {samples:,.0f} histories an epoch",
    )


def _repeated(prompts: Prompts, count: int) -> Prompts:
    """The first item's title and answer, so many times."""
    title, answer = prompts.title(0), prompts.answer(0)
    places = np.arange(count + 1)
    return replace(
        prompts,
        titles=np.tile(title, count),
        title_offsets=places * len(title),
        answers=np.tile(answer, count),
        answer_offsets=places * len(answer),
    )


def _rows(collator: Collator, length: int, count: int, text_every: int) -> list[Row]:
    random = np.random.default_rng(0)
    return [
        Row(
            random.integers(0, TITLES, length),
            random.integers(0, TITLES, length),
            answer_item=0 if number % text_every == 0 else -1,
        )
        for number in range(count)
    ]


def _seconds_per_text(lm: Any, prompts: Prompts, length: int, token_dim: int, config: RunConfig) -> float:
    """One prompt pass and `max_new_tokens` steps of one word, shared by a batch."""
    batch = config.llm.inference_batch
    dtype = next(lm.parameters()).dtype
    prompt = torch.zeros(batch, length + len(prompts.tail), token_dim, dtype=dtype)
    began = seconds_per_call(lambda: lm.base_model(inputs_embeds=prompt, use_cache=True), warm_up=0, at_most=1)
    cache = lm.base_model(inputs_embeds=prompt, use_cache=True).past_key_values
    word = torch.zeros(batch, 1, dtype=torch.long)

    def say() -> None:
        states = lm.base_model(input_ids=word, past_key_values=cache, use_cache=True).last_hidden_state
        lm.get_output_embeddings()(states[:, -1].contiguous())

    return (began + config.llm.max_new_tokens * seconds_per_call(say, at_most=4)) / batch
