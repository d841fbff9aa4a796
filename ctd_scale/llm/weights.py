"""The published preference model: a Hugging Face folder plus adapter and head, in safetensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from ctd_scale.llm.backbone import load_causal_lm
from ctd_scale.llm.model import PreferenceLM, build_preference_lm
from ctd_scale.llm.reader import reader_of

BACKBONE, HEADS = "backbone", "heads.safetensors"
PROJECTION = "adapter.enter.weight"
READER = "head.reader."


def export_model(folder: Path, model: PreferenceLM, trained: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
    """Write a trained model: `trained` overrides the weights of `model`; LoRA is merged into the backbone, and what
    descriptions add to the item vectors into these."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in trained:
                parameter.copy_(trained[name])
    lm = model.lm
    for module in lm.modules():
        if hasattr(module, "merge") and hasattr(module, "base_layer"):
            module.merge()
    lm.to(dtype)
    lm.save_pretrained(folder / BACKBONE, state_dict=_without_lora(lm))
    heads = {
        name: value.detach().float().contiguous()
        for name, value in model.state_dict().items()
        if not name.startswith(("lm.", "head.describe."))
    }
    with torch.no_grad():
        heads["head.vectors"] = model.head.item_vectors().float().contiguous()
    save_file(heads, folder / HEADS)


def load_model(folder: Path, dtype: torch.dtype) -> PreferenceLM:
    """A published model, ready for inference; heads stay fp32 values held in `dtype`."""
    heads = load_file(folder / HEADS)
    lm = load_causal_lm(folder / BACKBONE, dtype=dtype)
    projected_dim = heads[PROJECTION].shape[1] if PROJECTION in heads else None
    model = build_preference_lm(
        lm,
        heads["head.vectors"],
        1.0,
        learn_vectors=False,
        projected_dim=projected_dim,
        recency="head.recency" in heads,
        reader=reader_of(heads, READER),
    )
    model.load_state_dict(heads, strict=False)
    return model.to(dtype).eval().requires_grad_(False)


def load_vectors(folder: Path) -> np.ndarray:
    """Item vectors [items, cond_dim] float32: what the retriever searches and the diffusion model generates."""
    return np.asarray(load_file(folder / HEADS)["head.vectors"].numpy())


def temperature(folder: Path) -> float:
    """The learned temperature of the cosine softmax."""
    return float(load_file(folder / HEADS)["head.log_temperature"].exp())


def _without_lora(lm: Any) -> dict[str, torch.Tensor]:
    """State of the merged backbone under its plain names."""
    return {name.replace(".base_layer", ""): value for name, value in lm.state_dict().items() if "lora_" not in name}
