"""What a plan may know of the samples beside their embeddings, one value a sample."""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from data.config import NegativesConfig
from data.errors import DataError
from data.index import Index
from data.label_lists import LabelLists, load_label_lists

Int64s = NDArray[np.int64]
Floats = NDArray[np.float32]

_LATITUDE, _LONGITUDE = ("latitude", "lat"), ("longitude", "lon", "lng")


class Indexed(Protocol):
    """What a `SampleSet` offers."""

    fingerprint: str

    @property
    def indexes(self) -> tuple[Index, ...]: ...


@dataclass(frozen=True)
class SampleColumns:
    """Columns by sample id, (N,) each; those that a plan does not ask for may be missing."""

    fingerprint: str = ""
    """Of the data set."""
    num_samples: int = 0
    """N; 0: the snapshot's."""
    labels: Int64s | None = None
    """Class labels; -1: none, and such samples are like no other."""
    lists: LabelLists | None = None
    """Labels where a sample has several."""
    captions: Int64s | None = None
    """Hashes of captions; 0: none."""
    shards: Int64s | None = None
    """Shard of each sample, over all sources."""
    coordinates: Floats | None = None
    """(N, c) unit rows, near where the samples' places are near; NaN where unknown."""
    margins: Floats | None = None
    """Positive less hardest negative, of a teacher; NaN where unknown."""
    weights: Floats | None = None
    """What the samples' losses are multiplied by; 1 in the mean."""
    images_per_identity: int = 4
    """K of the planner "identities"."""

    def need(self, name: str, what_for: str) -> Int64s:
        """A column of integers; DataError where it is missing."""
        column: Int64s | None = getattr(self, name)
        if column is None:
            raise DataError(f"{what_for} needs the samples' {name}, and they are not known")
        return column


NO_COLUMNS = SampleColumns()


def load_columns(
    samples: Indexed,
    knobs: NegativesConfig,
    *,
    images_per_identity: int = 4,
    has_lists: bool = False,  # samples have lists of labels, as texts against labels do
) -> SampleColumns:
    """The columns that plans with these knobs ask for, from the index: 8 bytes a sample each, and
    4 a label of lists.

    Raises DataError where no sample has what is asked for.
    """
    if has_lists and knobs.planner == "identities":
        raise DataError(
            'negatives.planner = "identities" groups samples of one label each, and these have'
            ' lists: take "tree" or "greedy"'
        )
    by_label = "label" in knobs.unique or knobs.planner == "identities"
    by_list = has_lists and by_label
    labels = _column(samples, "label") if by_label and not has_lists else None
    if labels is not None and (labels < 0).all():
        raise DataError(
            "no sample has an integer label, and plans are to go by labels: set data.label_key to "
            'the ending of the label member, or leave "label" out of negatives.unique'
        )
    captions = _column(samples, "caption") if "caption" in knobs.unique else None
    if captions is not None and not captions.any():
        raise DataError(
            "no sample has a caption, and no two of a batch are to share one: set "
            'data.caption_key, or leave "caption" out of negatives.unique'
        )
    counts = np.concatenate([index.counts for index in samples.indexes])
    return SampleColumns(
        fingerprint=samples.fingerprint,
        num_samples=int(counts.sum()),
        labels=labels,
        lists=load_label_lists(samples.indexes) if knobs.explicit or by_list else None,
        captions=captions,
        shards=np.repeat(np.arange(len(counts)), counts) if knobs.locality else None,
        coordinates=load_coordinates(Path(knobs.coordinates), samples)
        if knobs.planner == "coordinates"
        else None,
        margins=load_margins(Path(knobs.margins), samples) if knobs.margins else None,
        weights=load_weights(Path(knobs.weights), samples) if knobs.weights else None,
        images_per_identity=images_per_identity,
    )


def load_coordinates(path: Path, samples: Indexed) -> Floats:  # (N, c)
    """Places of the samples from a Parquet table with `key` and numeric columns, as unit rows.

    Columns called latitude and longitude are degrees on the globe; any others are taken as they
    stand, scaled to their largest spread. A sample that the table does not name is NaN. Raises
    DataError for a table without these columns or without any of the samples.
    """
    keyed = _read_keyed(path, "negatives.coordinates", samples)
    columns = keyed.table.column_names
    numbers = [name for name in columns if _is_number(keyed.table.schema.field(name).type)]
    if not numbers:
        raise DataError(
            f"{path}: no numeric column beside key; its columns are {', '.join(columns)}"
        )
    values = np.stack([keyed.values(name) for name in numbers], axis=1)
    points = _on_globe(values, numbers) if _is_globe(numbers) else _lifted(values)
    return np.where(keyed.rows[:, None] >= 0, points[keyed.rows], np.nan).astype(np.float32)


def load_margins(path: Path, samples: Indexed) -> Floats:  # (N,)
    """The column margin of a Parquet table with key; NaN for a sample without one.

    Raises DataError for a table without these columns, without any of the samples, or with a
    margin that is infinite.
    """
    margins = _by_sample(path, "negatives.margins", "margin", samples)
    return margins.astype(np.float32)


def load_weights(path: Path, samples: Indexed) -> Floats:  # (N,)
    """The column weight of a Parquet table with key, scaled to a mean of 1; before, a sample that
    the table does not name has 1.

    Raises DataError for a table without these columns or without any of the samples, and for
    weights that are missing, infinite, below 0, or all 0.
    """
    weights = _by_sample(path, "negatives.weights", "weight", samples, missing=1.0)
    if not np.isfinite(weights).all() or weights.min() < 0 or not weights.any():
        raise DataError(
            f"negatives.weights = {str(path)!r}: weights from {weights.min():g} to "
            f"{weights.max():g}: every one must be a number, none below 0, and not all 0"
        )
    return (weights / weights.mean()).astype(np.float32)


class _Keyed(NamedTuple):
    """A table whose rows belong to samples."""

    table: pa.Table
    rows: Int64s
    """(N,) of each sample, the first of its key; -1: none."""

    def values(self, name: str) -> NDArray[np.float64]:
        """A column; NaN for null."""
        return self.table[name].to_numpy().astype(np.float64)


def _read_keyed(path: Path, knob: str, samples: Indexed) -> _Keyed:
    """Raises DataError where there is no table with keys of these samples."""
    try:
        table = pq.read_table(path)
        keys = table["key"].combine_chunks().cast(pa.string())
    except (OSError, KeyError, pa.ArrowInvalid) as error:
        raise DataError(
            f"{knob} = {str(path)!r}: no Parquet table with a column key: {error}"
        ) from None
    wanted = pa.concat_arrays([part for index in samples.indexes for part in index.iter_keys()])
    rows = pc.fill_null(pc.index_in(wanted, value_set=keys), -1).to_numpy()
    if (rows < 0).all():
        raise DataError(
            f"{path}: none of its keys ({keys[0].as_py() if len(keys) else 'it is empty'}, ...) is "
            f"a sample's ({wanted[0].as_py()}, ...): the column key must hold the samples' keys"
        )
    return _Keyed(table, rows)


def _by_sample(
    path: Path, knob: str, name: str, samples: Indexed, *, missing: float = np.nan
) -> NDArray[np.float64]:  # (N,)
    """One numeric column of a table; `missing` for samples that it does not name."""
    keyed = _read_keyed(path, knob, samples)
    columns = keyed.table.column_names
    if name not in columns or not _is_number(keyed.table.schema.field(name).type):
        raise DataError(
            f"{knob} = {str(path)!r}: no column {name} of numbers; its columns are "
            f"{', '.join(columns)}"
        )
    values = keyed.values(name)
    if np.isinf(values).any():
        raise DataError(f"{knob} = {str(path)!r}: a {name} is infinite")
    return np.where(keyed.rows >= 0, values[keyed.rows], missing)


def _column(samples: Indexed, name: str) -> Int64s:
    return np.concatenate([index.column(name) for index in samples.indexes])


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_floating(kind) or pa.types.is_integer(kind))


def _is_globe(names: list[str]) -> bool:
    lower = {name.lower() for name in names}
    return bool(lower & set(_LATITUDE)) and bool(lower & set(_LONGITUDE))


def _on_globe(values: NDArray[np.float64], names: list[str]) -> NDArray[np.float64]:
    lower = [name.lower() for name in names]
    at = [
        next(i for i, name in enumerate(lower) if name in both) for both in (_LATITUDE, _LONGITUDE)
    ]
    latitude, longitude = np.radians(values[:, at]).T
    return np.stack(
        [
            np.cos(latitude) * np.cos(longitude),
            np.cos(latitude) * np.sin(longitude),
            np.sin(latitude),
        ],
        axis=1,
    )


def _lifted(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Points of a space as unit rows: lifted above a plane they fill a small part of, where the
    nearest point is the one of the highest cosine."""
    low, high = np.nanmin(values, axis=0), np.nanmax(values, axis=0)
    flat = (values - (low + high) / 2) / max(float((high - low).max()), 1e-30)
    points = np.concatenate([flat, np.full((len(flat), 1), 2.0)], axis=1)
    return points / np.linalg.norm(points, axis=1, keepdims=True)
