"""The HTTP layer around a pretended chain: limits, statuses, messages."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import pytest
import uvicorn
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from ctd_scale.config_serving import ServingConfig
from ctd_scale.serving.api import Answered, make_api
from ctd_scale.serving.middleware import Door, Record, Staged
from ctd_scale.serving.schema import RecommendRequest, RequestError, UnknownItemError, UnknownUserError

CONFIG = ServingConfig(max_k=50, max_history=4, max_requests=3, max_body_bytes=1000, request_timeout_s=0.05)
ANSWER = {"version": "v1", "items": [{"item_id": "a", "title": "Alpha", "score": 0.5}], "text": ""}
JSON = {"Content-Type": "application/json"}

Ask = Callable[..., httpx.Response]


class Pretended:
    """Does what the user id says; keeps what it is told."""

    @property
    def version(self) -> str:
        return "v1"

    def __init__(self) -> None:
        self.tuned: dict[str, float] | None = None
        self.door = Door()
        self.records: list[Record | Staged] = []
        self.given_up: list[str] = []

    async def ready(self) -> None:
        pass

    async def recommend(self, request: RecommendRequest) -> Answered:
        if request.user_id == "slow":
            try:
                await asyncio.sleep(30)
            except asyncio.CancelledError:
                self.given_up.append("slow")
                raise
        for error in (
            RequestError("history: no"),
            UnknownUserError("user_id: no '\ud800'"),
            ZeroDivisionError("secret"),
        ):
            if request.user_id == type(error).__name__:
                raise error
        if request.user_id == "BackPressureError":
            raise BackPressureError(num_queued_requests=6, max_queued_requests=6)
        if request.user_id == "DeploymentUnavailableError":
            raise DeploymentUnavailableError("Preference")
        return Answered(ANSWER, {"preference": 0.25, "rank": 0.001})

    async def picture(self, request: RecommendRequest) -> dict[str, Any]:
        return {"version": "v1", "points": [{"kind": "draw", "x": 0.5, "y": -1.0}]}

    async def similar(self, item_id: str, k: int) -> dict[str, Any]:
        if item_id != "a/b c":
            raise UnknownItemError(f"item_id: {item_id!r} is not in the catalogue")
        return {"version": "v1", "items": ANSWER["items"] * k}

    async def find(self, query: str, k: int) -> dict[str, Any]:
        return {"version": "v1", "items": [{"item_id": "q", "title": query, "score": 1.0}]}

    async def metrics(self) -> str:
        return "ctd_requests_total 3.0\n"

    def observe(self, record: Record | Staged) -> None:
        self.records.append(record)


@pytest.fixture
def backend() -> Pretended:
    return Pretended()


@pytest.fixture
def ask(backend: Pretended) -> Ask:
    """Send one request to the app; returns its response."""

    async def send(method: str, path: str, **options: Any) -> httpx.Response:
        transport = httpx.ASGITransport(make_api(backend, CONFIG), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.request(method, path, **options)

    return lambda *args, **options: asyncio.run(send(*args, **options))


def test_an_answer_is_sent_as_it_is(ask: Ask) -> None:
    response = ask("POST", "/v1/recommend", json={"history": ["a"]})
    assert (response.status_code, response.json()) == (200, ANSWER)
    assert list(response.json()) == ["version", "items", "text"]


def test_health_and_documentation(ask: Ask, backend: Pretended) -> None:
    for path, status in (("/healthz", "ok"), ("/v1/version", "ok"), ("/readyz", "ready")):
        assert ask("GET", path).json() == {"status": status, "version": "v1"}
        assert ask("HEAD", path).status_code == 200
    backend.tuned = {"num_draws": 8, "effort": 0.5}
    assert ask("GET", "/v1/version").json() == {"status": "ok", "version": "v1", "tuned": backend.tuned}
    assert ask("GET", "/docs").status_code == 200
    assert "/v1/recommend" in ask("GET", "/openapi.json").json()["paths"]


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b"", 422, "body: Field required"),
        (b"[]", 422, "body: Input should be a valid dictionary"),
        (b"{", 400, "body: not JSON at character 1"),
        (b"\xff\xfe{", 400, "body: not JSON in UTF-8, or compressed, which is not read"),
        (b"[" * 990, 400, "body: not JSON in UTF-8, or compressed, which is not read"),
        (b'{"k": ' + b"9" * 900 + b"}", 422, "k: expected at most 50"),
        (b'{"k": 51}', 422, "k: expected at most 50"),
        (b'{"k": 0}', 422, "k: Input should be greater than or equal to 1"),
        (b'{"k": NaN}', 422, "k: Input should be a valid integer"),
        (b'{"k": 1e400}', 422, "k: Input should be a valid integer"),
        (b'{"k": "5"}', 422, "k: Input should be a valid integer"),
        (b'{"k": null}', 422, "k: Input should be a valid integer"),
        (b'{"ranges": {"price": {"min": NaN}}}', 422, "ranges.price.min: Input should be a finite number"),
        (b'{"ranges": {"price": {"from": 1}}}', 422, "ranges.price.from: Extra inputs are not permitted"),
        (b'{"boosts": [{"items": ["a"], "factor": 0}]}', 422, "boosts.0.factor: Input should be greater than"),
        (b'{"boosts": [{"items": ["a"]}]}', 422, "boosts.0.factor: Field required"),
        (b'{"explain": 1}', 422, "explain: Input should be a valid boolean"),
        (b'{"history": "a"}', 422, "history: Input should be a valid list"),
        (b'{"history": ["a", 7]}', 422, "history.1: Input should be a valid string"),
        (b'{"history": ["a", "a", "a", "a", "a"]}', 422, "history: 5 items, expected at most 4"),
        (b'{"\\ud800": 1}', 422, "body: Input should be a valid string"),
        (b'{"history": {"\\ud800": 1}}', 422, "history: Input should be a valid list"),
        (b'{"' + b"x" * 900 + b'": 1}', 422, "x" * 64 + ": Extra inputs are not permitted"),
        (b'{"user_id": "RequestError"}', 422, "history: no"),
        (b'{"user_id": "UnknownUserError"}', 404, r"user_id: no '\ud800'"),
        (b'{"user_id": "BackPressureError"}', 429, "too many requests wait, try again later"),
        (b'{"user_id": "DeploymentUnavailableError"}', 503, "no replica is there, try again later"),
        (b'{"user_id": "a", "deadline_ms": 0}', 422, "deadline_ms: Input should be greater than or equal to 1"),
        (b'{"user_id": "slow", "deadline_ms": 20}', 504, "no answer within 0.02 s"),
        (b'{"user_id": "slow", "deadline_ms": 99999}', 504, "no answer within 0.05 s"),
        (b'{"user_id": "slow"}', 504, "no answer within 0.05 s"),
        (b'{"user_id": "ZeroDivisionError"}', 500, "internal error"),
    ],
)
def test_every_error_is_one_short_object(ask: Ask, body: bytes, status: int, message: str) -> None:
    response = ask("POST", "/v1/recommend", content=body, headers=JSON)
    assert response.status_code == status
    assert list(response.json()) == ["error"]
    assert message in response.json()["error"]
    assert len(response.content) < 300


def test_the_first_wrong_fields_are_all_named(ask: Ask) -> None:
    response = ask("POST", "/v1/recommend", json={"history": 1, "user_id": 2, "k": 0, "explain": 3})
    assert response.json() == {
        "error": "history: Input should be a valid list; user_id: Input should be a valid string; "
        "k: Input should be greater than or equal to 1"
    }


def test_an_overloaded_server_says_when_to_come_back(ask: Ask) -> None:
    for user in ("BackPressureError", "DeploymentUnavailableError"):
        assert ask("POST", "/v1/recommend", json={"user_id": user}).headers["Retry-After"] == "1"


def test_other_paths_and_methods(ask: Ask) -> None:
    assert (ask("GET", "/nothing").status_code, ask("GET", "/nothing").json()) == (404, {"error": "Not Found"})
    response = ask("GET", "/v1/recommend")
    assert (response.status_code, response.json()) == (405, {"error": "Method Not Allowed"})
    assert response.headers["Allow"] == "POST"


def test_a_large_body_is_refused_with_and_without_a_length(ask: Ask) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(11):
            yield b" " * 100

    for content in (b" " * 1001, pieces()):
        response = ask("POST", "/v1/recommend", content=content, headers=JSON)
        assert (response.status_code, response.json()) == (413, {"error": "body: expected at most 1000 bytes"})
    assert ask("POST", "/v1/recommend", content=b'{"user_id": "a"}'.ljust(1000), headers=JSON).status_code == 200


def test_a_body_must_arrive_in_time(backend: Pretended) -> None:
    async def send(pieces: list[bytes], pause: float, reader: Any, writer: Any) -> bytes:
        """The head of a request and these pieces of its body, of which there should be a hundred bytes."""
        writer.write(b"POST /v1/recommend HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n")
        writer.write(b"Content-Length: 100\r\n\r\n")
        answer = asyncio.create_task(reader.readuntil(b"}"))
        for piece in pieces:
            if not answer.done():
                writer.write(piece)
                await asyncio.sleep(pause)
        return bytes(await answer)

    async def over_sockets() -> None:
        options = {"log_level": "critical", "lifespan": "off", "ws": "none"}
        config = CONFIG.model_copy(update={"body_timeout_s": 0.3})
        server = uvicorn.Server(uvicorn.Config(make_api(backend, config), port=0, **options))
        serving = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        whole = b'{"user_id": "a"}'.ljust(100)
        halves = [whole[:50], whole[50:]]
        # Nothing at all; a byte at a time, without end; two halves, one at once and one in time.
        for pieces, pause, status in (([], 0.0, 408), ([b" "] * 30, 0.02, 408), (halves, 0.05, 200)):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            answer = await send(pieces, pause, reader, writer)
            assert answer.startswith(f"HTTP/1.1 {status} ".encode())
            if status == 408:
                assert b'{"error":"body: expected all of it within 0.3 s"}' in answer
                assert await reader.read() == b"", "what comes after is no other request"
            writer.close()
        server.should_exit = True
        await serving

    started = time.monotonic()
    asyncio.run(over_sockets())
    assert time.monotonic() - started < 10
    assert [record.status for record in backend.records] == [408, 408, 200]


def test_who_is_inside_is_answered_and_nobody_else_when_the_door_is_closed(backend: Pretended) -> None:
    waiting = asyncio.Event()

    async def similar(item_id: str, k: int) -> dict[str, Any]:
        await waiting.wait()
        return {"version": "v1", "items": []}

    backend.similar = similar  # type: ignore[method-assign]
    api = make_api(backend, CONFIG.model_copy(update={"request_timeout_s": 9.0}))

    async def close() -> None:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(api), base_url="http://test") as client:
            inside = asyncio.create_task(client.get("/v1/items/a/similar"))
            while not backend.door.inside:
                await asyncio.sleep(0)
            backend.door.closed = True
            for path in ("/v1/items?query=a", "/readyz", "/"):
                refused = await client.get(path)
                assert (refused.status_code, refused.headers["Retry-After"]) == (503, "1")
                assert refused.json() == {"error": "this server is ending, try again later"}
                assert refused.headers["X-Request-ID"]
            for path in ("/healthz", "/metrics", "/v1/version"):
                assert (await client.get(path)).status_code == 200
            assert backend.door.inside == 1
            waiting.set()
            assert (await inside).status_code == 200
            assert backend.door.inside == 0

    asyncio.run(close())


def test_a_batch_answers_each_and_names_what_is_wrong_with_one(ask: Ask) -> None:
    requests: list[dict[str, Any]] = [{"user_id": "a"}, {"user_id": "UnknownUserError"}, {"user_id": "a", "k": 51}]
    response = ask("POST", "/v1/recommend:batch", json={"requests": requests})
    errors = [{"error": r"user_id: no '\ud800'"}, {"error": "k: expected at most 50"}]
    assert (response.status_code, response.json()) == (200, {"responses": [ANSWER, *errors]})
    for body, message in (
        ({"requests": requests * 2}, "requests: 6, expected at most 3"),
        ({"requests": []}, "requests: List should have at least 1 item"),
        ({"requests": {}}, "requests: Input should be a valid list"),
    ):
        refused = ask("POST", "/v1/recommend:batch", json=body)
        assert refused.status_code == 422
        assert refused.json()["error"].startswith(message)
    wrong: list[Any] = [
        {"user_id": 1},
        {"user_id": "a"},
        {"usr": "a"},
        5,
        {"user_id": "a", "ranges": {"p": {"min": "x"}}},
    ]
    for start in range(0, len(wrong), 3):
        response = ask("POST", "/v1/recommend:batch", json={"requests": wrong[start : start + 3]})
        said = [answer.get("error") for answer in response.json()["responses"]]
        assert (
            said
            == [
                *("user_id: Input should be a valid string", None, "usr: Extra inputs are not permitted"),
                *("body: Input should be a valid dictionary or instance of RecommendRequest",),
                *("ranges.p.min: Input should be a valid number",),
            ][start : start + 3]
        )
    busy = ask("POST", "/v1/recommend:batch", json={"requests": [{"user_id": "a"}, {"user_id": "BackPressureError"}]})
    assert (busy.status_code, busy.headers["Retry-After"]) == (429, "1")
    late = [{"user_id": "a"}, {"user_id": "slow", "deadline_ms": 10}]
    response = ask("POST", "/v1/recommend:batch", json={"requests": late})
    assert response.json() == {"responses": [ANSWER, {"error": "no answer within 0.01 s"}]}
    assert ask("POST", "/v1/recommend:batch", json={"requests": [*late, {"user_id": "slow"}]}).status_code == 504


def test_a_batch_that_is_refused_leaves_nothing_behind(ask: Ask, backend: Pretended) -> None:
    busy = [{"user_id": "slow"}, {"user_id": "BackPressureError"}, {"user_id": "slow"}]
    assert ask("POST", "/v1/recommend:batch", json={"requests": busy}).status_code == 429
    assert backend.given_up == ["slow", "slow"]


def test_the_stages_of_a_batch_are_counted(ask: Ask, backend: Pretended) -> None:
    ask("POST", "/v1/recommend:batch", json={"requests": [{"user_id": "a"}, {"user_id": "b"}]})
    assert [each.stages for each in backend.records] == [{"preference": 0.25, "rank": 0.001}] * 2 + [{}]


def test_who_leaves_is_no_failure_of_the_server(backend: Pretended) -> None:
    async def leave() -> None:
        transport = httpx.ASGITransport(make_api(backend, CONFIG.model_copy(update={"request_timeout_s": 30})))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            asked = asyncio.create_task(client.post("/v1/recommend", json={"user_id": "slow"}))
            await asyncio.sleep(0.1)
            asked.cancel()
            await asyncio.gather(asked, return_exceptions=True)

    asyncio.run(leave())
    (record,) = backend.records
    assert isinstance(record, Record)
    assert record.status == 499


def test_items_like_one_and_items_by_name(ask: Ask) -> None:
    similar = ask("GET", "/v1/items/a%2Fb%20c/similar", params={"k": 2})
    assert similar.json() == {"version": "v1", "items": ANSWER["items"] * 2}
    unknown = ask("GET", "/v1/items/x/similar")
    assert (unknown.status_code, unknown.json()) == (404, {"error": "item_id: 'x' is not in the catalogue"})
    assert ask("GET", "/v1/items", params={"query": "é <b>"}).json()["items"][0]["title"] == "é <b>"
    for path, params in (("/v1/items", {}), ("/v1/items", {"query": "a", "k": 51}), ("/v1/items/a/similar", {"k": 0})):
        refused = ask("GET", path, params=params)
        assert (refused.status_code, list(refused.json())) == (422, ["error"])
    assert ask("POST", "/v1/picture", json={"user_id": "a"}).json()["points"][0]["kind"] == "draw"


def test_every_answer_has_the_id_of_its_request_and_says_where_the_time_went(ask: Ask, backend: Pretended) -> None:
    response = ask("POST", "/v1/recommend", json={"user_id": "a"}, headers={"X-Request-ID": "mine-1"})
    assert response.headers["X-Request-ID"] == "mine-1"
    assert response.headers["Server-Timing"] == "preference;dur=250.00, rank;dur=1.00"
    for brought in ("x" * 65, 'a"b', "", "ä"):
        given = ask("POST", "/v1/recommend", json={"user_id": "slow"}, headers={"X-Request-ID": brought.encode()})
        assert len(given.headers["X-Request-ID"]) == 32
        assert "Server-Timing" not in given.headers
    ask("GET", "/v1/items/a%2Fb%20c/similar")
    ask("GET", "/no/such/path")
    ask("POST", "/v1/recommend", json={"user_id": "ZeroDivisionError"})
    assert [(record.route, record.status) for record in backend.records] == [
        ("/v1/recommend", 200),
        *[("/v1/recommend", 504)] * 4,
        ("/v1/items/{item_id:path}/similar", 200),
        ("unknown", 404),
        ("/v1/recommend", 500),
    ]
    assert backend.records[0].stages == {"preference": 0.25, "rank": 0.001}
    assert backend.records[0].request_id == "mine-1"
    assert min(record.seconds for record in backend.records[1:5]) >= CONFIG.request_timeout_s


def test_the_access_log_is_json(ask: Ask, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "ctd_scale.access"):
        ask("POST", "/v1/recommend", json={"user_id": "a"}, headers={"X-Request-ID": "mine-2"})
    (line,) = [json.loads(record.message) for record in caplog.records]
    assert (line["request_id"], line["method"], line["route"], line["status"]) == (
        "mine-2",
        "POST",
        "/v1/recommend",
        200,
    )


def test_the_page_and_what_it_needs_come_from_here_alone(ask: Ask) -> None:
    page = ask("GET", "/")
    assert (page.status_code, page.headers["Content-Type"]) == (200, "text/html; charset=utf-8")
    assert page.headers["Content-Security-Policy"] == "default-src 'self'; img-src 'self' data:"
    needed = re.findall(r'(?:src|href)="([^"]+)"', page.text)
    assert needed == ["page.css", "data:,", "page.js", "docs", "metrics"]
    for path in ("page.css", "page.js"):
        assert ask("GET", f"/{path}").status_code == 200
    # Titles may hold anything: the script never makes HTML of a text.
    assert not re.search("innerHTML|insertAdjacentHTML|document.write|eval", ask("GET", "/page.js").text)


def test_metrics_are_plain_text(ask: Ask) -> None:
    response = ask("GET", "/metrics")
    assert response.headers["Content-Type"].startswith("text/plain; version=0.0.4")
    assert response.text == "ctd_requests_total 3.0\n"


def test_a_deadline_of_ages_is_the_servers_and_a_body_needs_its_header(ask: Ask) -> None:
    assert ask("POST", "/v1/recommend", json={"user_id": "a", "deadline_ms": 10**400}).status_code == 200
    for headers in ({}, {"Content-Type": "application/x-www-form-urlencoded"}):
        refused = ask("POST", "/v1/recommend", content=b'{"user_id": "a"}', headers=headers)
        assert refused.status_code == 422
        assert refused.json() == {"error": "body: expected JSON with the header Content-Type: application/json"}
