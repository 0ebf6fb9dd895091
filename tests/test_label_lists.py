"""Lists of labels in the index, label tables, filter lists, and training on texts alone."""

import io
import json
import os
import tarfile
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tars import loader_of, rows_of, write_tar

from data.augment import ImageTransform
from data.config import DataConfig
from data.errors import DataError
from data.filters import load_filter, read_filter
from data.index import load_index
from data.label_lists import LabelLists, index_label_lists, load_label_lists
from data.label_table import (
    LabelTable,
    find_label_table,
    read_label_table,
    write_label_table,
)
from data.loader import iter_eval_batches
from data.pack.label_documents import closure
from data.table import index_paths
from data.text import TokenizerSpec

WORDS = TokenizerSpec("words", 8, options=(("buckets", 1000),))

rows_of_labels = st.lists(st.lists(st.integers(0, 30), max_size=6), max_size=12)


def label_members(labels):
    return {"txt": f"text of {labels}", "labels": " ".join(map(str, labels))}


def open_texts(spec, **options):
    return load_index(spec, image_key="", label_lists=True, **options)


@settings(max_examples=100, deadline=None)
@given(rows=rows_of_labels, picks=st.lists(st.integers(0, 11), max_size=20))
def test_csr_is_a_list_of_sets(rows, picks):
    lists = LabelLists.of_rows(rows)
    wanted = [sorted(set(row)) for row in rows]
    assert [lists.row(i) for i in range(lists.num_rows)] == wanted
    assert lists.counts.tolist() == list(map(len, wanted))
    assert lists.offsets.dtype == np.int64 and lists.ids.dtype == np.int32
    picks = [pick for pick in picks if pick < len(rows)]
    picked = lists.of(np.array(picks, np.int64))
    assert [picked.row(i) for i in range(len(picks))] == [wanted[pick] for pick in picks]
    turned = lists.transposed(31)
    for label in range(31):
        assert turned.row(label) == [i for i, row in enumerate(wanted) if label in row]


@settings(max_examples=100, deadline=None)
@given(rows=rows_of_labels, share=st.sampled_from([0.1, 0.5, 0.9, 1.0]))
def test_closure_is_what_mostly_comes_along(rows, share):
    found = {
        label: labels.tolist() for label, labels in closure(LabelLists.of_rows(rows), 31, share)
    }
    assert list(found) == list(range(31))
    for label in range(31):
        have = [set(row) for row in rows if label in row]
        times = {other: sum(other in row for row in have) for other in range(31)}
        expected = [o for o, n in times.items() if n and n >= share * len(have)] or [label]
        assert found[label] == expected


def test_closure_in_blocks(monkeypatch):
    rng = np.random.default_rng(0)
    lists = LabelLists.of_rows(rng.integers(0, 40, (200, 5)))
    whole = [labels.tolist() for _, labels in closure(lists, 41, 0.2)]
    monkeypatch.setattr("data.pack.label_documents._BLOCK_PAIRS", 100)
    assert [labels.tolist() for _, labels in closure(lists, 41, 0.2)] == whole


@settings(max_examples=20, deadline=None)
@given(
    shards=st.lists(
        st.lists(st.lists(st.integers(0, 2**31 - 1), max_size=5), min_size=1, max_size=6),
        min_size=1, max_size=3,
    )
)  # fmt: skip
def test_lists_come_by_sample_id(tmp_path_factory, shards):
    folder = tmp_path_factory.mktemp("set")
    for number, rows in enumerate(shards):
        samples = {f"{i:03d}": label_members(row) for i, row in enumerate(rows)}
        write_tar(folder / f"{number}.tar", samples)
    lists = index_label_lists(open_texts(str(folder)))
    wanted = [sorted(set(row)) for rows in shards for row in rows]
    assert [lists.row(i) for i in range(lists.num_rows)] == wanted


def test_lists_over_several_sources(tmp_path):
    write_tar(tmp_path / "a.tar", {"0": label_members([3, 1]), "1": label_members([])})
    write_tar(tmp_path / "b.tar", {"0": label_members([7])})
    indexes = [open_texts(str(tmp_path / name)) for name in ("a.tar", "b.tar")]
    lists = load_label_lists(indexes)
    assert [lists.row(i) for i in range(3)] == [[1, 3], [], [7]]
    assert lists.num_labels == 8


def test_samples_without_a_list(tmp_path):
    samples = {"0": label_members([1]), "1": {"txt": "b"}, "2": label_members([2, 2])}
    spec = str(write_tar(tmp_path / "a.tar", samples))
    index = open_texts(spec)
    assert index_label_lists(index).ids.tolist() == [1, 2]
    (problem,) = index.problems
    assert (problem.kind, problem.key) == ("missing_part", "1")
    with pytest.raises(
        DataError, match=r"a.tar:1: it has no list of labels, only txt; .* pack xmc"
    ):
        index_label_lists(load_index(spec, image_key=""))
    only = write_tar(tmp_path / "b.tar", {"0": {"txt": "b"}})
    with pytest.raises(DataError, match="ends in labels; the endings that exist are txt: nsphere"):
        open_texts(str(only))


@pytest.mark.parametrize("text", ["1 x", "-3", "1,2", str(2**31), "1.0", b"\xff"])
def test_a_list_of_something_else(tmp_path, text):
    samples = {"0": label_members([1]), "1": {"txt": "b", "labels": text}}
    index = open_texts(str(write_tar(tmp_path / "a.tar", samples)))
    assert [problem.kind for problem in index.problems] == ["bad_label"]
    with pytest.raises(DataError, match=r"a.tar:1: 1.labels holds .* no integers from 0"):
        index_label_lists(index)


def test_an_index_without_lists_is_built_again(tmp_path):
    path = write_tar(tmp_path / "a.tar", {"0": label_members([5, 9])})
    index = open_texts(str(path))
    (place, _) = index_paths(str(path))
    table = pq.read_table(place).drop_columns(["labels"])  # as the last format had it
    footer = json.loads(table.schema.metadata[b"nsphere"]) | {"format": 1}
    pq.write_table(table.replace_schema_metadata({b"nsphere": json.dumps(footer)}), place)
    again = open_texts(str(path))
    assert index_label_lists(again).ids.tolist() == [5, 9]
    assert again.fingerprint == index.fingerprint
    assert "labels" in pq.read_schema(place).names


def test_a_table_as_it_was_written(tmp_path):
    table = LabelTable(pa.array(["a", "ä: b", "c\n"], pa.large_string()), np.array([3, 0, 1]), 17)
    write_label_table(tmp_path / "labels.parquet", table)
    found = read_label_table(tmp_path / "labels.parquet")
    assert found.texts_of() == ["a", "ä: b", "c\n"] and found.text(1) == "ä: b"
    assert found.texts_of([2, 0, 2]) == ["c\n", "a", "c\n"]
    assert found.train_count.tolist() == [3, 0, 1] and (found.num_points, found.num_labels) == (
        17,
        3,
    )
    found.check_ids(3, "these")
    with pytest.raises(DataError, match="these has the label 3, and the label table ends at 2"):
        found.check_ids(4, "these")
    shuffled = pq.read_table(tmp_path / "labels.parquet").take([2, 0, 1])
    pq.write_table(shuffled, tmp_path / "other.parquet")
    assert read_label_table(tmp_path / "other.parquet").texts.equals(found.texts)
    pq.write_table(pa.table({"label": [0], "text": ["x"]}), tmp_path / "plain.parquet")
    plain = read_label_table(tmp_path / "plain.parquet")
    assert plain.train_count.tolist() == [0] and plain.num_points == 0


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"label": [0, 1], "text": ["a", " "]}, r"label 1 has no text \(1 such\)"),
        ({"label": [0, 1], "text": ["a", None]}, "label 1 has no text"),
        ({"label": [0, 0], "text": ["a", "b"]}, "label 0 stands there twice"),
        ({"label": [0, 2], "text": ["a", "b"]}, "label 1 is missing, and 2 is there"),
        ({"label": [-1, 0], "text": ["a", "b"]}, "label -1: labels count from 0"),
        ({"label": [0, None], "text": ["a", "b"]}, "a row without a label"),
        ({"id": [0], "text": ["a"]}, "columns label .integer. and text"),
        ({"label": ["x"], "text": ["a"]}, "columns label .integer. and text"),
    ],
)
def test_tables_that_cannot_be(tmp_path, columns, words):
    pq.write_table(pa.table(columns), tmp_path / "labels.parquet")
    with pytest.raises(DataError, match=words):
        read_label_table(tmp_path / "labels.parquet")


def test_where_tables_are_looked_for(tmp_path):
    shards = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        shards.append(str(tmp_path / name / "0.tar"))
    with pytest.raises(DataError, match=r"/a: no labels.parquet beside the shards; nsphere pack"):
        find_label_table(shards)
    table = LabelTable(pa.array(["a"], pa.large_string()), np.array([3]), 1)
    write_label_table(tmp_path / "a" / "labels.parquet", table)
    assert find_label_table(shards) == tmp_path / "a" / "labels.parquet"
    (tmp_path / "b" / "labels.parquet").write_bytes(
        (tmp_path / "a" / "labels.parquet").read_bytes()
    )
    assert find_label_table(shards) == tmp_path / "a" / "labels.parquet"
    write_label_table(
        tmp_path / "b" / "labels.parquet", LabelTable(table.texts, table.train_count, 2)
    )
    with pytest.raises(DataError, match="differ: one run has one label table"):
        find_label_table(shards)
    assert find_label_table(shards, str(tmp_path / "b" / "labels.parquet")).parent.name == "b"
    with pytest.raises(DataError, match=r"labels.table = nowhere: no such file"):
        find_label_table(shards, "nowhere")


def test_filter_lists(tmp_path):
    samples = {f"{row:09d}": label_members([1]) for row in (0, 2, 10)} | {"x": label_members([2])}
    index = open_texts(str(write_tar(tmp_path / "a.tar", samples)))
    path = tmp_path / "filter_labels_test.txt"
    path.write_text("2 5\n10 7\n\n10 3\n000 4\n1 9\nx 8\n10 3\n")
    assert read_filter(path)[:3] == [("2", 5), ("10", 7), ("10", 3)]
    lists = load_filter(path, index)
    assert [lists.row(i) for i in range(4)] == [[4], [5], [3, 7], [8]]
    path.write_text("77 1\n78 1\n")
    with pytest.raises(DataError, match=r"no document of it \(77, 78 ...\) is among the 4 samples"):
        load_filter(path, index)
    path.write_text("1 2\n1 2 3\n")
    with pytest.raises(DataError, match=r"filter_labels_test.txt line 2: '1 2 3' is not"):
        read_filter(path)
    with pytest.raises(DataError, match="no filter list"):
        read_filter(tmp_path / "none.txt")


def text_set(folder, num=90, broken=()):
    folder.mkdir()
    for shard in range(3):
        samples = {
            f"{i:04d}": {"txt": b"\xff\xfe" if i in broken else f"text {i}", "labels": f"{i % 7} 9"}
            for i in range(shard, num, 3)
        }
        write_tar(folder / f"{shard}.tar", samples)
    return str(folder / "{0..2}.tar")


def texts_loader(spec, **options):
    return loader_of(spec, batch=16, image_key="", **options)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("broken", [(), (4, 31, 60)])
def test_texts_alone_on_any_number_of_ranks(tmp_path, workers, broken):
    spec = text_set(tmp_path / "s", broken=broken)
    options = {"workers": workers, "max_bad_fraction": 0.5}
    (alone,) = (list(texts_loader(spec, **options).batches(0, 8)),)
    for batch in alone:
        assert batch.images.shape == (16, 3, 0, 0) and batch.images.dtype == torch.uint8
        assert batch.texts.shape == (16, 12)
    loaders = [
        texts_loader(spec, rank=rank, world=3, workers=0, max_bad_fraction=0.5) for rank in range(3)
    ]
    for step, together in enumerate(zip(*(each.batches(0, 8) for each in loaders), strict=True)):
        assert rows_of(together, 3) == rows_of([alone[step]])
    num_bad = sum(batch.num_bad for batch in alone)
    assert (num_bad > 0) == bool(broken)
    assert not broken or "not UTF-8" in next(b for batch in alone for b in batch.bad).reason
    keys = [key for batch in alone[:5] for key in batch.keys]
    assert len(set(keys)) == 80 or broken


def test_texts_alone_in_evaluation(tmp_path):
    index = open_texts(text_set(tmp_path / "s", num=20, broken=(4,)))
    config = DataConfig(image_key="", workers=0, max_bad_fraction=1.0)
    captions = {}
    for transform in (None, ImageTransform(8, None)):
        for rank in range(2):
            for batch in iter_eval_batches(
                index, config, image_transform=transform, tokenizer_spec=WORDS, batch_size=4,
                rank=rank, world_size=2,
            ):  # fmt: skip
                assert batch.images.shape == (len(batch.ids), 3, 0, 0)
                assert batch.texts.shape == (len(batch.ids), 8)
                captions.update(zip(batch.ids.tolist(), batch.captions, strict=True))
    keys = [entry.key for entry in index.entries(range(20))]
    assert captions == {i: f"text {int(key)}" for i, key in enumerate(keys) if key != "0004"}


def test_the_loader_carries_texts(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.USTAR_FORMAT) as archive:
        for i in range(4000):
            for ending, content in (("labels", b"1 2 3"), ("txt", b"a short text of %d words" % i)):
                info = tarfile.TarInfo(f"{i:05d}.{ending}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    loader = texts_loader(str(tmp_path / "a.tar"))
    list(loader.batches(0, 20))
    start = time.process_time()
    num = sum(len(batch.ids) for batch in loader.batches(0, 250))
    # 25,000 a second of processor time on one core; other work here slows it by what it likes.
    assert num / (time.process_time() - start) > 2_000


def test_texts_of_a_cut_shard(tmp_path):
    spec = text_set(tmp_path / "s")
    loader = texts_loader(spec)
    os.truncate(tmp_path / "s" / "1.tar", 4096)
    with pytest.raises(DataError, match=r"1.tar: changed since it was indexed"):
        list(loader.batches(0, 5))
