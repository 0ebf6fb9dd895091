"""What no two samples of a batch may share, kept by exchanging places.

A sample that meets its like in its batch changes places with one of another batch, where neither
then meets its own. The partner is drawn, so clusters lose members only where they must. What has
more samples than there are batches cannot be kept apart: what is left is counted, never dropped.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data.negatives.columns import SampleColumns
from data.negatives.layout import BatchShape, Layout
from data.order import derive_key

Int64s = NDArray[np.int64]
Bools = NDArray[np.bool_]

_PARTNER = 39  # what a key is for
_ROUNDS, _PATIENCE, _SEARCHED = 64, 6, 64


class Rule(NamedTuple):
    """Samples of equal value stay apart."""

    values: Int64s  # (N,) by sample id
    nothing: int
    """The value of samples that are like no other."""


class Rules(NamedTuple):
    """All rules of a plan, and what its first batch holds already."""

    rules: tuple[Rule, ...]
    avoid: Int64s

    @classmethod
    def of(cls, unique: Sequence[str], columns: SampleColumns, avoid: Int64s) -> "Rules":
        """Rules by their names in `negatives.unique`; DataError where a column is missing."""
        found = []
        for name, column, nothing in (("label", "labels", -1), ("caption", "captions", 0)):
            if name in unique:
                what_for = f'negatives.unique = ["{name}"]'
                found.append(Rule(columns.need(column, what_for), nothing))
        return cls(tuple(found), np.asarray(avoid, np.int64))


class _Places:
    """Values by place, one row a rule, and which (batch, value) there are."""

    def __init__(self, order: Int64s, shape: BatchShape, rules: Rules) -> None:
        edges = shape.edges()
        self.num_batches = len(edges) - 1
        self.batches = np.repeat(np.arange(self.num_batches), np.diff(edges))
        self.order = order.copy()
        self.moved = np.zeros(len(order), np.bool_)
        held = rules.avoid if shape.lead else rules.avoid[:0]
        pairs = [
            _codes(rule.values[order], rule.values[held], rule.nothing) for rule in rules.rules
        ]
        if len(held):
            own = np.where(np.isin(order, held), order, -1)
            pairs.append(_codes(own, held, -1))
        self.codes = [places for places, _ in pairs]
        self.held = [known[known >= 0] for _, known in pairs]

    def keys(self, batches: Int64s, codes: Int64s) -> Int64s:
        """One number a (batch, value); -1 where the value is none."""
        return np.where(codes >= 0, codes * self.num_batches + batches, -1)

    def present(self, rule: int) -> Int64s:
        """Sorted keys of everything in the batches, repeated where it is there twice."""
        keys = self.keys(self.batches, self.codes[rule])
        held = self.keys(np.zeros_like(self.held[rule]), self.held[rule])
        return np.sort(np.concatenate([keys[keys >= 0], held]))

    def conflicts(self) -> Int64s:
        """Places whose sample meets its like at an earlier place of the batch, or before it."""
        bad = np.zeros(len(self.order), np.bool_)
        for rule, codes in enumerate(self.codes):
            keys = self.keys(self.batches, codes)
            has = np.flatnonzero(keys >= 0)
            sequence = has[np.argsort(keys[has], kind="stable")]
            bad[sequence[1:][keys[sequence[1:]] == keys[sequence[:-1]]]] = True
            held = self.keys(np.zeros_like(self.held[rule]), self.held[rule])
            bad |= np.isin(keys, held)
        return np.flatnonzero(bad)

    def exchange(self, ones: Int64s, others: Int64s) -> int:
        """Exchange pairs of places where that makes no new conflict; how many were."""
        if not len(ones):
            return 0
        good = self.batches[ones] != self.batches[others]
        good &= ~np.isin(others, ones) & _first(others)
        added = []
        for rule, codes in enumerate(self.codes):
            present = self.present(rule)
            there = self.keys(self.batches[others], codes[ones])
            here = self.keys(self.batches[ones], codes[others])
            good &= ~_within(present, there) & ~_within(present, here)
            added.append((there, here))
        ones, others = ones[good], others[good]
        keep = np.ones(len(ones), np.bool_)
        for there, here in added:
            both = np.stack([there[good], here[good]], axis=1).reshape(-1)
            keep &= (_first(both) | (both < 0)).reshape(-1, 2).all(axis=1)
        ones, others = ones[keep], others[keep]
        for values in (self.order, *self.codes):
            values[ones], values[others] = values[others], values[ones]
        self.moved[ones] = self.moved[others] = True
        return len(ones)

    def search(self, place: int) -> bool:
        """Try every partner of one place."""
        good = self.batches != self.batches[place]
        for rule, codes in enumerate(self.codes):
            present = self.present(rule)
            there = self.keys(self.batches, np.broadcast_to(codes[place], codes.shape))
            here = self.keys(np.broadcast_to(self.batches[place], codes.shape), codes)
            good &= ~_within(present, there) & ~_within(present, here)
        partners = np.flatnonzero(good)
        return bool(len(partners) and self.exchange(np.array([place]), partners[:1]))


def keep_apart(
    layout: Layout, shape: BatchShape, rules: Rules, seed: int
) -> tuple[Layout, int]:  # and samples that still meet their like
    """The layout with its rules kept as far as they can be."""
    if not rules.rules and not (shape.lead and len(rules.avoid)):
        return layout, 0
    places = _Places(layout.order, shape, rules)
    bad, idle = places.conflicts(), 0
    for number in range(_ROUNDS):
        if not len(bad) or idle == _PATIENCE:
            break
        keys = derive_key(seed, _PARTNER, number, bad) % np.uint64(len(layout.order))
        exchanged = places.exchange(bad, keys.astype(np.int64))
        idle = 0 if 100 * exchanged > len(bad) else idle + 1
        bad = places.conflicts()
    for place in bad[:_SEARCHED].tolist():
        places.search(place)
    return _rebound(layout, places), len(places.conflicts())


def _rebound(layout: Layout, places: _Places) -> Layout:
    """A sample that moved is no member of the cluster it came to: it goes to that one's end."""
    if not places.moved.any():
        return layout
    pieces = np.repeat(np.arange(len(layout.bounds) - 1), np.diff(layout.bounds))
    sequence = np.lexsort([places.moved, pieces])  # stable, and pieces lie in one batch
    alone = np.flatnonzero(places.moved[sequence])
    bounds = np.unique(np.concatenate([layout.bounds, alone, alone + 1]))
    return Layout(places.order[sequence], bounds, layout.torn)


def _codes(values: Int64s, held: Int64s, nothing: int) -> tuple[Int64s, Int64s]:
    """Values as numbers from 0 on, -1 for `nothing`, of places and of what is held already."""
    both = np.concatenate([values, held])
    codes = np.unique(both, return_inverse=True)[1].astype(np.int64)
    codes[both == nothing] = -1
    return codes[: len(values)].copy(), codes[len(values) :]


def _first(values: Int64s) -> Bools:
    """Whether each is the first of its value."""
    first = np.zeros(len(values), np.bool_)
    first[np.unique(values, return_index=True)[1]] = True
    return first


def _within(present: Int64s, keys: Int64s) -> Bools:
    if not len(present):
        return np.zeros(len(keys), np.bool_)
    found = np.searchsorted(present, keys).clip(max=len(present) - 1)
    return (present[found] == keys) & (keys >= 0)
