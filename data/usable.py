"""Which rows of a shard's index may be used, and why the others may not."""

from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from data.rows import Note, find_ending
from data.table import ShardTable

LISTED = 20
"""Problems of one kind in one shard that are told one by one; the rest is counted."""


def usable_rows(
    table: ShardTable, required: Sequence[str]
) -> tuple[NDArray[np.int64] | None, list[Note]]:
    """Rows that have every required ending and a caption (None: all), and notes on the others."""
    lacking = {
        "/".join(endings): missing
        for endings, _ in table.layouts
        if (missing := [asked for asked in required if find_ending(endings, asked) < 0])
    }
    field = table.keys.caption_field
    captions_asked = bool(field) and "json" in required
    if not lacking and (not captions_asked or table.num_captions == table.num_rows):
        return None, []
    columns = table.columns(["key", "endings", "offsets", "caption"])
    endings = columns["endings"].cast("string")
    bad = pc.is_in(endings, value_set=pa.array(list(lacking), pa.string())).to_numpy()
    if captions_asked:
        bad = bad | (columns["caption"].to_numpy() == 0)
    notes = [
        Note(
            "missing_part",
            columns["offsets"][row][0].as_py(),
            _tell_missing(
                endings[row].as_py(), lacking.get(endings[row].as_py(), [f"json field {field!r}"])
            ),
            columns["key"][row].as_py(),
        )
        for row in np.flatnonzero(bad)[:LISTED].tolist()
    ]
    more = int(bad.sum()) - LISTED
    if more > 0:
        notes.append(Note("missing_part", notes[-1].offset, _more(more)))
    return np.flatnonzero(~bad), notes


def shorten(notes: Iterable[Note]) -> list[Note]:
    """The first notes of each kind, and one that counts the rest."""
    counts: Counter[str] = Counter()
    short: list[Note] = []
    for note in notes:
        counts[note.kind] += 1
        if counts[note.kind] <= LISTED:
            short.append(note)
    for kind, count in counts.items():
        if count > LISTED:
            last = [note.offset for note in short if note.kind == kind][-1]
            short.append(Note(kind, last, _more(count - LISTED)))
    return short


def explain_empty(tables: Sequence[ShardTable], required: Sequence[str]) -> str:
    """Why no sample of any shard may be used, with what exists instead."""
    endings = sorted(
        {ending for table in tables for layout, _ in table.layouts for ending in layout}
    )
    if not endings:
        notes = [f"{table.source.url}: {note.detail}" for table in tables for note in table.notes]
        first = tables[0].source.url + (f" and {len(tables) - 1} more" if len(tables) > 1 else "")
        return f"{first}: no sample in there{f'; {notes[0]}' if notes else ''}"
    for asked in required:
        if find_ending(endings, asked) < 0:
            advice = (
                "nsphere pack xmc writes shards with lists of labels"
                if asked == tables[0].keys.labels
                else "set data.image_key or data.caption_key to these"
            )
            return (
                f"no sample has a member that ends in {' or '.join(asked.split(';'))};"
                f" the endings that exist are {', '.join(endings[:LISTED])}: {advice}"
            )
    field = tables[0].keys.caption_field
    fields = sorted({name for table in tables for name in table.json_fields})
    if field and not any(table.num_captions for table in tables):
        return (
            f"no sample's JSON has a caption in the field {field!r};"
            f" its fields are {', '.join(fields[:LISTED]) or 'none'}:"
            " set data.caption_key to json:NAME"
        )
    return f"no sample has all of {', '.join(required)} at once; each exists in some samples only"


def _tell_missing(endings: str, missing: Sequence[str]) -> str:
    asked = " and no ".join(item.replace(";", " or ") for item in missing)
    return f"has {endings.replace('/', ', ')} but no {asked}: left out"


def _more(count: int) -> str:
    return f"and {count} more of this kind in this shard"
