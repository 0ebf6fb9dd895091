"""Image-text retrieval: recall at k both ways, with any number of captions an image."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.distributed import ProcessGroup

from trainer.collectives import gather_counts, gather_rows, own_rank, sum_over_ranks
from trainer.evaluate.nearest import nearest

Numbers = NDArray[np.int64]


def retrieval(
    images: Tensor,  # (n, d) unit rows, this rank's
    texts: Tensor,  # (m, d) unit rows, this rank's; an image's captions stand in their order
    image_ids: Tensor,  # (n,) int64 unique over all ranks
    owners: Tensor,  # (m,) int64 id of the image a text describes, on any rank
    group: ProcessGroup | None,
    *,
    caption_ids: Tensor | None = None,  # (m,) int64; equal: the same caption
    ks: Sequence[int] = (1, 5, 10),
) -> dict[str, float]:
    """`image_to_text_R@k` and `text_to_image_R@k` over all ranks' rows; equal on every rank.

    A query is a hit at k when any row that belongs to it is among the k of largest cosine. A
    caption that several images share is one text that belongs to each of them, in the gallery and
    as a query: nothing could tell which of them was meant. Of equal cosines the lower id comes
    first (texts count by their first image's id), so constant embeddings score at chance. Images
    without a text, and texts without an image, are in the gallery only. Raises ValueError when an
    image id comes twice.
    """
    pairs = _match_over_ranks(image_ids, owners, caption_ids, group)
    device = images.device
    image_numbers, text_rows, text_numbers = (
        torch.from_numpy(numbers).to(device)
        for numbers in (pairs.image_numbers, pairs.text_rows, pairs.text_numbers)
    )
    queries = texts[text_rows]
    found_texts = nearest(images, queries, text_numbers, max(ks), group)[1].cpu().numpy()
    found_images = nearest(queries, images, image_numbers, max(ks), group)[1].cpu().numpy()
    hits = pairs.belong(pairs.image_numbers[:, None], found_texts)
    results = _recalls("image_to_text", hits, pairs.image_has_text(), ks, group, device)
    hits = pairs.belong(found_images, pairs.text_numbers[:, None])
    results |= _recalls("text_to_image", hits, pairs.text_has_image(), ks, group, device)
    return results | {"num_images": pairs.num_images, "num_texts": pairs.num_texts}


@dataclass(frozen=True)
class _Pairs:
    """Images and distinct texts, numbered alike on every rank, and which belong together."""

    num_images: int
    num_texts: int
    codes: Numbers  # image number * num_texts + text number of every pair
    image_numbers: Numbers  # (n,) of this rank's images
    text_rows: Numbers  # rows of this rank's texts that stand for their caption
    text_numbers: Numbers  # of those rows

    def belong(self, images: Numbers, texts: Numbers) -> NDArray[np.bool_]:
        """Whether images and texts, given by number and broadcast together, are pairs."""
        return np.isin(images * self.num_texts + texts, self.codes)

    def image_has_text(self) -> NDArray[np.bool_]:
        return np.isin(self.image_numbers, self.codes // max(1, self.num_texts))

    def text_has_image(self) -> NDArray[np.bool_]:
        return np.isin(self.text_numbers, self.codes % max(1, self.num_texts))


def _match_over_ranks(
    image_ids: Tensor, owners: Tensor, caption_ids: Tensor | None, group: ProcessGroup | None
) -> _Pairs:
    known = np.sort(_gather(image_ids, group))
    twice = known[1:][known[1:] == known[:-1]]
    if len(twice):
        raise ValueError(f"image id {twice[0]} comes twice: every sample must be evaluated once")
    all_owners = _gather(owners, group)
    captions = np.arange(len(all_owners))
    if caption_ids is not None:
        captions = _gather(caption_ids, group)
    numbers, first_rows = _number_texts(captions, all_owners)
    places = np.searchsorted(known, all_owners)
    present = np.isin(all_owners, known)
    start = sum(gather_counts(len(owners), group, owners.device)[: own_rank(group)])
    mine = (first_rows >= start) & (first_rows < start + len(owners))
    return _Pairs(
        num_images=len(known),
        num_texts=len(first_rows),
        codes=np.unique((places * len(first_rows) + numbers)[present]),
        image_numbers=np.searchsorted(known, image_ids.cpu().numpy()),
        text_rows=first_rows[mine] - start,
        text_numbers=mine.nonzero()[0],
    )


def _gather(numbers: Tensor, group: ProcessGroup | None) -> Numbers:
    counts = gather_counts(len(numbers), group, numbers.device)
    return gather_rows(numbers, counts, group).cpu().numpy()


def _number_texts(captions: Numbers, owners: Numbers) -> tuple[Numbers, Numbers]:
    """Number of every row's caption, by its first owner, and the row that stands for each number.

    An image's captions lie on one rank in their order, so the numbers do not depend on the deal.
    """
    order = np.argsort(owners, kind="stable")
    _, first, inverse = np.unique(captions[order], return_index=True, return_inverse=True)
    numbers = np.empty_like(order)
    numbers[order] = np.argsort(np.argsort(first))[inverse]
    return numbers, order[np.sort(first)]


def _recalls(
    name: str,
    hits: NDArray[np.bool_],  # (n, k) whether the query's i-th neighbour belongs to it
    counted: NDArray[np.bool_],  # (n,) queries that have anything to find
    ks: Sequence[int],
    group: ProcessGroup | None,
    device: torch.device,
) -> dict[str, float]:
    counts = [int(counted.sum()), *(int(hits[counted, :k].any(axis=1).sum()) for k in ks)]
    total, *found = sum_over_ranks(torch.tensor(counts, device=device), group).tolist()
    return {f"{name}_R@{k}": count / max(1, total) for k, count in zip(ks, found, strict=True)}
