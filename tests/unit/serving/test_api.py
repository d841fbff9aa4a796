"""The HTTP layer around a pretended chain: limits, statuses, messages."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import pytest
from ray.serve.exceptions import BackPressureError

from ctd_scale.config import ServingConfig
from ctd_scale.serving.api import make_api
from ctd_scale.serving.schema import RecommendRequest, RequestError, UnknownUserError

CONFIG = ServingConfig(max_k=50, max_history=4, max_body_bytes=1000, request_timeout_s=0.05)
ANSWER = {"version": "v1", "items": [{"item_id": "a", "title": "Alpha", "score": 0.5}], "text": ""}
JSON = {"Content-Type": "application/json"}

Ask = Callable[..., httpx.Response]


async def answer(request: RecommendRequest) -> dict[str, Any]:
    """Does what the user id says."""
    if request.user_id == "slow":
        await asyncio.sleep(30)
    for error in (RequestError("history: no"), UnknownUserError("user_id: no '\ud800'"), ZeroDivisionError("secret")):
        if request.user_id == type(error).__name__:
            raise error
    if request.user_id == "BackPressureError":
        raise BackPressureError(num_queued_requests=6, max_queued_requests=6)
    return ANSWER


@pytest.fixture
def ask() -> Ask:
    """Send one request to the app; returns its response."""

    async def send(method: str, path: str, **options: Any) -> httpx.Response:
        transport = httpx.ASGITransport(make_api(answer, "v1", CONFIG), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.request(method, path, **options)

    return lambda *args, **options: asyncio.run(send(*args, **options))


def test_an_answer_is_sent_as_it_is(ask: Ask) -> None:
    response = ask("POST", "/v1/recommend", json={"history": ["a"]})
    assert (response.status_code, response.json()) == (200, ANSWER)
    assert list(response.json()) == ["version", "items", "text"]


def test_health_and_documentation(ask: Ask) -> None:
    assert ask("GET", "/healthz").json() == {"status": "ok", "version": "v1"}
    assert ask("GET", "/docs").status_code == 200
    assert "/v1/recommend" in ask("GET", "/openapi.json").json()["paths"]


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b"", 422, "body: Field required"),
        (b"[]", 422, "body: Input should be a valid dictionary"),
        (b"{", 400, "body: not JSON at character 1"),
        (b"\xff\xfe{", 400, "There was an error parsing the body"),
        (b"[" * 990, 400, "There was an error parsing the body"),
        (b'{"k": ' + b"9" * 900 + b"}", 422, "k: expected at most 50"),
        (b'{"k": 51}', 422, "k: expected at most 50"),
        (b'{"k": 0}', 422, "k: Input should be greater than or equal to 1"),
        (b'{"k": NaN}', 422, "k: Input should be a valid integer"),
        (b'{"k": 1e400}', 422, "k: Input should be a valid integer"),
        (b'{"k": "5"}', 422, "k: Input should be a valid integer"),
        (b'{"k": null}', 422, "k: Input should be a valid integer"),
        (b'{"explain": 1}', 422, "explain: Input should be a valid boolean"),
        (b'{"history": "a"}', 422, "history: Input should be a valid list"),
        (b'{"history": ["a", 7]}', 422, "history.1: Input should be a valid string"),
        (b'{"history": ["a", "a", "a", "a", "a"]}', 422, "history: 5 items, expected at most 4"),
        (b'{"\\ud800": 1}', 422, "body: Input should be a valid string"),
        (b'{"history": {"\\ud800": 1}}', 422, "history: Input should be a valid list"),
        (b'{"' + b"x" * 900 + b'": 1}', 422, "x" * 64 + ": Extra inputs are not permitted"),
        (b'{"user_id": "RequestError"}', 422, "history: no"),
        (b'{"user_id": "UnknownUserError"}', 404, r"user_id: no '\ud800'"),
        (b'{"user_id": "BackPressureError"}', 503, "too busy, try again later"),
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
    response = ask("POST", "/v1/recommend", json={"user_id": "BackPressureError"})
    assert response.headers["Retry-After"] == "1"


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
