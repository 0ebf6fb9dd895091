"""Naive margin losses: the dense (N, C) matrix of cosines in, gradients by plain autograd.

Written from the formulas (arXiv numbers at each), a loop over rows, no bounds where autograd does
not need them: for cosines inside (-1, 1). Imports nothing of what it is to judge.
"""

import math
from dataclasses import dataclass, field
from statistics import NormalDist

import torch
from torch import Tensor

_MASK = 2**64 - 1
_PUBLISHED = {
    "cosface": 0.35,
    "arcface": 0.5,
    "sphereface": 1.7,
    "elastic_arcface": 0.5,
    "elastic_cosface": 0.35,
    "adaface": 0.4,
    "curricularface": 0.5,
}
_PUBLISHED_STD = {"elastic_arcface_plus": 0.0175, "elastic_cosface_plus": 0.02}


def _mix(x: int) -> int:
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def key(*fields: int) -> int:
    """One 64-bit key of integers, after SplitMix64."""
    state = 0
    for number in fields:
        state = _mix(
            ((state + 0x9E3779B97F4A7C15) & _MASK) ^ _mix((number + 0x9E3779B97F4A7C15) & _MASK)
        )
    return state


def normal(seed: int, step: int, sample_id: int) -> float:
    """The standard normal number of a sample at a step."""
    return NormalDist().inv_cdf(((key(seed, 18, step, sample_id) >> 12) + 0.5) / 2**52)


@dataclass
class MarginOracle:
    """Options by the names of `[loss]`; the state moves at each call, as in training."""

    name: str
    scale: float = 64.0
    margin: float | None = None
    margins: tuple = (1.0, 0.3, 0.2)
    margin_std: float | None = None
    gradient: str = "analytic"
    beyond_pi: str | None = None
    filter: str = "none"
    filter_threshold: float = 0.4
    sphereface_annealing: tuple = (0.0, 0.12, 5.0)
    adaface_h: float = 0.333
    adaface_momentum: float = 0.01
    magface_norms: tuple = (10.0, 110.0)
    magface_margins: tuple = (0.45, 0.8)
    magface_weight: float = 35.0
    curricular_momentum: float = 0.01
    sface: tuple = (80.0, 0.8, 1.23)
    seed: int = 0
    state: dict = field(default_factory=lambda: {"norm_mean": 20.0, "norm_std": 100.0, "t": 0.0})

    def __post_init__(self):
        plain = self.name.removesuffix("_plus")
        self.m = self.margin if self.margin is not None else _PUBLISHED.get(plain)
        self.std = self.margin_std
        if self.std is None:
            self.std = _PUBLISHED_STD.get(self.name, 0.05)
        self.beyond = self.beyond_pi or ("easy" if self.name == "magface" else "monotonic")

    def losses(
        self,
        cosines: Tensor,  # (N, C)
        labels: Tensor,  # (N,)
        norms: Tensor,  # (N,)
        sample_ids: Tensor,  # (N,)
        step: int,
    ) -> Tensor:  # (N,)
        """The loss of each row; the global loss is their mean."""
        own = cosines[torch.arange(len(labels)), labels]
        self._follow(own.detach(), norms.detach())
        margins = self._margins(own.detach(), sample_ids, step)
        rows = []
        for i, label in enumerate(labels.tolist()):
            target, penalty = self._target(own[i], norms[i], margins[i], step)
            negatives = [
                self._negative(cosines[i, j], own[i].detach())
                for j in range(cosines.shape[1])
                if j != label
            ]
            negatives = [x for x in negatives if x is not None]
            if self.name == "sface":
                rows.append(-self.scale * target + self.scale * sum(negatives))
            else:
                logits = self.scale * torch.stack([target, *negatives])
                rows.append(logits.logsumexp(0) - logits[0] + penalty)
        return torch.stack(rows)

    def _follow(self, own, norms):
        norms = norms.clamp(1e-3, 100.0)
        a, t = self.adaface_momentum, self.curricular_momentum
        self.state = {
            "norm_mean": (1 - a) * self.state["norm_mean"] + a * float(norms.mean()),
            "norm_std": (1 - a) * self.state["norm_std"] + a * float(norms.std())
            if len(norms) > 1
            else self.state["norm_std"],
            "t": (1 - t) * self.state["t"] + t * float(own.mean()),
        }

    def _margins(self, own, sample_ids, step):
        """ElasticFace, arXiv 2109.09416: a normal margin each; "+": largest cosine, smallest."""
        if not self.name.startswith("elastic"):
            return [self.m] * len(own)
        drawn = [self.m + self.std * normal(self.seed, step, i) for i in sample_ids.tolist()]
        if not self.name.endswith("_plus"):
            return drawn
        nearest = sorted(range(len(own)), key=lambda i: (-float(own[i]), int(sample_ids[i])))
        dealt = [0.0] * len(own)
        for place, margin in zip(nearest, sorted(drawn), strict=True):
            dealt[place] = margin
        return dealt

    def _target(self, c, norm, margin, step):
        penalty = torch.zeros_like(c)
        seen = c.detach() if self.gradient == "detached" else c
        if self.name == "magface":  # arXiv 2103.06627
            low, high = self.magface_norms
            a = norm.clamp(low, high)
            least, most = self.magface_margins
            margin = (most - least) / (high - low) * (a - low) + least
            penalty = self.magface_weight * (a / high**2 + 1 / a)
        bent = self._bent(seen, norm.detach(), margin, step)
        if self.gradient == "detached":
            bent = bent + c - c.detach()
        return bent, penalty

    def _bent(self, c, norm, margin, step):
        name = self.name.removesuffix("_plus")
        if name == "softmax":
            return c
        if name in ("cosface", "elastic_cosface"):
            return c - margin
        if name == "combined":  # arXiv 1801.07698, equation 4
            return self._angle(c, *self.margins[:2]) - self.margins[2]
        if name == "sphereface":
            return self._sphere(c, margin, step)
        if name == "adaface":
            return self._ada(c, norm)
        if name == "sface":  # arXiv 2205.12010
            k, a, _ = self.sface
            return torch.sigmoid(k * (c.detach().acos() - a)) * c
        return self._angle(c, 1.0, margin)

    def _angle(self, c, m1, m2):
        m2 = torch.as_tensor(m2, dtype=c.dtype)
        angle = m1 * c.acos() + m2
        if self.beyond == "easy":
            return angle.cos() if c > 0 else c
        if self.beyond == "none" or angle < math.pi:
            return angle.cos()
        last = (math.pi - m2) / m1  # the angle at which pi is reached
        return c - (math.pi - last) * torch.sin(last)

    def _sphere(self, c, m, step):  # arXiv 1704.08063, equation 7
        angle = m * c.acos()
        if self.beyond == "monotonic":
            k = math.floor(float(angle.detach()) / math.pi)
            value = (-1) ** k * angle.cos() - 2 * k
        else:
            value = angle.cos() if self.beyond == "none" or c > 0 else c
        start, rate, floor = self.sphereface_annealing
        weight = max(floor, start / (1 + rate * step)) if start else 0.0
        return (weight * c + value) / (1 + weight)

    def _ada(self, c, norm):  # arXiv 2204.00964
        z = (norm.clamp(1e-3, 100) - self.state["norm_mean"]) / (self.state["norm_std"] + 1e-3)
        z = (z * self.adaface_h).clamp(-1, 1)
        if self.beyond == "monotonic":
            angle = (c.clamp(-1 + 1e-3, 1 - 1e-3).acos() - self.m * z).clamp(1e-3, math.pi - 1e-3)
        else:
            angle = c.acos() - self.m * z
        return angle.cos() - (self.m + self.m * z)

    def _negative(self, c, own):
        if self.filter != "none" and c > self.filter_threshold:
            return None if self.filter == "drop" else torch.zeros_like(c)
        if self.name == "sface":
            k, _, b = self.sface
            return torch.sigmoid(k * (b - c.detach().acos())) * c
        if self.name == "curricularface" and c > torch.cos(own.acos() + self.m):
            return c * (self.state["t"] + c)  # arXiv 2004.00288
        return c
