"""The index of a run as its changes leave it: items put in, altered and taken out, without building anything anew.

What was put in is a small segment behind the large one. The models have never read such an item: its vector comes from
its words (retrieval/cold.py), and where it is in a history it is read as the trained item that is nearest to it.
"""

from __future__ import annotations

import shutil
from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float32, Float64, Int32
from numpy import ndarray

from ctd_scale.artifacts import Artifact, ArtifactError, Run
from ctd_scale.batches import ITEM_COLUMNS, Catalogue, Preferences
from ctd_scale.changes import Changes, alone, fetch_version, next_version, read_changes
from ctd_scale.config import RunConfig
from ctd_scale.retrieval.build import build_index, load_cold, load_graph_index, load_index, load_part
from ctd_scale.retrieval.cold import TextProjection
from ctd_scale.retrieval.collaborative import CollaborativeRetriever
from ctd_scale.retrieval.dense import ExactIndex, exact_search
from ctd_scale.retrieval.grown import GrownVectors
from ctd_scale.retrieval.hybrid import HybridRetriever
from ctd_scale.retrieval.remote import Ask, Part
from ctd_scale.retrieval.segments import SegmentedIndex
from ctd_scale.retrieval.tree_index import TreeIndex

INDEX, READ_AS = "index", "read_as.npy"
# Of the nearest items, how many are looked through for a trained one before all trained ones are.
NEAREST = 50


@dataclass(frozen=True)
class Base:
    """What is loaded once, whatever changes: the index of a run, or of the version that was built anew.

    `read_as` says for each item which trained one it is read as: itself up to what the models know.
    """

    catalogue: Catalogue
    places: dict[str, int]
    retriever: HybridRetriever
    graph: CollaborativeRetriever
    projection: TextProjection
    trained: Bool[ndarray, "items"]
    read_as: Int32[ndarray, "items"]
    built: int


@dataclass(frozen=True)
class Live:
    """A catalogue with what searches it; `places` finds an item by its id."""

    catalogue: Catalogue
    places: Mapping[str, int]
    retriever: HybridRetriever
    graph: CollaborativeRetriever
    read_as: Int32[ndarray, "items"]


def built_anew(run: Run, own: Artifact, built: int) -> Artifact | None:
    """The version whose index is used instead of the run's own: one that was built anew, as long as the run's own is
    still the one that it was made from."""
    if not built:
        return None
    version = fetch_version(run, built)
    return version if version.manifest["inputs"] == {"index": own.digest} else None


def load_shards_of(run: Run, own: Artifact, built: int, number: int, of: int) -> dict[tuple[Part, int], TreeIndex]:
    """Every `of`-th shard, from `number` on, of what `load_base` leaves to others to search."""
    version = built_anew(run, own, built)
    folders: dict[Part, Path] = {"items": version.path / INDEX if version else own.path, "graph": own.path}
    return {
        (part, shard): index
        for part, folder in folders.items()
        for shard, index in load_part(folder, part, number, of).items()
    }


def load_base(
    run: Run, artifacts: Mapping[str, Artifact], changes: Changes, ask: Callable[[Part], Ask] | None = None
) -> Base:
    """The index that these changes lie on; with `ask`, what is approximate in it is left to others to search.

    Raises ValueError as `load_index` does; ArtifactError: it is missing or damaged.
    """
    own = artifacts["index"]
    folder, built = own.path, 0
    catalogue = Catalogue.load(artifacts["interactions"].path)
    read_as = np.arange(len(catalogue), dtype=np.int32)
    if version := built_anew(run, own, changes.built):
        folder, built = version.path / INDEX, changes.built
        catalogue, read_as = Catalogue.load(version.path / INDEX), np.load(version.path / READ_AS)
    projection, trained = load_cold(folder)
    return Base(
        catalogue,
        {item_id: place for place, item_id in enumerate(catalogue.item_ids)},
        load_index(folder, len(catalogue), pi=0.0, ask=ask and ask("items")),
        _read_graph(load_graph_index(own.path, ask=ask and ask("graph")), read_as),
        projection,
        trained,
        read_as,
        built,
    )


def apply_changes(base: Base, changes: Changes) -> Live:
    """The base with these changes; the base itself stays as it is, and both may be searched."""
    if not len(changes.table):
        return Live(base.catalogue, base.places, base.retriever, base.graph, base.read_as)
    ids, titles, categories, gone = (changes.table[name].to_pylist() for name in (*ITEM_COLUMNS, "deleted"))
    known = [base.places.get(item_id) for item_id in ids]
    new = [row for row, place in enumerate(known) if place is None]  # also what is gone: histories may name it
    size = len(base.catalogue)
    added = Catalogue([ids[row] for row in new], [titles[row] for row in new], [categories[row] for row in new])
    catalogue = Catalogue(
        base.catalogue.item_ids + added.item_ids,
        base.catalogue.titles + added.titles,
        base.catalogue.categories + added.categories,
        {name: _numbers(name, values, changes.table, known, new) for name, values in base.catalogue.attributes.items()},
    )
    worded = list(range(size, size + len(new)))
    deleted = np.zeros(len(catalogue), bool)
    deleted[size:] = [gone[row] for row in new]
    for row, place in enumerate(known):
        if place is None:
            continue
        deleted[place] = gone[row]
        if (titles[row], categories[row]) != (catalogue.titles[place], catalogue.categories[place]):
            catalogue.titles[place], catalogue.categories[place] = titles[row], categories[row]
            worded.append(place)
    text = base.retriever.text
    assert text is not None, "an index is built with its text"
    vectors = base.projection(text.describe(added.titles, added.categories))
    read_as = np.concatenate([base.read_as, _nearest_trained(base, vectors)])
    retriever = replace(
        _grown(base.retriever, vectors, deleted),
        text=text.with_items(
            np.array(worded, np.int32),
            [catalogue.titles[place] for place in worded],
            [catalogue.categories[place] for place in worded],
        ),
    )
    places = ChainMap({item_id: size + place for place, item_id in enumerate(added.item_ids)}, base.places)
    return Live(catalogue, places, retriever, _read_graph(base.graph, read_as, deleted), read_as)


def rebuild_index(run: Run, artifacts: Mapping[str, Artifact], config: RunConfig) -> Changes:
    """Build the index of the catalogue as it is now, and put it in force as the next version.

    Items that were put in are then in the large index, their words weigh what they weigh in the new catalogue, and the
    engine is calibrated over all of them. What is changed while it is built lies on top of it. Raises ArtifactError
    where what it was built of was rolled back meanwhile.
    """
    with alone(run, "rebuild-"), _aside(run) as aside:
        before = read_changes(run)
        base = load_base(run, artifacts, before)
        live = apply_changes(base, before)
        asked = None  # a copy of a run that is only served need not hold its preferences
        if run.manifest("preferences") is not None:
            asked = Preferences.load(run.fetch("preferences").path, "validation").vectors
        trained = np.zeros(len(live.catalogue), np.int64)
        trained[: len(base.trained)] = base.trained
        vectors = live.retriever.vectors[:]
        build_index(vectors, live.catalogue, config.retrieval, aside / INDEX, config.seed, asked, trained)
        live.catalogue.save(aside / INDEX)
        np.save(aside / READ_AS, live.read_as)
        with alone(run):
            now, inputs = read_changes(run), {"index": artifacts["index"].digest}
            if set(before.table["item_id"].to_pylist()) - set(now.table["item_id"].to_pylist()):
                raise ArtifactError(f"{run.url} was rolled back while its index was built anew; rebuild it once more")
            with next_version(run, now, now.table, "built the index anew", inputs, with_index=True) as folder:
                for part in aside.iterdir():
                    part.rename(folder / part.name)
            return read_changes(run)


@contextmanager
def _aside(run: Run) -> Iterator[Path]:
    """An empty folder beside what is published; nothing of it stays, nor of one that was killed."""
    folder = run.root / ".staging" / "rebuild"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _numbers(
    name: str, values: Float64[ndarray, "items"], table: pa.Table, known: Sequence[int | None], new: Sequence[int]
) -> Float64[ndarray, "grown"]:
    """A number of every item, as the changes leave it; NaN where they do not say."""
    said = np.full(len(table), np.nan)
    if name in table.column_names:
        said = table[name].cast(pa.float64()).fill_null(np.nan).to_numpy()
    grown = np.concatenate([values, said[np.array(new, np.int64)]])
    for row, place in enumerate(known):
        if place is not None:
            grown[place] = said[row]
    return grown


def _grown(
    retriever: HybridRetriever, added: Float32[ndarray, "added dim"], deleted: Bool[ndarray, "items"]
) -> HybridRetriever:
    hidden = deleted if deleted.any() else None
    if not len(added):
        return replace(retriever, deleted=hidden)
    assert isinstance(retriever.vectors, ndarray), "a base has not grown"
    dense = SegmentedIndex.of([retriever.dense, ExactIndex(added)], [len(retriever.vectors), len(added)])
    return replace(retriever, vectors=GrownVectors(retriever.vectors, added), dense=dense, deleted=hidden)


def _read_graph(
    graph: CollaborativeRetriever, read_as: Int32[ndarray, "items"], deleted: Bool[ndarray, "items"] | None = None
) -> CollaborativeRetriever:
    """The graph's retriever over more items than the graph has: these have the embeddings of what they are read as, and
    no search of their own finds them."""
    own = graph.retriever.vectors
    hidden = deleted if deleted is not None and deleted.any() else None
    if len(read_as) == len(own):
        return replace(graph, retriever=replace(graph.retriever, deleted=hidden))
    grown = GrownVectors(own, own[read_as[len(own) :]])
    return replace(graph, retriever=replace(graph.retriever, vectors=grown, deleted=hidden))


def _nearest_trained(base: Base, vectors: Float32[ndarray, "added cond_dim"]) -> Int32[ndarray, "added"]:
    """The trained item that is nearest to each."""
    if not len(vectors):
        return np.zeros(0, np.int32)
    found, _ = base.retriever.dense.search(vectors, min(NEAREST, len(base.catalogue)))
    trained = base.trained[found] & (found >= 0)
    nearest = found[np.arange(len(found)), trained.argmax(axis=1)]
    missed = ~trained.any(axis=1)
    if missed.any():
        ids, _ = exact_search(base.retriever.vectors, vectors[missed], 1, among=np.flatnonzero(base.trained))
        nearest[missed] = ids[:, 0]
    return nearest
