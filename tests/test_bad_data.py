"""Bad data through the whole way, shard to batch: the cases of reference/data.md 5.4.

Each says what the index reports and what training does. How headers and bytes are read is tested
in test_tar, test_index and test_read.
"""

import gzip
import io
import logging
import struct
import zlib

import pytest
import torch
from PIL import Image
from range_server import Faults, serve
from tars import loader_of, picture, rows_of, sample, write_set, write_tar

from data.augment import ImageTransform
from data.config import DataConfig
from data.decode import decode_image
from data.errors import DataError
from data.index import load_index
from data.loader import iter_eval_batches
from data.text import TokenizerSpec, caption_hash


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("NSPHERE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def shard(tmp_path):
    """A shard of twelve samples of three members; a header and a payload block each."""
    return write_tar(tmp_path / "a.tar", {f"{n:05d}": sample(n) for n in range(12)})


def member_offset(path, name) -> int:
    """Where the header of a member stands."""
    return path.read_bytes().index(name.encode() + b"\0")


def kinds(spec) -> set[str]:
    return {problem.kind for problem in load_index(spec).problems}


def check_training(spec, numbers, batch=4, epochs=2, **options):
    """Train on it: exactly these samples, each once an epoch, each with its own caption."""
    loader = loader_of(spec, batch=batch, **options)
    steps = epochs * len(numbers) // batch
    batches = list(loader.batches(0, steps))
    assert all(b.num_bad == 0 for b in batches)
    seen = []
    for b in batches:
        for key, caption in zip(b.keys, b.caption_ids.tolist(), strict=True):
            number = int(key.split(":")[1])
            assert caption == caption_hash(f"caption of {number}")
            seen.append(number)
    assert sorted(seen[: len(numbers)]) == sorted(numbers)


def test_a_tar_cut_inside_a_member_keeps_what_comes_before(shard):
    data = shard.read_bytes()
    shard.write_bytes(data[: member_offset(shard, "00009.jpg") + 600])
    assert "truncated" in kinds(str(shard))
    check_training(str(shard), range(9))


@pytest.mark.parametrize("into", [0, 100])
def test_a_tar_cut_at_or_in_a_header_never_gives_half_a_sample(shard, into):
    data = shard.read_bytes()
    shard.write_bytes(data[: member_offset(shard, "00009.txt") + into])
    assert "truncated" in kinds(str(shard))
    check_training(str(shard), range(9))


def test_a_bad_header_in_the_middle_costs_its_sample_only(shard):
    data = bytearray(shard.read_bytes())
    data[member_offset(shard, "00004.txt") + 150] ^= 1  # inside the checksum
    shard.write_bytes(data)
    assert "bad_header" in kinds(str(shard))
    index = load_index(str(shard))
    numbers = [int(entry.key) for entry in index.entries(range(len(index)))]
    assert 4 not in numbers and len(numbers) >= 10
    check_training(str(shard), numbers)


def test_a_sample_without_a_caption_is_left_out(tmp_path):
    samples = {f"{n:05d}": sample(n) for n in range(12)}
    del samples["00003"]["txt"], samples["00007"]["jpg"]
    path = write_tar(tmp_path / "a.tar", samples)
    assert kinds(str(path)) == {"missing_part"}
    check_training(str(path), [n for n in range(12) if n not in (3, 7)], batch=5)


def _bomb() -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        crc = struct.pack(">I", zlib.crc32(kind + body))
        return struct.pack(">I", len(body)) + kind + body + crc

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0"))


def _cut_jpeg() -> bytes:
    return sample(1)["jpg"][:-200]


BAD_SAMPLES = {
    "junk": sample(5, jpg=b"not a picture"),
    "empty": sample(5, jpg=b""),
    "cut": sample(5, jpg=_cut_jpeg()),
    "bomb": sample(5, jpg=_bomb()),
    "empty caption": sample(5, txt="  "),
    "caption in latin-1": sample(5, txt="caf\xe9".encode("latin-1")),
}


@pytest.mark.parametrize("kind", BAD_SAMPLES)
def test_a_bad_sample_is_replaced_counted_and_logged_once(tmp_path, caplog, kind):
    samples = {f"{n:05d}": sample(n) for n in range(30)}
    samples["00005"] = BAD_SAMPLES[kind]
    path = str(write_tar(tmp_path / "a.tar", samples))
    steps = range(12)
    with caplog.at_level(logging.WARNING, "nsphere.data"):
        whole = list(loader_of(path, batch=10).batches(0, len(steps)))
    assert sum(b.num_bad for b in whole) == 4  # once in each of four epochs
    for b in whole:
        assert 5 not in b.ids.tolist() and len(set(b.ids.tolist())) == 10
        assert all(bad.key == "00005" and bad.shard == path and bad.reason for bad in b.bad)
        for key, number in zip(b.keys, b.ids.tolist(), strict=True):
            assert key == f"a.tar:{number:05d}"
    assert len([record for record in caplog.records if "00005" in record.getMessage()]) == 1
    # The substitute is the same in any world, with workers, and after a restart.
    for world in (2, 3):
        ranks = [loader_of(path, batch=10, rank=r, world=world) for r in range(world)]
        for step in (0, 1, 2, 7, 11):
            parts = [next(rank.batches(step, 1)) for rank in ranks]
            assert rows_of(parts, world) == rows_of([whole[step]])
    loader = loader_of(path, batch=10, workers=2)
    assert [rows_of([b]) for b in loader.batches(0, 3)] == [rows_of([b]) for b in whole[:3]]
    loader.close()


def test_too_many_bad_samples_stop_the_run_and_name_the_shard(tmp_path):
    spec = write_set(tmp_path / "set", [100, 100], broken=range(100, 140))
    with pytest.raises(DataError, match=r"\d+ of [\d,]+ samples read were bad.*s-001.tar \(\d+\)"):
        list(loader_of(spec, batch=20).batches(0, 20))
    batches = list(loader_of(spec, batch=20, max_bad_fraction=0.5).batches(0, 20))
    assert sum(b.num_bad for b in batches) == 80
    with pytest.raises(DataError, match="1 of 20 samples read were bad"):
        one = write_set(tmp_path / "one", [20], broken=[7])
        list(loader_of(one, batch=20, max_bad_fraction=0.0).batches(0, 1))


def test_a_set_of_bad_samples_ends_with_the_reason(tmp_path):
    spec = write_set(tmp_path / "set", [20], broken=range(20))
    with pytest.raises(DataError, match=r"no usable sample .*s-000.tar"):
        next(loader_of(spec, batch=4, max_bad_fraction=1.0).batches(0, 1))


def test_shards_of_zero_length_and_zero_samples_are_reported(shard, tmp_path):
    (tmp_path / "b.tar").write_bytes(b"")
    write_tar(tmp_path / "c.tar", {})
    spec = [str(tmp_path / name) for name in ("b.tar", "a.tar", "c.tar")]
    index = load_index(spec)
    assert index.counts.tolist() == [0, 12, 0]
    assert "b.tar" in {problem.shard.rpartition("/")[2] for problem in index.problems}
    check_training(spec_of(spec), range(12))


def spec_of(paths) -> str:
    return "::".join(map(str, paths))


def test_a_key_twice_in_a_shard_never_pairs_a_picture_with_the_others_caption(tmp_path):
    pairs = [(f"{n:05d}", sample(n)) for n in range(6)]
    twin = ("00002", {**sample(9), "cls": 2})
    transform = ImageTransform(16)
    pictures = {f"caption of {n}": transform(decode_image(picture(n), 10**6)) for n in range(10)}
    for place in (3, 6):  # beside its twin, and far from it
        path = write_tar(tmp_path / f"{place}.tar", [*pairs[:place], twin, *pairs[place:]])
        index = load_index(str(path))
        assert "duplicate_key" in {problem.kind for problem in index.problems}
        (batch,) = iter_eval_batches(
            index,
            DataConfig(workers=0),
            image_transform=transform,
            tokenizer_spec=TokenizerSpec(context_length=12),
            batch_size=9,
            rank=0,
            world_size=1,
        )
        assert {0, 1, 3, 4, 5} <= {int(key.split(":")[1]) for key in batch.keys}
        for caption, image in zip(batch.captions, batch.images, strict=True):
            assert torch.equal(image, pictures[caption])


def test_a_key_in_two_shards_is_two_samples(tmp_path):
    samples = {f"{n:05d}": sample(n) for n in range(4)}
    paths = [write_tar(tmp_path / name, samples) for name in ("a.tar", "b.tar")]
    check_training(spec_of(paths), [0, 1, 2, 3] * 2)


def test_members_that_are_not_side_by_side_make_whole_samples(tmp_path):
    samples = {f"{n:05d}": sample(n) for n in range(8)}
    apart = [
        (key, {ending: members[ending]})
        for ending in ("txt", "cls", "jpg")
        for key, members in samples.items()
    ]
    path = write_tar(tmp_path / "a.tar", apart)
    check_training(str(path), range(8))


def test_a_gzipped_shard_trains_like_a_plain_one(shard, tmp_path):
    (tmp_path / "z").mkdir()
    zipped = tmp_path / "z" / "a.tar.gz"
    zipped.write_bytes(gzip.compress(shard.read_bytes()))
    plain = [rows_of([b]) for b in loader_of(str(shard), batch=4).batches(0, 3)]
    options = {"cache_dir": tmp_path / "node"}
    rows = [rows_of([b]) for b in loader_of(str(zipped), batch=4, **options).batches(0, 3)]
    assert [[row[1::2] for row in b] for b in rows] == [[row[1::2] for row in b] for b in plain]


def test_a_shard_that_does_not_exist_is_named_at_the_start(shard, tmp_path):
    with pytest.raises(DataError, match=r"b\.tar"):
        load_index(str(tmp_path / "b.tar"))
    with serve({"a.tar": shard.read_bytes()}) as server:
        with pytest.raises(DataError, match=r"b\.tar.*404"):
            load_index([server.url("a.tar"), server.url("b.tar")])


@pytest.mark.parametrize("fault", ["num_503", "cut", "stall"])
def test_a_flaky_server_gives_the_same_batches(shard, fault):
    plain = [rows_of([b]) for b in loader_of(str(shard), batch=4).batches(0, 3)]
    faults = Faults()
    with serve({"a.tar": shard.read_bytes()}, faults) as server:
        loader = loader_of(server.url("a.tar"), batch=4)
        if fault == "num_503":
            faults.num_503 = 2
        elif fault == "cut":
            faults.cut_after, faults.num_cuts = 300, 3
        else:
            faults.stall_s, faults.num_stalls = 0.3, 2
        assert [rows_of([b]) for b in loader.batches(0, 3)] == plain


def test_a_shard_replaced_under_way_stops_the_run(shard):
    loader = loader_of(str(shard), batch=4)
    next(loader.batches(0, 1))
    changed = write_tar(shard.with_name("b.tar"), {f"{n:05d}": sample(n + 1) for n in range(12)})
    shard.write_bytes(changed.read_bytes() + bytes(512))
    with pytest.raises(DataError, match=r"a\.tar"):
        list(loader.batches(1, 3))


def test_shards_of_one_name_in_two_places_are_not_mixed_up(tmp_path):
    files = {}
    for bucket, first in (("one", 0), ("two", 6)):
        (tmp_path / bucket).mkdir()
        keys = range(first, first + 6)
        path = write_tar(tmp_path / bucket / "00000.tar", {f"{n:05d}": sample(n) for n in keys})
        files[f"{bucket}/00000.tar"] = path.read_bytes()
    with serve(files) as server:
        spec = spec_of(server.url(path) for path in files)
        check_training(spec, range(12), cache_dir=tmp_path / "node")
        check_training(spec, range(12), cache_dir=tmp_path / "node")  # from the cache


def test_a_rank_never_runs_out_before_the_others(tmp_path):
    spec = write_set(tmp_path / "set", [1, 9, 2, 11])  # shards that ranks could not share
    ranks = [loader_of(spec, batch=6, rank=r, world=3) for r in range(3)]
    counts = [[len(b.ids) for b in rank.batches(0, 11)] for rank in ranks]
    assert counts == [[2] * 11] * 3


def test_formats_of_pictures_that_are_not_plain_jpeg_are_good_samples(tmp_path):
    samples = {}
    for number, mode in enumerate(["RGBA", "L", "P", "CMYK", "LA", "I;16"]):
        stream = io.BytesIO()
        image = Image.new("RGB", (20, 20), (200, 30, 60))
        image = image.convert("L").convert("I;16") if mode == "I;16" else image.convert(mode)
        image.save(stream, "JPEG" if mode == "CMYK" else "PNG")
        samples[f"{number:05d}"] = {"jpg": stream.getvalue(), "txt": f"caption of {number}"}
    path = write_tar(tmp_path / "a.tar", samples)
    check_training(str(path), range(6), batch=6)
    (batch,) = loader_of(str(path), batch=6).batches(0, 1)
    assert batch.labels.tolist() == [-1] * 6 and batch.images.dtype == torch.uint8
