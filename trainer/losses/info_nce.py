"""InfoNCE of queries against their drawn positives, known other positives masked."""

from torch import Tensor
from torch.distributed import ProcessGroup

from trainer.losses.decoupled import decoupled_loss
from trainer.losses.listed import Positives


def info_nce_loss(
    queries: Tensor,  # (n, d) unit rows, this rank's; n may differ from rank to rank
    labels: Tensor,  # (m, d) unit rows, this rank's; m may differ from rank to rank
    scale: Tensor,  # () or (1,) multiplier of the cosines, 1 / temperature
    positives: Positives,
    label_ids: Tensor,  # (m,) int global ids of the label rows
    group: ProcessGroup | None = None,
    *,
    drawn: Tensor | None = None,  # (n,) int the positive of each query, -1: none
    row_weights: Tensor | None = None,  # (n,) of the queries' losses; None: all 1
    labels_are_parts: bool = False,
    tile: int | None = None,
) -> Tensor:  # () this rank's mean over its n queries
    """-log p of the drawn positive, p a softmax over it and all labels that are not the query's.

    van den Oord et al. 2018, arXiv 1807.03748, equation 4, with a query's other positives masked.
    Its mean over all positives, each against the negatives alone, is the decoupled softmax: with
    one drawn the two are one loss, and without `drawn` this is `decoupled_loss`, whose ranks,
    gradients and costs it shares.
    """
    return decoupled_loss(
        queries,
        labels,
        scale,
        positives,
        label_ids,
        group,
        drawn=drawn,
        row_weights=row_weights,
        labels_are_parts=labels_are_parts,
        tile=tile,
    )
