"""The tables of IJB-B and IJB-C as they are published, read as columns: millions of lines."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as csv

from data.errors import DataError
from data.index import Index
from trainer.evaluate.ijb import Protocol
from trainer.evaluate.lookup import find_samples
from trainer.evaluate.tables import spellings
from trainer.evaluate.templates import Members

MEMBERS = "_face_tid_mid.txt"  # image, template, medium
PAIRS = "_template_pair_label.txt"  # template, template, 1 or 0
SCORES = "_name_5pts_score.txt"  # image, five points, the detector's score
_NUM_SCORE_COLUMNS = 12


def load_protocol(place: str, index: Index, *, scores: bool) -> Protocol:
    """The tables in folder `place` (or that begin with it, as meta/ijbc), over an index.

    The shards hold the images aligned, each under its name without the ending. Raises DataError
    naming the file, or the images that are in no shard.
    """
    paths = {ending: _find(place, ending) for ending in (MEMBERS, PAIRS)}
    names, templates, media = _read(paths[MEMBERS], (pa.string(), pa.int64(), pa.int64()))
    samples = find_samples([spellings(name) for name in names.to_pylist()], index, place)
    known, numbers = np.unique(templates.to_numpy(), return_inverse=True)
    members = Members.of(numbers, media.to_numpy(), samples, len(known))
    one, two, same = (
        column.to_numpy() for column in _read(paths[PAIRS], (pa.int64(), pa.int64(), pa.int8()))
    )
    pairs = np.stack([one, two], axis=1)
    places = np.searchsorted(known, pairs).clip(max=len(known) - 1)
    strange = np.flatnonzero((known[places] != pairs).any(axis=1) | ~np.isin(same, (0, 1)))
    if len(strange):
        line = int(strange[0])
        raise DataError(
            f"{paths[PAIRS]}: line {line + 1}: {pairs[line, 0]} {pairs[line, 1]} {same[line]} is "
            f"no pair of templates of {paths[MEMBERS].name} with 1 or 0 ({len(strange)} such lines)"
        )
    scored, values = np.zeros(0, np.int64), np.zeros(0, np.float32)
    if scores:
        scored, values = _read_scores(_find(place, SCORES), index)
        if not np.isin(members.samples, scored).all():
            raise DataError(
                f"{place}: some images have no line in *{SCORES}: --eval.ijb_score=false"
            )
    return Protocol(members, scored, values, places, same == 1, place)


def _find(place: str, ending: str) -> Path:
    path = Path(place)
    found = sorted(
        path.glob(f"*{ending}") if path.is_dir() else path.parent.glob(path.name + ending)
    )
    if len(found) != 1:
        names = ", ".join(file.name for file in found) or "none"
        raise DataError(
            f"eval.ijb = {place!r}: there must be one *{ending}, and there is {names}; name the "
            "folder meta of IJB-B or IJB-C, or the files' beginning, as meta/ijbc"
        )
    return found[0]


def _read(path: Path, types: Sequence[pa.DataType]) -> list[pa.ChunkedArray]:
    """The first columns of a file without a header, separated by spaces."""
    names = [f"f{place}" for place in range(len(types))]
    try:
        table = csv.read_csv(
            path,
            read_options=csv.ReadOptions(autogenerate_column_names=True),
            parse_options=csv.ParseOptions(delimiter=" "),
            convert_options=csv.ConvertOptions(
                column_types=dict(zip(names, types, strict=True)),
                include_columns=names,
                strings_can_be_null=False,
            ),
        )
    except (pa.ArrowInvalid, pa.ArrowKeyError, OSError) as error:
        raise DataError(f"{path}: is not such a table: {error}") from None
    return [table[name] for name in names]


def _read_scores(path: Path, index: Index) -> tuple[np.ndarray, np.ndarray]:
    types = (pa.string(), *[pa.float32()] * (_NUM_SCORE_COLUMNS - 1))
    columns = _read(path, types)
    names = [spellings(name) for name in columns[0].to_pylist()]
    samples = find_samples(names, index, str(path))
    order = np.argsort(samples, kind="stable")
    return samples[order], columns[-1].to_numpy()[order]
