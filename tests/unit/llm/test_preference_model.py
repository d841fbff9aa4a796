"""The preference is causal: one pass gives what one prompt per prefix gives, alone or in a batch, with or without an
answer after it."""

from __future__ import annotations

import copy
import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from ctd_scale.config import ConfigError, LLMConfig
from ctd_scale.llm.backbone import load_causal_lm
from ctd_scale.llm.choices import AnswerChoices
from ctd_scale.llm.collator import Row
from ctd_scale.llm.history import READER
from ctd_scale.llm.inference import PreferenceModel
from ctd_scale.llm.losses import sampled_softmax_loss, softmax_loss
from ctd_scale.llm.model import TokenAdapter, word_scale
from ctd_scale.llm.prompts import make_category_answers
from ctd_scale.llm.reader import HistoryReader
from ctd_scale.llm.train import new_model, parameter_groups
from ctd_scale.llm.vectors import initial_vectors
from ctd_scale.llm.weights import BACKBONE, export_model, load_model, load_vectors, temperature

HISTORY = np.array([3, 17, 4, 4, 9])


@pytest.fixture(scope="module")
def served(tiny_chain: Any) -> PreferenceModel:
    model: PreferenceModel = tiny_chain.preference()
    return model


def prefix_row(items: list[int] | np.ndarray, answer: int = -1) -> Row:
    return Row(np.asarray(items), np.zeros(len(items), np.int64), answer)


@torch.no_grad()
def preferences(served: PreferenceModel, rows: list[Row], length: int | None = None) -> np.ndarray:
    return served.model.preferences(served.collator(rows, length)).numpy()


# -- causality -----------------------------------------------------------------------------------------------


def test_later_items_do_not_change_earlier_preferences(served: PreferenceModel) -> None:
    one = preferences(served, [prefix_row(HISTORY)])
    other = preferences(served, [prefix_row([3, 17, 4, 0, 12])])
    assert np.allclose(one[:3], other[:3], atol=1e-5)
    assert (np.abs(one[3:] - other[3:]).max(axis=1) > 1e-2).all()


def test_neither_answer_nor_padding_changes_a_preference(served: PreferenceModel) -> None:
    alone = preferences(served, [prefix_row(HISTORY)])
    for answer in (0, 5):
        assert np.allclose(preferences(served, [prefix_row(HISTORY, answer)]), alone, atol=1e-5)
    longer = int(served.collator.sizes([prefix_row(HISTORY)])[0]) + 40
    assert np.allclose(preferences(served, [prefix_row(HISTORY)], longer), alone, atol=1e-5)


def test_one_pass_gives_what_one_prompt_per_prefix_gives(served: PreferenceModel) -> None:
    (together,) = served.prefix_preferences([prefix_row(HISTORY)])
    apart = np.concatenate([served([HISTORY[: end + 1]]) for end in range(len(HISTORY))])
    assert together.shape == (5, 12)
    assert np.allclose(together, apart, atol=1e-4)
    assert np.abs(together[1:] - together[:-1]).max(axis=1).min() > 1e-2, "every item says something"


def test_a_batch_is_its_singles_in_the_order_given(served: PreferenceModel) -> None:
    random = np.random.default_rng(0)
    # More than one bucket, of unlike length, also longer than max_history.
    histories = [random.integers(0, 20, length) for length in random.integers(1, 9, 40)]
    batch = served(histories)
    singles = np.concatenate([served([history]) for history in histories])
    assert batch.dtype == np.float32
    assert np.allclose(batch, singles, atol=1e-5)
    cut = np.concatenate([served([history[-5:]]) for history in histories])
    assert np.allclose(singles, cut, atol=1e-5), "the latest max_history items are read"
    assert served([]).shape == (0, 12)


def test_title_and_tokens_of_an_item_are_both_read(served: PreferenceModel, tiny_chain: Any) -> None:
    batch = served.collator([prefix_row(HISTORY)])
    with torch.no_grad():
        before = served.model.preferences(batch)
        batch.token_values[0] += 1
        by_tokens = served.model.preferences(batch)
        batch = served.collator([prefix_row(HISTORY)])
        batch.input_ids[0, 0] += 1
        by_title = served.model.preferences(batch)
    assert (by_tokens - before).abs().max() > 1e-3
    assert (by_title - before).abs().max() > 1e-3


def test_an_empty_history_is_refused(served: PreferenceModel) -> None:
    with pytest.raises(ValueError, match="history 1 is empty"):
        served([HISTORY, HISTORY[:0]])


# -- texts ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text_choices", ["preferred", "catalogue", "category", "free"])
def test_a_text_is_decoded_greedily_alone_and_in_a_batch(
    tiny_chain: Any, text_tokenizer: Any, text_choices: str
) -> None:
    longest = 6 if text_choices == "free" else 60
    changes = {"text_choices": text_choices, "max_new_tokens": longest, "text_shortlist": 4}
    served = replace(tiny_chain, config=tiny_chain.config.model_copy(update=changes)).preference()
    histories = [HISTORY[:1], HISTORY, HISTORY[1:3]]
    texts = served.texts(histories)
    assert texts == [served.texts([history])[0] for history in histories]
    lm, prompts = served.model.lm, served.collator.prompts
    every_answer = [prompts.answer(item).tolist() for item in range(20)]
    directions = torch.nn.functional.normalize(served.model.head.vectors.detach(), dim=1).numpy()
    for history, text in zip(histories, texts, strict=True):
        answers = every_answer
        if text_choices == "category":
            (categories, _) = make_category_answers(text_tokenizer, tiny_chain.log.catalogue)
            answers = [categories.tolist()]
        if text_choices == "preferred":
            ranked = np.argsort(-(directions @ served([history])[0]))
            answers = [every_answer[item] for item in ranked[~np.isin(ranked, history)][:4]]
        with torch.no_grad():  # one token at a time, no cache, no padding
            embedded = served.model.embed(served.collator([prefix_row(history)]))
            head = lm.get_input_embeddings()(torch.tensor(prompts.head, dtype=torch.long))[None]
            embedded = torch.cat([head, embedded], dim=1)
            tail = lm.get_input_embeddings()(torch.tensor(prompts.tail, dtype=torch.long))[None]
            embedded = torch.cat([embedded, tail], dim=1)
            ids: list[int] = []
            while len(ids) < longest and prompts.eos_id not in ids:
                logits = lm(inputs_embeds=embedded).logits[0, -1]
                if text_choices != "free":
                    allowed = {answer[len(ids)] for answer in answers if answer[: len(ids)] == ids}
                    logits[[word for word in range(len(logits)) if word not in allowed]] = -torch.inf
                ids.append(int(logits.argmax()))
                embedded = torch.cat([embedded, lm.get_input_embeddings()(torch.tensor([[ids[-1]]]))], dim=1)
        assert text == " ".join(text_tokenizer.decode(ids, skip_special_tokens=True).split())
        if text_choices != "free":
            assert ids in answers
    assert any(texts)


@given(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=5), min_size=1, max_size=12))
def test_choices_are_those_of_a_set_of_answers(answers: list[list[int]]) -> None:
    answers = [[*answer, 9] for answer in answers]
    choices = AnswerChoices(
        np.array([word for answer in answers for word in answer], np.int32),
        np.cumsum([0, *map(len, answers)], dtype=np.int64),
    )
    for answer in answers:
        begun = choices.start()
        for said, word in enumerate(answer):
            expected = sorted({other[said] for other in answers if other[:said] == answer[:said]})
            assert choices.words(begun).tolist() == expected
            begun = choices.after(begun, expected.index(word))
        assert begun.high - begun.low == answers.count(answer)


def test_choices_among_some_items_are_those_of_their_answers() -> None:
    answers = [[1, 2, 9], [1, 9], [3, 9], [1, 2, 3, 9], [1, 9]]
    choices = AnswerChoices.of(
        np.array([word for answer in answers for word in answer], np.int32),
        np.cumsum([0, *map(len, answers)], dtype=np.int64),
        np.array([3, 1]),
    )
    begun = choices.start()
    assert choices.words(begun).tolist() == [1]
    begun = choices.after(begun, 0)
    assert choices.words(begun).tolist() == [2, 9]
    assert choices.words(choices.after(begun, 0)).tolist() == [3]


def test_a_text_without_a_known_user_reads_no_padding(tiny_chain: Any, served: PreferenceModel) -> None:
    """With user tokens on, a request without a user is read as if they were off."""
    with_users = PreferenceModel(
        tiny_chain.folder,
        tiny_chain.tokens,
        tiny_chain.log.catalogue,
        tiny_chain.config.model_copy(update={"use_user_tokens": True}),
    )
    rows = [prefix_row(HISTORY), prefix_row(HISTORY[:2])]
    expected, expected_mask = served._left_padded(rows)
    got, mask = with_users._left_padded(rows)
    assert torch.equal(mask, expected_mask)
    assert torch.equal(got, expected)


# -- losses --------------------------------------------------------------------------------------------------


def test_the_losses_of_a_batch_by_hand(served: PreferenceModel) -> None:
    rows = [
        Row(np.array([3, 17, 4]), np.array([17, 4, 9]), answer_item=9),
        Row(np.array([5, 6]), np.array([7])),
    ]
    batch = served.collator(rows)
    model, prompts = served.model, served.collator.prompts
    with torch.no_grad():
        got, got_text = model(batch)
        sampled, _ = model(batch, torch.tensor([1, 2, 17]))
        vectors = model.preferences(batch)
        targets = torch.tensor([17, 4, 9, 7])
        head = (model.head.vectors, targets, model.head.temperature)
        whole = torch.cat([model.words(batch.head_ids)[None], model.embed(batch)[:1]], dim=1)
        logits = model.lm(inputs_embeds=whole).logits[0, len(batch.head_ids) :].log_softmax(dim=-1)
    assert got.item() == pytest.approx(softmax_loss(vectors, *head).item(), rel=1e-5)
    items, count = model.head.item_vectors, len(model.head.vectors)
    expected = sampled_softmax_loss(vectors, items, count, *head[1:], torch.tensor([1, 2, 17])).item()
    assert sampled.item() == pytest.approx(expected, rel=1e-5)
    answer = prompts.answer(9)
    end = int(served.collator.sizes(rows)[0])
    terms = [logits[end - len(answer) + place - 1, token] for place, token in enumerate(answer.tolist())]
    assert got_text.item() == pytest.approx(-float(sum(terms)), rel=1e-4)


def test_continuous_tokens_come_at_the_scale_of_words(backbone: Path) -> None:
    lm = load_causal_lm(backbone)
    adapter = TokenAdapter(32, word_scale(lm))
    words = lm.get_input_embeddings().weight
    for size in (0.01, 1, 100):
        adapted = adapter(size * torch.randn(50, 32))
        assert adapted.square().mean().sqrt().item() == pytest.approx(words.square().mean().sqrt().item(), rel=0.01)
    assert torch.equal(adapter(torch.zeros(2, 32)), torch.zeros(2, 32)), "a dropped token stays empty"


# -- what is trained -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("trainable", ["full", "lora"])
@pytest.mark.parametrize("item_vectors", ["learned", "collaborative"])
def test_what_is_trained(backbone: Path, trainable: Any, item_vectors: Any) -> None:
    config = LLMConfig(num_hidden_layers=1, trainable=trainable, item_vectors=item_vectors, preference_dim=8)
    embeddings = np.random.default_rng(0).standard_normal((6, 8)).astype(np.float32)
    model = new_model(config, backbone, embeddings, seed=0)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert not any("embed_tokens" in name or "lm_head" in name for name in trained)
    of_lm = {name for name in trained if name.startswith("lm.")}
    assert of_lm
    assert all("lora_" in name for name in of_lm) == (trainable == "lora")
    fresh = {
        "adapter.scale",
        "adapter.correction.weight",
        "head.project.weight",
        "head.log_temperature",
        "head.recency",
    }
    assert trained - of_lm == fresh | ({"head.vectors"} if item_vectors == "learned" else set())
    backbone_group, fresh_group = parameter_groups(model, config)
    assert (backbone_group["lr"], fresh_group["lr"]) == (config.learning_rate, config.head_learning_rate)
    assert len(backbone_group["params"]) == len(of_lm)
    assert len(fresh_group["params"]) == len(trained - of_lm)


def test_dropout_is_for_training_alone(served: PreferenceModel) -> None:
    batch = served.collator([Row(np.array([1, 2, 3], np.int32), np.zeros(3, np.int64))])
    model = copy.deepcopy(served.model).float()
    plain = model.preferences(batch)
    for part in (model.dropout, model.head.dropout):
        part.p = 0.5
        assert torch.equal(model.eval().preferences(batch), plain)
        assert not torch.allclose(model.train().preferences(batch), plain, atol=1e-3)
        part.p = 0.0
    assert torch.equal(model.train().preferences(batch), plain)


def test_item_vectors_start_at_the_collaborative_embeddings() -> None:
    embeddings = 3 + torch.randn(50, 8)
    collaborative = initial_vectors(embeddings, LLMConfig(item_vectors="collaborative", preference_dim=8))
    assert torch.allclose(collaborative, F.normalize(embeddings, dim=1))
    learned = initial_vectors(embeddings, LLMConfig(preference_dim=8))
    centred = embeddings - embeddings.mean(dim=0)
    assert torch.allclose(F.normalize(learned, dim=1), F.normalize(centred, dim=1), atol=1e-5)
    assert initial_vectors(embeddings, LLMConfig(preference_dim=5)).shape == (50, 5)


# -- published weights ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("trainable", "blocks"), [("full", 0), ("lora", 0), ("full", 2)])
def test_an_exported_model_gives_the_same_preferences(
    tmp_path: Path, backbone: Path, tiny_chain: Any, served: PreferenceModel, trainable: Any, blocks: int
) -> None:
    config = LLMConfig(
        num_hidden_layers=1,
        trainable=trainable,
        preference_dim=8,
        lora_rank=2,
    )
    embeddings = np.random.default_rng(0).standard_normal((20, 8)).astype(np.float32)
    read = HistoryReader(8, 50, blocks).state_dict() if blocks else {}
    history = {f"{READER}{name}": value for name, value in read.items()}
    make = functools.partial(new_model, config, backbone, embeddings, 0, history=history)
    model = make()
    with torch.no_grad():  # "training": also LoRA's B, which starts at zero
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    trained = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    batch = served.collator([prefix_row(HISTORY), prefix_row([7, 7], answer=1)])
    with torch.no_grad():
        expected, expected_loss = model.preferences(batch), model(batch)
        untrained = make()
        assert (untrained.preferences(batch) - expected).abs().max() > 1e-2
    export_model(tmp_path, make(), trained, torch.float32)
    loaded = load_model(tmp_path, torch.float32)
    with torch.no_grad():
        assert torch.allclose(loaded.preferences(batch), expected, atol=1e-4)
        for got, wanted in zip(loaded(batch), expected_loss, strict=True):
            assert got.item() == pytest.approx(wanted.item(), rel=1e-4)
    assert not any("lora" in name for name, _ in loaded.named_parameters())
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert np.array_equal(load_vectors(tmp_path), model.head.vectors.detach().numpy())
    assert temperature(tmp_path) == pytest.approx(float(trained["head.log_temperature"].exp()))


def test_a_model_is_published_in_the_dtype_asked_for(tmp_path: Path, backbone: Path) -> None:
    from safetensors.torch import load_file

    config = LLMConfig(num_hidden_layers=1, preference_dim=8)
    export_model(tmp_path, new_model(config, backbone, np.eye(8, dtype=np.float32), seed=0), {}, torch.bfloat16)
    stored = load_file(tmp_path / BACKBONE / "model.safetensors")
    assert {value.dtype for value in stored.values()} == {torch.bfloat16}
    assert load_causal_lm(tmp_path / BACKBONE, dtype=torch.bfloat16).dtype == torch.bfloat16


# -- what is read once, and what cannot be said ---------------------------------------------------------------


def test_a_head_that_was_read_before_serves_any_number_of_batches(served: PreferenceModel) -> None:
    rows = [prefix_row(HISTORY), prefix_row([5])]
    first = served.prefix_preferences(rows)
    assert len(served.prefix_preferences(rows[:1])[0]) == 5
    for one, other in zip(first, served.prefix_preferences(rows), strict=True):
        assert np.array_equal(one, other)
    assert np.allclose(np.concatenate(first), preferences(served, rows), atol=1e-5)
    assert served._head.get_seq_length() == len(served.collator.prompts.head)


def test_texts_of_categories_need_categories(tiny_chain: Any) -> None:
    catalogue = replace(tiny_chain.log.catalogue, categories=[""] * 20)
    config = tiny_chain.config.model_copy(update={"text_choices": "category"})
    served = replace(tiny_chain, config=config, log=replace(tiny_chain.log, catalogue=catalogue)).preference()
    with pytest.raises(ConfigError, match=r"llm\.text_choices='category' but no item has a category"):
        served.texts([HISTORY])
