"""Predictions as one Parquet file: key, labels and scores of each query, best first.

Each rank writes the queries it has beside the file; then the first rank joins the pieces, in rank
order, which is the order of the samples, and puts the file in its place whole.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch.distributed as dist
from torch import Tensor

from trainer.config import ConfigError
from trainer.evaluate.xmc_metrics import NO_LABEL
from trainer.ranks import Ranks

SCHEMA = pa.schema(
    {"key": pa.string(), "labels": pa.list_(pa.int64()), "scores": pa.list_(pa.float32())}
)
ROW_GROUP = 1 << 14  # queries


def check_place(path: str) -> None:
    """ConfigError where `eval.predictions` cannot be written."""
    folder = Path(path).absolute().parent
    if not folder.is_dir():
        raise ConfigError(f"eval.predictions = {path!r}: there is no folder {folder}")
    if Path(path).is_dir():
        raise ConfigError(f"eval.predictions = {path!r} is a folder: name a file in it")


def write_predictions(
    path: Path,
    keys: Sequence[str],  # (n,) of this rank's queries
    labels: Tensor,  # (n, k) int64, NO_LABEL behind the last
    scores: Tensor,  # (n, k) float32
    ranks: Ranks,
) -> None:
    """All ranks' predictions in rank order. Collective; the ranks share the file's folder."""
    _write_piece(_piece(path, ranks.rank), keys, labels, scores)
    if ranks.group is not None:
        dist.barrier(group=ranks.group)
    if ranks.is_first:
        _join([_piece(path, rank) for rank in range(ranks.world_size)], path)
    if ranks.group is not None:
        dist.barrier(group=ranks.group)  # the file is there when any rank goes on


def _piece(path: Path, rank: int) -> Path:
    return path.with_name(f".{path.name}.rank-{rank:05d}")


def _write_piece(path: Path, keys: Sequence[str], labels: Tensor, scores: Tensor) -> None:
    with pq.ParquetWriter(path, SCHEMA, compression="zstd") as writer:
        for start in range(0, len(keys), ROW_GROUP):
            rows = slice(start, start + ROW_GROUP)
            found, of_found = labels[rows].cpu().numpy(), scores[rows].cpu().numpy()
            there = found != NO_LABEL
            offsets = np.concatenate([[0], there.sum(axis=1).cumsum()]).astype(np.int32)
            columns = [
                pa.array(keys[rows], pa.string()),
                pa.ListArray.from_arrays(offsets, pa.array(found[there], pa.int64())),
                pa.ListArray.from_arrays(offsets, pa.array(of_found[there], pa.float32())),
            ]
            writer.write_table(pa.table(columns, schema=SCHEMA))


def _join(pieces: Sequence[Path], path: Path) -> None:
    draft = path.with_name(f".{path.name}.draft")
    with draft.open("wb") as file:
        with pq.ParquetWriter(file, SCHEMA, compression="zstd") as writer:
            for piece in pieces:
                with pq.ParquetFile(piece) as parquet:
                    for batch in parquet.iter_batches(ROW_GROUP):
                        writer.write_batch(batch)
        file.flush()
        os.fsync(file.fileno())
    os.replace(draft, path)
    for piece in pieces:
        piece.unlink()
