"""What the endpoint has seen, for Prometheus. One process counts for all replicas: a scrape that reached one of them
would otherwise see its share alone."""

from __future__ import annotations

from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from ctd_scale.serving.middleware import Record, Staged
from ctd_scale.serving.probe import PROBED, Probe

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
RECALLS = tuple(found / PROBED for found in range(PROBED + 1))


def cached(stage: str) -> str:
    """The name of a stage of no seconds: what the LLM said was known."""
    return f"{stage}_cached"


class Telemetry:
    """Counts and times of requests and of their stages."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self._requests = Counter("ctd_requests", "Requests answered.", ["route", "status"], registry=registry)
        self._seconds = Histogram(
            "ctd_request_seconds", "From the request to its answer.", ["route"], buckets=SECONDS, registry=registry
        )
        self._stages = Histogram(
            "ctd_stage_seconds",
            "One stage of a recommendation, waiting included.",
            ["stage"],
            buckets=SECONDS,
            registry=registry,
        )
        self._caches = {
            stage: Counter(f"ctd_{stage}_cache", f"Look-ups of a known {stage}.", ["outcome"], registry=registry)
            for stage in ("preference", "text")
        }
        self._recall = Histogram(
            "ctd_index_recall",
            "Share of the ten nearest items that the index found, by exact search now and then.",
            ["version"],
            buckets=RECALLS,
            registry=registry,
        )
        self._probed: set[str] = set()
        self._version = Gauge("ctd_version_info", "1 for what is served.", ["version"], registry=registry)
        self._behind = Gauge("ctd_replicas_behind", "Endpoints that do not serve it yet.", registry=registry)

    def observe(self, records: Sequence[Record | Staged | Probe]) -> None:
        """Count these requests, and what was probed."""
        for record in records:
            if isinstance(record, Probe):
                self._recall.labels(record.version).observe(record.recall)
                self._probed.add(record.version)
                continue
            if isinstance(record, Record):
                self._requests.labels(record.route, str(record.status)).inc()
                self._seconds.labels(record.route).observe(record.seconds)
            known = {cached(stage) for stage in self._caches}
            for stage, seconds in record.stages.items():
                if stage not in known:
                    self._stages.labels(stage).observe(seconds)
            for stage, cache in self._caches.items():
                if cached(stage) in record.stages:
                    cache.labels("hit").inc()
                elif stage in record.stages:
                    cache.labels("miss").inc()

    def text(self, version: str, behind: int) -> str:
        """Everything in Prometheus' text format, the version that is served, and how many replicas are `behind` it."""
        for other in self._probed - {version}:
            self._recall.remove(other)
        self._probed &= {version}
        self._version.clear()
        self._version.labels(version).set(1)
        self._behind.set(behind)
        return generate_latest(self._registry).decode()
