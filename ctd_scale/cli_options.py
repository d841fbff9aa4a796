"""Options that several commands of `ctd` have."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated

import typer

from ctd_scale.config import RunConfig, load_config


def _require_name(name: str) -> str:
    """A run lies in a folder of its own, within the storage and not beside it."""
    if name in (".", "..") or "/" in name:
        raise ValueError(f"--name {name}: expected a name without a slash; --storage says where runs lie")
    return name


ConfigOption = Annotated[str, typer.Option("--config", "-c", help="TOML file, or a shipped name such as ml100k")]
StorageOption = Annotated[str, typer.Option(help="folder or fsspec URL that holds the runs")]
NameOption = Annotated[
    str,
    typer.Option(help="the run's name within the storage; default: that of the config", callback=_require_name),
]
SetOption = Annotated[list[str] | None, typer.Option("--set", help="stage.key=value, repeatable")]
DatasetOption = Annotated[str | None, typer.Option(help="ready-made set: ml-100k, software, beauty, lastfm")]
DataDirOption = Annotated[str | None, typer.Option(help="folder of the ready-made sets (env CTD_DATA_DIR)")]
InteractionsOption = Annotated[str | None, typer.Option(help="your log: Parquet, CSV or JSONL")]
ItemsOption = Annotated[str | None, typer.Option(help="your catalogue: Parquet, CSV or JSONL")]
RunOption = Annotated[str, typer.Option("--run", help="folder or URL of a finished run")]


def configured(
    config: str | None,
    overrides: Sequence[str] | None,
    dataset: str | None,
    data_dir: str | None,
    interactions: str | None,
    items: str | None,
) -> RunConfig:
    """The config file with the command line on top of it."""
    return load_config(config, overriding(overrides, dataset, data_dir, interactions, items))


def overriding(
    overrides: Sequence[str] | None,
    dataset: str | None,
    data_dir: str | None,
    interactions: str | None,
    items: str | None,
) -> list[str]:
    """The options as `stage.key=value`; `--set` comes last, and wins."""
    sources = {"data_dir": data_dir, "interactions": interactions, "items": items}
    ready_made = dataset is not None and dataset != "files"
    if ready_made and (interactions is not None or items is not None):
        raise ValueError(f"--dataset {dataset} is a ready-made set; leave it out to read --interactions and --items")
    chosen = [
        f"interactions.{key}={json.dumps(value, ensure_ascii=False)}"
        for key, value in sources.items()
        if value is not None
    ]
    if dataset is not None:
        chosen.append(f"interactions.dataset={dataset}")
        chosen += ["interactions.interactions=", "interactions.items="] if ready_made else []  # of the config
    elif interactions is not None or items is not None:
        chosen.append("interactions.dataset=files")
    return [*chosen, *(overrides or ())]
