"""The LLM rivals, trained by the LLM stage on a planted truth, ranked like every baseline. In this process: Ray Train
around it is the chain's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ctd_scale.artifacts import ArtifactError, Run
from ctd_scale.baselines.discrete import assign_codes
from ctd_scale.baselines.llm import train_variant
from ctd_scale.baselines.names import VARIANTS
from ctd_scale.baselines.train import train_baseline
from ctd_scale.batches import Catalogue, InteractionLog, NodeArrays
from ctd_scale.config import RunConfig, validate_config
from ctd_scale.evaluate import rank_baseline

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("process_group", "one_worker")]

USERS, ITEMS = 80, 12


def circle(folder: Path) -> Run:
    """Every user goes on round one circle of items, from a place of its own."""
    random, run = np.random.default_rng(0), Run(str(folder), "run")
    sequences = [(int(random.integers(0, ITEMS)) + np.arange(int(random.integers(6, 9)))) % ITEMS for _ in range(USERS)]
    log = InteractionLog(
        np.concatenate([[0], np.cumsum([len(each) for each in sequences])]).astype(np.int64),
        np.concatenate(sequences).astype(np.int32),
        [str(user) for user in range(USERS)],
        Catalogue([str(item) for item in range(ITEMS)], [chr(97 + item) for item in range(ITEMS)], [""] * ITEMS),
    )
    with run.publish("interactions", config_hash="", inputs={}) as target:
        log.save(target)
    embeddings = NodeArrays(*(random.standard_normal((count, 8)).astype(np.float32) for count in (USERS, ITEMS)))
    with run.publish("embeddings", config_hash="", inputs={"interactions": run.fetch("interactions").digest}) as target:
        embeddings.save(target)
    return run


def config_for(backbone: Path, **baselines: Any) -> RunConfig:
    llm = {
        "backbone": str(backbone),
        "num_hidden_layers": 2,
        "max_history": 8,
        "preference_dim": 12,
        "dtype": "float32",
        "epochs": 20,
        "batch_tokens": 300,
        "text_weight": 0.0,
        "learning_rate": 3e-3,
        "head_learning_rate": 2e-2,
    }
    resources = {name: {"threads_per_worker": 1, "max_failures": 0} for name in ("llm", "baselines")}
    # Ranked below with seen items kept, so the epoch is chosen by that, too.
    values = {"llm": llm, "baselines": baselines, "resources": resources, "evaluation": {"mask_seen": False}}
    return validate_config(values, source="test")


@pytest.mark.parametrize("name", VARIANTS)
def test_a_rival_learns_what_comes_next(name: str, tmp_path: Path, backbone: Path) -> None:
    run, config = circle(tmp_path), config_for(backbone)
    train_variant(name, run, config, "key")
    ranks = rank_baseline(name, run, config, "test", mask_seen=False)
    assert (ranks.ranks == 1).mean() >= 0.9
    made: dict[str, Any] = dict(run.fetch(f"baselines/{name}").manifest["inputs"])
    assert made == {each: run.fetch(each).digest for each in ("interactions", "embeddings")}


def test_discrete_ids_are_made_once(tmp_path: Path, backbone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who ranks writes the ids that were trained on, even where clusters would come out otherwise."""
    own = {"epochs": 30, "batch_size": 16, "learning_rate": 3e-3, "symbol_learning_rate": 2e-2, "beams": ITEMS}
    run, config = circle(tmp_path), config_for(backbone, p5_collaborative=own)
    assign_codes("p5_collaborative", run, config, "key")
    train_baseline("p5_collaborative", run, config, "key")
    monkeypatch.setattr("ctd_scale.baselines.discrete.collaborative_codes", lambda *_: pytest.fail("made again"))
    ranks = rank_baseline("p5_collaborative", run, config, "test", mask_seen=False)
    assert (ranks.ranks == 1).mean() >= 0.9
    monkeypatch.undo()
    other = validate_config({**config.model_dump(), "seed": 1}, source="test")
    assign_codes("p5_collaborative", run, other, "another key")
    with pytest.raises(ArtifactError, match="run `ctd bench quality` with p5_collaborative again"):
        rank_baseline("p5_collaborative", run, config, "test", mask_seen=False)
