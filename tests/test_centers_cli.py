"""`nsphere centers` and the export of centers as a user meets them, against plain numpy."""

import io
import itertools
import json
import logging
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from ranks import run_ranks
from test_center_files import build, case_config, save, train
from tiny_faces import face_config, write_faces
from tiny_runs import _add, read_losses, train_rank

from launch.cli import main
from trainer.centers.duplicates import closest_pairs
from trainer.centers.edit import _match, _mean
from trainer.centers.files import StoredCenters
from trainer.centers.identities import NameTable
from trainer.checkpoint import check, find_checkpoint, load_checkpoint_config, load_weights
from trainer.config import dump_config, load_config
from trainer.export import load_faces

C = 11
CASES = {
    "plain": {},
    "exact": {"mode": "exact", "sample_rate": 0.4, "dtype": "bfloat16"},
    "sub": {"subcenters": 2, "mode": "exact", "sample_rate": 0.4},
}
NAMES = ["Ann Lee", "Bob", "Cat", "Dan", "Eve", "Fay", "Gus", "Hal", "Ida", "Jim", "Kim"]
ALIASES = {"Anna Lee": 0, "Jimmy": 9}


def store_rank(group, folder: Path) -> None:
    for (case, options), named in itertools.product(CASES.items(), (True, False)):
        config = case_config(options)
        centers = build(group, config, draw=True)
        train(centers, group, range(5))
        names = NameTable.of([*NAMES, *ALIASES], [*range(C), *ALIASES.values()]) if named else None
        where = folder / (case if named else f"{case}-numbers")
        save(centers, group, where / "checkpoints", config, names)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs of two ranks with centers alone, with names and without."""
    folder = tmp_path_factory.mktemp("runs")
    run_ranks(2, store_rank, folder)
    return folder


@pytest.fixture
def call(tmp_path, monkeypatch, capfd):
    """Calls the command in this process: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    logger = logging.getLogger("nsphere")
    logs = (logger.propagate, logger.handlers, logger.level)

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(sys, "argv", ["nsphere", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        return (ended.value.code or 0, *capfd.readouterr())

    yield run
    logger.propagate, logger.handlers, logger.level = logs


@pytest.fixture
def done(call):
    def run(*arguments: str | Path) -> str:
        code, out, err = call(*arguments)
        assert code == 0, err
        return out

    return run


@pytest.fixture
def refused(call):
    """Calls the command, expects exit 2; returns what it said."""

    def run(*arguments: str | Path) -> str:
        code, _, err = call(*arguments)
        assert code == 2, err
        return err

    return run


def rows_of(source: Path) -> np.ndarray:  # (C, subcenters, d)
    stored = StoredCenters.find(source)
    rows = torch.cat([block for _, block in stored.present()])
    return rows.double().unflatten(0, (-1, stored.subcenters)).numpy()


def names_of(source: Path) -> dict[str, int] | None:
    table = StoredCenters.find(source).names()
    if table is None:
        return None
    return dict(zip(table.names.to_pylist(), table.numbers.tolist(), strict=True))


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


# --- list, duplicates --------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_list_says_what_there_is(runs, done, case):
    facts = json.loads(done("centers", "list", runs / case, "--json", "--names"))
    rows = rows_of(runs / case)
    lengths = np.linalg.norm(rows, axis=-1)
    assert facts["least"] == pytest.approx(lengths.min())
    assert facts["mean"] == pytest.approx(lengths.mean())
    assert facts["largest"] == pytest.approx(lengths.max())
    assert (facts["num_classes"], facts["num_names"], facts["steps"]) == (C, C + 2, 5)
    assert (facts["dim"], facts["subcenters"]) == rows.shape[:0:-1]
    assert facts["dtype"] == ("bfloat16" if case == "exact" else "float64")
    assert dict(zip(facts["names"], facts["rows"], strict=True)) == names_of(runs / case)
    assert facts["first_names"] == NAMES[:5]
    told = done("centers", "list", runs / case)
    assert "11 identities with 13 names, 6 dimensions" in told
    assert "names: Ann Lee, Bob, Cat, Dan, Eve, ..." in told
    lines = done("centers", "list", runs / case, "--names").splitlines()
    assert lines[:4] == ["row\tname", "0\tAnn Lee", "0\tAnna Lee", "1\tBob"]
    assert "names: 0, 1, 2, 3, 4, ..." in done("centers", "list", runs / f"{case}-numbers")


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("small", [False, True])
def test_duplicates_are_the_pairs_of_a_full_matrix(runs, done, call, case, small, monkeypatch):
    if small:  # blocks and tiles of a few
        monkeypatch.setattr("trainer.centers.files._READ_BYTES", 300)
        monkeypatch.setattr("trainer.centers.duplicates._TILE", 2)
    units = unit(rows_of(runs / case))
    cosines = np.einsum("asd,btd->abst", units, units).max(axis=(2, 3))
    pairs = sorted(((cosines[i, j], i, j) for i in range(C) for j in range(i)), reverse=True)
    found = json.loads(done("centers", "duplicates", runs / case, "--top", "7", "--json"))["pairs"]
    for pair, (cosine, i, j) in zip(found, pairs[:7], strict=True):
        assert pair["rows"] == [j, i] and pair["names"] == [NAMES[j], NAMES[i]]
        assert pair["cosine"] == pytest.approx(cosine, abs=1e-6)
    some = pairs[3][0] - 1e-6
    code, out, err = call("centers", "duplicates", runs / case, "--threshold", some, "--top", "99")
    assert code == 0 and "4 of 4 pairs" in err
    first = out.splitlines()[0].split("\t")
    assert first == [NAMES[pairs[0][2]], NAMES[pairs[0][1]], f"{pairs[0][0]:.4f}"]
    assert len(out.splitlines()) == 4
    stored = StoredCenters.find(runs / case)
    shown: list[tuple[int, int]] = []
    _, count = closest_pairs(stored, 2, progress=lambda *done: shown.append(done))
    assert count == C * (C - 1) // 2 and shown[-1] == (C, C)


# --- remove, merge -----------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_removed_identities_are_gone_and_others_are_as_they_were(runs, done, tmp_path, case):
    out = tmp_path / "deep" / "out"
    told = done("centers", "remove", runs / case, out, "--names", "Bob,Jimmy, Ann Lee")
    assert f"{out}: 8 identities with 8 names, of 11 in" in told and "--centers.init=" in told
    kept = [2, 3, 4, 5, 6, 7, 8, 10]
    assert np.array_equal(rows_of(out), rows_of(runs / case)[kept])
    assert names_of(out) == {NAMES[old]: new for new, old in enumerate(kept)}
    lines = (out / "identities.tsv").read_text().splitlines()
    assert lines[:2] == ["row\tname", "0\tCat"] and len(lines) == 9
    assert check(out) == ""
    stored = StoredCenters.find(out)
    assert stored.tables == ["rows"] and stored.steps == 5
    assert stored.dtype == StoredCenters.find(runs / case).dtype
    source = find_checkpoint(runs / case)
    assert (out / "config.toml").read_text() == (source / "config.toml").read_text()
    # A folder made here is a source again.
    (tmp_path / "names.txt").write_text("Cat\n\nKim\n")
    done("centers", "remove", out, tmp_path / "again", "--names-file", tmp_path / "names.txt")
    assert np.array_equal(rows_of(tmp_path / "again"), rows_of(runs / case)[kept[1:-1]])


def test_removed_by_number_the_others_keep_their_numbers_as_names(runs, done, tmp_path):
    done("centers", "remove", runs / "plain-numbers", tmp_path / "a", "--names", "3,7")
    assert names_of(tmp_path / "a") == {
        str(old): new for new, old in enumerate([0, 1, 2, 4, 5, 6, 8, 9, 10])
    }
    done("centers", "remove", runs / "plain-numbers", tmp_path / "b", "--names", "10,9")
    assert names_of(tmp_path / "b") is None  # rows are called by their numbers still
    assert len(rows_of(tmp_path / "b")) == 9
    assert not (tmp_path / "b" / "identities.tsv").exists()


@pytest.mark.parametrize("case", ["plain", "exact"])
def test_merged_identities_have_the_mean_direction_and_all_names(runs, done, tmp_path, case):
    out, rows = tmp_path / "out", rows_of(runs / case)[:, 0]
    done("centers", "merge", runs / case, out, "--into", "Jimmy", "Cat,Kim")
    merged = rows[[9, 2, 10]]
    mean = unit(unit(merged).mean(0)) * np.linalg.norm(merged, axis=1).mean()
    kept = [0, 1, 3, 4, 5, 6, 7, 8, 9]
    expected = rows[kept].copy()
    expected[8] = mean
    rounding = 2**-8 if case == "exact" else 1e-12
    np.testing.assert_allclose(rows_of(out)[:, 0], expected, rtol=rounding, atol=1e-12)
    assert np.array_equal(rows_of(out)[:8, 0], rows[kept[:8]])
    names = names_of(out)
    assert {name for name, row in names.items() if row == 8} == {"Jim", "Jimmy", "Cat", "Kim"}
    assert StoredCenters.find(out).names().first_names().to_pylist()[8] == "Jimmy"
    assert names["Anna Lee"] == 0 and names["Dan"] == 2


def test_pairs_that_share_an_identity_are_one_group(runs, done, tmp_path):
    pairs = tmp_path / "pairs.tsv"
    pairs.write_text("Kim\tCat\t0.9\nCat\tEve\t0.8\nDan\tHal\t0.7\nAnna Lee\tBob\t0.6\n")
    out, rows = tmp_path / "out", rows_of(runs / "plain")[:, 0]
    done("centers", "merge", runs / "plain", out, "--pairs-file", pairs)
    names = names_of(out)
    assert names["Kim"] == names["Cat"] == names["Eve"]
    assert names["Dan"] == names["Hal"] and names["Bob"] == names["Ann Lee"] == names["Anna Lee"]
    assert len(set(names.values())) == len(rows_of(out)) == C - 4
    found = rows_of(out)[names["Kim"], 0]
    np.testing.assert_allclose(unit(found), unit(unit(rows[[10, 2, 4]]).mean(0)), rtol=1e-12)
    first = StoredCenters.find(out).names().first_names().to_pylist()
    assert {"Kim", "Dan", "Anna Lee"} <= set(first)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 4), st.integers(2, 5), st.integers(0, 10**6))
def test_sub_centers_meet_their_like_in_any_order(subcenters, count, seed):
    """Nearly orthogonal sub-centers, shuffled and noisy in each identity, find each other."""
    rng = np.random.default_rng(seed)
    base = np.eye(8)[:subcenters]
    members = np.stack([base[rng.permutation(subcenters)] for _ in range(count)])
    members = members * rng.uniform(1, 3, (count, subcenters, 1)) + rng.normal(0, 0.01, (1, 1, 8))
    found = _mean(torch.from_numpy(members)).numpy()
    assert np.linalg.norm(found, axis=1) == pytest.approx(np.linalg.norm(members, axis=2).mean())
    nearest = (unit(found) @ unit(members[0]).T).argmax(1)
    assert nearest.tolist() == list(range(subcenters))
    assert (np.diag(unit(found) @ unit(members[0]).T) > 0.98).all()
    order = _match(torch.from_numpy(unit(members[0])), torch.from_numpy(unit(members[1])))
    assert sorted(order.tolist()) == list(range(subcenters))


def test_merged_sub_centers(runs, done, tmp_path):
    out, rows = tmp_path / "out", rows_of(runs / "sub")
    done("centers", "merge", runs / "sub", out, "--into", "Bob", "Eve")
    pair, other = unit(rows[1]), unit(rows[4])
    swapped = np.unravel_index((pair @ other.T).argmax(), (2, 2)) in [(0, 1), (1, 0)]
    mean = unit((pair + (other[::-1] if swapped else other)) / 2)
    np.testing.assert_allclose(unit(rows_of(out)[1]), mean, atol=1e-12)
    assert np.array_equal(rows_of(out)[4:], rows[5:])


# --- what is refused ---------------------------------------------------------------------------


def test_bad_calls_are_one_clear_error(runs, refused, tmp_path):
    run, out = runs / "plain", tmp_path / "out"
    for arguments, said in (
        (["remove", run, out, "--names", "Bob,Ann Le"], "'Ann Le' is no identity of .*; nearest: "),
        (["remove", run, out], "say who is removed"),
        (["remove", run, out, "--names-file", "nowhere"], "nowhere: cannot be read"),
        (["remove", run, out, "--names", ",".join(NAMES[:10])], "1 of 11 identities would be left"),
        (["merge", run, out, "Bob,Cat"], "say who is merged"),
        (["merge", run, out, "--into", "Bob"], "say who is merged"),
        (["merge", run, out, "--into", "Bobby", "Cat"], "'Bobby' is no identity of .*nearest: Bob"),
        (["merge", run, out, "--into", "Jim", "Jimmy"], "Jim, Jimmy: are one identity already"),
        (["list", tmp_path], "a run without a whole checkpoint"),
        (["duplicates", tmp_path / "x"], "no such folder"),
        (["list", runs / "plain-numbers", "--nams"], "No such option"),
        (["add", run, out, "--data", "x", "--identities", "y", "--start", "men"], "mean or random"),
        (["add", run, out, "--data", "x", "--identities", "y.tsv"], "--identities = 'y.tsv'"),
    ):
        text = refused("centers", *arguments)
        assert re.search(said, text), text
        assert not out.exists()
    text = refused("centers", "remove", run, out, "--names", ",".join(f"x{i}" for i in range(9)))
    assert text.count("is no identity") == 5 and "and 4 others are not" in text
    text = refused("centers", "remove", runs / "plain-numbers", out, "--names", "11")
    assert "'11' is no identity" in text and "nearest: 1" in text
    pairs = tmp_path / "pairs.tsv"
    pairs.write_text("Bob\tCat\nDan Eve\n")
    text = refused("centers", "merge", run, out, "--pairs-file", pairs)
    assert "'Dan Eve': a line is two names with a tab" in text


def test_nothing_is_overwritten_and_nothing_is_left_by_a_failure(
    runs, done, refused, call, tmp_path, monkeypatch
):
    run, out = runs / "plain", tmp_path / "out"
    done("centers", "remove", run, out, "--names", "Bob")
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert "nothing is overwritten" in refused("centers", "remove", run, out, "--names", "Cat")
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    empty = tmp_path / "empty"
    empty.mkdir()
    done("centers", "remove", run, empty, "--names", "Bob")
    assert check(empty) == ""
    folder = tmp_path / "full"
    folder.mkdir()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("trainer.centers.edit.flush_folder", full)
    with pytest.raises(OSError, match="No space"):
        main_of("centers", "remove", run, folder / "x", "--names", "Bob", patch=monkeypatch)
    assert list(folder.iterdir()) == []
    part = out / "centers" / "part-00000.safetensors"
    part.write_bytes(part.read_bytes()[:-1])
    assert "bytes, " in refused("centers", "list", out)


def main_of(*arguments, patch) -> None:
    patch.setattr(sys, "argv", ["nsphere", *map(str, arguments)])
    main()


# --- Parquet -----------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("small", [False, True])
def test_centers_become_parquet(runs, done, tmp_path, case, small, monkeypatch):
    if small:
        monkeypatch.setattr("trainer.centers.files._READ_BYTES", 300)
    out, rows = tmp_path / "centers.parquet", rows_of(runs / case)
    sub = rows.shape[1]
    told = done("export", runs / case, out, "--format", "centers")
    assert f"{out}: 11 identities" in told
    file = pq.ParquetFile(out)
    assert (file.num_row_groups > 1) == small
    table = file.read()
    names = ["name", "row", *(["subcenter"] if sub > 1 else []), "aliases", "center"]
    assert table.column_names == names
    assert table["name"].to_pylist() == [name for name in NAMES for _ in range(sub)]
    assert table["row"].to_pylist() == [row for row in range(C) for _ in range(sub)]
    assert table["aliases"][0].as_py() == ["Anna Lee"] and table["aliases"][-1].as_py() == []
    centers = np.array(table["center"].to_pylist(), np.float32)
    assert np.array_equal(centers, rows.reshape(C * sub, -1).astype(np.float32))
    done("export", runs / f"{case}-numbers", out, "--format", "centers")
    assert pq.read_table(out)["name"].to_pylist()[::sub] == [str(row) for row in range(C)]
    assert not list(tmp_path.glob(".*"))


# --- a real run --------------------------------------------------------------------------------


def relabel(shards: Path, out: Path, labels: dict[int, int]) -> None:
    """Shards with other labels, without the samples of labels that are not named."""
    out.mkdir()
    for path in sorted(shards.glob("*.tar")):
        with (
            tarfile.open(path) as old,
            tarfile.open(out / path.name, "w", format=tarfile.USTAR_FORMAT) as new,
        ):
            content = {member.name: old.extractfile(member).read() for member in old}
            for name, data in content.items():
                label = labels.get(int(content[name.rpartition(".")[0] + ".cls"]))
                if label is not None:
                    _add(
                        new, f"{shards.name}{name}", str(label).encode() if "cls" in name else data
                    )


def write_names(folder: Path, names: dict[int, str]) -> Path:
    path = folder / "identities.tsv"
    path.write_text("cls\tname\n" + "".join(f"{i}\t{name}\n" for i, name in names.items()))
    return path


@pytest.fixture(scope="module")
def faces(tmp_path_factory):
    """A run on p0 ... p7, new shards of p6 to p9, and shards of all but p3 with other labels."""
    folder = tmp_path_factory.mktemp("faces")
    write_faces(folder / "faces", num_classes=8, each=6)
    write_names(folder / "faces", {i: f"p{i}" for i in range(8)})
    write_faces(folder / "two", num_classes=2, each=6, seed=7, first=8)
    (folder / "new").mkdir()
    relabel(folder / "two", folder / "new/two", {8: 0, 9: 3})
    relabel(folder / "faces", folder / "new/old", {6: 2, 7: 1})
    (folder / "new.tsv").write_text("cls\tname\n0\tp8\n1\tp7\n2\tp6\n3\tp9\n7\tnobody\n")
    order = [9, 4, 0, 1, 8, 2, 5, 6, 7]  # label -> person
    (folder / "all").mkdir()
    for part, first in (("faces", 0), ("two", 8)):
        people = {p: order.index(p) for p in order if (p >= 8) == (first == 8)}
        relabel(folder / part, folder / "all" / part, people)
        write_names(folder / "all" / part, {label: f"p{p}" for label, p in enumerate(order)})
    config = face_config(folder, train={"duration": "40 steps"}, checkpoint={"every": "40 steps"})
    (folder / "run.toml").write_text(dump_config(config))
    assert run_ranks(1, train_rank, config, str(folder / "run")) == [True]
    return folder


def test_new_identities_start_from_the_mean_of_their_images(faces, done, tmp_path):
    told = done(
        "centers",
        "add",
        faces / "run",
        tmp_path / "out",
        *("--data", f"{faces}/new/two/f-{{0..2}}.tar::{faces}/new/old/f-{{0..2}}.tar"),
        *("--identities", faces / "new.tsv"),
    )
    assert "10 identities with 10 names, of 8 in" in told
    assert names_of(tmp_path / "out") == {f"p{i}": i for i in range(10)}
    rows, before = rows_of(tmp_path / "out")[:, 0], rows_of(faces / "run")[:, 0]
    assert np.array_equal(rows[:8], before)
    lengths = np.linalg.norm(before, axis=1)
    np.testing.assert_allclose(np.linalg.norm(rows[8:], axis=1), lengths.mean(), rtol=1e-6)
    embeddings, labels = embed(faces / "run", faces / "two")
    for row, label in ((8, 8), (9, 9)):
        mean = unit(unit(embeddings[labels == label]).mean(0))
        np.testing.assert_allclose(unit(rows[row]), mean, atol=2e-6)
    nearest = (unit(embeddings) @ unit(rows).T).argmax(1)
    assert (nearest == labels).mean() > 0.9  # right before any training


def embed(run: Path, shards: Path) -> tuple[np.ndarray, np.ndarray]:
    """Every image of some shards through a run's backbone, one at a time, by PIL alone."""
    checkpoint = find_checkpoint(run)
    model = load_faces(load_weights(checkpoint), load_checkpoint_config(checkpoint).model)
    rows, labels = [], []
    for path in sorted(shards.glob("*.tar")):
        with tarfile.open(path) as tar:
            content = {member.name: tar.extractfile(member).read() for member in tar}
        for name, data in content.items():
            if name.endswith(".png"):
                pixels = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
                image = torch.from_numpy(pixels.copy()).permute(2, 0, 1).unsqueeze(0)
                with torch.no_grad():
                    rows.append(model(image).rows[0].double().numpy())
                labels.append(int(content[name.replace(".png", ".cls")]))
    return np.stack(rows), np.array(labels)


def test_what_add_needs_is_named(faces, done, refused, tmp_path):
    new, out = f"{faces}/new/two/f-{{0..2}}.tar", tmp_path / "out"
    short = tmp_path / "short.tsv"
    short.write_text("cls\tname\n0\tp8\n")
    known = tmp_path / "known.tsv"
    known.write_text("cls\tname\n0\tp1\n3\tp2\n")
    call = ["centers", "add", faces / "run", out, "--data", new, "--identities"]
    assert "has the label 3, which" in refused(*call, short)
    assert "all 2 identities of the shards are known already" in refused(*call, known)
    done("centers", "remove", faces / "run", tmp_path / "less", "--names", "p3")
    call[2] = tmp_path / "less"
    assert "holds centers alone: give --backbone RUN" in refused(*call, faces / "new.tsv")
    done(*call, faces / "new.tsv", "--backbone", faces / "run")
    assert len(rows_of(out)) == 9
    call[3] = tmp_path / "drawn"
    done(*call, faces / "new.tsv", "--start", "random")
    drawn = np.linalg.norm(rows_of(tmp_path / "drawn")[7:, 0], axis=1)
    assert len(drawn) == 2 and (drawn < 0.1).all()  # init_std 0.01, 16 dimensions
    call[3] = tmp_path / "other"
    text = refused(*call, faces / "new.tsv", "--backbone", tmp_path / "none")
    assert "no such folder" in text


def test_a_run_goes_on_with_identities_added_removed_and_merged(faces, done, tmp_path):
    """8 identities, 2 added, 1 removed, 2 merged; other labels; killed, and resumed on 1 rank."""
    new = f"{faces}/new/two/f-{{0..2}}.tar::{faces}/new/old/f-{{0..2}}.tar"
    source = ["centers", "add", faces / "run", tmp_path / "a", "--data", new]
    done(*source, "--identities", faces / "new.tsv")
    done("centers", "remove", tmp_path / "a", tmp_path / "b", "--names", "p3")
    done("centers", "merge", tmp_path / "b", tmp_path / "c", "--into", "p0", "p1")
    done("export", faces / "run", tmp_path / "backbone.safetensors")
    overrides = [
        f"--data.shards={faces}/all/faces/f-{{0..2}}.tar::{faces}/all/two/f-{{0..2}}.tar",
        f"--model.pretrained={tmp_path / 'backbone.safetensors'}",
        "--train.duration=8 steps",
        "--checkpoint.every=4 steps",
    ]
    init = f"--centers.init={tmp_path / 'c'}"
    command = [sys.executable, "-m", "launch.cli", "train", str(faces / "run.toml"), *overrides]
    subprocess.run([*command, init, "--run", str(tmp_path / "next")], check=True)
    drawn, taken = read_losses(faces / "run"), read_losses(tmp_path / "next")
    assert taken[1] < 0.5 * drawn[1]
    assert len(rows_of(tmp_path / "next")) == 8
    names = names_of(tmp_path / "next")
    assert names == {f"p{p}": row for row, p in enumerate([9, 4, 0, 8, 2, 5, 6, 7])} | {"p1": 2}
    config = load_config(faces / "run.toml", [*overrides, init])
    with pytest.raises(AssertionError, match="exit codes"):
        run_ranks(2, train_rank, config, str(tmp_path / "killed"), 6)
    run_ranks(1, train_rank, config, str(tmp_path / "killed"))
    again = read_losses(tmp_path / "killed")
    assert sorted(again) == list(range(1, 9))
    for step, loss in again.items():
        assert loss == pytest.approx(taken[step], abs=2e-4)
