"""What is planned: the configuration on so many ranks, and how much data there is."""

from dataclasses import dataclass
from functools import cached_property

import pyarrow.parquet as pq

from data.errors import DataError
from data.label_table import find_label_table
from data.shards import expand_shards
from data.table import index_paths
from trainer.config import Config, ConfigError
from trainer.estimate.machines import Machine


@dataclass(frozen=True)
class Plan:
    """A run on `nodes` times `ranks_per_node` ranks, each on a `machine`."""

    config: Config
    nodes: int
    ranks_per_node: int
    machine: Machine
    num_samples: int
    """Of an epoch; 0: not known."""
    num_classes: int
    """Class centers, or labels; 0: none, or not known."""

    @property
    def world_size(self) -> int:
        """W."""
        return self.nodes * self.ranks_per_node

    @property
    def rows(self) -> int:
        """Samples of the rank that has most."""
        return -(-self.config.train.global_batch_size // self.world_size)

    @property
    def share_of_classes(self) -> int:
        """Centers or labels of the rank that has most."""
        return -(-self.num_classes // self.world_size)

    @property
    def label_rows(self) -> int:
        """Label texts that a rank embeds in a step; 0: none."""
        if not self.config.has_labels or self.config.labels.rows != "texts":
            return 0
        if self.config.labels.over == "all":
            return self.share_of_classes
        brought = self.rows * (1 + self.config.negatives.explicit)
        return max(self.rows, min(brought, self.num_classes))

    @property
    def num_chunks(self) -> int:
        """Passes of the towers over a rank's inputs, as `trainer.train` cuts them."""
        longest = max(self.rows, self.label_rows)
        chunks = -(-longest // (self.config.train.chunk_size or longest))
        if longest == self.rows:
            chunks = min(chunks, self.config.train.global_batch_size // self.world_size)
        return max(1, chunks)

    @cached_property
    def steps_of_an_epoch(self) -> float:
        """Not rounded; 0: not known."""
        return self.num_samples / self.config.train.global_batch_size

    @property
    def total_steps(self) -> int:
        """Of the whole run; 0: not known."""
        duration, batch = self.config.train.duration, self.config.train.global_batch_size
        if duration.unit == "epochs" and not self.num_samples:
            return 0
        return duration.to_steps(batch, self.num_samples)


def plan_run(
    config: Config,
    machine: Machine,
    *,
    nodes: int = 1,
    ranks_per_node: int = 1,
    samples: int = 0,
    classes: int = 0,
) -> Plan:
    """The plan; counts that are not given are looked for in indexes that exist, never scanned for.

    Raises ConfigError where a number that memory hangs on cannot be known.
    """
    if nodes < 1 or ranks_per_node < 1:
        raise ConfigError(f"{nodes} nodes x {ranks_per_node} ranks: at least one of each")
    if nodes * ranks_per_node > config.train.global_batch_size:
        raise ConfigError(
            f"{nodes * ranks_per_node} ranks for train.global_batch_size = "
            f"{config.train.global_batch_size}: some would have no sample; take fewer ranks, or "
            "raise the batch"
        )
    samples = samples or count_samples(config)
    return Plan(config, nodes, ranks_per_node, machine, samples, classes or _classes(config))


def count_samples(config: Config) -> int:
    """Rows of the shards' index files; 0 where one is missing."""
    total = 0
    try:
        for source in config.data.all_sources():
            for shard in expand_shards(source.shards):
                path = next((path for path in index_paths(shard) if path.is_file()), None)
                if path is None:
                    return 0
                total += pq.ParquetFile(path).metadata.num_rows
    except (DataError, OSError, ValueError):
        return 0
    return total


def _classes(config: Config) -> int:
    if config.has_labels:
        return _labels(config)
    if not config.has_centers:
        return 0
    if not config.centers.num_classes:
        raise ConfigError(
            "centers.num_classes is not set, and only the data could say: give --classes N"
        )
    return config.centers.num_classes * config.centers.classes_per_label


def _labels(config: Config) -> int:
    try:
        shards = [
            shard for source in config.data.all_sources() for shard in expand_shards(source.shards)
        ]
        path = find_label_table(shards, config.labels.table)
        return int(pq.ParquetFile(path).metadata.num_rows)
    except (DataError, OSError, ValueError) as error:
        raise ConfigError(f"the label table is not here ({error}): give --classes N") from None
