"""Figures of ranked labels as their definitions say: sets, loops and float64, query by query."""

import math


def inverse_propensity(frequency, num_points, a, b) -> float:
    c = (math.log(num_points) - 1) * (b + 1) ** a
    return 1 + c * (frequency + b) ** -a


def metrics(predicted, truth, inverse, k, num_labels) -> dict[str, float]:
    """`predicted`: label lists, best first; `truth`: label sets; queries without labels go."""
    pairs = [(list(p), set(t)) for p, t in zip(predicted, truth, strict=True) if t]
    precision = recall = ndcg = 0.0
    psp = best_psp = psndcg = best_psndcg = 0.0
    covered, present = set(), set()
    for labels, wanted in pairs:
        top = labels[:k]
        right = [label in wanted for label in top]
        norm = sum(1 / math.log2(place + 2) for place in range(min(k, len(wanted))))
        precision += sum(right) / k
        recall += sum(right) / len(wanted)
        ndcg += sum(1 / math.log2(place + 2) for place, hit in enumerate(right) if hit) / norm
        psp += sum(inverse[label] for label, hit in zip(top, right, strict=True) if hit)
        psndcg += (
            sum(
                inverse[label] / math.log2(place + 2)
                for place, (label, hit) in enumerate(zip(top, right, strict=True))
                if hit
            )
            / norm
        )
        ideal = sorted((inverse[label] for label in wanted), reverse=True)[:k]
        best_psp += sum(ideal)
        best_psndcg += sum(q / math.log2(place + 2) for place, q in enumerate(ideal)) / norm
        covered |= {label for label, hit in zip(top, right, strict=True) if hit}
        present |= wanted
    assert max(present) < num_labels
    return {
        f"xmc_P@{k}": precision / len(pairs),
        f"xmc_nDCG@{k}": ndcg / len(pairs),
        f"xmc_PSP@{k}": psp / best_psp,
        f"xmc_PSnDCG@{k}": psndcg / best_psndcg,
        f"xmc_R@{k}": recall / len(pairs),
        f"xmc_C@{k}": len(covered) / len(present),
    }


def ranking(queries, labels, ids, left_out=()) -> list[list[int]]:
    """All labels of each query by falling score, of equal ones by rising id, without `left_out`.

    A row that is not finite predicts nothing and is never predicted.
    """
    scores = (queries.double() @ labels.double().T).float()
    found = []
    for row, line in enumerate(scores.tolist()):
        pairs = [
            (-score, number)
            for score, number, label in zip(line, ids.tolist(), labels, strict=True)
            if queries[row].isfinite().all()
            and label.isfinite().all()
            and (row, number) not in left_out
        ]
        found.append([number for _, number in sorted(pairs)])
    return found
