"""The whole chain on the debug config: a run that is killed and resumed ends where an uninterrupted one ends."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import numpy as np
import pytest

from ctd_scale import ablation
from ctd_scale.artifacts import Run
from ctd_scale.batches import SPLITS, InteractionLog, NodeArrays, Preferences, Split, load_rankings
from ctd_scale.calibrate import as_served, calibration_parts, calibration_pools, pool_ndcg, scored_pools
from ctd_scale.cli import main
from ctd_scale.config import load_config
from ctd_scale.evaluate import INPUTS, SERVED, rank_all, rank_baseline
from ctd_scale.metrics import ranks_in_lists
from ctd_scale.pipeline import STAGES
from ctd_scale.quality import measure, measure_preferences
from ctd_scale.ranking import load_ranks
from ctd_scale.recommender import Recommender, load_density, load_retrieve
from ctd_scale.retrieval.build import load_graph_index
from ctd_scale.retrieval.collaborative import graph_sources
from ctd_scale.retrieval.neighbors import count_neighbors

pytestmark = pytest.mark.slow

TIMEOUT = 600
# Other stages are killed in their own tests.
KILLED_IN, KILLED = "graph", "embeddings"


def arguments(storage: Path, name: str) -> list[str]:
    return ["run", "-c", "debug", "--storage", str(storage), "--name", name]


def run_chain(storage: Path, name: str) -> str:
    """Run the chain, or what is missing of it, to its end; returns what it printed."""
    with redirect_stdout(StringIO()) as said, pytest.raises(SystemExit) as end:
        main(arguments(storage, name))
    assert not end.value.code, said.getvalue()
    return said.getvalue()


def kill(storage: Path, name: str) -> None:
    """Start the chain as somebody would; kill it once the stage has written a checkpoint and begun another."""
    command = [sys.executable, "-c", "from ctd_scale.cli import main; main()", *arguments(storage, name)]
    said = storage / "first.log"
    with said.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + TIMEOUT
    # Two: the first is then complete, and the next start must go on from it.
    while len(list((storage / name / "checkpoints").glob(f"{KILLED_IN}-*/*/checkpoint_*"))) < 2:
        assert process.poll() is None, f"the run ended before it could be killed:\n{said.read_text()}"
        assert time.monotonic() < deadline, f"no checkpoint in {KILLED_IN}"
        time.sleep(0.05)
    process.kill()
    process.wait(60)


@pytest.fixture(scope="module")
def chains(tmp_path_factory: pytest.TempPathFactory, ray_session: None) -> Path:
    """Two finished runs: `whole`, and `killed`, a copy of it that trained one of its models again and was killed in
    between; `killed.log` is what its last start printed."""
    storage = tmp_path_factory.mktemp("runs")
    run_chain(storage, "whole")
    shutil.copytree(storage / "whole", storage / "killed")
    shutil.rmtree(storage / "killed" / KILLED)
    kill(storage, "killed")
    assert not (storage / "killed" / KILLED / "manifest.json").exists(), f"{KILLED_IN} was over before the kill"
    (storage / "killed.log").write_text(run_chain(storage, "killed"))
    return storage


def manifest(run: Path, artifact: str) -> dict[str, object]:
    loaded: dict[str, object] = json.loads((run / artifact / "manifest.json").read_text())
    return loaded


def rows(run: Path) -> list[dict[str, object]]:
    report = json.loads((run / "metrics" / "evaluation.json").read_text())
    return [{key: value for key, value in row.items() if key != "seconds"} for row in report["rows"]]


def test_a_stage_that_was_killed_ends_with_the_same_model(chains: Path) -> None:
    assert manifest(chains / "killed", KILLED)["digest"] == manifest(chains / "whole", KILLED)["digest"]


def test_what_follows_a_resumed_stage_does_not_run_again(chains: Path) -> None:
    """It would, had the stage ended with other weights."""
    said = (chains / "killed.log").read_text()
    assert said.count("unchanged") == len(STAGES) - 1, said


@pytest.mark.parametrize("name", ["whole", "killed"])
def test_nothing_is_kept_twice(chains: Path, name: str) -> None:
    assert not list((chains / name / ".staging").iterdir())
    assert not list((chains / name / "checkpoints").iterdir())


def test_every_model_of_the_table_is_ranked_on_both_splits(chains: Path) -> None:
    report = json.loads((chains / "whole" / "metrics" / "evaluation.json").read_text())
    models = {"popularity", "lightgcn", "preference", "single_draw", "draws", "error", "full", "full_text"}
    for split in ("validation", "test"):
        assert models <= {row["model"] for row in report["rows"] if row["split"] == split}
    assert {"dataset", "split", "users", "items", "mask_seen", "seed"} <= report["protocol"].keys()


@pytest.mark.parametrize("split", ["validation", "test"])
def test_the_ranks_beside_the_table_are_those_of_its_figures(chains: Path, split: str) -> None:
    metrics = chains / "whole" / "metrics"
    report = json.loads((metrics / "evaluation.json").read_text())
    ranks = load_ranks(metrics / f"evaluation-{split}.parquet")
    assert len(ranks.pop("user_index")) == report["protocol"]["users"]
    assert {name: float((each <= 10).mean()) for name, each in ranks.items()} == pytest.approx(
        {row["model"]: row["hr@10"] for row in report["rows"] if row["split"] == split}
    )


def test_no_target_is_in_the_graph_that_is_asked_for_it(chains: Path) -> None:
    """Validation is ranked with what the training graph says; test, and what is served, with a graph that knows the
    validation targets too, and no others."""
    run = Run.open(chains / "whole")
    log = InteractionLog.load(run.fetch("interactions").path)
    states = {"validation": run.fetch("embeddings").path, "test": run.fetch("embeddings_at_test").path}
    for split in SPLITS:
        users, items = log.known_edges(split)
        degrees = np.bincount(np.unique(users.astype(np.int64) * log.num_items + items) % log.num_items)
        expected = graph_sources(
            NodeArrays.load(states[split]).items, np.pad(degrees, (0, log.num_items - len(degrees)))
        )
        found = load_graph_index(run.fetch("index").path, split)
        known = np.flatnonzero(degrees)
        np.testing.assert_allclose(found.sources[known], expected[known], rtol=1e-6)
        assert found.neighbors is not None
        counted = count_neighbors(log, log.known_lengths(split), run.read_config().retrieval.neighbors)
        np.testing.assert_array_equal(found.neighbors.weights.toarray(), counted.weights.toarray())


def test_weights_are_fitted_with_what_others_chose_for_validation_counted(chains: Path) -> None:
    run = Run.open(chains / "whole")
    config, artifacts = run.read_config(), {name: run.fetch(name) for name in INPUTS}
    log = InteractionLog.load(artifacts["interactions"].path)
    parts = calibration_parts(log, Preferences.load(run.root / "preferences", "validation"), config)
    density, retrieve = load_density(artifacts, config), load_retrieve(artifacts, config, "validation")
    pools = list(calibration_pools(log, parts, density, retrieve, config))
    calibrated = manifest(chains / "whole", "ranking")["facts"]["validation_ndcg@10"]  # type: ignore[index]
    rankings = load_rankings(artifacts["ranking"].path)
    assert calibrated == {
        name: pytest.approx(pool_ndcg(pools, ranking), abs=1e-5) for name, ranking in rankings.items()
    }
    ranked = {row["model"]: row["ndcg@10"] for row in rows(chains / "whole") if row["split"] == "validation"}
    before = [each.before() for each in pools]  # as much is known as where validation is ranked
    for name, ranking in load_rankings(artifacts["ranking"].path).items():
        if name in ranked:
            assert pool_ndcg(before, ranking) == pytest.approx(ranked[name], abs=2e-3), name


@pytest.mark.parametrize(
    ("split", "mask_seen", "known"),
    [("test", True, "test"), ("test", True, "validation"), ("test", False, "test"), ("validation", True, "validation")],
)
def test_the_ranks_are_those_of_lists_of_the_whole_catalogue(
    chains: Path, split: Split, mask_seen: bool, known: Split
) -> None:
    """What is behind the pool is counted; sorting all of it must put the target in the same place."""
    run = Run.open(chains / "whole")
    overrides = [f"evaluation.know_validation={known == 'test'}".lower()]
    config, artifacts = load_config("debug", overrides), {name: run.fetch(name) for name in INPUTS}
    counted = rank_all(run, artifacts, config, split, mask_seen)
    log, preferences = (
        InteractionLog.load(artifacts["interactions"].path),
        Preferences.load(run.root / "preferences", split),
    )
    density, retrieve = load_density(artifacts, config), load_retrieve(artifacts, config, known)
    listed: dict[str, list[float]] = {}
    for each in scored_pools(log, preferences, split, density, retrieve, mask_seen=mask_seen, chunk=50):
        histories = [log.history(int(user), split) for user in each.users]
        for name, ranking in load_rankings(artifacts["ranking"].path).items():
            spoken = name == "full_text"
            asked = as_served(each, ranking, retrieve, histories, spoken=spoken) if name in SERVED else each
            ids, _ = retrieve.rank(asked.pool, each.errors, ranking, log.num_items)
            listed.setdefault(name, []).extend(ranks_in_lists(ids, each.targets))
    differing = {name: float(np.mean(counted[name].ranks != np.array(ranks))) for name, ranks in listed.items()}
    # The last bits of scores may differ between a block of users and one.
    assert differing == pytest.approx(dict.fromkeys(listed, 0), abs=0.01)
    edges = log.known_edges(known)[1]
    popular = rank_baseline("popularity", run, config, split, mask_seen=False)
    expected = np.argsort(-np.bincount(edges, minlength=log.num_items), kind="stable")[:10]
    np.testing.assert_array_equal(popular.top, np.tile(expected, (len(popular.top), 1)))


def test_what_is_served_is_what_was_measured(chains: Path) -> None:
    """The list of a request has the withheld item where the table says, far behind its first items, too."""
    run = Run.open(chains / "whole")
    recommender, log = Recommender(run), InteractionLog.load(run.fetch("interactions").path)
    ranks = load_ranks(run.root / "metrics" / "evaluation-test.parquet")
    users = ranks["user_index"].astype(int).tolist()
    answers = recommender.recommend([log.history(user, "test") for user in users], log.num_items)
    targets = log.targets(np.array(users), "test").tolist()
    places = [
        answer.items.index(target) + 1 if target in answer.items else np.inf
        for answer, target in zip(answers, targets, strict=True)
    ]
    # Batches of another size round otherwise, by which items of all but the same score may change places.
    others = [
        (answer, rank, place)
        for answer, rank, place in zip(answers, ranks["full"], places, strict=True)
        if rank != place
    ]
    assert len(others) <= 2
    for answer, rank, place in others:
        assert answer.scores[int(rank) - 1] == pytest.approx(answer.scores[int(place) - 1], abs=5e-4)


def test_a_second_run_changes_nothing_and_a_damaged_artifact_is_made_again(chains: Path) -> None:
    assert run_chain(chains, "whole").count("unchanged") == len(STAGES)
    index = chains / "whole" / "index" / "vectors.npy"
    damaged = bytearray(index.read_bytes())
    damaged[-1] ^= 1
    index.write_bytes(bytes(damaged))
    said = run_chain(chains, "whole")
    assert "was changed after it was published" in said.replace("\n", " ")
    assert said.count("unchanged") >= 6
    assert rows(chains / "whole") == rows(chains / "killed")


@pytest.mark.parametrize(
    ("override", "missing"),
    [
        ("diffusion.contrastive_weight=0", {"models/diffusion", "ranking", "metrics"}),
        ("llm.recency=false", {"models/llm", "preferences", "index", "models/diffusion", "ranking", "metrics"}),
        ("evaluation.calibration_users=9", {"ranking", "metrics"}),
    ],
)
def test_an_ablation_borrows_all_that_it_does_not_change(chains: Path, override: str, missing: set[str]) -> None:
    base, own = Run.open(chains / "whole"), Run(str(chains), f"without-{override}")
    ablation.borrow(own, base, load_config("debug", [override]))
    outputs = [name for stage in STAGES for name in stage.outputs]
    assert {name for name in outputs if own.manifest(name) is None} == missing
    for name in set(outputs) - missing:
        assert own.fetch(name).digest == base.fetch(name).digest
    ablation.borrow(own, base, load_config("debug", []))
    assert all(own.manifest(name) == base.manifest(name) for name in outputs)


def test_an_ablation_is_compared_with_the_same_model_of_the_whole_chain(
    chains: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(chains / "whole", tmp_path / "debug-0")
    monkeypatch.setitem(ablation.ABLATIONS, "few_users", ("evaluation.calibration_users=9",))
    out = tmp_path / "ablation.md"
    options = ["--models", "preference,fused_both", "--storage", str(tmp_path), "--out", str(out)]
    with pytest.raises(SystemExit) as end:
        main(["bench", "ablation", "-d", "debug", "--without", "few_users", *options])
    assert not end.value.code
    said = capsys.readouterr().out
    assert said.count("▶") == 2, said
    rows = {(row["model"], row["split"]): row for row in json.loads(out.with_suffix(".json").read_text())}
    assert len(rows) == 8
    for split in ("validation", "test"):
        # Other users choose other weights; the preference has none.
        assert rows["few_users: preference", split]["interval"] == [0, 0]
        changed, whole = rows["few_users: fused_both", split], rows["fused_both", split]
        assert changed["reference"] == "fused_both"
        assert changed["difference"] == pytest.approx(changed["mean"]["ndcg@10"] - whole["mean"]["ndcg@10"])
    with pytest.raises(SystemExit):
        main(["bench", "ablation", "-d", "debug", "--without", "no_users", *options])
    assert "no_users" in capsys.readouterr().err


def test_a_preference_is_measured_without_what_comes_after_it(chains: Path, tmp_path: Path) -> None:
    """Alone, it needs no denoiser and no index; averaged with another run's it is `two_preferences` of the table."""
    run = Run.open(chains / "whole")
    alone = {(row["model"], row["split"]): row for row in rows(run.root)}
    shutil.copytree(run.root, tmp_path / "part")
    part, later = Run.open(tmp_path / "part"), ("models/diffusion", "index", "ranking", "metrics")
    for name in later:
        shutil.rmtree(part.root / name)
    found = measure(part, run.read_config(), ["preference"])
    assert not any((part.root / name).exists() for name in later)
    pairs = measure_preferences("two_preferences", (run, run), run.read_config())
    for each in [*found, *pairs]:
        # Behind the first ten the chain puts its pool before what it did not look at.
        same = {key: alone["preference", each.split][key] for key in ("hr@10", "ndcg@10", "coverage@10")}
        assert {key: each.metrics[key] for key in same} == pytest.approx(same, rel=1e-3)


def test_recommend_prints_the_object_of_the_endpoint(chains: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = chains / "whole"
    log, exported = InteractionLog.load(run / "interactions"), Preferences.load(run / "preferences", "test")
    assert all(exported.texts)
    items = log.history(int(exported.users[0]), "test")
    history = ",".join(log.catalogue.item_ids[item] for item in items)
    with pytest.raises(SystemExit) as end:
        main(["recommend", "--run", str(run), "--history", history, "--k", "5", "--json", "--explain"])
    assert not end.value.code
    answer = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(answer) == {"version", "items", "text"}
    assert len({item["item_id"] for item in answer["items"]}) == 5
    assert all(item["title"] for item in answer["items"])
    scores = [item["score"] for item in answer["items"]]
    assert scores == sorted(scores, reverse=True)
    assert answer["text"] == exported.texts[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--user", "405", "--k", "0"), "--k 0"),
        (("--user", "nobody"), "nobody"),
        (("--history", "1,no-such-item"), "no-such-item"),
    ],
)
def test_a_bad_request_is_one_line(
    chains: Path, arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["recommend", "--run", str(chains / "killed"), *arguments])
    said = capsys.readouterr().err
    assert ended.value.code == 2
    assert message in said
    assert "Traceback" not in said
