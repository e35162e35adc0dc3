"""Words and their numbers: how text becomes a column of whole numbers, and how it is read back."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from kdbench.errors import UserError, shown

NOTHING, START, END, HIDDEN, UNKNOWN = range(5)
_SPECIAL = ("", "[start]", "[end]", "[hidden]", "[unknown]")
FIRST_WORD = len(_SPECIAL)
_WORD = re.compile(r"\w+|[^\w\s]")  # a run of letters and digits, or one punctuation mark


def words_of(text: str) -> list[str]:
    """The text's words and punctuation marks in lower case, as a vocabulary holds them."""
    return _WORD.findall(text.lower())


@dataclass(frozen=True)
class Vocabulary:
    """Words and their numbers: 0 nothing, 1 start, 2 end, 3 hidden, 4 unknown, then the words in order.

    Args:
        words: Lower-case words and punctuation marks, each once. The first has number 5.

    Raises:
        UserError: A word is listed twice, or `encode` could never find it.

    Example:
        >>> Vocabulary(("a", "red", "circle", ",")).encode("A red square,", 6)
        [5, 6, 4, 8, 0, 0]
    """

    words: tuple[str, ...]

    def __post_init__(self) -> None:
        seen: set[str] = set()
        for word in self.words:
            if _WORD.fullmatch(word) is None or word != word.lower():
                raise UserError(f"vocabulary: {shown(word)} must be one lower-case word or one punctuation mark.")
            if word in seen:
                raise UserError(f"vocabulary: {shown(word)} is listed twice.")
            seen.add(word)

    def __len__(self) -> int:
        """Number of different tokens, the five special ones included: the rows of an embedding table."""
        return FIRST_WORD + len(self.words)

    def encode(self, text: str, length: int) -> list[int]:
        """The numbers of the text's words and punctuation marks.

        Args:
            text: Any text. Case is ignored.
            length: Number of tokens to return. Longer text is cut, shorter text is padded with 0.

        Returns:
            `length` numbers. A word outside the vocabulary becomes 4. No start or end token is added.
        """
        tokens = [self._numbers.get(word, UNKNOWN) for word in words_of(text)[:length]]
        return tokens + [NOTHING] * (length - len(tokens))

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of numbers 0 .. len(self) - 1.

        Padding disappears. The other special tokens are written as `[start]`, `[end]`, `[hidden]` and `[unknown]`. Punctuation joins the
        word before it.

        Raises:
            IndexError: A number is not in the vocabulary.
        """
        text = ""
        for token in tokens:
            if not 0 <= token < len(self):
                raise IndexError(f"token {token} is not in a vocabulary of {len(self)}")
            word = _SPECIAL[token] if token < FIRST_WORD else self.words[token - FIRST_WORD]
            joins = token >= FIRST_WORD and not (word[0].isalnum() or word[0] == "_")
            text += word if joins or not text or not word else f" {word}"
        return text

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {word: number for number, word in enumerate(self.words, FIRST_WORD)}
