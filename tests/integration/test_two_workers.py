"""Two workers with the same global batch learn what one worker learns, which is this process."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TypeVar

import numpy as np
import pytest
from safetensors.numpy import load_file

from ctd_scale.artifacts import Run
from ctd_scale.baselines.train import train_baseline
from ctd_scale.batches import Catalogue, InteractionLog, NodeArrays, Preferences
from ctd_scale.config import RunConfig, validate_config
from ctd_scale.diffusion.distill import STUDENT
from ctd_scale.diffusion.train import WEIGHTS, train_diffusion
from ctd_scale.graph.train import train_graph
from ctd_scale.tasks import WEIGHTS as BASELINE_WEIGHTS

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_session")]

USERS, ITEMS, LENGTH, DIM = 30, 24, 8, 8


def make_run(folder: Path, name: str) -> Run:
    """Interactions, and random preferences, published as the stages would."""
    run, random = Run(str(folder), name), np.random.default_rng(0)
    items = np.concatenate([random.choice(ITEMS, LENGTH, replace=False) for _ in range(USERS)]).astype(np.int32)
    names = [str(item) for item in range(ITEMS)]
    log = InteractionLog(
        np.arange(USERS + 1, dtype=np.int64) * LENGTH,
        items,
        [str(user) for user in range(USERS)],
        Catalogue(names, names, [""] * ITEMS),
    )
    rows = 256
    preferences = Preferences(
        np.zeros(rows, np.int32),
        random.integers(0, ITEMS, rows).astype(np.int32),
        random.normal(size=(rows, DIM)).astype(np.float32),
        [""] * rows,
    )
    with run.publish("interactions", config_hash="", inputs={}) as target:
        log.save(target)
    with run.publish("models/llm", config_hash="", inputs={}) as target:
        (target / "note.txt").write_text("the diffusion stage reads vectors only")
    with run.publish("preferences", config_hash="", inputs={}) as target:
        preferences.save(target, "train")
    return run


def config_for(workers: int) -> RunConfig:
    resources = {"num_workers": workers, "threads_per_worker": 1}
    graph = {"embed_dim": DIM, "fanout": [3, 2], "epochs": 4, "batch_size": 32}
    diffusion = {"hidden_dim": 16, "num_blocks": 1, "dropout": 0.0, "epochs": 3, "batch_size": 64, "num_negatives": 4}
    # Batches that do not divide by two: a worker of the last one may have nothing to do.
    baseline = {"embed_dim": DIM, "dropout": 0.0, "epochs": 2, "batch_size": 29, "max_history": 6}
    values = {
        "graph": graph,
        "diffusion": diffusion,
        "baselines": {"bsarec": baseline},
        "resources": dict.fromkeys(("graph", "diffusion", "baselines"), resources),
    }
    return validate_config(values, source="test")


Learned = TypeVar("Learned")


@pytest.fixture
def by_one_and_two(
    tmp_path: Path, in_this_process: Callable[[Path], AbstractContextManager[object]]
) -> Callable[[Callable[[Run, int], Learned]], tuple[Learned, Learned]]:
    """What `learn(run, workers)` returns: first of one worker, this process, then of two that Ray Train has."""

    def train(learn: Callable[[Run, int], Learned]) -> tuple[Learned, Learned]:
        with in_this_process(tmp_path / "worker"):
            one = learn(make_run(tmp_path, "one"), 1)
        return one, learn(make_run(tmp_path, "two"), 2)

    return train


def test_graph(by_one_and_two: Callable[..., tuple[NodeArrays, NodeArrays]]) -> None:
    """One that samples by itself, two that Ray Data feeds and that own half of the table each. They draw the same
    neighbours, so only the order of sums differs."""

    def learn(run: Run, workers: int) -> NodeArrays:
        config = config_for(workers)
        graph = config.graph.model_copy(update={"streaming": "ray_data" if workers == 2 else "in_process"})
        train_graph(run, config.model_copy(update={"graph": graph}), "key")
        return NodeArrays.load(run.fetch("embeddings").path)

    one, two = by_one_and_two(learn)
    np.testing.assert_allclose(one.users, two.users, atol=2e-4)
    np.testing.assert_allclose(one.items, two.items, atol=2e-4)


def assert_equal(learned: tuple[dict[str, np.ndarray], dict[str, np.ndarray]]) -> None:
    one, two = learned
    for name, values in one.items():
        np.testing.assert_allclose(values, two[name], atol=2e-4, err_msg=name)


def test_diffusion(by_one_and_two: Callable[..., tuple[dict[str, np.ndarray], dict[str, np.ndarray]]]) -> None:
    vectors = np.random.default_rng(1).normal(size=(ITEMS, DIM)).astype(np.float32)

    def learn(run: Run, workers: int) -> dict[str, np.ndarray]:
        """The denoiser, and the sampler that it teaches."""
        config = config_for(workers)
        sampler = {"sampler": "distilled", "distill_steps": 3, "sampling_steps": 2}
        diffusion = config.diffusion.model_copy(update=sampler)
        train_diffusion(run, config.model_copy(update={"diffusion": diffusion}), "key", vectors)
        folder = run.fetch("models/diffusion").path
        taught = {f"sampler.{name}": values for name, values in load_file(folder / STUDENT).items()}
        return {**load_file(folder / WEIGHTS), **taught}

    assert_equal(by_one_and_two(learn))


def test_a_baseline(by_one_and_two: Callable[..., tuple[dict[str, np.ndarray], dict[str, np.ndarray]]]) -> None:
    def learn(run: Run, workers: int) -> dict[str, np.ndarray]:
        train_baseline("bsarec", run, config_for(workers), "key")
        return load_file(run.fetch("baselines/bsarec").path / BASELINE_WEIGHTS)

    assert_equal(by_one_and_two(learn))
