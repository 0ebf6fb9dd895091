"""MagFace: the norm is trained too, long for images that are easy to recognise."""

from dataclasses import dataclass

from trainer.centers.margins.angles import BeyondPi, bend_angles
from trainer.centers.margins.margin import Bent, Targets


@dataclass(frozen=True)
class MagFace:
    """cos(theta + m(a)) of the norm a, plus weight * g(a), both with a gradient into the norm.

    Meng et al. 2021, arXiv 2103.06627, section 3: m rises linearly over the range of norms [10,
    110] from 0.45 to 0.8, g(a) = a / u^2 + 1 / a for its upper end u, weight 35. A norm outside of
    the range counts as its nearer end and has no slope. The paper's proof that norms converge asks
    for a weight of at least scale * (m's slope) * u^2 l^2 / (u^2 - l^2): 22.6 for these values. The
    authors' code bends positive cosines only ("easy"). A detached gradient is straight through for
    the cosine; the norm keeps its own.
    """

    norms: tuple[float, float]
    margins: tuple[float, float]
    weight: float
    beyond_pi: BeyondPi = "easy"

    def bend(self, targets: Targets) -> Bent:
        (shortest, longest), (least, most) = self.norms, self.margins
        norms = targets.norms.clamp(shortest, longest)
        inside = norms == targets.norms
        rate = (most - least) / (longest - shortest)
        bent = bend_angles(targets.cosines, 1.0, least + rate * (norms - shortest), self.beyond_pi)
        penalty = self.weight * (norms / longest**2 + 1 / norms)
        penalty_slopes = self.weight * (1 / longest**2 - norms**-2)
        return Bent(
            bent.cosines,
            bent.slopes,
            norm_slopes=(bent.shift_slopes * rate).masked_fill(~inside, 0.0),
            penalty=penalty,
            penalty_slopes=penalty_slopes.masked_fill(~inside, 0.0),
        )
