"""What the LM reads: a constant head, one block per history item, and, for a text, a tail and an answer.

    head | title_1 <K tokens> | title_2 <K tokens> | ... | tail | answer

The head comes first and never changes, so that prefix caches hit. Text in titles is data: whatever it looks like,
it never becomes a special token.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int32, Int64
from numpy import ndarray

from ctd_scale.batches import Catalogue
from ctd_scale.config import ConfigError

INSTRUCTION = "Here is what a user chose, oldest first. Say what the user wants next.\n"
SYSTEM = "You recommend."
MAX_CATEGORY_TOKENS = 64
ARRAYS = ("head", "tail", "titles", "title_offsets", "answers", "answer_offsets")
FACTS = "prompts.json"
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

    def save(self, folder: Path, max_title_tokens: int) -> None:
        """Write them beside the model: reading a million titles takes minutes, and every replica needs them."""
        for name in ARRAYS:
            np.save(folder / f"{name}.npy", getattr(self, name))
        facts = {"pad_id": self.pad_id, "eos_id": self.eos_id, "max_title_tokens": max_title_tokens}
        (folder / FACTS).write_text(json.dumps(facts) + "\n")

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


def load_prompts(folder: Path, text_tokenizer: Any, catalogue: Catalogue, max_title_tokens: int) -> Prompts:
    """What `Prompts.save` wrote, memory-mapped; made anew where it did not, or for titles of another length."""
    facts = json.loads((folder / FACTS).read_text()) if (folder / FACTS).is_file() else {}
    if facts.get("max_title_tokens") != max_title_tokens:
        return make_prompts(text_tokenizer, catalogue, max_title_tokens)
    arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in ARRAYS}
    return Prompts(**arrays, pad_id=facts["pad_id"], eos_id=facts["eos_id"])


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
    special = np.array(sorted(text_tokenizer.all_special_ids), np.int32)
    ids, lengths = [np.zeros(0, np.int32)], [np.zeros(0, np.int64)]
    for start in range(0, len(texts), 10_000):
        encoded = _encode(text_tokenizer, list(texts[start : start + 10_000]))
        found = np.fromiter(chain.from_iterable(encoded), np.int32)
        row = np.repeat(np.arange(len(encoded)), [len(each) for each in encoded])
        plain = ~np.isin(found, special)
        found, row = found[plain], row[plain]
        kept = np.arange(len(row)) - np.searchsorted(row, row) < limit
        ids.append(found[kept])
        lengths.append(np.bincount(row[kept], minlength=len(encoded)))
    flat, sizes = np.concatenate(ids), np.concatenate(lengths)
    if end is not None:
        flat, sizes = np.insert(flat, np.cumsum(sizes), end), sizes + 1
    return flat.astype(np.int32), np.concatenate([[0], np.cumsum(sizes)])


def _encode(text_tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Ids of every text. The tokenizer's own fast path: what transformers makes of its answer takes several times as
    long as the answer."""
    backend = getattr(text_tokenizer, "backend_tokenizer", None)
    if backend is None:
        encoded: list[list[int]] = text_tokenizer(texts, add_special_tokens=False, split_special_tokens=True)[
            "input_ids"
        ]
        return encoded
    before = backend.encode_special_tokens
    backend.encode_special_tokens = True  # a special token in a text is plain words
    try:
        return [each.ids for each in backend.encode_batch_fast(texts, add_special_tokens=False)]
    finally:
        backend.encode_special_tokens = before
