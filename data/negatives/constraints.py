"""What no two samples of a batch may share, kept by exchanging places.

A sample that meets its like in its batch changes places with one of another batch, where neither
then meets its own. The partner is drawn, so clusters lose members only where they must. What has
more samples than there are batches cannot be kept apart: what is left is counted, never dropped. A
sample that the first batch holds already comes later all the same, whatever else it then meets.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data.label_lists import LabelLists
from data.negatives.columns import SampleColumns
from data.negatives.layout import BatchShape, Layout
from data.order import derive_key

Int64s = NDArray[np.int64]
Bools = NDArray[np.bool_]

_PARTNER = 39  # what a key is for
_ROUNDS, _PATIENCE, _SEARCHED = 64, 6, 64


class Rule(NamedTuple):
    """Samples that share a value stay apart."""

    values: Int64s | LabelLists
    """By sample id: one each, or a list."""
    nothing: int = -1
    """The value of samples that are like no other, where each has one."""

    def of(self, samples: Int64s) -> tuple[Int64s, Int64s]:  # (n,), (nnz,)
        """How many values these samples have, and which."""
        if isinstance(self.values, LabelLists):
            lists = self.values.of(samples)
            return lists.counts, lists.ids.astype(np.int64)
        found = self.values[samples]
        has = found != self.nothing
        return has.astype(np.int64), found[has]


class Rules(NamedTuple):
    """All rules of a plan, and what its first batch holds already."""

    rules: tuple[Rule, ...]
    avoid: Int64s

    @classmethod
    def of(cls, unique: Sequence[str], columns: SampleColumns, avoid: Int64s) -> "Rules":
        """Rules by their names in `negatives.unique`; DataError where a column is missing."""
        found = []
        if "label" in unique and columns.lists is not None and columns.labels is None:
            found.append(Rule(columns.lists))
            unique = [name for name in unique if name != "label"]
        for name, column, nothing in (("label", "labels", -1), ("caption", "captions", 0)):
            if name in unique:
                what_for = f'negatives.unique = ["{name}"]'
                found.append(Rule(columns.need(column, what_for), nothing))
        return cls(tuple(found), np.asarray(avoid, np.int64))


class _Places:
    """Values by place, and which (batch, value) there are."""

    def __init__(self, order: Int64s, shape: BatchShape, rules: Rules) -> None:
        edges = shape.edges()
        self.num_batches = len(edges) - 1
        self.batches = np.repeat(np.arange(self.num_batches), np.diff(edges))
        self.order = order.copy()
        self.moved = np.zeros(len(order), np.bool_)
        held = rules.avoid if shape.lead else rules.avoid[:0]
        found = [_code(rule, order, held) for rule in rules.rules]
        if len(held):
            itself = np.full(int(max(order.max(), held.max())) + 1, -1, np.int64)
            itself[held] = held
            found.append(_code(Rule(itself), order, held))
        self._rows = np.arange(len(order))  # of the lists, by place
        self._lists = [lists for lists, _ in found]
        self._held = [codes for _, codes in found]

    @property
    def rules(self) -> range:
        """Numbers of the rules."""
        return range(len(self._lists))

    def read(self, rule: int, places: Int64s) -> tuple[Int64s, Int64s]:  # (nnz,), (nnz,)
        """The values of places, by their number among these places."""
        lists = self._lists[rule].of(self._rows[places])
        return np.repeat(np.arange(len(places)), lists.counts), lists.ids.astype(np.int64)

    def keys(self, batches: Int64s | int, codes: Int64s | int) -> Int64s:
        """One number a (batch, value)."""
        return np.asarray(codes * self.num_batches + batches, np.int64)

    def present(self, rule: int) -> Int64s:
        """Sorted keys of everything in the batches, repeated where it is there twice."""
        owners, codes = self.read(rule, np.arange(len(self.order)))
        keys = self.keys(self.batches[owners], codes)
        return np.sort(np.concatenate([keys, self.keys(0, self._held[rule])]))

    def conflicts(self) -> Int64s:
        """Places whose sample meets its like at an earlier place of the batch, or before it."""
        bad = np.zeros(len(self.order), np.bool_)
        for rule in self.rules:
            owners, codes = self.read(rule, np.arange(len(self.order)))
            keys = self.keys(self.batches[owners], codes)
            sequence = np.argsort(keys, kind="stable")
            again = keys[sequence[1:]] == keys[sequence[:-1]]
            bad[owners[sequence[1:][again]]] = True
            bad[owners[np.isin(keys, self.keys(0, self._held[rule]))]] = True
        return np.flatnonzero(bad)

    def exchange(self, ones: Int64s, others: Int64s) -> int:
        """Exchange pairs of places where that makes no new conflict; how many were."""
        if not len(ones):
            return 0
        good = self.batches[ones] != self.batches[others]
        good &= ~np.isin(others, ones) & _first(others)
        added = []
        for rule in self.rules:
            present = self.present(rule)
            there, here = self.read(rule, ones), self.read(rule, others)
            pairs = np.concatenate([there[0], here[0]])
            to = np.concatenate([self.batches[others][there[0]], self.batches[ones][here[0]]])
            keys = self.keys(to, np.concatenate([there[1], here[1]]))
            good[pairs[_within(present, keys)]] = False
            added.append((pairs, keys))
        keep = good.copy()
        for pairs, keys in added:
            mine = np.flatnonzero(good[pairs])
            mine = mine[np.argsort(pairs[mine], kind="stable")]
            keep[pairs[mine[~_first(keys[mine])]]] = False
        ones, others = ones[keep], others[keep]
        for values in (self.order, self._rows):
            values[ones], values[others] = values[others], values[ones]
        self.moved[ones] = self.moved[others] = True
        return len(ones)

    def search(self, place: int) -> bool:
        """Try every partner of one place."""
        own = self.batches[place]
        good = self.batches != own
        for rule in self.rules:
            present = self.present(rule)
            for code in self.read(rule, np.array([place]))[1].tolist():
                there = self.keys(np.arange(self.num_batches), code)
                good &= ~_within(present, there)[self.batches]
            owners, codes = self.read(rule, np.arange(len(self.order)))
            good[owners[_within(present, self.keys(own, codes))]] = False
        partners = np.flatnonzero(good)
        return bool(len(partners) and self.exchange(np.array([place]), partners[:1]))


def keep_apart(
    layout: Layout, shape: BatchShape, rules: Rules, seed: int
) -> tuple[Layout, int]:  # and samples that still meet their like
    """The layout with its rules kept as far as they can be."""
    if not rules.rules and not (shape.lead and len(rules.avoid)):
        return layout, 0
    places = _Places(layout.order, shape, rules)
    _exchange_all(places, seed)
    order, moved = places.order, places.moved
    if rules.rules and shape.lead and len(rules.avoid):  # what can be kept apart always must be
        alone = _Places(order, shape, Rules((), rules.avoid))
        _exchange_all(alone, seed)
        order, moved = alone.order, moved | alone.moved
    layout = _rebound(layout, order, moved)
    return layout, len(_Places(layout.order, shape, rules).conflicts())


def _exchange_all(places: _Places, seed: int) -> None:
    bad, idle = places.conflicts(), 0
    for number in range(_ROUNDS):
        if not len(bad) or idle == _PATIENCE:
            break
        keys = derive_key(seed, _PARTNER, number, bad) % np.uint64(len(places.order))
        exchanged = places.exchange(bad, keys.astype(np.int64))
        idle = 0 if 100 * exchanged > len(bad) else idle + 1
        bad = places.conflicts()
    for place in bad[:_SEARCHED].tolist():
        places.search(place)


def _rebound(layout: Layout, order: Int64s, moved: Bools) -> Layout:
    """A sample that moved is no member of the cluster it came to: it goes to that one's end."""
    if not moved.any():
        return layout
    pieces = np.repeat(np.arange(len(layout.bounds) - 1), np.diff(layout.bounds))
    sequence = np.lexsort([moved, pieces])  # stable, and pieces lie in one batch
    alone = np.flatnonzero(moved[sequence])
    bounds = np.unique(np.concatenate([layout.bounds, alone, alone + 1]))
    return Layout(order[sequence], bounds, layout.torn)


def _code(rule: Rule, order: Int64s, held: Int64s) -> tuple[LabelLists, Int64s]:
    """Values as numbers from 0 on, of each place and of what is held already."""
    counts, values = rule.of(order)
    codes = np.unique(np.concatenate([values, rule.of(held)[1]]), return_inverse=True)[1]
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    return LabelLists(offsets, codes[: len(values)].astype(np.int32)), codes[len(values) :]


def _first(values: Int64s) -> Bools:
    """Whether each is the first of its value."""
    first = np.zeros(len(values), np.bool_)
    first[np.unique(values, return_index=True)[1]] = True
    return first


def _within(present: Int64s, keys: Int64s) -> Bools:
    if not len(present):
        return np.zeros(len(keys), np.bool_)
    found = np.searchsorted(present, keys).clip(max=len(present) - 1)
    return present[found] == keys
