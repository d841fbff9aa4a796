"""Minibatches streamed from sampler actors by Ray Data, or sampled by a thread; the same ones either way.

Without torch in reach: an actor starts in a fraction of the time.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import ray.data

from ctd_scale.config import GraphConfig
from ctd_scale.graph.csr import BipartiteGraph
from ctd_scale.graph.negatives import NegativeSampler
from ctd_scale.graph.sampler import Minibatch, NeighborSampler, make_minibatch

# Minibatches per Ray Data task: enough to hide the task's overhead, few enough that prefetch stays small.
MINIBATCHES_PER_TASK = 16
# Up to here a thread samples faster than a pipeline hands over.
DIRECT_EDGES = 1_000_000
# Logical, they only admit actors: samplers must fit beside the trainers of a small machine.
SAMPLER_CPUS = 0.5
# Minibatches that wait for the trainer.
AHEAD = 4


class SampleMinibatches:
    """A Ray Data actor: keeps the memory-mapped graph and turns step numbers into finished minibatches."""

    def __init__(self, config: dict[str, Any], graph: str, seed: int, rank: int, world_size: int) -> None:
        self._config = GraphConfig.model_validate(config)
        loaded = BipartiteGraph.load(Path(graph))
        self._sampler = NeighborSampler(loaded, self._config.fanout, replace=self._config.replace)
        self._negative_sampler = NegativeSampler(loaded, self._config)
        self._seed, self._rank, self._world_size = seed, rank, world_size

    def minibatch(self, step: int) -> Minibatch:
        return make_minibatch(
            self._sampler,
            self._negative_sampler,
            seed=self._seed,
            step=step,
            batch_size=self._config.batch_size,
            rank=self._rank,
            world_size=self._world_size,
        )

    def __call__(self, batch: dict[str, np.ndarray]) -> pa.Table:
        return pa.concat_tables(self.minibatch(int(step)).to_arrow() for step in batch["item"])


def chosen_streaming(config: GraphConfig, num_edges: int) -> Literal["ray_data", "in_process"]:
    """Where minibatches are sampled. They are the same ones: what is chosen costs or saves time, nothing else."""
    if config.streaming == "auto":
        return "in_process" if num_edges <= DIRECT_EDGES else "ray_data"
    return config.streaming


def stream_minibatches(
    config: GraphConfig, graph: str, *, seed: int, rank: int, world_size: int, start: int, stop: int
) -> Iterator[Minibatch]:
    """Minibatches of one worker for steps start..stop, in order."""
    if start >= stop:
        return
    maker: dict[str, Any] = {
        "config": config.model_dump(),
        "graph": graph,
        "seed": seed,
        "rank": rank,
        "world_size": world_size,
    }
    if chosen_streaming(config, BipartiteGraph.load(Path(graph)).num_edges) == "in_process":
        sampler = SampleMinibatches(**maker)
        batches: Iterator[Minibatch] = (sampler.minibatch(step) for step in range(start, stop))
    else:
        batches = _stream_by_ray_data(config, maker, start, stop)
    yield from watched(batches, config.stall_seconds, "graph training")


def _stream_by_ray_data(config: GraphConfig, maker: dict[str, Any], start: int, stop: int) -> Iterator[Minibatch]:
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    tasks = -(-(stop - start) // MINIBATCHES_PER_TASK)
    # The cursor is in the checkpoint, so the stream simply begins there. Step numbers come from here, not from tasks:
    # trainers and samplers may hold every CPU that Ray counts, and a task would wait for ever.
    sampled = ray.data.from_items(list(range(start, stop)), override_num_blocks=tasks).map_batches(
        SampleMinibatches,
        fn_constructor_kwargs=maker,
        concurrency=config.sampler_actors,
        batch_size=MINIBATCHES_PER_TASK,
        num_cpus=SAMPLER_CPUS,
    )
    # A split runs in an actor of its own: the executor's loop would take more of this process's time than training.
    (split,) = sampled.streaming_split(1)
    # Whole blocks, cut here: a row is a view of its block.
    for block in split.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=2):
        yield from (Minibatch.from_arrow(block.slice(row, 1)) for row in range(len(block)))


class StalledError(RuntimeError):
    """A source gave nothing for too long."""


def watched(source: Iterator[Minibatch], seconds: float, name: str) -> Iterator[Minibatch]:
    """What `source` gives, made ahead by a thread. Raises what it raises, and StalledError after `seconds` without
    anything: a pipeline whose actors wait for each other would otherwise wait for ever."""
    ahead: queue.Queue[Minibatch | BaseException | None] = queue.Queue(AHEAD)
    stopped = threading.Event()

    def put(what: Minibatch | BaseException | None) -> None:
        while not stopped.is_set():
            try:
                ahead.put(what, timeout=0.5)
            except queue.Full:
                continue
            return

    def make() -> None:
        try:
            for batch in source:
                put(batch)
                if stopped.is_set():
                    return
            put(None)
        except BaseException as error:
            put(error)

    threading.Thread(target=make, daemon=True, name="minibatches").start()
    given = 0
    try:
        while True:
            try:
                batch = ahead.get(timeout=seconds)
            except queue.Empty:
                raise StalledError(
                    f"{name} gave no minibatch for {seconds:g} s, after {given} of them; "
                    "are the sampler actors alive? Raise graph.stall_seconds for a slow machine"
                ) from None
            if batch is None:
                return
            if isinstance(batch, BaseException):
                raise batch
            given += 1
            yield batch
    finally:
        stopped.set()
