"""Filter lists of extreme classification: pairs (document, label) that no prediction may show.

`filter_labels_{train,test}.txt` of the extreme classification repository: a line `document label`
each, both from 0 on. Mostly documents that are a label themselves: predicting it is no merit.
"""

from pathlib import Path

from data.errors import DataError
from data.index import Index
from data.label_lists import LabelLists

_LISTED = 3

Pair = tuple[str, int]
"""Key of a document, leading zeros off where it is a number, and a label."""


def read_filter(path: str | Path) -> list[Pair]:
    """The pairs of a filter list, in its order.

    Raises DataError naming the first line that is not a document and a label from 0 on.
    """
    pairs = []
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                words = line.split()
                if not words:
                    continue
                if len(words) != 2 or not words[1].isdecimal():
                    raise DataError(
                        f"{path} line {number}: {line.strip()!r} is not a document and a label "
                        "from 0 on, with a blank between"
                    )
                pairs.append((plain_key(words[0]), int(words[1])))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: no filter list: {error}") from None
    return pairs


def load_filter(path: str | Path, index: Index) -> LabelLists:
    """Filtered labels of each sample of an index, by id: what predictions leave out.

    A document is found by its key; `nsphere pack xmc` keys documents by their row in the file that
    the list speaks of. Pairs of documents that are not in the index are of no use and are passed
    over. Raises DataError when none is in it: another set's list.
    """
    labels: dict[str, list[int]] = {}
    for document, label in read_filter(path):
        labels.setdefault(document, []).append(label)
    keys = [plain_key(key) for shard in index.iter_keys() for key in shard.to_pylist()]
    lists = LabelLists.of_rows([labels.get(key, ()) for key in keys])
    if labels and not len(lists.ids):
        some = ", ".join(list(labels)[:_LISTED])
        raise DataError(
            f"{path}: no document of it ({some} ...) is among the {len(keys):,} samples, whose "
            f"keys are {', '.join(keys[:_LISTED])} ...: a list speaks of one split of one data set"
        )
    return lists


def plain_key(key: str) -> str:
    """Row numbers without leading zeros, other keys as they are."""
    return (key.lstrip("0") or "0") if key.isdecimal() else key
