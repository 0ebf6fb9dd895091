import math
from itertools import pairwise

import pytest
from pydantic import ValidationError

from trainer.config import ScheduleConfig
from trainer.schedule import learning_rate

B = 64


def factors(config, total_steps, epoch_samples=0):
    """The factor of every step of a run, by step."""
    return [
        learning_rate(
            config, step * B, total_steps * B, global_batch_size=B, epoch_samples=epoch_samples
        )
        for step in range(total_steps + 1)
    ]


def test_cosine_is_open_clips_at_every_step():
    def open_clip(step, warmup, total):
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))

    found = factors(ScheduleConfig(name="cosine", warmup="10 steps"), 100)[:100]
    assert found == pytest.approx([open_clip(s, 10, 100) for s in range(100)], abs=1e-15)


def test_cosine_at_its_exact_points():
    found = factors(ScheduleConfig(name="cosine", warmup="4 steps", floor=0.1), 24)
    assert found[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert found[14] == pytest.approx(0.55, abs=1e-15)  # half way: the mean of peak and floor
    assert found[24] == pytest.approx(0.1, abs=1e-15)


def test_constant_stays_at_the_peak():
    assert (
        factors(ScheduleConfig(name="constant", warmup="2 steps", floor=0.3), 6) == [0.5] + [1] * 6
    )


@pytest.mark.parametrize("power", [1.0, 2.0, 0.5])
def test_polynomial_is_insightfaces_but_for_its_warm_up(power):
    def insightface(step, warmup, total):  # its first steps: base rate, 1 / warmup, 2 / warmup, ...
        return (1 - (step - warmup) / (total - warmup)) ** power

    config = ScheduleConfig(name="polynomial", warmup="10 steps", power=power)
    found = factors(config, 100)
    assert found[:10] == pytest.approx([(s + 1) / 10 for s in range(10)], abs=1e-15)
    assert found[10:] == pytest.approx([insightface(s, 10, 100) for s in range(10, 101)], abs=1e-15)


def test_polynomial_at_its_exact_points():
    linear = factors(ScheduleConfig(name="polynomial", warmup="4 steps", floor=0.1), 24)
    assert linear[3:5] == [1.0, 1.0]
    assert linear[14] == pytest.approx(0.55, abs=1e-15)
    square = factors(ScheduleConfig(name="polynomial", power=2.0), 8)
    assert square == pytest.approx([((8 - s) / 8) ** 2 for s in range(9)], abs=1e-15)


def test_wsd_is_linear_over_its_cooldown():
    config = ScheduleConfig(name="wsd", warmup="2 steps", cooldown="4 steps", floor=0.2)
    assert factors(config, 10) == pytest.approx(
        [0.5, 1, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2], abs=1e-15
    )


def test_rsqrt_is_big_visions_with_its_warm_up_as_timescale():
    def big_vision(step, warmup, timescale):
        return 1 / math.sqrt(1 + (step - warmup) / timescale)

    found = factors(ScheduleConfig(name="rsqrt", warmup="4 steps"), 64)
    assert found[3:64] == pytest.approx(
        [1] + [big_vision(s, 4, 4) for s in range(4, 64)], abs=1e-15
    )
    assert found[16] == 0.5


def test_rsqrt_with_floor_and_cooldown():
    floored = factors(ScheduleConfig(name="rsqrt", warmup="4 steps", floor=0.5), 64)
    assert min(floored[16:]) == max(floored[16:]) == 0.5
    cooled = factors(ScheduleConfig(name="rsqrt", warmup="4 steps", cooldown="48 steps"), 64)
    assert cooled[16] == 0.5
    assert cooled[40] == pytest.approx(0.25, abs=1e-15)
    assert cooled[64] == 0.0


@pytest.mark.parametrize("name", ["cosine", "wsd", "rsqrt", "polynomial"])
def test_never_above_the_peak_or_below_the_floor_and_falling_after_warm_up(name):
    config = ScheduleConfig(name=name, warmup="7 steps", cooldown="20 steps", floor=0.05)
    found = factors(config, 100)
    assert found[:7] == pytest.approx([(s + 1) / 7 for s in range(7)])
    assert all(later <= earlier for earlier, later in pairwise(found[7:]))
    assert found[-1] == pytest.approx(0.05, abs=1e-15)
    after = learning_rate(config, 10**9, 100 * B, global_batch_size=B)
    assert after == pytest.approx(0.05, abs=1e-15)


def test_durations_in_samples_steps_and_epochs_are_one():
    steps = ScheduleConfig(warmup="10 steps")
    samples = ScheduleConfig(warmup="640 samples")
    epochs = ScheduleConfig(warmup="2 epochs")
    assert factors(steps, 50) == factors(samples, 50) == factors(epochs, 50, epoch_samples=320)


def test_depends_on_samples_not_on_the_batch_after_warm_up():
    config = ScheduleConfig(warmup="640 samples", floor=0.1)
    one = learning_rate(config, 12800, 64000, global_batch_size=64)
    other = learning_rate(config, 12800, 64000, global_batch_size=1024)
    assert one == other


def test_a_batch_larger_than_the_warm_up_starts_at_the_peak():
    config = ScheduleConfig(warmup="10 samples")
    assert learning_rate(config, 0, 6400, global_batch_size=64) == 1.0


def test_a_run_shorter_than_its_warm_up_only_warms_up():
    found = factors(ScheduleConfig(name="wsd", warmup="100 steps", cooldown="100 steps"), 10)
    assert found == pytest.approx([(s + 1) / 100 for s in range(11)])


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"name": "wsd"}, "cooldown"),
        ({"name": "rsqrt"}, "warmup"),
        ({"warmup": "3 minutes"}, "minutes"),
    ],
)
def test_a_schedule_says_which_duration_it_lacks(fields, word):
    with pytest.raises(ValidationError, match=word):
        ScheduleConfig(**fields)
