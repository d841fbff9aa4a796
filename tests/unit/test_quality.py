"""What the quality table says is computed as it claims."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ctd_scale.ablation import ablate
from ctd_scale.config import ConfigError
from ctd_scale.quality import (
    METRICS,
    Measured,
    _deviation,
    bootstrap_interval,
    compare,
    pairs_of,
    require_comparable,
    row_of,
)
from ctd_scale.quality_report import markdown, write_quality


def test_the_bootstrap_agrees_with_the_normal_interval_of_many_users() -> None:
    differences = np.random.default_rng(0).normal(0.02, 0.5, 20_000)
    low, high = bootstrap_interval(differences)
    half = 1.96 * differences.std() / np.sqrt(len(differences))
    assert low == pytest.approx(differences.mean() - half, abs=0.1 * half)
    assert high == pytest.approx(differences.mean() + half, abs=0.1 * half)
    assert bootstrap_interval(differences) == (low, high), "the same data gives the same interval"


def test_the_bootstrap_covers_the_truth_nineteen_times_in_twenty() -> None:
    random, covered = np.random.default_rng(0), 0
    for _ in range(100):
        low, high = bootstrap_interval(random.exponential(1.0, 200) - 1.0)
        covered += low <= 0 <= high
    assert 88 <= covered <= 99


def test_the_spread_is_that_of_a_sample() -> None:
    assert _deviation([1.0, 2.0, 6.0]) == pytest.approx(statistics.stdev([1.0, 2.0, 6.0]))
    assert _deviation([1.0]) == 0.0


@pytest.mark.parametrize(
    ("models", "reference", "message"),
    [
        (["popularity", "oracle"], "", "no model 'oracle'"),
        (["popularity"], "full", "not among the models"),
        (["preference", "two_preferences"], "", "--seeds 2"),
    ],
)
def test_an_unknown_model_is_refused_before_anything_runs(
    models: list[str], reference: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        compare("debug", models, range(1), str(tmp_path), [], reference)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("datasets", "models", "overrides", "message"),
    [
        (["debug", "typo"], ["popularity"], [], "config 'typo' is neither a file nor a shipped config"),
        (["ml100k", "quickstart"], ["popularity"], [], "--data ml100k and --data quickstart are one set under one pro"),
        (["debug", "debug"], ["popularity"], ["interactions.data_dir=x"], "with an --out of its own"),
        (["debug"], ["full_text"], ["llm.generate_texts=false"], r"debug: full_text needs llm\.generate_texts=true"),
    ],
)
def test_what_no_table_can_hold_is_refused_before_anything_runs(
    datasets: list[str], models: list[str], overrides: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        require_comparable(datasets, models, range(2), overrides, "")


def test_a_set_under_two_protocols_has_rows_of_its_own_for_each(tmp_path: Path) -> None:
    require_comparable(["software", "software_repeats", "ml100k", "debug"], ["popularity"], range(1), [], "")
    logs = [tmp_path / name for name in ("one.toml", "two.toml")]
    for log in logs:
        log.write_text('[interactions]\ndataset = "files"\n')
    require_comparable([str(log) for log in logs], ["popularity"], range(1), [], "")


@pytest.mark.parametrize(
    ("ablations", "models", "storage", "overrides", "message"),
    [
        (["one_way", "half_way"], ["full"], "", [], "no 'half_way' among no_masking"),
        (["one_way"], [], "", [], "--models is empty; models: single_draw"),
        (["one_way"], ["sasrec"], "", [], "no 'sasrec' among single_draw"),
        (["one_way"], ["full"], "memory://runs", [], "--storage must be a folder"),
        (["one_way", "frozen_vectors"], ["full"], "", ["graph.embed_dim=8"], "preference_dim=16 but graph.embed_dim=8"),
    ],
)
def test_an_ablation_that_cannot_be_is_refused_before_anything_runs(
    ablations: list[str], models: list[str], storage: str, overrides: list[str], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        ablate("debug", ablations, models, range(1), storage or str(tmp_path), overrides)
    assert not list(tmp_path.iterdir())


def test_a_pair_of_seeds_counts_once() -> None:
    assert pairs_of([0, 1]) == [(0, 1)]
    for count in (3, 4):
        pairs = pairs_of(range(count))
        assert len({frozenset(pair) for pair in pairs}) == len(pairs) == count

    def measured(model: str, seed: int, ndcg: float) -> Measured:
        metrics: dict[str, float | None] = dict.fromkeys((*METRICS, "seconds"), ndcg)
        return Measured(model, "test", seed, metrics, 1.0, 2.0, None, np.full(4, ndcg))

    found = [measured("preference", 0, 0.1), measured("preference", 1, 0.3), measured("two_preferences", 0, 0.5)]
    protocol = {"dataset": "d", "split": "s; weights", "mask_seen": True, "users": 4, "items": 9}
    pair, single = (row_of(found, protocol, name, "test", "preference") for name in ("two_preferences", "preference"))
    assert (pair.seeds, pair.spread["ndcg@10"], pair.difference) == ([0], 0.0, pytest.approx(0.3))
    assert (single.seeds, single.spread["ndcg@10"]) == ([0, 1], pytest.approx(0.1 * 2**0.5))


def row(model: str, ndcg: float, **changes: Any) -> dict[str, Any]:
    numbers = dict.fromkeys((*METRICS, "seconds"), 0.1) | {"ndcg@10": ndcg}
    return {
        "dataset": "lastfm",
        "splitting": "leave-one-out by order",
        "mask_seen": True,
        "users": 10,
        "items": 20,
        "model": model,
        "split": "test",
        "seeds": [0, 1],
        "mean": numbers,
        "spread": dict.fromkeys(numbers, 0.001),
        "training_seconds": None,
        "peak_memory_mb": 12.0,
        "ids": None,
        "reference": "sasrec",
        "difference": ndcg - 0.05,
        "interval": (-0.01, 0.02),
        **changes,
    }


def test_a_later_run_replaces_its_own_rows_and_keeps_the_others(tmp_path: Path) -> None:
    target = tmp_path / "quality.md"
    write_quality([row("sasrec", 0.05), row("bsarec", 0.06)], target, "first")
    ids = {"id_length": 4, "added_symbols": 812, "valid_share": 0.25}
    later = [row("bsarec", 0.07), row("tiger", 0.01, mask_seen=False, ids=ids)]
    write_quality(later, target, "second")
    stored = json.loads(target.with_suffix(".json").read_text())
    found = {(each["model"], each["mask_seen"]): (each["mean"]["ndcg@10"], each["command"]) for each in stored}
    assert found == {
        ("sasrec", True): (0.05, "first"),
        ("bsarec", True): (0.07, "second"),
        ("tiger", False): (0.01, "second"),
    }
    text = target.read_text()
    assert "seen items masked" in text
    assert "seen items kept" in text
    assert text.index("| bsarec |") < text.index("| sasrec |"), "the best comes first"
    assert "sasrec +0.0200 [-0.0100, +0.0200]" in text
    assert "`tiger`: 4 symbols an item, 812 of them new to the vocabulary; without the trie 25 %" in text
    drawn = target.with_suffix(".png").exists()
    assert text == markdown(stored, "quality.png" if drawn else ""), "no link to what is not there"
    assert ("![" in text) == drawn
    assert "(a%20b.png)" in markdown(stored, "a b.png")


def test_rows_of_other_users_are_another_table(tmp_path: Path) -> None:
    """As where a log is filtered otherwise: neither is lost, and they are not ranked against each other."""
    target = tmp_path / "quality.md"
    write_quality([row("popularity", 0.1), row("full", 0.3)], target, "one")
    write_quality([row("full", 0.2, users=7)], target, "two")
    assert len(json.loads(target.with_suffix(".json").read_text())) == 3
    heads = [line for line in target.read_text().splitlines() if line.startswith("## ")]
    alike = "## lastfm, leave-one-out by order, seen items masked"
    assert heads == [f"{alike}, 10 users, 20 items", f"{alike}, 7 users, 20 items"]


def test_how_far_a_row_is_from_one_that_has_changed_is_not_known_any_more(tmp_path: Path) -> None:
    target = tmp_path / "quality.md"

    def differences() -> dict[tuple[str, bool], float | None]:
        stored = json.loads(target.with_suffix(".json").read_text())
        return {(each["model"], each["mask_seen"]): each["difference"] for each in stored}

    kept = row("bsarec", 0.06, mask_seen=False)
    write_quality([row("sasrec", 0.05), row("bsarec", 0.06), kept], target, "first")
    slower = {**row("sasrec", 0.05)["mean"], "seconds": 99.0}
    write_quality([row("sasrec", 0.05, mean=slower)], target, "the same ranks")
    assert differences()["bsarec", True] == pytest.approx(0.01)
    write_quality([row("sasrec", 0.04)], target, "another training")
    assert differences() == {
        ("sasrec", True): pytest.approx(-0.01),
        ("bsarec", True): None,
        ("bsarec", False): pytest.approx(0.01),
    }
    lines = [line for line in target.read_text().splitlines() if line.startswith("| bsarec |")]
    assert ["sasrec +" in line for line in lines] == [False, True], "masked, kept"


def test_the_best_come_first_and_an_ablation_beside_its_model() -> None:
    given = [("draws", 0.1), ("less: full", 0.3), ("full", 0.2), ("less: draws", 0.25), ("more: full", 0.1)]
    rows = [row(model, ndcg, machine="m", versions={"a": "1"}, command="c") for model, ndcg in given]
    lines = [line.split(" | ")[0][2:] for line in markdown(rows, "none.png").splitlines() if line.startswith("| ")]
    assert lines[1:6] == ["less: full", "full", "more: full", "less: draws", "draws"]
