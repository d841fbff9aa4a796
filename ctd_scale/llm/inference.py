"""The preference step: histories in, preference vectors and texts out. Needs no DeepSpeed, no checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float32, Int32
from numpy import ndarray
from transformers import DynamicCache

from ctd_scale.batches import Catalogue, NodeArrays
from ctd_scale.config import LLMConfig
from ctd_scale.llm.backbone import compute_dtype, load_text_tokenizer
from ctd_scale.llm.choices import AnswerChoices
from ctd_scale.llm.collator import Collator, Row, latest_items
from ctd_scale.llm.prompts import load_prompts, make_category_answers
from ctd_scale.llm.weights import BACKBONE, load_model


class PreferenceModel:
    """A published preference model on one device."""

    def __init__(
        self,
        folder: Path,
        tokens: NodeArrays,
        catalogue: Catalogue,
        config: LLMConfig,
        device: torch.device | None = None,
    ) -> None:
        self.config, self._catalogue = config, catalogue
        self.device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = load_model(folder, compute_dtype(config.dtype, self.device)).to(self.device)
        self.text_tokenizer = load_text_tokenizer(folder / BACKBONE)
        prompts = load_prompts(folder, self.text_tokenizer, catalogue, config.max_title_tokens)
        self.collator = Collator(prompts, tokens.items, tokens.users if config.use_user_tokens else None)

    @property
    def cond_dim(self) -> int:
        return int(self.model.head.vectors.shape[1])

    def __call__(
        self, histories: Sequence[Int32[ndarray, "_"]], users: Sequence[int] | None = None
    ) -> Float32[ndarray, "batch cond_dim"]:
        """The preference after each history (its latest `max_history` items), in the order given.

        An empty history is a ValueError: there is nothing to read a preference after.
        """
        rows = self._rows(histories, users)
        return np.concatenate(self.prefix_preferences(rows)) if rows else np.zeros((0, self.cond_dim), np.float32)

    @torch.inference_mode()
    def prefix_preferences(self, rows: Sequence[Row]) -> list[Float32[ndarray, "supervised cond_dim"]]:
        """Preferences at every supervised position of each row, in the order given."""
        outcome: list[ndarray] = [np.zeros(0)] * len(rows)
        for index in self._buckets(rows):
            batch = self.collator([rows[i] for i in index]).to(self.device)
            vectors = self.model.preferences(batch, self._head).cpu().numpy()
            cuts = np.cumsum([len(rows[i].targets) for i in index])[:-1]
            for i, part in zip(index, np.split(vectors, cuts), strict=True):
                outcome[i] = part
        return outcome

    @torch.inference_mode()
    def texts(self, histories: Sequence[Int32[ndarray, "_"]], users: Sequence[int] | None = None) -> list[str]:
        """What the LM says the user wants, decoded greedily."""
        rows = self._rows(histories, users)
        outcome = [""] * len(rows)
        for index in self._buckets(rows):
            embedded, mask = self._left_padded([rows[i] for i in index])
            generated = self._decode(embedded, mask, [rows[i].items for i in index])
            for i, text in zip(
                index, self.text_tokenizer.batch_decode(generated, skip_special_tokens=True), strict=True
            ):
                outcome[i] = " ".join(text.split())
        return outcome

    @cached_property
    @torch.inference_mode()
    def _head(self) -> DynamicCache:
        """The instruction, read once for all requests."""
        return self.model.read_head(torch.tensor(self.collator.prompts.head, dtype=torch.long, device=self.device))

    @cached_property
    def _choices(self) -> AnswerChoices:
        if self.config.text_choices == "category":
            return AnswerChoices(*make_category_answers(self.text_tokenizer, self._catalogue))
        return AnswerChoices(self.collator.prompts.answers, self.collator.prompts.answer_offsets)

    @cached_property
    def _directions(self) -> torch.Tensor:
        return F.normalize(self.model.head.vectors.detach().float(), dim=1)

    def _decode(self, embedded: torch.Tensor, mask: torch.Tensor, seen: Sequence[ndarray]) -> list[list[int]]:
        """Greedy decoding with a key-value cache, until every row has ended.

        Not `generate`: its prompt pass hands the vocabulary layer a strided view, for which torch copies that layer
        once per row.
        """
        lm, eos_id = self.model.lm, self.collator.prompts.eos_id
        cache, inputs = None, {"inputs_embeds": embedded}
        places = (mask.cumsum(dim=1) - 1).clamp_min(0)
        words: list[torch.Tensor] = []
        choose: Callable[[torch.Tensor], torch.Tensor] | None = None
        ended = torch.zeros(len(mask), dtype=torch.bool, device=mask.device)
        for _ in range(self.config.max_new_tokens):
            said = lm.base_model(
                **inputs, attention_mask=mask, position_ids=places, past_key_values=cache, use_cache=True
            )
            cache = said.past_key_values
            if choose is None:
                choose = self._choice(said.last_hidden_state, seen)
            word = choose(self.model.word_logits(said.last_hidden_state[:, -1].contiguous()))
            words.append(word.masked_fill(ended, eos_id))
            ended |= word == eos_id
            if ended.all():
                break
            inputs = {"input_ids": word[:, None]}
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            places = places[:, -1:] + 1
        rows = torch.stack(words, dim=1).tolist()
        return [[token for token in row if token != eos_id] for row in rows]

    def _choice(self, states: torch.Tensor, seen: Sequence[ndarray]) -> Callable[[torch.Tensor], torch.Tensor]:
        """How words are chosen; `states` are those of the prompt, which also hold the preference."""
        if self.config.text_choices == "free":
            return _any_choice
        if self.config.text_choices in ("catalogue", "category"):
            return self._known_choice(dict.fromkeys(range(len(states)), self._choices))
        most = max(map(len, seen))
        recent = torch.from_numpy(np.stack([latest_items(items, most)[-1] for items in seen])).to(states.device)
        preferences = self.model.head(states[:, -len(self.collator.prompts.tail) - 1], recent).float()
        scores = F.normalize(preferences, dim=1) @ self._directions.T
        for row, items in enumerate(seen):
            scores[row, torch.from_numpy(np.unique(items)).long()] = -torch.inf
        best = scores.topk(min(self.config.text_shortlist, scores.shape[1]), dim=1).indices.cpu().numpy()
        table = self.collator.prompts.answers, self.collator.prompts.answer_offsets
        return self._known_choice({row: AnswerChoices.of(*table, items) for row, items in enumerate(best)})

    def _known_choice(self, choices: dict[int, AnswerChoices]) -> Callable[[torch.Tensor], torch.Tensor]:
        """A choice among the words with which some allowed answer goes on; called once a word."""
        eos_id = self.collator.prompts.eos_id
        begun = {row: each.start() for row, each in choices.items()}

        def choose(logits: torch.Tensor) -> torch.Tensor:
            word = torch.full((len(logits),), eos_id, dtype=torch.long, device=logits.device)
            for row, here in list(begun.items()):
                allowed = torch.from_numpy(choices[row].words(here)).to(logits.device).long()
                best = int(logits[row, allowed].argmax())
                word[row] = allowed[best]
                begun[row] = choices[row].after(here, best)
                if allowed[best] == eos_id:
                    del begun[row]
            return word

        return choose

    def _rows(self, histories: Sequence[ndarray], users: Sequence[int] | None) -> list[Row]:
        for index, history in enumerate(histories):
            if len(history) == 0:
                raise ValueError(f"history {index} is empty; a preference needs at least one item")
        known = users if users is not None else [-1] * len(histories)
        unknown_target = np.zeros(1, np.int64)
        return [
            Row(np.asarray(history[-self.config.max_history :]), unknown_target, user=user)
            for history, user in zip(histories, known, strict=True)
        ]

    def _buckets(self, rows: Sequence[Row]) -> Iterator[list[int]]:
        """Row numbers in batches of like length."""
        order = np.argsort(self.collator.sizes(rows), kind="stable").tolist() if rows else []
        for start in range(0, len(order), self.config.inference_batch):
            yield order[start : start + self.config.inference_batch]

    def _left_padded(self, rows: Sequence[Row]) -> tuple[torch.Tensor, torch.Tensor]:
        """Embedded prompts, head and answer's tail included, moved so that all end in the same column."""
        batch = self.collator(rows).to(self.device)
        head = self.model.words(batch.head_ids).expand(len(rows), -1, -1)
        embedded = torch.cat([head, self.model.embed(batch)], dim=1)
        tail = self.model.words(torch.tensor(self.collator.prompts.tail, dtype=torch.long, device=self.device))
        sizes = (len(batch.head_ids) + self.collator.sizes(rows)).tolist()
        longest = max(sizes) + len(tail)
        moved = embedded.new_zeros(len(rows), longest, embedded.shape[2])
        mask = torch.zeros(len(rows), longest, dtype=torch.long, device=self.device)
        for index, size in enumerate(sizes):
            moved[index, longest - len(tail) - size : longest - len(tail)] = embedded[index, :size]
            moved[index, longest - len(tail) :] = tail
            mask[index, longest - len(tail) - size :] = 1
        return moved, mask


def _any_choice(logits: torch.Tensor) -> torch.Tensor:
    return logits.argmax(dim=1)
