"""Which version is served, and everything of it that the endpoint holds."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from jaxtyping import Float32
from numpy import ndarray

from ctd_scale.artifacts import Artifact, ArtifactError, Run
from ctd_scale.batches import Catalogue, InteractionLog
from ctd_scale.config import RunConfig
from ctd_scale.latency import Row, chosen_row, load_tuned
from ctd_scale.recommender import RankStep, load_artifacts, version_of
from ctd_scale.serving.middleware import Record
from ctd_scale.serving.schema import Directory
from ctd_scale.serving.telemetry import Telemetry

# What is served, and what was before: a request that began with the latter ends with it.
KEPT_VERSIONS = 2


@dataclass(frozen=True)
class Source:
    """The artifacts of a run at one time. `number` counts what was served before; `tuned` is what
    `serving.target_p99_ms` chose."""

    run: Run
    config: RunConfig
    version: str
    number: int = 0
    tuned: Row | None = None

    def artifacts(self) -> dict[str, Artifact]:
        """The artifacts, refused where they are no longer those of this version: a replica that starts late must not
        mix its answers with those of another model."""
        found = load_artifacts(self.run)
        if version_of(found) != self.version:
            raise ArtifactError(f"{self.run.url} is no longer version {self.version}; send SIGHUP to `ctd serve`")
        return found


def source_of(run: Run, config: RunConfig) -> Source:
    """What a run holds now.

    Raises ArtifactError: an artifact is missing, damaged or made from another version of another; ValueError: nothing
    is as fast as `serving.target_p99_ms` wants.
    """
    if run.is_local:
        # Replicas may live in another working directory, and a link may lead elsewhere later.
        folder = run.root.resolve()
        run = replace(run, storage=str(folder.parent), name=folder.name)
    artifacts = load_artifacts(run)
    return Source(run, config, version_of(artifacts), tuned=chosen_row(run, config, artifacts))


@dataclass(frozen=True)
class Release:
    """An opened version; `known` are preferences after histories that were read before."""

    source: Source
    catalogue: Catalogue
    directory: Directory
    rank: RankStep
    known: OrderedDict[bytes, Float32[ndarray, "cond_dim"]] = field(default_factory=OrderedDict)

    @property
    def version(self) -> str:
        return self.source.version


def open_release(source: Source) -> Release:
    """Load what is behind the preference."""
    artifacts = source.artifacts()
    log = InteractionLog.load(artifacts["interactions"].path)
    rank = load_tuned(artifacts, source.config, None if source.tuned is None else source.tuned.settings)
    if rank.retrieve.retriever.text is not None:
        rank.retrieve.retriever.text.warm_up()
    return Release(source, log.catalogue, Directory(log), rank)


class Coordinator:
    """What all replicas share: the version that is served, and the counts of what was asked. One process."""

    def __init__(self, source: Source) -> None:
        self._sources = [source]
        self._telemetry = Telemetry()

    async def current(self, known: Source | None) -> Source:
        """What is to be served. Whoever asks brings what it serves: after a failure this process knows no more than
        what it was started with, and learns the rest from them."""
        if known is not None and known.number > self._sources[-1].number:
            self._keep(known)
        return self._sources[-1]

    async def publish(self, source: Source) -> Source:
        """Serve this from now on."""
        self._keep(replace(source, number=self._sources[-1].number + 1))
        return self._sources[-1]

    async def source(self, version: str) -> Source:
        """Where a version lies. Raises ArtifactError where it is served no more."""
        for source in reversed(self._sources):
            if source.version == version:
                return source
        raise ArtifactError(f"version {version} is not served any more")

    async def observe(self, records: Sequence[Record]) -> None:
        """Count these requests."""
        self._telemetry.observe(records)

    async def metrics(self) -> str:
        """Everything counted, in Prometheus' text format."""
        return self._telemetry.text(self._sources[-1].version)

    def _keep(self, source: Source) -> None:
        self._sources = [*self._sources, source][-KEPT_VERSIONS:]
