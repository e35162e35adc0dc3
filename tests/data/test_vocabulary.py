from dataclasses import replace

import pytest

from kdbench.data.shapes import shapes
from kdbench.data.vocabulary import END, HIDDEN, START, UNKNOWN, Vocabulary
from kdbench.errors import UserError

WORDS = Vocabulary(("a", "red", "circle", ",", "ring"))


def test_words_are_numbered_from_five_in_their_order():
    assert WORDS.encode("a red circle , ring", 5) == [5, 6, 7, 8, 9]
    assert len(WORDS) == 10
    assert (START, END, HIDDEN, UNKNOWN) == (1, 2, 3, 4)


def test_case_and_space_do_not_count_and_punctuation_is_a_word():
    assert WORDS.encode("A  Red\ncircle,ring", 5) == [5, 6, 7, 8, 9]


def test_text_is_cut_or_padded_with_zeros():
    assert WORDS.encode("a red circle", 2) == [5, 6]
    assert WORDS.encode("a red circle", 5) == [5, 6, 7, 0, 0]
    assert WORDS.encode("", 2) == [0, 0]
    assert WORDS.encode("a", 0) == []


def test_a_word_that_is_not_listed_is_unknown():
    assert WORDS.encode("a blue circle!", 4) == [5, UNKNOWN, 7, UNKNOWN]


def test_tokens_are_read_back_without_their_padding():
    assert WORDS.decode([5, 6, 7, 8, 5, 9, 0, 0]) == "a red circle, a ring"
    assert WORDS.decode([START, 5, HIDDEN, UNKNOWN, END, 0]) == "[start] a [hidden] [unknown] [end]"
    assert WORDS.decode([]) == ""


@pytest.mark.parametrize("token", [-1, 10])
def test_a_number_outside_is_refused(token: int):
    with pytest.raises(IndexError, match="not in a vocabulary of 10"):
        WORDS.decode([token])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("a", "b", "a"), "'a' is listed twice"),
        (("Red",), "'Red' must be one lower-case word"),
        (("two words",), "'two words' must be"),
        (("",), "'' must be"),
        (("it's",), '"it\'s" must be'),
    ],
)
def test_a_word_that_encode_could_not_find_is_refused(words: tuple[str, ...], said: str):
    with pytest.raises(UserError, match=said):
        Vocabulary(words)


def test_a_source_without_text_has_the_hash_that_it_had_and_its_words_count_otherwise():
    source = shapes(train=2, test=1, size=16)
    assert source.vocabulary is None
    hashes = {replace(source, vocabulary=words).sha256 for words in (None, Vocabulary(("a",)), Vocabulary(("b",)), Vocabulary(("a", "b")))}
    assert len(hashes) == 4
