"""Learning rate as a pure function of samples seen; nothing else, and no state."""

import math

from trainer.config import ScheduleConfig


def learning_rate(
    config: ScheduleConfig,
    samples_seen: int,
    total_samples: int,
    *,
    global_batch_size: int,
    epoch_samples: int = 0,
) -> float:
    """Factor of the peak learning rate for the step that starts after `samples_seen` samples.

    Warm-up of w samples is linear in the samples seen when the step ends, so that the first step
    moves and the step that ends on w has the peak: (samples_seen + batch) / w, as open_clip's
    (step + 1) / warmup. What follows is measured when the step starts, `t = samples_seen - w`:

    - cosine: floor + (1 - floor) (1 + cos(pi t / (total - w))) / 2, open_clip's at floor 0;
    - polynomial: floor + (1 - floor) (1 - t / (total - w)) ** power, insightface's at floor 0;
    - constant: 1;
    - wsd: 1, then linear to the floor over the last `cooldown`;
    - rsqrt: sqrt(w / samples_seen), at least the floor; big_vision's with `timescale = w`; then
      linear to the floor over the last `cooldown`.

    At and after `total_samples` it is the floor, except for `constant` and for rsqrt with no
    cooldown. Warm-up goes first where the run is too short for everything. `epoch_samples` is
    needed for durations in epochs only.
    """
    warmup = config.warmup.to_samples(global_batch_size, epoch_samples)
    cooldown = config.cooldown.to_samples(global_batch_size, epoch_samples)
    if samples_seen < warmup:
        return min(1.0, (samples_seen + global_batch_size) / warmup)
    if config.name == "constant":
        return 1.0
    if config.name in ("cosine", "polynomial"):
        done = min(1.0, (samples_seen - warmup) / max(1, total_samples - warmup))
        return config.floor + (1 - config.floor) * _fall(config, done)
    cooldown_start = max(warmup, total_samples - cooldown)
    factor = _plateau(
        config, min(samples_seen, cooldown_start) if cooldown else samples_seen, warmup
    )
    if samples_seen <= cooldown_start or not cooldown:
        return factor
    done = min(1.0, (samples_seen - cooldown_start) / max(1, total_samples - cooldown_start))
    return factor + (config.floor - factor) * done


def _fall(config: ScheduleConfig, done: float) -> float:
    """From 1 to 0."""
    if config.name == "cosine":
        return 0.5 * (1 + math.cos(math.pi * done))
    left: float = (1 - done) ** config.power
    return left


def _plateau(config: ScheduleConfig, samples_seen: int, warmup: int) -> float:
    if config.name == "wsd":
        return 1.0
    return max(config.floor, math.sqrt(warmup / samples_seen))
