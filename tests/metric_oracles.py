"""Every figure of faces and labels, written as the definition says: loops in float64, no tricks."""

import itertools
import math

import numpy as np


def tar_at_far(scores, same, far) -> float:
    """Try every threshold there is, and one above all."""
    genuine = [s for s, y in zip(scores, same, strict=True) if y]
    impostors = [s for s, y in zip(scores, same, strict=True) if not y]
    best = 0.0
    for threshold in sorted(set(scores)):
        if sum(s >= threshold for s in impostors) / len(impostors) <= far:
            best = max(best, sum(s >= threshold for s in genuine) / len(genuine))
    return best


def fold_accuracy(scores, same, num_folds=10, thresholds=None) -> tuple[float, float]:
    """Ten runs of the order; the threshold that is best on nine, of equals the strictest."""
    bounds = np.cumsum([0] + [len(part) for part in np.array_split(scores, num_folds)])
    accuracies = []
    for first, last in itertools.pairwise(bounds):
        train = [i for i in range(len(scores)) if not first <= i < last]
        if thresholds is None:
            levels = sorted({scores[i] for i in train}, reverse=True)
            tried = [
                math.inf,
                *((a + b) / 2 for a, b in itertools.pairwise(levels)),
                -math.inf,
            ]
        else:
            tried = list(thresholds)
        right = [sum((scores[i] > t) == same[i] for i in train) for t in tried]
        chosen = tried[right.index(max(right))]
        fold = range(first, last)
        accuracies.append(sum((scores[i] > chosen) == same[i] for i in fold) / len(fold))
    mean = sum(accuracies) / num_folds
    return mean, math.sqrt(sum((a - mean) ** 2 for a in accuracies) / num_folds)


def cosines(rows) -> np.ndarray:
    """float64 inner products of unit rows, rounded as scores are."""
    rows = np.asarray(rows, np.float64)
    return (rows @ rows.T).astype(np.float32)


def leave_one_out(rows, ids, labels, k) -> tuple[float, float]:
    """R@k and MAP@R by sorting everybody else."""
    table = cosines(rows)
    hits, precisions = [], []
    for i, label in enumerate(labels):
        if label < 0:
            continue
        others = [j for j in range(len(ids)) if j != i and labels[j] >= 0]
        others.sort(key=lambda j: (-table[i, j], ids[j]))
        right = [labels[j] == label for j in others]
        if not any(right):
            continue
        hits.append(any(right[:k]))
        depth = sum(right)
        precisions.append(
            sum(sum(right[: p + 1]) / (p + 1) for p in range(depth) if right[p]) / depth
        )
    return sum(hits) / len(hits), sum(precisions) / len(precisions)


def template(members) -> np.ndarray:
    """{medium: [rows]} -> mean in each medium, sum, length 1."""
    total = sum(np.mean([np.asarray(row, np.float64) for row in rows], axis=0) for rows in members)
    return (total / np.linalg.norm(total)).astype(np.float32)


def identification(rows, gallery, probes, identity, k, fpir) -> tuple[float, float, float]:
    """Rank-k rate, FNIR and DIR at an FPIR, for single-image gallery entries or several."""
    enrolled = sorted({identity[g] for g in gallery})
    templates = [template([[rows[g]] for g in gallery if identity[g] == who]) for who in enrolled]
    mated, alarms = [], []
    for probe in probes:
        scores = [
            float(np.float32(np.asarray(rows[probe], np.float64) @ t.astype(np.float64)))
            for t in templates
        ]
        if identity[probe] in enrolled:
            mate = enrolled.index(identity[probe])
            place = sum(
                s > scores[mate] or (s == scores[mate] and i < mate) for i, s in enumerate(scores)
            )
            mated.append((place, scores[mate]))
        else:
            alarms.append(max(scores))
    rank = sum(place < k for place, _ in mated) / len(mated)
    if not alarms:
        return rank, math.nan, math.nan
    best_fnir, best_dir = 1.0, 0.0
    for threshold in sorted({*alarms, *(score for _, score in mated)}):
        if sum(a >= threshold for a in alarms) / len(alarms) <= fpir:
            missed = sum(score < threshold for _, score in mated) / len(mated)
            best_fnir = min(best_fnir, missed)
            found = sum(score >= threshold and place == 0 for place, score in mated)
            best_dir = max(best_dir, found / len(mated))
    return rank, best_fnir, best_dir
