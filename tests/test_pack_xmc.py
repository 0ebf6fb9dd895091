"""Packing of extreme classification data: every format gives the same shards, and every trap."""

import csv
import gzip
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scipy.sparse
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from data.errors import DataError
from data.filters import load_filter
from data.index import load_index
from data.label_lists import index_label_lists
from data.label_table import read_label_table
from data.pack.limits import ShardLimits
from data.pack.xmc import Labelling, pack_xmc
from data.pack.xmc_rows import Reading
from launch.cli import app

WORDNET = Path("/work/shared/datasets/wordnet-hypernyms")
NAMES = [f"word{i}" for i in range(9)]


class Toy:
    """Documents as sets of features and of labels; the text is the features' names in order."""

    def __init__(self, rng, num=25, num_labels=7):
        self.features = [sorted(rng.choice(9, rng.integers(1, 5), False)) for _ in range(num)]
        self.labels = [
            sorted(rng.choice(num_labels, rng.integers(0, 4), False)) for _ in range(num)
        ]
        self.labels[0] = [2, num_labels - 1]
        self.label_texts = [f"label text {i}" for i in range(num_labels)]

    @property
    def texts(self):
        return [" ".join(NAMES[i] for i in row) for row in self.features]

    def rows(self, which, num_columns):
        lines = [" ".join(f"{i}:1.0" for i in row) for row in which]
        return f"{len(which)} {num_columns}\n" + "".join(f"{line}\n" for line in lines)

    def matrix(self, which, num_columns):
        counts = [len(row) for row in which]
        columns = np.concatenate([np.array(row, int) for row in which])
        owners = np.repeat(np.arange(len(which)), counts)
        shape = (len(which), num_columns)
        return scipy.sparse.coo_matrix((np.ones(len(columns)), (owners, columns)), shape)

    def write_label_texts(self, path):
        path.write_text("".join(f"{text}\n" for text in self.label_texts))


def as_parquet(toy, folder):
    labels = pa.array([list(map(int, row)) for row in toy.labels], pa.list_(pa.int32()))
    pq.write_table(pa.table({"text": toy.texts, "labels": labels}), folder / "train.parquet")
    rows = [{"label_id": i, "label_text": text} for i, text in enumerate(toy.label_texts)]
    with (folder / "labels.tsv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["label_id", "label_text"], delimiter="\t")
        writer.writeheader()
        writer.writerows(reversed(rows))
    return "train.parquet", {}


def as_json(toy, folder):
    with gzip.open(folder / "trn.json.gz", "wt") as file:
        for number, (text, labels) in enumerate(zip(toy.texts, toy.labels, strict=True)):
            row = {"uid": f"u{number}", "title": text, "content": ""}
            row |= {"target_ind": list(map(int, labels)), "target_rel": [1.0] * len(labels)}
            file.write(json.dumps(row) + "\n")
    lines = [json.dumps({"uid": str(i), "title": text}) for i, text in enumerate(toy.label_texts)]
    (folder / "lbl.json").write_text("\n".join(lines))
    return "trn.json.gz", {}


def as_sparse(toy, folder):
    (folder / "trn_X_Y.txt").write_text(toy.rows(toy.labels, len(toy.label_texts)))
    (folder / "raw").mkdir()
    (folder / "raw" / "trn_X.txt").write_text("".join(f"{text}\n" for text in toy.texts))
    toy.write_label_texts(folder / "Y.txt")
    return "trn_X_Y.txt", {}


def as_smat_text(toy, folder):
    (folder / "Y.trn.smat").write_text(toy.rows(toy.labels, len(toy.label_texts)))
    (folder / "X.trn.smat").write_text(toy.rows(toy.features, 9))
    (folder / "Xf.txt").write_text("\n".join(NAMES))
    toy.write_label_texts(folder / "Y.txt")
    features, names = folder / "X.trn.smat", folder / "Xf.txt"
    return "Y.trn.smat", {"features": features, "vocabulary": names}


def as_bag(toy, folder):
    lines = [f"{len(toy.labels)} 9 {len(toy.label_texts)}"]
    for features, labels in zip(toy.features, toy.labels, strict=True):
        lines.append(",".join(map(str, labels)) + " " + " ".join(f"{i}:0.3" for i in features))
    (folder / "train.txt").write_text("\n".join(lines))
    (folder / "vocabulary.txt").write_text("\r\n".join(NAMES))
    toy.write_label_texts(folder / "Y.txt")
    return "train.txt", {"vocabulary": folder / "vocabulary.txt"}


def as_matrix(kind):
    def write(toy, folder):
        labels = toy.matrix(toy.labels, len(toy.label_texts)).asformat(kind)
        scipy.sparse.save_npz(folder / "Y.trn.npz", labels)
        (folder / "trn_X.txt").write_text("".join(f"{text}\n" for text in toy.texts))
        toy.write_label_texts(folder / "Y.txt")
        return "Y.trn.npz", {}

    return write


def as_two_matrices(toy, folder):
    name, _ = as_matrix("csr")(toy, folder)
    (folder / "trn_X.txt").unlink()
    scipy.sparse.save_npz(folder / "X.npz", toy.matrix(toy.features, 9).tocsr())
    (folder / "Xf.txt").write_text("\n".join(NAMES))
    return name, {"features": folder / "X.npz", "vocabulary": folder / "Xf.txt"}


FORMATS = {
    "json": as_json,
    "sparse": as_sparse,
    "smat": as_smat_text,
    "bag": as_bag,
    "csr": as_matrix("csr"),
    "csc": as_matrix("csc"),
    "coo": as_matrix("coo"),
    "features": as_two_matrices,
}


def open_packed(folder):
    return load_index(str(folder), image_key="", label_lists=True)


def content(folder):
    return {
        path.name: path.read_bytes() for path in sorted(folder.glob("*")) if path.suffix == ".tar"
    }


def member(index, row, ending):
    (entry,) = index.entries([row])
    part = entry.part(ending)
    return Path(entry.shard).read_bytes()[part.offset : part.offset + part.size].decode()


@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 1000))
def test_every_format_gives_the_same_shards(tmp_path_factory, seed):
    root = tmp_path_factory.mktemp("formats")
    toy = Toy(np.random.default_rng(seed))
    packed = {}
    for name, write in {"parquet": as_parquet, **FORMATS}.items():
        (root / name).mkdir()
        file, options = write(toy, root / name)
        out = root / f"{name}-out"
        pack_xmc(
            root / name / file, out, reading=Reading(**options),
            labelling=Labelling(empty="keep", documents="closure"), limits=ShardLimits(10, 1 << 20),
        )  # fmt: skip
        packed[name] = content(out), (out / "labels.parquet").read_bytes()
    for name in FORMATS:
        assert packed[name] == packed["parquet"], name
    index = open_packed(root / "json-out")
    lists = index_label_lists(index)
    assert [lists.row(i) for i in range(25)] == [list(row) for row in toy.labels]
    assert [member(index, i, "txt") for i in range(25)] == toy.texts
    table = read_label_table(root / "json-out" / "labels.parquet")
    assert table.texts_of() == toy.label_texts and table.num_points == 25
    flat = [label for row in toy.labels for label in row]
    assert table.train_count.tolist() == [flat.count(label) for label in range(7)]


def write_json(folder, rows, labels=("a", "b", "c"), name="trn.json"):
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    if labels is not None:
        (folder / "Y.txt").write_text("".join(f"{text}\n" for text in labels))
    return folder / name


def doc(labels, title="some text", **more):
    return {"title": title, "target_ind": labels, **more}


def test_columns_of_texts_and_keys(tmp_path):
    rows = [doc([0], "T", content="C", uid="a.b"), doc([1], "U", content="", uid="c")]
    path = write_json(tmp_path / "j", rows)
    for columns, texts in [
        ((), ["T: C", "U"]),
        (("title",), ["T", "U"]),
        (("content", "title"), ["C: T", "U"]),
    ]:
        out = tmp_path / "-".join(("out", *columns))
        pack_xmc(path, out, reading=Reading(text_columns=columns, key_column="uid"))
        index = open_packed(out)
        assert [member(index, i, "txt") for i in range(2)] == texts
        assert [entry.key for entry in index.entries([0, 1])] == ["a_b", "c"]


def test_label_texts_of_several_columns(tmp_path):
    path = write_json(tmp_path / "j", [doc([0, 1])], labels=None)
    (tmp_path / "j" / "labels.tsv").write_text('label_id\ta\tb\n1\tx\t"q\n0\ty\t\n')
    pack_xmc(path, tmp_path / "out", labelling=Labelling(columns=("a", "b")))
    assert read_label_table(tmp_path / "out" / "labels.parquet").texts_of() == ["y", 'x: "q']
    pq.write_table(pa.table({"text": ["p", "q"]}), tmp_path / "t.parquet")
    pack_xmc(path, tmp_path / "two", labelling=Labelling(texts=tmp_path / "t.parquet"))
    assert read_label_table(tmp_path / "two" / "labels.parquet").texts_of() == ["p", "q"]


def test_empty_rows_repeats_and_weights_of_nothing(tmp_path):
    rows = [doc([0, 0, 2]), doc([]), doc([1], ""), doc([2, 1], target_rel=[0.0, 1.0]), doc([])]
    path = write_json(tmp_path / "j", rows)
    done = pack_xmc(path, tmp_path / "out")
    assert (done.packed.num_samples, done.num_positives) == (2, 3)
    assert done.notes == (
        "left out: 2 documents (000000001, 000000004) without labels (--empty keep packs them)",
        "left out: 1 documents (000000002) without text",
        "1 labels that a document has twice count once",
    )
    table = read_label_table(tmp_path / "out" / "labels.parquet")
    assert table.train_count.tolist() == [1, 2, 1] and table.num_points == 5  # of the whole file
    assert [e.key for e in open_packed(tmp_path / "out").entries([0, 1])] == [
        "000000000",
        "000000003",
    ]
    kept = pack_xmc(path, tmp_path / "kept", labelling=Labelling(empty="keep"))
    assert kept.packed.num_samples == 4 and "2 documents without labels are packed" in kept.notes
    assert index_label_lists(open_packed(tmp_path / "kept")).counts.tolist() == [2, 0, 1, 0]


def test_labels_without_texts(tmp_path):
    path = write_json(tmp_path / "j", [doc([0]), doc([3, 1])])
    with pytest.raises(DataError, match=r"000000001: label 3 has no text: .*Y.txt ends at label 2"):
        pack_xmc(path, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())
    by_number = Labelling(missing_text="number", documents="self")
    done = pack_xmc(path, tmp_path / "numbered", labelling=by_number)
    assert read_label_table(done.table).texts_of() == ["a", "b", "c", "3"]
    assert "1 labels without text are called by their numbers" in done.notes
    assert done.num_label_documents == 3  # a number says nothing
    path = write_json(tmp_path / "gap", [doc([0])], labels=["a", " ", "c", ""])
    with pytest.raises(DataError, match=r"Y.txt: label 1 has no text \(2 such\); give it one"):
        pack_xmc(path, tmp_path / "out")
    path = write_json(tmp_path / "none", [doc([0])], labels=None)
    with pytest.raises(DataError, match=r"no label texts beside it .* --label-texts"):
        pack_xmc(path, tmp_path / "out")
    done = pack_xmc(path, tmp_path / "plain", labelling=Labelling(missing_text="number"))
    assert read_label_table(done.table).texts_of() == ["0"]


def test_lines_of_other_encodings_and_line_ends(tmp_path):
    (tmp_path / "trn_X_Y.txt").write_bytes(b"\xef\xbb\xbf3 2\r\n0:1.0\r\n1:1\r\n0:1 1:1\r\n\r\n")
    text = "caf\u00e9 \u2028 one\x85line".encode()
    (tmp_path / "trn_X.txt").write_bytes(b"caf\xe9\n" + text + b"\nplain")
    (tmp_path / "Y.txt").write_bytes("ä\nü".encode("latin-1"))
    done = pack_xmc(tmp_path / "trn_X_Y.txt", tmp_path / "out")
    index = open_packed(tmp_path / "out")
    texts = [member(index, row, "txt") for row in range(3)]
    assert texts == ["café", "café \u2028 one\x85line", "plain"]
    assert read_label_table(done.table).texts_of() == ["ä", "ü"]
    assert [note.partition(" are not")[0] for note in done.notes] == [
        "Y.txt: 2 lines",
        "trn_X.txt: 1 lines",
    ]


def test_bags_of_features(tmp_path):
    (tmp_path / "Y.txt").write_text("a\nb\n")
    (tmp_path / "t.txt").write_text("4 3 2\n0,1 0:1.0 2:2.6\n 1:1.0\n2:3 0:0\n1\n")
    keep = Labelling(empty="keep")
    done = pack_xmc(tmp_path / "t.txt", tmp_path / "out", labelling=keep)
    index = open_packed(tmp_path / "out")
    assert [member(index, i, "txt") for i in range(3)] == ["f0 f2", "f1", "f2"]
    assert index_label_lists(index).counts.tolist() == [2, 0, 0]
    assert "left out: 1 documents (000000003) without text" in done.notes
    pack_xmc(tmp_path / "t.txt", tmp_path / "two", reading=Reading(repeat=True), labelling=keep)
    index = open_packed(tmp_path / "two")
    assert [member(index, i, "txt") for i in range(3)] == ["f0 f2 f2 f2", "f1", "f2 f2 f2"]


BAD_FILES = {
    "3 2\n0:1\n": "header says 3 rows, the file has 1",
    "1 2\n0:1\n1:1\n": "line 3: the header says 1 rows, and more follow",
    "1 2\n2:1\n": "line 2: column 2, and the header says 2: they count from 0 to 1",
    "1 2\n-1:1\n": "line 2: column -1",
    "1 2\n0\n": "line 2: '0' is not column:value",
    "1 2\nx:1\n": "line 2: 'x:1' is not column:value",
    "a b\n0:1\n": "neither .parquet",
    "": "neither .parquet",
    "1 3 2\n5 0:1\n": "line 2: label 5, and the header says 2",
    "1 3 2\n0 3:1\n": "line 2: column 3, and the header says 3",
    "1 3 2\n0;1 2:1\n": "line 2: '0;1' are no labels",
    "1 3\n0:1\n": "the header of .* label 2 has no text: .*Y.txt ends at label 1",
    "1 1\n0:1\n": "Y.txt has 2 labels, and the header of .* says 1",
}


@pytest.mark.parametrize("text", BAD_FILES)
def test_files_that_do_not_fit(tmp_path, text):
    (tmp_path / "trn_X_Y.txt").write_text(text)
    (tmp_path / "trn_X.txt").write_text("one text\n")
    (tmp_path / "Y.txt").write_text("a\nb\n")
    with pytest.raises(DataError, match=BAD_FILES[text]):
        pack_xmc(tmp_path / "trn_X_Y.txt", tmp_path / "out")
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ('{"title": "t", "target_ind": [0]', "line 1: the JSON does not parse"),
        ("[1]", "line 1: the JSON is no object"),
        ('{"title": "t"}', "line 1: no list target_ind"),
        ('{"title": "t", "target_ind": [0.5]}', "line 1: 0.5 among its labels is no integer"),
        ('{"title": "t", "target_ind": [true]}', "True among its labels"),
        ('{"title": "t", "target_ind": [-1]}', "000000000: label -1: labels count from 0"),
        ('{"title": "t", "target_ind": [0], "target_rel": []}', "no list of 1 weights"),
    ],
)
def test_json_that_does_not_fit(tmp_path, row, words):
    path = write_json(tmp_path / "j", [])
    path.write_text(row + "\n")
    with pytest.raises(DataError, match=words):
        pack_xmc(path, tmp_path / "out")


def test_texts_and_labels_of_other_lengths(tmp_path):
    path = tmp_path / "trn_X_Y.txt"
    path.write_text("2 2\n0:1\n1:1\n")
    (tmp_path / "Y.txt").write_text("a\nb\n")
    with pytest.raises(DataError, match=r"neither trn_X.txt nor X.trn.txt lies beside .* --texts"):
        pack_xmc(path, tmp_path / "out")
    for texts, words in (("one\n", "ends after 1 texts"), ("one\ntwo\nthree\n", "more texts than")):
        (tmp_path / "trn_X.txt").write_text(texts)
        with pytest.raises(DataError, match=words):
            pack_xmc(path, tmp_path / "out")
    (tmp_path / "X.txt").write_text("1 5\n0:1\n")
    with pytest.raises(DataError, match="1 rows of features for 2 of labels"):
        pack_xmc(path, tmp_path / "out", reading=Reading(features=tmp_path / "X.txt"))
    (tmp_path / "X.txt").write_text("2 5\n0:1\n1:1\n")
    (tmp_path / "names.txt").write_text("a\nb\n")
    reading = Reading(features=tmp_path / "X.txt", vocabulary=tmp_path / "names.txt")
    with pytest.raises(DataError, match="2 names for 5 features"):
        pack_xmc(path, tmp_path / "out", reading=reading)
    for reading, words in (
        (Reading(text_columns=("a",)), "--text-columns is for the formats parquet, json"),
        (Reading(repeat=True), "are about --features, and none are given"),
        (Reading(texts=path, features=path), "not both"),
    ):
        with pytest.raises(DataError, match=words):
            pack_xmc(path, tmp_path / "out", reading=reading)


def test_matrices_that_are_none(tmp_path):
    (tmp_path / "trn_X.txt").write_text("one\n")
    (tmp_path / "Y.txt").write_text("a\n")
    path = tmp_path / "Y.trn.npz"
    path.write_bytes(b"nothing")
    with pytest.raises(DataError, match="no sparse matrix of scipy's"):
        pack_xmc(path, tmp_path / "out")
    np.savez(path, a=np.zeros(3))
    with pytest.raises(DataError, match="no sparse matrix of scipy's"):
        pack_xmc(path, tmp_path / "out")
    arrays = {"indptr": [0, 1], "indices": [4], "data": [1.0], "shape": [1, 1]}
    np.savez(path, format=b"csr", **arrays)
    with pytest.raises(DataError, match="column 4 or 4, and the shape says 1"):
        pack_xmc(path, tmp_path / "out")


def test_an_error_leaves_no_shard(tmp_path):
    path = write_json(tmp_path / "j", [doc([i // 49], f"text {i}") for i in range(200)])
    with pytest.raises(DataError, match="000000147: label 3 has no text"):
        pack_xmc(path, tmp_path / "out", limits=ShardLimits(10, 1 << 20))
    assert not list((tmp_path / "out").iterdir())


def test_a_broken_gzip(tmp_path):
    path = write_json(tmp_path / "j", [doc([0], f"text {i}") for i in range(400)])
    data = gzip.compress(path.read_bytes(), mtime=0)
    (tmp_path / "j" / "trn.json.gz").write_bytes(data[: len(data) // 2])
    with pytest.raises(DataError, match="breaks off after line"):
        pack_xmc(tmp_path / "j" / "trn.json.gz", tmp_path / "out")


def test_label_documents(tmp_path):
    rows = [doc([0, 1])] * 9 + [doc([0])] + [doc([1, 2])]
    path = write_json(tmp_path / "j", rows, labels=("a", "b", "c", "unseen"))
    found = {}
    for kind in ("self", "closure"):
        done = pack_xmc(path, tmp_path / kind, labelling=Labelling(documents=kind))
        index = open_packed(tmp_path / kind)
        lists = index_label_lists(index)
        assert [entry.key for entry in index.entries(range(11, 15))] == [
            f"label-{i}" for i in range(4)
        ]
        assert member(index, 12, "txt") == "b"
        found[kind] = [lists.row(row) for row in range(11, 15)]
        assert read_label_table(done.table).train_count.tolist() == [10, 10, 1, 0]
        assert read_label_table(done.table).num_points == 11
    assert found["self"] == [[0], [1], [2], [3]]
    assert found["closure"] == [[0, 1], [0, 1], [1, 2], [3]]
    pack_xmc(path, tmp_path / "implied", labelling=Labelling(documents="implied"))
    index = open_packed(tmp_path / "implied")
    lists = index_label_lists(index)
    assert [entry.key for entry in index.entries(range(11, 14))] == [
        "label-0", "label-1", "label-2"
    ], "a label that implies none makes no document"  # fmt: skip
    assert [lists.row(row) for row in range(11, 14)] == [[1], [0], [1]]
    strict = Labelling(documents="closure", share=0.95)
    pack_xmc(path, tmp_path / "strict", labelling=strict)
    lists = index_label_lists(open_packed(tmp_path / "strict"))
    assert [lists.row(row) for row in range(11, 15)] == [[0], [1], [1, 2], [3]]


def test_label_documents_of_their_own_columns(tmp_path):
    rows = [{"text": "x", "labels": [0, 1]}, {"text": "y", "labels": [1]}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "train.parquet")
    (tmp_path / "labels.tsv").write_text("label\tlabel_text\tgloss\n0\ta\tof a\n1\tb\t\n")
    wish = Labelling(documents="self", document_columns=("gloss",))
    done = pack_xmc(tmp_path / "train.parquet", tmp_path / "out", labelling=wish)
    index = open_packed(tmp_path / "out")
    assert len(index) == 3 and member(index, 2, "txt") == "of a"
    assert read_label_table(done.table).texts_of() == ["a", "b"]
    wrong = Labelling(document_columns=("gloss",))
    with pytest.raises(DataError, match="--document-columns needs --label-documents"):
        pack_xmc(tmp_path / "train.parquet", tmp_path / "no", labelling=wrong)


@pytest.mark.parametrize("beside", [True, False])
def test_other_splits_take_the_training_table(tmp_path, beside):
    train = write_json(tmp_path / "j", [doc([0, 2]), doc([2])])
    table = pack_xmc(train, tmp_path / "out" / "train.tar").table
    test = write_json(tmp_path / "j", [doc([1]), doc([2])], name="tst.json")
    (tmp_path / "j" / "filter_labels_test.txt").write_text("1 2\n")
    if beside:
        with pytest.raises(DataError, match=r"exists: .* take it over with --labels"):
            pack_xmc(test, tmp_path / "out" / "test.tar")
    out = tmp_path / ("out" if beside else "other") / "test.tar"
    before = table.read_bytes()
    done = pack_xmc(
        test, out, labelling=Labelling(table=table),
        filter_list=tmp_path / "j" / "filter_labels_test.txt",
    )  # fmt: skip
    assert done.table.read_bytes() == table.read_bytes() == before
    assert read_label_table(done.table).train_count.tolist() == [1, 0, 2]
    (shard,) = done.packed.shards
    index = load_index(shard, image_key="", label_lists=True)
    filtered = load_filter(done.table.with_name("filter_labels_test.txt"), index)
    assert [filtered.row(i) for i in range(2)] == [[], [2]]
    wrong = write_json(tmp_path / "j", [doc([3])], name="wrong.json")
    with pytest.raises(DataError, match=r"label 3 has no text: .*labels.parquet ends at label 2"):
        pack_xmc(wrong, tmp_path / "third", labelling=Labelling(table=table))
    with pytest.raises(DataError, match="label documents belong to the training split"):
        pack_xmc(test, tmp_path / "third", labelling=Labelling(table=table, documents="self"))
    with pytest.raises(DataError, match=r"--closure 1.5: a share above 0, 1 at most"):
        pack_xmc(test, tmp_path / "third", labelling=Labelling(table=table, share=1.5))
    (tmp_path / "j" / "filter_labels_test.txt").write_text("1 9\n")
    with pytest.raises(DataError, match=r"filter_labels_test.txt: label 9 has no text"):
        pack_xmc(
            test, tmp_path / "third", labelling=Labelling(table=table),
            filter_list=tmp_path / "j" / "filter_labels_test.txt",
        )  # fmt: skip


def test_nothing_to_pack(tmp_path):
    path = write_json(tmp_path / "j", [doc([]), doc([1], " ")])
    with pytest.raises(DataError, match="has no usable document"):
        pack_xmc(path, tmp_path / "out")
    with pytest.raises(DataError, match="no such file"):
        pack_xmc(tmp_path / "nowhere.json", tmp_path / "out")


def test_parquet_columns_that_are_none(tmp_path):
    pq.write_table(pa.table({"text": ["a"], "labels": [1], "more": ["x"]}), tmp_path / "a.parquet")
    (tmp_path / "Y.txt").write_text("a\n")
    with pytest.raises(DataError, match="'labels' holds int64, not lists of integers"):
        pack_xmc(tmp_path / "a.parquet", tmp_path / "out")
    with pytest.raises(DataError, match="no column 'tags'; the columns are text, labels, more"):
        pack_xmc(tmp_path / "a.parquet", tmp_path / "out", reading=Reading(labels_column="tags"))


def test_the_command(tmp_path):
    path = write_json(tmp_path / "j", [doc([0, 2], "T", content="C"), doc([], "U")])
    asked = ["pack", "xmc", str(path), str(tmp_path / "out" / "x.tar"), "--text-columns", "title"]
    result = CliRunner().invoke(app, [*asked, "--label-documents", "self"])
    assert result.exit_code == 0, result.output
    assert "left out: 1 documents (000000001) without labels" in result.output
    told = result.output.splitlines()[-1]
    assert told.startswith("4 texts, 3 of them label texts, with 5 labels of 3")
    assert member(open_packed(tmp_path / "out"), 0, "txt") == "T"
    wrong = CliRunner().invoke(app, [*asked, "--empty", "some"])
    assert isinstance(wrong.exception, DataError)
    assert str(wrong.exception) == "--empty=some: choose drop, keep"


@pytest.mark.skipif(not WORDNET.is_dir(), reason=f"no {WORDNET}")
def test_wordnet_definitions(tmp_path):
    labelling = Labelling(columns=("label_text", "gloss"))
    done = pack_xmc(WORDNET / "val.parquet", tmp_path / "val", labelling=labelling)
    assert (done.packed.num_samples, done.num_labels, done.notes) == (4711, 12647, ())
    lists = index_label_lists(open_packed(tmp_path / "val"))
    rows = pq.read_table(WORDNET / "val.parquet")["labels"].to_pylist()
    assert [lists.row(row) for row in range(4711)] == [sorted(row) for row in rows]
    assert read_label_table(done.table).text(0) == "thing: a separate and self-contained entity"
