"""P x K batches: exact identities, no image twice, each image an epoch, spread, from any place."""

import hashlib
import time
import tracemalloc
from collections import Counter, defaultdict
from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tars import loader_of, picture, rows_of, write_tar

from data.config import DataConfig
from data.dataset import SampleSet, build_sample_set
from data.errors import DataError
from data.identities import group_by_identity
from data.identity_order import IdentityOrder
from data.index import load_index
from data.order import derive_key, permute, unpermute

COUNTS = st.lists(st.integers(0, 13), min_size=2, max_size=40)


class Column:
    """Labels in shards, as an Index offers them."""

    def __init__(self, *shards):
        self.shards = [np.asarray(shard, np.int64) for shard in shards]

    def __len__(self):
        return sum(map(len, self.shards))

    def iter_column(self, name):
        assert name == "label"
        yield from self.shards

    @property
    def labels(self):
        return np.concatenate(self.shards)


def column_of(counts, seed=0, shards=3):
    labels = np.repeat(np.arange(len(counts)), counts)
    return Column(*np.array_split(np.random.default_rng(seed).permutation(labels), shards))


def order_of(column, each, seed=5, remainder="drop"):
    grouped = group_by_identity(column, int(column.labels.max()) + 1)
    return IdentityOrder(grouped, seed=seed, images_per_identity=each, remainder=remainder)


def batches_of(order, groups, steps):
    """(steps, groups, K) samples of whole global batches."""
    each = order.images_per_identity
    step, lane, image = (
        axis.reshape(-1) for axis in np.mgrid[steps.start : steps.stop, :groups, :each]
    )
    epochs, ids = order.ids(step, lane, image, groups)
    assert (epochs == step // order.shape(groups).num_batches).all()
    return ids.reshape(-1, groups, each)


@settings(deadline=None)
@given(size=st.integers(1, 3000), seed=st.integers(0, 2**40))
def test_the_inverse_of_a_permutation(size, seed):
    key, sizes = derive_key(seed), np.array([size])
    values = np.arange(size)
    assert (unpermute(permute(values, sizes, key), sizes, key) == values).all()
    assert (permute(unpermute(values, sizes, key), sizes, key) == values).all()


@settings(max_examples=40, deadline=None)
@given(counts=COUNTS, seed=st.integers(0, 99), shards=st.integers(1, 5))
def test_samples_are_grouped_by_label(counts, seed, shards):
    column = column_of(counts, seed, shards)
    grouped = group_by_identity(column, len(counts) + 2)
    assert grouped.counts.tolist() == [*counts, 0, 0] and grouped.samples.dtype == np.uint32
    for label in range(len(counts)):
        mine = grouped.samples[grouped.starts[label] : grouped.starts[label + 1]]
        assert (mine == np.flatnonzero(column.labels == label)).all()


@settings(max_examples=80, deadline=None)
@given(counts=COUNTS, each=st.integers(1, 5), data=st.data(), epoch=st.integers(0, 2**30))
def test_batches_are_p_identities_with_k_images_each(counts, each, data, epoch):
    able = sum(count >= each for count in counts)
    if not able:
        return
    groups = data.draw(st.integers(1, able))
    column = column_of(counts)
    order = order_of(column, each)
    size = order.shape(groups).num_batches
    ids = batches_of(order, groups, range(epoch * size, (epoch + 1) * size))
    labels = column.labels[ids]
    assert (labels == labels[:, :, :1]).all(), "a group is of one identity"
    for batch in labels[:, :, 0]:
        assert len(set(batch.tolist())) == groups, "no identity twice in a batch"
    assert len(np.unique(ids)) == ids.size, "no image twice in an epoch"
    came = Counter(labels[:, :, 0].reshape(-1).tolist())
    whole = [min(count // each, size) for count in counts]
    assert all(came[label] <= whole[label] for label in range(len(counts)))
    missing = sum(whole) - came.total()
    assert 0 <= missing < groups or size == max(c // each for c in counts)
    # One batch more would not find so many distinct identities.
    assert sum(min(count // each, size + 1) for count in counts) < groups * (size + 1)


@settings(max_examples=60, deadline=None)
@given(counts=COUNTS.filter(any), each=st.integers(1, 5), data=st.data())
def test_sharing_brings_every_image_once_an_epoch(counts, each, data):
    total = sum(counts)
    if total < each:
        return
    column = column_of(counts)
    order = order_of(column, each, remainder="share")
    listed = sum(count // each for count in counts) + sum(c % each for c in counts) // each
    groups = data.draw(st.integers(1, max(1, listed // max(1, max(counts) // each))))
    size = order.shape(groups).num_batches
    ids = batches_of(order, groups, range(3 * size, 4 * size))
    assert len(np.unique(ids)) == ids.size
    if max(counts) // each <= size:
        assert total - ids.size < groups * each + each
    mixed = sum(len(set(group)) > 1 for batch in column.labels[ids] for group in batch.tolist())
    assert mixed <= sum(c % each for c in counts) // each


@pytest.mark.parametrize("remainder", ["drop", "share"])
def test_any_place_is_the_same_from_anywhere(remainder):
    draw = np.random.default_rng(1)
    column = column_of(draw.integers(1, 30, 200))
    whole = batches_of(order_of(column, 4, remainder=remainder), 16, range(0, 150))
    steps, lanes, images = (draw.integers(0, high, 500) for high in (150, 16, 4))
    fresh = order_of(column, 4, remainder=remainder)
    for start in range(0, 500, 50):
        part = slice(start, start + 50)
        _, ids = fresh.ids(steps[part], lanes[part], images[part], 16)
        assert (ids == whole[steps[part], lanes[part], images[part]]).all()
    other = batches_of(order_of(column, 4, seed=6, remainder=remainder), 16, range(0, 150))
    assert (other == whole).mean() < 0.02


def test_golden_batches():
    # Another result breaks the exact resume of every run that was started before.
    column = column_of(np.arange(60) % 13 + 2)
    for remainder, wanted in GOLDEN.items():
        ids = batches_of(order_of(column, 3, remainder=remainder), 12, range(40))
        assert hashlib.sha256(ids.astype("<i8").tobytes()).hexdigest()[:16] == wanted


GOLDEN = {"drop": "f45a27861dcf22fa", "share": "93aac236c29b6f21"}


def test_epochs_differ_and_rests_rotate():
    counts = np.full(40, 7)
    column = column_of(counts)
    order = order_of(column, 4)  # one group of four, three images rest
    size = order.shape(8).num_batches
    epochs = [
        set(batches_of(order, 8, range(e * size, (e + 1) * size)).reshape(-1).tolist())
        for e in range(12)
    ]
    assert all(len(a & b) < 0.8 * len(a) for a, b in pairwise(epochs))
    assert len(set.union(*epochs)) == counts.sum()


def test_identities_are_spread():
    """Long-tailed counts: stationary in the epoch, and partners as in a random order."""
    draw = np.random.default_rng(0)
    counts = np.minimum(draw.zipf(1.6, 3000) + 3, 400)
    column = column_of(counts)
    order = order_of(column, 4)
    groups = 64
    size = order.shape(groups).num_batches
    labels = column.labels[batches_of(order, groups, range(size))[:, :, 0]]
    places = defaultdict(list)
    for batch, row in enumerate(labels.tolist()):
        for label in row:
            places[label].append(batch / size)
    frequent = [np.array(p) for p in places.values() if len(p) >= 20]
    assert len(frequent) > 20
    # Each frequent identity's mean place is that of a uniform draw without replacement.
    z = [(p.mean() - 0.5) / np.sqrt(1 / 12 / len(p)) for p in frequent]
    assert abs(np.mean(z)) < 4 / np.sqrt(len(z)) and 0.5 < np.std(z) < 1.4
    # The rare ones come evenly over the epoch.
    rare = np.array([p[0] for p in places.values() if len(p) == 1])
    tenths = np.histogram(rare, 10, (0, 1))[0]
    assert np.abs(tenths - tenths.mean()).max() < 5 * np.sqrt(tenths.mean())
    # Two identities meet about as often as chance has it: no block of lanes moves together.
    met_by = Counter(pair for row in labels.tolist() for pair in combinations(sorted(row), 2))
    sizes = {label: len(p) for label, p in places.items()}
    heavy = sorted(label for label, number in sizes.items() if number >= 20)
    expected = sum(sizes[a] * sizes[b] / size for a, b in combinations(heavy, 2))
    met = sum(met_by[pair] for pair in combinations(heavy, 2))
    assert 0.7 * expected < met < 1.15 * expected


def test_an_identity_as_large_as_the_rest_comes_once_a_batch():
    column = column_of([400, *[4] * 30])
    order = order_of(column, 4)
    size = order.shape(2).num_batches
    assert size == 30
    labels = column.labels[batches_of(order, 2, range(size))[:, :, 0]]
    assert ((labels == 0).sum(axis=1) == 1).all()


def test_lookups_are_fast_and_memory_is_small():
    draw = np.random.default_rng(0)
    labels = draw.integers(0, 50_000, 1_000_000)
    column = Column(*np.array_split(labels, 20))
    tracemalloc.start()
    order = order_of(column, 4)
    resident, peak = tracemalloc.get_traced_memory()
    assert resident < 4.6 * len(labels) + 24 * 50_000 and peak < 14 * len(labels)
    step = np.full(256, 3)
    lane, image = np.divmod(np.arange(256), 4)
    order.ids(step, lane, image, 512)
    assert tracemalloc.get_traced_memory()[0] < resident + 40 * 50_000
    tracemalloc.stop()
    start = time.perf_counter()
    for epoch_step in range(20):
        order.ids(step + epoch_step, lane, image, 512)
    assert (time.perf_counter() - start) / 20 < 0.02


def face_set(folder, counts, shards=3):
    """Shards of tiny pictures, images of an identity scattered over them."""
    labels = column_of(counts, shards=shards)
    paths, number = [], 0
    for shard, own in enumerate(labels.shards):
        members = {}
        for label in own.tolist():
            members[f"{number:04d}"] = {"jpg": picture(number), "cls": label}
            number += 1
        paths.append(str(write_tar(folder / f"f-{shard}.tar", members)))
    return paths


OPTIONS = {"caption_key": "", "batching": "identities", "images_per_identity": 3}


def test_the_loader_gives_identity_batches_on_any_ranks_and_workers(tmp_path):
    paths = face_set(tmp_path, [3, 4, 7, 9, 2, 3, 6, 5, 3])
    whole = [rows_of([batch]) for batch in loader_of(paths, batch=12, **OPTIONS).batches(0, 9)]
    for batch in whole:
        assert sorted(Counter(row[3] for row in batch).values()) == [3, 3, 3, 3]
        assert len({row[2] for row in batch}) == 12
    for world, workers in ((2, 0), (3, 0), (5, 1)):
        loaders = [
            loader_of(paths, batch=12, rank=rank, world=world, workers=workers, **OPTIONS)
            for rank in range(world)
        ]
        again = [list(loader.batches(4, 3)) for loader in loaders]
        for loader in loaders:
            loader.close()
        assert [rows_of(list(step), world) for step in zip(*again, strict=True)] == whole[4:7]


def test_sources_are_mixed_by_groups(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    specs = [face_set(tmp_path / "a", [6] * 20), face_set(tmp_path / "b", [0] * 20 + [9] * 8)]
    loader = loader_of(specs, batch=24, weights=(0.75, 0.25), **OPTIONS)
    large = np.zeros(0, np.int64)
    for batch in loader.batches(0, 30):
        labels = Counter(batch.labels.tolist())
        assert set(labels.values()) == {3} and len(set(batch.ids.tolist())) == 24
        large = np.append(large, sum(label >= 20 for label in labels))
    assert large.min() >= 1 and large.max() <= 3 and abs(large.mean() - 2) < 0.1
    with pytest.raises(DataError, match=r"source 2 .* takes 9 identities .*, and 8 have so many"):
        loader_of(specs, batch=42, weights=(0.4, 0.6), **OPTIONS)


def test_a_bad_image_is_replaced_by_one_of_its_identity(tmp_path):
    members = {
        f"{n:02d}": {"jpg": b"junk" if n == 5 else picture(n), "cls": n % 4} for n in range(40)
    }
    path = write_tar(tmp_path / "a.tar", members)
    loader = loader_of(str(path), batch=12, max_bad_fraction=1.0, **OPTIONS)
    replaced = 0
    for batch in loader.batches(0, 9):
        replaced += batch.num_bad
        assert set(Counter(batch.labels.tolist()).values()) == {3}
        assert len(set(batch.ids.tolist())) == 12 and "a.tar:05" not in batch.keys
    assert replaced


def test_what_does_not_fit_is_one_clear_error(tmp_path, caplog):
    paths = face_set(tmp_path, [3, 4, 2, 1, 5])
    index = load_index(paths, caption_key="")
    samples = SampleSet([index], seed=0, images_per_identity=3)
    assert "2 identities (3 images) have fewer" in caplog.text and "share" in caplog.text
    samples.check_batch_size(9)
    with pytest.raises(DataError, match=r"batch_size = 10 is no multiple of .*identity = 3"):
        samples.check_batch_size(10)
    with pytest.raises(DataError, match="takes 4 identities with 3 images each, and 3 have"):
        samples.check_batch_size(12)
    shared = SampleSet([index], seed=0, images_per_identity=3, remainder="share")
    shared.check_batch_size(12)
    config = DataConfig(batching="identities", images_per_identity=3, shards="x")
    built = build_sample_set([index], config, seed=0)
    assert (built.batch(3, 9).ids == samples.batch(3, 9).ids).all()
    fingerprints = {SampleSet([index], seed=0).fingerprint, built.fingerprint, shared.fingerprint}
    assert len(fingerprints) == 3
    members = {"a": {"jpg": picture(0)}, "b": {"jpg": picture(1), "cls": 0}}
    write_tar(tmp_path / "none.tar", members)
    unlabelled = load_index(str(tmp_path / "none.tar"), caption_key="")
    with pytest.raises(DataError, match=r"none.tar:a: it has no integer label"):
        SampleSet([unlabelled], seed=0, images_per_identity=2)


def test_the_report_says_what_an_epoch_takes(tmp_path):
    paths = face_set(tmp_path, [6] * 4 + [2])
    samples = SampleSet(
        [load_index(paths, caption_key="")], seed=0, images_per_identity=3, remainder="share"
    )
    (line,) = samples.describe_identities(6)
    assert "26 images of 5 identities; a batch takes 2 x 3, an epoch 4 batches, 92.3%" in line
    assert "1 identities (2 images) have fewer than 3: sharing groups" in line
