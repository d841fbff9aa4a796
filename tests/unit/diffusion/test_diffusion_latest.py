"""A denoiser that attends to the latest items: who has which, and that it learns what the preference does not say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ctd_scale.batches import Catalogue, InteractionLog, Preferences
from ctd_scale.config import ConfigError, validate_config
from ctd_scale.config_diffusion import DiffusionConfig
from ctd_scale.diffusion.denoiser import Denoiser, new_denoiser
from ctd_scale.diffusion.inference import DensityModel
from ctd_scale.diffusion.objective import cumulative_alphas, diffusion_losses
from ctd_scale.diffusion.sampler import common_noise, denoising_errors, error_probes, generate
from ctd_scale.diffusion.train import WEIGHTS, train_loop
from ctd_scale.diffusion.training_set import LatestRead

DIM, ITEMS = 8, 6


@pytest.fixture
def denoiser() -> Denoiser:
    torch.manual_seed(0)
    made = Denoiser(DIM, hidden_dim=16, num_blocks=2, dropout=0.5, condition_items=3).eval()
    for block, attention in zip(made.blocks, made.attend, strict=True):  # both start as the identity
        nn.init.normal_(block.modulate.weight, std=0.3)
        nn.init.normal_(attention.leave.weight, std=0.3)
    nn.init.normal_(made.latest.nothing)
    nn.init.normal_(made.no_condition)
    return made


def test_items_count_in_their_order_for_their_own_row_alone(denoiser: Denoiser) -> None:
    noisy, timesteps, condition = torch.randn(2, DIM), torch.tensor([3, 80]), torch.randn(2, DIM)
    latest = torch.randn(2, 3, DIM)
    said = denoiser(noisy, timesteps, condition, None, latest)
    other = latest.clone()
    other[1] = latest[1].flip(0)
    changed = denoiser(noisy, timesteps, condition, None, other)
    assert torch.allclose(changed[0], said[0], atol=1e-6)
    assert not torch.allclose(changed[1], said[1], atol=1e-3)


def test_padding_is_not_heard(denoiser: Denoiser) -> None:
    noisy, timesteps, condition = torch.randn(2, DIM), torch.tensor([3, 80]), torch.randn(2, DIM)
    latest = torch.randn(2, 3, DIM)
    latest[0, 1:] = 0
    padded = denoiser(noisy, timesteps, condition, None, latest)
    alone = denoiser(noisy[:1], timesteps[:1], condition[:1], None, latest[:1, :1])
    assert torch.allclose(padded[:1], alone, atol=1e-6)
    nobody = denoiser(noisy, timesteps, condition, None, torch.zeros(2, 3, DIM))
    assert nobody.isfinite().all()


def test_who_is_told_nothing_does_not_hear_the_items_either(denoiser: Denoiser) -> None:
    noisy, timesteps, condition = torch.randn(2, DIM), torch.tensor([3, 80]), torch.randn(2, DIM)
    dropped = torch.tensor([True, False])
    first = denoiser(noisy, timesteps, condition, dropped, torch.randn(2, 3, DIM))
    second = denoiser(noisy, timesteps, condition, dropped, torch.randn(2, 3, DIM))
    assert torch.equal(first[0], second[0])
    assert not torch.allclose(first[1], second[1], atol=1e-3)


def test_shared_items_are_the_same_items_for_each_candidate(denoiser: Denoiser) -> None:
    config = DiffusionConfig(hidden_dim=16, condition_items=3, guidance=1.5, error_evaluations=3, sampling_steps=4)
    condition, latest, candidates = torch.randn(2, DIM), torch.randn(2, 3, DIM), torch.randn(2, 5, DIM)
    probes, noise = error_probes(config, DIM, 0), common_noise(4, DIM, 0)
    errors = denoising_errors(denoiser, condition, candidates, *probes, config, latest)
    drawn = generate(denoiser, condition, noise, config, latest)
    for user in range(2):
        own = (condition[user : user + 1], latest[user : user + 1])
        for place in range(5):
            one = denoising_errors(denoiser, own[0], candidates[user, place].expand(1, 1, -1), *probes, config, own[1])
            assert torch.allclose(one[0, 0], errors[user, place], atol=1e-5)
        for number in range(4):
            one = generate(denoiser, own[0], noise[number : number + 1], config, own[1])
            assert torch.allclose(one[0, 0], drawn[user, number], atol=1e-4)


def test_the_losses_are_those_of_each_row_with_its_items(denoiser: Denoiser) -> None:
    torch.manual_seed(1)
    batch: dict[str, Any] = {
        "condition": torch.randn(3, DIM),
        "positive": torch.randn(3, DIM),
        "negatives": torch.randn(3, 4, DIM),
        "timesteps": torch.tensor([1, 40, 99]),
        "noise": torch.randn(3, DIM),
        "dropped": torch.tensor([False, True, False]),
        "latest": torch.randn(3, 3, DIM),
    }
    fixed = {
        "alphas": cumulative_alphas(100, "linear", "sample"),
        "prediction_type": "sample",
        "temperature": 0.1,
        "contrasted": 2,
    }
    together = diffusion_losses(denoiser, **batch, **fixed)
    each = [
        diffusion_losses(denoiser, **{name: value[row : row + 1] for name, value in batch.items()}, **fixed)
        for row in range(3)
    ]
    for name, value in together._asdict().items():
        assert torch.allclose(value, torch.stack([getattr(one, name) for one in each]).mean(), atol=1e-5), name


def test_a_denoiser_without_items_has_the_weights_it_always_had() -> None:
    plain = new_denoiser(DIM, DiffusionConfig(hidden_dim=16))
    assert not [name for name in plain.state_dict() if "attend" in name or "latest" in name]


def test_the_heads_must_share_the_hidden_vector() -> None:
    with pytest.raises(ConfigError, match=r"hidden_dim=30 is no multiple of 4.*condition_items=2"):
        validate_config({"diffusion": {"hidden_dim": 30, "condition_items": 2}}, source="test")


# -- training ------------------------------------------------------------------------------------------------


def alternating(folder: Path) -> tuple[InteractionLog, Preferences]:
    """Users who walk the catalogue in a circle, from different items: the next follows from the latest alone. Of each
    the last two prefixes are exported, with a preference that says nothing."""
    starts = np.arange(48) % ITEMS
    sequences = (starts[:, None] + np.arange(7)) % ITEMS
    names = [f"item {number}" for number in range(ITEMS)]
    log = InteractionLog(
        offsets=np.arange(49, dtype=np.int64) * 7,
        items=sequences.reshape(-1).astype(np.int32),
        user_ids=[f"u{number}" for number in range(48)],
        catalogue=Catalogue([f"i{number}" for number in range(ITEMS)], names, [""] * ITEMS),
    )
    # Five of seven are training; the last two of their four prefixes end at the items 3 and 4.
    users = np.repeat(np.arange(48, dtype=np.int32), 2)
    targets = sequences[:, 3:5].reshape(-1).astype(np.int32)
    same = np.tile(np.linspace(-1, 1, DIM, dtype=np.float32), (len(users), 1))
    data = Preferences(users, targets, same, [""] * len(users))
    (folder / "log").mkdir()
    log.save(folder / "log")
    data.save(folder, "train")
    np.save(folder / "vectors.npy", np.random.default_rng(0).standard_normal((ITEMS, DIM)).astype(np.float32))
    return log, data


def test_what_was_read_before_each_target(tmp_path: Path) -> None:
    log, data = alternating(tmp_path)
    vectors = torch.arange(1, ITEMS + 1, dtype=torch.float32)[:, None].expand(ITEMS, DIM)
    read = LatestRead(log, data, 4, vectors)(torch.tensor([0, 1, 3]))
    # User 0 walks 0 1 2 3 4 5 0, user 1 walks 1 2 3 4 5 0 1; an item's vector says its number plus one.
    assert read[..., 0].tolist() == [[3, 2, 1, 0], [4, 3, 2, 1], [5, 4, 3, 2]]
    wrong = Preferences(data.users, data.targets[::-1].copy(), data.vectors, data.texts)
    with pytest.raises(ValueError, match="export them again"):
        LatestRead(log, wrong, 4, vectors)


def arguments(folder: Path, **settings: Any) -> dict[str, Any]:
    fixed: dict[str, Any] = {
        "hidden_dim": 64,
        "num_blocks": 1,
        "num_negatives": 5,
        "learning_rate": 5e-3,
        "dropout": 0.0,
    }
    config = DiffusionConfig(**{**fixed, "batch_size": 32, "condition_items": 3, **settings})
    return {
        "config": config.model_dump(),
        "seed": 0,
        "preferences": str(folder),
        "vectors": str(folder / "vectors.npy"),
        "interactions": str(folder / "log"),
    }


def test_it_learns_what_only_the_latest_item_says(tmp_path: Path, one_worker: Any) -> None:
    log, _ = alternating(tmp_path)
    given = arguments(tmp_path, epochs=100, ema_decay=0.98)
    config = DiffusionConfig.model_validate(given["config"])
    density = DensityModel(one_worker.run(train_loop, given), DIM, config, seed=1, device=torch.device("cpu"))
    vectors = np.load(tmp_path / "vectors.npy")
    users = log.split_users("test")[:ITEMS]
    histories = [log.history(int(user), "test") for user in users]
    same = np.tile(np.linspace(-1, 1, DIM, dtype=np.float32), (ITEMS, 1))
    latest = density.latest(histories, vectors)
    assert latest is not None
    assert np.array_equal(latest[:, 0], vectors[[history[-1] for history in histories]])
    errors = density.errors(same, np.tile(vectors, (ITEMS, 1, 1)), latest)
    assert np.array_equal(errors.argmin(axis=1), log.targets(users, "test"))
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    drawn = density.draws(same, 4, latest)
    assert np.array_equal((drawn @ unit.T).argmax(axis=2), np.tile(log.targets(users, "test")[:, None], (1, 4)))
    # Without the items all users are one to it.
    blind = density.errors(same, np.tile(vectors, (ITEMS, 1, 1)), np.zeros_like(latest))
    assert len(set(blind.argmin(axis=1).tolist())) == 1


def test_a_short_history_ends_with_zeros(tmp_path: Path) -> None:
    alternating(tmp_path)
    config = DiffusionConfig.model_validate(arguments(tmp_path)["config"])
    save_file(new_denoiser(DIM, config).state_dict(), tmp_path / WEIGHTS)
    density = DensityModel(tmp_path, DIM, config, seed=0, device=torch.device("cpu"))
    vectors = np.load(tmp_path / "vectors.npy")
    latest = density.latest([np.array([4, 2], np.int32), np.zeros(0, np.int32), np.array([1, 2, 3, 0])], vectors)
    assert latest is not None
    assert np.array_equal(latest[0], np.stack([vectors[2], vectors[4], np.zeros(DIM, np.float32)]))
    assert not latest[1].any()
    assert np.array_equal(latest[2], vectors[[0, 3, 2]])


def test_a_killed_loop_that_reads_items_ends_where_an_uninterrupted_one_ends(tmp_path: Path, one_worker: Any) -> None:
    alternating(tmp_path)
    given = arguments(tmp_path, epochs=4, checkpoint_every_steps=5)
    whole = load_file(one_worker.run(train_loop, given) / WEIGHTS)
    one_worker.restart(die_at=2)
    with pytest.raises(KeyboardInterrupt):
        one_worker.run(train_loop, given)
    resumed = load_file(one_worker.run(train_loop, given) / WEIGHTS)
    for name, value in whole.items():
        assert torch.allclose(resumed[name], value, atol=1e-5), name
