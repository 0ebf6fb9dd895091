"""Names in a table -> sample ids of an index.

A name is a sample's key (`0892_0001`, `Aaron/Aaron_0001`), also with a file ending, or
`SHARD:KEY` where a key comes twice; where nothing is called so, the last part of its path counts.
"""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from data.errors import DataError
from data.index import Entry, Index

Names = Sequence[tuple[str, ...]]
"""What each sample may be called, the likeliest first."""

_BLOCK = 1024


def find_samples(names: Names, index: Index, origin: str) -> NDArray[np.int64]:  # (len(names),)
    """Sample ids by name. Raises DataError with a count and an example for names that are nowhere.

    Reads every key of the index once; memory is that of the names.
    """
    whole = _Found(candidate for name in names for candidate in name)
    last = _Found(_last_part(candidate) for name in names for candidate in name if _free(candidate))
    example = ""
    for entry in _iter_entries(index):
        example = example or entry.key
        whole.see(entry.key, entry)
        whole.see(entry.name, entry)
        last.see(_last_part(entry.key), entry)
    found = np.full(len(names), -1, np.int64)
    for place, name in enumerate(names):
        for candidate in name:
            sample = whole.get(candidate, origin)
            if sample < 0 and _free(candidate):
                sample = last.get(_last_part(candidate), origin)
            if sample >= 0:
                found[place] = sample
                break
    missing = {names[place] for place in np.flatnonzero(found < 0).tolist()}
    if missing:
        raise DataError(
            f"{origin}: {len(missing)} of the {len(set(names))} samples it names are in none of "
            f"the {len(index.shards)} shards, e.g. {min(missing)[0]!r}; keys there look like "
            f"{example!r}: are these the right shards (--data)?"
        )
    return found


class _Found:
    """Samples by what they are called, of the names that are asked for."""

    def __init__(self, wanted: Iterable[str]) -> None:
        self._wanted = set(wanted)
        self._samples: dict[str, int] = {}
        self._twice: dict[str, tuple[str, str]] = {}
        self._shards: dict[str, str] = {}

    def see(self, name: str, entry: Entry) -> None:
        if name not in self._wanted:
            return
        first = self._samples.setdefault(name, entry.id)
        if first == entry.id:
            self._shards[name] = entry.name
        else:
            self._twice[name] = self._shards[name], entry.name

    def get(self, name: str, origin: str) -> int:
        """The sample, -1 when there is none; DataError when there are two."""
        if name in self._twice:
            one, other = self._twice[name]
            raise DataError(
                f"{origin}: {name!r} may be {one} or {other}: write it as SHARD:KEY, or evaluate "
                "the shards in which keys come once"
            )
        return self._samples.get(name, -1)


def _iter_entries(index: Index) -> Iterator[Entry]:
    for start in range(0, len(index), _BLOCK):
        yield from index.entries(range(start, min(start + _BLOCK, len(index))))


def _free(name: str) -> bool:
    return ":" not in name  # a name that tells its shard means that one


def _last_part(name: str) -> str:
    return name.rpartition("/")[2]
