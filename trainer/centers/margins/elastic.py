"""ElasticFace: every sample's margin is drawn anew at every step."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from trainer.centers.margins.angles import BeyondPi, bend_angles
from trainer.centers.margins.draws import deal, draw_normal
from trainer.centers.margins.margin import Bent, Targets


@dataclass(frozen=True)
class ElasticFace:
    """ArcFace ("angle") or CosFace ("cosine") with margins from a normal distribution.

    Boutros et al. 2022, arXiv 2109.09416, section III; mean and deviation 0.5 and 0.05 (Arc), 0.35
    and 0.05 (Cos), in the "+" variants 0.0175 (Arc+) and 0.02 (Cos+). "+" means, as the paper has
    it, that of the margins drawn for the global batch the sample nearest to its center gets the
    smallest; the authors' code gathers where it should scatter and deals them at random. Draws
    depend on (seed, step, sample id) alone; a deviation of 0 is ArcFace or CosFace bit for bit.
    """

    mean: float
    std: float
    on: Literal["angle", "cosine"]
    plus: bool
    beyond_pi: BeyondPi = "monotonic"
    seed: int = 0

    def margins(self, targets: Targets) -> Tensor:  # (N,)
        """The margin of each sample."""
        drawn = draw_normal(targets.sample_ids, seed=self.seed, step=targets.step)
        margins = self.mean + self.std * drawn
        return deal(margins, targets.cosines, targets.sample_ids) if self.plus else margins

    def bend(self, targets: Targets) -> Bent:
        margins = self.margins(targets)
        if self.on == "cosine":
            return Bent(targets.cosines - margins, torch.ones_like(margins))
        bent = bend_angles(targets.cosines, 1.0, margins, self.beyond_pi)
        return Bent(bent.cosines, bent.slopes)
