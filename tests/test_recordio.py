"""RecordIO against a writer of its own: every trap of the format, damage, memory, labels."""

import struct
import tarfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from records import MAGIC, face_records, image, part, record, write_rec
from tars import picture

from data.errors import DataError
from data.pack import rec as pack_rec_module
from data.pack.limits import ShardLimits
from data.pack.numbering import Naming
from data.pack.rec import find_offset, pack_rec
from data.pack.recordio import RecordFile, parse_image, read_property

WORDS = st.lists(st.sampled_from([MAGIC, b"abcd", b"\0\0\0\0", MAGIC[2:] + MAGIC[:2]]), max_size=9)
PAYLOADS = st.builds(lambda words, tail: b"".join(words) + tail, WORDS, st.binary(max_size=5))


@settings(max_examples=150, deadline=None)
@given(payloads=st.lists(PAYLOADS, min_size=1, max_size=12), data=st.data())
def test_any_records_come_back_from_the_start_and_from_any_byte(payloads, data, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "any.rec"
    write_rec(path, enumerate(payloads), index=False)
    file = RecordFile(path)
    whole = list(file.iter_records())
    assert [found.payload for found in whole] == payloads
    offsets = np.cumsum([0, *(len(record(payload)) for payload in payloads)])
    assert [found.offset for found in whole] == offsets[:-1].tolist()
    cuts = sorted(data.draw(st.lists(st.integers(0, file.size), max_size=5)))
    pieces = [
        found
        for start, stop in zip([0, *cuts], [*cuts, file.size], strict=True)
        for found in file.iter_records(start, stop)
    ]
    assert pieces == whole


def test_multi_part_records_with_the_magic_at_every_place():
    middle = b"x" * 7 + MAGIC + b"y"  # not at a multiple of 4: is not cut
    assert record(middle)[:8] == MAGIC + struct.pack("<I", len(middle))
    cut = MAGIC + b"1234" + MAGIC + MAGIC
    kinds = [struct.unpack_from("<I", record(cut), at + 4)[0] >> 29 for at in (0, 8, 20, 28)]
    assert kinds == [1, 2, 2, 3]


def test_image_headers_with_and_without_arrays():
    assert parse_image(8, image(7.0, 3, b"jpg")) == (8, (7.0,), 3, 0, b"jpg")
    assert parse_image(0, image([5.0, 1.0, 2.5], 9, b"png")) == (0, (5.0, 1.0, 2.5), 9, 3, b"png")
    assert len(image(0.0, 0, b"")) == 24


@pytest.mark.parametrize(
    ("start", "text"),
    [
        (struct.pack("<II", 0x3ED7230A, 4) + b"abcd", "RecordIO of 2015 .*im2rec of a later"),
        (b"\x89PNG\r\n\x1a\n", r"no RecordIO file: it starts with b'\\x89PNG'"),
        (b"", "the file is empty"),
    ],
)
def test_foreign_files_are_told(tmp_path, start, text):
    path = tmp_path / "a.rec"
    path.write_bytes(start)
    with pytest.raises(DataError, match=text):
        RecordFile(path)
    with pytest.raises(DataError, match="no such file"):
        RecordFile(tmp_path / "b.rec")


def faces(number: int, images_each: int = 4) -> tuple[list[bytes], list[int]]:
    labels = [place // images_each for place in range(number)]
    return [picture(place) for place in range(number)], labels


def im2rec_records(images: list[bytes], labels: list[float]) -> list[tuple[int, bytes]]:
    pairs = enumerate(zip(images, labels, strict=True))
    return [(key, image(label, key, data)) for key, (data, label) in pairs]


def read_shards(packed) -> dict[str, dict[str, bytes]]:
    samples: dict[str, dict[str, bytes]] = {}
    for shard in packed.shards:
        with tarfile.open(shard) as archive:
            for member in archive:
                key, _, ending = member.name.partition(".")
                samples.setdefault(key, {})[ending] = archive.extractfile(member).read()
    return samples


def names_of(folder: Path) -> dict[int, str]:
    header, *lines = (folder / "identities.tsv").read_text().splitlines()
    assert header == "cls\tname"
    return {int(cls): name for cls, name in (line.split("\t") for line in lines)}


@pytest.mark.parametrize("order", ["file", "shuffled"])
@pytest.mark.parametrize("arrays", [False, True])
@pytest.mark.parametrize("indexed", [False, True])
def test_insightfaces_layout(tmp_path, order, arrays, indexed):
    images, labels = faces(30)
    source = tmp_path / "ms1m"
    source.mkdir()
    path = write_rec(source / "train.rec", face_records(images, labels, arrays), index=indexed)
    (source / "property").write_text("8,112,112\n")
    limits = ShardLimits(max_samples=7)
    packed = pack_rec(path, tmp_path / "out", order=order, pool_bytes=8000, limits=limits)
    assert packed.num_samples == 30 and packed.num_identities == 8 and packed.left_out == ()
    samples = read_shards(packed)
    offsets = [found.offset for found in RecordFile(path).iter_images() if found.image]
    for place, offset in enumerate(offsets):
        found = samples[f"{offset:012d}"]
        assert (found["jpg"], int(found["cls"])) == (images[place], labels[place])
    assert names_of(tmp_path / "out") == {label: f"ms1m/{label}" for label in range(8)}
    assert (list(samples) == sorted(samples)) == (order == "file")


def test_im2recs_layout_takes_key_0_and_header_first_layouts_work(tmp_path):
    images, labels = faces(9, 3)
    plain = im2rec_records(images, labels)
    packed = pack_rec(write_rec(tmp_path / "a.rec", plain), tmp_path / "a", order="file")
    assert [int(s["cls"]) for s in read_shards(packed).values()] == labels
    keyed = list(face_records(images, labels))
    first = [keyed[9], *keyed[:9], *keyed[10:]]  # the header before all images
    packed = pack_rec(write_rec(tmp_path / "b.rec", first), tmp_path / "b", order="file")
    assert [s["jpg"] for s in read_shards(packed).values()] == images


def test_shuffling_is_keyed_mixes_and_loses_nothing(tmp_path):
    tiny = picture(0, 8, 8)
    path = write_rec(
        tmp_path / "a.rec", ((n, image(n // 20, n, tiny)) for n in range(3000)), index=False
    )
    size = path.stat().st_size
    order = {}
    for seed in (0, 0, 1):
        file = RecordFile(path)
        pool = pack_rec_module._shuffled(file, seed, size // 4)
        order.setdefault(seed, []).append([found.id for found in pool])
    assert order[0][0] == order[0][1] != order[1][0]
    assert sorted(order[0][0]) == list(range(3000))
    quarters = np.array(order[0][0][:600])
    assert np.histogram(quarters, 4, (0, 3000))[0].min() > 60, "places from all over the file"
    neighbours = np.abs(np.diff(quarters // 20))
    assert (neighbours == 0).mean() < 0.1


# -- damage


def test_a_cut_file_is_told_before_any_work(tmp_path):
    images, labels = faces(20)
    path = write_rec(tmp_path / "a.rec", face_records(images[:20], labels))
    whole = path.read_bytes()
    offsets = [found.offset for found in RecordFile(path).iter_records()]
    for cut in (len(whole) - 3, offsets[15] + 40, offsets[15] + 6, offsets[15] + 2, 9):
        path.write_bytes(whole[:cut])
        with pytest.raises(
            DataError, match=rf"a.rec: cut at its end, byte {cut}: .*--allow-damage"
        ):
            pack_rec(path, tmp_path / "none")
    assert not (tmp_path / "none").exists()
    path.write_bytes(whole[: offsets[15] + 40])
    packed = pack_rec(path, tmp_path / "out", order="file", allow_damage=True)
    assert packed.num_samples == 15
    assert packed.left_out == (
        f"{path}: the record at byte {offsets[15]}: the part at byte {offsets[15]} wants "
        f"{-(-(len(images[15]) + 24) // 4) * 4} bytes, the file ends",
    )


def test_a_cut_identity_record_costs_no_image(tmp_path):
    images, labels = faces(20)
    path = write_rec(tmp_path / "a.rec", face_records(images, labels))
    path.write_bytes(path.read_bytes()[:-8])
    packed = pack_rec(path, tmp_path / "out", allow_damage=True)
    assert packed.num_samples == 20


@pytest.mark.parametrize("order", ["file", "shuffled"])
def test_damage_inside_is_an_error_or_costs_its_record_only(tmp_path, order):
    images, labels = faces(20)
    path = write_rec(tmp_path / "a.rec", face_records(images, labels), index=False)
    data = bytearray(path.read_bytes())
    at = [found.offset for found in RecordFile(path).iter_records()][6]
    data[at : at + 4] = b"junk"
    path.write_bytes(data)
    with pytest.raises(DataError, match=rf"byte {at}: no part starts at byte {at}: b'junk"):
        pack_rec(path, tmp_path / "none", order="file")
    packed = pack_rec(path, tmp_path / "out", order=order, pool_bytes=9000, allow_damage=True)
    assert packed.num_samples == 19
    assert sum(int(s["cls"]) == 1 for s in read_shards(packed).values()) == 3


def test_parts_out_of_order_and_records_without_headers(tmp_path):
    path = tmp_path / "a.rec"
    good = record(image(0, 1, picture(1)))
    path.write_bytes(good + part(2, b"abcd") + good)
    with pytest.raises(DataError, match="a part of kind 2 at byte"):
        pack_rec(path, tmp_path / "out", order="file")
    path.write_bytes(good + record(b"short"))
    with pytest.raises(DataError, match="5 bytes hold no image header"):
        pack_rec(path, tmp_path / "out", order="file")
    path.write_bytes(good + record(struct.pack("<IfQQ", 10**6, 0, 0, 0)))
    with pytest.raises(DataError, match="tells of 1000000 labels: no image record"):
        pack_rec(path, tmp_path / "out", order="file")
    path.write_bytes(good + record(image(0, 1, b"text, no picture")))
    packed = pack_rec(path, tmp_path / "left", order="file")
    assert packed.left_out == (f"the record at byte {len(good)}: no image",)


# -- labels


@pytest.mark.parametrize("label", [1.5, -1.0, float("nan"), float("inf")])
def test_a_label_that_is_no_class_is_an_error(tmp_path, label):
    path = write_rec(tmp_path / "a.rec", [(0, image(label, 0, picture(0)))])
    with pytest.raises(
        DataError, match=r"a.rec: the record at byte 0 has the label .* no class num"
    ):
        pack_rec(path, tmp_path / "out")


def test_property_is_read_and_held_to(tmp_path):
    assert read_property(tmp_path / "property") == 0
    images, labels = faces(8)
    path = write_rec(tmp_path / "a.rec", face_records(images, labels))
    (tmp_path / "property").write_text("1,112,112")
    with pytest.raises(DataError, match="label 1 and the property file's 1 classes do not fit"):
        pack_rec(path, tmp_path / "out", order="file")
    (tmp_path / "property").write_text("not at all")
    with pytest.raises(DataError, match="'not at all' is not num_classes,height,width"):
        pack_rec(path, tmp_path / "out")


BIG = 2.0**24


def test_labels_above_2_to_the_24_need_identity_ranges(tmp_path):
    images, _ = faces(12)
    # Real labels 16777214 ... 16777219 as float32: some of them meet.
    labels = [BIG + place // 2 - 2 for place in range(12)]
    rounded = np.float32(labels).tolist()
    assert len(set(rounded)) < 6
    keyed = [(key, p) for key, p in face_records(images, labels)]  # struct rounds to float32
    path = write_rec(tmp_path / "a.rec", keyed)
    packed = pack_rec(path, tmp_path / "a", order="file", naming=Naming(prefix="big"))
    assert [int(s["cls"]) for s in read_shards(packed).values()] == [n // 2 for n in range(12)]
    assert names_of(tmp_path / "a") == {n: f"big/{n}" for n in range(6)}
    path.with_suffix(".idx").unlink()
    with pytest.raises(DataError, match=r"the label 16,777,216 is a float32.*no .idx .*pack lst"):
        pack_rec(path, tmp_path / "b", order="file")
    plain = im2rec_records(images, labels)
    path = write_rec(tmp_path / "c.rec", plain)
    with pytest.raises(DataError, match="it has no identity records"):
        pack_rec(path, tmp_path / "c", order="file")


def test_ranges_that_are_rounded_themselves_are_not_believed(tmp_path):
    keyed = [
        (1, image(BIG + 2, 1, picture(0))),
        (0, image([5.0, 7.0], 0, b"")),
        (5, image([1.0, 3.0], 5, b"")),
        (6, image([1.0, BIG + 4], 6, b"")),
    ]
    path = write_rec(tmp_path / "a.rec", keyed)
    with pytest.raises(DataError, match="identity ranges are float32 above 2\\^24 too"):
        pack_rec(path, tmp_path / "out")


def test_identity_records_that_are_missing_are_told(tmp_path):
    keyed = [
        (1, image(BIG + 2, 1, picture(0))),
        (0, image([5.0, 9.0], 0, b"")),
        (5, image([1.0, 2.0], 5, b"")),
        (8, image([1.0, 2.0], 8, b"")),
    ]
    path = write_rec(tmp_path / "a.rec", keyed)
    with pytest.raises(DataError, match="identity records 5 to 8, and 2 are there"):
        pack_rec(path, tmp_path / "out")


def test_an_index_of_another_file_is_told(tmp_path):
    images, labels = faces(8)
    path = write_rec(tmp_path / "a.rec", face_records(images, labels))
    path.with_suffix(".idx").write_text("1\t0\n0\t12\n")
    with pytest.raises(DataError, match=r"a.idx: key 0 lies at byte 12, where .* has no record"):
        pack_rec(path, tmp_path / "out")


def test_keys_are_found_in_a_large_index(tmp_path):
    index = tmp_path / "a.idx"
    index.write_text("".join(f"{key}\t{key * 1000}\n" for key in range(1, 200_000)) + "0\t7")
    assert index.stat().st_size > 2 << 20
    for key in (1, 12, 123_456, 199_999):
        assert find_offset(index, key) == key * 1000
    assert find_offset(index, 0) == 7 and find_offset(index, 200_000) is None


# -- memory


def peak_bytes(path: Path, out: Path, what: str) -> int:
    tracemalloc.start()
    if what == "read":
        count = sum(1 for _ in RecordFile(path).iter_images())
    elif what == "shuffle":
        count = sum(1 for _ in pack_rec_module._shuffled(RecordFile(path), 0, 1 << 20))
    else:
        limits = ShardLimits(max_samples=100)
        count = pack_rec(path, out, pool_bytes=1 << 17, limits=limits).num_samples
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == int(path.stem)
    return peak


@pytest.mark.parametrize(
    ("what", "few", "many"),
    [("read", 4000, 40_000), ("shuffle", 3000, 20_000), ("pack", 1700, 3400)],
)
def test_memory_does_not_grow_with_the_number_of_records(tmp_path, what, few, many):
    """Bytes a record from two sizes; a Python index would take 114 (faces.md 1.3)."""
    tiny, peaks = picture(0, 8, 8), []
    for count in (few, few, many):  # the first time fills caches
        records = ((n, image(n % 50, n, tiny)) for n in range(count))
        path = tmp_path / f"{count}.rec"
        path.write_bytes(b"".join(record(payload) for _, payload in records))
        peaks.append(peak_bytes(path, tmp_path / f"out-{len(peaks)}", what))
    slope = (peaks[2] - peaks[1]) / (many - few)
    print(f"{what}: peaks of {peaks[1:]} bytes, {slope:.3f} bytes a record")
    assert slope < (1.0 if what != "pack" else 16.0)
