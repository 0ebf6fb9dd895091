"""The plans of a run for people: what each is of, how it mixes, and what it costs to read."""

from collections.abc import Iterator
from pathlib import Path

from data.dataset import SampleSet
from data.planned_order import Segment
from data.reading_report import measure_reading
from trainer.checkpoint import find_checkpoint, load_state
from trainer.config import Config, ConfigError


def load_plans(run: Path, samples: SampleSet) -> None:
    """Give `samples` the order of a run's newest checkpoint.

    Raises ConfigError for a run or a configuration without planned batches, CheckpointError where
    there is no whole checkpoint, DataError for plans that it needs and that are torn or of other
    data.
    """
    state = load_state(find_checkpoint(run))
    if samples.planned is None or not state.planning:
        raise ConfigError(
            f"{run}: its batches are not planned, or these are not: give the run's own "
            'config.toml, with data.batching = "planned"'
        )
    segments = [Segment(*segment) for segment in state.planning["segments"]]
    samples.planned.start(run / "plans", segments, position=state.samples_seen)


def describe_plans(samples: SampleSet, config: Config) -> Iterator[str]:
    """Lines: the plain order first, then every segment of the order."""
    batch = config.train.global_batch_size
    planned = samples.planned
    if planned is None:
        return
    for segment in planned.segments:
        stop = min(segment.stop, segment.start + samples.num_samples)
        first = -(-segment.start // batch) + 1
        told = f"steps {first} to {stop // batch}"
        if segment.plan and not (planned.folder / segment.plan).exists():
            yield f"{told}: {segment.plan}, removed since: no checkpoint needs it"
            continue
        yield f"{told}: {_describe(samples, segment)}"
        if (first - 1) * batch + batch <= stop:
            start = segment.start
            yield f"  {measure_reading(samples, config.data, batch, start=start, stop=stop)}"


def _describe(samples: SampleSet, segment: Segment) -> str:
    if not segment.plan or samples.planned is None:
        return "in the plain order"
    header = samples.planned.plan(segment).header
    return (
        f"{segment.plan}, asked for at step {segment.asked_step}: {header.num_samples:,} samples "
        f"in {header.num_clusters:,} clusters of up to {header.knobs['cluster_size']} "
        f"({header.num_torn:,} torn), {header.num_random:,} alone, {header.num_unseen:,} unseen, "
        f"{header.num_broken:,} against negatives.unique"
    )
