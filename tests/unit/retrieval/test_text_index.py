"""The match set of a text."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ctd_scale.batches import Catalogue
from ctd_scale.retrieval.text import ANSWER_TEMPLATE, TextIndex, words

TITLES = {
    "Heat": "crime",
    "It": "horror",
    "The Heat of the Night": "mystery",
    "Schindler's List": "war",
    "Ocean's Eleven": "crime",
    "Such Products": "",
    "And the": "",
    "": "",
    "1984": "drama",
    "Amélie": "comedy",
}


def catalogue(titles: dict[str, str]) -> Catalogue:
    return Catalogue([str(item) for item in range(len(titles))], list(titles), list(titles.values()))


@pytest.fixture(scope="module")
def index() -> TextIndex:
    return TextIndex.build(catalogue(TITLES))


def found(index: TextIndex, text: str, limit: int = 20) -> list[str]:
    (ids,) = index.matches([text], limit)
    assert ids.dtype == np.int32
    return [list(TITLES)[item] for item in ids]


def test_an_answer_matches_the_title_that_it_names_first(index: TextIndex) -> None:
    answer = "The user might like crime products, such as Heat"
    assert found(index, answer, limit=1) == ["Heat"]
    assert set(found(index, answer)) == {"Heat", "Ocean's Eleven", "The Heat of the Night"}


@pytest.mark.parametrize("title", ["It", "1984", "Amélie", "AMÉLIE", "Schindlers List", "schindler\u2019s list"])
def test_lone_and_odd_titles_are_found(index: TextIndex, title: str) -> None:
    (ids,) = index.matches([title], 5)
    assert len(ids) == 1


@pytest.mark.parametrize(
    "text", ["", "   ", "?!", ANSWER_TEMPLATE, "of the", "s", "unheard", "such products", "\ud800"]
)
def test_a_text_that_says_nothing_matches_nothing(index: TextIndex, text: str) -> None:
    assert found(index, text) == []


def test_stop_words_do_not_match_titles_that_have_other_words(index: TextIndex) -> None:
    assert set(found(index, "the night and of")) == {"The Heat of the Night", "And the"}


def test_ties_go_by_index() -> None:
    twins = Catalogue(["a", "b", "c"], ["Twin", "Other", "Twin"], ["", "", ""])
    index = TextIndex.build(twins)
    assert index.matches(["twin", "twin"], 1)[0].tolist() == [0]
    assert index.matches(["twin"], 5)[0].tolist() == [0, 2]


def test_other_stop_words_can_be_given() -> None:
    titles = catalogue({"Heat": "", "Like a heat": ""})
    assert TextIndex.build(titles, stop_text="heat").matches(["heat like"], 5)[0].tolist() == [1]


def test_a_catalogue_of_stop_words_and_blanks_builds() -> None:
    index = TextIndex.build(catalogue({"The": "", "": "such as"}))
    assert [ids.tolist() for ids in index.matches(["the", "anything", ""], 3)] == [[], [], []]


def test_an_empty_catalogue_is_refused() -> None:
    with pytest.raises(ValueError, match="no items"):
        TextIndex.build(Catalogue([], [], []))


def test_saved_and_loaded_answers_alike_and_quietly(
    index: TextIndex, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    index.save(tmp_path / "text")
    loaded = TextIndex.load(tmp_path / "text")
    texts = [*TITLES, *TITLES.values(), "crime of the night", ANSWER_TEMPLATE]
    for ours, theirs in zip(index.matches(texts, 3), loaded.matches(texts, 3), strict=True):
        assert np.array_equal(ours, theirs)
    assert capfd.readouterr() == ("", "")


def test_the_same_catalogue_gives_the_same_files(tmp_path: Path) -> None:
    for name in ("a", "b"):
        TextIndex.build(catalogue(TITLES)).save(tmp_path / name)
    for file in sorted((tmp_path / "a").iterdir()):
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes(), file.name


@given(
    st.lists(st.lists(st.sampled_from("abcdefgh"), max_size=6), min_size=1, max_size=80),
    st.lists(st.sampled_from("abcdefghz"), min_size=1, max_size=12),
    st.integers(1, 12),
)
def test_the_best_documents_are_those_of_the_full_sum(documents: list[list[str]], asked: list[str], limit: int) -> None:
    titles = [" ".join(document) for document in documents]
    catalogue = Catalogue(titles, titles, [""] * len(titles))
    index = TextIndex.build(catalogue, stop_text="")
    (found,) = index.matches([" ".join(asked)], limit)
    known = [index._bm25.vocab_dict[word] for word in asked if word in index._bm25.vocab_dict]
    scores = index._bm25.get_scores_from_ids(known) if known else np.zeros(len(titles))
    assert len(found) == min(limit, int((scores > 0).sum()))
    assert np.allclose(scores[found], np.sort(scores)[::-1][: len(found)], rtol=1e-5)
    assert len(set(found.tolist())) == len(found)


def test_words_that_cannot_help_any_more_are_looked_up_and_not_read() -> None:
    """The same list over documents enough for every shortcut: a usual word beside rare ones."""
    titles = [
        f"usual {'often ' * (number % 3 == 0)}{'rare ' * (number % 400 == 7)}{'lone ' * (number == 77)}x{number}"
        for number in range(20_000)
    ]
    index = TextIndex.build(Catalogue(titles, titles, [""] * len(titles)))
    for text in ("usual often rare lone", "rare usual", "usual often", "lone x5 usual rare rare", "x9 x19999 often"):
        known = [index._bm25.vocab_dict[word] for word in text.split()]
        scores = index._bm25.get_scores_from_ids(known)
        for limit in (1, 10, 100):
            (found,) = index.matches([text], limit)
            assert np.allclose(scores[found], np.sort(scores)[::-1][:limit], rtol=1e-5)
    together = index.matches(["usual rare", "often lone", "usual rare"], 10)
    assert np.array_equal(together[0], together[2])
    assert np.array_equal(together[1], index.matches(["often lone"], 10)[0])


def test_words() -> None:
    assert words("Schindler's List (1993), Drama|War") == ["schindlers", "list", "1993", "drama", "war"]
