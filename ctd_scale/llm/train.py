"""Fine-tune the preference model with DeepSpeed ZeRO inside Ray Train."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ctd_scale import training
from ctd_scale.artifacts import ArtifactError, Run
from ctd_scale.batches import InteractionLog, NodeArrays
from ctd_scale.config import LLMConfig, RunConfig
from ctd_scale.llm.backbone import backbone_folder, hidden_size, load_causal_lm, load_text_tokenizer
from ctd_scale.llm.collator import Collator, LLMBatch, Row
from ctd_scale.llm.model import PreferenceLM, build_preference_lm
from ctd_scale.llm.prompts import make_prompts
from ctd_scale.llm.weights import BACKBONE, export_model
from ctd_scale.llm.windows import Windows, plan_batches, training_windows

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def train_llm(run: Run, config: RunConfig, config_hash: str) -> None:
    """interactions, embeddings, tokens -> models/llm (backbone, text tokenizer, adapter, head with item vectors)."""
    interactions, embeddings, tokens = (run.fetch(name) for name in ("interactions", "embeddings", "tokens"))
    run.require_made_from(embeddings, interactions)
    run.require_made_from(tokens, embeddings)
    backbone = backbone_folder(config.llm)
    token_dim, expected = int(tokens.manifest["facts"]["token_dim"]), hidden_size(backbone)
    if token_dim != expected:
        raise ArtifactError(
            f"tokens has token_dim={token_dim} but the LLM's hidden_size={expected}; rerun train_tokenizer"
        )
    export = training.run_training(
        train_loop,
        {
            "config": config.llm.model_dump(),
            "seed": config.seed,
            "backbone": str(backbone),
            "interactions": str(interactions.path),
            "embeddings": str(embeddings.path),
            "tokens": str(tokens.path),
        },
        run=run,
        stage="llm",
        key=config_hash,
        resources=config.resources.llm,
    )
    inputs = {artifact.name: artifact.digest for artifact in (interactions, embeddings, tokens)}
    facts = {
        "cond_dim": config.llm.preference_dim,
        "token_dim": token_dim,
        "num_ways": tokens.manifest["facts"]["num_ways"],
        "max_history": config.llm.max_history,
        "max_title_tokens": config.llm.max_title_tokens,
        "use_user_tokens": config.llm.use_user_tokens,
    }
    with run.publish("models/llm", config_hash=config_hash, inputs=inputs, facts=facts) as folder:
        shutil.copytree(export, folder, dirs_exist_ok=True)


def deepspeed_config(config: LLMConfig) -> dict[str, Any]:
    """Our settings in DeepSpeed's words."""
    return {
        # One call of the engine is one global optimizer step; the batch is counted in tokens, not in rows.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.gradient_clip,
        "zero_optimization": {"stage": config.zero_stage},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": config.dtype == "bfloat16"},
        "steps_per_print": 2**31,
        "wall_clock_breakdown": False,
    }


@dataclass(frozen=True)
class Plan:
    """Every batch of the whole training, known before it begins: the schedule needs the true number of steps."""

    epochs: list[tuple[Windows, list[np.ndarray]]]

    @property
    def total_steps(self) -> int:
        return sum(len(batches) for _, batches in self.epochs)

    def step(self, step: int) -> tuple[Windows, np.ndarray]:
        """Windows of the epoch and the numbers of those in optimizer step `step` (0-based over all epochs)."""
        for windows, batches in self.epochs:
            if step < len(batches):
                return windows, batches[step]
            step -= len(batches)
        raise IndexError(f"step {step} is past the end of the plan")


def make_plan(log: InteractionLog, collator: Collator, config: LLMConfig, seed: int, workers: int) -> Plan:
    """Windows and length-bucketed batches of every epoch, a function of (seed, workers) alone."""
    epochs = []
    for epoch in range(config.epochs):
        windows = training_windows(log.train_lengths(), config, seed, epoch)
        if len(windows) < workers:
            raise ValueError(
                f"{len(windows)} users have two training interactions or more, but resources.llm.num_workers={workers} "
                "need one each; give more data or use fewer workers"
            )
        sizes = collator.sizes([window_row(log, windows, index) for index in range(len(windows))])
        random = np.random.default_rng((seed, 11, epoch))
        epochs.append((windows, plan_batches(sizes, config.batch_tokens, workers, random)))
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


def train_loop(arguments: dict[str, Any]) -> None:
    """One worker: its share of every global batch through one causal pass, ZeRO does the rest."""
    if not arguments["resources"]["use_gpu"]:
        os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ["DEEPSPEED_DISABLE_NVML"] = "1"
    import deepspeed  # reads the environment on import

    config, seed = LLMConfig.model_validate(arguments["config"]), int(arguments["seed"])
    device = training.prepare_worker(arguments, seed)
    rank, workers = training.rank(), training.world_size()
    log = InteractionLog.load(Path(arguments["interactions"]))
    tokens = NodeArrays.load(Path(arguments["tokens"]))
    backbone = Path(arguments["backbone"])
    text_tokenizer = load_text_tokenizer(backbone)
    prompts = make_prompts(text_tokenizer, log.catalogue, config.max_title_tokens)
    collator = Collator(prompts, tokens.items, tokens.users if config.use_user_tokens else None)
    plan = make_plan(log, collator, config, seed, workers)

    item_embeddings = NodeArrays.load(Path(arguments["embeddings"])).items
    model = new_model(config, backbone, item_embeddings, seed)
    deepspeed.init_distributed(dist_backend="nccl" if device.type == "cuda" else "gloo")
    optimizer = torch.optim.AdamW(parameter_groups(model, config), betas=(0.9, 0.98))
    factor = warmup_then_linear(config, plan.total_steps)
    engine, _, _, _ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        lr_scheduler=lambda wrapped: torch.optim.lr_scheduler.LambdaLR(wrapped, factor),
        config=deepspeed_config(config),
    )
    step = 0
    with training.latest_checkpoint(arguments) as folder:
        if folder is not None:
            # Not strict: the frozen word embeddings are left out of checkpoints, the backbone brings them.
            _, client = engine.load_checkpoint(str(folder), tag="state", load_module_strict=False)
            step = int(client["step"])

    def write(folder: Path) -> None:
        engine.save_checkpoint(str(folder), tag="state", client_state={"step": step}, exclude_frozen_parameters=True)

    steplog = training.StepLog(arguments["logs"], plan.total_steps)
    while step < plan.total_steps:
        windows, numbers = plan.step(step)
        rows = [window_row(log, windows, index) for index in numbers]
        mine, length = rows[rank::workers], int(collator.sizes(rows).max())
        random = np.random.default_rng((seed, 12, step))
        draw = seed * 1_000_003 + step * workers + rank
        batch = drop_tokens(collator(mine, length), config.token_dropout, collator.num_ways, draw)
        negatives = None
        if len(log.catalogue) > config.full_softmax_limit:
            negatives = torch.from_numpy(random.integers(0, len(log.catalogue), config.sampled_negatives)).to(device)
        preference_sum, text_sum = engine(batch.to(device), negatives)
        # Means over the *global* batch: ZeRO averages the workers' gradients, so each gives its sum times workers.
        supervised = sum(len(row.targets) for row in rows)
        spoken = sum(len(prompts.answer(row.answer_item)) for row in rows if row.answer_item >= 0)
        preference_loss = preference_sum * (workers / supervised)
        text_loss = text_sum * (workers / max(1, spoken))
        engine.backward(preference_loss + config.text_weight * text_loss)
        engine.step()
        step += 1
        curves = {
            "preference_loss": preference_sum.detach() / max(1, len(batch.targets)),
            "text_loss": text_sum.detach() / max(1, len(batch.answer_ids)),
            "temperature": engine.module.head.temperature.detach(),
            "padding_share": 1.0 - float(collator.sizes(rows).sum()) / (length * len(rows)),
        }
        steplog.step(step, curves)
        if step % config.checkpoint_every_steps == 0 and step < plan.total_steps:
            training.report_checkpoint({"step": step}, write, every_rank=True)

    state = consolidate(engine.module)

    def write_final(folder: Path) -> None:
        write(folder)
        if rank == 0:
            target = folder / training.EXPORT
            export_model(target, new_model(config, backbone, item_embeddings, seed), state, DTYPES[config.dtype])
            text_tokenizer.save_pretrained(target / BACKBONE)

    training.report_checkpoint({"step": step}, write_final, every_rank=True)
    steplog.close()


def new_model(config: LLMConfig, backbone: Path, item_embeddings: np.ndarray, seed: int) -> PreferenceLM:
    """The model before training; the same on every worker and on every start."""
    training.seed_all(seed)
    lm = load_causal_lm(backbone, config.num_hidden_layers)
    if config.trainable == "lora":
        from peft import LoraConfig, inject_adapter_in_model

        lm.requires_grad_(False)
        lora = LoraConfig(
            r=config.lora_rank, lora_alpha=config.lora_alpha, target_modules="all-linear", exclude_modules=["lm_head"]
        )
        lm = inject_adapter_in_model(lora, lm)
    vectors = initial_vectors(torch.tensor(np.asarray(item_embeddings)), config)
    return build_preference_lm(lm, vectors, config.temperature, config.item_vectors == "learned")


def initial_vectors(embeddings: torch.Tensor, config: LLMConfig) -> torch.Tensor:
    """Where the item vectors start: at the collaborative embeddings, or random where the size differs."""
    if config.item_vectors == "collaborative":
        return F.normalize(embeddings, dim=1)
    if embeddings.shape[1] == config.preference_dim:
        centred = embeddings - embeddings.mean(dim=0)
        return centred / centred.std()
    return torch.randn(len(embeddings), config.preference_dim)


def parameter_groups(model: PreferenceLM, config: LLMConfig) -> list[dict[str, Any]]:
    """The backbone at its own rate; adapter and head, which start from nothing, at a higher one."""
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    backbone = [parameter for name, parameter in trained if name.startswith("lm.")]
    fresh = [parameter for name, parameter in trained if not name.startswith("lm.")]
    return [
        {"params": backbone, "lr": config.learning_rate, "weight_decay": config.weight_decay},
        {"params": fresh, "lr": config.head_learning_rate, "weight_decay": config.weight_decay},
    ]


def drop_tokens(batch: LLMBatch, share: float, num_ways: int, seed: int) -> LLMBatch:
    """Zero the continuous tokens of a share of the items, so that the titles are read too (training only)."""
    if share == 0.0:
        return batch
    generator = torch.Generator().manual_seed(seed)
    blocks = len(batch.token_values) // num_ways
    keep = (torch.rand(blocks, generator=generator) >= share).repeat_interleave(num_ways)
    values = batch.token_values * keep[:, None]
    return LLMBatch(**{**batch.__dict__, "token_values": values})


def consolidate(model: PreferenceLM) -> dict[str, torch.Tensor]:
    """fp32 master weights of everything trained, whole, on every rank (also under ZeRO 3)."""
    from deepspeed.utils import safe_get_full_fp32_param

    state = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            full = safe_get_full_fp32_param(parameter)
            state[name] = (parameter.detach() if full is None else full).float().cpu().clone()
    return state
