"""The embedding store in a checkpoint: by global row range, in float16 as it is.

negatives/layout.json                rows, columns, data fingerprint, the parts' ranges
negatives/part-00000.safetensors     rows and the step at which each was written
"""

import json
from pathlib import Path
from typing import Any

import torch

from data.negatives.store import EmbeddingStore
from trainer.config import ConfigError
from trainer.durable import RowStream, TensorFile

FOLDER = "negatives"
FORMAT = 1
_PART_ROWS = 1 << 22
_PIECE_ROWS = 1 << 18  # copied at a time


def store_files(store: EmbeddingStore, *, later: bool) -> dict[str, Any]:
    """Name -> content for `CheckpointFolder.save`; `later`: a copy, as training goes on before it
    is written.
    """
    starts = range(0, store.num_rows, _PART_ROWS)
    parts = [[start, min(start + _PART_ROWS, store.num_rows)] for start in starts]
    files: dict[str, Any] = {
        f"{FOLDER}/layout.json": {
            "format": FORMAT,
            "num_rows": store.num_rows,
            "dim": store.dim,
            "fingerprint": store.fingerprint,
            "parts": parts,
        }
    }
    for number, (start, stop) in enumerate(parts):
        rows, steps = _stream(store, start, stop, 0), _stream(store, start, stop, 1)
        files[_part_name(number)] = {"rows": rows, "steps": steps}
        if later:
            whole = map(torch.from_numpy, store.part(start, stop))
            files[_part_name(number)] = dict(zip(("rows", "steps"), whole, strict=True))
    return files


def _stream(store: EmbeddingStore, start: int, stop: int, which: int) -> RowStream:
    pieces = (
        torch.from_numpy(store.part(first, min(first + _PIECE_ROWS, stop))[which])
        for first in range(start, stop, _PIECE_ROWS)
    )
    if which == 0:
        return RowStream((stop - start, store.dim), torch.float16, pieces)
    return RowStream((stop - start,), torch.int32, pieces)


def restore_store(store: EmbeddingStore, checkpoint: Path) -> None:
    """Bring a new store to the rows that `store_files` stored.

    Raises ConfigError where there are none, or those of other data or of another width.
    """
    path = checkpoint / FOLDER / "layout.json"
    if not path.is_file():
        raise ConfigError(
            f"{checkpoint}: holds no embedding store (no {FOLDER}/layout.json): the run was not "
            "planned; keep data.batching as it was, or name another --run"
        )
    layout = json.loads(path.read_text())
    if layout["format"] != FORMAT:
        raise ConfigError(f"{path}: format {layout['format']}, this version reads {FORMAT}")
    for name, here in (
        ("num_rows", store.num_rows),
        ("dim", store.dim),
        ("fingerprint", store.fingerprint),
    ):
        if layout[name] != here:
            raise ConfigError(
                f"{path}: its embeddings are of another run ({name} = {layout[name]}, this run "
                f"has {here}): give the same shards and [negatives], or another --run"
            )
    for number, (start, stop) in enumerate(layout["parts"]):
        file = TensorFile.open(checkpoint / _part_name(number))
        rows, steps = (file.rows(name, 0, stop - start) for name in ("rows", "steps"))
        store.restore(start, rows.numpy(), steps.numpy())


def _part_name(number: int) -> str:
    return f"{FOLDER}/part-{number:05d}.safetensors"
