"""Which version is served, and everything of it that the endpoint holds.

A version is that of the models with the changes that were made to the catalogue since: where only these differ, nothing
large is loaded again.
"""

from __future__ import annotations

import gc
import hashlib
import json
import logging
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from jaxtyping import Int32
from numpy import ndarray

from ctd_scale.artifacts import Artifact, ArtifactError, Run
from ctd_scale.batches import Catalogue, InteractionLog
from ctd_scale.changes import in_force, read_changes
from ctd_scale.config import RunConfig
from ctd_scale.latency import Row, chosen_row, load_tuned
from ctd_scale.live import Base, apply_changes, load_base
from ctd_scale.recommender import (
    ARTIFACTS,
    READ_BEHIND,
    READ_TO_SEARCH,
    RankStep,
    load_artifacts,
    reader_of,
    searched_of,
    version_of,
)
from ctd_scale.retrieval.remote import Ask, Part
from ctd_scale.serving.known import Known
from ctd_scale.serving.schema import Directory

serving_log = logging.getLogger("ctd_scale.serving")

# Which catalogue and index, and the number of the changes as of which it was built anew, and of which run; 0 and '': it
# is the one that it was made with.
Index = tuple[str, int, str]
AskOf = Callable[[Index, Part], Ask]


@dataclass(frozen=True)
class Source:
    """The artifacts of a run at one time: `models` is their version, `reader` that of what says a preference,
    `searched` that of catalogue and index, `version` that of all with the `changes` of this number, which lie on the
    index that was `built` as of that number. `number` counts what was served before; `tuned` is what
    `serving.target_p99_ms` chose, `application` which of those that were started it belongs to.
    """

    run: Run
    config: RunConfig
    models: str
    reader: str
    searched: str
    version: str
    changes: int = 0
    built: int = 0
    number: int = 0
    tuned: Row | None = None
    instead_of: str = ""  # why another one, which was to take its place, is not served
    application: str = ""

    @property
    def as_started(self) -> str:
        """Identity of an application that begins with this: started again with the same, it is the same one."""
        said = [self.run.url, self.models, self.config.model_dump_json()]
        return hashlib.sha256(json.dumps(said).encode()).hexdigest()[:12]

    @property
    def index(self) -> Index:
        """Which large index is searched."""
        return self.searched, self.built, self.run.url if self.built else ""

    def same_but_for_changes(self, other: Source) -> bool:
        """Whether the other is the same run with the same models and settings, whatever its catalogue has become."""
        passing = {"version": "", "changes": 0, "built": 0, "number": 0, "instead_of": "", "application": ""}
        mine, its = (replace(each, **passing) for each in (self, other))  # type: ignore[arg-type]
        return mine == its

    def artifacts(self, read: Collection[str]) -> dict[str, Artifact]:
        """The artifacts, refused where they are no longer those of this version: a replica that starts late must not
        mix its answers with those of another model. Those that will be `read` are verified."""
        found = load_artifacts(self.run, read)
        if version_of(found) != self.models:
            raise ArtifactError(f"{self.run.url} is no longer version {self.models}; send SIGHUP to `ctd serve`")
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
    artifacts, changes = load_artifacts(run), read_changes(run)
    models, version = version_of(artifacts), version_of(artifacts, changes)
    tuned = chosen_row(run, config, artifacts)
    reader, searched = reader_of(artifacts, config), searched_of(artifacts)
    return Source(run, config, models, reader, searched, version, changes.number, changes.built, tuned=tuned)


def changed(source: Source) -> Source:
    """The same models with the changes that are in force now; itself where it has them. Raises ArtifactError."""
    number, _ = in_force(source.run)
    if number == source.changes:
        return source
    changes = read_changes(source.run, number)
    artifacts = {name: source.run.fetch(name, verify=False) for name in ARTIFACTS}
    if version_of(artifacts) != source.models:
        raise ArtifactError(f"{source.run.url} is no longer version {source.models}; send SIGHUP to `ctd serve`")
    return replace(source, version=version_of(artifacts, changes), changes=number, built=changes.built)


@dataclass(frozen=True)
class Release:
    """An opened version; `known` is what its LLM said before."""

    source: Source
    base: Base
    catalogue: Catalogue
    directory: Directory
    rank: RankStep
    read_as: Int32[ndarray, "items"]
    known: Known

    @property
    def version(self) -> str:
        return self.source.version


def open_release(source: Source, before: Release | None = None, ask: AskOf | None = None) -> Release:
    """Load what is behind the preference; with `ask`, without the large indexes, which others search. Of what was
    served `before` all is kept that is the same.

    What the process holds by then is left alone by Python's garbage collector: to look through a million titles takes
    it a third of a second, in which nobody is answered. What is let go of is freed all the same.
    """
    release = _opened(source, before, ask)
    gc.freeze()
    return release


def _warm_up(rank: RankStep) -> None:
    """Once through all steps, whatever they answer: what is compiled or allocated at first, nobody should wait for."""
    preference, history = np.ones((1, rank.retrieve.retriever.vectors.shape[1]), np.float32), np.zeros(1, np.int32)
    rank(preference, [history], [""], [history[:0]], 1)


def _opened(source: Source, before: Release | None, ask: AskOf | None) -> Release:
    changes = read_changes(source.run, source.changes)
    if before is None or before.source.index != source.index:
        artifacts = source.artifacts(READ_BEHIND)
        base = load_base(source.run, artifacts, changes, ask and partial(ask, source.index))
        live = apply_changes(base, changes)
        if live.retriever.text is not None:
            live.retriever.text.warm_up()
        log = InteractionLog.load(artifacts["interactions"].path, live.catalogue)
        directory = Directory(log, live.catalogue, live.places)
    else:
        base = before.base
        live = apply_changes(base, changes)
        directory = before.directory.with_catalogue(live.catalogue, live.places)
        if before.source.same_but_for_changes(source):
            rank = before.rank.over(live.retriever, live.graph)
            return Release(source, base, live.catalogue, directory, rank, live.read_as, before.known)
        artifacts = source.artifacts([name for name in READ_BEHIND if name not in READ_TO_SEARCH])
    rank = load_tuned(artifacts, source.config, None if source.tuned is None else source.tuned.settings, live)
    _warm_up(rank)
    known = before.known if before is not None and before.source.reader == source.reader else Known()
    return Release(source, base, live.catalogue, directory, rank, live.read_as, known)
