"""A plan against what is then used."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ctd_scale import estimates
from ctd_scale.artifacts import Run
from ctd_scale.batches import Catalogue, InteractionLog
from ctd_scale.config import load_config, validate_config
from ctd_scale.diffusion import plan as diffusion_plan
from ctd_scale.graph.plan import plan_graph
from ctd_scale.graph.train import train_graph
from ctd_scale.llm import plan as llm_plan
from ctd_scale.pipeline import STAGES
from ctd_scale.plan import plan_run, print_plan
from ctd_scale.tokenizer import plan as tokenizer_plan

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_session")]

USERS, ITEMS, LENGTH = 20_000, 5_000, 10


def size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def test_the_graph_stage_needs_what_was_said(tmp_path: Path) -> None:
    """Disk is arithmetic. Time is held to a factor only: the tests share their machine with others."""
    names = [""] * ITEMS
    items = np.random.default_rng(0).integers(0, ITEMS, USERS * LENGTH).astype(np.int32)
    log = InteractionLog(
        np.arange(USERS + 1) * LENGTH, items, [str(user) for user in range(USERS)], Catalogue(names, names, names)
    )
    settings = {"embed_dim": 32, "fanout": [4, 4], "epochs": 2, "batch_size": 1024, "checkpoint_every_steps": 100}
    config = validate_config({"graph": settings}, source="test")
    run = Run(str(tmp_path), "run")
    planned = plan_graph(log, config, run)
    assert not list(tmp_path.iterdir()), "a plan leaves nothing"

    with run.publish("interactions", config_hash="", inputs={}) as folder:
        log.save(folder)
    started = time.perf_counter()
    train_graph(run, config, "key")
    elapsed = time.perf_counter() - started
    kept = size_of(run.root / "graph") + size_of(run.root / "embeddings")
    assert kept < planned.disk < kept + 2.5 * size_of(run.root / "checkpoints")
    assert 3 * 4 * 32 * (USERS + ITEMS) < planned.memory < 500e6
    assert elapsed / 4 < planned.seconds < 4 * elapsed


def test_every_stage_is_planned(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def brief(work: Callable[[], object], budget: float = 0, **options: int) -> float:
        return estimates.seconds_per_call(work, 0.2, **options)

    for module in (diffusion_plan, llm_plan, tokenizer_plan):
        monkeypatch.setattr(module, "seconds_per_call", brief)
    config = load_config("debug", ["graph.epochs=1", "llm.item_vectors=joined", "history.num_blocks=1"])
    run = Run(str(tmp_path), "run")
    planned = plan_run(run, config)
    assert [each.stage for each in planned] == [stage.name for stage in STAGES]
    assert all(each.seconds > 0 and each.memory > 0 and each.disk >= 0 for each in planned)
    assert not list(tmp_path.iterdir())
    print_plan(run, planned)
    said = capsys.readouterr().out
    assert "train_llm" in said
    assert "histories an epoch" in " ".join(said.split())
    assert "together" in said
