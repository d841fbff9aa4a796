"""Every trained baseline finds a planted truth, keeps its best epoch, and goes on after a kill."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ctd_scale.baselines.discrete import make_codes
from ctd_scale.baselines.names import DISCRETE, TRAINED
from ctd_scale.baselines.train import MAKERS, make_task, train_loop
from ctd_scale.batches import Catalogue, InteractionLog
from ctd_scale.config import RunConfig, validate_config
from ctd_scale.ranking import rank_targets
from ctd_scale.tasks import WEIGHTS, restore, scorer_of

USERS, ITEMS = 60, 20
SEQUENTIAL = {"embed_dim": 16, "max_history": 8, "dropout": 0.1, "batch_size": 32, "learning_rate": 0.01}


def circles() -> InteractionLog:
    """Users go round one of two circles of ten items, from a place of their own: even items only, or odd ones only.
    What a sequence model must find is the next item; what matrix factorisation can find is the circle."""
    random = np.random.default_rng(0)
    sequences = []
    for user in range(USERS):
        start, length = int(random.integers(0, 10)), int(random.integers(6, 9))
        sequences.append([2 * ((start + step) % 10) + user % 2 for step in range(length)])
    names = [str(item) for item in range(ITEMS)]
    return InteractionLog(
        np.concatenate([[0], np.cumsum([len(sequence) for sequence in sequences])]).astype(np.int64),
        np.concatenate(sequences).astype(np.int32),
        [str(user) for user in range(USERS)],
        Catalogue(names, names, [""] * ITEMS),
    )


def arguments_for(name: str, folder: Path, backbone: Path, **changes: Any) -> dict[str, Any]:
    own: dict[str, Any] = SEQUENTIAL
    if name == "bpr_mf":
        own = {"embed_dim": 8, "batch_size": 64, "learning_rate": 0.02}
    elif name in DISCRETE:
        own = {
            "learning_rate": 3e-3,
            "symbol_learning_rate": 2e-2,
            "batch_size": 16,
            "beams": 8,
            "epochs": 40,
            "patience": 9,
        }
    values = {
        "baselines": {name: {"epochs": 60, "validate_every": 2, **own, **changes}},
        "llm": {"backbone": str(backbone), "num_hidden_layers": 2, "max_history": 8, "dtype": "float32"},
    }
    config = validate_config(values, source="test")
    if name in DISCRETE:
        make_codes(name, InteractionLog.load(folder), config).save(folder)
    codes = str(folder) if name in DISCRETE else None
    return {"name": name, "config": config.model_dump(), "interactions": str(folder), "codes": codes}


def trained(name: str, arguments: dict[str, Any], log: InteractionLog, export: Path) -> torch.nn.Module:
    codes = Path(arguments["codes"]) if arguments["codes"] else None
    model = make_task(name, log, RunConfig.model_validate(arguments["config"]), codes).model
    restore(model, load_file(export / WEIGHTS))
    return model.eval()


LEAST = {"bpr_mf": 0.9, "sasrec": 0.95, "bsarec": 0.95, **dict.fromkeys(DISCRETE, 0.9)}


@pytest.mark.parametrize(("name", "least"), LEAST.items())
def test_the_withheld_item_ranks_where_the_truth_puts_it(
    name: str, least: float, tmp_path: Path, one_worker: Any, backbone: Path
) -> None:
    """Sequence models: the next item is first. Matrix factorisation: it is among the circle's."""
    log = circles()
    log.save(tmp_path)
    arguments = arguments_for(name, tmp_path, backbone)
    model = trained(name, arguments, log, one_worker.run(train_loop, arguments))
    ranks = rank_targets(log, scorer_of(model), "test", mask_seen=True, chunk_users=16)
    worst = 10 if name == "bpr_mf" else 1
    assert (ranks.ranks <= worst).mean() >= least
    if name == "bpr_mf":
        even = np.arange(ITEMS) % 2 == 0
        scores = scorer_of(model)(np.arange(USERS), [np.zeros(1, np.int32)] * USERS)
        own = np.where(even[None] == (np.arange(USERS) % 2 == 0)[:, None], scores, np.nan)
        other = np.where(even[None] != (np.arange(USERS) % 2 == 0)[:, None], scores, np.nan)
        assert (np.nanmean(own, axis=1) > np.nanmax(other, axis=1)).mean() >= least


@pytest.mark.parametrize(("name", "ema_decay"), [("bpr_mf", 0.0), ("sasrec", 0.9), ("bsarec", 0.0), ("tiger", 0.0)])
def test_a_killed_loop_ends_where_an_uninterrupted_one_ends(
    name: str, ema_decay: float, tmp_path: Path, one_worker: Any, backbone: Path
) -> None:
    log = circles()
    log.save(tmp_path)
    arguments = arguments_for(name, tmp_path, backbone, epochs=7, ema_decay=ema_decay)
    whole = load_file(one_worker.run(train_loop, arguments) / WEIGHTS)
    losses = [curve["loss"] for curve in one_worker.curves]
    one_worker.restart(die_at=2)
    with pytest.raises(KeyboardInterrupt):
        one_worker.run(train_loop, arguments)
    resumed = load_file(one_worker.run(train_loop, arguments) / WEIGHTS)
    np.testing.assert_allclose([curve["loss"] for curve in one_worker.curves], losses, atol=1e-6)
    for key, values in whole.items():
        torch.testing.assert_close(resumed[key], values, atol=1e-6, rtol=0)


def test_the_best_epoch_is_kept_and_training_stops_without_progress(
    tmp_path: Path, one_worker: Any, monkeypatch: pytest.MonkeyPatch, backbone: Path
) -> None:
    log = circles()
    log.save(tmp_path)
    said = iter([0.1, 0.3, 0.2, 0.3, 0.25])  # the second is the best; two more after it and training ends
    seen: list[dict[str, torch.Tensor]] = []

    def validation(log: Any, model: torch.nn.Module, *_: Any) -> float:
        seen.append({key: value.clone() for key, value in model.state_dict().items()})
        return next(said)

    monkeypatch.setattr("ctd_scale.tasks.validation_ndcg", validation)
    arguments = arguments_for("sasrec", tmp_path, backbone, validate_every=1, patience=2)
    kept = load_file(one_worker.run(train_loop, arguments) / WEIGHTS)
    assert len(seen) == 4
    for key, values in kept.items():
        torch.testing.assert_close(values, seen[1][key])


def test_whatever_is_said_to_be_trained_has_a_maker() -> None:
    assert (*MAKERS, *DISCRETE) == TRAINED
