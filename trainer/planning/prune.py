"""Removes the plans that nothing can need any more: RUN/plans would grow for ever.

A run may go on from any whole checkpoint. From the one at position p it reads the plans of p's
epoch, for what comes and for what the epoch has seen; it may shuffle the clusters of the last plan
that the checkpoint knows; and it takes the later ones, of an earlier life, instead of making them
again. Versions rise along the order, so what is older than the first of these for every whole
checkpoint is needed by none.
"""

import logging
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from data.planned_order import Segment
from trainer.checkpoint import CheckpointError, is_finished, list_steps, load_state, step_name
from trainer.durable import remove

_NAME = re.compile(r"\.?(?:removing-)?plan-(\d+)(?:-from-\d+)?(?:\..*draft)?")

logger = logging.getLogger("nsphere.planning")


def remove_old_plans(plans: Path, checkpoints: Path, num_samples: int) -> list[str]:
    """Remove plans, and leftovers of such, that no whole checkpoint needs; the names of plans.

    A removal that is cut short is taken up by the next one. Raises OSError where the disk refuses.
    """
    first = min(_needed_by(checkpoints, num_samples), default=0)
    removed = []
    for path in sorted(plans.iterdir()):
        match = _NAME.fullmatch(path.name)
        if match is None or int(match[1]) >= first:
            continue
        hidden = path
        if not path.name.startswith("."):  # half a removal must not look like a torn plan
            hidden = path.with_name(f".removing-{path.name}")
            remove(hidden)
            path.rename(hidden)
            removed.append(path.name)
        remove(hidden)
    if removed:
        logger.info("removed %s: no checkpoint needs them", ", ".join(removed))
    return removed


def needed_segments(segments: Sequence[Segment], position: int, num_samples: int) -> list[Segment]:
    """Those with plans that going on from `position` may need."""
    start = position // num_samples * num_samples
    planned = [segment for segment in segments if segment.plan]
    return [segment for segment in planned[:-1] if segment.stop > start] + planned[-1:]


def first_needed(segments: Sequence[Segment], position: int, num_samples: int) -> int:
    """The lowest version of a plan that going on from `position` may need; 0: none is known."""
    needed = needed_segments(segments, position, num_samples)
    return min((segment.version for segment in needed), default=0)


def _needed_by(checkpoints: Path, num_samples: int) -> Iterable[int]:
    """`first_needed` of each whole checkpoint; one that cannot be read, nobody goes on from."""
    for step in list_steps(checkpoints):
        path = checkpoints / step_name(step)
        if not is_finished(path):
            continue
        try:
            state = load_state(path)
        except (CheckpointError, OSError):
            continue
        segments = [Segment(*segment) for segment in state.planning.get("segments", ())]
        yield first_needed(segments, state.samples_seen, num_samples)
