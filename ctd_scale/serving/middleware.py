"""What every request passes on its way in and out: an id, a stopwatch, a door, a bound on its body."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import time
import uuid
from collections.abc import Callable, MutableMapping
from dataclasses import asdict, dataclass, field

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

REQUEST_ID, SERVER_TIMING = "X-Request-ID", "Server-Timing"
# An id from outside goes into a log line: it may be neither long nor surprising.
ID_FORMAT = re.compile(r"[\w.:-]{1,64}", re.ASCII)
# Where a route leaves the seconds of its stages in `scope["state"]`.
STAGES = "stage_seconds"
# Asked until the end: whether it is alive, and what it counted.
LOOKED_AFTER = ("/healthz", "/metrics", "/v1/version")
LEFT = 499  # the client did not wait for its answer
access_log = logging.getLogger("ctd_scale.access")


@dataclass(frozen=True)
class Record:
    """What is kept of a request: its route (not its path, of which there are any number), status and seconds."""

    request_id: str
    route: str
    status: int
    seconds: float
    stages: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Staged:
    """The stages of one recommendation of a batch, whose request has a record of its own."""

    stages: dict[str, float]


class Observed:
    """Gives each request an id, or keeps the one that it brings in `X-Request-ID`; answers with it, unless it is
    `echoed` by what is in front, and with `Server-Timing`; hands a record of it to `observe` and, as one line of JSON,
    to the log `ctd_scale.access`."""

    def __init__(self, app: ASGIApp, observe: Callable[[Record], None], *, echoed: bool = False) -> None:
        self._app, self._observe, self._echoed = app, observe, echoed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        brought = Headers(scope=scope).get(REQUEST_ID, "")
        request_id = brought if ID_FORMAT.fullmatch(brought) else uuid.uuid4().hex
        method = scope["method"]
        if method == "HEAD":  # some balancers ask so; the server leaves the body away
            scope = {**scope, "method": "GET"}
        state: MutableMapping[str, dict[str, float]] = scope.setdefault("state", {})
        started, status = time.perf_counter(), 500

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                if not self._echoed:
                    headers[REQUEST_ID] = request_id
                if stages := state.get(STAGES):
                    headers[SERVER_TIMING] = ", ".join(f"{name};dur={1e3 * each:.2f}" for name, each in stages.items())
            await send(message)

        try:
            await self._app(scope, receive, noted)
        except asyncio.CancelledError:
            status = LEFT
            raise
        finally:
            route = getattr(scope.get("route"), "path", "unknown")
            record = Record(request_id, route, status, time.perf_counter() - started, dict(state.get(STAGES, {})))
            self._observe(record)
            access_log.info(json.dumps({**asdict(record), "method": method}))


@dataclass
class Door:
    """Whether requests are let in, and how many are inside."""

    closed: bool = False
    inside: int = 0


class Guarded:
    """Counts who is inside. Behind a closed door only those who look after the endpoint get in; others are told to ask
    again, on another connection, which may lead elsewhere."""

    def __init__(self, app: ASGIApp, door: Door) -> None:
        self._app, self._door = app, door

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in LOOKED_AFTER:
            await self._app(scope, receive, send)
            return
        if self._door.closed:
            headers = {"Retry-After": "1", "Connection": "close"}
            await JSONResponse({"error": "this server is ending, try again later"}, 503, headers)(scope, receive, send)
            return
        self._door.inside += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._door.inside -= 1


class BodyLimit:
    """Refuses a body once more than `max_bytes` of it arrived, whatever its Content-Length claims, or once `timeout_s`
    are over before all of it did."""

    def __init__(self, app: ASGIApp, max_bytes: int, timeout_s: float) -> None:
        self._app = app
        self._max_bytes, self._timeout_s = max_bytes, timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        received, complete = 0, False
        deadline = time.monotonic() + self._timeout_s

        async def limited() -> Message:
            nonlocal received, complete
            if complete:  # what comes now is the client's leaving, for which there is time
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), max(0.0, deadline - time.monotonic()))
            except asyncio.TimeoutError:
                # The rest of the body may still come: it is not the beginning of another request.
                raise HTTPException(
                    408, f"body: expected all of it within {self._timeout_s:g} s", {"Connection": "close"}
                ) from None
            received += len(message.get("body", b""))
            complete = not message.get("more_body", False)
            if received > self._max_bytes:
                raise HTTPException(413, f"body: expected at most {self._max_bytes} bytes")
            return message

        await self._app(scope, limited if scope["type"] == "http" else receive, send)
