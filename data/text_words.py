"""Texts -> numbers of their words and word pairs: hashed, so that no vocabulary is kept.

A word is a run of letters and digits, lower-cased, of any script; marks, underscores and all other
signs separate. Numbers are the same on every machine; what a letter is, is Unicode's to say.
"""

import hashlib
import re
import unicodedata
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.errors import DataError

_MAX_WORDS = 1 << 20
_WORD = re.compile(r"[^\W_]+")
_ASCII_WORD = re.compile(r"[a-z0-9]+")
_OPTIONS = {"buckets": 1 << 16, "ngrams": 1, "skip": 0, "placed_words": 0}

# Odd constants of splitmix64 (Steele, Lea and Flood 2014).
_STEP, _FIRST, _SECOND = (
    np.uint64(constant) for constant in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)


class WordTokenizer:
    """Texts -> (n, T) int64: words in the order of the text, then pairs, then zeros.

    A number is 1 + hash mod (buckets - 1), so 0 is padding alone. The first `placed_words` words
    follow once more, each with another number at each place. With `ngrams` = 2 the pairs of
    neighbours come then, then the pairs with one word between them, up to `skip` words; a
    pair has one number at any distance. What does not fit into T is cut: pairs before words. A
    text without a word is a row of zeros.
    """

    def __init__(
        self, context_length: int, *, buckets: int, ngrams: int, skip: int, placed_words: int = 0
    ) -> None:
        for name, value, least in (
            ("context_length", context_length, 1),
            ("buckets", buckets, 2),
            ("skip", skip, 0),
            ("placed_words", placed_words, 0),
        ):
            if value < least:
                raise DataError(f"words tokenizer: {name} = {value}, and {least} is the least")
        if ngrams not in (1, 2):
            raise DataError(f"words tokenizer: ngrams = {ngrams}: 1 (words) or 2 (and pairs)")
        self.context_length = context_length
        self.buckets = buckets
        self._placed_words = placed_words
        self._distances = range(1, skip + 2) if ngrams == 2 else range(0)
        self._hashes = _Hashes()

    @classmethod
    def from_options(cls, context_length: int, options: dict[str, Any]) -> "WordTokenizer":
        """From the options of a `TokenizerSpec`; DataError for one that does not exist."""
        if unknown := options.keys() - _OPTIONS.keys():
            raise DataError(
                f"words tokenizer: no option {', '.join(sorted(unknown))}; there are "
                f"{', '.join(_OPTIONS)}"
            )
        return cls(context_length, **{**_OPTIONS, **options})

    def __call__(self, texts: Sequence[str]) -> Tensor:  # (n, T) int64
        """Numbers of each text, cut or padded to the context length."""
        hashes, counts = list[int](), list[int]()
        of_word, limit = self._hashes.__getitem__, self.context_length
        for text in texts:
            words = split_words(text)
            counts.append(min(len(words), limit))
            hashes += map(of_word, words[:limit])
        return torch.from_numpy(self._lay_out(np.array(hashes, np.uint64), np.array(counts, int)))

    def _lay_out(self, hashes: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """Hashes of all words and words of each text -> (n, T)."""
        rows = np.zeros((len(counts), self.context_length), np.int64)
        owners = np.repeat(np.arange(len(counts)), counts)
        places = np.arange(len(hashes)) - np.repeat(np.cumsum(counts) - counts, counts)
        rows[owners, places] = self._numbers(hashes)
        used = counts.copy()
        first = np.flatnonzero(places < self._placed_words)
        at = used[owners[first]] + places[first]
        first, at = first[at < self.context_length], at[at < self.context_length]
        placed = _mixed(hashes[first] * _FIRST + places[first].astype(np.uint64))
        rows[owners[first], at] = self._numbers(placed)
        used += np.minimum(counts, self._placed_words)
        for distance in self._distances:
            follows = places + distance < counts[owners]
            at = used[owners] + places
            first = np.flatnonzero(follows & (at < self.context_length))
            pairs = _mixed(hashes[first] * _STEP + hashes[first + distance])
            rows[owners[first], at[first]] = self._numbers(pairs)
            used += np.maximum(counts - distance, 0)
        return rows

    def _numbers(self, hashes: np.ndarray) -> np.ndarray:
        return (hashes % np.uint64(self.buckets - 1)).astype(np.int64) + 1


def split_words(text: str) -> list[str]:
    """The words of a text, lower-cased; composed and decomposed letters are the same (NFKC)."""
    if text.isascii():
        return _ASCII_WORD.findall(text.lower())
    return _WORD.findall(unicodedata.normalize("NFKC", text).lower())


class _Hashes(dict[str, int]):
    """64-bit hashes of words, kept once they were asked for."""

    def __missing__(self, word: str) -> int:
        if len(self) >= _MAX_WORDS:
            self.clear()
        digest = hashlib.blake2b(word.encode(), digest_size=8).digest()
        self[word] = found = int.from_bytes(digest, "little")
        return found


def _mixed(numbers: np.ndarray) -> np.ndarray:  # (n,) uint64
    """splitmix64's finaliser: every bit depends on every other."""
    numbers = (numbers ^ (numbers >> np.uint64(30))) * _FIRST
    numbers = (numbers ^ (numbers >> np.uint64(27))) * _SECOND
    return numbers ^ (numbers >> np.uint64(31))
