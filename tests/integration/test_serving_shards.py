"""`ctd serve` with the large indexes in deployments of their own. One server for the module."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pytest
from serving_process import RECOMMEND, TIMEOUT_S, Server, started
from tiny_run import make_tiny_run

from ctd_scale.artifacts import Run
from ctd_scale.changes import delete, upsert
from ctd_scale.live import rebuild_index
from ctd_scale.recommender import Recommender, load_artifacts
from ctd_scale.serving.deployments import SHARE_S

pytestmark = pytest.mark.slow
USERS, K, SEEN_S = 20, 10, 60.0
SHARDED = {"engine": "faiss", "exact_limit": 1, "shards": 2}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return make_tiny_run(tmp_path_factory.mktemp("shards"), **SHARDED)


@pytest.fixture(scope="module")
def link(run: Run) -> Path:
    made = run.root.parent / "current"
    made.symlink_to(run.root)
    return made


@pytest.fixture(scope="module")
def server(link: Path) -> Iterator[Server]:
    with started(link, "serving.shared_index=true", RAY_SERVE_THROUGHPUT_OPTIMIZED="1") as server:
        yield server


def in_process(run: Run) -> tuple[str, list[list[tuple[str, float]]]]:
    """The version, and what one process that holds all shards answers."""
    chain = Recommender(run)
    histories = [chain.log.full_history(user) for user in range(USERS)]
    return chain.version, [
        [(chain.catalogue.item_ids[item], score) for item, score in zip(answer.items, answer.scores, strict=True)]
        for history in histories
        for answer in chain.recommend([history], K)
    ]


def require_same(answer: dict[str, Any], wanted: list[tuple[str, float]]) -> None:
    assert [item["item_id"] for item in answer["items"]] == [item_id for item_id, _ in wanted]
    assert [item["score"] for item in answer["items"]] == pytest.approx([score for _, score in wanted], abs=1e-5)


def require_served(server: Server, run: Run) -> None:
    """Until the version of the run is served; then all users get what it answers in one process."""
    version, wanted = in_process(run)
    until = time.monotonic() + SEEN_S
    while server.post(user_id="u1").json().get("version") != version:
        assert time.monotonic() < until, f"version {version} is not served"
        time.sleep(0.1)
    for user in range(USERS):
        require_same(server.post(user_id=f"u{user}", k=K).json(), wanted[user])


def test_answers_are_those_of_one_process(server: Server, run: Run) -> None:
    assert all((run.root / "index" / part / "faiss" / "1").is_dir() for part in ("", "graph/test"))
    require_served(server, run)
    similar = server.client.get("/v1/items/i3/similar", params={"k": 5}).json()["items"]
    assert len(similar) == 5


def test_a_shard_is_asked_and_is_not_waited_for_where_it_hangs(server: Server, run: Run) -> None:
    _, wanted = in_process(run)
    shard = server.replica("Shard1")
    shard.suspend()
    try:
        began = time.monotonic()
        assert server.post(user_id="u2", k=K).status_code == 504
        assert time.monotonic() - began < TIMEOUT_S + 5
    finally:
        shard.resume()
    until = time.monotonic() + SEEN_S
    while (answer := server.post(user_id="u2", k=K)).status_code != 200:
        assert time.monotonic() < until
    require_same(answer.json(), wanted[2])


def test_changes_and_an_index_that_is_built_anew_are_searched(server: Server, run: Run) -> None:
    upsert(run, pa.table({"item_id": ["new"], "title": ["Golden River"], "category": ["drama"]}))
    delete(run, ["i4"])
    require_served(server, run)
    rebuild_index(run, load_artifacts(run), run.read_config())
    require_served(server, run)
    found = server.client.get("/v1/items/new/similar", params={"k": 40}).json()["items"]
    assert len(found) == 39, "all but itself and the deleted one"


def test_another_run_of_other_shards_takes_its_place_without_a_pause(
    server: Server, link: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    other = make_tiny_run(tmp_path_factory.mktemp("other"), seed=1, engine="faiss", exact_limit=1, shards=1)
    aside = link.with_name("aside")
    aside.symlink_to(other.root)
    aside.replace(link)
    statuses: list[int] = []
    with ThreadPoolExecutor(1) as threads:
        server.process.send_signal(signal.SIGHUP)
        assert server.process.stdout is not None
        said = threads.submit(server.process.stdout.readline)
        while not said.done():
            statuses.append(server.client.post(RECOMMEND, json={"user_id": "u5"}).status_code)
    assert said.result() == f"now serving version {in_process(other)[0]}\n"
    assert set(statuses) == {200}
    require_served(server, other)


def test_an_endpoint_that_dies_comes_back_and_knows_what_the_llm_said(server: Server) -> None:
    """As one does that load has called for. From here on Ray says on the server's output that a process died."""
    version = server.post(user_id="u5", k=K).json()["version"]
    assert "preference_cached" in server.post(user_id="u5", k=K).headers["Server-Timing"]
    time.sleep(2 * SHARE_S)  # until it is told
    killed: psutil.Process = server.replica("App")
    killed.kill()
    until = time.monotonic() + SEEN_S
    while server.client.get("/healthz").status_code != 200:
        assert time.monotonic() < until
        time.sleep(0.1)
    assert not killed.is_running()
    answer = server.post(user_id="u5", k=K)
    assert "preference_cached" in answer.headers["Server-Timing"], "the first that it answers"
    assert answer.json()["version"] == version


def test_a_shard_that_dies_comes_back(server: Server, link: Path) -> None:
    version, wanted = in_process(Run.open(str(link)))
    killed: psutil.Process = server.replica("Shard0")
    killed.kill()
    statuses = set()
    until = time.monotonic() + SEEN_S
    while 200 not in statuses:
        statuses.add(server.post(user_id="u3", k=K).status_code)
        assert time.monotonic() < until
    assert statuses <= {200, 503, 504}
    answer = server.post(user_id="u3", k=K).json()
    assert answer["version"] == version
    require_same(answer, wanted[3])
