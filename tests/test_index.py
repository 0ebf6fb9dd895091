"""The index against tarfile and webdataset; damaged shards; where index files lie."""

import gzip
import io
import json
import os
import pickle
import random
import shutil
import tarfile
from pathlib import Path

import fsspec
import numpy as np
import pytest
import webdataset
from PIL import Image
from range_server import Faults, serve
from test_tar import FORMATS, make_tar

from data import scan
from data.errors import DataError
from data.index import build_index, load_index
from data.rows import Keys, RowBuilder
from data.scan_pool import ScanPool
from data.tar import BLOCK, Fault, Window, iter_members
from data.text import caption_hash


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("NSPHERE_CACHE", str(tmp_path / "cache"))


def picture(number, width=20, height=10):
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (number * 9 % 256, 50, 90)).save(buffer, "JPEG")
    return buffer.getvalue()


def sample(number, **more):
    key = f"k{number:03d}"
    parts = {"jpg": picture(number), "txt": f"caption {number}".encode()}
    parts |= {"cls": str(number).encode(), **more}
    return [(f"{key}.{ending}", payload) for ending, payload in parts.items()]


def samples(count):
    return [member for number in range(count) for member in sample(number)]


@pytest.fixture
def write(tmp_path):
    def save(members, name="a.tar", **options):
        data = members if isinstance(members, bytes) else make_tar(members, **options)
        (tmp_path / name).write_bytes(data)
        return str(tmp_path / name)

    return save


def read_parts(entry):
    data = Path(entry.shard).read_bytes()
    if entry.shard.endswith("gz"):
        data = gzip.decompress(data)
    return {part.ending: data[part.offset : part.offset + part.size] for part in entry.parts}


def all_entries(index):
    return index.entries(np.arange(len(index)))


def kinds(index):
    return [problem.kind for problem in index.problems]


@pytest.mark.parametrize("format_name", FORMATS)
@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz"])
def test_entries_say_what_the_tar_holds(write, format_name, name):
    data = make_tar(samples(5), format_name, mtime=2.5)
    index = load_index(write(gzip.compress(data) if name.endswith("gz") else data, name))
    assert (len(index), index.counts.tolist(), index.problems) == (5, [5], ())
    for number, entry in enumerate(all_entries(index)):
        assert (entry.id, entry.key, entry.label) == (number, f"k{number:03d}", number)
        assert (entry.width, entry.height) == (20, 10)
        assert entry.caption == caption_hash(f"caption {number}")
        assert [(f"{entry.key}.{e}", b) for e, b in read_parts(entry).items()] == sample(number)
    assert index.shards[0].seekable == name.endswith(".tar")


@pytest.mark.parametrize(
    "name",
    "caltech101-names coco-cc-captions emoji-pairs lfw-aligned omniglot orl-faces"
    " tuxpaint-stamps".split(),
)
def test_real_sets_as_webdataset_reads_them(real_dataset, name):
    folder = real_dataset(name)
    before = sorted(os.listdir(folder))
    shards = sorted(str(path) for path in folder.glob("*.tar*"))[-2:]
    captions = name not in ("lfw-aligned", "omniglot", "orl-faces")
    index = load_index(shards, caption_key="txt" if captions else "")
    assert index.problems == ()
    assert sorted(os.listdir(folder)) == before
    entries = all_entries(index)
    theirs = list(webdataset.WebDataset(shards, shardshuffle=False))
    assert len(entries) == len(theirs)
    for entry, other in list(zip(entries, theirs, strict=True))[:: max(1, len(entries) // 200)]:
        want = {key: value for key, value in other.items() if not key.startswith("__")}
        assert entry.key == other["__key__"] and entry.shard == other["__url__"]
        assert read_parts(entry) == want
        image = Image.open(io.BytesIO(want.get("jpg") or want["png"]))
        assert image.size == (entry.width, entry.height)
        assert entry.label == int(want.get("cls", b"-1"))


def test_members_that_are_not_side_by_side_are_grouped(write):
    members = samples(4)
    random.Random(3).shuffle(members)
    index = load_index(write(members))
    assert {e.key: read_parts(e) for e in all_entries(index)} == {
        f"k{n:03d}": {name.split(".")[1]: payload for name, payload in sample(n)} for n in range(4)
    }


def test_a_sample_that_lacks_a_part_is_left_out_and_named(write):
    members = sample(0) + sample(1)[1:] + sample(2) + sample(3)[:1] + sample(3)[2:]
    index = load_index(write(members))
    assert [entry.key for entry in all_entries(index)] == ["k000", "k002"]
    assert index.labels.tolist() == [0, 2]
    told = [(p.kind, p.key, p.detail) for p in index.problems]
    assert told == [
        ("missing_part", "k001", "has txt, cls but no jpg or jpeg or png or webp: left out"),
        ("missing_part", "k003", "has jpg, cls but no txt: left out"),
    ]


def test_many_problems_are_listed_shortly(write):
    members = sample(0) + [(f"x{i}.jpg", b"") for i in range(100)]
    members += [(f"ignored{i}", b"") for i in range(50)]
    index = load_index(write(members))
    assert len(index) == 1 and len(index.problems) == 42
    assert [p.detail for p in index.problems if "more" in p.detail] == [
        "and 30 more of this kind in this shard",
        "and 80 more of this kind in this shard",
    ]


def test_a_key_that_comes_again(write):
    again = load_index(write(sample(0) + sample(1) + sample(0), "again.tar"))
    assert [entry.key for entry in all_entries(again)] == ["k000", "k000", "k001"]
    assert len({entry.parts for entry in all_entries(again)}) == 3
    assert kinds(again) == ["duplicate_key"]
    two_pictures = [sample(0)[0], *sample(0), *sample(0)[1:], *sample(1)]
    mixed = load_index(write(two_pictures, "mixed.tar"))
    assert [entry.key for entry in all_entries(mixed)] == ["k001"]
    assert "not certain" in mixed.problems[0].detail and mixed.problems[0].key == "k000"
    across = load_index([write(samples(2), "b.tar"), write(samples(2), "c.tar")])
    assert len(across) == 4 and across.problems == ()


def test_damage_costs_the_samples_it_touches(write):
    data = bytearray(make_tar(samples(6)))
    with tarfile.open(fileobj=io.BytesIO(bytes(data))) as tar:
        headers = {info.name: info.offset for info in tar}
        payloads = {info.name: info.offset_data for info in tar}
    data[headers["k002.txt"] + 5] ^= 4
    index = load_index(write(bytes(data), "flipped.tar"))
    assert [entry.key for entry in all_entries(index)] == ["k000", "k001", "k003", "k004", "k005"]
    assert [(p.kind, p.key) for p in index.problems] == [("incomplete", "k002"), ("bad_header", "")]
    assert index.problems[1].offset == headers["k002.txt"]
    cut = load_index(write(bytes(data[: payloads["k004.jpg"] + 10]), "cut.tar"))
    assert [entry.key for entry in all_entries(cut)] == ["k000", "k001", "k003"]
    last = cut.problems[-1]
    assert (last.kind, last.key) == ("truncated", "k004")
    assert [p.kind for p in cut.problems] == ["incomplete", "bad_header", "truncated"]
    assert "cut inside k004.jpg: 10 of its" in last.detail
    at_header = load_index(write(bytes(data[: headers["k004.cls"]]), "at_header.tar"))
    assert [entry.key for entry in all_entries(at_header)] == ["k000", "k001", "k003"]
    assert {p.kind for p in at_header.problems if p.key == "k004"} == {"incomplete"}


def test_a_broken_gzip(write):
    data = gzip.compress(make_tar([*samples(6), ("pad.bin", random.Random(0).randbytes(99_999))]))
    cut = load_index(write(data[:-60_000], "cut.tar.gz"))
    assert len(cut) == 6 and {"truncated", "compression"} <= set(kinds(cut))
    with pytest.raises(DataError, match=r"no sample in there; .*broke off: CRC"):
        load_index(write(data[:-8] + bytes(8), "crc.tar.gz"))


def test_shards_without_samples_are_counted(write):
    index = load_index([write(b"", "a.tar"), write(samples(2), "b.tar"), write([], "c.tar")])
    assert index.counts.tolist() == [0, 2, 0]
    assert [entry.shard[-5:] for entry in all_entries(index)] == ["b.tar", "b.tar"]
    assert [(p.kind, p.shard[-5:]) for p in index.problems] == [("empty", "a.tar")]


def rows_of(data):
    window = Window(lambda offset, size: data[offset : offset + size], lambda: len(data))
    builder = RowBuilder(Keys())
    for item in iter_members(window):
        if isinstance(item, Fault):
            builder.add_fault(item)
        else:
            builder.add(item, window.at)
    return builder.finish()


def check_certain(data, source, flipped=-1):
    """Every row is a whole sample of the source; what is missing is told. Returns their number."""
    rows, notes = rows_of(data)
    for row, key in enumerate(rows.keys):
        parts = range(rows.starts[row], rows.starts[row + 1])
        endings = rows.layouts[rows.layout[row]]
        assert set(endings) == set(source[key])
        for ending, part in zip(endings, parts, strict=True):
            first, size = rows.offsets[part], rows.sizes[part]
            payload = bytearray(data[first : first + size])
            assert len(payload) == len(source[key][ending])
            if first <= flipped < first + size:  # no checksum covers payloads
                payload[flipped - first] = source[key][ending][flipped - first]
            assert payload == source[key][ending]
    assert len(rows.keys) == len(source) or notes
    return len(rows.keys)


@pytest.mark.parametrize("format_name", FORMATS)
def test_damaged_shards_never_give_a_sample_that_is_not_the_sources(format_name):
    rng = random.Random(5)
    members, source = [], {}
    for number in range(6):
        for ending in ("jpg", "txt", "cls"):
            payload = rng.randbytes(rng.choice([1, 40, 512, 1500]))
            members.append((f"k{number}.{ending}", payload))
            source.setdefault(f"k{number}", {})[ending] = payload
    data = make_tar(members, format_name, mtime=1.5 if format_name == "pax" else 0)
    assert check_certain(data, source) == 6
    kept = [check_certain(data[:cut], source) for cut in range(0, len(data), BLOCK)]
    assert kept == sorted(kept) and kept[-1] == 6
    for at in range(0, len(data), 13):
        flipped = bytearray(data)
        flipped[at] ^= 1 << rng.randrange(8)
        assert check_certain(bytes(flipped), source, at) >= 5
    for _ in range(200):
        damaged = bytearray(data)
        for at in rng.sample(range(0, len(data), BLOCK), 3):
            if data[at + 257 : at + 262] == b"ustar":
                damaged[at + rng.randrange(BLOCK)] ^= 0x20
        check_certain(bytes(damaged), source)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"caption_key": "text"}, "ends in text; the endings that exist are cls, jpg, json, txt"),
        ({"image_key": "png;tif"}, "ends in png or tif; the endings"),
        ({"caption_key": "json:title"}, "'title'; its fields are caption, empty, list"),
        ({"caption_key": "json:empty"}, "no caption in the field|has a caption in the field"),
    ],
)
def test_a_key_that_no_sample_has(write, options, text):
    fields = {"caption": "a", "list": ["b", "c"], "empty": []}
    shard = write(sample(0, json=json.dumps(fields).encode()))
    with pytest.raises(DataError, match=text) as error:
        load_index(shard, **options)
    assert "\n" not in str(error.value)


def test_captions_in_json(write):
    broken = sample(2, json=b'{"list": ["b"')
    with_list = sample(0, json=json.dumps({"list": ["b", "c"]}).encode())
    shard = write(with_list + sample(1, json=b'{"other": 1}') + broken)
    index = load_index(shard, caption_key="json:list")
    assert [entry.key for entry in all_entries(index)] == ["k000"]
    assert index.column("caption").tolist() == [caption_hash("b")]
    assert [(p.kind, p.key) for p in index.problems] == [
        ("missing_part", k) for k in ("k001", "k002")
    ]
    assert len(load_index(shard)) == 3


def test_labels_that_are_no_numbers_are_told(write):
    index = load_index(write(sample(0, cls=b"cat") + sample(1, cls=b" 7\n") + sample(2, cls=b"-3")))
    assert index.labels.tolist() == [-1, 7, -1]
    assert [(p.kind, p.key) for p in index.problems] == [
        ("bad_label", "k000"),
        ("bad_label", "k002"),
    ]


def test_an_empty_key_asks_for_nothing(write):
    index = load_index(write([sample(0)[0], *sample(1)]), caption_key="", label_key="")
    assert len(index) == 2 and index.labels.tolist() == [-1, -1]


def test_only_changed_shards_are_scanned(write, monkeypatch):
    scanned = []
    real = scan.scan_shard
    monkeypatch.setattr(
        scan, "scan_shard", lambda url, keys: scanned.append(url) or real(url, keys)
    )
    shards = [write(samples(3), name) for name in ("a.tar", "b.tar")]
    done = []
    first = load_index(shards, progress=lambda *args: done.append(args))
    assert sorted(scanned) == shards and done == [(1, 2), (2, 2)]
    assert Path(shards[0] + ".index.parquet").is_file()
    assert load_index(shards).fingerprint == first.fingerprint and len(scanned) == 2
    write(samples(4), "b.tar")
    assert len(load_index(shards)) == 7 and scanned[2:] == shards[1:]
    Path(shards[0] + ".index.parquet").write_bytes(b"PAR1 not really")
    assert len(load_index(shards)) == 7 and scanned[3:] == shards[:1]
    build_index(shards, fresh=True)
    assert len(scanned) == 6


def test_the_fingerprint_is_that_of_the_content(write, tmp_path):
    shards = [write(samples(3), name) for name in ("a.tar", "b.tar")]
    index = load_index(shards)
    copies = [
        shutil.copy(shard, tmp_path / "cache")
        for shard in shards
        if not (tmp_path / "cache").mkdir(exist_ok=True)
    ]
    os.utime(copies[0], (1, 1))
    assert load_index(copies).fingerprint == index.fingerprint
    assert load_index(shards[::-1]).fingerprint != index.fingerprint
    os.rename(copies[1], tmp_path / "cache" / "c.tar")
    assert (
        load_index([copies[0], str(tmp_path / "cache" / "c.tar")]).fingerprint != index.fingerprint
    )
    write([*samples(3)[:-1], ("k002.txt2", b"2")], "b.tar")
    assert load_index(shards).fingerprint != index.fingerprint


def test_a_folder_that_nobody_may_write_stays_as_it_is(tmp_path):
    folder = tmp_path / "read_only"
    folder.mkdir()
    (folder / "a.tar").write_bytes(make_tar(samples(2)))
    folder.chmod(0o555)
    try:
        index = load_index(str(folder / "a.tar"))
        assert os.listdir(folder) == ["a.tar"]
        assert len(list((tmp_path / "cache").rglob("a.tar.index.parquet"))) == 1
        assert load_index(str(folder / "a.tar")).fingerprint == index.fingerprint
    finally:
        folder.chmod(0o755)


def test_a_shard_replaced_under_way_is_named(write):
    shard = write(samples(3))
    index = load_index(shard)
    write(samples(4))
    load_index(shard)
    with pytest.raises(DataError, match=r"a.tar changed since the start"):
        index.entries([0])


def test_ids_over_row_groups_and_left_out_rows(write):
    members = []
    for number in range(2500):
        members.append((f"k{number:04d}.jpg", b""))
        if number % 5:
            members.append((f"k{number:04d}.txt", b"%d" % number))
    index = load_index([write(members), write(samples(2), "b.tar")])
    keys = [f"k{number:04d}" for number in range(2500) if number % 5] + ["k000", "k001"]
    ids = np.random.default_rng(0).permutation(len(index))
    assert [e.key for e in index.entries(ids)] == [keys[i] for i in ids]
    assert [e.id for e in index.entries(ids)] == ids.tolist()
    assert index.column("caption").tolist()[0] == caption_hash("1")
    for bad in ([-1], [len(index)]):
        with pytest.raises(IndexError, match="sample ids lie in"):
            index.entries(bad)
    assert index.entries([]) == []


def test_an_index_travels_small(write):
    index = load_index([write([(f"k{i:05d}.jpg", b"") for i in range(5000)])], caption_key="")
    entry = index.entries([4321])[0]
    sent = pickle.dumps(index)
    assert len(sent) < 3000
    assert pickle.loads(sent).entries([4321])[0] == entry


def test_first_found_ending_wins(write):
    index = load_index(write([("a.png", b"1"), ("a.jpg", b"22"), ("a.txt", b"x")]))
    entry = index.entries([0])[0]
    assert entry.part("jpg;png").size == 2 and entry.part("png;jpg").size == 1
    assert entry.part("webp") is None


def test_names_are_keys_and_never_paths(write, tmp_path):
    index = load_index(
        write(
            [
                ("../../x/e.jpg", b""),
                ("../../x/e.txt", b"a"),
                ("/abs/f.jpg", b""),
                ("/abs/f.txt", b"b"),
            ]
        )
    )
    assert [entry.key for entry in all_entries(index)] == ["../../x/e", "/abs/f"]


def test_pipes(write):
    shard = write(samples(3))
    index = load_index(f"pipe:cat {shard}")
    assert len(index) == 3 and not index.shards[0].seekable
    assert len(load_index(f"pipe:cat {shard}")) == 3


def test_processes_scan_like_threads(write, monkeypatch):
    shards = [write(samples(n + 1), f"{n}.tar") for n in range(3)]
    threads = load_index(shards, workers=2)
    monkeypatch.setattr(scan, "_PROCESSES_FROM_BYTES", 0)
    monkeypatch.setattr(scan, "scan_shard", None)  # nothing is scanned in this process
    processes = build_index(shards, fresh=True, workers=2)
    assert processes.fingerprint == threads.fingerprint


def test_a_scanning_process_tells_what_went_wrong(write, tmp_path, monkeypatch, capsys):
    asked = [[write(samples(1)), *Keys()], [str(tmp_path / "gone.tar"), *Keys()]]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(map(json.dumps, asked))))
    scan._answer_lines()
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert answers == ["", f"{tmp_path}/gone.tar: No such file or directory"]
    with ScanPool(1) as pool:
        pool._all[0].kill()
        with pytest.raises(DataError, match=r"a.tar: the process that indexed it ended"):
            pool.scan(asked[0][0], Keys())


def test_shards_on_a_server(write):
    plain, packed = make_tar(samples(40)), gzip.compress(make_tar(samples(3)))
    local = load_index([write(plain), write(packed, "b.tar.gz")])
    faults = Faults(num_503=2, cut_after=9000, num_cuts=2)
    with serve({"x/a.tar": plain, "x/b.tar.gz": packed}, faults) as server:
        index = load_index([server.url("x/a.tar"), server.url("x/b.tar.gz")])
        assert index.fingerprint == local.fingerprint and index.problems == ()
        assert [e.parts for e in all_entries(index)] == [e.parts for e in all_entries(local)]
        num_requests = len(server.requests)
        assert num_requests < 20  # not one a member
        load_index([server.url("x/a.tar"), server.url("x/b.tar.gz")])
        assert len(server.requests) <= num_requests + 2  # versions only
        with pytest.raises(DataError, match=r"x/gone.tar.*404"):
            load_index(server.url("x/gone.tar"))


def test_shards_in_a_store(write):
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/indexed/a.tar", make_tar(samples(3)))
    index = load_index("memory://indexed/a.tar")
    assert index.fingerprint == load_index(write(samples(3))).fingerprint
