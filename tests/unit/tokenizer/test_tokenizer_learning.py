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


@pytest.fixture
def arguments(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "embeddings").mkdir()
    NodeArrays(low_rank(120, 0), low_rank(200, 1)).save(tmp_path / "embeddings")
    config = TokenizerConfig(hidden_dim=32, steps=250, batch_size=64, learning_rate=5e-3, checkpoint_every_steps=100)
    return {
        "config": config.model_dump(),
        "seed": 0,
        "embeddings": str(tmp_path / "embeddings"),
        "token_dim": TOKEN,
    }


def test_a_planted_set_is_reconstructed_also_after_a_kill(
    tmp_path: Path, one_worker: Any, arguments: dict[str, Any]
) -> None:
    export = one_worker.run(train_loop, arguments)
    config = TokenizerConfig.model_validate(arguments["config"])
    data = NodeArrays.load(tmp_path / "embeddings")
    for side in ("users", "items"):
        embeddings = getattr(data, side)
        model = load_tokenizer(export / f"{side}.safetensors", config)
        assert not model.training
        assert reconstruction_cosine(model, embeddings) > 0.95
        tokens = torch.from_numpy(tokenize(model, embeddings))
        assert tokens.shape == (len(embeddings), config.num_ways, TOKEN)
        with torch.no_grad():
            # The published tokens are enough: their sum gives the embedding back.
            back = model.decode(tokens) * model.std + model.mean
        error = (back - torch.tensor(np.array(embeddings))).square().mean() / torch.tensor(embeddings.var())
        assert error < 0.1
        assert tokens.flatten(1).std(dim=0).min() > 0.1, "no token dimension collapsed"
    curve = [step["items_reconstruction"] for step in one_worker.curves]
    assert np.mean(curve[-20:]) < 0.3 * curve[0]

    whole = {side: load_file(export / f"{side}.safetensors") for side in ("users", "items")}
    one_worker.checkpoints.clear()
    one_worker.folder = tmp_path / "killed"
    one_worker.folder.mkdir()
    one_worker.die_at = 2
    with pytest.raises(KeyboardInterrupt):
        one_worker.run(train_loop, arguments)
    resumed = one_worker.run(train_loop, arguments)
    for side, expected in whole.items():
        got = load_file(resumed / f"{side}.safetensors")
        assert got.keys() == expected.keys()
        for name, value in expected.items():
            assert torch.allclose(got[name], value, atol=1e-5), name
