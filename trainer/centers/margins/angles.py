"""Margins on angles: values and slopes by cosine, bounded where the angle's own slope is not."""

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

BeyondPi = Literal["monotonic", "none", "easy"]

MIN_ANGLE = 1e-3
"""Slopes are those at least this far from angles of 0 and pi: d angle/d cosine is infinite there.

It bounds them, to 480 for a margin of 0.5; float32 has eight cosines nearer to 1 than this.
"""


class BentAngles(NamedTuple):
    """(N,) each, float64."""

    cosines: Tensor
    slopes: Tensor
    """By the cosine."""
    shift_slopes: Tensor
    """By the shift."""


def bend_angles(
    cosines: Tensor,  # (N,) in [-1, 1], float64
    factor: float,
    shift: float | Tensor,  # or (N,)
    beyond_pi: BeyondPi,
) -> BentAngles:
    """cos(factor * theta + shift), and what stands for it where that angle passes pi.

    Past pi the cosine would rise again and push the hardest samples away. "monotonic" takes, from
    theta_t = (pi - shift) / factor on, c - (pi - theta_t) * sin(theta_t): for a factor of 1 that is
    ArcFace's c - m * sin(m). "easy" bends positive cosines only. "none" bends all.
    """
    shift = torch.as_tensor(shift, dtype=cosines.dtype, device=cosines.device)
    angles = cosines.acos()
    bent = factor * angles + shift
    at = inner_angles(angles)
    values, by_shift = bent.cos(), -bent.sin()
    slopes = factor * (factor * at + shift).sin() / at.sin()
    if beyond_pi == "none":
        return BentAngles(values, slopes, by_shift)
    if beyond_pi == "easy":
        kept = cosines > 0
        fallback, fallback_by_shift = cosines, torch.zeros_like(cosines)
    else:
        kept = bent < math.pi
        missing = math.pi - (math.pi - shift) / factor
        fallback = cosines - missing * missing.sin()
        fallback_by_shift = -(missing.sin() + missing * missing.cos()) / factor
    return BentAngles(
        torch.where(kept, values, fallback),
        torch.where(kept, slopes, 1.0),
        torch.where(kept, by_shift, fallback_by_shift),
    )


def bend_stairs(
    cosines: Tensor,  # (N,) in [-1, 1], float64
    factor: float,
) -> tuple[Tensor, Tensor]:  # (N,), (N,)
    """(-1)^k cos(factor * theta) - 2 k with k = floor(factor * theta / pi): falls over all angles.

    Liu et al. 2017, arXiv 1704.08063, equation 7. Values, and slopes by the cosine.
    """
    angles = cosines.acos()
    at = inner_angles(angles)
    steps, steps_at = (factor * angles / math.pi).floor(), (factor * at / math.pi).floor()
    values = _sign(steps) * (factor * angles).cos() - 2 * steps
    return values, _sign(steps_at) * factor * (factor * at).sin() / at.sin()


def inner_angles(angles: Tensor) -> Tensor:
    """The nearest angles at which slopes are taken."""
    return angles.clamp(MIN_ANGLE, math.pi - MIN_ANGLE)


def _sign(steps: Tensor) -> Tensor:
    return 1 - 2 * steps.remainder(2)
