"""ZeRO: DeepSpeed's configuration in its own words, checkpoints that outlive a change of workers, whole weights.

Every rank writes its part of a checkpoint. Read back by another number of workers, or where ZeRO parts otherwise, it is
first rewritten as DeepSpeed's universal checkpoint, which holds every parameter whole.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from ctd_scale import training
from ctd_scale.config import LLMConfig
from ctd_scale.environment import cache_folder
from ctd_scale.llm.model import PreferenceHead
from ctd_scale.sequence import latest_first

TAG, PROGRESS = "state", "state.json"
ALIKE = ({1, 2}, {3})  # DeepSpeed names the files of a universal checkpoint otherwise under ZeRO 3
STALE_SECONDS = 900.0  # compiling takes one or two minutes


def prepare_extensions() -> Path:
    """Where DeepSpeed compiles on first use: a folder of this environment's own, free of locks that nobody holds.

    torch shares one folder among all environments of a user, so two of them compile by turns over each other; and
    whoever is killed while compiling leaves a lock for which everybody after it waits for ever.
    """
    environment = hashlib.sha256(f"{sys.prefix} {torch.__version__}".encode()).hexdigest()[:12]
    folder = Path(os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(cache_folder() / "extensions" / environment)))
    for lock in folder.glob("**/lock"):
        with suppress(FileNotFoundError):
            if time.time() - lock.stat().st_mtime > STALE_SECONDS:
                lock.unlink()
    return folder


def deepspeed_config(config: LLMConfig, dtype: torch.dtype, *, universal: bool = False) -> dict[str, Any]:
    """Our settings in DeepSpeed's words; `universal` where it goes on from a universal checkpoint."""
    zero: dict[str, Any] = {"stage": config.zero_stage}
    if config.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if config.offload == "parameters":
        zero["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return {
        # One call of the engine reads one part of a global step; the batch is counted in tokens, not in rows.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": config.accumulation_steps,
        "gradient_clipping": config.gradient_clip,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        # DeepSpeed's own Adam for offloaded states would be compiled first; torch's AdamW does as well.
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "checkpoint": {"load_universal": universal},
        "steps_per_print": 2**31,
        "wall_clock_breakdown": False,
    }


@dataclass(frozen=True)
class Saved:
    """A checkpoint to go on from: where it lies, after which step, and whether it is a universal one."""

    folder: Path
    step: int
    universal: bool


def layout(config: LLMConfig) -> dict[str, Any]:
    """Who holds what of a checkpoint. Without ZeRO every worker holds all, however many there are."""
    if config.zero_stage == 0:
        return {"zero_stage": 0}
    return {"zero_stage": config.zero_stage, "offload": config.offload, "workers": training.world_size()}


@contextmanager
def opened(folder: Path | None, config: LLMConfig, training_name: str) -> Iterator[Saved | None]:
    """A checkpoint in the form that these workers can load; every rank must call this.

    `folder` may go by another name for every rank, as where it was downloaded; `training_name` is the same for all of
    them, and no other training has it. Raises ValueError where the checkpoint was written with a stage of ZeRO from
    which this one cannot go on.
    """
    if folder is None:
        yield None
        return
    progress = json.loads((folder / PROGRESS).read_text())
    wanted = layout(config)
    if progress["layout"] == wanted:
        yield Saved(folder, progress["step"], universal=False)
        return
    before, now = progress["layout"]["zero_stage"], wanted["zero_stage"]
    if not any({before, now} <= alike for alike in ALIKE):
        raise ValueError(
            f"{folder} was written with llm.zero_stage={before}, from which llm.zero_stage={now} cannot go on; give "
            f"llm.zero_stage={before} again, or remove the checkpoint to begin anew"
        )
    # One rank of each machine rewrites it for all that are there.
    name = hashlib.sha256(f"{training_name} {progress['step']}".encode()).hexdigest()[:16]
    rewritten = Path(tempfile.gettempdir()) / f"ctd-universal-{name}"
    if training.local_rank() == 0:
        shutil.rmtree(rewritten, ignore_errors=True)
        make_universal(folder / TAG, rewritten / TAG)
    dist.barrier()
    try:
        yield Saved(rewritten, progress["step"], universal=True)
        dist.barrier()
    finally:
        if training.local_rank() == 0:
            shutil.rmtree(rewritten, ignore_errors=True)


def make_universal(source: Path, target: Path) -> None:
    """DeepSpeed's conversion, without what it prints."""
    from deepspeed.checkpoint.ds_to_universal import main

    target.mkdir(parents=True)
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        main(
            argparse.Namespace(
                input_folder=str(source),
                output_folder=str(target),
                num_extract_workers=1,
                num_merge_workers=1,
                keep_temp_folder=False,
                strict=True,
                # Ours have no pipeline or tensor parallelism to describe.
                inject_missing_state=True,
            )
        )


def save(engine: Any, folder: Path, step: int, config: LLMConfig) -> None:
    """This rank's part of a checkpoint; every rank must call this. Frozen weights are left out."""
    engine.save_checkpoint(str(folder), tag=TAG, exclude_frozen_parameters=True)
    if training.rank() == 0:
        (folder / PROGRESS).write_text(json.dumps({"step": step, "layout": layout(config)}))


def load(engine: Any, saved: Saved) -> None:
    """Weights, optimizer and schedule of a checkpoint into an engine that was configured for its kind."""
    groups = engine.optimizer.param_groups
    settings = [{name: value for name, value in group.items() if name != "params"} for group in groups]
    # Not strict: the frozen word embeddings are not in it, the backbone brings them.
    engine.load_checkpoint(str(saved.folder), tag=TAG, load_module_strict=False)
    if saved.universal:
        # Under ZeRO 3 DeepSpeed gives every group the settings of the first one, and all parameters one counter of
        # steps, which each of them then advances (load_hp_checkpoint_state_from_checkpoint_dir_stage3).
        for group, own, rate in zip(groups, settings, engine.lr_scheduler.get_last_lr(), strict=True):
            group.update({**own, "lr": rate})
        for state in getattr(engine.optimizer, "optimizer", engine.optimizer).state.values():
            if torch.is_tensor(state.get("step")):
                state["step"] = state["step"].clone()


def consolidate(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """fp32 master weights of everything trained, whole, on every rank (also under ZeRO 3)."""
    from deepspeed.utils import safe_get_full_fp32_param

    state = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            full = safe_get_full_fp32_param(parameter)
            state[name] = (parameter.detach() if full is None else full).float().cpu().clone()
    return state


def item_space(head: PreferenceHead, histories: list[np.ndarray], batch: int) -> tuple[torch.Tensor, np.ndarray | None]:
    """The vectors of all items, whole, on every rank (also under ZeRO 3), and what the reader says of each history,
    where there is one; every rank must call this."""
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(head.parameters())):
        vectors = head.item_vectors().detach().clone()
        if head.reader is None:
            return vectors, None
        read = [np.zeros((0, vectors.shape[1]), np.float32)]
        for start in range(0, len(histories), batch):
            recent = latest_first(histories[start : start + batch], head.reader.encoder.max_history)
            read.append(head.begin(torch.from_numpy(recent).to(vectors.device)).float().cpu().numpy())
    return vectors, np.concatenate(read)
