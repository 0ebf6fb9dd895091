"""Captions of a sample and their tokens; the models' own text towers are in `trainer/models`."""

import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from data.decode import BadSample
from data.errors import DataError
from data.text_words import WordTokenizer

WORDS = "words"
"""Name of the tokenizer of `data/text_words.py`."""
_MAX_WORDS = 1 << 20
_BY_TEXT = {"clean", "reduction_mask", "bpe_path", "additional_special_tokens"}


class CaptionReader:
    """Finds the captions of a sample in its caption member.

    `caption_key` is a member ending (`txt`; `txt;caption` takes the first found) or `json:NAME`
    for a field of the JSON member that holds a string or a list of strings. Empty: no captions.
    """

    def __init__(self, caption_key: str, *, normalize: bool = False) -> None:
        head, colon, field = caption_key.partition(":")
        self.field = field
        self.endings = tuple(filter(None, head.split(";")))
        """Endings of the member that `captions` reads, first found wins."""
        is_field = self.endings == ("json",) and bool(field)
        if caption_key and not (is_field if colon else self.endings):
            raise DataError(f"caption key {caption_key!r}: write an ending (txt) or json:FIELD")
        self.normalize = normalize

    def captions(self, member: bytes | memoryview) -> list[str]:
        """Every caption of the sample, in stored order; raises BadSample when there is none."""
        texts = self._field(member) if self.field else [_text(member)]
        if self.normalize:
            texts = [text.strip().lower() for text in texts]
        texts = [text for text in texts if text and not text.isspace()]
        if not texts:
            raise BadSample("the caption is empty")
        return texts

    def choose(self, captions: Sequence[str], rng: np.random.Generator) -> str:
        """One caption, drawn uniformly; a single caption draws nothing."""
        return captions[0] if len(captions) == 1 else captions[int(rng.integers(len(captions)))]

    def _field(self, member: bytes | memoryview) -> list[str]:
        try:
            fields = json.loads(_text(member))
        except (ValueError, RecursionError) as error:
            raise BadSample(f"the JSON does not parse: {error}") from None
        if not isinstance(fields, dict) or self.field not in fields:
            raise BadSample(f"the JSON has no field {self.field!r}")
        value = fields[self.field]
        texts = value if isinstance(value, list) else [value]
        if not all(isinstance(text, str) for text in texts):
            raise BadSample(f"field {self.field!r} of the JSON is not a string or list of strings")
        if not all(map(_is_unicode, texts)):
            raise BadSample(f"field {self.field!r} of the JSON is not valid Unicode")
        return texts


def caption_hash(text: str) -> int:
    """A 63-bit hash of the caption, the same on every machine: equal captions, equal numbers."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


@dataclass(frozen=True)
class TokenizerSpec:
    """What a tokenizer is made of, as plain values that travel to the workers.

    The fields are those of an open_clip text config (`context_length`, `hf_tokenizer_name`,
    `tokenizer_mode`, `tokenizer_kwargs`).
    """

    name: str = ""
    """Hugging Face name or a local folder; empty: open_clip's own byte-pair encoding; `words`:
    hashed words, with the options buckets, ngrams and skip."""
    context_length: int = 77
    """Tokens of a row: longer captions are cut, shorter ones padded."""
    mode: str = ""
    """`clips` for CLIPS models, else empty."""
    options: tuple[tuple[str, Any], ...] = ()
    """Keyword arguments of the tokenizer's constructor."""


class Tokenizer(Protocol):
    """Texts -> (n, T) int64 tokens, cut or padded to the context length T."""

    def __call__(self, texts: Sequence[str]) -> Tensor: ...


class OpenClipTokenizer:
    """open_clip's tokenizers, and through them Hugging Face's. Build it once in each worker."""

    def __init__(self, spec: TokenizerSpec) -> None:
        self.spec = spec
        self._tokenize = _open_clip_tokenizer(spec)
        self._words: dict[str, list[int]] = {}
        self._by_word = not spec.name and not _BY_TEXT & dict(spec.options).keys()
        self._draws = bool(dict(spec.options).get("reduction_mask"))

    def __call__(self, texts: Sequence[str]) -> Tensor:  # (n, T) int64
        """Tokens of each text, cut or padded to the context length."""
        if self.spec.name and texts:
            return self._tokenize(list(texts))
        rows = torch.zeros(len(texts), self.spec.context_length, dtype=torch.int64)
        for row, text in zip(rows.numpy(), texts, strict=True):
            if self._by_word and text.isascii() and text.isprintable() and "&" not in text:
                self._fill_by_word(row, text)
            elif self._draws:
                with _seeded(caption_hash(text)):
                    row[:] = self._tokenize([text])[0]
            else:
                row[:] = self._tokenize([text])[0]
        return rows

    def _fill_by_word(self, row: np.ndarray, text: str) -> None:
        # open_clip's byte-pair encoding never looks across a space, and its cleaning leaves plain
        # ASCII as it is but for case and spaces: looking words up is the same and 8 times faster.
        tokens = [self._tokenize.sot_token_id]
        for word in text.lower().split():
            if word not in self._words:
                if len(self._words) >= _MAX_WORDS:
                    self._words.clear()
                self._words[word] = self._tokenize.encode(word)
            tokens += self._words[word]
        tokens.append(self._tokenize.eot_token_id)
        if len(tokens) > len(row):
            tokens[len(row) - 1 :] = [self._tokenize.eot_token_id]
        row[: len(tokens)] = tokens


def build_tokenizer(spec: TokenizerSpec) -> Tokenizer:
    """The tokenizer of a spec; DataError when its files or its package are not on this machine."""
    if spec.name == WORDS:
        return WordTokenizer.from_options(spec.context_length, dict(spec.options))
    return OpenClipTokenizer(spec)


def _open_clip_tokenizer(spec: TokenizerSpec) -> Any:
    from open_clip.tokenizer import HFTokenizer, SimpleTokenizer  # 2 s, so not at import

    options = dict(spec.options)
    if not spec.name:
        return SimpleTokenizer(context_length=spec.context_length, **options)
    try:
        return HFTokenizer(
            spec.name, spec.context_length, tokenizer_mode=spec.mode or None, **options
        )
    except ImportError as error:
        raise DataError(
            f"tokenizer {spec.name!r} needs the package {error.name}: pip install {error.name}"
        ) from None
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise DataError(
            f"tokenizer {spec.name!r} is neither a folder here nor in the Hugging Face cache, and "
            f"the hub did not give it ({reason}); download it once with network, or give a folder"
        ) from None


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    # open_clip's token-dropping modes draw from the global generators; keyed by the text, the
    # draw is the same on every rank and worker.
    python_state = random.getstate()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        random.seed(seed)
        try:
            yield
        finally:
            random.setstate(python_state)


def _text(member: bytes | memoryview) -> str:
    try:
        return str(member, "utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadSample(f"the caption member is not UTF-8: {error.reason}") from None


def _is_unicode(text: str) -> bool:
    # JSON escapes can spell half a surrogate pair, which no tokenizer takes.
    return text.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in text)
