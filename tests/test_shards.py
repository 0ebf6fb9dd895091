"""Shard specs."""

import pytest

from data.errors import DataError
from data.shards import expand_shards


@pytest.fixture
def folder(tmp_path):
    for number in range(3):
        (tmp_path / f"x-{number:06d}.tar").write_bytes(b"")
    (tmp_path / "y.tar.gz").write_bytes(b"")
    (tmp_path / "x-000000.tar.index.parquet").write_bytes(b"")
    return tmp_path


def test_every_form_of_a_spec(folder):
    x = [str(folder / f"x-{number:06d}.tar") for number in range(3)]
    y = str(folder / "y.tar.gz")
    assert expand_shards(f"{folder}/x-{{000000..000002}}.tar") == x
    assert expand_shards(f"{folder}/x-{{000002,000000}}.tar") == [x[2], x[0]]
    assert expand_shards(f"{y}::{x[1]}") == [y, x[1]]
    assert expand_shards([x[0], f"{folder}/x-00000{{1..2}}.tar"]) == x
    assert expand_shards(f"{folder}/x-*") == x
    assert expand_shards(str(folder)) == [*x, y]
    assert expand_shards(f"file://{x[0]}") == [x[0]]


def test_remote_shards_are_not_looked_up():
    assert expand_shards("http://h/a-{0..1}.tar?v=1") == [
        "http://h/a-0.tar?v=1",
        "http://h/a-1.tar?v=1",
    ]
    assert expand_shards("pipe:cat a-{0..1}.tar") == ["pipe:cat a-0.tar", "pipe:cat a-1.tar"]


def test_globs_in_stores():
    fsspec = pytest.importorskip("fsspec")
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/globbed/b.tar", b"")
    memory.pipe_file("/globbed/a.tar", b"")
    assert expand_shards("memory://globbed/*.tar") == [
        "memory:///globbed/a.tar",
        "memory:///globbed/b.tar",
    ]
    with pytest.raises(DataError, match="no file matches"):
        expand_shards("memory://globbed/*.zip")


def test_a_file_whose_name_holds_braces(tmp_path):
    odd = tmp_path / "a{1,2}[0].tar"
    odd.write_bytes(b"")
    assert expand_shards(str(odd)) == [str(odd)]


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        ("{}/x-000009.tar", "x-000009.tar: no such shard; near names there: x-00000"),
        ("{}/x-{{000000..000005}}.tar", r"x-000003.tar: no such shard \(and 2 more\)"),
        ("{}/gone/a.tar", "gone does not exist"),
        ("{}/z*.tar", "no file matches"),
        ("{}/x-000000.tar::{}/x-000000.tar", "named twice"),
        ("", "no shards are given"),
        ([], "no shards are given"),
        ("::", "no shards are given"),
    ],
)
def test_errors_name_the_shard(folder, spec, text):
    filled = spec.format(folder, folder) if isinstance(spec, str) else spec
    with pytest.raises(DataError, match=text) as error:
        expand_shards(filled)
    assert "\n" not in str(error.value)


def test_an_empty_folder(tmp_path):
    with pytest.raises(DataError, match="the folder holds no"):
        expand_shards(str(tmp_path))
