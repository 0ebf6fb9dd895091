"""AdaFace: the margin follows the embedding's norm, as a measure of the image's quality."""

import math
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from trainer.centers.margins.angles import bend_angles
from trainer.centers.margins.margin import Bent, Running, Targets

_EPSILON = 1e-3  # published: keeps cosines, angles and the deviation away from their ends
_MIN_NORM, _MAX_NORM = 1e-3, 100.0  # published
_STARTS = {"norm_mean": 20.0, "norm_std": 100.0}  # published


@dataclass(frozen=True)
class AdaFace:
    """cos(theta - m z) - (m + m z) with z the norm's standard score times h, within [-1, 1].

    Kim et al. 2022, arXiv 2204.00964, section 3; m 0.4, h 0.333, share t_alpha 0.01. Mean and
    deviation run over global batches, the present one included, where the authors' are each rank's
    own; a batch of one row has no deviation and leaves it as it was. Norms get no gradient.

    "monotonic" is as published: cosines are kept within 1 - 1e-3 of 0 and the angle within [1e-3,
    pi - 1e-3], and the target has no slope beyond; "none" is the formula without bounds. Negatives,
    which the authors' code bounds too, stay as they are.
    """

    margin: float
    h: float
    share: float
    """t_alpha: of the batch in the running mean and deviation."""
    beyond_pi: Literal["monotonic", "none"] = "monotonic"
    running: Running = field(default_factory=lambda: Running(_STARTS))

    def follow(self, targets: Targets, finite: Tensor) -> None:
        norms = targets.norms.clamp(_MIN_NORM, _MAX_NORM)
        if len(norms):
            self.running.move("norm_mean", norms.mean(), self.share, finite)
        if len(norms) > 1:
            self.running.move("norm_std", norms.std(), self.share, finite)

    def bend(self, targets: Targets) -> Bent:
        norms = targets.norms.clamp(_MIN_NORM, _MAX_NORM)
        score = norms - self.running.get("norm_mean", norms)
        score = score / (self.running.get("norm_std", norms) + _EPSILON) * self.h
        shift = self.margin * score.clamp(-1.0, 1.0)
        cosines, slopes = self._turn(targets.cosines, -shift)
        return Bent(cosines - (self.margin + shift), slopes)

    def _turn(self, cosines: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
        if self.beyond_pi == "none":
            bent = bend_angles(cosines, 1.0, shift, "none")
            return bent.cosines, bent.slopes
        kept = cosines.clamp(_EPSILON - 1, 1 - _EPSILON)
        angles = kept.acos()
        turned = angles + shift
        bounded = turned.clamp(_EPSILON, math.pi - _EPSILON)
        slopes = turned.sin() / angles.sin()
        return bounded.cos(), slopes.masked_fill((kept != cosines) | (bounded != turned), 0.0)
