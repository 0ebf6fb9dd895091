"""Zero-shot classification: how often an image's class is among the nearest class embeddings."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from data.errors import DataError
from trainer.collectives import gather_counts, gather_rows, sum_over_ranks
from trainer.evaluate.nearest import nearest

TOP_K = (1, 5, 10)


def zero_shot(
    images: Tensor,  # (n, d) unit rows, this rank's
    labels: Tensor,  # (n,) int64; one that no class has (-1: unknown) is not counted
    classes: Tensor,  # (c, d) unit rows: this rank's part of the classes, perhaps none
    class_labels: Tensor,  # (c,) int64 in [0, 2^32), unique over the ranks
    group: ProcessGroup | None,
) -> dict[str, float]:
    """`zero_shot_top1` (and top 5, top 10) over all ranks' images; equal on every rank.

    With every name of a vocabulary as a class, top k is image-to-name R@k.
    `zero_shot_mean_per_class` is the mean of top 1 over the classes that have images. Of equal
    cosines the lower label comes first. Raises DataError when no image has a label of a class.
    """
    counts = gather_counts(len(class_labels), group, class_labels.device)
    known = gather_rows(class_labels, counts, group).sort().values
    found = nearest(images, classes, class_labels, max(TOP_K), group)[1]
    hits = found == labels[:, None]  # (n, k)
    counted = torch.isin(labels, known)
    places = torch.searchsorted(known, labels[counted])
    tally = torch.stack(
        [
            places.bincount(minlength=len(known)),
            *(places[hits[counted, :k].any(dim=1)].bincount(minlength=len(known)) for k in TOP_K),
        ]
    )  # (1 + len(TOP_K), classes)
    in_class, *right_in_class = sum_over_ranks(tally, group).double()
    num_labelled = int(in_class.sum())
    if num_labelled == 0:
        raise DataError(f"none of the images has a label among the {len(known)} classes")
    seen = in_class > 0
    return {
        **{
            f"zero_shot_top{k}": int(right.sum()) / num_labelled
            for k, right in zip(TOP_K, right_in_class, strict=True)
        },
        "zero_shot_mean_per_class": float((right_in_class[0] / in_class)[seen].mean()),
        "num_labelled": num_labelled,
        "num_classes": len(known),
    }


def class_embedding(
    prompts: Tensor,  # (p, d) unit rows, one for each of the class's prompts
) -> Tensor:  # (d,) unit row
    """The mean direction of a class's prompts: CLIP, arXiv 2103.00020, section 3.1.4."""
    return F.normalize(prompts.double().mean(dim=0), dim=0).float()
