"""Labels before step 1: each kind of wrong one is one clear error; images are counted right."""

import io
import os
import tarfile
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tars import picture, write_tar

from data.augment import ImageTransform
from data.config import DataConfig
from data.dataset import SampleSet
from data.errors import DataError
from data.index import Index, load_index
from data.labels import check_labels, identity_counts
from data.loader import TrainLoader

REAL = Path(__file__).parents[2] / "shared" / "datasets"
JPEG = picture(0)


def sample_set(folder, *sources, key="cls"):
    """A source is a list of shards, a shard a list of label members (None: it has none)."""
    indexes = []
    for number, shards in enumerate(sources):
        paths = []
        for shard, labels in enumerate(shards):
            members = {
                f"{row:03d}": {"jpg": JPEG} | ({} if label is None else {key: label})
                for row, label in enumerate(labels)
            }
            paths.append(str(write_tar(folder / f"{number}-{shard}.tar", members)))
        indexes.append(load_index(paths, caption_key="", label_key=key))
    return SampleSet(indexes, seed=0, weights=[1.0] * len(indexes))


def test_classes_are_found_or_checked(tmp_path):
    samples = sample_set(tmp_path, [[0, 3, 1], [7, 0]], [[2, 2, 2, 9]])
    assert check_labels(samples) == check_labels(samples, 10) == 10
    assert check_labels(samples, 1000) == 1000
    with pytest.raises(DataError, match=r"1-0.tar:003 has the label 9, and .*num_classes = 9 take"):
        check_labels(samples, 9)


@pytest.mark.parametrize(
    ("label", "text"),
    [
        (None, r"0-1.tar:001: it has no integer label, only jpg; classes"),
        ("1.0", r"0-1.tar:001: 001.cls holds b'1.0', which is no integer label"),
        ("-1", r"0-1.tar:001: 001.cls holds b'-1'"),
        ("anna", r"001.cls holds b'anna'"),
        ("", r"001.cls holds b''"),
        (str(2**63), "001.cls holds"),
    ],
)
def test_a_sample_without_a_label_is_named(tmp_path, label, text):
    samples = sample_set(tmp_path, [[0, 1], [1, label, 0]], [[1, 1, None]])
    with pytest.raises(DataError, match=text) as error:
        check_labels(samples)
    assert "\n" not in str(error.value) and "data.label_key" in str(error.value)


def test_all_labels_missing_names_the_key(tmp_path):
    samples = sample_set(tmp_path, [[0, 1, 2]], key="identity")
    assert check_labels(samples) == 3
    index = load_index(str(tmp_path / "0-0.tar"), caption_key="", label_key="cls")
    with pytest.raises(
        DataError, match=r"it has no integer label, only jpg, identity; .*data.label_key"
    ):
        check_labels(SampleSet([index], seed=0))


def test_ids_that_are_not_counted_from_zero_are_told(tmp_path):
    samples = sample_set(tmp_path, [[10**12, 5, 10**12]])
    with pytest.raises(DataError, match=r"000 has the label 1000000000000, and there are only 3"):
        check_labels(samples)
    assert check_labels(samples, 10**12 + 1) == 10**12 + 1


def test_images_are_counted(tmp_path):
    draw = np.random.default_rng(0)
    sources = [[draw.integers(0, 12, size).tolist() for size in sizes] for sizes in ((5, 40), (9,))]
    samples = sample_set(tmp_path, *sources)
    every = Counter(label for source in sources for shard in source for label in shard)
    counts = identity_counts(samples, 15)
    assert counts.tolist() == [every[label] for label in range(15)]
    assert counts.dtype == np.int64


def test_checks_stream_shard_by_shard(tmp_path):
    one = sample_set(tmp_path, [[n % 50 for n in range(4000)]])
    many = SampleSet([Index(one.indexes[0]._tables * 60, [])], seed=0)
    tracemalloc.start()
    assert check_labels(one) == 50
    alone = tracemalloc.get_traced_memory()[1]
    tracemalloc.reset_peak()
    assert check_labels(many) == 50
    assert tracemalloc.get_traced_memory()[1] < 1.5 * alone + 8 * 4000
    tracemalloc.stop()


def grey(mode):
    stream = io.BytesIO()
    Image.open(io.BytesIO(picture(1, 21, 21))).convert(mode).save(stream, "PNG")
    return stream.getvalue()


def first_batch(samples, size, cache, batch):
    loader = TrainLoader(
        samples,
        DataConfig(workers=0, cache_dir=cache),
        image_transform=ImageTransform(size, resize_mode="squash"),
        tokenizer_spec=None,
        global_batch_size=batch,
        seed=0,
        rank=0,
        world_size=1,
    )
    return next(loader.batches(0, 1))


@pytest.mark.parametrize("mode", ["L", "1"])
def test_grey_pictures_in_packed_shards_come_out_grey_and_exact(tmp_path, mode):
    data = grey(mode)
    samples = {f"{n}": {"png": data, "cls": n % 2} for n in range(6)}
    path = write_tar(tmp_path / "a.tar.gz", samples, "w:gz")
    index = load_index(str(path), caption_key="")
    batch = first_batch(SampleSet([index], seed=0), 21, tmp_path / "cache", 6)
    assert batch.labels.tolist() == [n % 2 for n in batch.ids.tolist()]
    pixels = np.asarray(Image.open(io.BytesIO(data)).convert("L"))
    assert all((image.numpy() == pixels).all() for image in batch.images)


@pytest.mark.parametrize(
    ("name", "pattern", "classes", "images"),
    [
        ("omniglot", "train-{000000..000007}.tar.gz", 964, 20),
        ("orl-faces", "train-{000000..000003}.tar", 26, 10),
        ("lfw-aligned", "train-{000000..000007}.tar", 892, 2),
    ],
)
def test_real_sets(name, pattern, classes, images, tmp_path, monkeypatch):
    if not (REAL / name).is_dir():
        pytest.skip(f"{REAL / name} is not here")
    monkeypatch.setenv("NSPHERE_CACHE", str(tmp_path))
    index = load_index(str(REAL / name / pattern), caption_key="")
    samples = SampleSet([index], seed=0)
    assert not index.problems and check_labels(samples) == classes
    counts = identity_counts(samples, classes)
    assert counts.min() == images and counts.sum() == len(index)
    if name == "lfw-aligned":
        return
    batch = first_batch(samples, (112, 92), tmp_path, 32)
    assert torch.equal(batch.images[:, 0], batch.images[:, 2]) and not batch.num_bad
    if name == "orl-faces":  # stored at the size asked for: the very pixels
        shard, _, key = batch.keys[0].partition(":")
        with tarfile.open(os.path.join(REAL, name, shard)) as archive:
            stored = Image.open(archive.extractfile(f"{key}.png"))
            assert stored.mode == "L" and (batch.images[0, 1].numpy() == np.asarray(stored)).all()
