"""Fine-tune the preference model with DeepSpeed ZeRO inside Ray Train."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from ctd_scale import training
from ctd_scale.artifacts import Artifact, ArtifactError, Run
from ctd_scale.batches import InteractionLog, NodeArrays
from ctd_scale.config import LLMConfig, RunConfig
from ctd_scale.llm import zero
from ctd_scale.llm.backbone import (
    backbone_folder,
    compute_dtype,
    hidden_size,
    load_causal_lm,
    load_text_tokenizer,
)
from ctd_scale.llm.collator import Collator, LLMBatch, Row
from ctd_scale.llm.descriptions import describe_items
from ctd_scale.llm.history import READER, history_weights
from ctd_scale.llm.model import PreferenceLM, build_preference_lm
from ctd_scale.llm.prompts import Prompts, make_prompts
from ctd_scale.llm.reader import reader_of
from ctd_scale.llm.tokens import load_item_tokens, token_source
from ctd_scale.llm.validation import Best, validation_ndcg
from ctd_scale.llm.vectors import initial_vectors
from ctd_scale.llm.weights import BACKBONE, export_model
from ctd_scale.llm.windows import Windows, pack, plan_steps, training_windows
from ctd_scale.ranking import validation_users
from ctd_scale.terminal import console

FACTS = "facts.json"


def train_llm(
    run: Run,
    config: RunConfig,
    config_hash: str,
    target: str = "models/llm",
    stage: str = "llm",
    history: Artifact | None = None,
) -> None:
    """interactions, embeddings, tokens, models/history -> models/llm (backbone, text tokenizer, adapter, head with item
    vectors).

    A variant that `config.llm` describes goes by other names: its artifact `target`, its checkpoints and logs `stage`.
    """
    interactions, embeddings = (run.fetch(name) for name in ("interactions", "embeddings"))
    run.require_made_from(embeddings, interactions)
    tokens = token_source(run, config.llm)
    backbone = backbone_folder(config.llm)
    token_dim = hidden_size(backbone)
    made_dim = int(tokens.manifest["facts"].get("token_dim", token_dim))
    if made_dim != token_dim:
        raise ArtifactError(
            f"tokens has token_dim={made_dim} but the LLM's hidden_size={token_dim}; rerun train_tokenizer"
        )
    read = None if history is None else history_weights(history)
    dtype = compute_dtype(config.llm.dtype, torch.device("cuda" if config.resources.llm.use_gpu else "cpu"))
    shown = json.dumps(zero.deepspeed_config(config.llm, dtype))
    console.print(f"  DeepSpeed: {shown}", highlight=False, soft_wrap=True, style="dim")
    export = training.run_training(
        train_loop,
        {
            "config": config.llm.model_dump(),
            "seed": config.seed,
            "mask_seen": config.evaluation.mask_seen,
            "backbone": str(backbone),
            "interactions": str(interactions.path),
            "embeddings": str(embeddings.path),
            "tokens": str(tokens.path),
            "history": None if read is None else str(read),
            "history_dropout": config.history.dropout,
        },
        run=run,
        stage=stage,
        key=config_hash,
        resources=config.resources.llm,
    )
    made_from = [interactions, embeddings, tokens, *([] if history is None else [history])]
    inputs = {artifact.name: artifact.digest for artifact in made_from}
    facts = {
        "cond_dim": config.llm.preference_dim,
        "token_dim": token_dim,
        "max_history": config.llm.max_history,
        "max_title_tokens": config.llm.max_title_tokens,
        "use_user_tokens": config.llm.use_user_tokens,
        **json.loads((export / FACTS).read_text()),
        **training.usage(run, stage),
    }
    (export / FACTS).unlink()
    with run.publish(target, config_hash=config_hash, inputs=inputs, facts=facts) as folder:
        shutil.copytree(export, folder, dirs_exist_ok=True)


@dataclass(frozen=True)
class Epoch:
    """Windows, the tokens of each, and which of them go into which optimizer step."""

    windows: Windows
    sizes: np.ndarray
    batches: list[np.ndarray]


@dataclass(frozen=True)
class Plan:
    """Every batch of the whole training, known before it begins: the schedule needs the true number of steps."""

    epochs: list[Epoch]

    @property
    def total_steps(self) -> int:
        return sum(len(epoch.batches) for epoch in self.epochs)

    @property
    def epoch_ends(self) -> list[int]:
        """After which step each epoch ends, counted from 1."""
        return np.cumsum([len(epoch.batches) for epoch in self.epochs]).tolist()

    def step(self, step: int) -> tuple[Windows, np.ndarray]:
        """Windows of the epoch and the numbers of those in optimizer step `step` (0-based over all epochs)."""
        for epoch in self.epochs:
            if step < len(epoch.batches):
                return epoch.windows, epoch.batches[step]
            step -= len(epoch.batches)
        raise IndexError(f"step {step} is past the end of the plan")

    def facts(self, parts: int) -> dict[str, float]:
        """Preferences that are supervised, tokens that are read for them, and the share of padding beside these,
        where each step is read in so many parts."""
        tokens, places = 0, 0
        for epoch in self.epochs:
            for sizes in (epoch.sizes[batch] for batch in epoch.batches):
                for lines in pack(sizes, parts):
                    filled = [int(sizes[line].sum()) for line in lines if line]
                    tokens, places = tokens + sum(filled), places + len(filled) * max(filled, default=0)
        supervised = sum(int((epoch.windows.lengths - epoch.windows.firsts).sum()) for epoch in self.epochs)
        return {"supervised": supervised, "tokens": tokens, "padding_share": round(1 - tokens / places, 4)}


def make_plan(log: InteractionLog, collator: Collator, config: LLMConfig, seed: int) -> Plan:
    """Windows and steps of every epoch, a function of the seed alone: a run may go on with another number of workers.
    Raises ValueError where no user has two training interactions."""
    epochs = []
    for number in range(config.epochs):
        windows = training_windows(log.train_lengths(), config, seed, number)
        if not len(windows):
            raise ValueError("no user has two training interactions or more, so there is nothing to predict")
        sizes = collator.sizes([window_row(log, windows, index) for index in range(len(windows))])
        random = np.random.default_rng((seed, 11, number))
        epochs.append(Epoch(windows, sizes, plan_steps(sizes, config.batch_tokens, random)))
    return Plan(epochs)


def window_row(log: InteractionLog, windows: Windows, index: int) -> Row:
    """What is read and what is predicted in one window: every input's successor is a target."""
    user, start = int(windows.users[index]), int(windows.starts[index])
    length, first = int(windows.lengths[index]), int(windows.firsts[index])
    sequence = log.train_sequence(user)
    return Row(
        items=np.asarray(sequence[start : start + length]),
        targets=np.asarray(sequence[start + first + 1 : start + length + 1]),
        answer_item=int(sequence[start + length]) if windows.answers[index] else -1,
        user=user,
    )


def warmup_then_linear(config: LLMConfig, total_steps: int) -> Callable[[int], float]:
    """Learning-rate factor of a step: linear warm-up, then linear decay to a twentieth."""
    warmup = max(1, int(config.warmup_fraction * total_steps))

    def factor(step: int) -> float:
        return min((step + 1) / warmup, 1.0) * max(0.05, 1.0 - step / max(1, total_steps))

    return factor


def learning_rates(config: LLMConfig, total_steps: int) -> list[Callable[[int], float]]:
    """One factor per group of `parameter_groups`. Where tokens are read in the second half alone, the backbone rests
    then."""
    factor = warmup_then_linear(config, total_steps)
    if config.token_schedule != "second_half":
        return [factor, factor]
    return [lambda step: factor(step) if step < total_steps / 2 else 0.0, factor]


def dropped_share(config: LLMConfig, progress: float) -> float:
    """Share of items whose tokens are not read at this point of training, `progress` in [0, 1)."""
    if config.token_schedule == "curriculum":
        return max(config.token_dropout, 1.0 - progress)
    return 1.0 if config.token_schedule == "second_half" and progress < 0.5 else config.token_dropout


def train_loop(arguments: dict[str, Any]) -> None:
    """One worker: its share of every global batch through one causal pass, ZeRO does the rest."""
    if not arguments["resources"]["use_gpu"]:
        os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ["DEEPSPEED_DISABLE_NVML"] = "1"
    zero.prepare_extensions()
    import deepspeed  # reads the environment on import

    config, seed = LLMConfig.model_validate(arguments["config"]), int(arguments["seed"])
    device = training.prepare_worker(arguments, seed)
    dtype = compute_dtype(config.dtype, device)
    rank, workers = training.rank(), training.world_size()
    log = InteractionLog.load(Path(arguments["interactions"]))
    backbone = Path(arguments["backbone"])
    tokens = load_item_tokens(Path(arguments["tokens"]), config, hidden_size(backbone))
    text_tokenizer = load_text_tokenizer(backbone)
    prompts = make_prompts(text_tokenizer, log.catalogue, config.max_title_tokens)
    collator = Collator(prompts, tokens.items, tokens.users if config.use_user_tokens else None)
    plan = make_plan(log, collator, config, seed)

    item_embeddings = NodeArrays.load(Path(arguments["embeddings"])).items
    history = {} if arguments["history"] is None else load_file(arguments["history"])
    make_model = partial(
        new_model, config, backbone, item_embeddings, seed, prompts, history, arguments["history_dropout"]
    )
    model = make_model()
    deepspeed.init_distributed(dist_backend="nccl" if device.type == "cuda" else "gloo")
    optimizer = torch.optim.AdamW(parameter_groups(model, config), betas=(0.9, 0.98), fused=True)
    factors = learning_rates(config, plan.total_steps)
    users = validation_users(log, config.validation_users, seed)
    step, best = 0, Best()
    validated: dict[str, torch.Tensor] = {}
    with training.latest_checkpoint(arguments) as folder, zero.opened(folder, config, arguments["logs"]) as saved:
        engine, _, _, _ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            lr_scheduler=lambda wrapped: torch.optim.lr_scheduler.LambdaLR(wrapped, factors),
            config=zero.deepspeed_config(config, dtype, universal=saved is not None and saved.universal),
        )
        if folder is not None and saved is not None:
            zero.load(engine, saved)
            step, best = saved.step, Best.load(folder)
    engine.train()

    def write(folder: Path) -> None:
        zero.save(engine, folder, step, config)
        if rank == 0:
            best.save(folder)

    parts = workers * config.accumulation_steps
    steplog = training.StepLog(arguments["logs"], plan.total_steps)
    while step < plan.total_steps:
        windows, numbers = plan.step(step)
        rows = [window_row(log, windows, index) for index in numbers]
        dropped = dropped_share(config, step / plan.total_steps)
        kept = kept_tokens(rows, collator, dropped, np.random.default_rng((seed, 14, step)))
        negatives = None
        if len(log.catalogue) > config.full_softmax_limit:
            random = np.random.default_rng((seed, 12, step))
            negatives = torch.from_numpy(random.integers(0, len(log.catalogue), config.sampled_negatives)).to(device)
        supervised = sum(len(row.targets) for row in rows)
        spoken = sum(len(prompts.answer(row.answer_item)) for row in rows if row.answer_item >= 0)
        # Dropout is drawn anew in every step, and the same where a step is made again.
        torch.manual_seed((seed * 1_000_003 + step) * workers + rank)
        losses, counts = torch.zeros(2, device=device), [0, 0]
        for lines in pack(collator.sizes(rows), parts)[rank::workers]:
            # Where a step has fewer rows than parts, an idle one reads along and counts nothing.
            mine = [line for line in lines if line]
            counted = float(len(mine) > 0)
            mine = mine or [[0]]
            batch = collator.packed([[rows[index] for index in line] for line in mine])
            batch = drop_tokens(
                batch, np.concatenate([kept[index] for line in mine for index in line]), collator.num_ways
            )
            sums = engine(batch.to(device), negatives)
            # Means over the *global* batch: ZeRO averages over workers and parts, so each gives its sum times both.
            preference_loss, text_loss = sums[0] / supervised, sums[1] / max(1, spoken)
            engine.backward(counted * parts * (preference_loss + config.text_weight * text_loss))
            engine.step()
            losses += counted * torch.stack(sums).detach()
            if counted:
                counts = [counts[0] + len(batch.targets), counts[1] + len(batch.answer_ids)]
        step += 1
        curves = {
            "preference_loss": losses[0] / max(1, counts[0]),
            "text_loss": losses[1] / max(1, counts[1]),
            "temperature": engine.module.head.temperature.detach(),
        }
        if step in plan.epoch_ends and len(users):
            ndcg, share = validation_ndcg(engine, log, collator, users, config, mask_seen=arguments["mask_seen"])
            if ndcg > best.ndcg:
                epoch = plan.epoch_ends.index(step) + 1
                best = replace(Best.of(epoch, ndcg, engine.module, share), validated=best.validated)
            best.validated[str(step)] = ndcg
            training.report({"step": step, "validated": dict(best.validated)})
            validated = {"validation_ndcg": torch.tensor(ndcg), "best_ndcg": torch.tensor(best.ndcg)}
        steplog.step(step, curves | validated)
        if step % config.checkpoint_every_steps == 0 and step < plan.total_steps:
            training.report_checkpoint({"step": step}, write, every_rank=True)

    if not len(users):  # nobody to choose by: the last
        best = Best.of(config.epochs, Best.ndcg, engine.module)

    def write_final(folder: Path) -> None:
        write(folder)
        if rank == 0:
            target = folder / training.EXPORT
            export_model(target, make_model(), best.weights, dtype)
            text_tokenizer.save_pretrained(target / BACKBONE)
            prompts.save(target, config.max_title_tokens)
            (target / FACTS).write_text(json.dumps({**plan.facts(parts), **best.facts()}))

    training.report_checkpoint({"step": step, "validated": dict(best.validated)}, write_final, every_rank=True)
    steplog.close()


def new_model(
    config: LLMConfig,
    backbone: Path,
    item_embeddings: np.ndarray,
    seed: int,
    prompts: Prompts | None = None,
    history: Mapping[str, torch.Tensor] | None = None,
    history_dropout: float = 0.0,
) -> PreferenceLM:
    """The model before training; the same on every worker and on every start. Joined item vectors need the `prompts`,
    from which items are described.

    With a `history` (what `train_history` publishes) reader and item vectors are its, and rest; a preference is what
    they make of it until W learns something else."""
    training.seed_all(seed)
    lm = load_causal_lm(backbone, config.num_hidden_layers)
    if config.gradient_checkpointing:
        lm.activation_checkpointing_enable({"use_reentrant": False})
    if config.trainable == "lora":
        from peft import LoraConfig, inject_adapter_in_model

        lm.requires_grad_(False)
        lora = LoraConfig(
            r=config.lora_rank, lora_alpha=config.lora_alpha, target_modules="all-linear", exclude_modules=["lm_head"]
        )
        lm = inject_adapter_in_model(lora, lm)
    vectors = initial_vectors(torch.tensor(np.asarray(item_embeddings)), config)
    projected_dim = item_embeddings.shape[1] if config.item_tokens == "projected" else None
    reader, descriptions = reader_of(history or {}, READER, history_dropout), None
    if reader is None and config.item_vectors == "joined":
        if prompts is None:
            raise ValueError("llm.item_vectors='joined' needs the prompts of the catalogue")
        descriptions = describe_items(prompts)
    model = build_preference_lm(
        lm,
        vectors,
        config.temperature,
        learn_vectors=config.item_vectors != "collaborative" and reader is None,
        projected_dim=projected_dim,
        recency=config.recency,
        input_dropout=config.input_dropout,
        head_dropout=config.head_dropout,
        descriptions=descriptions,
        reader=reader,
    )
    if reader is not None:
        reader.requires_grad_(False)
        torch.nn.init.zeros_(model.head.project.weight)
        model.head.load_state_dict(dict(history or {}), strict=False)
    return model


def parameter_groups(model: PreferenceLM, config: LLMConfig) -> list[dict[str, Any]]:
    """The backbone at its own rate; adapter and head, which start from nothing, at a higher one."""
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    backbone = [parameter for name, parameter in trained if name.startswith("lm.")]
    fresh = [parameter for name, parameter in trained if not name.startswith("lm.")]
    return [
        {"params": backbone, "lr": config.learning_rate, "weight_decay": config.weight_decay},
        {"params": fresh, "lr": config.head_learning_rate, "weight_decay": config.weight_decay},
    ]


def kept_tokens(rows: Sequence[Row], collator: Collator, share: float, random: np.random.Generator) -> list[np.ndarray]:
    """Which blocks of continuous tokens each row keeps; drawn for the whole global batch, whoever reads the row."""
    return [random.random(collator.num_blocks(row)) >= share for row in rows]


def drop_tokens(batch: LLMBatch, kept: np.ndarray, num_ways: int) -> LLMBatch:
    """Zero the continuous tokens of the blocks that are not kept, so that the titles are read too."""
    if kept.all():
        return batch
    return replace(batch, token_values=batch.token_values * torch.from_numpy(kept).repeat_interleave(num_ways)[:, None])
