"""What the LM reads: a constant head, one block per history item, and, for a text, a tail and an answer.

    head | title_1 <K tokens> | title_2 <K tokens> | ... | tail | answer

The head comes first and never changes, so that prefix caches hit. Text in titles is data: whatever it looks like,
it never becomes a special token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int32, Int64
from numpy import ndarray

from ctd_scale.batches import Catalogue
from ctd_scale.config import ConfigError

INSTRUCTION = "Here is what a user chose, oldest first. Say what the user wants next.\n"
SYSTEM = "You recommend."
MAX_CATEGORY_TOKENS = 64
_MARK = "\u241e"  # stands for the history while the chat template is rendered


@dataclass(frozen=True)
class Prompts:
    """Everything constant, tokenised once.

    `titles[title_offsets[i]:title_offsets[i + 1]]` are the ids of item i's title; `answers` likewise.
    """

    head: Int32[ndarray, "head"]
    tail: Int32[ndarray, "tail"]
    titles: Int32[ndarray, "title_ids"]
    title_offsets: Int64[ndarray, "offsets"]
    answers: Int32[ndarray, "answer_ids"]
    answer_offsets: Int64[ndarray, "offsets"]
    pad_id: int
    eos_id: int

    def title(self, item: int) -> Int32[ndarray, "ids"]:
        return self.titles[self.title_offsets[item] : self.title_offsets[item + 1]]

    def answer(self, item: int) -> Int32[ndarray, "ids"]:
        return self.answers[self.answer_offsets[item] : self.answer_offsets[item + 1]]


def make_prompts(text_tokenizer: Any, catalogue: Catalogue, max_title_tokens: int) -> Prompts:
    """Tokenise head, tail, titles and answers."""
    head, tail = _render_frame(text_tokenizer)
    titles, title_offsets = _tokenize(text_tokenizer, [f" {title}" for title in catalogue.titles], max_title_tokens)
    eos_id = int(text_tokenizer.eos_token_id)
    answers, answer_offsets = _tokenize(
        text_tokenizer,
        [answer_text(*pair) for pair in zip(catalogue.titles, catalogue.categories, strict=True)],
        3 * max_title_tokens + 24,
        end=eos_id,
    )
    pad_id = text_tokenizer.pad_token_id if text_tokenizer.pad_token_id is not None else eos_id
    return Prompts(head, tail, titles, title_offsets, answers, answer_offsets, int(pad_id), eos_id)


def answer_text(title: str, category: str) -> str:
    """What the LM learns to say about the item that follows a history."""
    if category and category != title:
        return f"The user might like {category} products, such as {title}"
    return f"The user might like products such as {title}"


def make_category_answers(
    text_tokenizer: Any, catalogue: Catalogue
) -> tuple[Int32[ndarray, "ids"], Int64[ndarray, "offsets"]]:
    """One answer per category of the catalogue, which names no item. Raises ConfigError where there is no category."""
    categories = sorted({category for category in catalogue.categories if category})
    if not categories:
        raise ConfigError("llm.text_choices='category' but no item has a category; use 'preferred'")
    texts = [f"The user might like {category} products" for category in categories]
    return _tokenize(text_tokenizer, texts, MAX_CATEGORY_TOKENS, end=int(text_tokenizer.eos_token_id))


def _render_frame(text_tokenizer: Any) -> tuple[Int32[ndarray, "head"], Int32[ndarray, "tail"]]:
    """Text before and after the history: the model's own chat template where it has one."""
    if getattr(text_tokenizer, "chat_template", None):
        user = {"role": "user", "content": INSTRUCTION + _MARK}
        options = {"tokenize": False, "add_generation_prompt": True}
        try:
            text = text_tokenizer.apply_chat_template([{"role": "system", "content": SYSTEM}, user], **options)
        except Exception:
            text = text_tokenizer.apply_chat_template([user], **options)
        head, tail = text.split(_MARK)
    else:
        head, tail = INSTRUCTION, "\nAnswer: "
    ids = text_tokenizer([head, tail], add_special_tokens=False)["input_ids"]
    return np.array(ids[0], np.int32), np.array(ids[1], np.int32)


def _tokenize(
    text_tokenizer: Any, texts: Sequence[str], limit: int, end: int | None = None
) -> tuple[Int32[ndarray, "ids"], Int64[ndarray, "offsets"]]:
    """Ids of all texts, one after the other, and where each begins. Special tokens in a text are split into plain
    ones; any that is left is dropped."""
    special = set(text_tokenizer.all_special_ids)
    parts: list[list[int]] = []
    for start in range(0, len(texts), 10_000):
        chunk = list(texts[start : start + 10_000])
        encoded = text_tokenizer(chunk, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        parts.extend([token for token in ids if token not in special][:limit] for ids in encoded)
    if end is not None:
        parts = [[*ids, end] for ids in parts]
    offsets = np.zeros(len(parts) + 1, np.int64)
    np.cumsum([len(ids) for ids in parts], out=offsets[1:])
    return np.array([token for ids in parts for token in ids], np.int32), offsets
