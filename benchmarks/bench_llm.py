"""The LLM stage: what it wastes no time on, beside the plain ways of doing the same.

Rivals: one prompt per prefix (the published way) with the same backbone, optimizer and batches; a plain Hugging Face
training loop over the same rows as text; and, for memory, one ZeRO stage beside the other.
"""

from __future__ import annotations

import json
import os
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import report
from benchmarks.report import Case
from ctd_scale import training
from ctd_scale.artifacts import Run
from ctd_scale.batches import Catalogue, InteractionLog, NodeArrays
from ctd_scale.config import LLMConfig, load_config
from ctd_scale.estimates import anonymous_memory
from ctd_scale.interactions.prepare import prepare_interactions
from ctd_scale.llm import train
from ctd_scale.llm.backbone import backbone_folder, hidden_size, load_text_tokenizer
from ctd_scale.llm.collator import Collator, LLMBatch, Row
from ctd_scale.llm.model import PreferenceLM
from ctd_scale.llm.prompts import make_prompts
from ctd_scale.llm.train import new_model, parameter_groups, window_row
from ctd_scale.llm.windows import pack, plan_steps, training_windows

WAYS, DIM = 2, 64
SECONDS = {"small": 8.0, "full": 40.0}
LAYERS = {"small": 2, "full": 8}
TITLE_TOKENS = 6


class PlainLM(PreferenceLM):
    """Reads the instruction in every row, as a prompt is written."""

    def hidden(self, batch: LLMBatch, head: Any = None) -> torch.Tensor:
        rows = self.embed(batch)
        words = self.words(batch.head_ids).expand(len(rows), -1, -1)
        read = self.lm.base_model(inputs_embeds=torch.cat([words, rows], dim=1), use_cache=False)
        states: torch.Tensor = read.last_hidden_state[:, len(batch.head_ids) :]
        return states.reshape(-1, states.shape[-1])


def histories_of(length: int, users: int) -> InteractionLog:
    """Users with so many training interactions beside their two targets, over titles of real words."""
    random, items = np.random.default_rng(0), 2000
    words = ["Red", "River", "Night", "Machine", "Garden", "Empire", "Quiet", "Golden", "Last", "Little", "Burning"]
    titles = [" ".join(random.choice(words, 4)) for _ in range(items)]
    names = [str(item) for item in range(items)]
    return InteractionLog(
        np.arange(users + 1, dtype=np.int64) * (length + 3),
        random.integers(0, items, users * (length + 3)).astype(np.int32),
        [str(user) for user in range(users)],
        Catalogue(names, titles, [""] * items),
    )


def beauty(data_dir: str) -> InteractionLog:
    with tempfile.TemporaryDirectory() as root:
        run = Run(root, "beauty")
        config = load_config("beauty", [f'interactions.data_dir="{data_dir}"'])
        prepare_interactions(config.interactions, run, "key")
        log = InteractionLog.load(run.fetch("interactions").path)
        return replace(log, offsets=np.array(log.offsets), items=np.array(log.items))


class Bench:
    """A backbone, a log, and the epoch of windows that is trained on it."""

    def __init__(self, log: InteractionLog, layers: int) -> None:
        self.log = log
        self.config = LLMConfig(num_hidden_layers=layers, max_title_tokens=TITLE_TOKENS, text_weight=0.0)
        self.backbone = backbone_folder(self.config)
        prompts = make_prompts(load_text_tokenizer(self.backbone), log.catalogue, TITLE_TOKENS)
        random = np.random.default_rng(0)
        tokens = random.standard_normal((log.num_items, WAYS, hidden_size(self.backbone))).astype(np.float32)
        self.collator = Collator(prompts, tokens)
        self.vectors = random.standard_normal((log.num_items, DIM)).astype(np.float32)
        windows = training_windows(log.train_lengths(), self.config, 0, 0)
        self.windows = [window_row(log, windows, index) for index in range(len(windows))]

    def model(self, kind: type[PreferenceLM] = PreferenceLM) -> PreferenceLM:
        made = new_model(self.config, self.backbone, self.vectors, seed=0).to(torch.bfloat16).train()
        made.__class__ = kind
        return made

    def steps(self) -> list[list[Row]]:
        """The windows of each optimizer step of the stage."""
        sizes = self.collator.sizes(self.windows)
        cut = plan_steps(sizes, self.config.batch_tokens, np.random.default_rng(0))
        return [[self.windows[index] for index in step] for step in cut]

    def packed(self, rows: Sequence[Row]) -> LLMBatch:
        """As the stage reads a step: rows laid end to end."""
        (lines,) = pack(self.collator.sizes(rows), parts=1)
        return self.collator.packed([[rows[index] for index in line] for line in lines if line])

    def buckets(self, rows: Sequence[Row], head: bool = False) -> list[list[Row]]:
        """Batches of like length within the budget, in random order: what the rivals read. `head` counts the
        instruction in each row."""
        sizes = self.collator.sizes(rows) + (len(self.collator.prompts.head) if head else 0)
        batches: list[list[Row]] = [[]]
        for index in np.argsort(sizes, kind="stable").tolist():
            if batches[-1] and (len(batches[-1]) + 1) * int(sizes[index]) > self.config.batch_tokens:
                batches.append([])
            batches[-1].append(rows[index])
        return [batches[index] for index in np.random.default_rng(0).permutation(len(batches))]

    def prefixes(self) -> list[Row]:
        """The published way: every prefix is a prompt of its own."""
        return [
            Row(row.items[: end + 1], row.targets[end : end + 1])
            for row in self.windows
            for end in range(len(row.items))
        ]


def rate(batches: Sequence[Any], step: Callable[[Any], int], seconds: float) -> float:
    """Units per second of `step` over the batches, in their order, after two to warm up."""
    for batch in batches[:2]:
        step(batch)
    done, started, number = 0, time.perf_counter(), 2
    while time.perf_counter() - started < seconds:
        done += step(batches[number % len(batches)])
        number += 1
    return done / (time.perf_counter() - started)


def trainer(
    bench: Bench,
    model: PreferenceLM,
    count: Callable[[LLMBatch, Sequence[Row]], int],
    read: Callable[[Sequence[Row]], LLMBatch],
) -> Callable[[Any], int]:
    """One optimizer step over rows that are collated by `read`, and what it is counted as."""
    optimizer = torch.optim.AdamW(parameter_groups(model, bench.config))

    def step(rows: Sequence[Row]) -> int:
        batch = read(rows)
        preference, _ = model(batch)
        (preference / len(batch.targets)).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return count(batch, rows)

    return step


def supervised(batch: LLMBatch, rows: Sequence[Row]) -> int:
    return len(batch.targets)


def prefix_cases(name: str, log: InteractionLog, layers: int, seconds: float) -> list[Case]:
    bench = Bench(log, layers)
    ours = rate(bench.steps(), trainer(bench, bench.model(), supervised, bench.packed), seconds)

    def rival(rows: Sequence[Row]) -> float:
        return rate(
            bench.buckets(rows, True), trainer(bench, bench.model(PlainLM), supervised, bench.collator), seconds
        )

    plain, repeated = rival(bench.prefixes()), rival(bench.windows)
    bucketed = rate(bench.buckets(bench.windows), trainer(bench, bench.model(), supervised, bench.collator), seconds)
    said = f"supervised preferences, {name}, {layers} layers"
    places = [bench.packed(rows).input_ids.numel() for rows in bench.steps()]
    padding = 1 - int(bench.collator.sizes(bench.windows).sum()) / sum(places)
    return [
        Case("prefixes", said, "per s", ours, plain, "one prompt per prefix", ours / plain),
        Case("prefixes", said, "per s", ours, repeated, "the instruction in every row", ours / repeated),
        Case("prefixes", said, "per s", ours, bucketed, "a row a window, batches by length", ours / bucketed),
        Case("prefixes", f"share of padding, {name}", "", padding),
    ]


def hf_step(bench: Bench, head: bool) -> Callable[[Any], int]:
    """A plain Hugging Face loop over the same rows as text: every next word is predicted, every weight trained.
    `head` puts the instruction into each row. Counts the tokens of the histories, as `trainer` does for ours."""
    lm = bench.model().lm.requires_grad_(True)
    optimizer = torch.optim.AdamW(lm.parameters(), lr=1e-4)

    def step(rows: Sequence[Row]) -> int:
        batch = bench.collator(rows)
        ids, sizes = batch.input_ids, torch.from_numpy(bench.collator.sizes(rows))
        mask = (torch.arange(ids.shape[1])[None, :] < sizes[:, None]).long()
        if head:
            ids = torch.cat([batch.head_ids.expand(len(ids), -1), ids], dim=1)
            mask = torch.cat([torch.ones(len(ids), len(batch.head_ids), dtype=torch.long), mask], dim=1)
        lm(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return int(sizes.sum())

    return step


def loop_cases(bench: Bench, layers: int, seconds: float) -> tuple[list[Case], float, float]:
    """Our model beside the plain loop, all in this process; also both rates."""

    def tokens(batch: LLMBatch, rows: Sequence[Row]) -> int:
        return int(bench.collator.sizes(rows).sum())

    ours = rate(bench.steps(), trainer(bench, bench.model(), tokens, bench.packed), seconds)
    batches = bench.buckets(bench.windows)
    with_head, without = (rate(batches, hf_step(bench, head), seconds) for head in (True, False))
    said = f"history tokens, one process, histories of 20, {layers} layers"
    cases = [
        Case("tokens", said, "per s", ours, with_head, "plain HF loop, instruction in every row", ours / with_head),
        Case("tokens", said, "per s", ours, without, "plain HF loop, no instruction", ours / without),
    ]
    return cases, ours, without


def timed_loop(arguments: dict[str, Any]) -> None:
    """The stage's own loop on a Ray Train worker, with a stamp at every step and the most memory it had."""
    stamps: list[float] = []
    most, stop = [0.0], threading.Event()

    class Stamps:
        def __init__(self, logs: str, total_steps: int) -> None:
            pass

        def step(self, step: int, scalars: Any) -> None:
            stamps.append(time.perf_counter())

        def close(self) -> None:
            pass

    def watch() -> None:
        while not stop.wait(0.02):
            most[0] = max(most[0], anonymous_memory())

    training.StepLog = Stamps  # type: ignore[misc,assignment]
    threading.Thread(target=watch, daemon=True).start()
    train.train_loop(arguments)
    stop.set()
    facts = {"stamps": stamps, "memory": most[0]}
    Path(arguments["logs"], f"timed-{training.rank()}.json").write_text(json.dumps(facts))


def stage_cases(bench: Bench, layers: int, ours: float, plain: float, stages: Sequence[int]) -> list[Case]:
    """The stage itself, through Ray Train and DeepSpeed, on one worker and on two, and other ZeRO stages on two."""
    found = {}
    for workers, stage in ((1, 2), *((2, stage) for stage in stages)):
        with tempfile.TemporaryDirectory() as root:
            found[workers, stage] = one_run(Path(root), bench, workers, stage)
    one, two = found[1, 2][0], found[2, 2][0]
    said = f"history tokens, Ray Train and ZeRO 2, {layers} layers"
    cases = [
        Case("stage", f"{said}, one worker", "per s", one, plain, "plain HF loop, no instruction", one / plain),
        Case("stage", f"{said}, one worker", "per s", one, ours, "our model in a plain loop", one / ours),
        Case("stage", f"{said}, two workers", "per s", two, one, "one worker with both cores", two / one),
    ]
    least = stages[0]
    for stage in stages:
        memory, other = found[2, stage][1] / 1e6, found[2, least][1] / 1e6
        label = f"most of a worker, two workers, ZeRO {stage}, {layers} layers"
        cases.append(Case("memory", label, "MB", memory, other, f"ZeRO {least}", other / memory))
    return cases


def one_run(root: Path, bench: Bench, workers: int, stage: int) -> tuple[float, float]:
    """(history tokens per second, bytes of anonymous memory of the larger worker)"""
    config = bench.config.model_copy(update={"zero_stage": stage, "epochs": 1})
    for name, artifact in (
        ("interactions", bench.log),
        (
            "tokens",
            NodeArrays(
                np.zeros((1, WAYS, bench.collator.item_tokens.shape[2]), np.float32), bench.collator.item_tokens
            ),
        ),
        ("embeddings", NodeArrays(np.zeros((1, DIM), np.float32), bench.vectors)),
    ):
        (root / name).mkdir()
        artifact.save(root / name)
    resources = load_config(None, [f"resources.llm.num_workers={workers}"]).resources.llm
    run = Run(str(root), "bench")
    training.run_training(
        timed_loop,
        {
            "config": config.model_dump(),
            "seed": 0,
            "backbone": str(bench.backbone),
            **{name: str(root / name) for name in ("interactions", "tokens", "embeddings")},
        },
        run=run,
        stage="llm",
        key="bench",
        resources=resources,
    )
    tokens = int(bench.collator.sizes(bench.windows).sum()) / len(bench.steps())
    facts = [json.loads((run.root / "logs" / "llm" / f"timed-{rank}.json").read_text()) for rank in range(workers)]
    stamps = facts[0]["stamps"]
    warm = min(3, len(stamps) // 2)
    per_second = (len(stamps) - 1 - warm) * tokens / (stamps[-1] - stamps[warm])
    return per_second, max(each["memory"] for each in facts)


def main() -> None:
    parser = report.parser(__doc__)
    parser.add_argument("--data-dir", default=os.environ.get("CTD_DATA_DIR", ""), help="folder of the ready-made sets")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    training.start_ray()
    layers, seconds = LAYERS[options.size], SECONDS[options.size]
    full = options.size == "full"
    twenty = histories_of(20, 600 if full else 150)
    cases: list[Case] = []

    def add(measured: list[Case]) -> None:
        report.show(measured)
        cases.extend(measured)
        report.write(cases, options.json)

    add(prefix_cases("histories of 20", twenty, layers, seconds))
    if full:
        add(prefix_cases("beauty", beauty(options.data_dir), layers, seconds))
    bench = Bench(twenty, layers)
    measured, ours, plain = loop_cases(bench, layers, seconds)
    add(measured)
    add(stage_cases(bench, layers, ours, plain, (0, 1, 2, 3) if full else (2,)))


if __name__ == "__main__":
    main()
