"""What reads the items of a history: against each history alone, a planted truth, and how it enters the LLM."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from ctd_scale.batches import Catalogue, InteractionLog, NodeArrays
from ctd_scale.config import RunConfig, validate_config
from ctd_scale.llm.history import HistoryModel, history_task, load_untrained, new_head, train_loop
from ctd_scale.llm.reader import HistoryReader, history_widths
from ctd_scale.llm.train import new_model, parameter_groups
from ctd_scale.ranking import rank_targets
from ctd_scale.sequence import latest_first
from ctd_scale.tasks import WEIGHTS, restore, scorer_of

USERS, ITEMS, DIM = 80, 12, 16


def make_config(dropout: float = 0.1, epochs: int = 30, **llm: Any) -> RunConfig:
    history = {"num_blocks": 1, "dropout": dropout, "epochs": epochs, "batch_size": 32, "learning_rate": 5e-3}
    llm = {"preference_dim": DIM, "max_history": 6, "num_hidden_layers": 1, **llm}
    return validate_config({"history": history, "llm": llm, "evaluation": {"mask_seen": False}}, source="test")


def steps_of_two() -> InteractionLog:
    """Next is the last but one, plus one: no sum of weighted vectors says so."""
    random = np.random.default_rng(0)
    sequences = []
    for _ in range(USERS):
        sequence = random.integers(0, ITEMS, 2).tolist()
        while len(sequence) < 9:
            sequence.append((sequence[-2] + 1) % ITEMS)
        sequences.append(sequence)
    names = [str(item) for item in range(ITEMS)]
    return InteractionLog(
        (9 * np.arange(USERS + 1)).astype(np.int64),
        np.concatenate(sequences).astype(np.int32),
        [str(user) for user in range(USERS)],
        Catalogue(names, names, [""] * ITEMS),
    )


LOG = steps_of_two()


def arguments_for(folder: Path, backbone: Path, **llm: Any) -> dict[str, Any]:
    (folder / "interactions").mkdir()
    LOG.save(folder / "interactions")
    embeddings = [np.random.default_rng(1).standard_normal((n, DIM)).astype(np.float32) for n in (USERS, ITEMS)]
    (folder / "embeddings").mkdir()
    NodeArrays(*embeddings).save(folder / "embeddings")
    return {
        "config": make_config(**llm).model_dump(),
        "backbone": str(backbone),
        "interactions": str(folder / "interactions"),
        "embeddings": str(folder / "embeddings"),
    }


@pytest.mark.parametrize(
    ("max_history", "widths"), [(1, [1]), (3, [3]), (4, [4]), (5, [4, 5]), (8, [4, 8]), (50, [4, 8, 16, 32, 50])]
)
def test_widths_of_histories(max_history: int, widths: list[int]) -> None:
    assert history_widths(max_history) == widths


def test_histories_are_given_with_the_latest_item_first() -> None:
    assert latest_first([np.array([5, 6, 7]), np.array([8])], 2).tolist() == [[7, 6], [8, -1]]
    assert torch.from_numpy(latest_first([np.array([5]), np.array([8])], 2)).tolist() == [[5], [8]]


def test_histories_of_unlike_length_are_read_as_each_alone() -> None:
    """Of several widths, in any order; and where a batch has none of some width."""
    torch.manual_seed(0)
    reader, vectors = HistoryReader(5, 20, 2), torch.nn.Parameter(torch.randn(9, 5))
    histories = [np.random.default_rng(length).integers(0, 8, length) for length in (20, 3, 9, 1, 16, 4, 25)]
    together = reader(lambda items: vectors[items], torch.from_numpy(latest_first(histories, 30)))
    for row, history in enumerate(histories):
        alone = reader(lambda items: vectors[items], torch.from_numpy(history[None, ::-1].copy()))
        assert torch.allclose(together[row], alone[0], atol=1e-5)
    together.square().sum().backward()
    assert vectors.grad is not None
    assert torch.nonzero(vectors.grad.abs().sum(dim=1) == 0).flatten().tolist() == [8], "nobody has read it"


def test_what_is_read_is_the_blocks_turned_and_the_latest_items() -> None:
    torch.manual_seed(0)
    reader, vectors = HistoryReader(5, 8, 2), torch.randn(9, 5)
    for parameter in reader.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    found = reader(lambda items: vectors[items], torch.tensor([[4, 2, 7, 1, 0], [3, 6, -1, -1, -1]]))
    for row, items in enumerate([[0, 1, 7, 2, 4], [6, 3]]):  # the oldest first
        read = reader.turn(reader.encoder(vectors[items][None], torch.ones(1, len(items), dtype=torch.bool))[0, -1])
        latest = sum(weight * vectors[item] for weight, item in zip(reader.recency, items[::-1], strict=False))
        assert torch.allclose(found[row], read + latest, atol=1e-5)


@pytest.mark.parametrize("limit", [100, 5], ids=["all items", "drawn negatives"])
def test_workers_sum_to_what_one_would_compute(limit: int) -> None:
    config = make_config(0.0, full_softmax_limit=limit, sampled_negatives=7)
    embeddings = np.random.default_rng(1).standard_normal((ITEMS, DIM)).astype(np.float32)
    task = history_task(LOG, config, new_head(config, embeddings, None))
    assert sum(map(len, task.steps(0))) == USERS * 6, "every training prefix once"
    batch = task.collate(task.steps(0)[0], np.random.default_rng(0))
    whole = task.model(*batch)
    parts = [task.model(*(part[rank::3] for part in batch)) for rank in range(3)]
    assert sum(parts).item() == pytest.approx(whole.item(), rel=1e-5)
    empty = task.model(*(part[:0] for part in batch))
    assert empty.item() == 0
    empty.backward()


def test_without_a_prefix_there_is_nothing_to_learn() -> None:
    alone = InteractionLog(np.arange(0, 7, 3), np.arange(6, dtype=np.int32), ["a", "b"], LOG.catalogue)
    embeddings = np.zeros((ITEMS, DIM), np.float32)
    with pytest.raises(ValueError, match="two training interactions"):
        history_task(alone, make_config(), new_head(make_config(), embeddings, None))


@pytest.mark.parametrize("changes", [{}, {"full_softmax_limit": 5, "sampled_negatives": 8}, {"item_vectors": "joined"}])
def test_the_next_item_is_first(changes: dict[str, Any], tmp_path: Path, one_worker: Any, backbone: Path) -> None:
    arguments = arguments_for(tmp_path, backbone, **changes)
    export = one_worker.run(train_loop, arguments)
    config, _, head = load_untrained(arguments)
    model = HistoryModel(head, config.llm).eval()
    found = load_file(export / WEIGHTS)
    assert not any("project" in name for name in found), "there is no LLM yet"
    restore(model, found)
    ranks = rank_targets(LOG, scorer_of(model), "test", mask_seen=False, chunk_users=16)
    assert (ranks.ranks == 1).mean() > 0.95


def test_an_llm_begins_with_what_was_read(backbone: Path, tmp_path: Path) -> None:
    config = make_config().llm
    embeddings = np.random.default_rng(1).standard_normal((ITEMS, DIM)).astype(np.float32)
    torch.manual_seed(3)
    reader = {f"reader.{name}": value for name, value in HistoryReader(DIM, 6, 1).state_dict().items()}
    history = {"vectors": torch.randn(ITEMS, DIM), "log_temperature": torch.tensor([-2.0]), **reader}
    model = new_model(config, backbone, embeddings, 0, history=history).eval()
    recent = torch.tensor([[4, 2, 7], [3, -1, -1]])
    begun = model.head.begin(recent)
    assert torch.equal(model.head(torch.randn(2, model.head.project.in_features), recent), begun)
    reading = HistoryReader(DIM, 6, 1)
    reading.load_state_dict({name.removeprefix("reader."): value for name, value in reader.items()})
    assert torch.equal(begun, reading.eval()(lambda items: history["vectors"][items], recent))
    fresh = parameter_groups(model, config)[1]["params"]
    assert any(each is model.head.project.weight for each in fresh)
    assert not any(parameter.requires_grad for parameter in (*model.head.reader.parameters(), model.head.vectors))
    assert F.cosine_similarity(model.head.item_vectors(), history["vectors"]).min() == pytest.approx(1)


@pytest.mark.parametrize("ema_decay", [0.0, 0.6])
def test_training_is_the_plain_loop(ema_decay: float, tmp_path: Path, one_worker: Any, backbone: Path) -> None:
    """Two epochs with dropout, though validation items are ranked between them; of the weights themselves, or of their
    average."""
    arguments = arguments_for(tmp_path, backbone)
    arguments["config"]["history"] |= {"epochs": 2, "dropout": 0.3, "validation_users": 0, "ema_decay": ema_decay}
    found = load_file(one_worker.run(train_loop, arguments) / WEIGHTS)
    config, log, head = load_untrained(arguments)
    task = history_task(log, config, head)
    weights = {name: each for name, each in task.model.named_parameters() if each.requires_grad}
    average = {name: each.detach().clone() for name, each in weights.items()}
    optimizer = torch.optim.Adam(weights.values(), lr=5e-3)
    for step, samples in enumerate(task.steps(0) + task.steps(1)):
        batch = task.collate(samples, np.random.default_rng((0, 42, step)))
        torch.manual_seed(step)
        optimizer.zero_grad()
        (task.model(*batch) / len(samples)).backward()
        optimizer.step()
        for name, each in weights.items():
            decay = min(ema_decay, (step + 1) / (step + 11))
            average[name] = decay * average[name] + (1 - decay) * each.detach()
    restore(task.model, average)
    assert found.keys() == weights.keys()
    histories = [log.history(user, "test") for user in range(USERS)]
    with torch.no_grad():
        plain = task.model.eval().score(np.arange(USERS), histories)
        assert torch.allclose(found["head.vectors"], weights["head.vectors"], atol=1e-4)
        restore(task.model, found)
        # Not all weights themselves: a bias of the keys changes nothing, so Adam moves it by what rounding leaves.
        assert torch.allclose(task.model.score(np.arange(USERS), histories), plain, atol=1e-4)
