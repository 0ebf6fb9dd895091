"""What planned batches need of a checkpoint: the embedding store, and the plans of the epoch.

negatives/layout.json                rows, columns, data fingerprint, the parts' ranges
negatives/part-00000.safetensors     rows, in float16 as they are, and the step each was written at
plans/plan-000003.json               header of a plan
plans/plan-000003.safetensors        its arrays

Plans lie in RUN/plans, whence they are read. The copies are for a checkpoint that comes to another
place alone: out of a remote store, or in somebody's hands.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from data.errors import DataError
from data.negatives.plan import BatchPlan, PlanHeader
from data.negatives.store import EmbeddingStore
from trainer.config import ConfigError
from trainer.durable import RowStream, TensorFile

FOLDER, PLANS = "negatives", "plans"
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


def plan_files(plans: Mapping[str, BatchPlan], *, later: bool) -> dict[str, Any]:
    """Name -> content for `CheckpointFolder.save` of plans by their names below RUN/plans."""
    files: dict[str, Any] = {}
    for name, plan in plans.items():
        arrays = {key: _rows(array, later=later) for key, array in plan.arrays().items()}
        files[f"{PLANS}/{name}.json"] = asdict(plan.header)
        files[f"{PLANS}/{name}.safetensors"] = arrays
    return files


def _rows(array: NDArray[Any], *, later: bool) -> torch.Tensor | RowStream:
    if later:
        return torch.from_numpy(np.array(array))
    starts = range(0, len(array), _PIECE_ROWS)
    pieces = (torch.from_numpy(np.array(array[start : start + _PIECE_ROWS])) for start in starts)
    dtype = torch.from_numpy(np.array(array[:0])).dtype
    return RowStream(tuple(array.shape), dtype, pieces)


def restore_plans(checkpoint: Path, folder: Path) -> None:
    """Bring plans of a checkpoint to RUN/plans where that has not the same ones.

    Raises DataError for a plan that is not what its header says.
    """
    for path in sorted((checkpoint / PLANS).glob("*.json")):
        header = PlanHeader(**json.loads(path.read_text()))
        if _is_there(folder / path.stem, header.sha256):
            continue
        arrays = TensorFile.open(path.with_suffix(".safetensors")).whole()
        plan = BatchPlan.of(header, {key: tensor.numpy() for key, tensor in arrays.items()})
        saved = plan.save(folder / path.stem)
        if saved.header.sha256 != header.sha256:
            raise DataError(f"{path}: the plan beside it is another one: take another checkpoint")


def _is_there(plan: Path, sha256: str) -> bool:
    try:
        BatchPlan.load(plan, sha256=sha256)
    except DataError:
        return False
    return True
