"""Folders, lists and tables of faces -> shards with classes whose names survive and agree."""

import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from records import face_records, write_rec
from tars import picture, write_tar
from typer.testing import CliRunner

from data.dataset import SampleSet
from data.errors import DataError
from data.index import load_index
from data.labels import check_labels, named_identities
from data.names import read_identities, write_identities
from data.pack import identities as identities_module
from data.pack.face_table import pack_face_table
from data.pack.identities import pack_identities
from data.pack.limits import ShardLimits
from data.pack.lst import pack_lst
from data.pack.numbering import Naming
from data.pack.rec import pack_rec
from data.pack.writer import LeftOut
from launch.pack_commands import pack


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("NSPHERE_CACHE", str(tmp_path / "cache"))


def samples_of(packed) -> dict[str, tuple[int, bytes]]:
    found: dict[str, dict[str, bytes]] = {}
    for shard in packed.shards:
        with tarfile.open(shard) as archive:
            for member in archive:
                key, _, ending = member.name.partition(".")
                found.setdefault(key, {})[ending] = archive.extractfile(member).read()
    return {
        key: (int(parts.pop("cls")), next(iter(parts.values()))) for key, parts in found.items()
    }


def names_of(folder: Path) -> dict[int, str]:
    table = read_identities(folder / "identities.tsv")
    return dict(zip(table["cls"].to_pylist(), table["name"].to_pylist(), strict=True))


def face_folder(root: Path, people: dict[str, int], start: int = 0) -> dict[str, list[bytes]]:
    faces: dict[str, list[bytes]] = {}
    for name, count in people.items():
        (root / name).mkdir(parents=True)
        faces[name] = [picture(start := start + 1) for _ in range(count)]
        for number, data in enumerate(faces[name]):
            (root / name / f"{number:02d}.jpg").write_bytes(data)
    return faces


# -- a folder per identity


def test_a_folder_per_identity(tmp_path):
    faces = face_folder(tmp_path / "in", {"zoe": 3, "anna": 5, "max v. k": 2, "empty": 0})
    (tmp_path / "in" / "anna" / "more").mkdir()
    (tmp_path / "in" / "anna" / "more" / "x.png").write_bytes(picture(90, kind="PNG"))
    (tmp_path / "in" / "zoe" / "notes.txt").write_text("no image")
    (tmp_path / "in" / "zoe" / "bad.jpg").write_text("no image either")
    (tmp_path / "in" / "readme.jpg").write_bytes(picture(1))
    packed = pack_identities(tmp_path / "in", tmp_path / "out", limits=ShardLimits(max_samples=4))
    assert packed.num_samples == 11 and packed.num_identities == 3 and len(packed.shards) == 3
    assert sorted(packed.left_out) == sorted(
        [f"{tmp_path}/in/empty: no image in there", f"{tmp_path}/in/zoe/bad.jpg: no image"]
    )
    assert names_of(tmp_path / "out") == {0: "anna", 1: "empty", 2: "max v. k", 3: "zoe"}
    samples = samples_of(packed)
    for cls, name in ((0, "anna"), (2, "max v. k"), (3, "zoe")):
        for number, data in enumerate(faces[name]):
            assert samples[f"{name.replace('.', '_')}/{number:02d}"] == (cls, data)
    assert samples["anna/more/x"] == (0, picture(90, kind="PNG"))
    index = load_index(list(packed.shards), caption_key="")
    assert not index.problems and sorted(index.labels.tolist()) == [0] * 6 + [2] * 2 + [3] * 3


def test_the_order_of_a_folder_is_keyed_and_bounded(tmp_path, monkeypatch):
    face_folder(tmp_path / "in", {f"p{n:02d}": 4 for n in range(30)})
    runs = [
        list(samples_of(pack_identities(tmp_path / "in", tmp_path / f"{n}", seed=seed)))
        for n, seed in enumerate((0, 0, 1))
    ]
    assert runs[0] == runs[1] != runs[2] and sorted(runs[0]) == sorted(runs[2])
    together = np.array([a[:3] == b[:3] for a, b in zip(runs[0], runs[0][1:], strict=False)])
    assert together.mean() < 0.2
    monkeypatch.setattr(identities_module, "POOL_IMAGES", 12)
    pooled = list(samples_of(pack_identities(tmp_path / "in", tmp_path / "pools")))
    assert sorted(pooled) == sorted(runs[0])
    assert all(len({key[:3] for key in pooled[at : at + 12]}) == 3 for at in range(0, 120, 12))


def test_names_that_meet_in_a_key_are_kept_apart(tmp_path):
    for name, file in (("a.b", "x.jpg"), ("a_b", "x.jpg"), ("a_b", "x.png"), ("a_b", "x.y.jpg")):
        (tmp_path / "in" / name).mkdir(parents=True, exist_ok=True)
        kind = "PNG" if file.endswith("png") else "JPEG"
        (tmp_path / "in" / name / file).write_bytes(picture(1, kind=kind))
    packed = pack_identities(tmp_path / "in", tmp_path / "out")
    assert sorted(samples_of(packed)) == ["a_b/x", "a_b_2/x", "a_b_2/x_2", "a_b_2/x_y"]


def test_a_file_that_does_not_open_is_left_out(tmp_path):
    face_folder(tmp_path / "in", {"a": 2})
    (tmp_path / "in" / "a" / "zz.jpg").symlink_to(tmp_path / "gone.jpg")
    packed = pack_identities(tmp_path / "in", tmp_path / "out")
    assert packed.num_samples == 2
    assert packed.left_out == (f"{tmp_path}/in/a/zz.jpg: No such file or directory",)


def test_folders_that_do_not_fit_are_told(tmp_path):
    with pytest.raises(DataError, match="no such folder"):
        pack_identities(tmp_path / "none", tmp_path / "out")
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat" / "a.jpg").write_bytes(picture(0))
    with pytest.raises(DataError, match="no folder in there; identities are folders"):
        pack_identities(tmp_path / "flat", tmp_path / "out")
    face_folder(tmp_path / "odd", {"tab\tbed": 1})
    with pytest.raises(DataError, match=r"an identity is called 'tab\\tbed'"):
        pack_identities(tmp_path / "odd", tmp_path / "out")


# -- lists


def write_list(folder: Path, lines: list[str]) -> Path:
    path = folder / "train.lst"
    path.write_text("".join(line + "\n" for line in lines))
    return path


def test_a_list_with_one_or_several_labels(tmp_path):
    root = tmp_path / "casia"
    face_folder(root, {"a": 2, "b": 2})
    lines = ["0\t7\ta/00.jpg", "5\t7.000000\ta/01.jpg", "", "9\t0\t3.5\tb/00.jpg", "3\t2\tb/no.jpg"]
    packed = pack_lst(write_list(root, lines), tmp_path / "out")
    assert packed.num_samples == 3 and packed.num_identities == 2
    assert packed.left_out == (f"{root}/train.lst line 5: b/no.jpg: No such file or directory",)
    samples = samples_of(packed)
    assert [(key, cls) for key, (cls, _) in samples.items()] == [
        ("000000000", 7), ("000000005", 7), ("000000009", 0),
    ]  # fmt: skip
    assert names_of(tmp_path / "out") == {0: "casia/0", 7: "casia/7"}
    with tarfile.open(packed.shards[0]) as archive:
        assert json.load(archive.extractfile("000000009.json")) == {"labels": [0.0, 3.5]}
    elsewhere = write_list(tmp_path, lines[:2])
    assert pack_lst(elsewhere, tmp_path / "other", root=root).num_samples == 2


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("0 7 a/00.jpg", "line 1: .* is not index<TAB>label<TAB>path"),
        ("a/00.jpg\t7", "line 1: .* is not index<TAB>label<TAB>path"),
        ("0\tseven\ta/00.jpg", "line 1: .* is not index<TAB>label<TAB>path"),
        ("1\t/some/image.jpg\t17", "line 1: .* is not index<TAB>label<TAB>path"),
        ("0\t1.5\ta/00.jpg", r"line 1: the label 1.5 is no class number"),
        ("0\t-1\ta/00.jpg", r"line 1: the label -1 is no class number"),
        ("0\tnan\ta/00.jpg", r"line 1: the label nan is no class number"),
        ("0\t3000000000\ta/00.jpg", r"line 1: the label 3000000000 is no class number"),
    ],
)
def test_lines_that_are_none_are_told(tmp_path, line, text):
    face_folder(tmp_path, {"a": 1})
    with pytest.raises(DataError, match=text):
        pack_lst(write_list(tmp_path, [line]), tmp_path / "out")


def test_files_in_another_encoding_are_told(tmp_path):
    face_folder(tmp_path, {"a": 1})
    latin, row = "0\t1\té.jpg\n".encode("latin1"), "a/00.jpg,é\n".encode("latin1")
    (tmp_path / "a.lst").write_bytes(latin)
    with pytest.raises(DataError, match=r"a.lst: b'\\xe9' is no UTF-8: write the file anew"):
        pack_lst(tmp_path / "a.lst", tmp_path / "out")
    (tmp_path / "a.csv").write_bytes(b"image,who\n" + row)
    options = {"image_column": "image", "identity_column": "who"}
    with pytest.raises(DataError, match=r"a.csv: b'\\xe9' is no UTF-8: write the file anew"):
        pack_face_table(tmp_path / "a.csv", tmp_path / "out", **options)
    (tmp_path / "a.parquet").write_bytes(b"hello")
    with pytest.raises(DataError, match=r"a.parquet: cannot be read as Parquet: "):
        pack_face_table(tmp_path / "a.parquet", tmp_path / "out", **options)
    (tmp_path / "long.csv").write_text("image,who\na/00.jpg," + 140_000 * "x" + "\n")
    with pytest.raises(DataError, match=r"long.csv line 1: field larger than field limit"):
        pack_face_table(tmp_path / "long.csv", tmp_path / "out", **options)
    folder = os.fsencode(tmp_path / "people") + b"/\xff"
    os.makedirs(folder)
    with open(folder + b"/a.jpg", "wb") as file:
        file.write(picture(0))
    with pytest.raises(DataError, match=r"called '\\udcff', which is no UTF-8: rename it"):
        pack_identities(tmp_path / "people", tmp_path / "out")


def test_a_folder_that_cannot_be_written_is_told(tmp_path):
    face_folder(tmp_path / "in", {"a": 1})
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"file/out/000000.tar: cannot be written: Not a dir"):
        pack_identities(tmp_path / "in", tmp_path / "file" / "out")


def test_large_labels_of_a_list_are_exact(tmp_path):
    face_folder(tmp_path, {"a": 1})
    lines = [f"{n}\t{label}\ta/00.jpg" for n, label in enumerate((2**24 + 1, 2**24, 2**24 + 3))]
    packed = pack_lst(write_list(tmp_path, lines), tmp_path / "out", naming=Naming(prefix=""))
    assert [cls for cls, _ in samples_of(packed).values()] == [2**24 + 1, 2**24, 2**24 + 3]
    assert sorted(names_of(tmp_path / "out").values()) == ["16777216", "16777217", "16777219"]


# -- tables


PEOPLE = ["zoe", "anna", "zoe", None, "max"]


@pytest.mark.parametrize("form", ["bytes", "struct", "path", "csv", "tsv"])
def test_tables_with_names(tmp_path, form):
    images = [picture(n) for n in range(5)]
    for number, data in enumerate(images):
        (tmp_path / f"{number}.jpg").write_bytes(data)
    paths = [f"{number}.jpg" for number in range(5)]
    if form in ("csv", "tsv"):
        mark = "," if form == "csv" else "\t"
        path = tmp_path / f"faces.{form}"
        rows = [mark.join((p, who or "")) for p, who in zip(paths, PEOPLE, strict=True)]
        path.write_text("\n".join([mark.join(("image", "who")), *rows]) + "\n")
    else:
        path = tmp_path / "faces.parquet"
        structs = [{"bytes": data, "path": None} for data in images]
        column = {"bytes": images, "struct": structs, "path": paths}[form]
        others = {"size": list(range(5)), "who": PEOPLE}
        pq.write_table(pa.table({"image": column, **others}), path)
    packed = pack_face_table(path, tmp_path / "out", image_column="image", identity_column="who")
    assert packed.num_samples == 4 and packed.num_identities == 3
    assert packed.left_out == (f"{path} row 3: no identity",)
    assert names_of(tmp_path / "out") == {0: "anna", 1: "max", 2: "zoe"}
    assert [cls for cls, _ in samples_of(packed).values()] == [2, 0, 2, 1]
    assert [data for _, data in samples_of(packed).values()] == [*images[:3], images[4]]


@pytest.mark.parametrize("form", ["parquet", "csv"])
def test_tables_with_integers_keep_them(tmp_path, form):
    (tmp_path / "set").mkdir()
    path = tmp_path / "set" / f"faces.{form}"
    (tmp_path / "set" / "a.jpg").write_bytes(picture(0))
    if form == "csv":
        path.write_text("image,who\na.jpg,4\na.jpg,0\n")
    else:
        pq.write_table(pa.table({"image": ["a.jpg", "a.jpg"], "who": [4, 0]}), path)
    packed = pack_face_table(path, tmp_path / "out", image_column="image", identity_column="who")
    assert [cls for cls, _ in samples_of(packed).values()] == [4, 0]
    assert names_of(tmp_path / "out") == {0: "set/0", 4: "set/4"}


def test_tables_that_do_not_fit_are_told(tmp_path):
    path = tmp_path / "faces.parquet"
    pq.write_table(pa.table({"image": [picture(0)], "who": [1.5], "n": [-1]}), path)
    options = {"image_column": "image", "identity_column": "who"}
    with pytest.raises(DataError, match="column 'who' holds float: an identity is a name or"):
        pack_face_table(path, tmp_path / "out", **options)
    with pytest.raises(DataError, match="no column 'person'; the columns are image, who, n"):
        pack_face_table(path, tmp_path / "out", image_column="image", identity_column="person")
    with pytest.raises(DataError, match="row 0: the label -1 is no class number"):
        pack_face_table(path, tmp_path / "out", image_column="image", identity_column="n")


# -- numbering over several packs


def test_packs_into_one_folder_share_a_numbering(tmp_path):
    face_folder(tmp_path / "a", {"anna": 1, "zoe": 2})
    face_folder(tmp_path / "b", {"bob": 1, "zoe": 1})
    pack_identities(tmp_path / "a", tmp_path / "out" / "train.tar")
    packed = pack_identities(tmp_path / "b", tmp_path / "out" / "more.tar")
    assert names_of(tmp_path / "out") == {0: "anna", 1: "zoe", 2: "bob"}
    assert {key: cls for key, (cls, _) in samples_of(packed).items()} == {"bob/00": 2, "zoe/00": 1}


def test_packs_elsewhere_follow_the_table_they_are_given(tmp_path):
    images, labels = [picture(n) for n in range(8)], [n // 2 for n in range(8)]
    face_folder(tmp_path / "a", {"anna": 1, "zoe": 2})
    pack_identities(tmp_path / "a", tmp_path / "one")
    table = Naming(earlier=tmp_path / "one" / "identities.tsv")
    for folder in ("ms1m", "glint"):
        (tmp_path / folder).mkdir()
        write_rec(tmp_path / folder / "train.rec", face_records(images, labels))
    packed = pack_rec(tmp_path / "ms1m" / "train.rec", tmp_path / "two", naming=table)
    assert sorted({cls for cls, _ in samples_of(packed).values()}) == [2, 3, 4, 5]
    wanted = {0: "anna", 1: "zoe", **{n + 2: f"ms1m/{n}" for n in range(4)}}
    assert names_of(tmp_path / "two") == wanted
    again = pack_rec(
        tmp_path / "ms1m" / "train.rec",
        tmp_path / "three",
        naming=Naming(earlier=tmp_path / "two" / "identities.tsv"),
    )
    assert names_of(tmp_path / "three") == wanted and again.num_identities == 4
    assert samples_of(again) == samples_of(packed)
    other = pack_rec(
        tmp_path / "glint" / "train.rec",
        tmp_path / "four",
        naming=Naming(earlier=tmp_path / "two" / "identities.tsv"),
    )
    assert sorted({cls for cls, _ in samples_of(other).values()}) == [6, 7, 8, 9]


def labelled(*packs) -> SampleSet:
    indexes = [load_index(list(packed.shards), caption_key="") for packed in packs]
    return SampleSet(indexes, seed=0, weights=[1.0] * len(indexes))


def test_sets_that_disagree_are_told_before_step_1(tmp_path):
    face_folder(tmp_path / "a", {"anna": 1, "zoe": 2})
    face_folder(tmp_path / "b", {"bob": 1, "zoe": 1})
    one = pack_identities(tmp_path / "a", tmp_path / "one")
    two = pack_identities(tmp_path / "b", tmp_path / "two")
    with pytest.raises(
        DataError,
        match=r"one/identities.tsv: cls 0 is anna and .*two/identities.tsv: cls 0 is bob: the same "
        "class twice; .*--identities",
    ):
        check_labels(labelled(one, two))
    earlier = Naming(earlier=tmp_path / "one" / "identities.tsv")
    three = pack_identities(tmp_path / "b", tmp_path / "three", naming=earlier)
    samples = labelled(one, three)
    assert check_labels(samples) == 3
    table = named_identities(samples)
    assert table.to_pydict() == {"cls": [0, 1, 2], "name": ["anna", "zoe", "bob"]}
    write_identities(tmp_path / "two" / "identities.tsv", [(5, "anna"), (6, "bob"), (7, "zoe")])
    with pytest.raises(DataError, match=r"is anna and .* is anna: the same identity twice"):
        check_labels(labelled(one, two))
    (tmp_path / "two" / "identities.tsv").unlink()
    assert named_identities(labelled(two)) is None and check_labels(labelled(one, two)) == 2


def test_a_table_that_says_otherwise_stops_a_pack(tmp_path):
    face_folder(tmp_path / "a", {"anna": 1})
    pack_identities(tmp_path / "a", tmp_path / "out")
    write_identities(tmp_path / "t.tsv", [(0, "bob")])
    with pytest.raises(DataError, match=r"cls 0 is bob, and .*out/identities.tsv says otherwise"):
        pack_identities(
            tmp_path / "a", tmp_path / "out" / "b.tar", naming=Naming(earlier=tmp_path / "t.tsv")
        )


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("cls\tperson\n0\ta\n", "no table with the columns cls and name"),
        ("cls\tname\nx\ta\n", "no table with the columns cls and name"),
        ("cls\tname\n0\ta\n0\tb\n", "cls 0 is a and .*cls 0 is b: the same class twice"),
        ("cls\tname\n0\ta\n1\ta\n", "cls 0 is a and .*cls 1 is a: the same identity twice"),
        ("cls\tname\n0\ta\n0\ta\n", "a line stands there twice"),
        ("cls\tname\n-1\ta\n", "cls -1 of a: from 0 on"),
    ],
)
def test_tables_of_identities_that_are_wrong_are_told(tmp_path, text, error):
    (tmp_path / "t.tsv").write_text(text)
    with pytest.raises(DataError, match=error):
        read_identities(tmp_path / "t.tsv")


def test_names_survive_as_they_are(tmp_path):
    names = ['"quoted"', "NA", "null", "17", "with space", "umlaut \u00e4", "a,b", "'", "#"]
    write_identities(tmp_path / "t.tsv", enumerate(names))
    assert read_identities(tmp_path / "t.tsv")["name"].to_pylist() == names


def test_what_is_left_out_is_told_in_bounded_space():
    left_out = LeftOut()
    for number in range(2500):
        left_out.add(f"line {number}")
    told = left_out.told()
    assert len(told) == 1001 and told[0] == "line 0" and told[-1] == "and 1,500 more"


# -- the command line


def test_the_commands(tmp_path):
    face_folder(tmp_path / "in", {"anna": 2, "zoe": 2})
    images, labels = [picture(n) for n in range(6)], [0, 0, 1, 1, 2, 2]
    write_rec(tmp_path / "train.rec", face_records(images, labels))
    write_list(tmp_path, ["0\t0\tin/anna/00.jpg"])
    (tmp_path / "t.csv").write_text("image,who\nin/zoe/00.jpg,zoe\n")
    earlier = f"--identities={tmp_path}/a/identities.tsv"
    runs = [
        (
            ["identities", f"{tmp_path}/in", f"{tmp_path}/a"],
            "4 samples of 2 identities in 1",
        ),
        (
            ["rec", f"{tmp_path}/train.rec", f"{tmp_path}/b", "--prefix=x", earlier, "--seed=3"],
            "6 samples of 3 identities in 1 shards",
        ),
        (["lst", f"{tmp_path}/train.lst", f"{tmp_path}/c"], "1 samples of 1 identities"),
        (
            ["table", f"{tmp_path}/t.csv", f"{tmp_path}/d", "--identity-column=who", earlier],
            "1 samples of 1 identities",
        ),
    ]
    for arguments, text in runs:
        done = CliRunner().invoke(pack, arguments, catch_exceptions=False)
        assert done.exit_code == 0 and text in done.output, done.output
    wanted = {0: "anna", 1: "zoe"}
    assert names_of(tmp_path / "b") == wanted | {n + 2: f"x/{n}" for n in range(3)}
    assert names_of(tmp_path / "d") == wanted
    with pytest.raises(DataError, match="choose shuffled or file"):
        arguments = ["rec", f"{tmp_path}/train.rec", f"{tmp_path}/e", "--order=random"]
        CliRunner().invoke(pack, arguments, catch_exceptions=False)


def test_packed_faces_load_as_a_training_set(tmp_path):
    face_folder(tmp_path / "in", {f"p{n}": 6 for n in range(5)})
    packed = pack_identities(tmp_path / "in", tmp_path / "out")
    buffer = io.BytesIO()
    Image.new("L", (8, 8)).save(buffer, "PNG")
    write_tar(tmp_path / "extra.tar", {"x": {"png": buffer.getvalue(), "cls": 5}})
    index = load_index([*packed.shards, str(tmp_path / "extra.tar")], caption_key="")
    samples = SampleSet([index], seed=0, images_per_identity=3)
    assert check_labels(samples) == 6 and len(samples.batch(0, 12).ids) == 12
