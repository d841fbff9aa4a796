"""HTTP: routes, limits, and one short JSON object for every error."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ctd_scale import __version__
from ctd_scale.config import ServingConfig
from ctd_scale.serving.schema import (
    MAX_CHARS,
    ErrorResponse,
    Health,
    RecommendRequest,
    RecommendResponse,
    RequestError,
    UnknownUserError,
)

Answer = Callable[[RecommendRequest], Awaitable[dict[str, Any]]]

# A queue is full, or no replica is there (yet, or any more).
OVERLOAD = (BackPressureError, DeploymentUnavailableError, RayActorError)
MAX_PROBLEMS = 3
STATUSES = {
    400: "the body is not JSON",
    404: "unknown user",
    413: "the body is too large",
    422: "a field is wrong",
    503: "too many requests wait",
    504: "no answer in time",
}


def make_api(answer: Answer, version: str, config: ServingConfig) -> FastAPI:
    """The endpoint around `answer`, which may raise RequestError and what Ray Serve raises under load."""
    api = FastAPI(title="ctd-scale", version=__version__, description="Generative recommendation.")
    api.add_middleware(BodyLimit, max_bytes=config.max_body_bytes)
    _add_error_handlers(api)

    @api.get("/healthz")
    async def healthz() -> Health:
        return Health(status="ok", version=version)

    documented: dict[int | str, dict[str, Any]] = {
        status: {"model": ErrorResponse, "description": meaning} for status, meaning in STATUSES.items()
    }

    @api.post("/v1/recommend", response_model=RecommendResponse, responses=documented)
    async def recommend(request: RecommendRequest) -> dict[str, Any]:
        check_limits(request, config)
        try:
            return await asyncio.wait_for(answer(request), config.request_timeout_s)
        except asyncio.TimeoutError:
            raise HTTPException(504, f"no answer within {config.request_timeout_s:g} s") from None
        except OVERLOAD as error:  # not by a handler: Ray Serve puts its own in its place
            raise HTTPException(503, "too busy, try again later", {"Retry-After": "1"}) from error

    return api


def check_limits(request: RecommendRequest, config: ServingConfig) -> None:
    """Raises RequestError where a request asks for more than this server gives."""
    if request.k > config.max_k:
        raise RequestError(f"k: expected at most {config.max_k}")
    if request.history is not None and len(request.history) > config.max_history:
        raise RequestError(f"history: {len(request.history)} items, expected at most {config.max_history}")


class BodyLimit:
    """Refuses a body once more than `max_bytes` of it arrived, whatever its Content-Length claims."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        received = 0

        async def limited() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._max_bytes:
                raise HTTPException(413, f"body: expected at most {self._max_bytes} bytes")
            return message

        await self._app(scope, limited if scope["type"] == "http" else receive, send)


def _add_error_handlers(api: FastAPI) -> None:
    @api.exception_handler(RequestError)
    async def refused(_: Request, raised: RequestError) -> JSONResponse:
        return _error(404 if isinstance(raised, UnknownUserError) else 422, str(raised))

    @api.exception_handler(Exception)
    async def failed(_: Request, raised: Exception) -> JSONResponse:
        return _error(500, "internal error")

    @api.exception_handler(HTTPException)
    async def http(_: Request, raised: HTTPException) -> JSONResponse:
        return _error(raised.status_code, raised.detail, dict(raised.headers or {}))

    @api.exception_handler(RequestValidationError)
    async def invalid(_: Request, raised: RequestValidationError) -> JSONResponse:
        problems = raised.errors()
        if any(problem["type"] == "json_invalid" for problem in problems):
            return _error(400, f"body: not JSON at character {problems[0]['loc'][-1]}")
        # What was sent is not repeated: it may be huge, and it may hold what JSON cannot.
        return _error(422, "; ".join(map(_described, problems[:MAX_PROBLEMS])))


def _described(problem: dict[str, Any]) -> str:
    field = ".".join(str(part) for part in problem["loc"][1:]) or "body"
    return f"{field[:MAX_CHARS]}: {problem['msg']}"


def _error(status: int, message: str, headers: dict[str, str] | None = None) -> JSONResponse:
    # A lone surrogate, such as in the name of an unknown field, cannot be encoded as it is.
    shown = message.encode("utf-8", "backslashreplace").decode()
    return JSONResponse({"error": shown}, status, headers)
