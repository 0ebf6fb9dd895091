"""SFace: cosines with weights that fade where a pair is good enough; no normaliser."""

from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.centers.margins.margin import Bent, Targets


@dataclass(frozen=True)
class SFace:
    """-scale r_y cos theta_y + sum_j scale r_j cos theta_j, the weights r without gradient.

    Zhong et al. 2021, arXiv 2205.12010, section III: r_y = sigmoid(k (theta_y - a)), r_j =
    sigmoid(k (b - theta_j)); k 80, a 0.8, b 1.23 (authors' recipes: CASIA 0.87 and 1.2, VGGFace2
    0.88 and 1.25, MS1MV2 0.9 and 1.2). A sum over classes: sampled negatives times what they stand
    for are an unbiased estimate of it.
    """

    k: float
    a: float
    b: float

    def bend(self, targets: Targets) -> Bent:
        weights = torch.sigmoid(self.k * (targets.cosines.acos() - self.a))
        return Bent(weights * targets.cosines, weights, negatives=self._push)

    def _push(self, cosines: Tensor, columns: slice) -> Tensor:  # noqa: ARG002
        weights = cosines.clamp_(-1.0, 1.0).acos()
        weights.sub_(self.b).mul_(-self.k).sigmoid_()
        cosines.mul_(weights)
        return weights
