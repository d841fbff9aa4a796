"""Two workers with the same global batch learn what one worker learns, which is this process; also where one of the two
is killed in the middle of an epoch."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from loops import Training, exported, train_on_two
from safetensors.numpy import load_file

from ctd_scale.artifacts import Run
from ctd_scale.baselines.train import train_baseline
from ctd_scale.batches import Catalogue, InteractionLog, NodeArrays, Preferences
from ctd_scale.config import RunConfig, validate_config
from ctd_scale.diffusion.distill import STUDENT
from ctd_scale.diffusion.train import DISTILLATION, WEIGHTS, train_diffusion
from ctd_scale.graph.csr import BipartiteGraph
from ctd_scale.graph.export import propagate, split_nodes
from ctd_scale.graph.train import gather_rows, train_graph
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


def make_config(workers: int, streaming: str) -> RunConfig:
    diffusion = {"hidden_dim": 16, "num_blocks": 1, "dropout": 0.0, "epochs": 3, "batch_size": 64, "num_negatives": 4}
    values = {
        "graph": {
            "embed_dim": DIM,
            "fanout": [3, 2],
            "epochs": 30,
            "batch_size": 32,
            "checkpoint_every_steps": 6,
            "streaming": streaming,
        },
        "diffusion": {**diffusion, "sampler": "distilled", "distill_steps": 3, "sampling_steps": 2},
        # Batches that do not divide by two: a worker of the last one may have nothing to do.
        "baselines": {
            "bsarec": {"embed_dim": DIM, "dropout": 0.0, "epochs": 2, "batch_size": 29, "max_history": 6},
        },
        "resources": {"graph": {"num_workers": workers, "threads_per_worker": 1, "max_failures": 1}},
    }
    return validate_config(values, source="test")


@dataclass(frozen=True)
class Learned:
    """What one and two have exported, by training, and the graph that both were given."""

    one: dict[str, Path]
    two: dict[str, Path]
    graph: Path


@pytest.fixture(scope="module")
def learned(
    tmp_path_factory: pytest.TempPathFactory, in_this_process: Callable[[Path], AbstractContextManager[Any]]
) -> Learned:
    folder = tmp_path_factory.mktemp("learned")
    run, vectors = make_run(folder, "one"), np.random.default_rng(1).normal(size=(ITEMS, DIM)).astype(np.float32)
    np.save(folder / "vectors.npy", vectors)
    with in_this_process(folder / "worker") as worker:
        config = make_config(1, "in_process")
        train_graph(run, config, "key")
        train_diffusion(run, config, "key", vectors)
        train_baseline("bsarec", run, config, "key")
    # The two sample otherwise, too: by Ray Data. And the stage has removed its vectors.
    others = {
        "graph": {"config": make_config(2, "ray_data").graph.model_dump()},
        **{name: {"vectors": str(folder / "vectors.npy")} for name in ("diffusion", DISTILLATION)},
    }
    trainings = [
        Training(name, loop, {**arguments, **others.get(name, {})})
        for name, (loop, arguments, _) in worker.trained.items()
    ]
    train_on_two(trainings, folder / "two")
    return Learned(
        {name: export for name, (_, _, export) in worker.trained.items()},
        {each.name: exported(folder / "two", each.name) for each in trainings},
        run.fetch("graph").path,
    )


@pytest.mark.parametrize(
    ("name", "file"), [("diffusion", WEIGHTS), (DISTILLATION, STUDENT), ("bsarec", BASELINE_WEIGHTS)]
)
def test_two_learn_what_one_learns(learned: Learned, name: str, file: str) -> None:
    two = load_file(learned.two[name] / file)
    for parameter, values in load_file(learned.one[name] / file).items():
        np.testing.assert_allclose(two[parameter], values, atol=2e-4, err_msg=parameter)


def test_two_that_own_half_of_the_table_each_learn_what_one_learns(learned: Learned) -> None:
    """They draw the same neighbours, so only the order of sums differs."""
    one, two = (gather_rows(USERS + ITEMS, exports["graph"]) for exports in (learned.one, learned.two))
    np.testing.assert_allclose(two, one, atol=2e-4)


def workers() -> list[psutil.Process]:
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if "RayTrainWorker" in process.name() + "".join(process.cmdline()):
                found.append(process)
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
    return found


def test_a_killed_worker_changes_nothing(learned: Learned, tmp_path: Path) -> None:
    """The stage goes on by itself and ends where it would have."""
    broken, killed = make_run(tmp_path, "broken"), []

    def kill_one() -> None:
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline and not killed:
            # The second checkpoint is begun when the first is complete.
            if len(list((tmp_path / "broken" / "checkpoints").glob("graph-*/*/checkpoint_*"))) >= 2:
                victim = workers()[1]
                victim.kill()
                killed.append(victim.pid)
            time.sleep(0.02)

    killer = threading.Thread(target=kill_one)
    killer.start()
    config = make_config(2, "auto")
    train_graph(broken, config, "key")
    killer.join()
    assert killed
    found, graph = NodeArrays.load(broken.fetch("embeddings").path), BipartiteGraph.load(learned.graph)
    layer0 = gather_rows(graph.num_nodes, learned.two["graph"])
    settings = config.graph
    whole = split_nodes(graph, propagate(graph, layer0, settings.num_layers, settings.propagation_chunk, tmp_path))
    np.testing.assert_allclose(found.users, whole.users, atol=1e-6)
    np.testing.assert_allclose(found.items, whole.items, atol=1e-6)
