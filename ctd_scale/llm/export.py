"""Preferences of all users by Ray Data batch inference: every training prefix, and the validation and test histories.

The condition that diffusion trains on and the one it meets when it serves come from this same computation.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray.data
import torch

from ctd_scale import training
from ctd_scale.artifacts import Run
from ctd_scale.batches import SPLITS, InteractionLog, NodeArrays, Preferences, Split
from ctd_scale.config import LLMConfig, RunConfig
from ctd_scale.llm.collator import Row
from ctd_scale.llm.inference import PreferenceModel
from ctd_scale.llm.train import window_row
from ctd_scale.llm.windows import export_windows

ORDER: tuple[Literal["train"] | Split, ...] = ("train", *SPLITS)
# Rows of one Ray Data task: enough to bucket by length, few enough to show progress.
ROWS_PER_TASK = 128


def export_preferences(run: Run, config: RunConfig, config_hash: str) -> None:
    """interactions, tokens, models/llm -> preferences/{train,validation,test}.parquet."""
    interactions, tokens, llm = (run.fetch(name) for name in ("interactions", "tokens", "models/llm"))
    run.require_made_from(llm, interactions, tokens)
    log = InteractionLog.load(interactions.path)
    inputs = {artifact.name: artifact.digest for artifact in (interactions, tokens, llm)}
    facts: dict[str, Any] = {"cond_dim": config.llm.preference_dim}
    maker = {
        "config": config.llm.model_dump(),
        "interactions": str(interactions.path),
        "tokens": str(tokens.path),
        "llm": str(llm.path),
        "threads": training.threads_per_worker(config.resources.llm),
    }
    with run.publish("preferences", config_hash=config_hash, inputs=inputs, facts=facts) as folder:
        table = _infer(log, maker, config, run.root / "logs" / "preferences")
        for number, split in enumerate(ORDER):
            rows = table.filter(pc.equal(table["split"], number))
            preferences = Preferences(
                users=rows["user_index"].to_numpy(),
                targets=rows["target_index"].to_numpy(),
                vectors=rows["preference"].combine_chunks().flatten().to_numpy().reshape(len(rows), -1),
                texts=rows["text"].to_pylist(),
            )
            facts[f"{split}_rows"] = len(preferences)
            preferences.save(folder, split)
            training.console.print(f"  preferences: {len(preferences):,} of {split}", highlight=False)


def jobs(log: InteractionLog, split: Split | Literal["train"], config: LLMConfig) -> list[Row]:
    """What is read for a split, as rows of the LLM: windows of the training prefixes, or one history a user."""
    if split == "train":
        windows = export_windows(log.train_lengths(), config)
        return [window_row(log, windows, index) for index in range(len(windows))]
    users = log.split_users()
    targets = log.targets(users, split)
    return [
        Row(np.asarray(log.history(user, split)[-config.max_history :]), targets[index : index + 1], user=user)
        for index, user in enumerate(users.tolist())
    ]


def _infer(log: InteractionLog, maker: dict[str, Any], config: RunConfig, logs: Path) -> pa.Table:
    """All rows of all splits through one pool of actors, in order."""
    training.start_ray()
    resources = config.resources.llm
    count = sum(len(jobs(log, split, config.llm)) for split in ORDER)
    dataset = ray.data.range(count, override_num_blocks=max(1, -(-count // ROWS_PER_TASK))).map_batches(
        PredictPreferences,
        fn_constructor_kwargs=maker,
        concurrency=resources.num_workers,
        num_gpus=1 if resources.use_gpu else 0,
        batch_size=ROWS_PER_TASK,
    )
    tables, done = [], 0
    with training.shown_progress("preferences", logs):
        for table in dataset.iter_batches(batch_size=None, batch_format="pyarrow"):
            tables.append(table)
            done += len(table["order"].unique())
            training.write_progress(logs, done, count)
    return pa.concat_tables(tables).sort_by([("order", "ascending"), ("place", "ascending")]).combine_chunks()


class PredictPreferences:
    """A Ray Data actor that holds the model and reads rows by number."""

    def __init__(self, config: dict[str, Any], interactions: str, tokens: str, llm: str, threads: int) -> None:
        torch.set_num_threads(threads)
        self._config = LLMConfig.model_validate(config)
        log = InteractionLog.load(Path(interactions))
        self._model = PreferenceModel(Path(llm), NodeArrays.load(Path(tokens)), log.catalogue, self._config)
        self._rows = [(number, row) for number, split in enumerate(ORDER) for row in jobs(log, split, self._config)]

    def __call__(self, batch: dict[str, np.ndarray]) -> pa.Table:
        numbers = batch["id"].tolist()
        splits = [self._rows[number][0] for number in numbers]
        rows = [self._rows[number][1] for number in numbers]
        vectors = self._model.prefix_preferences(rows)
        texts = np.full(len(rows), "", dtype=object)
        spoken = [index for index, split in enumerate(splits) if ORDER[split] != "train"]
        if spoken and self._config.generate_texts:
            histories, users = zip(*((rows[index].items, rows[index].user) for index in spoken), strict=True)
            texts[spoken] = self._model.texts(histories, users)
        repeats = [len(row.targets) for row in rows]
        flat = np.concatenate(vectors)
        return pa.table(
            {
                "order": np.repeat(numbers, repeats),
                "place": np.concatenate([np.arange(count) for count in repeats]),
                "split": np.repeat(splits, repeats),
                "user_index": np.repeat([row.user for row in rows], repeats).astype(np.int32),
                "target_index": np.concatenate([row.targets for row in rows]).astype(np.int32),
                "preference": pa.FixedSizeListArray.from_arrays(pa.array(flat.ravel()), flat.shape[1]),
                "text": pa.array(np.repeat(texts, repeats), type=pa.string()),
            }
        )
