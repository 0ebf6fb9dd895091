"""Mixing sources: closed form, each source in its own order, shares as the weights say."""

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.mix import CYCLE, Mix, cycle_shares

WEIGHTS = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=6)


@settings(max_examples=40, deadline=None)
@given(weights=WEIGHTS, start=st.integers(0, 2**40), size=st.integers(1, 3000))
def test_sources_count_up_without_a_gap(weights, start, size):
    mix = Mix(weights)
    sources, places = mix.split(np.arange(start, start + size))
    for source in range(len(weights)):
        mine = places[sources == source]
        first = mix.taken(source, start)
        assert (mine == np.arange(first, first + len(mine))).all()
        assert mix.taken(source, start + size) == first + len(mine)


@settings(max_examples=40, deadline=None)
@given(weights=WEIGHTS, size=st.integers(1, 5000), step=st.integers(0, 10**6))
def test_batch_of_finds_the_batch_and_quotas_hold(weights, size, step):
    mix = Mix(weights)
    sources, places = mix.split(np.arange(step * size, (step + 1) * size))
    for source in np.unique(sources):
        mine = places[sources == source]
        assert len(mine) <= mix.largest_quota(int(source), size)
        batch_of = mix.batch_of(int(source), size)
        assert batch_of(int(mine[0])) == batch_of(int(mine[-1])) == (mine[0], mine[-1] + 1)


@pytest.mark.parametrize("weights", [[1, 1], [0.7, 0.2, 0.1], [5, 3, 1, 1e-3], [1] * 7])
@pytest.mark.parametrize("stride", [1, 2, 3, 8])
def test_shares_of_any_batch_and_rank_follow_the_weights(weights, stride):
    shares = np.array(weights) / sum(weights)
    sources = Mix(weights).split(np.arange(400_000))[0]
    for size in (64, 1000, 4096):
        rows = sources[: len(sources) // (size * stride) * size * stride].reshape(-1, size, stride)
        counts = np.stack([(rows == s).sum(axis=1) for s in range(len(weights))], axis=-1)
        assert np.abs(counts - size * shares).max() <= 6


def test_a_cycle_is_exact_and_rare_sources_are_not_forgotten():
    for weights in ([1.0], [0.25, 0.75], [1, 1e-12], [1] * 1000, [3, 2, 2]):
        shares = cycle_shares(weights)
        assert shares.sum() == CYCLE and shares.min() >= 1
        exact = np.array(weights) / sum(weights) * CYCLE
        assert np.abs(shares - exact).max() <= 1
        counts = np.bincount(Mix(weights).split(np.arange(CYCLE))[0], minlength=len(weights))
        assert (counts == shares).all()


def test_golden_mix():
    sources = Mix([0.5, 0.3, 0.2]).split(np.arange(5000))[0]
    assert hashlib.sha256(sources.astype("<i8").tobytes()).hexdigest()[:16] == "15faa2347f3bfa21"


@pytest.mark.parametrize("weights", [[], [1, 0], [1, -2], [float("nan")], [float("inf"), 1]])
def test_weights_must_be_positive(weights):
    with pytest.raises(ValueError, match="positive"):
        Mix(weights)
