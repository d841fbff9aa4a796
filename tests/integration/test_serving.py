"""`ctd serve` over a whole run: its answers are those of the chain in one process, and its errors are short.

One server for the module, in a process of its own, as it is started by hand.
"""

from __future__ import annotations

import re
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import pytest
from serving_process import BODY_TIMEOUT_S, RECOMMEND, TIMEOUT_S, Server, started
from tiny_run import LOST_USER, make_tiny_run, publish_preferences

from ctd_scale import latency
from ctd_scale.artifacts import Run
from ctd_scale.recommender import Recommender
from ctd_scale.serving.schema import Boost, Directory, response_object

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return make_tiny_run(tmp_path_factory.mktemp("serving"))


@pytest.fixture(scope="module")
def tuned(run: Run) -> latency.Row:
    """What is served: the fastest of some settings, none of them the run's own."""
    publish_preferences(run)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latency, "SCALES", (0.75, 0.5))
        return min(latency.measure_latency(run, run.read_config(), users=5), key=lambda row: row.p99_ms)


@pytest.fixture(scope="module")
def recommender(run: Run, tuned: latency.Row) -> Recommender:
    return Recommender(run, tuned.settings.applied(run.read_config()), tuned.settings.effort)


@pytest.fixture(scope="module")
def server(run: Run, tuned: latency.Row) -> Iterator[Server]:
    with started(run.root, f"serving.target_p99_ms={tuned.p99_ms}") as server:
        yield server


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


def test_the_settings_that_a_target_chose_are_told(
    server: Server, recommender: Recommender, tuned: latency.Row
) -> None:
    assert server.process.stdout is not None
    said = f"for serving.target_p99_ms={tuned.p99_ms:g}: {latency.described(tuned.settings)} "
    assert said in server.process.stdout.readline()
    assert server.client.get("/v1/version").json() == {
        "status": "ok",
        "version": recommender.version,
        "tuned": tuned.values(),
    }


def test_health_and_documentation(server: Server, recommender: Recommender) -> None:
    assert server.client.get("/healthz").json() == {"status": "ok", "version": recommender.version}
    assert server.client.get("/readyz").json() == {"status": "ready", "version": recommender.version}
    assert server.client.get("/docs").status_code == 200
    answer = server.client.get("/healthz", headers={"X-Request-ID": "mine"})
    assert answer.headers.get_list("X-Request-ID") == ["mine"]
    assert len(server.client.get("/healthz").headers.get_list("X-Request-ID")) == 1
    for path, status in (("/healthz", 200), ("/readyz", 200), ("/", 200), ("/nowhere", 404)):
        asked = server.client.head(path)  # as some balancers do
        assert (asked.status_code, asked.content) == (status, b"")


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
    priced = server.post(history=["i3", "i1"], k=50, ranges={"price": {"min": 2, "max": 8}}).json()["items"]
    wanted = {f"i{item}" for item in range(40) if 4 <= item <= 16 and item % 5}
    assert {item["item_id"] for item in priced} == wanted
    only = server.post(history=["i3", "i1"], only_items=["i9", "i3", "i7"]).json()["items"]
    assert {item["item_id"] for item in only} == {"i9", "i7"}
    everything = server.post(history=["i3", "i1"], k=50, exclude_categories=["comedy", "western", "crime"]).json()
    dramas = {f"i{item}" for item in range(40) if catalogue.categories[item] == "drama"}
    assert {item["item_id"] for item in everything["items"]} == dramas
    unknown = server.post(history=["i3"], categories=["dramma"])
    assert (unknown.status_code, unknown.json()) == (422, {"error": "categories: unknown categories 'dramma'"})


def test_boosts_are_those_of_one_process(server: Server, recommender: Recommender) -> None:
    history = np.array([3, 1], np.int32)
    wanted = [{"categories": ["western"], "factor": 3.0}, {"items": ["i7", "i2"], "factor": 0.5}]
    boosts = Directory(recommender.log).boosts([Boost.model_validate(each) for each in wanted])
    (answer,) = recommender.recommend([history], 8, boosts=[boosts])
    assert_same(
        server.post(history=["i3", "i1"], k=8, boosts=wanted),
        response_object(recommender.version, answer, recommender.catalogue),
    )
    (plain,) = recommender.recommend([history], 8)
    westerns = [sum(item % 4 == 2 for item in each.items) for each in (answer, plain)]
    assert westerns[0] > westerns[1]
    with ThreadPoolExecutor(4) as threads:  # who comes together with a boost has none of it
        asked = [wanted if place % 2 else [] for place in range(12)]
        found = list(threads.map(lambda each: server.post(history=["i3", "i1"], k=8, boosts=each), asked))
    for each, response in zip(asked, found, strict=True):
        expected_answer = answer if each else plain
        assert_same(response, response_object(recommender.version, expected_answer, recommender.catalogue))


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


def test_a_picture_shows_the_preference_the_draws_and_items_that_may_come_back(
    server: Server, tuned: latency.Row
) -> None:
    asked = {"history": ["i3", "i1"], "k": 6, "exclude_categories": ["comedy"]}
    points = server.client.post("/v1/picture", json=asked).json()["points"]
    assert Counter(point["kind"] for point in points) == {"preference": 1, "draw": tuned.settings.num_draws, "item": 6}
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


def test_what_the_llm_wrote_is_kept(server: Server, recommender: Recommender) -> None:
    history = ["i29", "i31", "i37"]
    first, again, other = (server.post(history=each, explain=True) for each in (history, history, ["i31", "i37"]))
    assert [name in first.headers["Server-Timing"] for name in ("text;", "text_cached")] == [True, False]
    assert [name in again.headers["Server-Timing"] for name in ("text;", "text_cached")] == [False, True]
    assert [name in other.headers["Server-Timing"] for name in ("text;", "text_cached")] == [True, False]
    assert first.json() == again.json()
    places = [recommender.catalogue.item_ids.index(item) for item in history]
    assert_same(again, expected(recommender, np.array(places, np.int32), explain=True))


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


def test_a_body_that_does_not_arrive_is_not_waited_for(server: Server) -> None:
    def pieces() -> Iterator[bytes]:
        yield b" "
        time.sleep(BODY_TIMEOUT_S + 0.5)
        yield b" "

    response = server.client.post(RECOMMEND, content=pieces(), headers={"Content-Type": "application/json"})
    assert (response.status_code, response.json()) == (408, {"error": "body: expected all of it within 1 s"})


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
    errors = {
        429: {"error": "too many requests wait, try again later"},
        504: {"error": f"no answer within {TIMEOUT_S} s"},
    }
    assert all(response.json() == errors[response.status_code] for response in found)
    counts = Counter(response.status_code for response in found)
    # Two in progress and six in the queue wait for an answer, and whoever comes meanwhile is sent away. On a slow
    # machine some come only after these have given up, and take their places.
    assert counts[429] >= 1
    assert 6 <= counts[504] <= 8 * (1 + elapsed // TIMEOUT_S)
    assert server.post(user_id="u1").status_code == 200


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
    server: Server, recommender: Recommender, tuned: latency.Row, browser: Any
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
    wait(lambda: len(browser.find_elements(By.CSS_SELECTOR, "#picture circle.draw")) == tuned.settings.num_draws)
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
