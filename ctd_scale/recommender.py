"""The whole chain in one process: preference, then denoise and retrieve.

`Recommender.recommend` and the served endpoint call the same two steps: the preference model and `RankStep`.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float32, Int32
from numpy import ndarray

from ctd_scale.artifacts import Artifact, ArtifactError, Run
from ctd_scale.batches import Catalogue, InteractionLog, NodeArrays, Ranking, Split, load_rankings
from ctd_scale.candidates import RetrieveStep
from ctd_scale.changes import NO_CHANGES, Changes, read_changes
from ctd_scale.config import RunConfig, section_values
from ctd_scale.diffusion.inference import DensityModel
from ctd_scale.live import Live, apply_changes, load_base
from ctd_scale.llm.inference import PreferenceModel
from ctd_scale.retrieval.boosts import Boosts
from ctd_scale.retrieval.build import load_graph_index, load_index
from ctd_scale.retrieval.collaborative import CollaborativeRetriever
from ctd_scale.retrieval.hybrid import HybridRetriever

# What the chain needs, checked against each other when it is loaded.
ARTIFACTS = ("interactions", "tokens", "models/llm", "models/diffusion", "index", "ranking")
READ_FOR_PREFERENCE = ("interactions", "tokens", "models/llm")
READ_BEHIND = ("interactions", "models/diffusion", "index", "ranking")  # the preference
READ_TO_SEARCH = ("interactions", "index")
# What a figure is measured on, in the order in which it is made.
MEASURED = (
    *("interactions", "graph", "embeddings", "embeddings_at_test", "models/tokenizer", "tokens", "models/history"),
    *("models/llm", "preferences", "models/diffusion", "index"),
)
# Some say it of how they were made, but it may be another when they are asked: a model's precision, how the index is
# asked for a text, and whether what was seen may come back in what is measured.
OF_ASKING = ("llm.dtype", "retrieval.text_candidates", "evaluation.mask_seen")


@dataclass(frozen=True)
class Recommendation:
    """One user's answer: item indices, best first, their scores, and what the LLM said ('' unless asked)."""

    items: list[int]
    scores: list[float]
    text: str


class RankStep:
    """Everything behind the preference: generated vectors, candidates, their errors, the final order."""

    def __init__(self, density: DensityModel, retrieve: RetrieveStep, ranking: Ranking) -> None:
        self.density, self.retrieve, self.ranking = density, retrieve, ranking

    def over(self, retriever: HybridRetriever, graph: CollaborativeRetriever) -> RankStep:
        """The same step over another state of the catalogue."""
        return RankStep(self.density, self.retrieve.over(retriever, graph), self.ranking)

    def __call__(
        self,
        preferences: Float32[ndarray, "batch cond_dim"],
        histories: Sequence[Int32[ndarray, "_"]],
        texts: list[str],
        excluded: list[Int32[ndarray, "_"]],
        k: int,
        seconds: dict[str, float] | None = None,
        boosts: Sequence[Boosts | None] | None = None,
    ) -> list[Recommendation]:
        """The k best items for each preference, history and text, and what each of them boosts; `seconds` is told how
        long each part took. What the ranking does not weigh, or nobody boosts, is not made."""
        seconds, ranking = {} if seconds is None else seconds, self.ranking
        wanted = boosts if boosts is not None and any(each is not None for each in boosts) else None
        draws, errors, latest = None, None, None
        if ranking.generates:
            with timed("draws", seconds):
                latest = self.density.latest(histories, self.retrieve.retriever.vectors)
                draws = self.density.draws(preferences, latest=latest)
        with timed("retrieve", seconds):
            read = histories if ranking.reads_histories else None
            pool = self.retrieve.pool(preferences, texts, excluded, draws=draws, histories=read, boosts=wanted)
        if ranking.error:
            with timed("error", seconds):
                errors = self.density.errors(preferences, pool.vectors, latest)
        with timed("rank", seconds):
            ids, scores = self.retrieve.rank(pool, errors, ranking, k)
        return answers(ids, scores, texts)


@contextmanager
def timed(stage: str, seconds: dict[str, float]) -> Iterator[None]:
    """Note how long the block took."""
    started = time.perf_counter()
    yield
    seconds[stage] = time.perf_counter() - started


class Recommender:
    """The three steps, loaded from one run's artifacts and what was changed since in its catalogue (as of `changes`, or
    until now); with another config than the run's, or another effort of its indexes, where one is given."""

    def __init__(
        self, run: Run, config: RunConfig | None = None, effort: float = 1.0, changes: int | None = None
    ) -> None:
        artifacts, changed = load_artifacts(run), read_changes(run, changes)
        self.config = config or run.read_config()
        self.version = version_of(artifacts, changed)
        self.preference = load_preference(artifacts, self.config)
        self._live = apply_changes(load_base(run, artifacts, changed), changed)
        self.log = InteractionLog.load(artifacts["interactions"].path, self._live.catalogue)
        self.rank = load_rank(artifacts, self.config, self._live, effort)

    @property
    def catalogue(self) -> Catalogue:
        return self.log.catalogue

    def recommend(
        self,
        histories: Sequence[Int32[ndarray, "_"]],
        k: int,
        *,
        exclude_seen: bool = True,
        explain: bool = False,
        excluded: Sequence[Int32[ndarray, "_"]] | None = None,
        boosts: Sequence[Boosts | None] | None = None,
    ) -> list[Recommendation]:
        """The k best items after each history, oldest item first. With `explain` the LLM also writes a text, and
        items that agree with it gain. `excluded` are items that may not come back either, a list for each history, and
        `boosts` says for each what is to gain or lose."""
        if k < 1:
            raise ValueError(f"k={k}, expected at least 1")
        if not histories:
            return []
        read = [self._live.read_as[history] for history in histories]
        preferences = self.preference(read)
        texts = self.preference.texts(read) if explain else [""] * len(read)
        out = excluded_items(histories, exclude_seen, excluded)
        return self.rank(preferences, read, texts, out, k, boosts=boosts)


def excluded_items(
    histories: Sequence[ndarray], exclude_seen: bool, further: Sequence[ndarray] | None = None
) -> list[ndarray]:
    """What may not come back for each history: what is in it, and what is asked for besides (repeats may be there)."""
    seen = [np.unique(history if exclude_seen else history[:0]).astype(np.int32) for history in histories]
    if further is None:
        return seen
    return [np.concatenate([known, more]) for known, more in zip(seen, further, strict=True)]


def answers(ids: ndarray, scores: ndarray, texts: list[str]) -> list[Recommendation]:
    """Rows without their padding."""
    return [
        Recommendation(row[row >= 0].tolist(), values[row >= 0].tolist(), text)
        for row, values, text in zip(ids, scores, texts, strict=True)
    ]


def load_artifacts(run: Run, read: Collection[str] = ARTIFACTS) -> dict[str, Artifact]:
    """Everything a recommendation needs, refused where one was made from another version of another. Those that will be
    `read` are verified."""
    found = {name: run.fetch(name, verify=name in read) for name in ARTIFACTS}
    for name, artifact in found.items():
        run.require_made_from(artifact, *(other for other in found.values() if other.name != name))
    return found


def version_of(artifacts: Mapping[str, Artifact], changes: Changes = NO_CHANGES) -> str:
    """Identity of everything that shapes an answer: 12 hex digits over the artifacts' digests and the changes'."""
    digests = {name: artifacts[name].digest for name in ARTIFACTS}
    if changes.digest:
        digests["changes"] = changes.digest
    return _identity(digests)


def reader_of(artifacts: Mapping[str, Artifact], config: RunConfig) -> str:
    """Identity of everything that shapes a preference: 12 hex digits over what the LLM reads, itself and its settings.
    Versions that share it say the same of a history."""
    digests = {name: artifacts[name].digest for name in READ_FOR_PREFERENCE}
    return _identity({**digests, "llm": config.llm.model_dump_json()})


def searched_of(artifacts: Mapping[str, Artifact]) -> str:
    """Identity of the catalogue and of the index that searches it, as the run was made: 12 hex digits over both."""
    return _identity({name: artifacts[name].digest for name in READ_TO_SEARCH})


def _identity(parts: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]


def require_made_with(artifact: Artifact, config: RunConfig, section: str) -> None:
    """Refuse settings with which a model would be read otherwise than it was trained; its precision may differ.

    Raises ArtifactError naming the first of them.
    """
    made: Mapping[str, Any] = artifact.manifest.get("settings", {})  # what no stage made says nothing
    names = [name for name in made if name.startswith(f"{section}.") and name != "llm.dtype"]
    now = section_values(config, names)
    if other := [name for name in names if now[name] != made[name]]:
        name = other[0]
        raise ArtifactError(
            f"{artifact.path} was made with {name}={made[name]!r}, and now the config of the run says {now[name]!r}; "
            f"finish `ctd run` with that config, or set {name} back to {json.dumps(made[name])} in the run's run.toml"
        )


def require_measured_as_made(run: Run, config: RunConfig) -> None:
    """Refuse settings with which something that is measured would have been made otherwise.

    Raises ArtifactError naming the first of them.
    """
    now = dict(_flat(config.shaping_values()))
    for name in MEASURED:
        manifest = run.manifest(name) or {}
        for key, made in _flat(manifest.get("settings", {})):  # what no stage made says nothing
            if key not in OF_ASKING and key in now and now[key] != made:
                raise ArtifactError(
                    f"{run.url}/{name} was made with {key}={made!r}, and is to be measured with {now[key]!r}; finish "
                    f"`ctd run` with that config, or leave {key}={json.dumps(made)}"
                )


def _flat(settings: Mapping[str, Any], within: str = "") -> Iterator[tuple[str, Any]]:
    """Every single value by its whole name."""
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{within}{name}.")
        else:
            yield f"{within}{name}", value


def load_preference(artifacts: Mapping[str, Artifact], config: RunConfig) -> PreferenceModel:
    require_made_with(artifacts["models/llm"], config, "llm")
    catalogue, tokens = Catalogue.load(artifacts["interactions"].path), NodeArrays.load(artifacts["tokens"].path)
    return PreferenceModel(artifacts["models/llm"].path, tokens, catalogue, config.llm)


def load_density(artifacts: Mapping[str, Artifact], config: RunConfig) -> DensityModel:
    require_made_with(artifacts["models/diffusion"], config, "diffusion")
    return DensityModel(artifacts["models/diffusion"].path, config.llm.preference_dim, config.diffusion, config.seed)


def load_rank(
    artifacts: Mapping[str, Artifact],
    config: RunConfig,
    live: Live | None = None,
    effort: float = 1.0,
    split: Split = "test",
) -> RankStep:
    """What is behind the preference: over a live catalogue, or the run's own as the graph knows it for this split."""
    require_made_with(artifacts["models/llm"], config, "llm")  # whose preferences are read
    ranking = load_rankings(artifacts["ranking"].path)["full_text"]
    own = None if live is None else RetrieveStep(live.retriever, live.graph, config, effort)
    return RankStep(load_density(artifacts, config), own or load_retrieve(artifacts, config, split, effort), ranking)


def load_retrieve(
    artifacts: Mapping[str, Artifact], config: RunConfig, split: Split = "test", effort: float = 1.0
) -> RetrieveStep:
    """Over the run's own index, without what was changed since: what the models are measured on in this split."""
    folder, items = artifacts["index"].path, int(artifacts["index"].manifest["facts"]["items"])
    return RetrieveStep(load_index(folder, items, pi=0.0), load_graph_index(folder, split), config, effort)
