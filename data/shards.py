"""A shard spec -> the list of shards: braces, `::`, globs, folders and lists of these."""

import difflib
import glob
import os
from collections.abc import Iterator, Sequence

import braceexpand
import fsspec

from data.errors import DataError

_TAR_ENDINGS = (".tar", ".tar.gz", ".tgz")
INDEX_ENDING = ".index.parquet"
"""A shard's index lies beside it under the name shard + this."""


def expand_shards(spec: str | Sequence[str]) -> list[str]:
    """Every shard of `spec` in order: "a-{000..007}.tar", "a.tar::b.tar", "a/*.tar", a folder.

    Kinds: a local path, `file://`, `http(s)://`, any fsspec URL, `pipe:COMMAND`; `.tar`, or gzipped
    as `.tar.gz` and `.tgz`. Raises DataError when a local shard is missing (naming near ones), a
    glob finds nothing, a shard comes twice, or there is none.
    """
    items = [spec] if isinstance(spec, str) else list(spec)
    pieces = [piece.strip() for item in items for piece in str(item).split("::")]
    shards = [shard for piece in pieces if piece for shard in _expand(piece)]
    if not shards:
        raise DataError("no shards are given; name tar files, such as 'train-{000000..000007}.tar'")
    _check_twice(shards)
    _check_present(shards)
    return shards


def local_path(shard: str) -> str | None:
    """The path of a shard on this machine's file systems; None for every other kind."""
    if shard.startswith("file://"):
        return shard.removeprefix("file://")
    return None if shard.startswith("pipe:") or "://" in shard else shard


def _expand(piece: str) -> Iterator[str]:
    path = local_path(piece)
    if path is not None and os.path.isfile(path):
        yield path  # also a file whose name holds a brace or a bracket
        return
    try:
        names = list(braceexpand.braceexpand(piece))
    except ValueError as error:
        raise DataError(f"{piece}: the braces do not fit: {error}") from None
    for name in names:
        yield from _expand_glob(name)


def _expand_glob(name: str) -> Iterator[str]:
    path = local_path(name)
    if path is None:
        yield from _expand_remote(name)
        return
    path = os.path.expanduser(path)
    if os.path.isdir(path):
        found = sorted(e.path for e in os.scandir(path) if e.name.endswith(_TAR_ENDINGS))
        what = "the folder holds no .tar, .tar.gz or .tgz file"
    elif glob.has_magic(path) and not os.path.exists(path):
        found, what = sorted(glob.glob(path, recursive=True)), "no file matches"
        found = [path for path in found if not path.endswith(INDEX_ENDING)]
    else:
        found, what = [path], ""
    if not found:
        raise DataError(f"{name}: {what}")
    yield from found


def _expand_remote(url: str) -> Iterator[str]:
    # In http URLs a question mark starts the query, and servers do not list folders.
    if url.startswith(("pipe:", "http://", "https://")) or "*" not in url:
        yield url
        return
    system, path = fsspec.core.url_to_fs(url)
    found = sorted(system.glob(path))
    if not found:
        raise DataError(f"{url}: no file matches")
    for name in found:
        yield system.unstrip_protocol(name)


def _check_twice(shards: list[str]) -> None:
    seen: set[str] = set()
    for shard in shards:
        if shard in seen:
            raise DataError(
                f"{shard} is named twice: each sample counts once an epoch;"
                " weigh whole sources with [[data.sources]] instead"
            )
        seen.add(shard)


def _check_present(shards: list[str]) -> None:
    paths = [path for path in map(local_path, shards) if path is not None]
    missing = [path for path in paths if not os.path.isfile(path)]
    if not missing:
        return
    folder, name = os.path.split(missing[0])
    more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
    if not os.path.isdir(folder or "."):
        raise DataError(f"{missing[0]}: no such shard{more}: the folder {folder} does not exist")
    near = difflib.get_close_matches(name, sorted(os.listdir(folder or ".")), n=3)
    hint = f"; near names there: {', '.join(near)}" if near else ""
    raise DataError(f"{missing[0]}: no such shard{more}{hint}")
