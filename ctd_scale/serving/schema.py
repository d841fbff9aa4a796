"""What is asked and what is answered; shared by the endpoint and `ctd recommend`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int32
from numpy import ndarray
from pydantic import BaseModel, ConfigDict, Field

from ctd_scale.batches import Catalogue, InteractionLog
from ctd_scale.recommender import Recommendation

# A message must stay short whatever was sent.
MAX_NAMED, MAX_CHARS = 5, 64


class RequestError(ValueError):
    """A request that cannot be answered; the message names the field and says what was expected."""


class UnknownUserError(RequestError):
    """The user id is not in the interaction log."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class RecommendRequest(_Strict):
    """Exactly one of `history` and `user_id`."""

    history: list[str] | None = Field(None, description="item ids, oldest first", examples=[["50", "172", "181"]])
    user_id: str | None = Field(None, description="a user of the interaction log", examples=[None])
    k: int = Field(10, ge=1, description="how many items; at most serving.max_k")
    exclude_seen: bool = Field(True, description="leave out what is in the history")
    explain: bool = Field(False, description="let the LLM say what the user wants; items that agree with it gain")


class RankedItem(_Strict):
    """One recommended item; scores are in units of a cosine and compare within one answer."""

    item_id: str
    title: str
    score: float


class RecommendResponse(_Strict):
    """At most k items, best first; `text` is empty unless `explain` was asked for."""

    version: str
    items: list[RankedItem]
    text: str


class Health(_Strict):
    """The endpoint is up and answers with this version."""

    status: str
    version: str


class ErrorResponse(_Strict):
    """Every answer that is not a success."""

    error: str


class Directory:
    """From raw ids to histories of item indices."""

    def __init__(self, log: InteractionLog) -> None:
        self._log = log
        self._users = {user_id: index for index, user_id in enumerate(log.user_ids)}
        self._items = {item_id: index for index, item_id in enumerate(log.catalogue.item_ids)}

    def history(self, *, user_id: str | None = None, history: Sequence[str] | None = None) -> Int32[ndarray, "length"]:
        """Item indices, oldest first: a user's whole history, or the given item ids.

        Raises RequestError: not exactly one of both, an empty history, unknown item ids, a user without
        interactions; UnknownUserError: a user who is not in the log.
        """
        if user_id is not None and history is None:
            return self._of_user(user_id)
        if history is not None and user_id is None:
            return self._of_items(history)
        raise RequestError("give exactly one of history and user_id")

    def _of_user(self, user_id: str) -> Int32[ndarray, "length"]:
        index = self._users.get(user_id)
        if index is None:
            raise UnknownUserError(f"user_id: {_shown(user_id)} is not in the interaction log; give a history instead")
        found = np.array(self._log.full_history(index), np.int32)
        if not len(found):
            raise RequestError(f"user_id: {_shown(user_id)} has no interactions; give a history instead")
        return found

    def _of_items(self, history: Sequence[str]) -> Int32[ndarray, "length"]:
        if not history:
            raise RequestError("history: is empty, expected at least one item id")
        unknown = list(dict.fromkeys(item_id for item_id in history if item_id not in self._items))
        if unknown:
            named = ", ".join(map(_shown, unknown[:MAX_NAMED]))
            more = f" and {len(unknown) - MAX_NAMED} more" if len(unknown) > MAX_NAMED else ""
            raise RequestError(f"history: unknown item ids {named}{more}")
        return np.array([self._items[item_id] for item_id in history], np.int32)


def response_object(version: str, recommendation: Recommendation, catalogue: Catalogue) -> dict[str, Any]:
    """The answer as plain values: `{"version", "items": [{"item_id", "title", "score"}], "text"}`."""
    items = [
        {"item_id": catalogue.item_ids[item], "title": catalogue.titles[item], "score": score}
        for item, score in zip(recommendation.items, recommendation.scores, strict=True)
    ]
    return {"version": version, "items": items, "text": recommendation.text}


def _shown(raw_id: str) -> str:
    return f"{raw_id[:MAX_CHARS]!r}"
