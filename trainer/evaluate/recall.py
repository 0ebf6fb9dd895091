"""Leave-one-out recall: every labelled image looks for its own kind among all the others."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from data.errors import DataError
from trainer.collectives import gather_counts, gather_rows, sum_over_ranks
from trainer.evaluate.nearest import nearest


def leave_one_out(
    rows: Tensor,  # (n, d) unit rows, this rank's
    ids: Tensor,  # (n,) int64 in [0, 2^32), unique over the ranks
    labels: Tensor,  # (n,) int64, below 0: unknown, neither query nor gallery
    group: ProcessGroup | None,
    *,
    ks: Sequence[int] = (1, 5, 10),
) -> dict[str, float]:
    """`recall_R@k` and `recall_MAP@R` over all ranks' images; equal on every rank.

    A query is a hit at k when any of the k images of largest cosine, itself left out, has its
    label. MAP@R looks at the R nearest, R being the other images of its label: the mean over the
    R places of the precision there, counting 0 where the image is another's (Musgrave et al. 2020,
    arXiv 2003.08505, section 3.3). Of equal cosines the lower id comes first. Images whose label
    has no other image are in the gallery only. Memory: 8 bytes for each query and each of the
    largest label's images. Raises DataError when no two images share a label. Collective.
    """
    known = labels >= 0
    rows, ids, labels = rows[known], ids[known], labels[known]
    counts = gather_counts(len(ids), group, ids.device)
    gallery = gather_rows(torch.stack([ids, labels], dim=1), counts, group)  # (N, 2)
    kinds, sizes = gallery[:, 1].unique(return_counts=True)
    others = sizes[torch.searchsorted(kinds, labels)] - 1  # (n,) R of each image
    most = int(sizes.max()) - 1 if len(sizes) else 0
    if most < 1:
        raise DataError(
            f"recall needs two images with one label, and {len(gallery)} labelled images have "
            f"{len(kinds)} labels: is data.label_key the ending of the label member?"
        )
    found = nearest(rows, rows, ids, max(*ks, most) + 1, group)[1]
    hits = _label_of(_drop_self(found, ids), gallery) == labels[:, None]  # (n, k)
    is_query = others > 0
    hits, others = hits[is_query], others[is_query]
    totals = torch.stack([is_query.sum(), *(hits[:, :k].any(dim=1).sum() for k in ks)])
    num_queries, *recalls = sum_over_ranks(totals, group).tolist()
    precisions = _average_precision(hits, others)
    precisions = gather_rows(precisions, gather_counts(len(hits), group, ids.device), group)
    return {
        **{f"recall_R@{k}": hit / num_queries for k, hit in zip(ks, recalls, strict=True)},
        # Rounded once, so that the order in which ranks hold them does not show.
        "recall_MAP@R": math.fsum(precisions.tolist()) / num_queries,
        "num_recall_queries": num_queries,
        "num_recall_labels": len(kinds),
    }


def _drop_self(found: Tensor, ids: Tensor) -> Tensor:  # (n, k + 1), (n,) -> (n, k)
    """The neighbours without the query; where ties kept it out of the list, without the last."""
    is_self = found == ids[:, None]
    is_self[:, -1] |= ~is_self.any(dim=1)
    return found[~is_self].view(len(found), found.shape[1] - 1)


def _label_of(found: Tensor, gallery: Tensor) -> Tensor:  # ids (n, k) -> labels (n, k)
    ids, order = gallery[:, 0].sort()
    return gallery[order, 1][torch.searchsorted(ids, found)]


def _average_precision(hits: Tensor, others: Tensor) -> Tensor:  # (n,) float64
    """Average precision of each query over its own R places."""
    places = torch.arange(1, hits.shape[1] + 1, device=hits.device)
    hits = hits & (places <= others[:, None])
    precision = hits.cumsum(dim=1).double() / places
    return (precision * hits).sum(dim=1) / others
