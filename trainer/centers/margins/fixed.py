"""One margin for all samples: softmax, CosFace, ArcFace, their combination, and SphereFace."""

from dataclasses import dataclass

import torch

from trainer.centers.margins.angles import BeyondPi, bend_angles, bend_stairs
from trainer.centers.margins.margin import Bent, Targets


@dataclass(frozen=True)
class Combined:
    """cos(m1 * theta + m2) - m3 of the target, all three together.

    (1, 0, 0): normalised softmax, Wang et al. 2017, arXiv 1704.06369. (1, 0, m3): CosFace, Wang et
    al. 2018, arXiv 1801.09414, equation 4, m3 0.35. (1, m2, 0): ArcFace, Deng et al. 2019, arXiv
    1801.07698, equation 3, m2 0.5; all of them in equation 4, (1, 0.3, 0.2) or (0.9, 0.4, 0.15).
    `beyond_pi` is about the angle; m3 is taken everywhere.
    """

    m1: float
    m2: float
    m3: float
    beyond_pi: BeyondPi

    def bend(self, targets: Targets) -> Bent:
        if self.m1 == 1 and self.m2 == 0:
            return Bent(targets.cosines - self.m3, torch.ones_like(targets.cosines))
        bent = bend_angles(targets.cosines, self.m1, self.m2, self.beyond_pi)
        return Bent(bent.cosines - self.m3, bent.slopes)


@dataclass(frozen=True)
class SphereFace:
    """Multiplied angle, continued as a falling staircase: (-1)^k cos(m * theta) - 2 k.

    Liu et al. 2017, arXiv 1704.08063, equation 7, with normalised embeddings as in Liu et al. 2022,
    arXiv 2109.05565, so that m need not be an integer (m 1.7). `annealing` is (start, rate, floor)
    of the plain cosine's weight lambda = max(floor, start / (1 + rate * step)), which the first
    paper's training needs at m 4: (1000, 0.12, 5); a start of 0 takes none. Beyond pi "none" is
    cos(m * theta), "easy" the same for positive cosines.
    """

    margin: float
    beyond_pi: BeyondPi
    annealing: tuple[float, float, float] = (0.0, 0.12, 5.0)

    def bend(self, targets: Targets) -> Bent:
        plain = targets.cosines
        if self.beyond_pi == "monotonic":
            values, slopes = bend_stairs(plain, self.margin)
        else:
            bent = bend_angles(plain, self.margin, 0.0, self.beyond_pi)
            values, slopes = bent.cosines, bent.slopes
        weight = self._weight(targets.step)
        return Bent((weight * plain + values) / (1 + weight), (weight + slopes) / (1 + weight))

    def _weight(self, step: int) -> float:
        start, rate, floor = self.annealing
        return max(floor, start / (1 + rate * step)) if start else 0.0
