"""SASRec and BSARec: what they see, what they are trained on, and against plain computations."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ctd_scale.baselines.sequential import SequenceModel, sequential_task
from ctd_scale.batches import Catalogue, InteractionLog
from ctd_scale.config import RunConfig
from ctd_scale.config_baselines import BSARecConfig, SequentialConfig
from ctd_scale.sequence import LAST, low_pass_matrix, prefixes
from ctd_scale.tasks import Task

ITEMS = 15
SMALL = {"embed_dim": 16, "num_heads": 2, "max_history": 6, "dropout": 0.0, "batch_size": 8}
CONFIGS = [SequentialConfig(**SMALL), BSARecConfig(**SMALL)]
NAMES = ["sasrec", "bsarec"]
both = pytest.mark.parametrize("config", CONFIGS, ids=NAMES)


def made(config: SequentialConfig) -> SequenceModel:
    torch.manual_seed(0)
    model = SequenceModel(ITEMS, config)
    for parameter in model.parameters():  # as initialised, all states are nearly alike
        torch.nn.init.normal_(parameter, std=0.5)
    return model.eval()


def random_log() -> InteractionLog:
    random = np.random.default_rng(0)
    lengths = np.array([2, 3, 5, 9, 20, 14])
    names = [str(item) for item in range(ITEMS)]
    return InteractionLog(
        np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        random.integers(0, ITEMS, lengths.sum()).astype(np.int32),
        [str(user) for user in range(len(lengths))],
        Catalogue(names, names, [""] * ITEMS),
    )


def task_of(log: InteractionLog, config: SequentialConfig) -> Task:
    name = NAMES[CONFIGS.index(config)]
    return sequential_task(log, RunConfig.model_validate({"baselines": {name: config.model_dump()}}), name)


@pytest.mark.parametrize("length", [6, 7, 50])
@pytest.mark.parametrize("frequencies", [1, 3])
def test_the_low_pass_is_that_of_the_fourier_transform(length: int, frequencies: int) -> None:
    states = torch.randn(4, length, 3)
    spectrum = torch.fft.rfft(states, dim=1, norm="ortho")
    spectrum[:, frequencies:] = 0
    expected = torch.fft.irfft(spectrum, n=length, dim=1, norm="ortho")
    torch.testing.assert_close(low_pass_matrix(length, frequencies) @ states, expected, atol=1e-5, rtol=1e-4)


@both
def test_padding_changes_nothing(config: SequentialConfig) -> None:
    """Alone, in a batch with longer histories, and cut to the places that there are."""
    model, users = made(config), np.zeros(1, np.int64)
    histories = [np.array([3, 1], np.int32), np.arange(9, dtype=np.int32), np.array([4], np.int32)]
    with torch.inference_mode():
        together = model.score(np.zeros(3, np.int64), histories)
        for history, row in zip(histories, together, strict=True):
            torch.testing.assert_close(model.score(users, [history])[0], row, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(
            model.score(users, [histories[1]]), model.score(users, [histories[1][-config.max_history :]])
        )


def test_sasrec_hears_nothing_of_what_follows_and_bsarec_does() -> None:
    one, other = torch.tensor([[1, 2, 3, 4]]), torch.tensor([[1, 2, 3, 9]])
    for config, same in zip(CONFIGS, (True, False), strict=True):
        model = made(config)
        with torch.inference_mode():
            states = [model.encode(items)[:, :3] for items in (one, other)]
        assert torch.allclose(*states, atol=1e-6) is same


@both
def test_the_last_place_alone_is_the_last_of_all(config: SequentialConfig) -> None:
    model, items = made(config), torch.tensor([[1, 2, 3, 4], [ITEMS, ITEMS, 5, 6]])
    torch.testing.assert_close(model.encode(items, LAST), model.encode(items)[:, -1:])


@both
def test_every_prefix_is_supervised_once_and_sees_only_what_was_before(config: SequentialConfig) -> None:
    log = random_log()
    task = task_of(log, config)
    found = []
    for step in task.steps(0):
        items, targets = task.collate(step, np.random.default_rng(0))
        assert task.supervised((items, targets)) == len(step)
        found += [
            (*row[row != ITEMS].tolist(), target) for row, target in zip(items.numpy(), targets.tolist(), strict=True)
        ]
    expected = []
    for user in range(log.num_users):
        sequence = np.asarray(log.train_sequence(user)).tolist()
        expected += [tuple(sequence[max(0, end - 6) : end + 1]) for end in range(1, len(sequence))]
    assert sorted(found) == sorted(expected)


def test_prefixes_of_short_sequences() -> None:
    users, ends = prefixes(np.array([0, 1, 2, 4]))
    assert users.tolist() == [2, 3, 3, 3]
    assert ends.tolist() == [1, 1, 2, 3]


@both
def test_the_loss_is_the_cross_entropy_of_the_scores(config: SequentialConfig) -> None:
    model, log = made(config), random_log()
    task = task_of(log, config)
    items, targets = task.collate(task.steps(0)[0], np.random.default_rng(0))
    loss = model(items, targets)
    logits = model.encode(items)[:, -1] @ model.items.weight[:ITEMS].T
    torch.testing.assert_close(loss, F.cross_entropy(logits, targets, reduction="sum"))
    loss.backward()
    assert model.items.weight.grad is not None
    assert not model.items.weight.grad[ITEMS].any(), "padding is never learned"
