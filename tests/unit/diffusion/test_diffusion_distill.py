"""The one-call sampler ends where the many-call sampling of its teacher ends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from ctd_scale.batches import Preferences
from ctd_scale.config_diffusion import DiffusionConfig
from ctd_scale.diffusion.denoiser import Denoiser, new_denoiser
from ctd_scale.diffusion.distill import STUDENT, distill_loop
from ctd_scale.diffusion.inference import DensityModel
from ctd_scale.diffusion.objective import unit_variance
from ctd_scale.diffusion.plan import plan_diffusion
from ctd_scale.diffusion.sampler import at_once, common_noise, generate
from ctd_scale.diffusion.train import WEIGHTS, train_loop

DIM, ITEMS, PEOPLE = 4, 6, 3


def planted(folder: Path, **settings: Any) -> dict[str, Any]:
    """Three kinds of users, each of whom may want one of two opposite items: sampling chooses, a mean is neither."""
    random = np.random.default_rng(0)
    halves = random.standard_normal((PEOPLE, DIM))
    vectors = np.stack([halves, -halves], axis=1).reshape(ITEMS, DIM).astype(np.float32)
    targets = np.tile(np.arange(ITEMS, dtype=np.int32), 64)
    directions = random.standard_normal((PEOPLE, DIM)).astype(np.float32)
    Preferences(targets, targets, directions[targets // 2], [""] * len(targets)).save(folder, "train")
    np.save(folder / "vectors.npy", vectors)
    np.save(folder / "directions.npy", directions)
    fixed = {"hidden_dim": 64, "num_blocks": 2, "num_negatives": 5, "learning_rate": 5e-3, "dropout": 0.0}
    config = DiffusionConfig.model_validate({**fixed, "sampler": "distilled", "sampling_steps": 8, **settings})
    return {
        "config": config.model_dump(),
        "seed": 0,
        "preferences": str(folder),
        "vectors": str(folder / "vectors.npy"),
    }


def wild(config: DiffusionConfig) -> Denoiser:
    """An untrained denoiser that heeds time and condition."""
    torch.manual_seed(3)
    teacher = new_denoiser(DIM, config)
    for block in teacher.blocks:
        torch.nn.init.normal_(block.modulate.weight, std=0.3)
    return teacher.eval().requires_grad_(False)


def test_one_call_chooses_as_many_calls_do(tmp_path: Path, one_worker: Any) -> None:
    given = planted(tmp_path, epochs=60, ema_decay=0.98, distill_steps=400, recommendation_weight=0.0)
    config = DiffusionConfig.model_validate(given["config"])
    trained = one_worker.run(train_loop, given) / WEIGHTS
    save_file(load_file(trained), tmp_path / WEIGHTS)
    one_worker.restart()
    taught = one_worker.run(distill_loop, {**given, "denoiser": str(trained)}) / STUDENT
    save_file(load_file(taught), tmp_path / STUDENT)
    directions, vectors = np.load(tmp_path / "directions.npy"), np.load(tmp_path / "vectors.npy")
    many = DensityModel(tmp_path, DIM, config.model_copy(update={"sampler": "ddim"}), seed=5)
    once = DensityModel(tmp_path, DIM, config, seed=5)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    chosen = [(each.draws(directions) @ unit.T).argmax(axis=2) for each in (many, once)]
    own = np.arange(PEOPLE)[:, None] * 2
    for each in chosen:
        assert np.isin(each - own, (0, 1)).all(), "each draw is one of the two that its user may want"
        assert all(len(set(row.tolist())) == 2 for row in each), "and both come up"
    # From the same noise, the same choice: the student has not only learned how often.
    assert (chosen[0] == chosen[1]).mean() > 0.9
    # One call of the denoiser itself gives the mean of the two, which is near nothing.
    mean = DensityModel(tmp_path, DIM, config.model_copy(update={"sampler": "ddim", "sampling_steps": 1}), seed=5)
    lengths = [float(np.linalg.norm(each.draws(directions), axis=2).mean()) for each in (many, once, mean)]
    assert lengths[2] < 0.3 * lengths[0]
    assert lengths[1] == pytest.approx(lengths[0], rel=0.15)


@pytest.mark.parametrize("settings", [{"guidance": 2.0}, {"prediction_type": "v_prediction"}])
def test_guidance_and_what_is_predicted_are_part_of_what_it_learns(
    tmp_path: Path, one_worker: Any, settings: dict[str, Any]
) -> None:
    given = planted(tmp_path, distill_steps=250, sampling_steps=3, **settings)
    config = DiffusionConfig.model_validate(given["config"])
    teacher = wild(config)
    save_file(teacher.state_dict(), tmp_path / WEIGHTS)
    taught = one_worker.run(distill_loop, {**given, "denoiser": str(tmp_path / WEIGHTS)}) / STUDENT
    student = new_denoiser(DIM, config)
    student.load_state_dict(load_file(taught))
    student.eval().requires_grad_(False)
    conditions = unit_variance(torch.tensor(np.load(tmp_path / "directions.npy")))
    noise = common_noise(64, DIM, 9)
    ends = generate(teacher, conditions, noise, config)
    near = (at_once(student, conditions, noise, config) - ends).square().mean()
    untaught = (at_once(teacher, conditions, noise, config) - ends).square().mean()
    assert near < 0.1 * untaught
    assert near < 0.05 * ends.var()


def test_a_killed_loop_ends_where_an_uninterrupted_one_ends(tmp_path: Path, one_worker: Any) -> None:
    given = planted(tmp_path, distill_steps=7, checkpoint_every_steps=3, sampling_steps=2)
    save_file(wild(DiffusionConfig.model_validate(given["config"])).state_dict(), tmp_path / WEIGHTS)
    given["denoiser"] = str(tmp_path / WEIGHTS)
    whole = load_file(one_worker.run(distill_loop, given) / STUDENT)
    one_worker.restart(die_at=2)
    with pytest.raises(KeyboardInterrupt):
        one_worker.run(distill_loop, given)
    resumed = load_file(one_worker.run(distill_loop, given) / STUDENT)
    assert one_worker.steps == list(range(1, 8))
    for name, value in whole.items():
        assert torch.allclose(resumed[name], value, atol=1e-6), name


def test_a_denoiser_without_a_student_says_what_to_run(tmp_path: Path) -> None:
    config = DiffusionConfig(hidden_dim=16, sampler="distilled")
    save_file(new_denoiser(DIM, config).state_dict(), tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match=r"has no sampler\.safetensors.*run train_diffusion with that setting"):
        DensityModel(tmp_path, DIM, config, seed=0)


def test_a_plan_counts_the_steps_of_the_sampler() -> None:
    config = DiffusionConfig(hidden_dim=16, epochs=1, sampling_steps=2, distill_steps=5000)
    alone = plan_diffusion(256, 20, DIM, config)
    both = plan_diffusion(256, 20, DIM, config.model_copy(update={"sampler": "distilled"}))
    assert "5,000 of the sampler" in both.reason
    assert "sampler" not in alone.reason
    assert both.seconds > alone.seconds
