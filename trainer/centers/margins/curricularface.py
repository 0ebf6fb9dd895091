"""CurricularFace: hard negatives count more and more as training goes on."""

from dataclasses import dataclass, field

from torch import Tensor

from trainer.centers.margins.angles import BeyondPi, bend_angles
from trainer.centers.margins.margin import Bent, Running, Targets


@dataclass(frozen=True)
class CurricularFace:
    """ArcFace's target; a negative whose cosine c exceeds cos(theta_y + m) becomes c * (t + c).

    Huang et al. 2020, arXiv 2004.00288, section 3; m 0.5, and t, which starts at 0, takes a share
    of 0.01 of each global batch's mean target cosine, the present one's included. t and the choice
    of hard negatives have no gradient; a detached gradient is about the target alone.
    """

    margin: float
    share: float
    """Of the batch in the running mean t."""
    beyond_pi: BeyondPi = "monotonic"
    running: Running = field(default_factory=lambda: Running({"t": 0.0}))

    def follow(self, targets: Targets, finite: Tensor) -> None:
        if len(targets.cosines):
            self.running.move("t", targets.cosines.mean(), self.share, finite)

    def bend(self, targets: Targets) -> Bent:
        bent = bend_angles(targets.cosines, 1.0, self.margin, self.beyond_pi)
        limits = bend_angles(targets.cosines, 1.0, self.margin, "none").cosines
        t = self.running.get("t", targets.cosines)
        return Bent(bent.cosines, bent.slopes, negatives=_HardNegatives(t, limits))


@dataclass(frozen=True)
class _HardNegatives:
    t: Tensor  # ()
    limits: Tensor  # (N,) cosines above which a negative is hard

    def __call__(self, cosines: Tensor, columns: slice) -> Tensor:
        hard = (cosines > self.limits[columns].to(cosines.dtype)).to(cosines.dtype)
        excess = (cosines + (self.t - 1)).mul_(hard)  # of the factor over 1; 0 for easy ones
        slopes = hard.mul_(cosines).add_(excess).add_(1)
        cosines.addcmul_(cosines, excess)
        return slopes
