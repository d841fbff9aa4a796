"""Any Hugging Face causal LM serves as backbone: what it says is what its own forward says."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ctd_scale.config import ConfigError, LLMConfig
from ctd_scale.llm.backbone import backbone_folder, compute_dtype, hidden_size, load_causal_lm
from ctd_scale.llm.collator import Collator, LLMBatch, Row
from ctd_scale.llm.model import PreferenceLM, build_preference_lm
from ctd_scale.llm.prompts import make_prompts
from ctd_scale.llm.train import new_model

HISTORY = np.array([3, 17, 4, 4, 9])


@pytest.fixture(scope="module")
def collator(tiny_chain: Any, text_tokenizer: Any) -> Collator:
    prompts = make_prompts(text_tokenizer, tiny_chain.log.catalogue, tiny_chain.config.max_title_tokens)
    return Collator(prompts, tiny_chain.tokens.items)


def prefix_row(items: list[int] | np.ndarray, answer: int = -1) -> Row:
    return Row(np.asarray(items), np.zeros(len(items), np.int64), answer)


# Sizes and what sets each architecture apart: tied or own output embeddings, sliding windows, bounded or scaled logits.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Qwen2": {"tie_word_embeddings": True},
    "Qwen3": {"head_dim": 8},
    "Gemma2": {"head_dim": 8, "sliding_window": 16, "final_logit_softcapping": 3.0},
    "Gemma3Text": {"head_dim": 8, "sliding_window": 16},
    "SmolLM3": {"no_rope_layers": [1, 1, 1, 0]},
    "Granite": {"logits_scaling": 4.0},
    "Cohere": {"logit_scale": 0.25},
}


def save_tiny(folder: Path, architecture: str) -> Any:
    """A random model of four layers, saved as any Hugging Face model is."""
    import transformers

    sizes = {
        "vocab_size": 320,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.2,
        "pad_token_id": 2,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    torch.manual_seed(0)
    config = getattr(transformers, f"{architecture}Config")(**sizes, **ARCHITECTURES[architecture])
    name = architecture.removesuffix("Text")
    whole = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    whole.save_pretrained(folder)
    return whole


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_any_causal_lm_will_do_and_may_be_cut(tmp_path: Path, collator: Collator, architecture: str) -> None:
    whole = save_tiny(tmp_path, architecture)
    assert hidden_size(tmp_path) == 32
    assert backbone_folder(LLMConfig(backbone=str(tmp_path))) == tmp_path
    cut = load_causal_lm(tmp_path, num_hidden_layers=3).eval()
    assert len(cut.base_model.layers) == 3
    for name, value in cut.state_dict().items():
        assert torch.equal(value, whole.state_dict()[name]), name
    assert len(load_causal_lm(tmp_path).base_model.layers) == 4
    with pytest.raises(ConfigError, match=r"llm\.num_hidden_layers=5 but the backbone has 4"):
        load_causal_lm(tmp_path, num_hidden_layers=5)

    model = build_preference_lm(cut, torch.randn(20, 8), 0.1, learn_vectors=True).eval()
    rows = [prefix_row(HISTORY, answer=3), prefix_row(HISTORY[:2])]
    batch = collator(rows)
    preference, text = model(batch)
    (preference + text).backward()
    missing = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing
    with torch.no_grad():
        alone = model.preferences(collator([prefix_row(HISTORY)]))
        assert torch.allclose(alone, model.preferences(batch)[:5], atol=1e-4)
        # The model's own forward, with the whole prompt in one row and no cache.
        head = model.words(batch.head_ids)[None]
        said = model.lm(inputs_embeds=torch.cat([head, model.embed(batch)[:1]], dim=1), output_hidden_states=True)
        states = said.hidden_states[-1][0, len(batch.head_ids) :][batch.preference_positions[:5]]
        assert torch.allclose(model.head(states, batch.recent[:5]), alone, atol=1e-4)
        words = said.logits[0, len(batch.head_ids) + batch.answer_positions]
        assert F.cross_entropy(words, batch.answer_ids, reduction="sum").item() == pytest.approx(text.item(), rel=1e-4)


def learned_from(folder: Path, config: LLMConfig, batch: LLMBatch) -> dict[str, torch.Tensor]:
    """Both losses of a fresh model in training, and their gradients."""
    embeddings = np.random.default_rng(0).standard_normal((20, 8)).astype(np.float32)
    model = new_model(config, folder, embeddings, seed=0).train()
    assert model.lm.is_activation_checkpointing == config.gradient_checkpointing
    preference, text = model(batch)
    (preference + text).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return {"preference loss": preference.detach(), "text loss": text.detach(), **gradients}


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        spread = 0.0 if name.endswith("loss") else 1e-4 * float(other[name].abs().max() + 1)
        assert torch.allclose(value, other[name], rtol=1e-5, atol=spread), name


@pytest.mark.parametrize("architecture", ["Llama", "Gemma2", "Gemma3Text", "SmolLM3"])
def test_reading_the_head_once_gives_the_gradients_of_reading_it_in_every_row(
    tmp_path: Path, collator: Collator, architecture: str
) -> None:
    save_tiny(tmp_path, architecture)
    batch = collator([prefix_row(HISTORY, answer=3), prefix_row(HISTORY[:2]), prefix_row([7])])
    once, in_every_row = (
        learned_from(tmp_path, LLMConfig(num_hidden_layers=3, preference_dim=8, gradient_checkpointing=forget), batch)
        for forget in (False, True)
    )
    assert_same(once, in_every_row)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_packed_rows_give_the_losses_and_gradients_of_rows_alone(
    tmp_path: Path, collator: Collator, architecture: str, checkpointing: bool
) -> None:
    """Also where a sliding window (Gemma: 16 tokens) is shorter than head and row together."""
    save_tiny(tmp_path, architecture)
    config = LLMConfig(num_hidden_layers=4, preference_dim=8, gradient_checkpointing=checkpointing)
    rows = [prefix_row(HISTORY, answer=3), prefix_row(HISTORY[:2]), prefix_row([7], answer=1), prefix_row([1, 2, 3])]
    packed = collator.packed([[rows[0]], rows[1:]])
    assert_same(learned_from(tmp_path, config, packed), learned_from(tmp_path, config, collator(rows)))


def test_a_backbone_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"llm\.backbone=.* is neither 'smollm2-135m' nor a folder"):
        backbone_folder(LLMConfig(backbone=str(tmp_path)))


def test_the_word_embeddings_are_frozen(backbone: Path) -> None:
    model: PreferenceLM = build_preference_lm(load_causal_lm(backbone), torch.randn(4, 8), 0.1, learn_vectors=True)
    assert not model.lm.get_input_embeddings().weight.requires_grad
    assert model.head.temperature.item() == pytest.approx(0.1)


def test_auto_is_bfloat16_where_products_of_it_are_not_slow() -> None:
    chosen = compute_dtype("auto", torch.device("cpu"))
    assert compute_dtype("bfloat16", torch.device("cpu")) == torch.bfloat16
    assert compute_dtype("float32", torch.device("cuda")) == torch.float32

    def seconds(dtype: torch.dtype) -> float:
        left, right = torch.ones(512, 576, dtype=dtype), torch.ones(576, 1536, dtype=dtype)
        times = []
        for _ in range(5):
            started = time.perf_counter()
            left @ right
            times.append(time.perf_counter() - started)
        return min(times)

    ratio = seconds(torch.bfloat16) / seconds(torch.float32)
    # One way or the other by far: hundreds of per cent faster, or tens of times slower.
    assert (chosen == torch.bfloat16) == (ratio < 5)
