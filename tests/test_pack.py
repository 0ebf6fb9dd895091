"""Writers: what webdataset and tarfile read back, and that the index beside it is the scan's."""

import csv
import io
import json
import os
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data import scan
from data.errors import DataError
from data.index import build_index, load_index
from data.pack import writer
from data.pack.folder import pack_folder
from data.pack.scenes import CLASSES, COLORS, iter_scenes
from data.pack.table import pack_table
from data.pack.writer import ShardWriter, pack_iterable
from data.rows import Keys


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("NSPHERE_CACHE", str(tmp_path / "cache"))


def image(color, form="JPEG"):
    buffer = io.BytesIO()
    Image.new("RGB", (12, 8), color).save(buffer, form)
    return buffer.getvalue()


def write_scenes(folder, count=7, **options):
    packed = pack_iterable(iter_scenes(count, seed=1, size=32), folder / "s.tar", **options)
    return list(packed.shards)


def read_back(shards):
    return list(webdataset.WebDataset(list(shards), shardshuffle=False))


def test_webdataset_reads_what_is_written(tmp_path):
    shards = write_scenes(tmp_path, 7, max_samples=3)
    assert [os.path.basename(shard) for shard in shards] == [
        "s-000000.tar",
        "s-000001.tar",
        "s-000002.tar",
    ]
    for (key, parts), other in zip(iter_scenes(7, 1, 32), read_back(shards), strict=True):
        assert other["__key__"] == key
        assert (other["jpg"], other["txt"].decode()) == (parts["jpg"], parts["txt"])
        assert int(other["cls"]) == parts["cls"]
    assert load_index(shards).counts.tolist() == [3, 3, 1]


def test_headers_are_plain_ustar_and_fixed(tmp_path):
    first = Path(write_scenes(tmp_path / "a")[0]).read_bytes()
    assert first == Path(write_scenes(tmp_path / "b")[0]).read_bytes()
    assert first.endswith(bytes(1024)) and len(first) % 512 == 0
    with tarfile.open(fileobj=io.BytesIO(first)) as tar:
        infos = tar.getmembers()
    assert [info.name.split(".")[1] for info in infos[:3]] == ["cls", "txt", "jpg"]
    for info in infos:
        assert (info.mtime, info.mode, info.uid, info.gid, info.uname) == (0, 0o644, 0, 0, "")
        assert info.pax_headers == {} and info.offset_data == info.offset + 512


def test_the_index_beside_a_shard_is_what_a_scan_gives(tmp_path, monkeypatch):
    shards = write_scenes(tmp_path, 9, max_samples=4)
    real = scan.scan_shard
    monkeypatch.setattr(scan, "scan_shard", None)  # a scan now would fail
    written = load_index(shards)
    monkeypatch.setattr(scan, "scan_shard", real)
    scanned = build_index(shards, fresh=True)
    ids = np.arange(9)
    assert written.entries(ids) == scanned.entries(ids)
    assert written.fingerprint == scanned.fingerprint
    assert written.problems == () and written.column("width").tolist() == [32] * 9


@settings(max_examples=200, deadline=None)
@given(
    name=st.text(st.sampled_from("ab/._-0\u00e4"), min_size=1, max_size=130),
    size=st.one_of(st.integers(0, 2**34), st.integers(8**11 - 3, 8**11 + 3)),
)
def test_headers_are_tarfiles(name, size):
    info = tarfile.TarInfo(name)
    info.size = size
    assert writer._header(name, size) == info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")


@pytest.mark.parametrize("key", ["n" * 200, ("d" * 60 + "/") * 5 + "k", "d\u00e9j\u00e0 vu/\u56fe"])
def test_names_that_need_more_than_ustar(tmp_path, key):
    pack_iterable([(key, {"jpg": image("red"), "txt": "t\u00e9xt"})], tmp_path)
    shard = str(tmp_path / "000000.tar")
    (other,) = read_back([shard])
    assert (other["__key__"], other["txt"].decode()) == (key, "t\u00e9xt")
    with tarfile.open(shard) as tar:
        assert tar.getnames() == [f"{key}.txt", f"{key}.jpg"]
    assert load_index(shard).entries([0])[0].key == key


def test_payloads(tmp_path):
    parts = {"jpg": memoryview(image("red")), "json": {"a": [1, "\u00e9"]}, "cls": 7, "txt": "x"}
    pack_iterable([("k", parts)], tmp_path)
    (other,) = read_back([str(tmp_path / "000000.tar")])
    assert json.loads(other["json"]) == {"a": [1, "\u00e9"]}
    assert (other["cls"], other["txt"], other["jpg"]) == (b"7", b"x", image("red"))


def test_shards_end_at_a_size(tmp_path):
    samples = [(f"k{i}", {"bin": bytes(1000)}) for i in range(10)]
    packed = pack_iterable(samples, tmp_path, max_bytes=5000)
    assert [len(read_back([shard])) for shard in packed.shards] == [3, 3, 3, 1]
    assert all(os.path.getsize(shard) <= 5000 + 1024 for shard in packed.shards)
    large = pack_iterable(samples[:2], tmp_path / "large", max_bytes=10)
    assert len(large.shards) == 2


@pytest.mark.parametrize(
    ("key", "ending", "text"),
    [
        ("a.b", "txt", "no dot"),
        ("a", "TXT", "lower case"),
        ("", "txt", "neither is empty"),
        ("a/", "txt", "neither is empty"),
        ("a", "", "neither is empty"),
        ("__meta__/a", "txt", "no member name"),
        ("twice", "txt", "already has a sample 'twice'"),
    ],
)
def test_keys_that_would_not_come_back(tmp_path, key, ending, text):
    with pytest.raises(DataError, match=text), ShardWriter(tmp_path / "a-%d.tar") as writer:
        writer.write("twice", {"txt": ""})
        writer.write(key, {ending: ""})
    assert os.listdir(tmp_path) == []


def test_nothing_half_written_stays_and_nothing_is_overwritten(tmp_path):
    with pytest.raises(RuntimeError), ShardWriter(tmp_path / "a-%d.tar", max_samples=2) as writer:
        for number in range(5):
            writer.write(f"k{number}", {"txt": "x"})
            assert "a-2.tar" not in os.listdir(tmp_path)
        raise RuntimeError
    assert sorted(os.listdir(tmp_path)) == [
        f"a-{n}.tar{ending}" for n in (0, 1) for ending in ("", ".index.parquet")
    ]
    with pytest.raises(DataError, match=r"a-0.tar exists; delete it"):
        pack_iterable([("k", {"txt": "x"})], tmp_path / "a-%d.tar")


def test_bad_patterns_and_payloads(tmp_path):
    for pattern in ("a.tar", "a-%s-%s.tar", "a-%d.zip", "a-%q.tar"):
        with pytest.raises(DataError, match="is no shard pattern"):
            ShardWriter(pattern)
    for value in (object(), float("nan")):
        with pytest.raises(DataError, match="neither bytes nor text nor JSON"):
            pack_iterable([("k", {"json": value})], tmp_path)
    with pytest.raises(DataError, match="there is no sample"):
        pack_iterable([], tmp_path)


def test_a_folder_with_texts_beside(tmp_path):
    folder = tmp_path / "in"
    (folder / "sub").mkdir(parents=True)
    for name, color in (("a.v1.jpg", "red"), ("sub/a.png", "blue"), ("sub/b.JPG", "green")):
        form = "PNG" if name.endswith("png") else "JPEG"
        (folder / name).write_bytes(image(color, form))
        (folder / name).with_suffix(".txt").write_text(color)
    (folder / "a.v1.cls").write_text("4")
    (folder / "lonely.jpg").write_bytes(image("red"))
    (folder / "broken.jpg").write_bytes(b"no image")
    (folder / "broken.txt").write_text("text")
    done = []
    packed = pack_folder(folder, tmp_path / "out", progress=lambda *args: done.append(args))
    assert packed.num_samples == 3 and done[-1] == (3, 5)
    assert [line.removeprefix(f"{folder}/") for line in sorted(packed.left_out)] == [
        "broken.jpg: not an image",
        "lonely.jpg: no lonely.txt or .json beside it",
    ]
    found = {sample["__key__"]: sample for sample in read_back(packed.shards)}
    assert {key: sample["txt"] for key, sample in found.items()} == {
        "a_v1": b"red",
        "sub/a": b"blue",
        "sub/b": b"green",
    }
    assert found["a_v1"]["cls"] == b"4" and "png" in found["sub/a"]
    again = pack_folder(folder, tmp_path / "again")
    assert Path(again.shards[0]).read_bytes() == Path(packed.shards[0]).read_bytes()


def test_a_folder_of_classes(tmp_path):
    for name in ("tabby_cat", "dog"):
        (tmp_path / "in" / name).mkdir(parents=True)
        for number in range(3):
            (tmp_path / "in" / name / f"{number}.jpg").write_bytes(image("red"))
    packed = pack_folder(tmp_path / "in", tmp_path / "out", captions="folder")
    found = Counter((s["txt"], s["cls"]) for s in read_back(packed.shards))
    assert found == {(b"dog", b"0"): 3, (b"tabby cat", b"1"): 3}
    with pytest.raises(DataError, match="no such folder"):
        pack_folder(tmp_path / "gone", tmp_path / "x")
    with pytest.raises(DataError, match="no image"):
        pack_folder(tmp_path / "out", tmp_path / "x")


@pytest.mark.parametrize("ending", ["csv", "tsv"])
def test_a_table_of_paths(tmp_path, ending):
    (tmp_path / "i.jpg").write_bytes(image("red"))
    (tmp_path / "j.png").write_bytes(image("blue", "PNG"))
    with (tmp_path / f"t.{ending}").open("w", newline="") as file:
        rows = csv.writer(file, delimiter="\t" if ending == "tsv" else ",")
        rows.writerow(["filepath", "title", "class", "id"])
        rows.writerow(["i.jpg", 'a "red", tile', "3", "one.x"])
        rows.writerow([str(tmp_path / "j.png"), "blue", "4", "two"])
        rows.writerow(["gone.jpg", "x", "5", "three"])
        rows.writerow(["i.jpg", "", "6", "four"])
    table = tmp_path / f"t.{ending}"
    columns = {"image_column": "filepath", "caption_column": "title"}
    options = {"label_column": "class", "key_column": "id", "json_columns": ["id"]}
    packed = pack_table(table, tmp_path / "out", **columns, **options)
    one, two = read_back(packed.shards)
    assert (one["__key__"], one["txt"], one["cls"]) == ("one_x", b'a "red", tile', b"3")
    assert (two["__key__"], two["png"], two["json"]) == (
        "two",
        image("blue", "PNG"),
        b'{"id": "two"}',
    )
    assert [line.split("row ")[1] for line in packed.left_out] == [
        "2: gone.jpg: No such file or directory",
        "3: no caption",
    ]
    with pytest.raises(DataError, match="no column 'name'; the columns are filepath, title"):
        pack_table(table, tmp_path / "x", image_column="filepath", caption_column="name")


def test_a_parquet_table_with_images_inside(tmp_path):
    images = [
        {"bytes": image("red"), "path": "x.jpg"},
        {"bytes": image("blue", "WEBP"), "path": None},
    ]
    table = pa.table({"image": images, "captions": [["one", "two"], ["three"]], "n": [1, 2]})
    pq.write_table(table, tmp_path / "t.parquet")
    columns = {"image_column": "image", "caption_column": "captions"}
    done = []
    packed = pack_table(
        tmp_path / "t.parquet",
        tmp_path / "out",
        **columns,
        json_columns=["n"],
        progress=lambda *args: done.append(args),
    )
    first, second = read_back(packed.shards)
    assert json.loads(first["json"]) == {"captions": ["one", "two"], "n": 1}
    assert (first["jpg"], second["webp"]) == (image("red"), image("blue", "WEBP"))
    assert (first["__key__"], first["txt"], done) == ("000000000", b"one", [(2, 2)])
    assert len(load_index(packed.shards, caption_key="json:captions")) == 2
    with pytest.raises(DataError, match="no such table"):
        pack_table(tmp_path / "u.parquet", tmp_path / "x", **columns)
    with pytest.raises(DataError, match=r"a table is .csv, .tsv or .parquet"):
        pack_table(packed.shards[0], tmp_path / "x", **columns)


def test_other_keys_are_indexed_as_asked(tmp_path):
    keys = Keys(image="png", caption="json:text", label="id")
    samples = [("k", {"png": image("red", "PNG"), "json": {"text": "a"}, "id": 3})]
    shards = pack_iterable(samples, tmp_path, keys=keys).shards
    options = {"image_key": "png", "caption_key": "json:text", "label_key": "id"}
    assert load_index(shards, **options).labels.tolist() == [3]


def test_scenes_are_a_pure_function_of_seed_and_number():
    first = list(iter_scenes(20, seed=3, size=32))
    assert list(iter_scenes(30, seed=3, size=32))[:20] == first
    other = list(iter_scenes(20, seed=4, size=32))
    assert not {parts["txt"] for _, parts in first} & {parts["txt"] for _, parts in other}


def place(pixels, color):
    rows, columns = np.nonzero(np.abs(pixels - COLORS[color]).max(axis=2) < 45)
    assert len(rows) > 0.002 * len(pixels) ** 2
    return np.array([columns.mean(), rows.mean()]) / len(pixels)


def test_scenes_show_what_their_captions_say():
    ways = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
    captions, labels, sides = set(), set(), Counter()
    for _, parts in iter_scenes(600, seed=0, size=48):
        picture = Image.open(io.BytesIO(parts["jpg"]))
        pixels = np.asarray(picture.convert("RGB"), np.float64)
        assert pixels.shape == (48, 48, 3)
        captions.add(parts["txt"])
        labels.add(parts["cls"])
        before, _, large = parts["txt"].rpartition("a large ")
        color, shape = CLASSES[parts["cls"]].split()
        assert large.split()[0] == color and large.split(" on ")[0].endswith(shape)
        center = place(pixels, color)
        for thing in filter(None, before.strip().split(" and ")):
            side = next(side for side in ways if thing.endswith(side))
            small = thing.split()[2]
            if before.count(small) == 1 and small != color:
                step = (place(pixels, small) - center) @ ways[side]
                assert 0.25 < step < 0.6
                sides[side] += 1
    assert len(captions) > 580 and labels == set(range(len(CLASSES)))
    assert min(sides[side] for side in ways) > 80
