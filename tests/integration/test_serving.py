"""`ctd serve` over a whole run: its answers are those of the chain in one process, and its errors are short.

One server for the module, in a process of its own, as it is started by hand.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
from tiny_run import LOST_USER, make_tiny_run

from ctd_scale.artifacts import Run
from ctd_scale.recommender import Recommender
from ctd_scale.serving.load import ramp
from ctd_scale.serving.schema import response_object

pytestmark = pytest.mark.slow

START_S, TIMEOUT_S = 600, 5
CTD = [sys.executable, "-c", "from ctd_scale.cli import main; main()"]
RECOMMEND = "/v1/recommend"


@dataclass(frozen=True)
class Server:
    """A running `ctd serve`."""

    process: subprocess.Popen[str]
    client: httpx.Client

    def post(self, **request: Any) -> httpx.Response:
        return self.client.post(RECOMMEND, json=request)

    def replica(self, deployment: str) -> psutil.Process:
        """The process of a deployment's only replica."""
        (found,) = (
            child
            for child in psutil.Process(self.process.pid).children(recursive=True)
            if child.name().startswith("ray::") and f":{deployment}" in "".join(child.cmdline())
        )
        return found


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return make_tiny_run(tmp_path_factory.mktemp("serving"))


@pytest.fixture(scope="module")
def recommender(run: Run) -> Recommender:
    return Recommender(run)


@pytest.fixture(scope="module")
def link(run: Run) -> Path:
    """What the server is told to serve: a link to the run."""
    made = run.root.parent / "current"
    made.symlink_to(run.root)
    return made


@pytest.fixture(scope="module")
def server(run: Run, link: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Serves the tiny run from another folder than this one; ends it, if no test did, by SIGTERM."""
    ray_folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # short: socket paths are limited
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    command = [*CTD, "serve", "--run", link.name, "--port", "0", "--set", f"serving.request_timeout_s={TIMEOUT_S}.0"]
    errors = tmp_path_factory.mktemp("logs") / "stderr"
    with errors.open("w") as stderr:
        process = subprocess.Popen(
            command,
            cwd=run.root.parent,
            env=environment | {"RAY_TMPDIR": ray_folder},
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        )
    too_late = threading.Timer(START_S, process.kill)
    too_late.start()
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        too_late.cancel()
        url = re.search(r"at (http://\S+)", line)
        assert url is not None, line + errors.read_text()
        with httpx.Client(base_url=url[1], timeout=60) as client:
            yield Server(process, client)
    finally:
        too_late.cancel()
        process.terminate()
        process.communicate(timeout=60)
        shutil.rmtree(ray_folder, ignore_errors=True)


def expected(recommender: Recommender, history: np.ndarray, k: int = 10, **options: bool) -> dict[str, Any]:
    (answer,) = recommender.recommend([history], k, **options)
    return response_object(recommender.version, answer, recommender.catalogue)


def assert_same(found: httpx.Response, wanted: dict[str, Any]) -> None:
    assert found.status_code == 200, found.text
    answer = found.json()
    for one, other in zip(answer["items"], wanted["items"], strict=True):
        assert (one["item_id"], one["title"]) == (other["item_id"], other["title"])
        assert one["score"] == pytest.approx(other["score"], abs=1e-6)
    assert (answer["version"], answer["text"]) == (wanted["version"], wanted["text"])


def test_health_and_documentation(server: Server, recommender: Recommender) -> None:
    assert server.client.get("/healthz").json() == {"status": "ok", "version": recommender.version}
    for path, status in (("/v1/version", "ok"), ("/readyz", "ready")):
        assert server.client.get(path).json() == {"status": status, "version": recommender.version}
    assert server.client.get("/docs").status_code == 200


@pytest.mark.parametrize("options", [{}, {"explain": True}, {"exclude_seen": False, "k": 3}, {"k": 50}])
@pytest.mark.parametrize("items", [[0], [3, 1, 2], [7, 7, 7, 39], list(range(20))])
def test_a_history_is_answered_as_in_one_process(
    server: Server, recommender: Recommender, items: list[int], options: dict[str, Any]
) -> None:
    found = server.post(history=[f"i{item}" for item in items], **options)
    assert_same(found, expected(recommender, np.array(items, np.int32), **options))
    if options.get("exclude_seen", True):
        assert not {f"i{item}" for item in items} & {item["item_id"] for item in found.json()["items"]}


@pytest.mark.parametrize("explain", [False, True])
@pytest.mark.parametrize("user", [0, 11, 42])
def test_a_user_is_answered_as_in_one_process(
    server: Server, recommender: Recommender, user: int, explain: bool
) -> None:
    found = server.post(user_id=f"u{user}", k=7, explain=explain)
    assert_same(found, expected(recommender, recommender.log.full_history(user), 7, explain=explain))
    assert bool(found.json()["text"]) == explain


def test_requests_that_come_together_are_answered_as_alone(server: Server, recommender: Recommender) -> None:
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda user: server.post(user_id=f"u{user}", explain=user % 2 == 0), range(24)))
    for user, response in enumerate(found):
        history = recommender.log.full_history(user)
        assert_same(response, expected(recommender, history, explain=user % 2 == 0))


def test_filters_are_those_of_one_process(server: Server, recommender: Recommender) -> None:
    catalogue, history = recommender.catalogue, np.array([3, 1], np.int32)
    allowed = {item for item in range(40) if catalogue.categories[item] in ("drama", "crime")} - {8, 3, 1}
    excluded = np.array([item for item in range(40) if item not in allowed], np.int32)
    found = server.post(history=["i3", "i1"], k=5, categories=["drama", "crime"], exclude_items=["i8"])
    (answer,) = recommender.recommend([history], 5, excluded=[excluded])
    assert_same(found, response_object(recommender.version, answer, catalogue))
    assert len(answer.items) == 5
    assert set(answer.items) <= allowed
    everything = server.post(history=["i3", "i1"], k=50, exclude_categories=["comedy", "western", "crime"]).json()
    dramas = {f"i{item}" for item in range(40) if catalogue.categories[item] == "drama"}
    assert {item["item_id"] for item in everything["items"]} == dramas
    unknown = server.post(history=["i3"], categories=["dramma"])
    assert (unknown.status_code, unknown.json()) == (422, {"error": "categories: unknown categories 'dramma'"})


def test_a_batch_is_its_singles(server: Server, recommender: Recommender) -> None:
    requests = [{"user_id": f"u{user}", "k": 3} for user in range(5)]
    asked = {"requests": [*requests, {"user_id": "u9999"}]}
    response = server.client.post("/v1/recommend:batch", json=asked)
    *found, error = response.json()["responses"]
    for user, answer in enumerate(found):
        wanted = expected(recommender, recommender.log.full_history(user), 3)
        assert [item["item_id"] for item in answer["items"]] == [item["item_id"] for item in wanted["items"]]
    assert error == {"error": "user_id: 'u9999' is not in the interaction log; give a history instead"}


def test_items_like_one_and_items_by_name(server: Server, recommender: Recommender) -> None:
    vectors = recommender.rank.retrieve.retriever.vectors
    nearest = np.argsort(-(vectors @ vectors[7]))[1:6]
    found = server.client.get("/v1/items/i7/similar", params={"k": 5}).json()["items"]
    assert [item["item_id"] for item in found] == [f"i{item}" for item in nearest]
    assert found[0]["score"] == pytest.approx(float(vectors[nearest[0]] @ vectors[7]), abs=1e-5)
    titles = [
        item["title"] for item in server.client.get("/v1/items", params={"query": "golden garden"}).json()["items"]
    ]
    assert titles[0] == "Golden Garden"
    assert all("Golden" in title or "Garden" in title for title in titles)


def test_a_picture_shows_the_preference_the_draws_and_items_that_may_come_back(server: Server) -> None:
    asked = {"history": ["i3", "i1"], "k": 6, "exclude_categories": ["comedy"]}
    points = server.client.post("/v1/picture", json=asked).json()["points"]
    assert Counter(point["kind"] for point in points) == {"preference": 1, "draw": 4, "item": 6}
    assert max(max(abs(point["x"]), abs(point["y"])) for point in points) == pytest.approx(1)
    shown = {point["item_id"] for point in points if point["kind"] == "item"}
    assert not shown & {"i3", "i1"}
    assert not any(int(item[1:]) % 4 == 1 for item in shown), "every fourth is a comedy"


def test_a_preference_is_read_once_and_all_is_counted(server: Server) -> None:
    def counted(line: str) -> float:
        text = server.client.get("/metrics").text
        found = re.search(rf"^{re.escape(line)} (\S+)$", text, re.MULTILINE)
        return float(found[1]) if found else 0.0

    hits, misses = (f'ctd_preference_cache_total{{outcome="{outcome}"}}' for outcome in ("hit", "miss"))
    answered = 'ctd_requests_total{route="/v1/recommend",status="200"}'
    before = [counted(line) for line in (hits, misses, answered)]
    timings = [server.post(history=["i31", "i32", "i33"]).headers["Server-Timing"] for _ in range(3)]
    assert [counted(line) for line in (hits, misses, answered)] == [
        before[0] + 2,
        before[1] + 1,
        before[2] + 3,
    ]
    assert [stage.split(";")[0] for stage in timings[0].split(", ")] == [
        "preference",
        "draws",
        "retrieve",
        "error",
        "rank",
    ]
    assert "preference_cached" in timings[1]


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ('{"history": ["i1"', 400, "body: not JSON at character 17"),
        ("{}", 422, "give exactly one of history and user_id"),
        ('{"history": ["i1"], "user_id": "u1"}', 422, "give exactly one of history and user_id"),
        ('{"history": []}', 422, "history: is empty, expected at least one item id"),
        ('{"history": ["i1", "x", "\\ud800"]}', 422, r"history: unknown item ids 'x', '\ud800'"),
        (f'{{"user_id": "{LOST_USER}"}}', 422, f"user_id: {LOST_USER!r} has no interactions; give a history instead"),
        ('{"user_id": "u1", "k": 51}', 422, "k: expected at most 50"),
        ('{"user_id": "u1", "k": 0}', 422, "k: Input should be greater than or equal to 1"),
        ('{"user_id": "u1", "k": NaN}', 422, "k: Input should be a valid integer"),
        ('{"user_id": "u1", "k": 1e400}', 422, "k: Input should be a valid integer"),
        ('{"user_id": "u1", "top_k": 5}', 422, "top_k: Extra inputs are not permitted"),
        (
            '{"history": [' + ", ".join(['"i1"'] * 21) + "]}",
            422,
            "history: 21 items, expected at most 20",
        ),
        ('{"user_id": "u9999"}', 404, "user_id: 'u9999' is not in the interaction log; give a history instead"),
        ('{"user_id": "\\udfff"}', 404, r"user_id: '\udfff' is not in the interaction log; give a history instead"),
        (" " * 4097, 413, "body: expected at most 4096 bytes"),
    ],
)
def test_what_cannot_be_answered_is_explained(server: Server, body: str, status: int, message: str) -> None:
    response = server.client.post(RECOMMEND, content=body.encode(), headers={"Content-Type": "application/json"})
    assert (response.status_code, response.json()) == (status, {"error": message})


def test_a_body_that_does_not_tell_its_length_is_limited_too(server: Server) -> None:
    pieces = (b" " * 512 for _ in range(20))
    response = server.client.post(RECOMMEND, content=pieces, headers={"Content-Type": "application/json"})
    assert (response.status_code, response.json()) == (413, {"error": "body: expected at most 4096 bytes"})


def test_other_paths_and_methods(server: Server) -> None:
    found = server.client.get("/nothing"), server.client.get(RECOMMEND)
    assert [(each.status_code, each.json()) for each in found] == [
        (404, {"error": "Not Found"}),
        (405, {"error": "Method Not Allowed"}),
    ]


def test_a_step_that_hangs_fills_the_queue_and_times_out(server: Server) -> None:
    replica = server.replica("Preference")
    replica.suspend()
    try:
        started = time.monotonic()
        with ThreadPoolExecutor(32) as threads:
            # Histories that nobody has asked about: the preference after a known one needs no LLM.
            found = list(threads.map(lambda item: server.post(history=["i39", f"i{item}", "i39"]), range(32)))
        elapsed = time.monotonic() - started
        assert elapsed < 3 * TIMEOUT_S
        assert server.client.get("/healthz").status_code == 200
    finally:
        replica.resume()
    errors = {503: {"error": "too busy, try again later"}, 504: {"error": f"no answer within {TIMEOUT_S} s"}}
    assert all(response.json() == errors[response.status_code] for response in found)
    counts = Counter(response.status_code for response in found)
    # Two in progress and six in the queue wait for an answer, and whoever comes meanwhile is sent away. On a slow
    # machine some come only after these have given up, and take their places.
    assert counts[503] >= 1
    assert 6 <= counts[504] <= 8 * (1 + elapsed // TIMEOUT_S)
    assert server.post(user_id="u1").status_code == 200


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


def test_another_run_takes_its_place_without_a_pause_and_gives_it_back(
    server: Server, run: Run, link: Path, recommender: Recommender, tmp_path_factory: pytest.TempPathFactory
) -> None:
    other = make_tiny_run(tmp_path_factory.mktemp("other"), seed=1)
    wanted: dict[str, list[list[str]]] = {}
    for each in (recommender, Recommender(other)):
        histories = [each.log.full_history(user) for user in range(20)]
        found = each.recommend(histories, 10)
        wanted[each.version] = [[each.catalogue.item_ids[item] for item in answer.items] for answer in found]
    before, after = wanted
    assert wanted[before] != wanted[after]

    def lead_to(target: Path) -> None:
        aside = link.with_name("aside")
        aside.symlink_to(target)
        aside.replace(link)
        server.process.send_signal(signal.SIGHUP)

    def said() -> str:
        assert server.process.stdout is not None
        return server.process.stdout.readline()

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
        lead_to(other.root)
        assert said() == f"now serving version {after}\n"
        time.sleep(1)
        lead_to(run.root)
        assert said() == f"now serving version {before}\n"
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

    lead_to(run.root.parent / "nowhere")
    assert said().startswith("not swapped: no run at current")
    assert server.post(user_id="u1").json()["version"] == before
    lead_to(run.root)
    assert said() == f"now serving version {before}\n"


def test_a_ramp_counts_every_answer_and_times_it(server: Server) -> None:
    bodies = [{"user_id": f"u{user}", "k": 3} for user in range(5)] + [{"user_id": "u5", "k": 50}]
    levels, timeline = asyncio.run(ramp(str(server.client.base_url), bodies, (1, 3), 1.0, lambda: {"App": 1}))
    assert [level.clients for level in levels] == [1, 3]
    for level in levels:
        assert level.statuses == {"200": level.requests}
        assert level.requests > 3 * level.clients
        assert 0 < level.p50_ms <= level.p95_ms <= level.p99_ms
        # Clients that wait for their answers: their number is rate times time (Little's law).
        assert level.per_second * level.p50_ms / 1e3 == pytest.approx(level.clients, rel=0.6)
        assert level.replicas == {"App": 1}
    assert timeline[0]["App"] == 1
    with pytest.raises(httpx.HTTPStatusError, match="404"):
        asyncio.run(ramp(str(server.client.base_url), [{"user_id": "u9999"}], (1,), 1.0, dict))


@pytest.fixture
def browser() -> Iterator[Any]:
    """Chromium without a window; skips where it is not installed (Debian: chromium and chromium-driver)."""
    driver, chromium = shutil.which("chromedriver"), shutil.which("chromium")
    if driver is None or chromium is None:
        pytest.skip("needs chromium and chromedriver")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1200,900"):
        options.add_argument(argument)
    opened = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    try:
        yield opened
    finally:
        opened.quit()


def test_the_explorer_finds_titles_and_shows_what_follows_them(
    server: Server, recommender: Recommender, browser: Any
) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    def texts(selector: str) -> list[str]:
        return [each.text for each in browser.find_elements(By.CSS_SELECTOR, selector)]

    def wait(condition: Any) -> None:
        WebDriverWait(browser, 60).until(lambda _: condition())

    browser.get(str(server.client.base_url))
    wait(lambda: texts("#version") == [recommender.version])
    browser.find_element(By.ID, "query").send_keys("golden garden")
    wait(lambda: texts("#found button")[:1] == ["+ Golden Garden"])
    browser.find_element(By.CSS_SELECTOR, "#found button").click()
    item = recommender.catalogue.titles.index("Golden Garden")
    wanted = [each["title"] for each in expected(recommender, np.array([item], np.int32))["items"]]
    wait(lambda: texts("#items button") == wanted)
    assert texts("#history button")[0].startswith("1. Golden Garden")
    wait(lambda: len(browser.find_elements(By.CSS_SELECTOR, "#picture circle.draw")) == 4)
    assert len(browser.find_elements(By.CSS_SELECTOR, "#picture circle.preference")) == 1
    assert texts("#times td")[-2] == "rank"
    # A recommendation goes into the history; an error is shown; the LLM's text, where it is asked for.
    browser.find_element(By.CSS_SELECTOR, "#items button").click()
    wait(lambda: len(texts("#history button")) == 2)
    browser.find_element(By.ID, "explain").click()
    wait(lambda: texts("#text")[0] != "")
    browser.find_element(By.ID, "user-id").send_keys("u9999\n")
    wait(lambda: "'u9999' is not in the interaction log" in texts("#error")[0])
    browser.find_element(By.ID, "clear").click()
    wait(lambda: texts("#items button") == [])
    # Only the unknown user's 404 is reported: no script failed and nothing was blocked.
    assert all("404" in line["message"] for line in browser.get_log("browser")), browser.get_log("browser")


def test_sigterm_ends_it_cleanly(server: Server) -> None:
    """The last test: what follows finds no server."""
    replica = server.replica("App")
    server.process.send_signal(signal.SIGTERM)
    output, _ = server.process.communicate(timeout=60)
    assert (server.process.returncode, output) == (0, "")
    with pytest.raises(httpx.TransportError):
        server.client.get("/healthz")
    psutil.wait_procs([replica], timeout=30)
    assert not replica.is_running()
