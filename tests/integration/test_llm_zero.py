"""ZeRO: every stage trains the same model, on one worker or two, in one part or several, resumed or not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from loops import Training, exported, train_on_two, train_one_by_one
from safetensors.numpy import load_file
from safetensors.torch import save_file

from ctd_scale import training
from ctd_scale.artifacts import Run
from ctd_scale.config import HistoryConfig, LLMConfig, RunConfig, validate_config
from ctd_scale.llm import train, zero
from ctd_scale.llm.history import HISTORY, history_weights, train_history
from ctd_scale.llm.inference import PreferenceModel
from ctd_scale.llm.reader import HistoryReader
from ctd_scale.llm.validation import SHARES
from ctd_scale.llm.weights import BACKBONE, HEADS, load_vectors
from ctd_scale.ranking import rank_targets

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_session", "process_group")]

EPOCHS = 3


def make_run(folder: Path, name: str, tiny_chain: Any) -> Run:
    """The inputs of the stage, published as the stages before it would."""
    run = Run(str(folder), name)
    log, tokens = tiny_chain.log, tiny_chain.tokens
    embeddings = type(tokens)(
        *(np.random.default_rng(1).standard_normal((count, 12)).astype(np.float32) for count in (log.num_users, 20))
    )
    with run.publish("interactions", config_hash="", inputs={}) as target:
        log.save(target)
    inputs = {"interactions": run.fetch("interactions").digest}
    with run.publish("embeddings", config_hash="", inputs=inputs) as target:
        embeddings.save(target)
    inputs = {"embeddings": run.fetch("embeddings").digest}
    with run.publish("tokens", config_hash="", inputs=inputs, facts={"token_dim": 32, "num_ways": 2}) as target:
        tokens.save(target)
    return run


def make_config(backbone: Path, workers: int = 1, **changes: Any) -> RunConfig:
    llm = {
        "backbone": str(backbone),
        "num_hidden_layers": 2,
        "max_history": 5,
        "preference_dim": 12,
        "item_vectors": "joined",
        "dtype": "float32",
        "epochs": EPOCHS,
        "batch_tokens": 100,
        "token_dropout": 0.2,
        "text_every": 2,
        "learning_rate": 1e-2,
        "head_learning_rate": 2e-2,
        **changes,
    }
    resources = {"num_workers": workers, "threads_per_worker": 1, "max_failures": 0}
    return validate_config({"llm": llm, "resources": {"llm": resources}}, source="test")


def weights(folder: Path) -> dict[str, np.ndarray]:
    """Everything that is published, by name."""
    return {**load_file(folder / HEADS), **load_file(folder / BACKBONE / "model.safetensors")}


InThisProcess = Callable[[Path], AbstractContextManager[Any]]


@pytest.fixture(scope="module")
def plain_run(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_chain: Any,
    backbone: Path,
    ray_session: None,
    process_group: None,
    in_this_process: InThisProcess,
) -> Run:
    """This process, ZeRO 2, uninterrupted, through the stage: what all others must equal."""
    folder = tmp_path_factory.mktemp("plain")
    run = make_run(folder, "plain", tiny_chain)
    with in_this_process(folder / "worker"):
        train.train_llm(run, make_config(backbone), "key")
    return run


@pytest.fixture(scope="module")
def plain(plain_run: Run) -> dict[str, np.ndarray]:
    return weights(plain_run.fetch("models/llm").path)


def test_it_learns_and_says_what_it_read(plain_run: Run, plain: Any, tiny_chain: Any) -> None:
    started = load_file(tiny_chain.folder / BACKBONE / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    assert np.abs(plain[name] - started[name]).max() > 0.01
    facts = plain_run.fetch("models/llm").manifest["facts"]
    assert facts["supervised"] == EPOCHS * int(np.maximum(tiny_chain.log.train_lengths() - 1, 0).sum())
    assert 0 <= facts["padding_share"] < 0.5


def test_the_epoch_that_ranks_validation_best_is_kept(plain_run: Run, backbone: Path, tiny_chain: Any) -> None:
    facts = plain_run.fetch("models/llm").manifest["facts"]
    assert facts["best_epoch"] < EPOCHS, "this training should overfit"
    assert facts["llm_share"] == 1.0, "there is nothing else"
    assert facts["validation_ndcg@10"] == pytest.approx(ranked(plain_run, tiny_chain, backbone), abs=1e-6)


def ranked(run: Run, tiny_chain: Any, backbone: Path) -> float:
    """NDCG@10 of what is published over the validation items."""
    log, folder = tiny_chain.log, run.fetch("models/llm").path
    model = PreferenceModel(folder, tiny_chain.tokens, log.catalogue, make_config(backbone).llm)
    vectors = load_vectors(folder)
    directions = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    ranks = rank_targets(
        log, lambda users, histories: model(histories) @ directions.T, "validation", mask_seen=True, chunk_users=7
    )
    return float(ranks.gains().mean())


# -- variants ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Variant:
    """One training: what differs in its config, after which step it is killed, whose checkpoint it goes on from, and
    whether a history is read before the LLM."""

    name: str
    changes: dict[str, Any]
    killed_after: int = 0
    goes_on: str = ""
    reads: bool = False


STAGES = (1, 2, 3)
SPARING = {"accumulation_steps": 2, "gradient_checkpointing": True}


def at(stage: int) -> dict[str, Any]:
    return {"zero_stage": stage, "checkpoint_every_steps": 2}


KILLED_ON_ONE = [Variant(f"one, killed, ZeRO {stage}", at(stage), killed_after=4) for stage in (0, *STAGES)]
ON_TWO = [
    Variant("two", {}),
    Variant("two in four parts", {"accumulation_steps": 4}),
    Variant("two, ZeRO 1", {"zero_stage": 1}),
    Variant("two, ZeRO 3", {"zero_stage": 3}),
    Variant("two, optimizer in host memory", {"offload": "optimizer"}),
    Variant("two, all in host memory", {"zero_stage": 3, "offload": "parameters"}),
    Variant("two that read histories, ZeRO 3", {"zero_stage": 3}, reads=True),
    Variant("two, half precision", {"zero_stage": 3, "dtype": "bfloat16"}),
    *(Variant(f"two, killed, ZeRO {stage}", at(stage), killed_after=4) for stage in STAGES),
    *(Variant(f"one then two, ZeRO {stage}", at(stage), goes_on=f"one, killed, ZeRO {stage}/4") for stage in STAGES),
]
ON_ONE = [
    Variant("one in three parts", {"accumulation_steps": 3}),
    Variant("one, ZeRO 0", {"zero_stage": 0}),
    Variant("one that reads histories", {}, reads=True),
    Variant("one, the last epoch", {"validation_users": 0}),
    Variant("one, activations forgotten", {"gradient_checkpointing": True}),
    *(Variant(f"two then one, ZeRO {stage}", at(stage), goes_on=f"two, killed, ZeRO {stage}/4") for stage in STAGES),
    Variant("one then one", at(2), goes_on="one, killed, ZeRO 2/4"),
    # What is short of memory goes on otherwise.
    Variant("ZeRO 1 then 2, in parts", {**at(2), **SPARING}, goes_on="one, killed, ZeRO 1/4"),
    Variant("ZeRO 2 then 1 in host memory", {**at(1), "offload": "optimizer"}, goes_on="one, killed, ZeRO 2/4"),
    Variant("ZeRO 3 then 3 in host memory", {**at(3), "offload": "parameters"}, goes_on="one, killed, ZeRO 3/4"),
    Variant("ZeRO 0 then 0", at(0), goes_on="one, killed, ZeRO 0/4"),
]
VARIANTS = [*KILLED_ON_ONE, *ON_TWO, *ON_ONE]
FINISHED = [each for each in VARIANTS if not each.killed_after]


@pytest.fixture(scope="module")
def folder(
    plain_run: Run, backbone: Path, tmp_path_factory: pytest.TempPathFactory, in_this_process: InThisProcess
) -> Path:
    """What all variants have exported: those of one worker here, those of two by Ray Train."""
    made = tmp_path_factory.mktemp("variants")
    given = {name: str(plain_run.fetch(name).path) for name in ("interactions", "tokens", "embeddings")}
    history = made / "history.safetensors"
    torch.manual_seed(0)
    reader = HistoryReader(12, 5, 1).state_dict()
    save_file({"vectors": torch.randn(20, 12), **{f"reader.{name}": value for name, value in reader.items()}}, history)
    given |= {"backbone": str(backbone), "seed": 0, "mask_seen": True, "history_dropout": 0.0}

    def trainings(variants: list[Variant]) -> list[Training]:
        made = []
        for each in variants:
            config = make_config(backbone, **each.changes).llm.model_dump()
            own = {**given, "config": config, "history": str(history) if each.reads else None}
            made.append(Training(each.name, train.train_loop, own, each.killed_after, each.goes_on))
        return made

    def on_one(variants: list[Variant]) -> None:
        here = {"logs": str(made / "logs"), "resources": make_config(backbone).resources.llm.model_dump()}
        with in_this_process(made / f"worker of {len(variants)}"):
            train_one_by_one({"trainings": trainings(variants), "folder": str(made), **here})

    on_one(KILLED_ON_ONE)
    train_on_two(trainings(ON_TWO), made)
    on_one(ON_ONE)
    return made


READING = ("two that read histories, ZeRO 3", "one that reads histories")
OTHERWISE = ("two, half precision", "one, the last epoch", *READING)


@pytest.mark.parametrize("name", [each.name for each in FINISHED if each.name not in OTHERWISE])
def test_however_it_is_trained_it_learns_the_same(folder: Path, plain: Any, name: str) -> None:
    got = weights(exported(folder, name))
    assert got.keys() == plain.keys()
    for parameter, values in plain.items():
        np.testing.assert_allclose(got[parameter], values, atol=3e-4, err_msg=parameter)


def test_what_was_killed_has_gone_on_from_where_it_was(folder: Path) -> None:
    for each in VARIANTS:
        steps = sorted(int(step.name) for step in (folder / each.name).iterdir())
        if each.killed_after:
            assert steps == [2, 4]
        elif each.goes_on:
            assert steps[0] == 6, "steps before the kill are not made again"
    progress = json.loads((folder / "two, killed, ZeRO 2" / "4" / zero.PROGRESS).read_text())
    assert progress == {"step": 4, "layout": {"zero_stage": 2, "offload": "none", "workers": 2}}


@pytest.mark.parametrize(("before", "now"), [(0, 2), (2, 0), (2, 3), (3, 1)])
def test_what_cannot_go_on_is_refused(folder: Path, before: int, now: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "world_size", lambda: 1)
    saved, config = folder / f"one, killed, ZeRO {before}" / "4", LLMConfig(zero_stage=now)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=f"llm.zero_stage={before}, from which llm.zero_stage={now} cannot go on"):
        zero.opened(saved, config, "a training").__enter__()


def test_ranks_that_downloaded_apart_read_what_one_of_them_rewrote(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "world_size", lambda: 1)
    saved, config = folder / "two, killed, ZeRO 2" / "4", LLMConfig(zero_stage=2)
    downloads = [Path(shutil.copytree(saved, tmp_path / name)) for name in ("first", "second")]
    with ExitStack() as ranks:
        read = []
        for rank, download in enumerate(downloads):
            monkeypatch.setattr(training, "local_rank", lambda rank=rank: rank)
            read.append(ranks.enter_context(zero.opened(download, config, str(tmp_path))))
        assert read[0] == read[1]
        assert read[0] is not None
        assert read[0].universal
        assert list((read[0].folder / zero.TAG).iterdir())
        monkeypatch.setattr(training, "local_rank", lambda: 0)
    assert not read[0].folder.exists()


def test_without_users_to_validate_the_last_epoch_is_kept(folder: Path, plain: Any) -> None:
    last = exported(folder, "one, the last epoch")
    assert json.loads((last / train.FACTS).read_text())["best_epoch"] == EPOCHS
    assert np.abs(weights(last)["head.vectors"] - plain["head.vectors"]).max() > 1e-2


def test_what_reads_histories_rests(folder: Path) -> None:
    """However many workers: the reader and the vectors that it was trained with stay, and W is learned."""
    one, two = (weights(exported(folder, name)) for name in reversed(READING))
    assert one.keys() == two.keys()
    for parameter, values in one.items():
        np.testing.assert_allclose(two[parameter], values, atol=3e-4, err_msg=parameter)
    facts = [json.loads((exported(folder, name) / train.FACTS).read_text()) for name in READING]
    assert facts[0]["llm_share"] == facts[1]["llm_share"] in SHARES
    read = load_file(folder / "history.safetensors")
    assert all(np.array_equal(one[f"head.{name}"], values) for name, values in read.items())
    assert np.abs(one["head.project.weight"]).max() > 1e-2


def test_histories_are_read_before_the_llm_is_there(
    tmp_path: Path, tiny_chain: Any, backbone: Path, in_this_process: InThisProcess
) -> None:
    run, config = make_run(tmp_path, "reading", tiny_chain), make_config(backbone, epochs=1)
    config = config.model_copy(update={"history": HistoryConfig(num_blocks=1, epochs=3)})
    with in_this_process(tmp_path / "worker"):
        train_history(run, config, "key")
        read = run.fetch("models/history")
        train.train_llm(run, config, "key", history=read)
    published = weights(run.fetch("models/llm").path)
    found = load_file(read.path / HISTORY)
    assert found["vectors"].shape == (20, 12)
    assert all(np.array_equal(published[f"head.{name}"], values) for name, values in found.items() if "log" not in name)
    run.require_made_from(run.fetch("models/llm"), read)
    assert 1 <= read.manifest["facts"]["best_epoch"] <= 3
    facts = run.fetch("models/llm").manifest["facts"]
    assert facts["llm_share"] in SHARES
    assert facts["validation_ndcg@10"] == pytest.approx(ranked(run, tiny_chain, backbone), abs=1e-6)


def test_without_blocks_nothing_is_read_before(tmp_path: Path, tiny_chain: Any, backbone: Path) -> None:
    run = make_run(tmp_path, "not-reading", tiny_chain)
    train_history(run, make_config(backbone), "key")
    assert history_weights(run.fetch("models/history")) is None


def near(vectors: np.ndarray, expected: np.ndarray) -> float:
    cosines = (vectors * expected).sum(axis=1) / np.linalg.norm(vectors, axis=1) / np.linalg.norm(expected, axis=1)
    return float(cosines.min())


def test_bfloat16_is_close(folder: Path, plain: Any) -> None:
    assert near(load_vectors(exported(folder, "two, half precision")), plain["head.vectors"]) > 0.95


@pytest.mark.gpu
@pytest.mark.parametrize(
    "changes",
    [
        {"zero_stage": 2},
        {"zero_stage": 2, "offload": "optimizer"},
        {"zero_stage": 3, "offload": "parameters"},
        {"zero_stage": 3, "gradient_checkpointing": True, "accumulation_steps": 2},
    ],
    ids=lambda value: "-".join(map(str, value.values())),
)
def test_on_every_gpu_with_nccl_in_bfloat16(
    tmp_path: Path, tiny_chain: Any, backbone: Path, plain: Any, changes: dict[str, Any]
) -> None:

    config = make_config(backbone, torch.cuda.device_count(), dtype="bfloat16", **changes)
    llm = config.resources.llm.model_copy(update={"use_gpu": True})
    config = config.model_copy(update={"resources": config.resources.model_copy(update={"llm": llm})})
    run = make_run(tmp_path, "gpu", tiny_chain)
    train.train_llm(run, config, "key")
    assert near(load_vectors(run.fetch("models/llm").path), plain["head.vectors"]) > 0.95


def test_the_config_in_deepspeeds_words() -> None:
    made = zero.deepspeed_config(LLMConfig(zero_stage=3, offload="parameters", accumulation_steps=4), torch.bfloat16)
    assert made["zero_optimization"]["stage"] == 3
    assert made["zero_optimization"]["offload_optimizer"]["device"] == "cpu"
    assert made["zero_optimization"]["offload_param"]["device"] == "cpu"
    assert made["gradient_accumulation_steps"] == 4
    assert made["bf16"] == {"enabled": True}
    assert "offload_optimizer" not in zero.deepspeed_config(LLMConfig(), torch.float32)["zero_optimization"]
    with pytest.raises(ValueError, match=r"llm\.offload='parameters' needs llm\.zero_stage=3, got 2"):
        LLMConfig(offload="parameters")
