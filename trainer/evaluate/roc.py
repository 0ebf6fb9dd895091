"""What two sets of scores say, exactly: genuine ones (the same person) and impostors' (others).

A pair is accepted when its score lies above a bound. Every figure counts pairs of a sorted list:
no grid, no interpolation but the EER's. Scores that are not numbers rank below all others.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating]
Bools = NDArray[np.bool_]
Places = NDArray[np.int64]

GRID = np.arange(0, 4, 0.01)
"""Squared distances of unit rows that published 10-fold accuracies try as thresholds."""
POINTS_A_DECADE = 50  # of a written curve


class Point(NamedTuple):
    """Where a bound puts both kinds of pairs."""

    far: float
    """Share of impostors accepted."""
    tar: float
    """Share of genuine pairs accepted."""
    bound: float
    """A score above it is accepted; -inf accepts all."""
    num_impostors: int
    """Impostors that the asked FAR allows: the figure rests on so many pairs."""


Curve = Sequence[Point]


@dataclass(frozen=True)
class Roc:
    """Both kinds of scores, sorted; the receiver operating characteristic is read off them."""

    genuine: Floats  # (G,) rising
    impostors: Floats  # (M,) rising

    @classmethod
    def of(
        cls,
        scores: Floats,  # (P,)
        same: Bools,  # (P,)
    ) -> Self:
        """Raises ValueError when either kind has no pair: no share could be told."""
        genuine, impostors = (np.sort(below_all(scores[kind])) for kind in (same, ~same))
        if not len(genuine) or not len(impostors):
            raise ValueError(f"{len(genuine)} genuine and {len(impostors)} impostor pairs: both")
        return cls(genuine, impostors)

    def auc(self) -> float:
        """Share of (genuine, impostor) couples in the right order, equal scores counting half."""
        below = np.searchsorted(self.impostors, self.genuine, side="left").astype(np.int64)
        equal_or_below = np.searchsorted(self.impostors, self.genuine, side="right")
        return int((below + equal_or_below).sum()) / (2 * len(self.genuine) * len(self.impostors))

    def eer(self) -> float:
        """Where FAR = 1 - TAR on the curve, linear between neighbouring thresholds."""
        scores = np.unique(np.concatenate([self.genuine, self.impostors]))[::-1]
        far, tar = (
            np.append(0.0, (len(kind) - np.searchsorted(kind, scores, side="left")) / len(kind))
            for kind in (self.impostors, self.genuine)
        )
        above = far + tar - 1  # rises from -1 to 1
        at = int(np.argmax(above >= 0))
        share = -above[at - 1] / (above[at] - above[at - 1])
        return float(far[at - 1] + share * (far[at] - far[at - 1]))

    def tar_at_far(self, far: float) -> Point:
        """The most that can be accepted with at most a share `far` of the impostors."""
        total = len(self.impostors)
        allowed = count_allowed(far, total)
        if allowed == total:
            return Point(1.0, 1.0, -np.inf, total)
        bound = float(self.impostors[total - 1 - allowed])
        reached, tar = (
            (len(kind) - int(np.searchsorted(kind, bound, side="right"))) / len(kind)
            for kind in (self.impostors, self.genuine)
        )
        return Point(reached, tar, bound, allowed)

    def curve(self) -> list[Point]:
        """Exact points at FARs that lie evenly on a logarithmic axis, from 0 to 1."""
        total = len(self.impostors)
        return distinct([self.tar_at_far(count / total) for count in counts_of_a_curve(total)])


def below_all(scores: Floats) -> Floats:
    """Scores with -inf for what is not a number."""
    return np.where(np.isnan(scores), -np.inf, scores)


def count_allowed(share: float, total: int) -> int:
    """The most k with k / total <= share; exact where `share` is such a quotient itself."""
    allowed = min(total, int(share * total) + 1)
    while allowed and allowed / total > share:
        allowed -= 1
    return allowed


def counts_of_a_curve(total: int) -> list[int]:
    """Impostors accepted at the points of a curve: 0, few, ever more, `total`."""
    counts = np.geomspace(1, total, 1 + int(POINTS_A_DECADE * np.log10(total))).round()
    return sorted({0, total, *map(int, counts)})


def distinct(points: Curve) -> list[Point]:
    """The first of points that have one bound: ties leave nothing between them."""
    return [p for i, p in enumerate(points) if i == 0 or p.bound != points[i - 1].bound]


def folds_in_order(same: Bools, num_folds: int = 10) -> tuple[list[Places], bool]:
    """Runs of the file's order, as equal as they can be; and whether they were cut by kind.

    A table sorted by kind would have folds of one kind, whose threshold is chosen on too many of
    the other: there, each fold is a run of the genuine pairs and a run of the impostors. Where
    runs hold both in equal numbers, as in LFW's tables, the two ways are the same.
    """
    runs = np.array_split(np.arange(len(same)), num_folds)
    if all(0 < same[run].sum() < len(run) for run in runs):
        return runs, False
    kinds = [np.array_split(np.flatnonzero(kind), num_folds) for kind in (same, ~same)]
    folds = [np.sort(np.concatenate(parts)) for parts in zip(*kinds, strict=True)]
    return [fold for fold in folds if len(fold)], True


def fold_accuracy(
    scores: Floats,  # (P,) cosines
    same: Bools,  # (P,)
    folds: Sequence[Places],
    *,
    grid: bool,
) -> tuple[float, float]:
    """Mean and standard deviation over folds of the share of pairs told right.

    The threshold is the best one of the other folds, of equals the strictest: among all of them
    (midway between two neighbouring scores), or with `grid` among squared distances 0, 0.01, ...
    3.99, as published figures do.
    """
    scores = below_all(scores.astype(np.float64))
    right = []
    for fold in folds:
        others = np.ones(len(scores), bool)
        others[fold] = False
        accept = _accept_on_grid if grid else _accept_above
        accepted = accept(scores[others], same[others], scores[fold])
        right.append(float((accepted == same[fold]).mean()))
    return float(np.mean(right)), float(np.std(right))


def _accept_above(scores: Floats, same: Bools, judged: Floats) -> Bools:
    order = np.argsort(-scores, kind="stable")
    ranked = scores[order]
    gain = np.where(same[order], 1, -1)  # of accepting one more
    right = np.concatenate([[0], np.cumsum(gain)])
    inside_a_tie = np.concatenate([[False], ranked[1:] == ranked[:-1], [False]])
    best = int(np.argmax(np.where(inside_a_tie, -len(scores) - 1, right)))
    if best == 0:
        return np.zeros(len(judged), bool)
    if best == len(scores):
        return np.ones(len(judged), bool)
    if ranked[best] == -np.inf:
        return judged >= ranked[best - 1]
    return judged > (ranked[best - 1] + ranked[best]) / 2


def _accept_on_grid(scores: Floats, same: Bools, judged: Floats) -> Bools:
    genuine, impostors = (np.sort(2 - 2 * scores[kind]) for kind in (same, ~same))
    right = np.searchsorted(genuine, GRID) + len(impostors) - np.searchsorted(impostors, GRID)
    return 2 - 2 * judged < GRID[int(np.argmax(right))]


def name_share(share: float) -> str:
    """1e-6, 1e-1, 2.5e-4: as papers write it."""
    digits, _, exponent = f"{share:e}".partition("e")
    return f"{float(digits):g}e{int(exponent)}"


def tar_numbers(task: str, roc: Roc, fars: Iterable[float]) -> dict[str, float]:
    """`TASK_TAR@FAR=x` and `num_TASK_impostors@FAR=x`, the pairs that the figure rests on."""
    points = {name_share(far): roc.tar_at_far(far) for far in fars}
    return {
        **{f"{task}_TAR@FAR={name}": point.tar for name, point in points.items()},
        **{
            f"num_{task}_impostors@FAR={name}": point.num_impostors
            for name, point in points.items()
        },
    }


def write_curves(path: Path, curves: dict[str, Curve]) -> None:
    """A TSV with a line a point: curve, far, tar, bound (scores above it are accepted)."""
    lines = ["curve\tfar\ttar\tbound"]
    lines += [
        f"{name}\t{point.far:.9g}\t{point.tar:.9g}\t{point.bound:.9g}"
        for name, points in curves.items()
        for point in points
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".part")
    beside.write_text("\n".join(lines) + "\n", encoding="utf-8")
    beside.replace(path)
