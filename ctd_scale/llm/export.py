"""Preferences of all users by Ray Data batch inference: every training prefix, and the validation and test histories.

The condition that diffusion trains on and the one it meets when it serves come from this same computation.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ctd_scale.artifacts import Run
from ctd_scale.batches import SPLITS, InteractionLog, NodeArrays, Preferences, Split
from ctd_scale.config import LLMConfig, RunConfig
from ctd_scale.llm.collator import Row
from ctd_scale.llm.inference import PreferenceModel
from ctd_scale.llm.train import window_row
from ctd_scale.llm.windows import export_windows
from ctd_scale.parts import read_parts, write_parts
from ctd_scale.terminal import console

ORDER: tuple[Literal["train"] | Split, ...] = ("train", *SPLITS)
# Rows of one part: enough to bucket by length, few enough to lose little in a kill.
LEAST_ROWS, MOST_ROWS, PARTS = 128, 4096, 64


def export_preferences(run: Run, config: RunConfig, config_hash: str) -> None:
    """interactions, tokens, models/llm -> preferences/{train,validation,test}.parquet.

    Goes on where it was interrupted: what is read is kept in parts beside the checkpoints.
    """
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
    }
    with run.publish("preferences", config_hash=config_hash, inputs=inputs, facts=facts) as folder:
        table = _infer(log, maker, config, run, f"{run.checkpoints}/preferences-{config_hash[:12]}")
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
            console.print(f"  preferences: {len(preferences):,} of {split}", highlight=False)


def jobs(log: InteractionLog, split: Split | Literal["train"], config: LLMConfig) -> list[Row]:
    """What is read for a split, as rows of the LLM: windows of the training prefixes, or one history a user."""
    if split == "train":
        windows = export_windows(log.train_lengths(), config)
        return [window_row(log, windows, index) for index in range(len(windows))]
    users = log.split_users(split)
    targets = log.targets(users, split)
    return [
        Row(np.asarray(log.history(user, split)[-config.max_history :]), targets[index : index + 1], user=user)
        for index, user in enumerate(users.tolist())
    ]


def _infer(log: InteractionLog, maker: dict[str, Any], config: RunConfig, run: Run, folder: str) -> pa.Table:
    """All rows of all splits through one pool of actors, in order."""
    count = sum(len(jobs(log, split, config.llm)) for split in ORDER)
    size = min(max(LEAST_ROWS, -(-count // PARTS)), MOST_ROWS)
    parts = -(-count // size)
    write_parts(
        PredictPreferences,
        {**maker, "part_rows": size},
        parts,
        folder,
        stage="preferences",
        logs=run.root / "logs" / "preferences",
        resources=config.resources.llm,
    )
    return read_parts(folder, parts).combine_chunks()


class PredictPreferences:
    """The model in one actor, and the rows of one part after the other."""

    def __init__(self, config: dict[str, Any], interactions: str, tokens: str, llm: str, part_rows: int) -> None:
        self._config, self._part_rows = LLMConfig.model_validate(config), part_rows
        log = InteractionLog.load(Path(interactions))
        self._model = PreferenceModel(Path(llm), NodeArrays.load(Path(tokens)), log.catalogue, self._config)
        self._rows = [(number, row) for number, split in enumerate(ORDER) for row in jobs(log, split, self._config)]

    def table(self, part: int) -> pa.Table:
        """A line for every supervised position of the part's rows."""
        first = part * self._part_rows
        splits, rows = map(list, zip(*self._rows[first : first + self._part_rows], strict=True))
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
                "split": np.repeat(splits, repeats),
                "user_index": np.repeat([row.user for row in rows], repeats).astype(np.int32),
                "target_index": np.concatenate([row.targets for row in rows]).astype(np.int32),
                "preference": pa.FixedSizeListArray.from_arrays(pa.array(flat.ravel()), flat.shape[1]),
                "text": pa.array(np.repeat(texts, repeats), type=pa.string()),
            }
        )
