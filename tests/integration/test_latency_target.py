"""A latency target over the tiny run: measured, chosen from, refused. A server with one is in `test_serving`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from tiny_run import make_tiny_run, publish_preferences

from ctd_scale.artifacts import ArtifactError, Run
from ctd_scale.batches import Preferences
from ctd_scale.cli import main
from ctd_scale.latency import Row, read_rows
from ctd_scale.recommender import Recommender, load_artifacts, load_rank
from ctd_scale.serving.release import Source, open_release, source_of


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The tiny run with its validation preferences, and its latencies measured."""
    run = make_tiny_run(tmp_path_factory.mktemp("latency"))
    publish_preferences(run)
    main_of("bench", "latency", "--run", str(run.root), "--json", str(run.root.parent / "latency.json"))
    return run


def main_of(*arguments: str) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 0


def rows_of(run: Run) -> list[Row]:
    return read_rows(run.fetch("latency").path)


def source(run: Run, target: float) -> Source:
    return source_of(run, run.read_config([f"serving.target_p99_ms={target}"]))


def test_a_row_is_what_the_chain_answers_with_these_settings(run: Run) -> None:
    rows = rows_of(run)
    assert len(rows) == 6
    assert json.loads((run.root.parent / "latency.json").read_text())["rows"] == [row.values() for row in rows]
    known = Preferences.load(run.fetch("preferences").path, "validation")
    for row in rows:
        settings = row.settings.applied(run.read_config())
        chain = Recommender(run, settings, row.settings.effort)
        # Served is a graph that knows the validation targets. They must not be measured with it.
        chain.rank = load_rank(load_artifacts(run), settings, effort=row.settings.effort, split="validation")
        histories = [chain.log.history(user, "validation") for user in known.users.tolist()]
        gains = [
            1 / np.log2(answer.items.index(target) + 2) if target in answer.items else 0
            for answer, target in zip(chain.recommend(histories, 10), known.targets.tolist(), strict=True)
        ]
        assert row.ndcg == pytest.approx(np.mean(gains), abs=1e-6)
        assert 0 < row.p50_ms <= row.p99_ms
    assert len({row.ndcg for row in rows}) > 1, "the settings must matter"


def test_a_budget_chooses_or_is_refused(run: Run) -> None:
    rows = rows_of(run)
    fastest = min(rows, key=lambda row: row.p99_ms)
    generous, tight = source(run, 1e6).tuned, source(run, fastest.p99_ms).tuned
    assert generous is not None
    assert generous.ndcg == max(row.ndcg for row in rows)
    assert tight is not None
    assert tight.p99_ms == fastest.p99_ms
    with pytest.raises(ValueError, match=r"nothing measured is that fast; the fastest has p99 "):
        source(run, fastest.p99_ms / 2)
    assert source(run, 0).tuned is None


def test_what_is_served_is_one_process_with_these_settings(run: Run) -> None:
    for row in rows_of(run):
        target = row.p99_ms
        tuned = source(run, target)
        assert tuned.tuned is not None
        settings = tuned.tuned.settings
        chain = Recommender(run, settings.applied(run.read_config()), settings.effort)
        histories = [chain.log.full_history(user) for user in (0, 3, 5)]
        out = [np.unique(history).astype(np.int32) for history in histories]
        found = open_release(tuned).rank(chain.preference(histories), histories, [""] * 3, out, 8)
        assert found == chain.recommend(histories, 8)


def test_a_table_that_is_missing_or_of_something_else_is_refused(run: Run, tmp_path: Path) -> None:
    shutil.copytree(run.root, tmp_path / "other")
    other = Run(str(tmp_path), "other")
    for another in ("diffusion.guidance=2.0", "evaluation.mask_seen=false"):
        config = other.read_config(["serving.target_p99_ms=1000", another])
        with pytest.raises(ArtifactError, match=r"other settings in diffusion, retrieval or evaluation\.mask_seen"):
            source_of(other, config)
    ranking = other.fetch("ranking")
    text = (ranking.path / "ranking.json").read_text().replace('"draws": 0.5', '"draws": 0.75')
    with other.publish("ranking", config_hash="tiny", inputs=ranking.manifest["inputs"]) as folder:
        (folder / "ranking.json").write_text(text)
    with pytest.raises(ArtifactError, match=r"latency was made from another ranking .*; run `ctd bench latency`"):
        source(other, 1000)
    shutil.rmtree(other.root / "latency")
    with pytest.raises(ArtifactError, match="latency is not published; run `ctd bench latency`"):
        source(other, 1000)
