"""A training set: indexes, an order for each, and the mix, as one function `step -> samples`."""

from collections.abc import Sequence

from data.index import Index


class SampleSet:
    """Several indexed sources as one set; a sample's id is its source's offset + its id there."""

    num_samples: int
    epoch_samples: int
    """Samples of an epoch: all samples of all sources, whatever the weights."""
    fingerprint: str
    """Identity of the data: the sources' fingerprints and weights."""

    def __init__(
        self,
        indexes: Sequence[Index],
        *,
        weights: Sequence[float] = (1.0,),
        seed: int,
        chunk: int = 128,
        lanes: int = 64,
        window: int = 32,
    ) -> None:
        raise NotImplementedError
