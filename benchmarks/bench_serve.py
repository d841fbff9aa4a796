"""The endpoint over a large catalogue: requests per second, latencies, replicas, a swap under load, live changes.

The run is made by the chain itself, over real titles (`catalog_reddit_1m`) and made-up users: each chooses among the
items of two categories, few of them often. A million items, almost all of them without an interaction, so that nearly
all vectors come from titles. The clients share the server's cores.
"""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.report import Case, parser, show, write
from ctd_scale.artifacts import Run
from ctd_scale.batches import Ranking, load_rankings, save_rankings
from ctd_scale.changes import delete, upsert
from ctd_scale.config import RunConfig, validate_config
from ctd_scale.pipeline import run_with_inputs, stage_named
from ctd_scale.serving.app import serve_run, shut_down
from ctd_scale.serving.load import Load, measure_load

SIZES = {"small": (20_000, 200, 2), "full": (1_000_000, 2_000, 8)}  # items, users, layers of the LLM
LENGTH, KINDS = 12, 2
# No denoiser is asked, and all that there is.
RETRIEVAL = Ranking(1.0, 0.0, 0.0, graph=0.5, neighbors=0.5)
EVERY_TERM = replace(RETRIEVAL, draws=0.5, error=0.5)
K = 10


def make_files(data_dir: str, folder: Path, items: int, users: int) -> None:
    """interactions.parquet and items.parquet."""
    catalogue = pq.read_table(Path(data_dir) / "catalog_reddit_1m" / "items.parquet").slice(0, items)
    random = np.random.default_rng(0)
    _, kind = np.unique(catalogue["category"].to_numpy(zero_copy_only=False), return_inverse=True)
    by_kind = np.split(np.argsort(kind, kind="stable"), np.cumsum(np.bincount(kind))[:-1])
    chosen = random.choice(len(by_kind), (users, KINDS), p=np.bincount(kind) / items)
    rows = []
    for kinds in chosen:
        for place in random.integers(0, KINDS, LENGTH):
            among = by_kind[kinds[place]]
            rows.append(among[min(int(random.pareto(0.7) * 3), len(among) - 1)])
    ids = np.array(catalogue["item_id"].to_pylist())
    table = {
        "user_id": np.repeat([f"u{user}" for user in range(users)], LENGTH),
        "item_id": ids[rows],
        "position": np.tile(np.arange(LENGTH), users),
    }
    pq.write_table(catalogue.select(["item_id", "title", "category"]), folder / "items.parquet")
    pq.write_table(pa.table(table), folder / "interactions.parquet")


def settings(folder: Path, layers: int) -> RunConfig:
    """Short training: what is measured does not depend on what was learned."""
    values: dict[str, Any] = {
        "interactions": {"interactions": str(folder / "interactions.parquet"), "items": str(folder / "items.parquet")},
        "graph": {"epochs": 5},
        "tokenizer": {"num_ways": 1, "steps": 200},
        "llm": {"num_hidden_layers": layers, "epochs": 1, "generate_texts": False, "max_history": 20},
        "diffusion": {"epochs": 2},
        "serving": {"upscale_delay_s": 2.0, "downscale_delay_s": 5.0},
    }
    return validate_config(values, "benchmark")


def another(run: Run, config: RunConfig) -> Run:
    """The same run with another denoiser."""
    other = linked(run, "other")
    make(other, config.model_copy(update={"diffusion": config.diffusion.model_copy(update={"epochs": 3})}))
    return other


def linked(run: Run, name: str) -> Run:
    """A run that begins as this one; what is the same in both lies on the disk once."""
    other = replace(run, name=name)
    if not other.exists("interactions/manifest.json"):
        shutil.copytree(run.root, other.root, copy_function=os.link, dirs_exist_ok=True)
        (other.root / "run.toml").unlink()  # a link, like all of it: writing it would write both
    return other


def weighing(run: Run, what: str, ranking: Ranking) -> Run:
    """The same run, whose answers are ranked by these weights: what was fitted to made-up users may leave terms out."""
    name = f"{run.name}-{what}"
    shutil.rmtree(replace(run, name=name).root, ignore_errors=True)  # of a run that has been made anew since
    other = linked(run, name)
    other.write_config(run.read_config())
    made = run.fetch("ranking", verify=False)
    rankings = load_rankings(made.path) | dict.fromkeys(("full", "full_text"), ranking)
    about = {key: made.manifest[key] for key in ("config_hash", "inputs", "facts")}
    with other.publish("ranking", **about) as folder:
        save_rankings(rankings, folder)
    return other


def make(run: Run, config: RunConfig) -> None:
    """All that is served; nothing is evaluated."""
    run.write_config(config)
    run_with_inputs([stage_named("calibrate_ranking")], run, config)


def load_cases(load: Load, what: str, in_process_ms: float) -> list[Case]:
    """The rates and latencies; `ratio` is that of the best rate to the chain in one process, one request at a time."""
    best = max((level for level in load.levels if level.clients), key=lambda level: level.per_second)
    cases = []
    for level in load.levels:
        asked = f"{level.clients} clients" if level.clients else f"{level.per_second:.0f}/s at random times"
        said = f"{what}, {asked}{' while another run takes over' if level.swap else ''}"
        cases.append(Case("serve", f"{said}: rate", "requests/s", level.per_second))
        for name in ("p50_ms", "p95_ms", "p99_ms"):
            cases.append(Case("serve", f"{said}: {name[:3]}", "ms", getattr(level, name)))
        failed = sum(count for status, count in level.statuses.items() if status != "200")
        cases.append(Case("serve", f"{said}: failed of {level.requests}", "requests", failed))
    rate = 1e3 / in_process_ms
    said = f"{what}, best rate"
    cases.append(Case("serve", said, "requests/s", best.per_second, rate, "in one process", best.per_second / rate))
    before: dict[str, float] = {}
    for each in load.timeline:
        now = {name: count for name, count in each.items() if name != "second"}
        if now != before:
            replicas = ", ".join(f"{name} {int(count)}" for name, count in now.items())
            said = f"{what}, from {each['second']:g} s: {replicas}"
            cases.append(Case("replicas", said, "replicas", sum(now.values())))
        before = now
    return cases


def swap_cases(load: Load) -> list[Case]:
    """The levels in which another run took over, and gave back."""
    swapping = [level for level in load.levels if level.swap]
    asked = sum(level.requests for level in swapping)
    failed = sum(count for level in swapping for status, count in level.statuses.items() if status != "200")
    answered = {version for level in swapping for version in level.versions}
    return [
        Case("swap", f"{asked} requests while another run took over, and gave back: failed", "requests", failed),
        Case("swap", "versions that were answered", "versions", len(answered)),
    ]


def change_cases(run: Run, config: RunConfig) -> list[Case]:
    """Seconds from the start of `ctd index upsert`'s work until an answer holds the new item, and until a deleted one
    is in none any more, while requests go on."""
    url = serve_run(lambda: (run, config), host="127.0.0.1", port=0, blocking=False)
    found: list[Case] = []
    try:
        with httpx.Client(base_url=url, timeout=60) as client:
            done, statuses = threading.Event(), list[int]()

            def ask() -> None:
                with httpx.Client(base_url=url, timeout=60) as other:
                    while not done.is_set():
                        statuses.append(other.post("/v1/recommend", json={"user_id": "u1", "k": K}).status_code)

            thread = threading.Thread(target=ask)
            thread.start()

            def seconds_until(change: Callable[[], object], query: str, there: bool) -> float:
                started = time.perf_counter()
                change()
                while bool(client.get("/v1/items", params={"query": query}).json()["items"]) != there:
                    time.sleep(0.01)
                return time.perf_counter() - started

            times: dict[str, list[float]] = {"put in": [], "taken out": []}
            for place in range(5):
                word = f"zzyzx{place}"
                row = pa.table({"item_id": [word], "title": [f"{word} of the day"], "category": ["pics"]})
                times["put in"].append(seconds_until(partial(upsert, run, row), word, there=True))
                times["taken out"].append(seconds_until(partial(delete, run, [word]), word, there=False))
            done.set()
            thread.join()
        for name, values in times.items():
            found.append(
                Case("changes", f"an item is {name}: median until answers show it", "s", float(np.median(values)))
            )
            found.append(Case("changes", f"an item is {name}: longest of {len(values)}", "s", max(values)))
        failed = sum(status != 200 for status in statuses)
        found.append(Case("changes", f"failed of {len(statuses)} requests meanwhile", "requests", failed))
    finally:
        shut_down()
    return found


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--data-dir", default=os.environ.get("CTD_DATA_DIR", ""), help="folder of the ready-made sets")
    made.add_argument("--folder", type=Path, default=Path("runs/bench_serve"), help="where the run is made, or lies")
    made.add_argument("--seconds", type=float, default=0.0, help="of each level; default: 5 (small) or 20")
    options = made.parse_args()
    items, users, layers = SIZES[options.size]
    seconds = options.seconds or {"small": 5.0, "full": 20.0}[options.size]
    folder = options.folder / options.size
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "interactions.parquet").exists():
        make_files(options.data_dir, folder, items, users)
    config, run = settings(folder, layers), Run(str(folder), "run")
    make(run, config)
    other = another(run, config)

    cases: list[Case] = []
    retrieved, swapped = (weighing(each, "retrieval", RETRIEVAL) for each in (run, other))
    cached = measure_load(retrieved, config, (1, 4, 16), seconds, 100, K, False, swapped, rest_s=2 * seconds)
    cases += load_cases(cached, f"{items:,} items, known preferences, no denoiser", cached.behind_preference_ms)
    cases += swap_cases(cached)
    write(cases, options.json)
    serving = config.serving.model_copy(update={"cached_preferences": 0})
    unknown = config.model_copy(update={"serving": serving})
    whole = weighing(run, "whole", EVERY_TERM)
    read = measure_load(whole, unknown, (1, 4, 8), seconds, 100, K, False)
    cases += load_cases(read, f"{items:,} items, {layers} layers read every history, all terms", read.whole_chain_ms)
    write(cases, options.json)
    cases += change_cases(whole, config)
    show(cases)
    write(cases, options.json)


if __name__ == "__main__":
    main()
