"""What is asked and what is answered; shared by the endpoint and `ctd recommend`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Int32
from numpy import ndarray
from pydantic import BaseModel, ConfigDict, Field, SkipValidation

from ctd_scale.batches import Catalogue, InteractionLog
from ctd_scale.recommender import Recommendation
from ctd_scale.retrieval.boosts import Boosts

# A message must stay short whatever was sent.
MAX_NAMED, MAX_CHARS = 5, 64
# Each different factor is a search of its own.
MAX_BOOSTS = MAX_FACTORS = 16


class RequestError(ValueError):
    """A request that cannot be answered; the message names the field and says what was expected."""


class UnknownUserError(RequestError):
    """The user id is not in the interaction log."""


class UnknownItemError(RequestError):
    """The item id is not in the catalogue."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Range(_Strict):
    """Numbers from `min` to `max`, both included; either may be missing."""

    min: float | None = Field(None, allow_inf_nan=False)
    max: float | None = Field(None, allow_inf_nan=False)


class Boost(_Strict):
    """Multiplies the scores of items of any of `categories`, or of `items`; negative scores are divided."""

    categories: list[str] | None = None
    items: list[str] | None = None
    factor: float = Field(ge=0.01, le=100, description="above 1 they gain, below 1 they lose")


class RecommendRequest(_Strict):
    """Exactly one of `history` and `user_id`."""

    history: list[str] | None = Field(None, description="item ids, oldest first", examples=[["50", "172", "181"]])
    user_id: str | None = Field(None, description="a user of the interaction log", examples=[None])
    k: int = Field(10, ge=1, description="how many items; at most serving.max_k")
    exclude_seen: bool = Field(True, description="leave out what is in the history")
    exclude_items: list[str] = Field([], description="item ids that may not come back")
    categories: list[str] | None = Field(None, description="only items of these categories")
    exclude_categories: list[str] = Field([], description="no items of these categories")
    only_items: list[str] | None = Field(None, description="only these item ids may come back")
    ranges: dict[str, Range] = Field(
        {},
        description="only items whose number lies within, by name (interactions.attribute_columns); an item without "
        "the number does not come back",
        examples=[{}],
    )
    boosts: list[Boost] = Field(
        [], max_length=MAX_BOOSTS, description="items to be seen more, or less; several multiply", examples=[[]]
    )
    deadline_ms: int | None = Field(
        None, ge=1, description="answer 504 when there is no answer by then; serving.request_timeout_s bounds it"
    )
    explain: bool = Field(False, description="let the LLM say what the user wants; items that agree with it gain")

    @property
    def looks_at_all_items(self) -> bool:
        """Whether every item of the catalogue is looked at before anything is searched for."""
        wanted = self.categories, self.exclude_categories, self.only_items, self.ranges, self.boosts
        return any(each not in (None, [], {}) for each in wanted)


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


class ErrorResponse(_Strict):
    """Every answer that is not a success."""

    error: str


class BatchRequest(_Strict):
    """Several requests, answered together."""

    # Each is checked by itself, so that one that is wrong spoils no other.
    requests: list[SkipValidation[RecommendRequest]] = Field(min_length=1, description="at most serving.max_requests")


class BatchResponse(_Strict):
    """An answer or an error for each request, in their order."""

    responses: list[RecommendResponse | ErrorResponse]


class ItemsResponse(_Strict):
    """Items, best first: those like another (score: the cosine of their vectors) or those that a query names (score:
    1 / place)."""

    version: str
    items: list[RankedItem]


class Point(_Strict):
    """A vector's place in the picture; `item_id` and `title` where it is an item's."""

    kind: Literal["preference", "draw", "item"]
    x: float
    y: float
    item_id: str = ""
    title: str = ""


class Picture(_Strict):
    """The preference, the generated vectors and the items around them, on the two axes that tell most apart."""

    version: str
    points: list[Point]


class Health(_Strict):
    """The endpoint is up and answers with this version."""

    status: str
    version: str


class Version(Health):
    """What is served; `tuned` only where `serving.target_p99_ms` chose the settings: they, and what was measured."""

    tuned: dict[str, int | float] | None = None


class Directory:
    """From raw ids to histories of item indices. Given a catalogue that grew since the log was read, and the places of
    its items, it knows these."""

    def __init__(
        self, log: InteractionLog, catalogue: Catalogue | None = None, places: Mapping[str, int] | None = None
    ) -> None:
        self._log = log
        self._users = {user_id: index for index, user_id in enumerate(log.user_ids)}
        catalogue = log.catalogue if catalogue is None else catalogue
        self._know(catalogue, places or {item_id: index for index, item_id in enumerate(catalogue.item_ids)})

    def with_catalogue(self, catalogue: Catalogue, places: Mapping[str, int]) -> Directory:
        """The same users over other items."""
        made = copy(self)
        made._know(catalogue, places)
        return made

    def _know(self, catalogue: Catalogue, places: Mapping[str, int]) -> None:
        self._items = places
        categories = pa.array(catalogue.categories, pa.string()).dictionary_encode()
        self._categories = {name: code for code, name in enumerate(categories.dictionary.to_pylist())}
        self._category_of = categories.indices.to_numpy()
        self._attributes = catalogue.attributes

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
        return _looked_up(history, self._items, "history", "item ids")

    def item(self, item_id: str) -> int:
        """Index of an item. Raises UnknownItemError."""
        if item_id not in self._items:
            raise UnknownItemError(f"item_id: {_shown(item_id)} is not in the catalogue")
        return self._items[item_id]

    def excluded(
        self,
        *,
        items: Sequence[str] = (),
        categories: Sequence[str] | None = None,
        exclude_categories: Sequence[str] = (),
        only_items: Sequence[str] | None = None,
        ranges: Mapping[str, Range] | None = None,
    ) -> Int32[ndarray, "_"]:
        """Items that may not come back: the named ones, those outside `categories`, those in `exclude_categories`, all
        but `only_items`, those outside one of `ranges` or without its number. They come in no order, and some twice.

        Raises RequestError: an unknown item, category or number, no category or item allowed, a range without ends.
        """
        named = _looked_up(items, self._items, "exclude_items", "item ids")
        unwanted = np.zeros(len(self._categories), bool)
        if categories is not None:
            if not categories:
                raise RequestError("categories: is empty, expected at least one, or none given")
            unwanted[:] = True
            unwanted[_looked_up(categories, self._categories, "categories", "categories")] = False
        unwanted[_looked_up(exclude_categories, self._categories, "exclude_categories", "categories")] = True
        out = [self._outside(name, each) for name, each in (ranges or {}).items()]
        if unwanted.any():
            out.append(unwanted[self._category_of])
        if only_items is not None:
            if not only_items:
                raise RequestError("only_items: is empty, expected at least one, or none given")
            out.append(np.ones(len(self._category_of), bool))
            out[-1][_looked_up(only_items, self._items, "only_items", "item ids")] = False
        if not out:
            return named
        return np.concatenate([named, np.flatnonzero(np.logical_or.reduce(out))]).astype(np.int32)

    def boosts(self, wanted: Sequence[Boost]) -> Boosts | None:
        """The factors that these give to items; None where all have 1.

        Raises RequestError: an unknown item or category, not exactly one of both, or too many different factors.
        """
        if not wanted:
            return None
        factors = np.ones(len(self._category_of), np.float32)
        for place, each in enumerate(wanted):
            field = f"boosts.{place}"
            if bool(each.categories) == bool(each.items):
                raise RequestError(f"{field}: give exactly one of categories and items, not empty")
            if each.items:
                factors[_looked_up(each.items, self._items, f"{field}.items", "item ids")] *= np.float32(each.factor)
            else:
                chosen = np.zeros(len(self._categories), bool)
                names = each.categories or ()
                chosen[_looked_up(names, self._categories, f"{field}.categories", "categories")] = True
                factors[chosen[self._category_of]] *= np.float32(each.factor)
        boosted = np.flatnonzero(factors != 1).astype(np.int32)
        if (different := len(np.unique(factors[boosted]))) > MAX_FACTORS:
            raise RequestError(
                f"boosts: they give items {different} different factors, expected at most {MAX_FACTORS}; "
                "let fewer of them overlap"
            )
        return Boosts(boosted, factors[boosted]) if len(boosted) else None

    def _outside(self, name: str, wanted: Range) -> Bool[ndarray, "items"]:
        """Items whose number of that name is not within, or not known."""
        if name not in self._attributes:
            known = ", ".join(map(_shown, list(self._attributes)[:MAX_NAMED])) or "none"
            raise RequestError(
                f"ranges: items have no number {_shown(name)} (they have: {known}); "
                "interactions.attribute_columns says which they have"
            )
        low, high = wanted.min, wanted.max
        if low is None and high is None:
            raise RequestError(f"ranges.{name[:MAX_CHARS]}: expected min, max or both")
        if low is not None and high is not None and low > high:
            raise RequestError(f"ranges.{name[:MAX_CHARS]}: min={low:g} is above max={high:g}")
        values = self._attributes[name]
        inside = ~np.isnan(values)
        if low is not None:
            inside &= values >= low
        if high is not None:
            inside &= values <= high
        return ~inside


def read_range(text: str) -> tuple[str, Range]:
    """`price=5:20`, `price=5:` or `price=:20`: a name and its range. Raises RequestError where it is no such word."""
    name, _, ends = text.rpartition("=")
    low, separator, high = ends.partition(":")
    try:
        wanted = Range(min=float(low) if low else None, max=float(high) if high else None)
    except ValueError:  # also what pydantic raises
        separator = ""
    if not name or not separator:
        raise RequestError(f"--range {text}: expected NAME=MIN:MAX, such as price=5:20, price=5: or price=:20")
    return name, wanted


def read_ranges(texts: Sequence[str]) -> dict[str, Range]:
    """Ranges by name. Raises RequestError as `read_range` does, or where a name comes twice."""
    found: dict[str, Range] = {}
    for text in texts:
        name, wanted = read_range(text)
        if name in found:
            raise RequestError(f"--range {text}: {name} has a range already; give one with both ends")
        found[name] = wanted
    return found


def _looked_up(names: Sequence[str], index: Mapping[str, int], field: str, what: str) -> Int32[ndarray, "names"]:
    unknown = list(dict.fromkeys(name for name in names if name not in index))
    if unknown:
        named = ", ".join(map(_shown, unknown[:MAX_NAMED]))
        more = f" and {len(unknown) - MAX_NAMED} more" if len(unknown) > MAX_NAMED else ""
        raise RequestError(f"{field}: unknown {what} {named}{more}")
    return np.array([index[name] for name in names], np.int32)


def response_object(version: str, recommendation: Recommendation, catalogue: Catalogue) -> dict[str, Any]:
    """The answer as plain values: `{"version", "items": [{"item_id", "title", "score"}], "text"}`."""
    items = ranked_items(recommendation.items, recommendation.scores, catalogue)
    return {"version": version, "items": items, "text": recommendation.text}


def ranked_items(items: Iterable[int], scores: Iterable[float], catalogue: Catalogue) -> list[dict[str, Any]]:
    """Items as they are answered."""
    return [
        {"item_id": catalogue.item_ids[item], "title": catalogue.titles[item], "score": score}
        for item, score in zip(items, scores, strict=True)
    ]


def picture_object(
    version: str, points: Sequence[Sequence[float]], items: Sequence[int], catalogue: Catalogue
) -> dict[str, Any]:
    """A picture as it is answered: the points are those of the preference, of the draws, and of the items."""
    draws = len(points) - 1 - len(items)
    named = [{"item_id": catalogue.item_ids[item], "title": catalogue.titles[item]} for item in items]
    told = [{"kind": "preference"}, *[{"kind": "draw"}] * draws, *({"kind": "item"} | name for name in named)]
    return {"version": version, "points": [{**one, "x": x, "y": y} for one, (x, y) in zip(told, points, strict=True)]}


def _shown(raw_id: str) -> str:
    return f"{raw_id[:MAX_CHARS]!r}"
