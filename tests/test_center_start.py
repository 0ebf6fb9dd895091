"""Identities by name: which row a label gets, from nothing, from another run, from its own past."""

import shutil

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import run_ranks
from test_center_files import build, case_config, save

from data.dataset import SampleSet
from data.index import load_index
from trainer.centers.files import StoredCenters
from trainer.centers.identities import NameTable, label_names, load_identities
from trainer.centers.start import (
    assign_rows,
    assign_rows_from,
    assign_rows_of,
    open_source,
    start_from,
)
from trainer.config import ConfigError


def table(rows: dict[str, int]) -> NameTable:
    return NameTable.of(list(rows), list(rows.values()))


def plain(names: NameTable | None) -> dict[str, int] | None:
    if names is None:
        return None
    return dict(zip(names.names.to_pylist(), names.numbers.tolist(), strict=True))


# --- tables of names ---------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(
    names=st.lists(st.text(st.characters(exclude_categories=["Cs"])), unique=True, min_size=1),
    data=st.data(),
)
def test_a_table_is_what_was_written_and_finds_what_a_dict_does(tmp_path_factory, names, data):
    count = data.draw(st.integers(1, len(names)))
    rows = data.draw(st.permutations([i % count for i in range(len(names))]))
    written = NameTable.of(names, rows)
    path = tmp_path_factory.mktemp("names") / "x.arrow"
    path.write_bytes(written.to_arrow())
    found = NameTable.from_arrow(path)
    assert plain(found) == dict(zip(names, rows, strict=True))
    asked = [*names, "\x00nobody"]
    expected = [plain(written).get(name, -1) for name in asked]
    assert found.find(pa.array(asked, pa.large_string())).tolist() == expected
    first = found.first_names().to_pylist()
    assert found.look_up_all(first, "x").tolist() == list(range(count))
    assert all(names.index(first[row]) <= names.index(name) for name, row in plain(found).items())


def test_ten_million_identities_by_number_are_nothing_and_by_name_are_small():
    rows = assign_rows(None, 10_000_000)
    assert rows == (10_000_000, None, None, None)
    named = NameTable.of_numbers(1_000_000)
    assert named.names.nbytes + named.numbers.nbytes < 24_000_000
    assert named.is_plain
    assert not NameTable.of(["0", "1", "3"]).is_plain
    assert not NameTable.of(["0", "1"], [1, 0]).is_plain
    assert not NameTable.of(["0", "1", "2"], [0, 1, 0]).is_plain


def test_an_unknown_name_is_told_with_the_nearest():
    names = NameTable.of(["Ann Lee", "Anna Lea", "Bob", "Cat"])
    with pytest.raises(ConfigError, match="'Ann Le' is no identity of RUN; nearest: Ann Lee, Anna"):
        names.look_up_all(["Ann Le"], "RUN")
    with pytest.raises(ConfigError, match="'xyzzy' is no identity of RUN; none is like it"):
        names.look_up_all(["Bob", "xyzzy"], "RUN")
    many = NameTable.of([f"person-{i}" for i in range(100_000)])
    assert "person-7" in many.nearest("person7")


def test_bad_tables_are_named(tmp_path):
    path = tmp_path / "names.tsv"
    for text, said in (
        ("cls\twho\n0\ta\n", "columns cls and name"),
        ("cls\tname\n0\ta\n0\tb\n", "cls 0 is a and .*cls 0 is b"),
        ("cls\tname\n0\ta\n1\ta\n", "cls 0 is a and .*cls 1 is a"),
        ("cls\tname\n0\ta\n1\t\n", "class 1 is called by an empty name"),
        ("cls\tname\nx\ta\n", "names.tsv"),
        ("", "names.tsv"),
    ):
        path.write_text(text)
        with pytest.raises(ConfigError, match="centers.identities = .*" + said):
            load_identities(str(path))
    with pytest.raises(ConfigError, match=r"centers.identities = .*nowhere.tsv"):
        load_identities(str(tmp_path / "nowhere.tsv"))


@pytest.fixture
def samples(tmp_path):
    from tiny_runs import write_shards

    return SampleSet([load_index(write_shards(tmp_path / "shards"))], seed=0)


def test_names_come_from_the_table_given_or_the_one_beside_the_shards(tmp_path, samples, caplog):
    assert label_names("", samples, 5) is None
    given_, beside = tmp_path / "given.tsv", tmp_path / "shards" / "identities.tsv"
    given_.write_text("cls\tname\n" + "".join(f"{i}\tg{i}\n" for i in (4, 3, 2, 1, 0, 5, 9)))
    beside.write_text("cls\tname\n" + "".join(f"{i}\tb{i}\n" for i in range(5)))
    assert plain(label_names(str(given_), samples, 5)) == {f"g{i}": i for i in range(5)}
    assert plain(label_names("", samples, 5)) == {f"b{i}": i for i in range(5)}
    assert plain(label_names("", samples, 3)) == {f"b{i}": i for i in range(3)}
    with pytest.raises(ConfigError, match=r"given.tsv.*class 6 has no name"):
        label_names(str(given_), samples, 8)
    assert label_names("", samples, 6) is None
    assert "does not name class 5" in caplog.text


# --- which row a label gets --------------------------------------------------------------------


class Source:
    """What `assign_rows_from` asks of stored centers."""

    folder = "SOURCE"

    def __init__(self, num_classes: int, rows: dict[str, int] | None) -> None:
        self.num_classes, self._rows = num_classes, rows

    def names(self) -> NameTable | None:
        return None if self._rows is None else table(self._rows)


def test_rows_by_name_as_one_would_say_them():
    source = Source(4, {"ann": 0, "bob": 1, "cat": 2, "eve": 3, "anna": 0})
    rows = assign_rows_from(source, NameTable.of(["dan", "anna", "cat", "ann"]), 4)
    assert rows.num_rows == 3
    assert rows.of_labels.tolist() == [0, 1, 2, 1]
    assert rows.sources.tolist() == [-1, 0, 2]
    assert plain(rows.names) == {"dan": 0, "anna": 1, "ann": 1, "cat": 2}
    # Nothing merged: labels are rows, and an alias is kept for later.
    rows = assign_rows_from(source, NameTable.of(["bob", "anna"]), 2)
    assert rows.of_labels is None and rows.sources.tolist() == [1, 0]
    assert plain(rows.names) == {"bob": 0, "anna": 1, "ann": 1}


def test_rows_without_names_are_by_number():
    rows = assign_rows_from(Source(3, None), None, 5)
    assert rows[:3] == (5, None, None) and rows.sources.tolist() == [0, 1, 2, -1, -1]
    merged = Source(3, {"0": 0, "1": 1, "2": 0, "3": 2})
    rows = assign_rows_from(merged, None, 5)
    assert rows.of_labels.tolist() == [0, 1, 0, 2, 3]
    assert rows.sources.tolist() == [0, 1, 2, -1]
    assert plain(rows.names) == {"0": 0, "1": 1, "2": 0, "3": 2, "4": 3}
    removed = Source(2, {"0": 0, "2": 1})
    rows = assign_rows_from(removed, None, 3)
    assert rows[:3] == (3, None, None) and rows.sources.tolist() == [0, -1, 1]
    rows = assign_rows_from(Source(3, None), NameTable.of(["2", "x"]), 2)
    assert rows.sources.tolist() == [2, -1] and plain(rows.names) == {"2": 0, "x": 1}


@settings(max_examples=200, deadline=None)
@given(
    stored=st.dictionaries(st.sampled_from("abcdefghij"), st.integers(0, 5), min_size=1),
    labels=st.permutations("abcdefghijklm"),
    num_labels=st.integers(1, 13),
)
def test_rows_by_name_equal_those_of_a_dict(stored, labels, num_labels):
    numbers = sorted(set(stored.values()))
    stored = {name: numbers.index(row) for name, row in stored.items()}
    labels = labels[:num_labels]
    if not set(labels) & stored.keys():
        with pytest.raises(ConfigError, match="none of this run's identities"):
            assign_rows_from(Source(len(numbers), stored), NameTable.of(labels), num_labels)
        return
    rows = assign_rows_from(Source(len(numbers), stored), NameTable.of(labels), num_labels)
    owners: list[object] = []
    expected = []
    for name in labels:
        owner = stored.get(name, name)
        if owner not in owners:
            owners.append(owner)
        expected.append(owners.index(owner))
    found = rows.of_labels if rows.of_labels is not None else np.arange(num_labels)
    assert found.tolist() == expected
    assert rows.num_rows == len(owners)
    assert rows.sources.tolist() == [o if isinstance(o, int) else -1 for o in owners]
    names = {name: owners.index(row) for name, row in stored.items() if row in owners}
    assert plain(rows.names) == names | dict(zip(labels, expected, strict=True))
    # A checkpoint of this run gives the same rows.
    again = assign_rows_of(
        Source(rows.num_rows, plain(rows.names)), NameTable.of(labels), num_labels
    )
    assert (again.of_labels is None) == (rows.of_labels is None)
    assert again.of_labels is None or again.of_labels.tolist() == expected


def test_another_tables_names_are_told():
    with pytest.raises(ConfigError, match=r"\(x, y\) is in SOURCE \(a, b, c, \.\.\.\)") as error:
        source = Source(4, {"a": 0, "b": 1, "c": 2, "d": 3})
        assign_rows_from(source, NameTable.of(["x", "y"]), 2)
    assert "set centers.identities" in str(error.value)


def test_a_checkpoint_must_have_the_identities_of_the_run():
    stored = Source(3, {"a": 0, "b": 1, "c": 2, "bee": 1})
    rows = assign_rows_of(stored, NameTable.of(["c", "a", "bee", "b"]), 4)
    assert rows.of_labels.tolist() == [2, 0, 1, 1] and rows.num_rows == 3
    with pytest.raises(ConfigError, match="this run has the identity 'dan', which it lacks"):
        assign_rows_of(stored, NameTable.of(["a", "b", "c", "dan"]), 4)
    with pytest.raises(ConfigError, match="it has the identity 'c', which this run lacks"):
        assign_rows_of(stored, NameTable.of(["a", "b"]), 2)
    with pytest.raises(ConfigError, match="has 3 classes, this run 4"):
        assign_rows_of(Source(3, None), None, 4)
    with pytest.raises(ConfigError, match="the identity '3', which it lacks"):
        assign_rows_of(Source(3, {"0": 0, "1": 1, "2": 2}), None, 4)
    assert assign_rows_of(Source(3, None), None, 3) == (3, None, None, None)


# --- centers that start from others ------------------------------------------------------------

OLD = {"sub": {"subcenters": 2}, "exact": {"mode": "exact", "sample_rate": 0.4}}
OLD_NAMES = [f"p{i}" for i in range(11)]
NEW_NAMES = ["p9", "n0", "p3", "p4", "n1", "p0", "alias", "n2", "p10"]


def old_rank(group, folder) -> None:
    from test_center_files import train

    for case, options in OLD.items():
        config = case_config(options)
        centers = build(group, config, draw=True)
        train(centers, group, range(5))
        names = NameTable.of([*OLD_NAMES, "alias"], [*range(11), 3])
        save(centers, group, folder / case / "checkpoints", config, names)


def new_rank(group, folder) -> dict:
    told = {}
    for case, options in OLD.items():
        config = case_config(options)
        source = open_source(str(folder / case), group)
        rows = assign_rows_from(source, NameTable.of(NEW_NAMES), len(NEW_NAMES))
        centers = build(group, config, draw=True, num_classes=rows.num_rows)
        drawn = centers.optimizer.tables()["rows"].clone()
        start_from(centers, source, rows.sources)
        told[case] = (drawn, {n: t.clone() for n, t in centers.optimizer.tables().items()})
    return told


@pytest.fixture(scope="module")
def old(tmp_path_factory):
    folder = tmp_path_factory.mktemp("old")
    run_ranks(2, old_rank, folder)
    return folder


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_rows_are_taken_over_by_name_at_any_world_size(old, world_size, monkeypatch):
    ranks = run_ranks(world_size, new_rank, old)
    for case, options in OLD.items():
        sub = options.get("subcenters", 1)
        (path,) = (old / case / "checkpoints").glob("step-*")
        present = torch.cat([block for _, block in StoredCenters.open(path).present()])
        drawn, rows = (
            torch.cat([part if i == 0 else part["rows"] for part in (r[case][i] for r in ranks)])
            for i in (0, 1)
        )
        assert len(rows) == 8 * sub  # p3 and its alias share a row
        expected = drawn.unflatten(0, (-1, sub)).clone()
        for row, name in enumerate(name for name in NEW_NAMES if name != "alias"):
            if name.startswith("p"):
                expected[row] = present.unflatten(0, (-1, sub))[int(name[1:])]
        assert torch.equal(rows, expected.flatten(0, 1))
        for rank in ranks:  # the optimizer starts anew
            assert all(not table.any() for name, table in rank[case][1].items() if name != "rows")


def refused_rank(group, path: str) -> str:
    try:
        open_source(path, group)
    except ConfigError as error:
        return str(error)
    return ""


def test_a_source_that_is_not_one_is_one_error_on_all_ranks(old, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(next((old / "sub" / "checkpoints").glob("step-*")), broken)
    part = broken / "centers" / "part-00000.safetensors"
    part.write_bytes(part.read_bytes()[:-1])
    empty = tmp_path / "run"
    empty.mkdir()
    for path, said in ((broken, "bytes, "), (empty, "a run without"), (tmp_path / "x", "no such")):
        first, second = run_ranks(2, refused_rank, str(path))
        assert first == second
        assert first.startswith(f"centers.init = '{path}'") and said in first


@pytest.mark.parametrize(
    ("shape", "options", "said"),
    [
        ({"dim": 7}, {}, "set model.embedding_dim = 6"),
        ({}, {"subcenters": 1}, "set centers.subcenters = 2"),
    ],
)
def test_a_source_of_another_shape_names_the_setting(old, shape, options, said):
    source = open_source(str(old / "sub"), None)
    centers = build(None, case_config({**OLD["sub"], **options}), draw=True, **shape)
    with pytest.raises(ConfigError, match=said):
        start_from(centers, source, np.arange(11))
