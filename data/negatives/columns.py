"""What a plan may know of the samples beside their embeddings, one value a sample."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data.errors import DataError

Int64s = NDArray[np.int64]
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class SampleColumns:
    """Columns by sample id, (N,) each; those that a plan does not ask for may be missing."""

    fingerprint: str = ""
    """Of the data set."""
    num_samples: int = 0
    """N; 0: the snapshot's."""
    labels: Int64s | None = None
    """Class labels; -1: none, and such samples are like no other."""
    captions: Int64s | None = None
    """Hashes of captions; 0: none."""
    shards: Int64s | None = None
    """Shard of each sample, over all sources."""
    coordinates: Floats | None = None
    """(N, c) a point in space, NaN where unknown; near ones are hard."""
    margins: Floats | None = None
    """Positive less hardest negative, of a teacher."""
    images_per_identity: int = 4
    """K of the planner "identities"."""

    def need(self, name: str, what_for: str) -> NDArray[np.int64]:
        """A column of integers; DataError where it is missing."""
        column: Int64s | None = getattr(self, name)
        if column is None:
            raise DataError(f"{what_for} needs the samples' {name}, and they are not known")
        return column


NO_COLUMNS = SampleColumns()
