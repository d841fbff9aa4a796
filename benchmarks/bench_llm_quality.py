"""What the savings of the LLM stage cost in quality: each beside the plain form, over the same supervised prefixes.

`all prefixes` is the stage: one causal pass, the instruction read once, rows packed end to end. `one prompt per prefix`
gives every prefix a prompt of its own, with the whole history that a window may hold, in the same optimizer steps.
`a row a window` reads the windows of the same steps unpacked. `batches by length` fills as many batches with windows of
like length, the usual way to save padding.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks import report
from benchmarks.report import Case
from ctd_scale import training
from ctd_scale.artifacts import Run
from ctd_scale.batches import SPLITS, InteractionLog, NodeArrays, Split
from ctd_scale.config import LLMConfig, load_config
from ctd_scale.llm.backbone import backbone_folder, load_text_tokenizer
from ctd_scale.llm.collator import Collator, LLMBatch, Row
from ctd_scale.llm.model import PreferenceLM
from ctd_scale.llm.prompts import make_prompts
from ctd_scale.llm.train import make_plan, new_model, parameter_groups, warmup_then_linear, window_row
from ctd_scale.llm.windows import pack
from ctd_scale.pipeline import run_stage, stage_named
from ctd_scale.ranking import rank_targets

DATASETS = ("ml100k", "lastfm")
CHANGES = {"max_history": 10, "max_windows": 1, "epochs": 2, "text_weight": 0.0, "num_hidden_layers": 4}
Steps = Iterator[list[Row]]


@dataclass(frozen=True)
class Inputs:
    """What the stage reads, and its settings."""

    log: InteractionLog
    items: np.ndarray
    collator: Collator
    config: LLMConfig
    backbone: Path


def make_inputs(dataset: str, data_dir: str, root: Path) -> Inputs:
    """Graph and tokens by the stages before, with fewer epochs."""
    overrides = [f'interactions.data_dir="{data_dir}"', "graph.epochs=10", "resources.graph.threads_per_worker=1"]
    config, run = load_config(dataset, overrides), Run(str(root), dataset)
    run.write_config(config)
    for name in ("prepare_interactions", "train_graph", "train_tokenizer"):
        run_stage(stage_named(name), run, config)
    log = InteractionLog.load(run.fetch("interactions").path)
    tokens = NodeArrays.load(run.fetch("tokens").path)
    backbone = backbone_folder(config.llm)
    prompts = make_prompts(load_text_tokenizer(backbone), log.catalogue, config.llm.max_title_tokens)
    items = np.asarray(NodeArrays.load(run.fetch("embeddings").path).items)
    return Inputs(log, items, Collator(prompts, np.asarray(tokens.items)), config.llm, backbone)


def all_prefixes(inputs: Inputs, config: LLMConfig, seed: int) -> Steps:
    plan = make_plan(inputs.log, inputs.collator, config, seed)
    for step in range(plan.total_steps):
        windows, numbers = plan.step(step)
        yield [window_row(inputs.log, windows, int(number)) for number in numbers]


def one_prompt_per_prefix(inputs: Inputs, config: LLMConfig, seed: int) -> Steps:
    plan = make_plan(inputs.log, inputs.collator, config, seed)
    for step in range(plan.total_steps):
        windows, numbers = plan.step(step)
        rows = []
        for number in numbers.tolist():
            user, start = int(windows.users[number]), int(windows.starts[number])
            sequence = inputs.log.train_sequence(user)
            for end in range(start, start + int(windows.lengths[number])):
                history = np.asarray(sequence[max(0, end + 1 - config.max_history) : end + 1])
                rows.append(Row(history, np.asarray(sequence[end + 1 : end + 2]), user=user))
        yield rows


def batches_by_length(inputs: Inputs, config: LLMConfig, seed: int) -> Steps:
    plan = make_plan(inputs.log, inputs.collator, config, seed)
    for number, epoch in enumerate(plan.epochs):
        parts = np.array_split(np.argsort(epoch.sizes, kind="stable"), len(epoch.batches))
        for place in np.random.default_rng((seed, number)).permutation(len(parts)):
            yield [window_row(inputs.log, epoch.windows, int(index)) for index in parts[place]]


FORMS: dict[str, Callable[[Inputs, LLMConfig, int], Steps]] = {
    "all prefixes": all_prefixes,
    "one prompt per prefix": one_prompt_per_prefix,
    "a row a window": all_prefixes,
    "batches by length": batches_by_length,
}


def batches(inputs: Inputs, form: str, rows: list[Row]) -> Iterator[LLMBatch]:
    """The rows of a step as they are read."""
    if form == "all prefixes":
        (lines,) = pack(inputs.collator.sizes(rows), parts=1)
        yield inputs.collator.packed([[rows[index] for index in line] for line in lines if line])
        return
    # In parts that fit: one prompt per prefix reads many times the tokens.
    rows = sorted(rows, key=lambda row: len(row.items))
    for part in np.array_split(np.arange(len(rows)), max(1, len(rows) // 64)):
        yield inputs.collator([rows[index] for index in part])


def train(inputs: Inputs, config: LLMConfig, form: str, seed: int) -> PreferenceLM:
    """fp32 weights under autocast: what ZeRO's master weights are, in one plain process."""
    model = new_model(config, inputs.backbone, inputs.items, seed, inputs.collator.prompts).train()
    optimizer = torch.optim.AdamW(parameter_groups(model, config), betas=(0.9, 0.98))
    total = sum(1 for _ in all_prefixes(inputs, config, seed))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, warmup_then_linear(config, total))
    for rows in FORMS[form](inputs, config, seed):
        supervised = sum(len(row.targets) for row in rows)
        for batch in batches(inputs, form, rows):
            with torch.autocast("cpu", torch.bfloat16):
                preference, _ = model(batch)
            (preference / supervised).backward()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], config.gradient_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
    return model.eval()


def ndcg(inputs: Inputs, config: LLMConfig, model: PreferenceLM, split: Split) -> float:
    """NDCG@10 of the preference alone over the whole catalogue, seen items masked."""
    directions = F.normalize(model.head.item_vectors(), dim=1)

    @torch.inference_mode()
    def scores(users: np.ndarray, histories: list[np.ndarray]) -> np.ndarray:
        rows = [Row(history[-config.max_history :], np.zeros(1, np.int64)) for history in histories]
        with torch.autocast("cpu", torch.bfloat16):
            preferences = model.preferences(inputs.collator(rows))
        return np.asarray((F.normalize(preferences.float(), dim=1) @ directions.T).numpy())

    ranks = rank_targets(inputs.log, scores, split, mask_seen=True, chunk_users=128)
    return ranks.summary(inputs.log.num_items)["ndcg@10"]


def form_cases(dataset: str, inputs: Inputs, seeds: int) -> list[Case]:
    config = inputs.config.model_copy(update=CHANGES)
    found: dict[str, list[tuple[float, float]]] = {}
    seconds: dict[str, float] = {}
    for form in FORMS:
        seconds[form], found[form] = 0.0, []
        for seed in range(seeds):
            started = time.perf_counter()
            model = train(inputs, config, form, seed)
            seconds[form] += (time.perf_counter() - started) / seeds
            found[form].append((ndcg(inputs, config, model, "validation"), ndcg(inputs, config, model, "test")))
            print(f"  {dataset}, {form}, seed {seed}: {time.perf_counter() - started:.0f} s", flush=True)
    cases = []
    for form in list(FORMS)[1:]:
        for number, split in enumerate(SPLITS):
            ours, rival = (np.array([pair[number] for pair in found[name]]) for name in ("all prefixes", form))
            said = f"NDCG@10, {split}, {dataset}, mean of {seeds} seeds, spread {ours.std():.4f} and {rival.std():.4f}"
            cases.append(Case("quality", said, "", ours.mean(), rival.mean(), form, ours.mean() / rival.mean()))
        ours_s, rival_s = seconds["all prefixes"], seconds[form]
        cases.append(Case("quality", f"training time, {dataset}", "s", ours_s, rival_s, form, rival_s / ours_s))
    return cases


def layer_cases(dataset: str, inputs: Inputs, layers: tuple[int, int]) -> list[Case]:
    """More layers against fewer, one epoch of the dataset's own config."""
    found = []
    for count in layers:
        config = inputs.config.model_copy(update={"num_hidden_layers": count, "epochs": 1, "text_weight": 0.0})
        started = time.perf_counter()
        model = train(inputs, config, "all prefixes", 0)
        found.append((time.perf_counter() - started, *(ndcg(inputs, config, model, split) for split in SPLITS)))
    (fast, *fewer), (slow, *more) = found
    rival = f"{layers[1]} layers"
    said = f"{layers[0]} layers, {dataset}, one epoch"
    return [
        *(
            Case("layers", f"NDCG@10, {split}, {said}", "", one, other, rival, one / other)
            for split, one, other in zip(SPLITS, fewer, more, strict=True)
        ),
        Case("layers", f"training time, {said}", "s", fast, slow, rival, slow / fast),
    ]


def main() -> None:
    parser = report.parser(__doc__)
    parser.add_argument("--data-dir", default=os.environ.get("CTD_DATA_DIR", ""), help="folder of the ready-made sets")
    options = parser.parse_args()
    training.start_ray()
    full = options.size == "full"
    cases: list[Case] = []
    with tempfile.TemporaryDirectory() as root:
        for dataset in DATASETS if full else DATASETS[:1]:
            inputs = make_inputs(dataset, options.data_dir, Path(root))
            measured = form_cases(dataset, inputs, 3 if full else 1)
            if dataset == "ml100k" and full:
                measured += layer_cases(dataset, inputs, (8, 30))
            report.show(measured)
            cases += measured
            report.write(cases, options.json)


if __name__ == "__main__":
    main()
