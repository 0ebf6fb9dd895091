"""The hashed words tokenizer against a slow one, and its numbers, which may never change."""

import hashlib
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.errors import DataError
from data.text import TokenizerSpec, build_tokenizer
from data.text_words import WordTokenizer, split_words

WORD = 2**64


def word_hash(word):
    return int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")


def pair_hash(one, other):
    return mixed((word_hash(one) * 0x9E3779B97F4A7C15 + word_hash(other)) % WORD)


def mixed(x):
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % WORD
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % WORD
    return x ^ (x >> 31)


def placed_hash(word, place):
    return mixed((word_hash(word) * 0xBF58476D1CE4E5B9 + place) % WORD)


def slow_row(text, length, buckets, ngrams, skip, placed):
    """One row, word by word."""
    words = re.findall("[a-z0-9]+", text.lower())[:length]
    numbers = [word_hash(word) for word in words]
    numbers += [placed_hash(word, place) for place, word in enumerate(words[:placed])]
    for distance in range(1, skip + 2) if ngrams == 2 else ():
        numbers += [pair_hash(*pair) for pair in zip(words, words[distance:], strict=False)]
    row = [1 + number % (buckets - 1) for number in numbers][:length]
    return row + [0] * (length - len(row))


@settings(max_examples=200, deadline=None)
@given(
    texts=st.lists(st.text("ab cD1,_-.\n", max_size=40), max_size=6),
    length=st.integers(1, 40),
    buckets=st.sampled_from([2, 3, 50, 1 << 16, 1 << 40]),
    ngrams=st.sampled_from([1, 2]),
    skip=st.integers(0, 3),
    placed=st.integers(0, 5),
)
def test_rows_are_words_then_pairs(texts, length, buckets, ngrams, skip, placed):
    tokenizer = WordTokenizer(
        length, buckets=buckets, ngrams=ngrams, skip=skip, placed_words=placed
    )
    rows = tokenizer(texts)
    assert rows.shape == (len(texts), length) and rows.dtype == torch.int64
    # Words that do not fit cut the pairs, too: a slow row lists all words before any pair.
    assert rows.tolist() == [
        slow_row(text, length, buckets, ngrams, skip, placed) for text in texts
    ]


def test_numbers_are_the_same_for_ever():
    # Python's own string hashes differ from process to process: these may not.
    options = (("buckets", 1 << 16), ("ngrams", 2), ("skip", 1))
    spec = TokenizerSpec("words", 10, options=options)
    assert build_tokenizer(spec)(["The zoo, of  FISHES_", "", "naïve 中文 ½x"]).tolist() == GOLDEN


def test_words_of_any_script():
    assert split_words("L'Été_2024: naïve-ly ΑΘΗΝΑ Straße") == (
        ["l", "été", "2024", "naïve", "ly", "αθηνα", "straße"]
    )
    assert split_words("cafe\u0301") == split_words("caf\u00e9") == ["café"]
    assert split_words(" _-.!") == []


def test_a_batch_is_its_rows():
    tokenizer = build_tokenizer(TokenizerSpec("words", 12, options=(("ngrams", 2),)))
    texts = ["one fish two fish", "", "red", "blue fish " * 9]
    assert torch.equal(tokenizer(texts), torch.cat([tokenizer([text]) for text in texts]))
    assert tokenizer([]).shape == (0, 12)


def test_numbers_spread_over_the_buckets():
    tokenizer = WordTokenizer(1, buckets=101, ngrams=1, skip=0)
    rows = tokenizer([f"w{number}" for number in range(20_000)])
    counts = torch.bincount(rows.flatten(), minlength=101)
    assert counts[0] == 0 and counts[1:].min() > 130 and counts[1:].max() < 280


@pytest.mark.parametrize(
    ("length", "options", "words"),
    [
        (0, {}, "context_length = 0"),
        (8, {"buckets": 1}, "buckets = 1"),
        (8, {"ngrams": 3}, "ngrams = 3"),
        (8, {"skip": -1}, "skip = -1"),
        (8, {"placed_words": -1}, "placed_words = -1"),
        (8, {"bucket": 9}, "no option bucket; there are buckets, ngrams, skip, placed_words"),
    ],
)
def test_bad_options(length, options, words):
    with pytest.raises(DataError, match=words):
        build_tokenizer(TokenizerSpec("words", length, options=tuple(options.items())))


GOLDEN = [
    [3286, 47750, 17728, 13249, 56752, 51574, 61566, 4869, 4842, 0],
    [0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
    [19812, 40597, 12561, 33342, 14741, 58892, 60668, 64452, 35398, 0],
]
