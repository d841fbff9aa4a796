"""Items that are added to a text index, or altered, after it was built."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ctd_scale.batches import Catalogue
from ctd_scale.retrieval.text import TextIndex

WORDS = "abcdefgh"
titles_of = st.lists(st.sampled_from(WORDS), max_size=6).map(" ".join)


def build(titles: list[str]) -> TextIndex:
    return TextIndex.build(Catalogue(titles, titles, [""] * len(titles)), stop_text="")


@given(st.lists(titles_of, min_size=2, max_size=30), st.data(), titles_of, st.integers(1, 12))
def test_an_item_that_is_put_in_again_changes_nothing(
    titles: list[str], data: st.DataObject, asked: str, limit: int
) -> None:
    """The weights of later items are those that building gives."""
    again = np.array(data.draw(st.lists(st.integers(0, len(titles) - 1), unique=True)), np.int32)
    built = build(titles)
    changed = built.with_items(again, [titles[item] for item in again], [""] * len(again))
    (wanted,), (found,) = built.matches([asked], limit), changed.matches([asked], limit)
    assert len(found) == len(wanted)
    # Sums of other rounding may order ties in another way.
    assert set(built.matches([asked], len(titles))[0].tolist()) >= set(found.tolist())
    assert np.allclose(built.describe(titles, [""] * len(titles)).toarray()[:, 1:], built.counts.toarray()[:, 1:])


def test_what_is_added_is_found_and_what_is_altered_is_found_by_its_new_words_alone() -> None:
    built = build(["red river", "blue night", "red machine"])
    changed = built.with_items(np.array([0, 3], np.int32), ["green garden", "red empire"], ["", "saga"])
    assert built.matches(["red"], 5)[0].tolist() == [0, 2]
    assert sorted(changed.matches(["red"], 5)[0].tolist()) == [2, 3]
    assert changed.matches(["green garden"], 5)[0].tolist() == [0]
    assert changed.matches(["river"], 5)[0].tolist() == []
    assert changed.matches(["saga"], 5)[0].tolist() == [3], "a word that no built item has"
    assert len(changed.matches(["red"], 1)[0]) == 1
    wordless = built.with_items(np.array([0], np.int32), ["!"], [""])
    assert wordless.matches(["red"], 5)[0].tolist() == [2]


def test_what_is_kept_of_a_text_is_of_one_state_and_length() -> None:
    built = build(["red river", "blue night", "red machine"])
    for _ in range(2):
        assert built.matches(["red"], 2)[0].tolist() == [0, 2]
        assert built.matches(["red"], 1)[0].tolist() == [0]
        changed = built.with_items(np.array([1], np.int32), ["red"], [""])
        assert sorted(changed.matches(["red"], 3)[0].tolist()) == [0, 1, 2]
    assert built.matches(["red"], 2)[0] is built.matches(["red"], 2)[0], "it was not searched again"
    with pytest.raises(ValueError, match="read-only"):
        built.matches(["red"], 2)[0][0] = 1


def test_an_index_is_freed_with_what_it_kept() -> None:
    """Without the collector's help: what a server holds is not looked through."""
    built = build(["red river", "blue night"])
    built.matches(["red"], 2)
    gone = weakref.ref(built._matcher)
    gc.disable()
    try:
        del built
        assert gone() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("limit", [0, 1, 2])
def test_no_more_come_back_than_asked_for(limit: int) -> None:
    changed = build(["a", "a", "a"]).with_items(np.array([3, 4], np.int32), ["a", "a"], ["", ""])
    assert len(changed.matches(["a"], limit)[0]) == limit
