"""HTTP: routes, limits, and one short JSON object for every error."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Coroutine, Iterable
from dataclasses import dataclass
from importlib import resources
from typing import Annotated, Any, Protocol, TypeVar

from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from pydantic import ValidationError
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from starlette.exceptions import HTTPException

from ctd_scale import __version__
from ctd_scale.config_serving import ServingConfig
from ctd_scale.serving.middleware import STAGES, BodyLimit, Door, Guarded, Observed, Record, Staged
from ctd_scale.serving.schema import (
    MAX_CHARS,
    BatchRequest,
    BatchResponse,
    ErrorResponse,
    Health,
    ItemsResponse,
    Picture,
    RecommendRequest,
    RecommendResponse,
    RequestError,
    UnknownItemError,
    UnknownUserError,
    Version,
)

# No replica is there (yet, or any more).
UNAVAILABLE = (DeploymentUnavailableError, RayActorError)
RETRY = {"Retry-After": "1"}
MAX_PROBLEMS = 3
STATUSES = {
    400: "the body is not JSON",
    404: "unknown user, or unknown item in the path",
    408: "the body did not arrive in time",
    413: "the body is too large",
    422: "a field is wrong, or names an unknown item",
    429: "too many requests wait",
    503: "no replica is there, or the server is ending",
    504: "no answer in time",
}
PAGE = {
    "/": ("page.html", "text/html"),
    "/page.js": ("page.js", "text/javascript"),
    "/page.css": ("page.css", "text/css"),
}
# The page loads nothing from elsewhere, whatever a title holds.
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data:",
    "X-Content-Type-Options": "nosniff",
}

Found = TypeVar("Found")


@dataclass(frozen=True)
class Answered:
    """An answer, and the seconds that each stage took for it."""

    body: dict[str, Any]
    seconds: dict[str, float]


class Backend(Protocol):
    """The chain, as the routes ask it. What it gives are the fields of the response models; it may raise RequestError
    and what Ray Serve raises under load."""

    @property
    def version(self) -> str: ...
    @property
    def tuned(self) -> dict[str, float] | None: ...
    @property
    def door(self) -> Door: ...
    async def ready(self) -> None: ...
    async def recommend(self, request: RecommendRequest) -> Answered: ...
    async def picture(self, request: RecommendRequest) -> dict[str, Any]: ...
    async def similar(self, item_id: str, k: int) -> dict[str, Any]: ...
    async def find(self, query: str, k: int) -> dict[str, Any]: ...
    async def metrics(self) -> str: ...
    def observe(self, record: Record | Staged) -> None: ...


def make_api(backend: Backend, config: ServingConfig, *, proxied: bool = False) -> FastAPI:
    """The endpoint around a chain. `proxied`: behind Ray Serve, which gives ids to requests and answers with them."""
    api = FastAPI(title="ctd-scale", version=__version__, description="Generative recommendation.")
    api.add_middleware(BodyLimit, max_bytes=config.max_body_bytes, timeout_s=config.body_timeout_s)
    api.add_middleware(Guarded, door=backend.door)
    api.add_middleware(Observed, observe=backend.observe, echoed=proxied)
    _add_error_handlers(api)
    _add_page(api)
    documented: dict[int | str, dict[str, Any]] = {
        status: {"model": ErrorResponse, "description": meaning} for status, meaning in STATUSES.items()
    }

    async def in_time(answer: Awaitable[Found], deadline_ms: int | None = None) -> Found:
        limit = allowed_seconds(deadline_ms, config)
        try:
            return await asyncio.wait_for(answer, limit)
        except asyncio.TimeoutError:
            raise HTTPException(504, f"no answer within {limit:g} s") from None
        except BackPressureError as error:  # not by a handler: Ray Serve puts its own in its place
            raise HTTPException(429, "too many requests wait, try again later", RETRY) from error
        except UNAVAILABLE as error:
            raise HTTPException(503, "no replica is there, try again later", RETRY) from error

    @api.get("/healthz")
    async def healthz() -> Health:
        """The endpoint is up."""
        return Health(status="ok", version=backend.version)

    @api.get("/readyz", responses={status: documented[status] for status in (429, 503, 504)})
    async def readyz() -> Health:
        """Every step has answered once."""
        await in_time(backend.ready())
        return Health(status="ready", version=backend.version)

    @api.get("/v1/version", response_model_exclude_none=True)
    async def version() -> Version:
        """What is served: 12 hex digits over models and index, and the settings that a latency target chose."""
        return Version(status="ok", version=backend.version, tuned=backend.tuned)

    @api.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> PlainTextResponse:
        """Counts and times of all replicas, for Prometheus."""
        return PlainTextResponse(await in_time(backend.metrics()), media_type="text/plain; version=0.0.4")

    @api.post("/v1/recommend", response_model=RecommendResponse, responses=documented)
    async def recommend(request: RecommendRequest, http: Request) -> dict[str, Any]:
        check_limits(request, config)
        answered = await in_time(backend.recommend(request), request.deadline_ms)
        setattr(http.state, STAGES, answered.seconds)
        return answered.body

    @api.post("/v1/recommend:batch", response_model=BatchResponse, responses=documented)
    async def recommend_batch(request: BatchRequest) -> dict[str, Any]:
        """Several requests; one that is wrong, or late by its own deadline, gets an error in its place, and the others
        their answers."""
        if len(request.requests) > config.max_requests:
            raise RequestError(f"requests: {len(request.requests)}, expected at most {config.max_requests}")

        async def one(given: object) -> dict[str, Any]:
            try:
                request = RecommendRequest.model_validate(given)
                check_limits(request, config)
                limit = allowed_seconds(request.deadline_ms, config)
                answered = await asyncio.wait_for(backend.recommend(request), limit)
                backend.observe(Staged(answered.seconds))
                return answered.body
            except ValidationError as error:
                return {"error": _encodable("; ".join(map(_described, error.errors()[:MAX_PROBLEMS])))}
            except RequestError as error:
                return {"error": _encodable(str(error))}
            except asyncio.TimeoutError:
                if request.deadline_ms is None:  # the server's own, which ends the whole batch
                    raise
                return {"error": f"no answer within {limit:g} s"}

        return {"responses": await in_time(together(map(one, request.requests)))}

    some = Query(10, ge=1, le=config.max_k)

    @api.get("/v1/items/{item_id:path}/similar", response_model=ItemsResponse, responses=documented)
    async def similar(item_id: str, k: int = some) -> dict[str, Any]:
        """The items whose vectors are nearest to that of one."""
        return await in_time(backend.similar(item_id, k))

    @api.get("/v1/items", response_model=ItemsResponse, responses=documented)
    async def find(query: Annotated[str, Query(min_length=1, max_length=200)], k: int = some) -> dict[str, Any]:
        """The items whose title or category has words of the query."""
        return await in_time(backend.find(query, k))

    @api.post("/v1/picture", response_model=Picture, responses=documented)
    async def picture(request: RecommendRequest) -> dict[str, Any]:
        """The preference after a history, the generated vectors and the items around them, in two dimensions."""
        check_limits(request, config)
        return await in_time(backend.picture(request), request.deadline_ms)

    return api


def _add_page(api: FastAPI) -> None:
    for path, (name, media_type) in PAGE.items():
        text = (resources.files("ctd_scale.serving") / "page" / name).read_text(encoding="utf-8")

        async def file(text: str = text, media_type: str = media_type) -> Response:
            return Response(text, media_type=media_type, headers=PAGE_HEADERS)

        api.add_api_route(path, file, include_in_schema=False, response_model=None)


async def together(answers: Iterable[Coroutine[Any, Any, Found]]) -> list[Found]:
    """All of them; where one fails, the others are given up, too: nobody will see them."""
    tasks = [asyncio.ensure_future(each) for each in answers]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


def allowed_seconds(deadline_ms: int | None, config: ServingConfig) -> float:
    """How long an answer may take: as the request says, and never longer than the server allows."""
    own = config.request_timeout_s
    return own if deadline_ms is None else min(own * 1000, deadline_ms) / 1000


def check_limits(request: RecommendRequest, config: ServingConfig) -> None:
    """Raises RequestError where a request asks for more than this server gives."""
    if request.k > config.max_k:
        raise RequestError(f"k: expected at most {config.max_k}")
    if request.history is not None and len(request.history) > config.max_history:
        raise RequestError(f"history: {len(request.history)} items, expected at most {config.max_history}")


def _add_error_handlers(api: FastAPI) -> None:
    @api.exception_handler(RequestError)
    async def refused(_: Request, raised: RequestError) -> JSONResponse:
        return _error(404 if isinstance(raised, UnknownUserError | UnknownItemError) else 422, str(raised))

    @api.exception_handler(Exception)
    async def failed(_: Request, raised: Exception) -> JSONResponse:
        return _error(500, "internal error")

    @api.exception_handler(HTTPException)
    async def http(_: Request, raised: HTTPException) -> JSONResponse:
        if raised.status_code == 400:  # FastAPI's own, which says only that something is wrong
            return _error(400, "body: not JSON in UTF-8, or compressed, which is not read")
        return _error(raised.status_code, raised.detail, dict(raised.headers or {}))

    @api.exception_handler(RequestValidationError)
    async def invalid(_: Request, raised: RequestValidationError) -> JSONResponse:
        problems = raised.errors()
        if isinstance(raised.body, bytes):
            return _error(422, "body: expected JSON with the header Content-Type: application/json")
        if any(problem["type"] == "json_invalid" for problem in problems):
            return _error(400, f"body: not JSON at character {problems[0]['loc'][-1]}")
        # What was sent is not repeated: it may be huge, and it may hold what JSON cannot.
        return _error(422, "; ".join(map(_described, problems[:MAX_PROBLEMS])))


def _described(problem: Any) -> str:
    # FastAPI puts "body" before the place within it.
    field = ".".join(str(part) for part in problem["loc"] if part != "body") or "body"
    return f"{field[:MAX_CHARS]}: {problem['msg']}"


def _error(status: int, message: str, headers: dict[str, str] | None = None) -> JSONResponse:
    return JSONResponse({"error": _encodable(message)}, status, headers)


def _encodable(message: str) -> str:
    """A lone surrogate, such as in the name of an unknown field, cannot be encoded as it is."""
    return message.encode("utf-8", "backslashreplace").decode()
