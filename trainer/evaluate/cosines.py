"""How far positives stand from their hardest negatives: histograms of cosines for the report."""

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from trainer.collectives import sum_over_ranks
from trainer.evaluate.nearest import visit_parts

NUM_BINS = 100  # of width 0.02 over [-1, 1]
SAMPLED_ROWS = 256  # images of a rank: enough for a plot, little beside a step


@torch.no_grad()
def cosine_histograms(
    images: Tensor,  # (n, d) unit rows, this rank's
    texts: Tensor,  # (n, d) unit rows; row i is the positive of images[i]
    ids: Tensor,  # (n,) int64 sample id; an equal one is no negative
    group: ProcessGroup | None,
) -> dict[str, list[int]]:
    """Counts by cosine in [-1, 1] over all ranks' sampled images, equal on every rank.

    `positive` is an image with its own text, `hardest_negative` with the nearest text of another
    sample in the global batch (an image without one is not in it). Collective.
    """
    images = images[:SAMPLED_ROWS].float()
    hardest = images.new_full((len(images),), -torch.inf)
    for visitors, visitor_ids in visit_parts((texts.float(), ids), group):
        cosines = images @ visitors.T
        same = ids[: len(images), None] == visitor_ids
        hardest = torch.maximum(hardest, cosines.masked_fill(same, -torch.inf).amax(dim=1))
    positive = (images * texts[: len(images)].float()).sum(dim=1)
    counts = torch.stack([count_cosines(positive), count_cosines(hardest)])
    both = sum_over_ranks(counts, group).tolist()
    return {"positive": both[0], "hardest_negative": both[1]}


def count_cosines(cosines: Tensor) -> Tensor:  # (NUM_BINS,) int64
    """Histogram over [-1, 1].

    Rounding may put a cosine just outside [-1, 1]; what is not finite is not counted.
    """
    bins = (cosines[cosines.isfinite()].clamp(-1, 1) + 1) * (NUM_BINS / 2)
    return bins.long().clamp(max=NUM_BINS - 1).bincount(minlength=NUM_BINS)
