"""`ctd bench ablation`: the chain with one of its parts at a time left out or exchanged, against the whole one.

The whole chain is the run that `ctd bench quality` makes, `{storage}/{set}-{seed}`; without a part it is another one
beside it, which trains what depends on that part alone: all else is linked from the first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ctd_scale.artifacts import Run, link_artifact
from ctd_scale.batches import SPLITS
from ctd_scale.config import ConfigError, RunConfig
from ctd_scale.pipeline import STAGES, is_current, stage_hash
from ctd_scale.quality import CHAIN, Measured, Row, configs_for, measure, protocol_under, row_of
from ctd_scale.terminal import console

# What each sets. What the text factor gives is in every table: `full_text` beside `full`.
ABLATIONS: dict[str, tuple[str, ...]] = {
    "no_masking": ("tokenizer.mask_ratio=0",),
    "one_way": ("tokenizer.num_ways=1",),
    "four_ways": ("tokenizer.num_ways=4",),
    "frozen_vectors": ("llm.item_vectors=collaborative",),
    "no_latest_items": ("llm.recency=false",),
    "no_history_blocks": ("history.num_blocks=0",),
    "no_neighbors": ("retrieval.neighbors=0",),
    "no_contrastive_loss": ("diffusion.contrastive_weight=0",),
    "no_recommendation_loss": ("diffusion.recommendation_weight=0",),
    "popular_negatives": ("diffusion.contrastive_negatives=popularity",),
    "hard_negatives": ("diffusion.contrastive_negatives=hard",),
    "min_snr": ("diffusion.min_snr=5",),
    "noise_prediction": ("diffusion.prediction_type=epsilon",),
    "velocity_prediction": ("diffusion.prediction_type=v_prediction",),
    "attends_to_items": ("diffusion.condition_items=20",),
    "one_call_sampler": ("diffusion.sampler=distilled",),
}


def ablate(
    dataset: str,
    ablations: Sequence[str],
    models: Sequence[str],
    seeds: Sequence[int],
    storage: str,
    overrides: Sequence[str],
) -> list[Row]:
    """Rows of the whole chain, and of every ablation as `ablation: model` with its difference to the same model of the
    whole chain, over the same users.

    Raises ConfigError, before anything is trained: an unknown ablation, no model or one that is not of the chain, a
    config that cannot be used with one of the ablations, a storage that is not a folder.
    """
    if not models:
        raise ConfigError(f"--models is empty; models: {', '.join(CHAIN)}")
    for given, known in ((ablations, tuple(ABLATIONS)), (models, CHAIN)):
        if unknown := [name for name in given if name not in known]:
            raise ConfigError(f"no {unknown[0]!r} among {', '.join(known)}")
    if not Run(storage, "").is_local:
        raise ConfigError(f"{storage}: files are linked between runs, so --storage must be a folder")
    configs = configs_for(dataset, models, seeds, overrides)
    changed = {name: configs_for(dataset, models, seeds, [*overrides, *ABLATIONS[name]]) for name in ablations}
    measured: list[Measured] = []
    protocol: dict[str, Any] = {}
    for place, seed in enumerate(seeds):
        base, config = Run(storage, f"{Path(dataset).stem}-{seed}"), configs[place]
        console.print(f"{dataset}, seed {seed}: [bold]{base.url}[/]", highlight=False)
        measured += measure(base, config, models)
        protocol = protocol_under(dataset, base, config)
        for name in ablations:
            own = Run(storage, f"{base.name}-{name}")
            console.print(f"{' '.join(ABLATIONS[name])}: [bold]{own.url}[/]", highlight=False)
            borrow(own, base, changed[name][place])
            found = measure(own, changed[name][place], models)
            measured += [replace(each, model=f"{name}: {each.model}") for each in found]
    rows = []
    for split in SPLITS:
        for model in models:
            for shown in (model, *(f"{name}: {model}" for name in ablations)):
                rows.append(row_of(measured, protocol, shown, split, model))
    return rows


def borrow(own: Run, base: Run, config: RunConfig) -> None:
    """Link to every artifact of `base` that a stage under `config` would make the same, and `own` has not."""
    for stage in STAGES:
        if any(own.manifest(name) is None for name in stage.inputs):
            continue
        key = stage_hash(stage, own, config)
        if not is_current(stage, own, key) and is_current(stage, base, key):
            for name in stage.outputs:
                link_artifact(name, base, own)
