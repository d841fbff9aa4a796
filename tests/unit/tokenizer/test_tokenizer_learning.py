"""A low-rank planted set is reconstructed after a short training; a kill changes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ctd_scale.batches import NodeArrays
from ctd_scale.config import TokenizerConfig
from ctd_scale.tokenizer.train import load_tokenizer, reconstruction_cosine, tokenize, train_loop

RANK, EMBED, TOKEN = 3, 12, 16


def low_rank(rows: int, seed: int) -> np.ndarray:
    random = np.random.default_rng(seed)
    return (random.standard_normal((rows, RANK)) @ random.standard_normal((RANK, EMBED)) + 1).astype(np.float32)


def arguments(folder: Path, **settings: Any) -> dict[str, Any]:
    data = folder / "embeddings"
    data.mkdir()
    NodeArrays(low_rank(120, 0), low_rank(200, 1)).save(data)
    config = TokenizerConfig(hidden_dim=32, batch_size=64, **settings)
    return {"config": config.model_dump(), "seed": 0, "embeddings": str(data), "token_dim": TOKEN}


def test_a_planted_set_is_reconstructed(tmp_path: Path, one_worker: Any) -> None:
    given = arguments(tmp_path, steps=150, learning_rate=5e-3)
    export = one_worker.run(train_loop, given)
    data = NodeArrays.load(tmp_path / "embeddings")
    for side in ("users", "items"):
        embeddings = getattr(data, side)
        model = load_tokenizer(export / f"{side}.safetensors", TokenizerConfig.model_validate(given["config"]))
        assert not model.training
        assert reconstruction_cosine(model, embeddings) > 0.95
        tokens = torch.from_numpy(tokenize(model, embeddings))
        assert tokens.shape == (len(embeddings), 2, TOKEN)
        with torch.no_grad():  # the published tokens are enough: their sum gives the embedding back
            back = (model.decode(tokens) * model.std + model.mean).numpy()
        assert np.square(back - embeddings).mean() < 0.1 * embeddings.var()
        assert tokens.flatten(1).std(dim=0).min() > 0.1, "a token dimension collapsed"
    curve = [step["items_reconstruction"] for step in one_worker.curves]
    assert np.mean(curve[-20:]) < 0.3 * curve[0]


def test_a_killed_loop_ends_where_an_uninterrupted_one_ends(tmp_path: Path, one_worker: Any) -> None:
    given = arguments(tmp_path, steps=12, checkpoint_every_steps=5)
    export = one_worker.run(train_loop, given)
    whole = {side: load_file(export / f"{side}.safetensors") for side in ("users", "items")}
    one_worker.restart(die_at=2)
    with pytest.raises(KeyboardInterrupt):
        one_worker.run(train_loop, given)
    resumed = one_worker.run(train_loop, given)
    assert one_worker.steps == list(range(1, 13))
    for side, expected in whole.items():
        got = load_file(resumed / f"{side}.safetensors")
        assert got.keys() == expected.keys()
        for name, value in expected.items():
            assert torch.allclose(got[name], value, atol=1e-5), name
