"""What the image-text losses share: scaled images against the texts of all ranks."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from trainer.losses.checks import check_per_row, check_rows, check_scalar
from trainer.similarity.exclusion import Exclusion
from trainer.similarity.pairs import Pairs, Tile


@dataclass(frozen=True)
class Matched:
    """Pairs of this rank's images with the texts of all ranks; their values are the logits."""

    images: Tensor
    """(n, d) in the dtype of computation, float32 or better."""
    texts: Tensor
    """(n, d) this rank's, rounded to the dtype that travels."""
    scale: float
    pairs: Pairs
    exclusion: Exclusion

    @property
    def share(self) -> float:
        """W/N: what turns a sum over this rank's rows into its term of the mean over ranks."""
        return self.pairs.world_size / max(self.pairs.num_columns, 1)

    def own_logits(self) -> Tensor:  # (n,)
        """Logits of the matching pairs."""
        return (self.images * self.texts).sum(1).mul_(self.scale)

    def gradients(
        self,
        weights_of: Callable[[Tile], Tensor],  # (m, k) d(sum of losses)/dlogit of all pairs
        own_weight: float,  # what matching pairs have on top of that
        needed: tuple[bool, ...],  # of images, texts, scale
        *,
        mean: float,  # what turns the sum of losses into the mean
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of images, texts and scale, None where not needed.

        The scale's is the inner product of the images with their own gradients, each of logit over
        scale; so no tile is summed for it.
        """
        for_images, for_texts, for_scale = needed[:3]
        rows, visitors = self.pairs.gradients(
            weights_of, rows=for_images or for_scale, visitors=for_texts
        )
        rows.add_(self.texts, alpha=own_weight)
        visitors.add_(self.images, alpha=own_weight)
        slope = (rows * self.images).sum() * mean
        return (
            rows.mul_(mean * self.scale) if for_images else None,
            visitors.mul_(mean * self.scale) if for_texts else None,
            slope if for_scale else None,
        )


def match(
    images: Tensor,  # (n, d)
    texts: Tensor,  # (n, d)
    scale: Tensor,  # () or (1,)
    group: ProcessGroup | None,
    *,
    identities: dict[str, Tensor | None],  # each (n,) int; equal ones are no negatives
    visiting: str,
    wire: torch.dtype | None,
    tile: int | None,
    swept_once: bool = False,
) -> Matched:
    """Check the inputs, bring them to the dtype of computation and gather what is needed."""
    check_rows(images=images, texts=texts)
    check_scalar("scale", scale)
    for name, values in identities.items():
        check_per_row(name, values, images)
    dtype = torch.promote_types(torch.promote_types(images.dtype, texts.dtype), torch.float32)
    rows, visitors, factor = images.to(dtype), texts.to(wire or texts.dtype), float(scale)
    pairs = Pairs(
        rows,
        visitors,
        group,
        factor=factor,
        visiting=visiting,
        tile=tile,
        swept_once=swept_once,
    )
    exclusion = Exclusion(pairs, list(identities.values()))
    return Matched(rows, visitors.to(dtype), factor, pairs, exclusion)
