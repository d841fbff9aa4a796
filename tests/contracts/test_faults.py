"""The eight faults of the method's published code, one test each: every one fails where its fault comes back."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy import ndarray

from ctd_scale.artifacts import Run
from ctd_scale.batches import Catalogue, InteractionLog
from ctd_scale.config import LLMConfig, load_config
from ctd_scale.config_diffusion import DiffusionConfig
from ctd_scale.diffusion.denoiser import Denoiser
from ctd_scale.diffusion.objective import cumulative_alphas, diffusion_losses
from ctd_scale.diffusion.sampler import make_scheduler
from ctd_scale.graph.csr import BipartiteGraph
from ctd_scale.graph.train import train_graph
from ctd_scale.llm.collator import Collator, Row
from ctd_scale.llm.prompts import make_prompts
from ctd_scale.llm.train import Epoch, Plan, make_plan, warmup_then_linear
from ctd_scale.llm.windows import export_windows, training_windows
from ctd_scale.retrieval.dense import ExactIndex, unit_vectors
from ctd_scale.retrieval.hybrid import HybridRetriever, hybrid_scores
from ctd_scale.retrieval.text import TextIndex
from ctd_scale.tokenizer.kway import KWayTokenizer, draw_mask
from ctd_scale.tokenizer.train import tokenize


def denoiser(cond_dim: int = 8) -> Denoiser:
    torch.manual_seed(0)
    model = Denoiser(cond_dim, hidden_dim=16, num_blocks=2, dropout=0.0).eval()
    for parameter in model.parameters():  # blocks start as the identity, which would hide the condition
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def test_fault_1_every_sample_has_its_own_condition_and_noise_level() -> None:
    """Broadcast to [B, B, D], the loss of a row would depend on the conditions of the others."""
    model, generator = denoiser(), torch.Generator().manual_seed(1)

    def losses(condition: torch.Tensor, rows: slice) -> tuple[torch.Tensor, ...]:
        draw = torch.Generator().manual_seed(2)
        parts: dict[str, Any] = {
            "positive": torch.randn(4, 8, generator=draw),
            "negatives": torch.randn(4, 3, 8, generator=draw),
            "timesteps": torch.tensor([10, 200, 500, 900]),
            "noise": torch.randn(4, 8, generator=draw),
            "dropped": torch.zeros(4, dtype=torch.bool),
        }
        return diffusion_losses(
            model,
            condition=condition[rows],
            **{name: value[rows] for name, value in parts.items()},
            alphas=cumulative_alphas(1000, "squaredcos_cap_v2", "sample"),
            prediction_type="sample",
            temperature=0.1,
        )

    condition = torch.randn(4, 8, generator=generator)
    whole = losses(condition, slice(0, 4))
    singles = [losses(condition, slice(row, row + 1)) for row in range(4)]
    for term, parts in zip(whole, zip(*singles, strict=True), strict=True):
        torch.testing.assert_close(term, torch.stack(parts).mean())
    changed = condition.clone()
    changed[0] += 1.0
    torch.testing.assert_close(losses(changed, slice(1, 4)), losses(condition, slice(1, 4)))
    assert not torch.allclose(losses(changed, slice(0, 1))[0], losses(condition, slice(0, 1))[0])


@pytest.mark.parametrize("sampler", ["ddim", "dpmsolver++"])
@pytest.mark.parametrize("steps", [1, 8, 50])
def test_fault_2_sampling_starts_where_the_prior_is_the_noise_prior(sampler: Any, steps: int) -> None:
    """Trained on 1000 timesteps, sampled from pure noise at t = 99: the sampler saw noise it never trained on."""
    scheduler = make_scheduler(DiffusionConfig(sampler=sampler))
    scheduler.set_timesteps(steps)
    assert int(scheduler.timesteps[0]) == 999
    alphas = cumulative_alphas(1000, "squaredcos_cap_v2", "sample")
    assert float(alphas[-1]) == pytest.approx(0.0, abs=1e-7)


def test_fault_3_the_mask_is_drawn_per_element_and_only_in_training() -> None:
    """`bernoulli_()` in place erased the first item, shared one mask, and ran at test time."""
    mask = draw_mask((400, 32), 0.25, torch.Generator().manual_seed(0), torch.device("cpu"))
    assert mask.float().mean().item() == pytest.approx(0.25, abs=0.02)
    assert len({tuple(row.tolist()) for row in mask}) > 390  # not one mask for all samples
    torch.manual_seed(0)
    model, rows = KWayTokenizer(32, 16, 2, 24), torch.randn(400, 32)
    untouched = rows.clone()
    model.encode(rows, mask)
    assert torch.equal(rows, untouched)
    assert torch.equal(model.encode(rows), model.encode(rows))
    torch.testing.assert_close(model.encode(rows[:1]), model.encode(rows)[:1])
    published = torch.from_numpy(tokenize(model.train(), rows.numpy()))
    torch.testing.assert_close(published, model.encode(rows))
    one = mask.clone()
    one[1:] = False  # the mask of the first sample is its own
    torch.testing.assert_close(model.encode(rows, one)[1:], model.encode(rows)[1:])


def test_fault_4_the_condition_never_sees_the_answer(tiny_chain: Any) -> None:
    """In training the condition came from the gold answer; at test from generated text."""
    model = tiny_chain.preference()
    history = np.array([3, 7, 1, 4], np.int32)
    read = [
        model.prefix_preferences([Row(history, np.array([target]), answer_item=answer)])[0]
        for target, answer in [(0, -1), (9, -1)]
    ]
    np.testing.assert_array_equal(read[0], read[1])
    collator: Collator = model.collator
    with torch.no_grad():
        plain = model.model.preferences(collator([Row(history, np.array([9]))]))
        spoken = model.model.preferences(collator([Row(history, np.array([9]), answer_item=9)]))
    torch.testing.assert_close(plain, spoken, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(model([history]), read[0], rtol=1e-5, atol=1e-5)  # what serving computes


@pytest.mark.parametrize("split", ["validation", "test"])
def test_fault_4_training_evaluation_and_serving_read_the_same_condition(
    tiny_chain: Any, tmp_path: Path, split: Any
) -> None:
    """What is exported for diffusion to train on is, for every history, what a request gets; whatever followed it."""
    from ctd_scale.llm.export import ORDER, PredictPreferences, jobs

    def exported(log: InteractionLog, name: str) -> dict[tuple[str, int], list[tuple[int, ndarray]]]:
        folders = [tmp_path / name / part for part in ("interactions", "tokens")]
        for folder, part in zip(folders, (log, tiny_chain.tokens), strict=True):
            folder.mkdir(parents=True)
            part.save(folder)
        actor = PredictPreferences(
            {**tiny_chain.config.model_dump(), "generate_texts": False},
            interactions=str(folders[0]),
            tokens=str(folders[1]),
            llm=str(tiny_chain.folder),
            part_rows=10,
        )
        count = sum(len(jobs(log, part, tiny_chain.config)) for part in ORDER)
        found: dict[tuple[str, int], list[tuple[int, ndarray]]] = {}
        rows = [row for part in range(-(-count // 10)) for row in actor.table(part).to_pylist()]
        for row in rows:
            key = (ORDER[row["split"]], row["user_index"])
            found.setdefault(key, []).append((row["target_index"], np.array(row["preference"])))
        return found

    log: InteractionLog = tiny_chain.log
    users = log.split_users()
    targets = log.offsets[users + 1] - (2 if split == "validation" else 1)
    items = np.array(log.items)
    items[targets] = (items[targets] + 1) % log.num_items
    before, after = exported(log, "before"), exported(replace(log, items=items), "after")
    serve = tiny_chain.preference()
    for user in users.tolist():
        ((target, vector),), ((other, same),) = before[split, user], after[split, user]
        assert other != target
        np.testing.assert_array_equal(vector, same)
        np.testing.assert_allclose(vector, serve([log.history(user, split)])[0], rtol=1e-4, atol=1e-5)
    for user in range(log.num_users):
        sequence = log.train_sequence(user)
        trained = before.get(("train", user), [])
        assert [target for target, _ in trained] == sequence[1:].tolist()
        for end, (_, vector) in enumerate(trained[: tiny_chain.config.max_history], start=1):
            np.testing.assert_allclose(vector, serve([sequence[:end]])[0], rtol=1e-4, atol=1e-5)


def test_fault_5_the_text_score_depends_on_the_text_and_only_raises() -> None:
    """A pattern that never matched made it constant; its sign was reversed."""
    titles = ["Red River", "Silent Night", "Golden Garden", "Last Empire"]
    catalogue = Catalogue([str(i) for i in range(4)], titles, ["western", "drama", "drama", "western"])
    index = TextIndex.build(catalogue)
    river, garden = index.matches(
        ["The user might like western products, such as Red River", "such as Golden Garden"], 1
    )
    assert river.tolist() == [0]
    assert garden.tolist() == [2]
    cosines = np.array([-0.9, -0.1, 0.0, 0.1, 0.9], np.float32)
    matched = hybrid_scores(cosines, np.ones(5, bool), 0.1)
    assert (matched >= cosines).all()
    assert (matched[cosines != 0] > cosines[cosines != 0]).all()
    vectors = unit_vectors(np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32))
    retriever = HybridRetriever(vectors, ExactIndex(vectors), index, pi=0.5)
    query, nothing = vectors[:1] + vectors[2:3], [np.zeros(0, np.int32)]
    plain = dict(zip(*(part[0].tolist() for part in retriever.search(query, nothing, nothing, 4)), strict=True))
    lifted = dict(zip(*(part[0].tolist() for part in retriever.search(query, [garden], nothing, 4)), strict=True))
    assert lifted[2] > plain[2]
    assert {item: score for item, score in lifted.items() if item != 2} == {
        item: score for item, score in plain.items() if item != 2
    }


def random_log(seed: int = 0) -> InteractionLog:
    random = np.random.default_rng(seed)
    lengths = random.integers(1, 9, 40)
    items = np.concatenate([random.choice(60, length, replace=False) for length in lengths]).astype(np.int32)
    names = [str(item) for item in range(60)]
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return InteractionLog(offsets, items, [str(u) for u in range(40)], Catalogue(names, names, [""] * 60))


def test_fault_6_no_withheld_edge_is_in_the_graph() -> None:
    """Item embeddings were trained with validation and test edges."""
    log = random_log()
    graph = BipartiteGraph.from_edges(*log.train_edges(), log.num_users, log.num_items)
    users = log.split_users()
    assert len(users) > 20
    for split in ("validation", "test"):
        withheld = log.targets(users, split).astype(np.int64)  # type: ignore[arg-type]
        assert not graph.has_edge(users, withheld + log.num_users).any()
    assert graph.num_edges == int(log.train_lengths().sum())


def test_fault_6_published_embeddings_do_not_know_withheld_edges(tmp_path: Path, one_worker: Any) -> None:
    """The stage as it runs: other targets change neither the graph nor a single embedding."""
    log = random_log()
    users = log.split_users()
    items = np.array(log.items)
    for back in (1, 2):
        items[log.offsets[users + 1] - back] = (items[log.offsets[users + 1] - back] + 7) % log.num_items
    settings = ["graph.embed_dim=4", "graph.epochs=1", "graph.batch_size=16", 'graph.streaming="in_process"']
    published = []
    for name, each in (("before", log), ("after", replace(log, items=items))):
        run = Run(str(tmp_path), name)
        with run.publish("interactions", config_hash="", inputs={}) as folder:
            each.save(folder)
        train_graph(run, load_config(overrides=settings), "")
        published.append(run)
    first, second = ({name: run.fetch(name) for name in ("graph", "embeddings")} for run in published)
    assert first["graph"].digest == second["graph"].digest
    assert first["embeddings"].digest == second["embeddings"].digest
    graph = BipartiteGraph.load(first["graph"].path)
    assert graph.num_edges == int(log.train_lengths().sum())


def test_fault_7_every_prefix_is_used_with_its_own_target() -> None:
    """Suffix augmentation repeated one target."""
    log = random_log()
    config = LLMConfig(max_history=3)
    wanted = sorted(
        (user, position) for user in range(log.num_users) for position in range(1, len(log.train_sequence(user)))
    )
    for windows in (training_windows(log.train_lengths(), config, 0, 0), export_windows(log.train_lengths(), config)):
        columns = zip(windows.users, windows.starts, windows.lengths, windows.firsts, strict=True)
        used = sorted(
            (int(user), int(start + offset + 1))
            for user, start, length, first in columns
            for offset in range(first, length)
        )
        assert used == wanted


def test_fault_8_the_schedule_knows_the_true_number_of_steps(tiny_chain: Any, text_tokenizer: Any) -> None:
    """A schedule built on `max_steps = -1` never warms up and never decays."""
    log = tiny_chain.log
    collator = Collator(make_prompts(text_tokenizer, log.catalogue, 4), tiny_chain.tokens.items)
    config = LLMConfig(epochs=30, max_history=5, batch_tokens=400)
    made = make_plan(log, collator, config, seed=0)
    schedule = warmup_then_linear(config, made.total_steps)
    done = 0
    for epoch in range(30):
        windows = training_windows(log.train_lengths(), config, 0, epoch)
        seen = 0
        while seen < len(windows):
            assert 0 < schedule(done) <= 1
            seen += len(made.step(done)[1])
            done += 1
    assert done == made.total_steps
    assert schedule(done - 1) == pytest.approx(0.05, rel=0.05)
    windows = training_windows(np.array([5, 6, 7]), LLMConfig(), 0, 0)
    batches = [np.array([0]), np.array([1, 2])]
    plan = Plan([Epoch(windows, windows.lengths, some) for some in (batches, batches[:1])])
    assert plan.total_steps == 3
    with pytest.raises(IndexError):
        plan.step(3)
    factor = warmup_then_linear(LLMConfig(warmup_fraction=0.1), 100)
    rates = [factor(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == pytest.approx(rates[9], abs=0.05)
    assert all(0 < rate <= 1 for rate in rates)
    assert rates[-1] == pytest.approx(0.05)
    assert rates[9:] == sorted(rates[9:], reverse=True)


def test_prompts_hold_no_answer(text_tokenizer: Any) -> None:
    """What is read before an answer is the same for every answer (fault 4, on the side of the text)."""
    catalogue = Catalogue(["a", "b"], ["Heat", "Alien"], ["Crime", "Horror"])
    prompts = make_prompts(text_tokenizer, catalogue, 8)
    tokens = np.zeros((2, 1, 4), np.float32)
    first, second = (Collator(prompts, tokens)([Row(np.array([0]), np.array([1]), answer_item=i)]) for i in (0, 1))
    before = int(first.answer_positions[0]) + 1
    assert torch.equal(first.input_ids[0, :before], second.input_ids[0, :before])
    assert json.dumps(first.answer_ids.tolist()) != json.dumps(second.answer_ids.tolist())
