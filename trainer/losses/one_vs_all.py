"""One-vs-all: every label decides by itself whether a query has it."""

from torch import Tensor
from torch.distributed import ProcessGroup

from trainer.losses.checks import check_scalar
from trainer.losses.listed import Inputs, Positives, list_pairs
from trainer.similarity.closed_form import attach_gradients, needs_gradient, plain_arithmetic
from trainer.similarity.pairs import Tile
from trainer.similarity.statistics import softplus_sums


def one_vs_all_loss(
    queries: Tensor,  # (n, d) this rank's; n may differ from rank to rank
    labels: Tensor,  # (m, d) this rank's label or classifier rows; m may differ from rank to rank
    scale: Tensor,  # () or (1,) multiplier of the inner products
    bias: Tensor | None,  # () or (1,) added to every logit
    positives: Positives,
    label_ids: Tensor,  # (m,) int global ids of the label rows
    group: ProcessGroup | None = None,
    *,
    row_weights: Tensor | None = None,  # (n,) of the queries' losses; None: all 1
    labels_are_parts: bool = False,
    tile: int | None = None,
) -> Tensor:  # () this rank's mean over its n queries
    """Sum over all labels of the binary cross entropies of a query, as Renee's classifiers have.

    Jain et al. 2023 (Renee), MLSys; the sum over labels, not their mean, as in `siglip_loss`: with
    L labels a bias of about -log L starts it near the labels' rarity. A query without a positive
    adds 0, as in `decoupled_loss`, which also says what is masked, how gradients are to be
    averaged, and what `row_weights` and `labels_are_parts` do. There is no normaliser, so value and
    gradients come from one sweep: 6 N L d / W FLOPs.
    """
    scalars = () if bias is None else (bias,)
    inputs = (queries, labels, scale, *scalars)
    needed = needs_gradient(*inputs)
    with plain_arithmetic(queries.device):
        listed = list_pairs(
            Inputs(queries, labels, scale, positives, label_ids, None, row_weights),
            group,
            labels_are_parts=labels_are_parts,
            tile=tile,
            swept_once=True,
        )
        pairs, shift = listed.pairs, _number(bias)
        asked = (listed.num_positives > 0).to(pairs.dtype)
        if listed.row_weights is not None:
            asked *= listed.row_weights
        losses, slopes = pairs.new_columns(0.0), pairs.new_columns(0.0)

        def measure(now: Tile) -> Tensor:
            logits = now.values.add_(shift) if shift else now.values
            _, at = listed.positives.at(now)
            logits[at] = -logits[at]  # a positive's loss is softplus(-z), its slope -sigmoid(-z)
            losses[now.columns] += softplus_sums(logits, 0, now.scratch)
            weights = logits.sigmoid_().mul_(asked[now.columns])
            weights[at] = -weights[at]
            slopes[now.columns] += weights.sum(0)
            return weights

        if any(needed):
            gradients = listed.gradients(measure, needed)
        else:
            for now in pairs.tiles():
                measure(now)
        losses = pairs.merge_columns(losses * asked, lambda shares: shares.sum(0))
        value = listed.mean(losses)
        if not any(needed):
            return value
        # Over this rank's labels and all queries: the mean over ranks is the global gradient.
        for_bias = [slopes.sum() * listed.share for _ in scalars]
    return attach_gradients(value, inputs, (*gradients, *for_bias))


def _number(bias: Tensor | None) -> float:
    if bias is None:
        return 0.0
    check_scalar("bias", bias)
    return float(bias)
