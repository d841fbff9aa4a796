"""A planted set is learned: the right item has the lowest error and is the nearest to what is generated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ctd_scale.batches import Preferences
from ctd_scale.config_diffusion import DiffusionConfig
from ctd_scale.diffusion.inference import DensityModel
from ctd_scale.diffusion.train import WEIGHTS, train_loop

ITEMS, DIM = 8, 8


def planted(folder: Path, **settings: Any) -> dict[str, Any]:
    """Eight directions, each followed by its own item; a condition says nothing about where its item lies."""
    random = np.random.default_rng(0)
    vectors = random.standard_normal((ITEMS, DIM)).astype(np.float32)
    directions = random.standard_normal((ITEMS, DIM))
    targets = np.tile(np.arange(ITEMS, dtype=np.int32), 32)
    noisy = directions[targets] + 0.1 * random.standard_normal((len(targets), DIM))
    Preferences(targets, targets, noisy.astype(np.float32), [""] * len(targets)).save(folder, "train")
    np.save(folder / "vectors.npy", vectors)
    np.save(folder / "directions.npy", directions.astype(np.float32))
    config = DiffusionConfig(
        hidden_dim=64, num_blocks=1, batch_size=128, num_negatives=7, learning_rate=5e-3, dropout=0.0, **settings
    )
    return {
        "config": config.model_dump(),
        "seed": 0,
        "preferences": str(folder),
        "vectors": str(folder / "vectors.npy"),
    }


def test_a_planted_set_is_learned(tmp_path: Path, one_worker: Any) -> None:
    given = planted(tmp_path, epochs=150, ema_decay=0.98)
    export = one_worker.run(train_loop, given)
    config = DiffusionConfig.model_validate(given["config"])
    vectors, directions = np.load(tmp_path / "vectors.npy"), np.load(tmp_path / "directions.npy")
    density = DensityModel(export, DIM, config, seed=1, device=torch.device("cpu"))
    errors = density.errors(directions, np.tile(vectors, (ITEMS, 1, 1)))
    assert errors.argmin(axis=1).tolist() == list(range(ITEMS))
    draws = density.draws(directions, 4)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    nearest = (draws @ unit.T).argmax(axis=2)
    assert np.array_equal(nearest, np.tile(np.arange(ITEMS)[:, None], (1, 4)))
    for name in ("denoising", "contrastive", "recommendation"):
        curve = [step[name] for step in one_worker.curves]
        assert np.mean(curve[-20:]) < 0.6 * np.mean(curve[:5]), name

    # The published model is seeded, and a request's answer does not depend on who shares its batch.
    again = DensityModel(export, DIM, config, seed=1, device=torch.device("cpu"))
    assert np.array_equal(again.draws(directions, 4), draws)
    assert np.allclose(density.draws(directions[2:3], 4), draws[2:3], atol=1e-4)
    assert np.allclose(density.draws(directions, 1)[:, 0], draws[:, 0], atol=1e-4)
    assert np.allclose(density.draws(3 * directions, 4), draws, atol=1e-4), "only the direction of a preference counts"
    assert np.allclose(density.errors(directions[2:3], vectors[None]), errors[2:3], atol=1e-4)
    assert density.draws(directions).shape == (ITEMS, config.num_draws, DIM)
    other = DensityModel(export, DIM, config, seed=2, device=torch.device("cpu"))
    assert not np.allclose(other.draws(directions, 4), draws, atol=1e-4)


@pytest.mark.parametrize("negatives", ["uniform", "popularity", "in_batch", "hard"])
def test_a_killed_loop_ends_where_an_uninterrupted_one_ends(tmp_path: Path, one_worker: Any, negatives: str) -> None:
    given = planted(tmp_path, epochs=6, checkpoint_every_steps=5, contrastive_negatives=negatives, num_contrasted=2)
    whole = load_file(one_worker.run(train_loop, given) / WEIGHTS)
    assert one_worker.steps == list(range(1, 13)), "2 batches of 128 in 256 rows, 6 epochs"
    one_worker.restart(die_at=2)
    with pytest.raises(KeyboardInterrupt):
        one_worker.run(train_loop, given)
    resumed = load_file(one_worker.run(train_loop, given) / WEIGHTS)
    assert one_worker.steps == list(range(1, 13))
    assert resumed.keys() == whole.keys()
    for name, value in whole.items():
        assert torch.allclose(resumed[name], value, atol=1e-5), name
