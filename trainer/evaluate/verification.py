"""1:1 verification of a table of pairs: are two images of the same identity?"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.distributed import ProcessGroup

from data.errors import DataError
from trainer.evaluate.fetch import pair_cosines
from trainer.evaluate.roc import Roc, fold_accuracy, folds_in_order, tar_numbers

NUM_FOLDS = 10


@dataclass(frozen=True)
class Pairs:
    """Pairs of samples in the order of their file, equal on every rank."""

    samples: NDArray[np.int64]  # (P, 2) sample ids
    same: NDArray[np.bool_]  # (P,)
    origin: str
    """The file, for errors."""

    def check(self) -> None:
        """DataError where there are too few for ten folds, or only one kind."""
        num_same = int(self.same.sum())
        if len(self.same) < NUM_FOLDS or num_same in (0, len(self.same)):
            raise DataError(
                f"{self.origin}: has {num_same} pairs of one identity and "
                f"{len(self.same) - num_same} of two; verification needs both kinds, and "
                f"{NUM_FOLDS} pairs at least"
            )


def verification(
    rows: Tensor,  # (n, d) unit rows, this rank's
    ids: Tensor,  # (n,) int64 unique over the ranks
    pairs: Pairs,
    group: ProcessGroup | None,
    *,
    fars: Sequence[float] = (1e-3, 1e-2, 1e-1),
) -> tuple[dict[str, float], Roc]:
    """Accuracy, AUC, EER and TAR at FAR of the pairs' cosines; equal on every rank.

    `verification_accuracy` chooses among all thresholds, `..._grid` among the published ones
    (`fold_accuracy`). Folds are ten runs of the file's order, or of each kind's where the file is
    sorted by kind (`folds_in_order`, `verification_folds_by_kind` = 1). Pairs with an image that
    could not be read are left out and counted. Raises DataError when too few are left. Collective.
    """
    cosines, present = pair_cosines(rows, ids, pairs.samples, group)
    left = Pairs(pairs.samples[present], pairs.same[present], pairs.origin)
    left.check()
    cosines = cosines[present]
    roc = Roc.of(cosines, left.same)
    folds, by_kind = folds_in_order(left.same, NUM_FOLDS)
    exact, exact_std = fold_accuracy(cosines, left.same, folds, grid=False)
    grid, grid_std = fold_accuracy(cosines, left.same, folds, grid=True)
    numbers = {
        "verification_accuracy": exact,
        "verification_accuracy_std": exact_std,
        "verification_accuracy_grid": grid,
        "verification_accuracy_grid_std": grid_std,
        "verification_folds_by_kind": int(by_kind),
        "verification_AUC": roc.auc(),
        "verification_EER": roc.eer(),
        **tar_numbers("verification", roc, fars),
        "num_verification_genuine": len(roc.genuine),
        "num_verification_impostors": len(roc.impostors),
        "num_verification_left_out": int((~present).sum()),
    }
    return numbers, roc
