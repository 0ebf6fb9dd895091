"""Captions as they are stored, and tokens against open_clip's own tokenizers."""

import importlib.util
import json
import pickle
import random

import numpy as np
import open_clip
import pytest
import torch
from open_clip.tokenizer import SimpleTokenizer

from data.augment import sample_rng
from data.decode import BadSample
from data.errors import DataError
from data.text import CaptionReader, TokenizerSpec, build_tokenizer, caption_hash

TEXTS = [
    "a photo of a cat",
    "  A  Photo\tof a   CAT\n",
    "it's 3 o'clock; they'll say: \"don't\" -- 100% (really?!)",
    "Zürich & Genève &amp; 東京 🚀 naïve",
    "mojibake: â€œquotesâ€\x9d ﬁne",
    "<start_of_text> not special <end_of_text>",
    "snake_case camelCase UPPER 12345 a1b2",
    "word " * 200,
    "a" * 500,
    "&lt;html&gt; x&y",
    "...",
    "x",
    "tab\tinside and \x0b odd \x1c spaces",
    " ",
    "",
]


@pytest.mark.parametrize("normalize", [False, True])
def test_a_text_member_is_one_caption(normalize):
    reader = CaptionReader("txt", normalize=normalize)
    assert reader.endings == ("txt",)
    wanted = " A cat\n" if not normalize else "a cat"
    assert reader.captions(b" A cat\n") == [wanted]
    assert reader.captions(memoryview(b"\xef\xbb\xbfx")) == ["x"]
    assert CaptionReader("txt;caption").endings == ("txt", "caption")
    assert CaptionReader("").endings == ()


def test_a_json_field_is_one_caption_or_several():
    reader = CaptionReader("json:captions")
    assert reader.endings == ("json",)
    assert reader.captions(b'{"captions": "one"}') == ["one"]
    assert reader.captions('{"captions": ["öne", " ", "two"]}'.encode()) == ["öne", "two"]
    assert CaptionReader("json:a:b").captions(b'{"a:b": "x"}') == ["x"]


@pytest.mark.parametrize(
    ("key", "member", "reason"),
    [
        ("txt", b"", "the caption is empty"),
        ("txt", b" \n", "the caption is empty"),
        ("txt", b"\xff\xfe", "not UTF-8"),
        ("json:c", b'{"c": []}', "the caption is empty"),
        ("json:c", b'{"c": "x"', "does not parse"),
        ("json:c", b'{"d": "x"}', "no field 'c'"),
        ("json:c", b'["c"]', "no field 'c'"),
        ("json:c", b'{"c": null}', "not a string or list of strings"),
        ("json:c", b'{"c": ["x", 3]}', "not a string or list of strings"),
        ("json:c", rb'{"c": "half \ud83d a pair"}', "not valid Unicode"),
        ("json:c", b"[" * 100_000, "does not parse"),
    ],
)
def test_a_caption_that_cannot_be_read_is_a_bad_sample(key, member, reason):
    with pytest.raises(BadSample, match=reason):
        CaptionReader(key).captions(member)


@pytest.mark.parametrize("key", ["json:", "yaml:caption", ";", ":x"])
def test_a_caption_key_that_means_nothing_is_an_error(key):
    with pytest.raises(DataError, match="write an ending"):
        CaptionReader(key)


def test_the_choice_is_keyed_and_uniform():
    reader, captions = CaptionReader("json:c"), ["a", "b", "c", "d", "e"]
    choices = [reader.choose(captions, sample_rng(0, 0, i, "caption")) for i in range(2000)]
    assert choices == [reader.choose(captions, sample_rng(0, 0, i, "caption")) for i in range(2000)]
    assert all(abs(choices.count(caption) / 2000 - 0.2) < 0.04 for caption in captions)
    other_epoch = [reader.choose(captions, sample_rng(0, 1, i, "caption")) for i in range(2000)]
    assert 0.1 < np.mean([a == b for a, b in zip(choices, other_epoch, strict=True)]) < 0.3
    rng = sample_rng(0, 0, 0, "caption")
    assert reader.choose(["only"], rng) == "only"
    assert rng.random() == sample_rng(0, 0, 0, "caption").random()


def test_the_hash_of_a_caption_is_the_same_for_ever():
    assert caption_hash("a photo of a cat") == GOLDEN_HASH
    assert caption_hash("東京") != caption_hash("東京 ")
    hashes = {caption_hash(str(number)) for number in range(10_000)}
    assert len(hashes) == 10_000 and all(0 <= value < 1 << 63 for value in hashes)


GOLDEN_HASH = 3911221920095594919


@pytest.mark.parametrize("context_length", [77, 16, 3])
def test_tokens_are_open_clips(context_length):
    ours = build_tokenizer(TokenizerSpec(context_length=context_length))
    theirs = open_clip.get_tokenizer("ViT-B-32", context_length=context_length)
    for _ in range(2):  # from the store of words, too
        tokens = ours(TEXTS)
        assert tokens.dtype == torch.int64 and tokens.shape == (len(TEXTS), context_length)
        assert torch.equal(tokens, theirs(TEXTS))
    assert ours([]).shape == (0, context_length)


def test_tokens_of_random_text_are_open_clips():
    draw = random.Random(0)
    letters = [chr(code) for code in range(32, 127)] + [" "] * 20 + ["'s ", "é", "\t", "&amp;"]
    texts = ["".join(draw.choices(letters, k=draw.randrange(60))) for _ in range(500)]
    ours = build_tokenizer(TokenizerSpec())
    assert torch.equal(ours(texts), SimpleTokenizer()(texts))


@pytest.mark.parametrize("clean", ["lower", "whitespace", "canonicalize"])
def test_options_are_open_clips(clean):
    ours = build_tokenizer(TokenizerSpec(context_length=20, options=(("clean", clean),)))
    theirs = SimpleTokenizer(context_length=20, clean=clean)
    assert torch.equal(ours(TEXTS[:7]), theirs(TEXTS[:7]))


@pytest.mark.parametrize("mask", ["simple", "random", "shuffle"])
def test_a_tokenizer_that_drops_tokens_draws_by_the_text_alone(mask):
    spec = TokenizerSpec(context_length=8, options=(("reduction_mask", mask),))
    texts = [
        f"caption number {i} that is longer than it may be, by {i * i} words" for i in range(9)
    ]
    ours = build_tokenizer(spec)
    torch.manual_seed(0)
    random.seed(0)
    states = torch.get_rng_state(), random.getstate()
    tokens = ours(texts)
    assert torch.equal(states[0], torch.get_rng_state()) and states[1] == random.getstate()
    torch.manual_seed(1)
    random.seed(1)
    assert torch.equal(build_tokenizer(spec)(texts[::-1]), tokens.flip(0))
    plain = build_tokenizer(TokenizerSpec(context_length=8))(texts)
    assert not torch.equal(tokens, plain)


def test_a_spec_is_a_plain_value():
    spec = TokenizerSpec("org/name", 64, "clips", (("clean", "canonicalize"),))
    assert pickle.loads(pickle.dumps(spec)) == spec
    assert json.loads(json.dumps(spec.options)) == [["clean", "canonicalize"]]


def test_a_tokenizer_that_is_not_here_says_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    needed = (
        "download it once with network, or give a folder"
        if importlib.util.find_spec("transformers")
        else "needs the package transformers: pip install transformers"
    )
    with pytest.raises(DataError, match=f"tokenizer 'no/such-name' .*{needed}"):
        build_tokenizer(TokenizerSpec("no/such-name", 64))
