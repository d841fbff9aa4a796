"""Dense search at equal recall beside other engines, hybrid search beside dense, and the text index beside its library.

Every engine answers with one thread and is tuned over a grid of its own, of how it is built and how it is asked: of the
settings that reach a recall, the fastest counts. Each is built in a process of its own, so that its memory is its own.
Vectors are those of titles, by latent semantic analysis of a million real ones with their categories
(`catalog_reddit_1m`); ten million are made of the same titles, their words shuffled within each category. The queries
are titles that are not in the index.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.report import Case, apart, parser, show, write
from benchmarks.title_vectors import DIM, catalogue_of, title_vectors
from ctd_scale.estimates import peak_memory
from ctd_scale.retrieval.dense import ExactIndex, exact_search
from ctd_scale.retrieval.hybrid import HybridRetriever
from ctd_scale.retrieval.scann_index import ScannIndex
from ctd_scale.retrieval.text import TextIndex, words
from ctd_scale.retrieval.tree_index import Settings

QUERIES, K = 2000, 10
RECALLS = (0.90, 0.95, 0.99)
SECONDS = 1.0  # of searching per setting
CONSTRUCTION = 100  # candidates that a graph looks at for the edges of an item
EFFORTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
Search = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Built:
    """An index, ladders of settings from cheap to dear, and how it is saved and read."""

    ladders: Iterator[Iterator[tuple[str, Search]]]
    save: Callable[[Path], object]
    load: Callable[[Path], object]


def parted(file: str) -> tuple[np.ndarray, np.ndarray]:
    """Items, and queries that are none of them."""
    vectors = np.load(file)
    asked = np.zeros(len(vectors), bool)
    asked[np.random.default_rng(1).choice(len(vectors), QUERIES, replace=False)] = True
    return vectors[~asked], vectors[asked]


def tenth_nearest(file: str) -> np.ndarray:
    """The cosine [QUERIES, 1] of each query's tenth nearest item; found once for all engines."""
    kept = Path(file).with_suffix(".tenth.npy")
    if not kept.exists():
        _, cosines = exact_search(*parted(file), K)
        np.save(kept, cosines[:, -1:])
    found: np.ndarray = np.load(kept)
    return found


# -- engines -----------------------------------------------------------------------------------------------------


def scann(leaves: int) -> Callable[[np.ndarray], Built]:
    def build(vectors: np.ndarray) -> Built:
        index = ScannIndex.build(vectors, target_recall=0.95, leaves=leaves)

        def asked(tried: Settings) -> Search:
            searching = ScannIndex(index.searcher, tried)
            return lambda queries: searching.search(queries, K)[0]

        def ladder(reorder: int) -> Iterator[tuple[str, Search]]:
            for searched in EFFORTS:
                tried = replace(index.settings, leaves_to_search=searched, reorder=reorder)
                yield f"leaves {searched}, reorder {reorder}", asked(tried)

        return Built(map(ladder, (40, 160, 320, 640, 1280, 2560, 5120, 10240)), index.save, ScannIndex.load)

    return build


def faiss_index(factory: str, effort: str, others: Sequence[dict[str, int]]) -> Callable[[np.ndarray], Built]:
    def build(vectors: np.ndarray) -> Built:
        import faiss

        index: Any = faiss.index_factory(DIM, factory, faiss.METRIC_INNER_PRODUCT)
        if "HNSW" in factory:
            index.hnsw.efConstruction = CONSTRUCTION
        random = np.random.default_rng(0)
        index.train(vectors[random.choice(len(vectors), min(len(vectors), 200_000), replace=False)])
        index.add(vectors)
        faiss.omp_set_num_threads(1)
        space = faiss.ParameterSpace()

        def ladder(other: dict[str, int]) -> Iterator[tuple[str, Search]]:
            for value in EFFORTS:
                said = {effort: value, **other}

                def search(queries: np.ndarray, said: dict[str, int] = said) -> np.ndarray:
                    for name, each in said.items():
                        space.set_index_parameter(index, name, each)
                    found: np.ndarray = index.search(queries, K)[1]
                    return found

                yield ", ".join(f"{name} {each}" for name, each in said.items()), search

        def save(folder: Path) -> None:
            faiss.write_index(index, str(folder / "index"))

        return Built(map(ladder, others), save, lambda folder: faiss.read_index(str(folder / "index")))

    return build


def usearch_index(vectors: np.ndarray) -> Built:
    from usearch.index import Index

    index = Index(ndim=DIM, metric="ip", dtype="f32", connectivity=16, expansion_add=CONSTRUCTION)
    index.add(np.arange(len(vectors)), vectors, threads=os.cpu_count() or 1)

    def ladder() -> Iterator[tuple[str, Search]]:
        for value in EFFORTS[3:]:

            def search(queries: np.ndarray, value: int = value) -> np.ndarray:
                index.expansion_search = value
                return np.asarray(index.search(queries, K, threads=1).keys)

            yield f"expansion {value}", search

    return Built(
        iter([ladder()]),
        lambda folder: index.save(str(folder / "index")),
        lambda folder: Index.restore(str(folder / "index")),
    )


def brute_force(vectors: np.ndarray) -> Built:
    index = ExactIndex(vectors)
    ladder = iter([("all items", lambda queries: index.search(queries[:200], K)[0])])
    return Built(
        iter([ladder]),
        lambda folder: np.save(folder / "vectors.npy", vectors),
        lambda folder: np.load(folder / "vectors.npy"),
    )


def engines(items: int) -> dict[str, Callable[[np.ndarray], Built]]:
    """Every engine by name, once for each way to build it. Over ten million items a graph takes an hour to build, and
    everything is built once."""
    made: dict[str, Callable[[np.ndarray], Built]] = {}
    root = round(np.sqrt(items))
    for leaves in (root, 4 * root) if items == 1_000_000 else (root,):
        made[f"ScaNN ({leaves} leaves)"] = scann(leaves)
        made[f"faiss IVF-Flat ({leaves} leaves)"] = faiss_index(f"IVF{leaves},Flat", "nprobe", [{}])
        made[f"faiss IVF-PQ fast scan, refined ({leaves} leaves)"] = faiss_index(
            f"IVF{leaves},PQ{DIM // 2}x4fs,RFlat", "nprobe", [{"k_factor_rf": factor} for factor in (4, 16, 64, 256)]
        )
    if items <= 1_000_000:
        made |= {"faiss HNSW16": faiss_index("HNSW16", "efSearch", [{}]), "usearch HNSW16": usearch_index}
    return {**made, "brute force": brute_force}


# -- measuring ----------------------------------------------------------------------------------------------------


def rate(search: Search, queries: np.ndarray) -> float:
    """Queries per second."""
    search(queries[:10])
    done, started = 0, time.perf_counter()
    while time.perf_counter() - started < SECONDS:
        done += len(search(queries))
    return done / (time.perf_counter() - started)


def engine_cases(name: str, file: str, items: int) -> list[Case]:
    """Everything about one engine; `ours` is the value of this engine, rivals are set beside it afterwards."""
    os.environ["OMP_NUM_THREADS"] = str(os.cpu_count())
    vectors, queries = parted(file)
    needed = tenth_nearest(file) - 1e-6
    with peak_memory() as memory:
        started = time.perf_counter()
        built = engines(items)[name](vectors)
        seconds = time.perf_counter() - started
    best: dict[float, tuple[float, str]] = {}
    for ladder in built.ladders:
        for said, search in ladder:
            found = search(queries)
            rows = queries[: len(found)]
            scores = np.einsum("qd,qkd->qk", rows, vectors[np.maximum(found, 0)])
            recall = float(((scores >= needed[: len(found)]) & (found >= 0)).mean())
            if recall < RECALLS[0]:
                continue
            speed = rate(search, queries)
            for target in RECALLS:
                if recall >= target and speed > best.get(target, (0.0, ""))[0]:
                    best[target] = speed, said
            if recall >= RECALLS[-1]:
                break
    cases = [
        Case("dense", f"{items:,} items, {name}, recall@10 {each:.2f}: {best[each][1]}", "queries/s", best[each][0])
        for each in RECALLS
        if each in best
    ]
    with tempfile.TemporaryDirectory() as folder:
        built.save(Path(folder))
        size = sum(each.stat().st_size for each in Path(folder).iterdir()) / 1e6
        started = time.perf_counter()
        built.load(Path(folder))
        loading = time.perf_counter() - started
    for what, unit, value in (
        ("build", "s", seconds),
        ("peak memory of the build", "MB", memory[0] / 1e6),
        ("saved", "MB", size),
        ("load", "s", loading),
    ):
        cases.append(Case("dense", f"{items:,} items, {name}, {what}", unit, value))
    return cases


def beside(cases: list[Case], items: int) -> list[Case]:
    """ScaNN's rate at each recall beside every rival's, each at the best of its builds."""
    made = []
    for target in RECALLS:
        best: dict[str, float] = {}
        for case in cases:
            if f"recall@10 {target:.2f}" in case.case and case.case.startswith(f"{items:,}"):
                name = case.case.split(" items, ", 1)[1].split(", recall")[0].split(" (")[0]
                best[name] = max(best.get(name, 0.0), case.ours)
        ours = best.pop("ScaNN", None)
        for name, rival in best.items():
            if ours:
                said = f"{items:,} items, recall@10 {target:.2f}"
                made.append(Case("equal recall", said, "queries/s", ours, rival, name, ours / rival))
    return made


def nearest(index: Any, k: int, queries: np.ndarray) -> np.ndarray:
    return np.asarray(index.search(queries, k)[0])


def exact_cases(file: str, items: int) -> list[Case]:
    """Exact search, which small catalogues are asked with and recalls are measured by, beside that of faiss."""
    import faiss

    vectors, queries = parted(file)
    ours = ExactIndex(vectors)
    flat: Any = faiss.IndexFlatIP(DIM)
    flat.add(vectors)
    faiss.omp_set_num_threads(1)
    made = []
    for k in (K, 10 * K):
        own, rival = (rate(partial(nearest, each, k), queries[:200]) for each in (ours, flat))
        said = f"{items:,} items, the exact {k} nearest"
        made.append(Case("exact", said, "queries/s", own, rival, "faiss IndexFlatIP", own / rival))
    return made


def hybrid_cases(file: str, data_dir: str, items: int) -> list[Case]:
    """What the text adds to a search, and what finding its matches costs beside bm25s' own scores."""
    vectors, queries = parted(file)
    catalogue = catalogue_of(data_dir, len(vectors))
    started = time.perf_counter()
    text = TextIndex.build(catalogue)
    building = time.perf_counter() - started
    text.warm_up()
    nothing = [np.zeros(0, np.int32)] * len(queries)
    chosen = np.random.default_rng(2).choice(len(vectors), len(queries))
    texts = [
        f"The user might like {catalogue.categories[item]} products, such as {catalogue.titles[item]}"
        for item in chosen.tolist()
    ]
    retriever = HybridRetriever(vectors, ScannIndex.build(vectors, target_recall=0.95), text, pi=0.1)

    def dense(rows: slice) -> None:
        retriever.search(queries[rows], nothing[rows], nothing[rows], K)

    def hybrid(rows: slice) -> None:
        retriever.search(queries[rows], retriever.matches(texts[rows], 20), nothing[rows], K)

    def per_query(search: Callable[[slice], object]) -> float:
        times = []
        for start in range(0, 1000, 100):
            began = time.perf_counter()
            search(slice(start, start + 100))
            times.append((time.perf_counter() - began) / 100)
        return 1e6 * float(np.median(times))

    ours, rival, again = per_query(hybrid), per_query(dense), per_query(hybrid)
    bm25: Any = text._bm25

    def plain(rows: slice) -> None:
        for each in texts[rows]:
            scores = bm25.get_scores_from_ids(
                [number for word in words(each) if (number := bm25.vocab_dict.get(word)) is not None]
            )
            found = np.flatnonzero(scores > 0)
            found[np.argsort(-scores[found], kind="stable")[:20]]

    def searched(rows: slice) -> None:
        for each in texts[rows]:
            text._matcher.match(each, 20)  # not what was kept

    matching, summed = per_query(searched), per_query(plain)
    return [
        Case("hybrid", f"{items:,} items, one list of 10", "µs", ours, rival, "dense alone", rival / ours),
        Case("hybrid", f"{items:,} items, the same texts again", "µs", again, rival, "dense alone", rival / again),
        Case(
            "text",
            f"{items:,} items, 20 matches of a text",
            "µs",
            matching,
            summed,
            "bm25s, all scores",
            summed / matching,
        ),
        Case("text", f"{items:,} items, build", "s", building),
    ]


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--data-dir", default=os.environ.get("CTD_DATA_DIR", ""), help="folder of the ready-made sets")
    made.add_argument("--items", default="", help="sizes instead, separated by commas")
    made.add_argument("--engine", default="", help="only the engines whose name begins so, and nothing but them")
    options = made.parse_args()
    from benchmarks import bench_retrieval as importable

    os.environ["OPENBLAS_NUM_THREADS"] = "1"  # of the processes that measure: Numpy reads it on import
    sizes = {"small": [100_000], "full": [1_000_000, 10_000_000]}[options.size]
    if options.items:
        sizes = [int(each) for each in options.items.split(",")]
    cases: list[Case] = []
    with tempfile.TemporaryDirectory() as folder:
        file = str(Path(folder) / "vectors.npy")
        for items in sizes:
            catalogue = catalogue_of(options.data_dir, items)
            title_vectors(catalogue, Path(file), items)
            Path(file).with_suffix(".tenth.npy").unlink(missing_ok=True)
            if len(catalogue) == items and not options.engine:
                cases += apart(importable.hybrid_cases, file, options.data_dir, items)
            if not options.engine:
                cases += apart(importable.exact_cases, file, items)
            for name in (each for each in engines(items) if each.startswith(options.engine)):
                cases += apart(importable.engine_cases, name, file, items)
                write(cases, options.json)
            compared = beside(cases, items)
            show(compared)
            cases += compared
            write(cases, options.json)


if __name__ == "__main__":
    main()
