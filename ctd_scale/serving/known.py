"""What the LLM said of a history, a preference or a text, for whoever asks with the same one again, and whom it was
asked about. Every replica of the ingress keeps it, and through the coordinator tells it to the others: one that has
just started, where load called for it, would otherwise ask the LLM about everybody once more. So would all of them
after a swap to another LLM.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from jaxtyping import Float32
from numpy import ndarray

# What the LLM was asked for ("preference" or "text"), and after which items; and what it said.
Question = tuple[str, bytes]
Answers = dict[Question, Float32[ndarray, "cond_dim"] | str]


@dataclass
class Known:
    """What one replica knows of one LLM, by what it was asked; `heard` is how much of what others said.

    Where more than the limit is kept, what was not asked for the longest goes first.
    """

    kept: OrderedDict[Question, Float32[ndarray, "cond_dim"] | str] = field(default_factory=OrderedDict)
    untold: Answers = field(default_factory=dict)
    heard: int = 0

    def get(self, question: Question) -> Float32[ndarray, "cond_dim"] | str | None:
        """What the LLM said to this, if it is known."""
        if question in self.kept:
            self.kept.move_to_end(question)
        return self.kept.get(question)

    def learn(self, question: Question, said: Float32[ndarray, "cond_dim"] | str, limit: int) -> None:
        """Keep what the LLM said, to be told."""
        self.kept[question] = self.untold[question] = said
        self._trim(limit)

    def hear(self, heard: int, others: Answers, limit: int) -> None:
        """Keep what other replicas had been told by the LLM."""
        self.kept.update(others)
        self.heard = heard
        self._trim(limit)

    def _trim(self, limit: int) -> None:
        while len(self.kept) > limit:
            question, _ = self.kept.popitem(last=False)
            self.untold.pop(question, None)


class Asked:
    """Whom one replica was asked about lately, a user or a history: another LLM reads them before it takes over."""

    def __init__(self, limit: int) -> None:
        self._limit, self._lately = limit, OrderedDict[str | tuple[str, ...], None]()

    def add(self, user_id: str | None, history: Sequence[str]) -> None:
        """A user was asked about or, where none is given, a history."""
        whom = tuple(history) if user_id is None else user_id
        self._lately[whom] = None
        self._lately.move_to_end(whom)
        while len(self._lately) > self._limit:
            self._lately.popitem(last=False)

    def latest_first(self) -> Iterator[dict[str, Any]]:
        """As `Directory.history` wants them."""
        for whom in list(reversed(self._lately)):
            yield {"user_id": whom} if isinstance(whom, str) else {"history": whom}


class Shared:
    """What all replicas have said of one LLM, numbered in the order in which it came."""

    def __init__(self, reader: str, limit: int) -> None:
        self.reader, self._limit = reader, limit
        self._count, self._said = 0, OrderedDict[Question, tuple[int, Float32[ndarray, "cond_dim"] | str]]()

    def exchange(self, said: Answers, heard: int) -> tuple[int, Answers]:
        """Take up what a replica says; returns what others have said since it `heard` so many, and how many that makes.
        One that has heard more than there is knew a process that is there no more: it is told everything."""
        since, news = heard if heard <= self._count else 0, Answers()
        for question, (number, answer) in reversed(self._said.items()):
            if number <= since:
                break
            news[question] = answer
        for question, answer in said.items():
            self._count += 1
            self._said[question] = self._count, answer
            self._said.move_to_end(question)
        while len(self._said) > self._limit:
            self._said.popitem(last=False)
        return self._count, dict(reversed(news.items()))
