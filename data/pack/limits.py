"""Where a shard ends. Imports nothing: the command line shows these before anything heavy loads."""

from typing import NamedTuple

MAX_SAMPLES = 10_000
MAX_BYTES = 1 << 30


class ShardLimits(NamedTuple):
    """A shard ends before it would hold more than either."""

    max_samples: int = MAX_SAMPLES
    max_bytes: int = MAX_BYTES


LIMITS = ShardLimits()
