"""Item vectors that are joined with what titles and categories say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ctd_scale.batches import Catalogue
from ctd_scale.config import LLMConfig
from ctd_scale.llm.backbone import load_text_tokenizer
from ctd_scale.llm.descriptions import describe_items
from ctd_scale.llm.losses import softmax_loss
from ctd_scale.llm.model import PreferenceHead
from ctd_scale.llm.prompts import Prompts, make_prompts
from ctd_scale.llm.train import new_model, parameter_groups
from ctd_scale.llm.weights import export_model, load_model, load_vectors

TITLES = ["red shoe", "red boot", "green tea", "green leaf tea", "red shoe"]


@pytest.fixture
def prompts(backbone: Path) -> Prompts:
    catalogue = Catalogue([str(number) for number in range(5)], TITLES, ["", "shoes", "", "", ""])
    return make_prompts(load_text_tokenizer(backbone), catalogue, 6)


def test_descriptions_are_the_singular_vectors_of_weighed_tokens(prompts: Prompts) -> None:
    answers = [prompts.answer(item).tolist() for item in range(5)]
    having = {word: sum(word in answer for answer in answers) for word in np.concatenate(answers)}
    kept = sorted(word for word, often in having.items() if 1 < often < 5)
    weighed = np.array([[np.log(6 / (having[word] + 1)) * (word in answer) for word in kept] for answer in answers])
    weighed /= np.linalg.norm(weighed, axis=1, keepdims=True)
    axes = np.linalg.svd(weighed, full_matrices=False)[2]
    for dim in (2, 512):
        expected = weighed @ axes[:dim].T
        expected -= expected.mean(axis=0)
        expected /= np.linalg.norm(expected, axis=1, keepdims=True)
        found = describe_items(prompts, dim).numpy()
        assert np.allclose(found @ found.T, expected @ expected.T, atol=1e-4), "the same up to a rotation"
    assert [prompts.answer(item).tolist() for item in range(5)] == answers, "the answers are not touched"
    assert torch.equal(describe_items(prompts), describe_items(prompts))
    assert torch.equal(describe_items(prompts)[0], describe_items(prompts)[4]), "one text, one description"


def test_items_whose_answers_say_the_same_or_nothing_in_common_are_described_by_nothing(backbone: Path) -> None:
    same = make_prompts(load_text_tokenizer(backbone), Catalogue(["a", "b"], ["x", "x"], ["", ""]), 6)
    assert torch.equal(describe_items(same), torch.zeros(2, 1))


def test_an_item_that_nobody_chose_is_found_by_its_words(prompts: Prompts) -> None:
    # Whoever chose item 0 chooses tea (2); item 3, tea too, is never a target and never a negative's target.
    torch.manual_seed(0)
    head = PreferenceHead(
        4, 0.1 * torch.randn(5, 6), 0.1, learn_vectors=True, recency=False, descriptions=describe_items(prompts)
    )
    states, targets = torch.eye(4)[[0, 1, 0, 1]], torch.tensor([2, 1, 2, 1])
    optimizer = torch.optim.Adam(head.parameters(), lr=0.02)
    for _ in range(150):
        optimizer.zero_grad()
        preferences = head(states, torch.full((4, 4), -1))
        softmax_loss(preferences, head.item_vectors()[:3], targets, head.temperature).backward()
        optimizer.step()
    scores = F.normalize(head(states[:1], torch.full((1, 4), -1)), dim=1) @ F.normalize(head.item_vectors(), dim=1).T
    assert scores[0].argsort(descending=True).tolist()[:2] == [2, 3]
    some = torch.tensor([[3, 0], [1, 1]])
    assert torch.allclose(head.item_vectors(some), head.item_vectors()[some], atol=1e-6)


def test_they_are_trained_and_published_as_plain_vectors(prompts: Prompts, backbone: Path, tmp_path: Path) -> None:
    config = LLMConfig(num_hidden_layers=1, item_vectors="joined", preference_dim=8)
    embeddings = np.random.default_rng(0).standard_normal((5, 8)).astype(np.float32)
    model = new_model(config, backbone, embeddings, 0, prompts)
    assert torch.equal(
        model.head.describe.weight, new_model(config, backbone, embeddings, 0, prompts).head.describe.weight
    )
    _, fresh = parameter_groups(model, config)
    assert any(parameter is model.head.describe.weight for parameter in fresh["params"])
    trained = {"head.describe.weight": torch.randn_like(model.head.describe.weight)}
    export_model(tmp_path, model, trained, torch.float32)
    expected = embeddings_of(model)
    assert np.allclose(load_vectors(tmp_path), expected, atol=1e-6)
    loaded = load_model(tmp_path, torch.float32)
    assert loaded.head.describe is None
    assert np.allclose(loaded.head.item_vectors().numpy(), expected, atol=1e-6)
    with pytest.raises(ValueError, match="joined"):
        new_model(config, backbone, embeddings, 0)


def embeddings_of(model: object) -> np.ndarray:
    head = model.head  # type: ignore[attr-defined]
    return (head.vectors + head.descriptions @ head.describe.weight.T).detach().numpy()
