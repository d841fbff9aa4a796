"""How `ctd serve` begins, changes what it serves, is watched, and ends. One server for the module."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import aiohttp
import httpx
import numpy as np
import psutil
import pyarrow as pa
import pytest
from serving_process import CTD, RECOMMEND, START_S, Server, started
from tiny_run import make_tiny_run

from ctd_scale.artifacts import Run
from ctd_scale.batches import Ranking, save_rankings
from ctd_scale.changes import CURRENT, delete, roll_back, upsert
from ctd_scale.live import rebuild_index
from ctd_scale.recommender import Recommender, load_artifacts
from ctd_scale.serving.load import ask_each, ramp
from ctd_scale.serving.telemetry import cached

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return make_tiny_run(tmp_path_factory.mktemp("serving"))


@pytest.fixture(scope="module")
def link(run: Run) -> Path:
    """What the server is told to serve: a link to the run."""
    made = run.root.parent / "current"
    made.symlink_to(run.root)
    return made


@pytest.fixture(scope="module")
def server(link: Path) -> Iterator[Server]:
    # As the README recommends; elsewhere without. A slow body is what keeps a request in progress.
    with started(link, "serving.body_timeout_s=7.0", RAY_SERVE_THROUGHPUT_OPTIMIZED="1") as server:
        yield server


def test_a_taken_port_is_refused(run: Run) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        command = [*CTD, "serve", "--run", str(run.root), "--port", str(port)]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=START_S, check=False)
    assert ended.returncode == 2
    assert f"error: cannot listen on 127.0.0.1 port {port}: Address already in use" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_damaged_run_is_refused(run: Run, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(run.root, damaged)
    with (damaged / "models/diffusion/denoiser.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\xff")
    ended = subprocess.run(
        [*CTD, "serve", "--run", str(damaged)], capture_output=True, text=True, timeout=START_S, check=False
    )
    assert ended.returncode == 2
    assert "models/diffusion" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_every_request_is_a_line_of_the_log(server: Server, run: Run) -> None:
    headers = {"X-Request-ID": "seen-in-the-log"}
    server.client.post(RECOMMEND, json={"user_id": "u9999"}, headers=headers)
    lines = [
        json.loads(line)
        for file in (run.root / "logs" / "serving").glob("*-requests.jsonl")
        for line in file.read_text().splitlines()
    ]
    (mine,) = [line for line in lines if line["request_id"] == "seen-in-the-log"]
    assert (mine["route"], mine["status"], mine["stages"]) == (RECOMMEND, 404, {})


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run with models of its own."""
    return make_tiny_run(tmp_path_factory.mktemp("other"), seed=1)


def lead_to(target: Path, link: Path, server: Server) -> str:
    """Turn the link; returns what the server says to that."""
    aside = link.with_name("aside")
    aside.symlink_to(target)
    aside.replace(link)
    server.process.send_signal(signal.SIGHUP)
    assert server.process.stdout is not None
    return server.process.stdout.readline()


def test_another_run_takes_its_place_without_a_pause_and_gives_it_back(
    server: Server, run: Run, other: Run, link: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    wanted: dict[str, list[list[str]]] = {}
    for each in (Recommender(run), Recommender(other)):
        histories = [each.log.full_history(user) for user in range(20)]
        found = each.recommend(histories, 10)
        wanted[each.version] = [[each.catalogue.item_ids[item] for item in answer.items] for answer in found]
    before, after = wanted
    assert wanted[before] != wanted[after]

    done, answers = threading.Event(), list[tuple[int, int, dict[str, Any]]]()

    def ask(first: int) -> None:
        with httpx.Client(base_url=server.client.base_url, timeout=60) as client:
            for user in itertools.cycle(range(first, 20, 2)):
                response = client.post(RECOMMEND, json={"user_id": f"u{user}"})
                answers.append((user, response.status_code, response.json()))
                if done.is_set():
                    return

    with ThreadPoolExecutor(2) as threads:
        asking = [threads.submit(ask, first) for first in range(2)]
        assert lead_to(other.root, link, server) == f"now serving version {after}\n"
        time.sleep(1)
        assert lead_to(run.root, link, server) == f"now serving version {before}\n"
        time.sleep(1)
        done.set()
        for each in asking:
            each.result()
    assert {status for _, status, _ in answers} == {200}
    for user, _, answer in answers:
        assert [item["item_id"] for item in answer["items"]] == wanted[answer["version"]][user], "no answer is of both"
    versions = [answer["version"] for _, _, answer in answers]
    assert (versions[0], versions[-1]) == (before, before)
    assert after in versions
    assert f'ctd_version_info{{version="{before}"}} 1.0' in server.client.get("/metrics").text

    # What cannot be loaded is said so at once, by whatever it fails.
    misled = make_tiny_run(tmp_path_factory.mktemp("misled"), seed=2)
    misled.write_config(misled.read_config(["llm.preference_dim=32"]))
    said = lead_to(misled.root, link, server)
    assert said.startswith(f"not swapped: a replica could not load it; serving version {before}: ")
    assert server.post(user_id="u1").json()["version"] == before

    said = lead_to(run.root.parent / "nowhere", link, server)
    assert said.startswith("not swapped: no run at current")
    assert server.post(user_id="u1").json()["version"] == before
    assert lead_to(run.root, link, server) == f"now serving version {before}\n"


def test_another_llm_has_read_whoever_was_asked_about_and_the_same_one_reads_nobody_again(
    server: Server, run: Run, other: Run, link: Path, tmp_path: Path
) -> None:
    known: list[dict[str, Any]] = [{"user_id": "u1"}, {"user_id": "u2"}, {"history": ["i3", "i1", "i2"]}]

    def read(body: dict[str, Any], version: str) -> bool:
        """Whether the LLM had to read the history for this answer."""
        answer = server.post(**body)
        assert answer.json()["version"] == version
        stages = {each.split(";")[0] for each in answer.headers["Server-Timing"].split(", ")}
        assert len(stages & {"preference", cached("preference")}) == 1
        return "preference" in stages

    for body in known:
        read(body, Recommender(run).version)
    recommender = Recommender(other)
    assert lead_to(other.root, link, server) == f"now serving version {recommender.version}\n"
    assert not any(read(body, recommender.version) for body in known)
    assert read({"history": ["i1", "i3", "i2"]}, recommender.version), "nobody has asked about it"
    history = np.array([recommender.catalogue.item_ids.index(item) for item in known[-1]["history"]], np.int32)
    wanted = recommender.recommend([history], 10)[0].items
    answered = [item["item_id"] for item in server.post(**known[-1]).json()["items"]]
    assert answered == [recommender.catalogue.item_ids[item] for item in wanted]

    # The same LLM, ranked otherwise.
    third = Run(str(tmp_path), "third")
    shutil.copytree(other.root, third.root)
    inputs = third.fetch("ranking").manifest["inputs"]
    with third.publish("ranking", config_hash="tiny", inputs=inputs, facts={}) as target:
        save_rankings({name: Ranking(1.0, draws=0.0, error=0.0) for name in ("full", "full_text")}, target)
    version = Recommender(third).version
    assert lead_to(third.root, link, server) == f"now serving version {version}\n"
    assert not any(read(body, version) for body in (*known, {"history": ["i1", "i3", "i2"]}))
    assert lead_to(run.root, link, server) == f"now serving version {Recommender(run).version}\n"


def test_other_settings_of_the_same_models_are_served_once_it_is_said(server: Server, run: Run) -> None:
    """And where a replica cannot work by them, those before go on."""

    def served() -> dict[int, list[str]]:
        answers = {user: server.post(user_id=f"u{user}").json() for user in range(20)}
        return {user: [item["item_id"] for item in answer["items"]] for user, answer in answers.items()}

    def said() -> str:
        server.process.send_signal(signal.SIGHUP)
        assert server.process.stdout is not None
        return server.process.stdout.readline()

    own, version = run.read_config(), Recommender(run).version
    before = served()
    run.write_config(run.read_config(["diffusion.num_draws=1", "diffusion.error_candidates=2"]))
    recommender = Recommender(run)
    histories = [recommender.log.full_history(user) for user in range(20)]
    found = recommender.recommend(histories, 10)
    wanted = {user: [recommender.catalogue.item_ids[item] for item in found[user].items] for user in range(20)}
    assert wanted != before
    try:
        assert said() == f"now serving version {version}\n"
        assert served() == wanted
        run.write_config(run.read_config(["llm.preference_dim=32"]))
        assert said().startswith(f"not swapped: a replica could not load it; serving version {version}: ")
        assert served() == wanted
    finally:
        run.write_config(own)
    assert said() == f"now serving version {version}\n"
    assert served() == before


def test_changes_of_the_catalogue_are_served_within_a_second_and_no_request_fails(server: Server, run: Run) -> None:
    """New items come back, deleted ones do not, a new index takes over, and all of it can be taken back."""
    done, statuses = threading.Event(), list[int]()

    def ask(user: int) -> None:
        with httpx.Client(base_url=server.client.base_url, timeout=60) as client:
            while not done.is_set():
                statuses.append(client.post(RECOMMEND, json={"user_id": f"u{user}"}).status_code)

    def served(k: int = 50) -> dict[str, Any]:
        answer: dict[str, Any] = server.post(user_id="u1", k=k, exclude_seen=False).json()
        return {**answer, "ids": [item["item_id"] for item in answer["items"]]}

    def seconds_until(wanted: Callable[[dict[str, Any]], bool]) -> float:
        started = time.perf_counter()
        while not wanted(served()):
            assert time.perf_counter() - started < 30
        return time.perf_counter() - started

    before = served()
    first = before["ids"][0]
    new = pa.table({"item_id": ["new"], "title": ["Brand New Garden"], "category": ["drama"]})
    added, deleted = list[float](), list[float]()
    for _ in range(3):  # the shortest time: other tests on the same cores only add to it
        upsert(run, new)
        added.append(seconds_until(lambda answer: "new" in answer["ids"]))
        delete(run, ["new"])
        deleted.append(seconds_until(lambda answer: "new" not in answer["ids"]))
    assert min(added) < 1, added
    assert min(deleted) < 1, deleted

    with ThreadPoolExecutor(2) as threads, ExitStack() as ending:
        ending.callback(done.set)
        asking = [threads.submit(ask, user) for user in (2, 3)]
        upsert(run, new)
        seconds_until(lambda answer: "new" in answer["ids"])
        assert [item["item_id"] for item in server.client.get("/v1/items?query=brand").json()["items"]] == ["new"]
        assert server.post(history=["i3", "new"]).status_code == 200
        assert server.client.get("/v1/items/new/similar").status_code == 200
        delete(run, [first])
        seconds_until(lambda answer: first not in answer["ids"])
        after = Recommender(run)
        (wanted,) = after.recommend([after.log.full_history(1)], 50, exclude_seen=False)
        changed = served()
        assert changed["version"] == after.version
        assert changed["ids"] == [after.catalogue.item_ids[item] for item in wanted.items]
        rebuild_index(run, load_artifacts(run), run.read_config())
        rebuilt = Recommender(run).version
        seconds_until(lambda answer: answer["version"] == rebuilt)
        assert sorted(served()["ids"]) == sorted(changed["ids"])
        roll_back(run, 0)
        seconds_until(lambda answer: answer["version"] == before["version"])
        assert served()["ids"] == before["ids"]
        rolled_back = (run.root / CURRENT).read_text()
        (run.root / CURRENT).write_text("no number")  # what cannot be read is not served, and nothing ends
        time.sleep(1)
        assert served()["ids"] == before["ids"]
        (run.root / CURRENT).write_text(rolled_back)
        done.set()
        for each in asking:
            each.result()
    assert set(statuses) == {200}


def test_a_ramp_counts_every_answer_and_times_it(server: Server) -> None:
    bodies = [{"user_id": f"u{user}", "k": 3} for user in range(5)] + [{"user_id": "u5", "k": 50}]
    url = str(server.client.base_url)
    asyncio.run(ask_each(url, bodies))
    levels, timeline = asyncio.run(ramp(url, bodies, (1, 3), 1.0, lambda: {"App": 1}))
    assert [level.clients for level in levels] == [1, 3]
    for level in levels:
        assert level.statuses == {"200": level.requests}
        assert level.requests > 3 * level.clients
        assert 0 < level.p50_ms <= level.p95_ms <= level.p99_ms
        # Clients that wait for their answers: their number is rate times mean time (Little's law).
        assert level.per_second * level.mean_ms / 1e3 == pytest.approx(level.clients, rel=0.4)
        assert level.replicas == {"App": 1}
    assert timeline[0]["App"] == 1
    with pytest.raises(aiohttp.ClientResponseError, match="404"):
        asyncio.run(ask_each(url, [{"user_id": "u9999"}]))


def test_sigterm_ends_it_cleanly(server: Server) -> None:
    """The last test: what follows finds no server. What is in progress still goes through all steps, others are told
    to go elsewhere. Half a minute is what Kubernetes grants."""
    replica = server.replica("App")
    body = json.dumps({"user_id": "u1", "explain": True}).encode()
    head = (
        f"POST {RECOMMEND} HTTP/1.1\r\nHost: here\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
    )
    with socket.create_connection((server.client.base_url.host, server.client.base_url.port or 0), 30) as slow:
        slow.sendall(head.encode() + b"\r\n" + body[:5])
        time.sleep(0.5)  # until it is inside
        server.process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + 5
        while (refused := server.client.get("/readyz")).status_code == 200:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert (refused.status_code, refused.headers["Retry-After"]) == (503, "1")
        assert server.client.get("/healthz").status_code == 200
        slow.sendall(body[5:])
        assert slow.recv(12) == b"HTTP/1.1 200"
    output, _ = server.process.communicate(timeout=30)
    assert (server.process.returncode, output) == (0, "")
    with pytest.raises(httpx.TransportError):
        server.client.get("/healthz")
    psutil.wait_procs([replica], timeout=30)
    assert not replica.is_running()
