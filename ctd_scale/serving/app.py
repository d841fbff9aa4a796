"""Compose the deployments into one Serve application, and run it on this machine or the joined cluster."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import threading
import time
import urllib.request
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import cache
from typing import Any

import ray
from ray import serve
from ray.serve.config import AutoscalingConfig, HTTPOptions
from ray.serve.schema import LoggingConfig

from ctd_scale.artifacts import Run
from ctd_scale.config import RunConfig
from ctd_scale.config_serving import ServingConfig
from ctd_scale.latency import described
from ctd_scale.serving.coordinator import Coordinator
from ctd_scale.serving.deployments import App
from ctd_scale.serving.preference import Preference
from ctd_scale.serving.release import Source, source_of
from ctd_scale.serving.shards import Shard
from ctd_scale.serving.step import TRANSIENT
from ctd_scale.terminal import ServingError, console
from ctd_scale.training import start_ray

APPLICATION = "ctd-scale"
# Logical CPUs only admit replicas. The LLM takes one; the rest must fit next to it on a small machine.
PREFERENCE_CPUS, OTHER_CPUS = 1.0, 0.25
# Both models are small next to an accelerator: four replicas share one.
GPU_SHARE = 0.25
# The endpoint answers 408 and 504 by itself; the proxy's own limit is for replicas that hang.
PROXY_GRACE_S = 5.0
READY_TIMEOUT_S = 60.0
SWAP_TIMEOUT_S = 600.0
CLOSE_TIMEOUT_S = 5.0
# How long a replica that nobody asks any more stays. Serve's half minute is meant for balancers outside of it, which
# are not told of replicas here; with it, ending took longer than the half minute that Kubernetes grants.
DRAIN_S = "5"
QUIET = LoggingConfig(log_level="ERROR", enable_access_log=False)


def build_app(source: Source) -> serve.Application:
    """The application that begins with this version."""
    source = replace(source, application=source.as_started)
    config = source.config
    serving, gpus = config.serving, GPU_SHARE if config.resources.llm.use_gpu else 0.0
    # One for all: it is asked about versions, and counts what everybody answers. It is never in the way of an answer.
    shared = {"num_replicas": 1, "max_ongoing_requests": 1000, "logging_config": QUIET}
    shared["ray_actor_options"] = {"num_cpus": 0}
    coordinator = serve.deployment(**shared)(Coordinator).bind(source)
    preference = serve.deployment(**_options(serving, PREFERENCE_CPUS, gpus))(Preference).bind(serving, coordinator)
    shards = []
    if serving.shared_index:
        of, options = config.retrieval.shards, _options(serving, OTHER_CPUS)
        named = (serve.deployment(name=f"Shard{number}", **options)(Shard) for number in range(of))
        shards = [shard.bind(coordinator, number, of) for number, shard in enumerate(named)]
    ingress = _options(serving, OTHER_CPUS, gpus)
    # Whoever waits for the LLM or for its turn is refused by ourselves, in our words; the proxy lets everybody in, so
    # that /healthz still answers.
    in_flight = serving.max_replicas * serving.max_ongoing_requests + serving.max_queued_requests
    ingress["max_ongoing_requests"] = ingress["max_queued_requests"] = 3 * in_flight + 16
    return serve.deployment(**ingress)(App).bind(serving, preference, coordinator, shards)


def build_from_args(args: dict[str, str]) -> serve.Application:
    """Entry point of a Serve config file: `import_path: ctd_scale.serving.app:build_from_args`, args `{run: URL}`."""
    run = Run.open(args["run"])
    return build_app(source_of(run, run.read_config()))


def serve_run(open_run: Callable[[], tuple[Run, RunConfig]], *, host: str, port: int, blocking: bool = True) -> str:
    """Serve a run at http://host:port (port 0 = any free one) until Ctrl-C or SIGTERM; returns the URL.

    At SIGHUP `open_run` is asked again, and what it gives is served from then on. With `blocking=False` it returns once
    the endpoint answers; `shut_down` ends it. Raises ArtifactError as `source_of` does, ValueError where the port is
    taken, ServingError where the replicas do not come up.
    """
    source = source_of(*open_run())
    application = build_app(source)
    if not port or not os.environ.get("RAY_ADDRESS"):  # in a cluster the port may be another machine's
        port = _free_port(host, port)
    with ExitStack() as undo:
        if not ray.is_initialized():
            undo.callback(ray.shutdown)
        os.environ.setdefault("RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S", DRAIN_S)
        start_ray()
        undo.callback(stop_serving, source.config.serving.request_timeout_s)
        url = _start(application, source.config.serving, host, port)
        console.print(f"serving {source.run.url} at {url} (docs at {url}/docs)", highlight=False, soft_wrap=True)
        _say_tuned(source)
        if blocking:
            _wait_for_signal(lambda called: swap(*open_run(), called))
        else:
            undo.pop_all()
    return url


def swap(run: Run, config: RunConfig, called_off: Callable[[], bool] = lambda: False) -> str:
    """Serve another run, or the same one with other artifacts or settings, without a pause; returns the version once
    every replica serves it.

    Each loads it beside what it serves and then begins with it. The limits of `[serving]` stay those that the
    server was started with. Raises ArtifactError as `source_of` does, RuntimeError where a replica cannot load it or it
    is not served in time, or called off.
    """
    wanted: Source = _ask_coordinator("publish", source_of(run, config))
    deadline = time.monotonic() + SWAP_TIMEOUT_S + config.serving.swap_warm_up_s
    while True:
        with suppress(*TRANSIENT):  # the coordinator is away, and back in a moment
            served = _ask_coordinator("serves", wanted)
            now: Source = _ask_coordinator("current", wanted)  # its catalogue may have been changed meanwhile
            if now.instead_of:
                raise RuntimeError(f"a replica could not load it; serving version {now.version}: {now.instead_of}")
            if served:
                _say_tuned(now)
                return now.version
        if time.monotonic() > deadline or called_off():
            said = "called off" if called_off() else "logs/serving of the run that was served first says why"
            raise RuntimeError(f"version {wanted.version} is not served by every replica yet; {said}")
        time.sleep(0.2)


@cache
def _asking() -> asyncio.AbstractEventLoop:
    """Where this process asks its deployments. Where RAY_SERVE_THROUGHPUT_OPTIMIZED=1 a handle works within an event
    loop only, and always in the one in which it was first used."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()
    return loop


def _ask_coordinator(method: str, *arguments: Source, timeout_s: float = READY_TIMEOUT_S) -> Any:
    async def ask() -> Any:
        handle = serve.get_deployment_handle("Coordinator", APPLICATION)
        return await getattr(handle, method).remote(*arguments)

    return asyncio.run_coroutine_threadsafe(ask(), _asking()).result(timeout_s)


def _say_tuned(source: Source) -> None:
    if source.tuned is not None:
        console.print(
            f"  for serving.target_p99_ms={source.config.serving.target_p99_ms:g}: {described(source.tuned.settings)} "
            f"(behind the preference p99 {source.tuned.p99_ms:g} ms, NDCG@10 {source.tuned.ndcg:g} on validation)",
            highlight=False,
            soft_wrap=True,
        )


def stop_serving(grace_s: float) -> None:
    """Take the application down. For `grace_s` at most, requests in progress are answered first, all their steps, and
    others refused: where the application is deleted its deployments end side by side, and none waits for another."""
    deadline = time.monotonic() + grace_s
    with suppress(Exception):  # who cannot answer any more has nothing in progress
        while not _ask_coordinator("close", timeout_s=CLOSE_TIMEOUT_S) and time.monotonic() < deadline:
            time.sleep(0.1)
    serve.delete(APPLICATION)


def shut_down() -> None:
    """Take Serve down with all that it runs, so that this process may serve again on another port."""
    serve.shutdown()


def _options(config: ServingConfig, num_cpus: float, num_gpus: float = 0.0) -> dict[str, Any]:
    """Everything that Serve would otherwise leave small (requests in progress) or unbounded (the queue)."""
    return {
        "autoscaling_config": AutoscalingConfig(
            min_replicas=config.min_replicas,
            max_replicas=config.max_replicas,
            upscale_delay_s=config.upscale_delay_s,
            downscale_delay_s=config.downscale_delay_s,
            target_ongoing_requests=min(config.max_batch_size, config.max_ongoing_requests),
        ),
        "max_ongoing_requests": config.max_ongoing_requests,
        "max_queued_requests": config.max_queued_requests,
        "graceful_shutdown_timeout_s": config.request_timeout_s,
        "graceful_shutdown_wait_loop_s": 0.2,
        "ray_actor_options": {"num_cpus": num_cpus, "num_gpus": num_gpus},
        "logging_config": QUIET,
    }


def _start(application: serve.Application, config: ServingConfig, host: str, port: int) -> str:
    """Serve the application; returns its URL once it answers there."""
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    timeout = config.body_timeout_s + config.request_timeout_s + PROXY_GRACE_S
    serve.start(http_options=HTTPOptions(host=host, port=port, request_timeout_s=timeout), logging_config=QUIET)
    serve.run(application, name=APPLICATION, route_prefix="/")
    reachable = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    url = f"http://[{reachable}]:{port}" if ":" in reachable else f"http://{reachable}:{port}"
    _wait_until_ready(url)
    return url


def _wait_until_ready(url: str) -> None:
    """The proxy learns of a new application a moment after its replicas are up."""
    deadline = time.monotonic() + READY_TIMEOUT_S
    while True:
        try:
            with urllib.request.urlopen(f"{url}/readyz", timeout=5):
                return
        except OSError as error:
            if time.monotonic() > deadline:
                raise ServingError(f"{url}/readyz does not answer: {error}; logs/serving of the run says why") from None
        time.sleep(0.05)


def _wait_for_signal(reload: Callable[[Callable[[], bool]], str]) -> None:
    """Until Ctrl-C or SIGTERM, of which the second one is not waited for; `reload` at every SIGHUP, which is told
    whether another signal has come."""
    woken, ending = threading.Event(), threading.Event()

    def end(*_: object) -> None:
        ending.set()
        woken.set()

    stops = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM)}
    before = signal.signal(signal.SIGHUP, lambda *_: woken.set())
    while woken.wait() and not ending.is_set():
        woken.clear()
        try:
            console.print(f"now serving version {reload(woken.is_set)}", highlight=False)
        except Exception as error:  # whatever it is, what is served goes on being served
            said = str(error) or type(error).__name__
            console.print(f"not swapped: {said}", style="red", highlight=False, soft_wrap=True, markup=False)
    for number, handler in {**stops, signal.SIGHUP: before}.items():
        signal.signal(number, handler)


def _free_port(host: str, port: int) -> int:
    """The port itself, or a free one for 0. Raises ValueError where it cannot be listened on."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # what has just been left is free
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ValueError(
                f"cannot listen on {host} port {port}: {error.strerror}; give another --port, or 0 for any free one"
            ) from None
        return int(probe.getsockname()[1])
