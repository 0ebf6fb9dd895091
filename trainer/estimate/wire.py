"""Bytes that cross between ranks in a step, a collective at a time."""

from dataclasses import dataclass

from trainer.estimate.plan import Plan
from trainer.estimate.rows import wire_bytes
from trainer.estimate.state import EngineState

FLOAT, INT = 4, 8


@dataclass(frozen=True)
class Collective:
    """One kind of exchange of a step; `payload` is what a rank ends up with, in bytes."""

    name: str
    kind: str
    """all_reduce, all_gather, reduce_scatter, all_to_all or shift."""
    payload: int
    """all_reduce: the tensor; all_gather: what all ranks gave; reduce_scatter and all_to_all: what
    a rank puts in; shift: what a rank sends."""

    def sent(self, world_size: int) -> float:
        """Bytes that a rank sends, when rings carry them."""
        share = (world_size - 1) / world_size
        if self.kind == "shift":
            return float(self.payload) if world_size > 1 else 0.0
        return self.payload * share * (2 if self.kind == "all_reduce" else 1)


def tower_collectives(state: EngineState, num_chunks: int) -> list[Collective]:
    """Gradients and parameters by ZeRO stage, as DeepSpeed sends them.

    Stages 1 and 2 reduce whole buckets on every rank, which costs an all-reduce, not half of it.
    """
    trained, whole = state.towers.trained, state.towers.trained + state.towers.frozen
    if state.stage == 0:
        return [Collective("gradients", "all_reduce", trained)]
    if state.stage < 3:
        return [
            Collective("gradients", "all_reduce", trained),
            Collective("updated parameters", "all_gather", trained),
        ]
    passes = 1 if num_chunks == 1 else 2 * num_chunks
    return [
        Collective("parameters, each pass", "all_gather", whole * passes),
        Collective("gradients", "reduce_scatter", trained),
    ]


def loss_collectives(plan: Plan, dim: int) -> list[Collective]:
    """Embeddings that visit, their gradients going home, and numbers of each sample."""
    batch, wire = plan.config.train.global_batch_size, wire_bytes(plan)
    rows = batch * dim
    if plan.config.has_centers:
        return [
            Collective("embeddings", "all_gather", rows * wire),
            Collective("their gradients", "all_to_all", rows * wire),
            Collective("labels, ids, norms", "all_gather", batch * (2 * INT + FLOAT)),
            Collective("targets and normalisers", "all_reduce", 3 * batch * FLOAT),
        ]
    statistics = Collective("normalisers", "all_to_all", 2 * batch * FLOAT)
    known = Collective("ids of samples", "all_gather", batch * INT)
    if plan.config.loss.visiting == "ring" and not plan.config.has_labels:
        hops = plan.world_size - 1
        sweeps = 1 if plan.config.loss.name == "siglip" else 2
        each = plan.rows * dim
        return [
            Collective("texts round the ring", "shift", sweeps * hops * each * wire),
            Collective("their gradients round the ring", "shift", hops * each * FLOAT),
            *([] if sweeps == 1 else [statistics]),
            known,
        ]
    sweep = [] if plan.config.loss.name in ("siglip", "one_vs_all") else [statistics]
    return [
        Collective("embeddings", "all_gather", rows * wire),
        Collective("their gradients", "all_to_all", rows * wire),
        *sweep,
        known,
    ]
