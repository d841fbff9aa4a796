"""What stands beside a title, and when it is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ctd_scale.batches import NodeArrays
from ctd_scale.config import LLMConfig
from ctd_scale.llm.collator import Collator, Row
from ctd_scale.llm.model import ProjectionAdapter
from ctd_scale.llm.prompts import make_prompts
from ctd_scale.llm.tokens import load_item_tokens
from ctd_scale.llm.train import dropped_share, learning_rates, new_model
from ctd_scale.llm.weights import export_model, load_model

EMBED_DIM, TOKEN_DIM = 12, 32


@pytest.fixture
def embeddings(tmp_path: Path) -> NodeArrays:
    random = np.random.default_rng(0)
    made = NodeArrays(*(random.standard_normal((count, EMBED_DIM)).astype(np.float32) for count in (6, 20)))
    made.save(tmp_path)
    return made


def config_for(tiny_chain: Any, **changes: Any) -> LLMConfig:
    return LLMConfig.model_validate({**tiny_chain.config.model_dump(), **changes})


@pytest.mark.parametrize(("item_tokens", "ways", "width"), [("projected", 1, EMBED_DIM), ("none", 0, TOKEN_DIM)])
def test_the_preference_is_read_after_each_items_last_token(
    item_tokens: str, ways: int, width: int, tiny_chain: Any, backbone: Path, text_tokenizer: Any,
    embeddings: NodeArrays, tmp_path: Path,
) -> None:  # fmt: skip
    """A published model gives after a history what it gives after that prefix of a longer one, and the items matter."""
    config = config_for(tiny_chain, item_tokens=item_tokens)
    tokens = load_item_tokens(tmp_path, config, TOKEN_DIM)
    assert tokens.items.shape == (20, ways, width)
    prompts = make_prompts(text_tokenizer, tiny_chain.log.catalogue, config.max_title_tokens)
    collator = Collator(prompts, tokens.items)
    model = new_model(config, backbone, np.asarray(embeddings.items), seed=0)
    export_model(tmp_path / "model", model, {}, torch.float32)
    loaded = load_model(tmp_path / "model", torch.float32)
    items = np.array([3, 8, 1], np.int32)
    with torch.inference_mode():
        whole = loaded.preferences(collator([Row(items, np.zeros(3, np.int64))]))
        for length in (1, 2, 3):
            alone = loaded.preferences(collator([Row(items[:length], np.zeros(1, np.int64))]))
            torch.testing.assert_close(alone[0], whole[length - 1], atol=1e-5, rtol=1e-4)
        other = loaded.preferences(collator([Row(np.array([3, 9, 1], np.int32), np.zeros(3, np.int64))]))
    torch.testing.assert_close(other[0], whole[0])
    assert (other[1:] - whole[1:]).abs().max() > 1e-3


def test_an_embedding_that_is_not_read_projects_to_nothing() -> None:
    adapter = ProjectionAdapter(EMBED_DIM, TOKEN_DIM, scale=0.5)
    torch.nn.init.normal_(adapter.leave.bias)
    projected = adapter(torch.stack([torch.zeros(EMBED_DIM), torch.randn(EMBED_DIM)]))
    assert not projected[0].any()
    torch.testing.assert_close(projected[1].square().mean().sqrt(), torch.tensor(0.5), atol=1e-3, rtol=1e-3)


def test_when_tokens_are_read_and_what_is_trained_then() -> None:
    always, curriculum, second = (
        LLMConfig(token_schedule=schedule, token_dropout=0.1, warmup_fraction=0.1)  # type: ignore[arg-type]
        for schedule in ("always", "curriculum", "second_half")
    )
    assert [dropped_share(always, progress) for progress in (0.0, 0.9)] == [0.1, 0.1]
    assert [dropped_share(curriculum, progress) for progress in (0.0, 0.25, 0.95)] == [1.0, 0.75, 0.1]
    assert [dropped_share(second, progress) for progress in (0.0, 0.49, 0.5)] == [1.0, 1.0, 0.1]
    backbone, fresh = learning_rates(second, 100)
    assert [backbone(step) > 0 for step in (0, 49, 50, 99)] == [True, True, False, False]
    assert all(fresh(step) > 0 for step in range(100))
    assert all(rate(step) > 0 for rate in learning_rates(always, 100) for step in range(100))
