"""Raw ids to histories, and recommendations to the answer."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from ctd_scale.batches import Catalogue, InteractionLog
from ctd_scale.recommender import Recommendation
from ctd_scale.serving.schema import (
    Boost,
    Directory,
    Range,
    RecommendRequest,
    RecommendResponse,
    RequestError,
    UnknownItemError,
    UnknownUserError,
    read_range,
    read_ranges,
    response_object,
)

CATALOGUE = Catalogue(["a", "b", "c"], ["Alpha", "Bêta", "Gamma"], ["", "", ""])


@pytest.fixture
def directory() -> Directory:
    log = InteractionLog(
        offsets=np.array([0, 3, 3]), items=np.array([2, 0, 2], np.int32), user_ids=["ann", "bob"], catalogue=CATALOGUE
    )
    return Directory(log)


def test_a_user_stands_for_everything_known_of_him(directory: Directory) -> None:
    found = directory.history(user_id="ann")
    assert found.dtype == np.int32
    assert found.tolist() == [2, 0, 2]


def test_item_ids_keep_their_order_and_repeats(directory: Directory) -> None:
    found = directory.history(history=["c", "a", "a", "b"])
    assert found.dtype == np.int32
    assert found.tolist() == [2, 0, 0, 1]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "give exactly one of history and user_id"),
        ({"user_id": "ann", "history": ["a"]}, "give exactly one of history and user_id"),
        ({"history": []}, "history: is empty, expected at least one item id"),
        ({"history": ["a", "x", "y", "x"]}, "history: unknown item ids 'x', 'y'"),
        ({"history": list("stuvwxyz")}, "history: unknown item ids 's', 't', 'u', 'v', 'w' and 3 more"),
        ({"history": ["x" * 500]}, f"history: unknown item ids '{'x' * 64}'"),
        ({"history": ["\ud800"]}, r"history: unknown item ids '\ud800'"),
        ({"user_id": "eve"}, "user_id: 'eve' is not in the interaction log; give a history instead"),
        ({"user_id": "bob"}, "user_id: 'bob' has no interactions; give a history instead"),
    ],
)
def test_what_cannot_be_resolved_is_named(directory: Directory, given: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError) as caught:
        directory.history(**given)
    assert str(caught.value) == message
    assert isinstance(caught.value, UnknownUserError) == ("not in the interaction log" in message)


def test_the_answer_holds_ids_titles_and_scores_best_first() -> None:
    recommendation = Recommendation([1, 2], [0.75, 0.5], "something")
    answer = response_object("v1", recommendation, CATALOGUE)
    assert answer == {
        "version": "v1",
        "items": [
            {"item_id": "b", "title": "Bêta", "score": 0.75},
            {"item_id": "c", "title": "Gamma", "score": 0.5},
        ],
        "text": "something",
    }
    # What the endpoint documents is what it sends, key for key.
    assert json.loads(RecommendResponse(**answer).model_dump_json()) == answer


def test_defaults_of_a_request() -> None:
    request = RecommendRequest.model_validate_json('{"history": ["a"]}')
    assert (request.k, request.exclude_seen, request.explain, request.user_id) == (10, True, False, None)


@pytest.mark.parametrize(
    "given",
    [{"k": 0}, {"k": "3"}, {"k": 2.5}, {"k": True}, {"explain": 1}, {"history": [1]}, {"user_id": 7}, {"top_k": 3}],
)
def test_a_request_is_taken_at_its_word(given: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        RecommendRequest.model_validate(given)


# -- what may not come back ------------------------------------------------------------------------------------


NUMBERS = {
    "price": np.array([5.0, 7.5, np.nan, -1.0, 20.0, 7.5]),
    "year": np.array([1990.0, np.nan, 2000, 2001, 2002, 2003]),
}


@pytest.fixture
def sorted_directory() -> Directory:
    catalogue = Catalogue(list("abcdef"), list("ABCDEF"), ["x", "y", "x", "", "z", "y"], NUMBERS)
    return Directory(InteractionLog(np.array([0, 1]), np.array([2], np.int32), ["ann"], catalogue))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, ""),
        ({"items": ["e", "a", "e"]}, "ae"),
        ({"categories": ["x"]}, "bdef"),
        ({"categories": ["x", "z"], "items": ["a"]}, "abdf"),
        ({"exclude_categories": ["y"]}, "bf"),
        ({"categories": ["x", "y"], "exclude_categories": ["y"]}, "bdef"),
        ({"exclude_categories": [""]}, "d"),
        ({"only_items": ["a", "c", "a"]}, "bdef"),
        ({"only_items": ["a", "c"], "items": ["c"], "categories": ["x"]}, "bcdef"),
        ({"ranges": {"price": Range(min=5, max=7.5)}}, "cde"),
        ({"ranges": {"price": Range(min=7.5)}}, "acd"),
        ({"ranges": {"price": Range(max=5)}}, "bcef"),
        ({"ranges": {"price": Range(min=6, max=7)}}, "abcdef"),
        ({"ranges": {"price": Range(max=100), "year": Range(max=2002)}, "exclude_categories": ["x"]}, "abcf"),
    ],
)
def test_excluded_items_of_a_request(sorted_directory: Directory, given: dict[str, Any], expected: str) -> None:
    excluded = sorted_directory.excluded(**given)
    assert excluded.dtype == np.int32
    assert {"abcdef"[item] for item in excluded} == set(expected)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"items": ["a", "q"]}, "exclude_items: unknown item ids 'q'"),
        ({"categories": ["X"]}, "categories: unknown categories 'X'"),
        ({"exclude_categories": ["w", "x"]}, "exclude_categories: unknown categories 'w'"),
        ({"categories": []}, "categories: is empty, expected at least one, or none given"),
        ({"only_items": []}, "only_items: is empty, expected at least one, or none given"),
        ({"only_items": ["a", "q"]}, "only_items: unknown item ids 'q'"),
        ({"ranges": {"price": Range()}}, "ranges.price: expected min, max or both"),
        ({"ranges": {"price": Range(min=2, max=1)}}, "ranges.price: min=2 is above max=1"),
        (
            {"ranges": {"prize": Range(min=2)}},
            "ranges: items have no number 'prize' (they have: 'price', 'year'); "
            "interactions.attribute_columns says which they have",
        ),
    ],
)
def test_an_unknown_name_is_no_filter(sorted_directory: Directory, given: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError) as caught:
        sorted_directory.excluded(**given)
    assert str(caught.value) == message


@settings(max_examples=50)
@given(st.lists(st.floats(-9, 9), min_size=12, max_size=12), st.floats(-9, 9), st.floats(0, 9), st.data())
def test_filters_together_are_brute_force(values: list[float], low: float, width: float, data: st.DataObject) -> None:
    names = [chr(97 + item) for item in range(12)]
    numbers = np.array(values)
    numbers[::4] = np.nan
    catalogue = Catalogue(names, names, ["x", "y", "z"] * 4, {"n": numbers})
    directory = Directory(InteractionLog(np.array([0, 1]), np.array([2], np.int32), ["ann"], catalogue))
    only = data.draw(st.lists(st.sampled_from(names), min_size=1))
    banned = data.draw(st.lists(st.sampled_from(names)))
    excluded = directory.excluded(
        items=banned, categories=["x", "y"], only_items=only, ranges={"n": Range(min=low, max=low + width)}
    )
    allowed = {
        item
        for item, (name, number) in enumerate(zip(names, numbers, strict=True))
        if name in only and name not in banned and item % 3 != 2 and low <= number <= low + width
    }
    assert set(range(12)) - set(excluded.tolist()) == allowed


def test_boosts_multiply_and_name_what_is_wrong(sorted_directory: Directory) -> None:
    wanted = [
        Boost(categories=["x", "z"], factor=2),
        Boost(items=["a", "b", "a"], factor=1.5),
        Boost(categories=["y"], factor=0.5),
        Boost(items=["f"], factor=2),
    ]
    found = sorted_directory.boosts(wanted)
    assert found is not None
    # a is in x and named, b is in y and named, f is in y and named by what undoes it.
    assert (found.items.tolist(), found.factors.tolist()) == ([0, 1, 2, 4], [3.0, 0.75, 2.0, 2.0])
    assert found.of(np.array([-1, 3, 4, 5, 0], np.int32)).tolist() == [1.0, 1.0, 2.0, 1.0, 3.0]
    assert sorted_directory.boosts([]) is None
    assert sorted_directory.boosts([Boost(items=["a"], factor=1)]) is None
    one = {"items": ["a"]}
    for wrong, message in (
        ([Boost(factor=2)], "boosts.0: give exactly one of categories and items, not empty"),
        ([Boost(items=[], factor=2)], "boosts.0: give exactly one of categories and items, not empty"),
        ([Boost(**one, factor=2), Boost(**one, categories=["x"], factor=2)], "boosts.1: give exactly one of"),
        ([Boost(items=["q"], factor=2)], "boosts.0.items: unknown item ids 'q'"),
        ([Boost(categories=["q"], factor=2)], "boosts.0.categories: unknown categories 'q'"),
    ):
        with pytest.raises(RequestError) as caught:
            sorted_directory.boosts(wrong)
        assert str(caught.value).startswith(message)


def test_boosts_of_too_many_different_factors_are_refused() -> None:
    names = [str(item) for item in range(64)]
    directory = Directory(
        InteractionLog(np.array([0, 1]), np.array([2], np.int32), ["ann"], Catalogue(names, names, [""] * 64))
    )
    wanted = [
        Boost(items=[name for item, name in enumerate(names) if item >> bit & 1], factor=1.1 + bit / 10)
        for bit in range(6)
    ]
    with pytest.raises(RequestError, match=r"boosts: they give items 6\d different factors, expected at most 16"):
        directory.boosts(wanted)
    assert directory.boosts(wanted[:4]) is not None


def test_a_range_is_read_from_a_word() -> None:
    assert read_range("price=5:20") == ("price", Range(min=5, max=20))
    assert read_range("a=b=-1.5:") == ("a=b", Range(min=-1.5))
    assert read_range("price=:1e3") == ("price", Range(max=1000))
    for wrong in ("price", "price=5", "=5:6", "price=a:6", "price=nan:", "price=1:2:3"):
        with pytest.raises(RequestError, match=f"--range {wrong}: expected NAME=MIN:MAX"):
            read_range(wrong)
    assert list(read_ranges(["price=5:", "year=:9"])) == ["price", "year"]
    with pytest.raises(RequestError, match="--range price=1:2: price has a range already"):
        read_ranges(["price=5:20", "price=1:2"])


def test_an_item_by_its_id(sorted_directory: Directory) -> None:
    assert sorted_directory.item("c") == 2
    with pytest.raises(UnknownItemError, match="item_id: 'q' is not in the catalogue"):
        sorted_directory.item("q")
