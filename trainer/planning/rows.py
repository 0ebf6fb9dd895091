"""Embeddings on their way to the store: which side, how many columns, and home to the first rank.

The store lies with rank 0, which plans. After each step every rank's rows go there in float16, 64
columns as a rule: 128 bytes a sample beside the kilobytes that the loss exchanges. So the ranks
need no file in common for it, and no two of them ever write one.
"""

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from data.negatives.store import projection
from trainer.collectives import gather_rows
from trainer.config import Config, ConfigError
from trainer.objectives import Outputs
from trainer.ranks import Ranks

_ID_BYTES = 8


class Side:
    """The rows of a model's outputs that samples are planned by."""

    def __init__(self, config: Config) -> None:
        """Raises ConfigError for a side that such a model does not have."""
        if config.has_centers:
            sides = {"auto": 0, "images": 0}
        elif config.has_labels:
            sides = {"auto": 0, "texts": 0}
        else:
            sides = {"auto": 1, "images": 0, "texts": 1}
        asked = config.negatives.side
        if asked not in sides:
            raise ConfigError(
                f"negatives.side = {asked!r}: a run with loss.name = {config.loss.name!r} has "
                f"{', '.join(name for name in sides if name != 'auto')}"
            )
        self.output = sides[asked]
        self.is_images = config.has_centers or asked == "images"

    def rows(self, outputs: Outputs) -> Tensor:  # (n, d)
        """This rank's rows, a row for each sample of its batch."""
        return outputs[self.output]


class Projection:
    """`data.negatives.store.project` where the rows are."""

    def __init__(self, embed_dim: int, dim: int, *, seed: int, device: torch.device) -> None:
        self.dim = min(embed_dim, dim)
        self._matrix: Tensor | None = None
        if self.dim < embed_dim:
            self._matrix = torch.from_numpy(projection(embed_dim, dim, seed)).to(device)

    def __call__(self, rows: Tensor) -> Tensor:  # (n, d) -> (n, dim) float16 unit rows
        rows = F.normalize(rows.detach().float(), dim=1)
        if self._matrix is not None:
            rows = F.normalize(rows @ self._matrix, dim=1)
        return rows.half()


def gather_by_id(
    rows: Tensor,  # (n, dim) float16, this rank's
    ids: Tensor,  # (n,) int64 sample ids
    counts: list[int],  # n of every rank
    ranks: Ranks,
) -> tuple[NDArray[np.int64], NDArray[np.float32]] | None:  # (m,) rising ids, (m, dim)
    """Every rank's rows on rank 0, None elsewhere; of a sample that came twice one is kept.

    Which one does not depend on the number of ranks where batches are dealt out in turn.
    """
    packed = torch.cat([ids.to(rows.device)[:, None].view(torch.uint8), rows.view(torch.uint8)], 1)
    bytes_of = gather_rows(packed, counts, ranks.group)
    if not ranks.is_first:
        return None
    place = torch.cat([torch.arange(count) * len(counts) + r for r, count in enumerate(counts)])
    found = bytes_of.cpu()[place.argsort()].numpy()
    all_ids = np.ascontiguousarray(found[:, :_ID_BYTES]).view(np.int64).reshape(-1)
    unique, first = np.unique(all_ids, return_index=True)
    return unique, np.ascontiguousarray(found[first, _ID_BYTES:]).view(np.float16).astype(
        np.float32
    )
