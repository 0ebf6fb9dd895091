"""Batches: the same samples, pixels and captions whatever the ranks, workers and restarts."""

import functools
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from tars import loader_of, picture, rows_of, write_set, write_tar

from data.augment import ImageTransform
from data.batch import Batch, join_batches
from data.config import DataConfig
from data.dataset import SampleSet
from data.errors import DataError
from data.index import load_index
from data.loader import PIECE_ROWS, iter_eval_batches
from data.pool import Pool
from data.text import TokenizerSpec, caption_hash


@pytest.fixture(scope="module")
def spec(tmp_path_factory):
    return write_set(tmp_path_factory.mktemp("set"), [13, 7, 20, 11])


def stream(spec, steps, worlds, batch=17, **options):
    """Global batches of some steps, worlds[i] being the world size of steps[i]."""
    ranks = {
        world: [loader_of(spec, batch=batch, rank=r, world=world, **options) for r in range(world)]
        for world in set(worlds)
    }
    return [
        rows_of([next(loader.batches(step, 1)) for loader in ranks[world]], world)
        for step, world in zip(steps, worlds, strict=True)
    ]


def test_global_batches_do_not_depend_on_world_size_or_restarts(spec):
    loader = loader_of(spec, batch=17)
    whole = [rows_of([batch]) for batch in loader.batches(0, 8)]
    rng = np.random.default_rng(0)
    for change in rng.integers(0, 8, 3):
        first, then = rng.choice([2, 3, 5, 8], 2)
        worlds = [int(first)] * change + [int(then)] * (8 - change)
        assert stream(spec, range(8), worlds) == whole


@pytest.mark.parametrize("workers", [1, 3])
def test_global_batches_do_not_depend_on_workers(spec, workers):
    whole = [rows_of([batch]) for batch in loader_of(spec, batch=17).batches(2, 5)]
    loader = loader_of(spec, batch=17, workers=workers, prefetch=2)
    assert [rows_of([batch]) for batch in loader.batches(2, 5)] == whole
    assert [rows_of([batch]) for batch in loader.batches(4, 2)] == whole[2:4]
    loader.close()
    assert rows_of([next(loader.batches(6, 1))]) == whole[4]
    loader.close()


def test_each_sample_once_an_epoch_with_its_own_caption_and_label(spec):
    loader = loader_of(spec, batch=17)
    seen = []
    for batch in loader.batches(0, 9):  # 3 epochs of 51
        assert batch.images.shape == (17, 3, 16, 16) and batch.images.dtype == torch.uint8
        assert batch.texts.shape == (17, 12) and batch.num_bad == 0 and batch.bad == ()
        for row, number in enumerate(batch.ids.tolist()):
            assert batch.keys[row].split(":")[1] == f"{number:05d}"
            assert batch.labels[row] == number % 7
            assert batch.caption_ids[row] == caption_hash(f"caption of {number}")
        seen += batch.ids.tolist()
    for epoch in range(3):
        assert sorted(seen[epoch * 51 : (epoch + 1) * 51]) == list(range(51))


def test_augmentation_is_keyed_by_epoch_and_sample(spec):
    loader = loader_of(spec, batch=51)
    first, second = loader.batches(0, 2)
    images = [dict(zip(b.ids.tolist(), b.images, strict=True)) for b in (first, second)]
    changed = sum(not torch.equal(images[0][i], images[1][i]) for i in range(51))
    assert changed > 45


def test_captions_are_drawn_from_lists_by_epoch(tmp_path):
    names = [f"name {n}" for n in range(6)]
    members = {"jpg": picture(0), "json": {"names": names, "one": "only"}}
    path = write_tar(tmp_path / "a.tar", {f"{n}": members for n in range(8)})
    loader = loader_of(str(path), batch=8, caption_key="json:names")
    drawn = np.stack([batch.caption_ids.numpy() for batch in loader.batches(0, 12)])
    assert set(drawn.flat) == {caption_hash(name) for name in names}
    (batch,) = loader_of(str(path), batch=8, caption_key="json:one").batches(0, 1)
    assert set(batch.caption_ids.tolist()) == {caption_hash("only")}


def test_sources_are_mixed_by_weight(tmp_path):
    specs = [write_set(tmp_path / "a", [60, 50]), write_set(tmp_path / "b", [25])]
    loader = loader_of(specs, batch=20, weights=(0.75, 0.25))
    seen = torch.cat([batch.ids for batch in loader.batches(0, 40)])
    from_b = seen >= 110
    assert abs(int(from_b.sum()) - 200) <= 2
    assert sorted(seen[from_b].tolist()[:25]) == list(range(110, 135))
    for world in (2, 3):
        assert stream(specs, [5, 9], [world] * 2, 20, weights=(0.75, 0.25)) == stream(
            specs, [5, 9], [1] * 2, 20, weights=(0.75, 0.25)
        )
    with pytest.raises(DataError, match=r"source 2 .*b/s-000.tar\) has 25"):
        loader_of(specs, batch=120, weights=(0.75, 0.25))


def test_large_batches_come_in_pieces(tmp_path):
    spec = write_set(tmp_path / "large", [2 * PIECE_ROWS + 90])
    (whole,) = loader_of(spec, batch=300, size=8).batches(1, 1)
    assert len(whole.ids) == 300 == len(set(whole.ids.tolist()))
    assert whole.positions.tolist() == list(range(300, 600))
    loader = loader_of(spec, batch=300, size=8, workers=2)
    (same,) = loader.batches(1, 1)
    loader.close()
    assert rows_of([same]) == rows_of([whole])


def test_batches_of_no_rows_and_joining(spec):
    (empty,) = loader_of(spec, batch=2, rank=4, world=5).batches(0, 1)
    assert empty.images.shape == (0, 3, 16, 16) and empty.texts.shape == (0, 12)
    (some,) = loader_of(spec, batch=5).batches(0, 1)
    joined = join_batches([empty, some, empty])
    assert isinstance(joined, Batch) and rows_of([joined]) == rows_of([some])


def test_a_batch_larger_than_the_set_is_refused(spec):
    with pytest.raises(DataError, match="takes 52 samples and the data set has 51"):
        loader_of(spec, batch=52)


@pytest.mark.parametrize(
    ("world", "workers"), [(1, 0), (2, 0), (3, 0), (5, 0), (8, 0), (1, 2), (2, 2)]
)
def test_evaluation_sees_each_sample_once(spec, world, workers):
    index = load_index(spec)
    batches = [
        list(
            iter_eval_batches(
                index,
                DataConfig(workers=workers),
                image_transform=ImageTransform(16),
                tokenizer_spec=TokenizerSpec(context_length=12),
                batch_size=9,
                rank=rank,
                world_size=world,
            )
        )
        for rank in range(world)
    ]
    assert len({len(mine) for mine in batches}) == 1
    flat = [batch for mine in batches for batch in mine]
    assert all(0 < len(batch.ids) <= 9 for batch in flat)
    assert torch.cat([batch.ids for batch in flat]).tolist() == list(range(51))
    for batch in flat:
        owners = batch.ids[batch.text_owner].tolist()
        assert batch.captions == [f"caption of {number}" for number in owners]
        assert batch.texts.shape == (len(owners), 12)


def test_evaluation_gives_every_caption_and_leaves_bad_samples_out(tmp_path, caplog):
    texts = {"a": ["x", "y", "z"], "b": ["u"], "c": ["v", "w"]}
    samples = {k: {"jpg": picture(1), "json": {"t": t}} for k, t in texts.items()}
    samples["b"]["jpg"] = b"junk"
    path = write_tar(tmp_path / "v.tar", samples)
    config = DataConfig(workers=0, caption_key="json:t")
    (batch,) = iter_eval_batches(
        load_index(str(path), caption_key="json:t"),
        config,
        image_transform=ImageTransform(16),
        tokenizer_spec=TokenizerSpec(context_length=12),
        batch_size=8,
        rank=0,
        world_size=1,
    )
    assert batch.ids.tolist() == [0, 2] and batch.images.shape[0] == 2
    assert batch.captions == ["x", "y", "z", "v", "w"]
    assert batch.text_owner.tolist() == [0, 0, 0, 1, 1]
    assert [(bad.key, bad.shard) for bad in batch.bad] == [("b", str(path))]
    assert "b in" in caplog.text


def test_fingerprint_is_of_the_data_and_the_weights(tmp_path):
    spec = write_set(tmp_path / "a", [5, 6])
    other = write_set(tmp_path / "b", [5, 7])
    one, two = load_index(spec), load_index(other)
    prints = {
        SampleSet([one], seed=0).fingerprint,
        SampleSet([two], seed=0).fingerprint,
        SampleSet([one, two], seed=0, weights=[1, 1]).fingerprint,
        SampleSet([one, two], seed=0, weights=[1, 2]).fingerprint,
    }
    assert len(prints) == 4
    both = SampleSet([one, two], seed=9, weights=[2, 2])
    assert both.fingerprint == SampleSet([one, two], seed=0, weights=[1, 1]).fingerprint
    assert both.epoch_samples == 23
    assert both.keys(np.array([22, 0, 11])) == [
        "s-001.tar:00011",
        "s-000.tar:00000",
        "s-000.tar:00000",
    ]


@pytest.mark.parametrize("workers", [1, 3])
def test_a_killed_worker_is_replaced_and_batches_are_the_same(spec, workers):
    whole = [rows_of([batch]) for batch in loader_of(spec, batch=17).batches(0, 12)]
    loader = loader_of(spec, batch=17, workers=workers, prefetch=2)
    found = []
    for step, batch in enumerate(loader.batches(0, 12)):
        found.append(rows_of([batch]))
        if step in (0, 5):  # the last one: it has the most to do
            victim = max(child.pid for child in multiprocessing.active_children())
            os.kill(victim, signal.SIGKILL)
    assert found == whole
    loader.close()


def test_a_killed_worker_leaves_the_step_alone(spec):
    loader = loader_of(spec, batch=4, workers=1, prefetch=1)
    batches = loader.batches(0, 30)
    next(batches)
    (worker,) = multiprocessing.active_children()
    os.kill(worker.pid, signal.SIGKILL)
    deadline = time.monotonic() + 1  # the training process is busy elsewhere, and not interrupted
    while time.monotonic() < deadline:
        sum(range(1000))
    assert sum(len(batch.ids) for batch in batches) == 29 * 4
    loader.close()


def _die(piece):
    if piece == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return piece


def test_workers_that_die_again_and_again_are_one_clear_error(caplog):
    pool = Pool(_die, DataConfig(workers=2, prefetch=1), pin=False)
    loaded = []
    with pytest.raises(DataError, match=r"died 4 times in a row .*data.workers.* they were at 3;"):
        for item in pool.run(range(6)):
            loaded.append(item)
    assert loaded == [0, 1, 2]
    assert sum("starting workers anew" in line for line in caplog.messages) == 3
    pool.close()


class _HungUp:
    """Its receiver sees what a worker leaves that is killed while it hands an item over."""

    def __reduce__(self):
        return _break_off, ()


def _break_off():
    raise EOFError


def _hang_up_once(piece, flag):
    if piece == 3 and not flag.exists():
        flag.touch()
        return _HungUp()
    return piece


def test_a_worker_killed_while_it_hands_an_item_over_is_replaced(tmp_path, caplog):
    load = functools.partial(_hang_up_once, flag=tmp_path / "flag")
    pool = Pool(load, DataConfig(workers=2, prefetch=1), pin=False)
    assert list(pool.run(range(6))) == list(range(6))
    assert "lost while it handed an item over" in caplog.text
    pool.close()


def _misread(piece):
    raise RuntimeError("this is no death") if piece % 2 else FileNotFoundError("nor is this")


@pytest.mark.parametrize("piece", [1, 2])
def test_an_error_inside_a_worker_is_no_death(piece):
    pool = Pool(_misread, DataConfig(workers=1, prefetch=1), pin=False)
    with pytest.raises((RuntimeError, FileNotFoundError), match=r"this is no death|nor is this"):
        list(pool.run([piece]))
    pool.close()


def test_workers_outlive_the_signals_of_a_scheduler(spec):
    loader = loader_of(spec, batch=4, workers=2, prefetch=1)
    batches = loader.batches(0, 30)
    next(batches)
    for worker in multiprocessing.active_children():
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            os.kill(worker.pid, number)
    assert sum(len(batch.ids) for batch in batches) == 29 * 4
    assert len(multiprocessing.active_children()) == 2
    loader.close()
    deadline = time.monotonic() + 10
    while multiprocessing.active_children() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not multiprocessing.active_children()


def test_a_run_that_leaves_in_the_middle_ends_its_workers(spec):
    tests = os.path.dirname(__file__)
    script = f"""
import sys
sys.path.insert(0, {tests!r})
from tars import loader_of
batches = loader_of({spec!r}, batch=4, workers=2).batches(0, 1000)
next(batches)
print("leaving", flush=True)
raise SystemExit(3)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=240, check=False
    )  # returns once every process that holds the pipes is gone
    assert (done.stdout, done.returncode) == ("leaving\n", 3), done.stderr


def test_workers_start_at_once(spec):
    loader_of(spec, batch=4)  # tokenizer and imports are not what is measured
    start = time.perf_counter()
    loaders = [loader_of(spec, batch=16, rank=r, world=2, workers=2) for r in range(2)]
    for loader in loaders:
        next(loader.batches(0, 1))
    assert time.perf_counter() - start < 5
    for loader in loaders:
        loader.close()


@pytest.mark.gpu
def test_pinned_batches():
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    zeros = torch.zeros(2, dtype=torch.int64)
    batch = Batch(torch.zeros(2, 3, 4, 4), zeros, zeros, zeros, zeros, zeros, ["a", "b"])
    pinned = batch.pin_memory()
    assert pinned.images.is_pinned() and pinned.ids.is_pinned() and pinned.keys == ["a", "b"]


def test_real_sets_run_through(real_dataset, tmp_path, monkeypatch):
    monkeypatch.setenv("NSPHERE_CACHE", str(tmp_path))
    for name, key in [
        ("emoji-pairs", "txt"),
        ("tuxpaint-stamps", "txt"),
        ("coco-cc-captions", "txt"),
    ]:
        shards = sorted(map(str, real_dataset(name).glob("*.tar")))
        loader = loader_of(["::".join(shards)][0], batch=32, size=32, caption_key=key)
        (batch,) = loader.batches(0, 1)
        assert batch.num_bad == 0 and len(set(batch.ids.tolist())) == 32
