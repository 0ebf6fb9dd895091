"""Rows: class centers, classifiers of labels, and what the similarity engine holds for a loss.

The engine's own arithmetic (`trainer/similarity/pairs.py`, `trainer/centers/stream.py`): visiting
rows, sums for their gradients, a tile, and the tiles that are kept. Nothing grows with the square
of the batch, or with samples times classes.
"""

import math

import torch

from trainer.centers import ClassCenters
from trainer.centers.catch_up import HORIZON
from trainer.centers.rows import rows_per_tile
from trainer.config import CENTER_LOSSES
from trainer.estimate.plan import Plan
from trainer.estimate.terms import Term
from trainer.similarity.pairs import elements_kept, tile_side

FLOAT = 4
LABELS_OF_A_QUERY = 5  # where no index says how many labels a text has
BYTES_DRAWN = 40  # of a class while the sampled ones are drawn: numpy's permutation and sorts


def table_terms(plan: Plan) -> list[Term]:
    """Centers or classifiers with their optimizer, that stay."""
    size = center_bytes(plan)
    if not size:
        return []
    dim = plan.config.model.embedding_dim
    mine = plan.share_of_classes * size
    exact = plan.config.centers.mode == "exact"
    history = 4 * (HORIZON + 1) * 8 if exact else 0
    device = _device(plan)
    scratch = 4 * rows_per_tile(dim, torch.float32, device) * dim * FLOAT
    name = "centers with their optimizer" if plan.config.has_centers else "label rows and optimizer"
    return [Term(name, mine), Term("centers: working tile", scratch + history)]


def center_bytes(plan: Plan) -> int:
    """Bytes of a class, 0 for a run without such rows."""
    config = plan.config
    if config.has_centers or (config.has_labels and config.labels.rows == "classifiers"):
        return ClassCenters.bytes_per_class(config.centers, config.model.embedding_dim)
    return 0


def host_terms(plan: Plan) -> list[Term]:
    """Lists and tokens of labels, in the host's memory of each rank."""
    config = plan.config
    if not config.has_labels:
        return []
    lists = plan.num_samples * (8 + 4 * LABELS_OF_A_QUERY)
    terms = [Term("labels: lists of the samples", lists)]
    if config.labels.rows == "texts":
        mine = plan.num_classes if config.labels.over == "batch" else plan.share_of_classes
        terms.append(Term("labels: tokens", mine * config.model.context_length * 4))
    return terms


def loss_terms(plan: Plan, dim: int) -> list[Term]:
    """What the loss holds while it is computed."""
    if plan.config.loss.name in CENTER_LOSSES:
        return _center_loss(plan, dim)
    return _label_loss(plan, dim) if plan.config.has_labels else _pair_loss(plan, dim)


def taking_part(plan: Plan) -> int:
    """Centers or label rows of a rank that take part in a step."""
    config = plan.config
    if config.has_centers:
        return min(
            plan.share_of_classes,
            math.ceil(plan.share_of_classes * config.centers.sample_rate)
            + (config.train.global_batch_size if config.centers.sample_rate < 1 else 0),
        )
    if config.labels.over == "all":
        return plan.share_of_classes
    if config.labels.rows == "texts":
        return plan.rows
    touched = config.train.global_batch_size * LABELS_OF_A_QUERY // plan.world_size
    return min(plan.share_of_classes, touched)


def loss_flops(plan: Plan, dim: int) -> float:
    """Of this rank: 8 a pair and dimension with a normaliser, 6 without (reference/clip.md 2.6)."""
    batch = plan.config.train.global_batch_size
    stationary = plan.rows
    if plan.config.has_centers:
        stationary = taking_part(plan) * plan.config.centers.subcenters
    elif plan.config.has_labels:
        stationary = taking_part(plan)
    each = 6 if plan.config.loss.name in ("siglip", "one_vs_all") else 8
    return float(each) * batch * stationary * dim


def _device(plan: Plan) -> torch.device:
    return torch.device("cuda" if plan.machine.is_gpu else "cpu")


def wire_bytes(plan: Plan) -> int:
    """Of a number of an embedding on its way."""
    return 2 if plan.config.train.precision == "bf16" and not plan.config.has_centers else FLOAT


def _visiting(plan: Plan, dim: int) -> list[Term]:
    """Rows of all ranks, or of two of them, and sums for their gradients."""
    batch, wire = plan.config.train.global_batch_size, wire_bytes(plan)
    ring = plan.config.loss.visiting == "ring" and not plan.config.has_centers
    if ring and plan.world_size > 1:
        return [Term("loss: visiting rows (ring)", plan.rows * dim * (2 * wire + 3 * FLOAT))]
    converted = FLOAT if wire != FLOAT else 0
    sent = wire if plan.world_size > 1 else 0
    home = 2 * plan.rows * dim * FLOAT if plan.world_size > 1 else 0
    return [
        Term("loss: visiting rows (gathered)", batch * dim * (wire + converted)),
        Term("loss: their gradients", batch * dim * (FLOAT + sent) + home),
    ]


def _tiles(plan: Plan, dim: int, stationary: int, *, kept: bool) -> Term:
    batch, side = plan.config.train.global_batch_size, tile_side(_device(plan))
    tile = min(side, stationary) * min(side, batch)
    held = elements_kept(stationary, batch, dim) if kept else 0
    return Term("loss: tiles", (2 * tile + held) * FLOAT)


def _pair_loss(plan: Plan, dim: int) -> list[Term]:
    own = Term("loss: own rows and gradients", plan.rows * dim * FLOAT * 6)
    kept = plan.config.loss.name == "clip"
    return [own, *_visiting(plan, dim), _tiles(plan, dim, plan.rows, kept=kept)]


def _label_loss(plan: Plan, dim: int) -> list[Term]:
    rows = taking_part(plan)
    own = Term("loss: queries and gradients", plan.rows * dim * FLOAT * 4)
    tiles = _tiles(plan, dim, rows, kept=plan.config.loss.name != "one_vs_all")
    # The tiles are given up before the backward pass makes a third copy.
    held = 2 * rows * dim * FLOAT + max(0, rows * dim * FLOAT - tiles.size)
    labels = Term("loss: label rows, unit and gradients", held)
    return [own, labels, *_visiting(plan, dim), tiles]


def _center_loss(plan: Plan, dim: int) -> list[Term]:
    rows = taking_part(plan)
    side = tile_side(_device(plan))
    block = 3 * min(side, rows) * dim * FLOAT
    terms = [
        Term("loss: own rows and gradients", plan.rows * dim * FLOAT * 6),
        *_visiting(plan, dim),
        _tiles(plan, dim, rows * plan.config.centers.subcenters, kept=False),
        Term("loss: centers of a tile", block * plan.config.centers.subcenters),
    ]
    if plan.config.centers.sample_rate < 1:
        terms.append(Term("loss: sampled classes", rows * BYTES_DRAWN))
    return terms
