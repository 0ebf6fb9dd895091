"""Figures that other people published of their runs, beside what `nsphere estimate` says of them.

Speeds are bounds: an estimate leaves out reading, launches and whatever does not overlap, so no
published run may be faster. Memory of Partial-FC is another trainer's: ours must be lower, and rise
by what its rows take. Sources: LAION's large-openclip blog and scaling-laws tables, insightface's
arcface_torch/docs/speed_benchmark.md and README, the NeMo user guide.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.machine import print_table
from trainer.config import parse_config
from trainer.estimate import estimate, plan_run
from trainer.estimate.machines import find_gpu


@dataclass(frozen=True)
class Published:
    """A run as it was told of."""

    name: str
    gpu: str
    ranks: int  # GPUs of it
    batch: int  # of a GPU
    speed: float  # samples a second and GPU
    sections: dict[str, dict[str, Any]]
    classes: int = 0
    memory_mb: float = 0.0


def _clip(name: str, model: str, gpu: str, ranks: int, batch: int, speed: float) -> Published:
    return Published(name, gpu, ranks, batch, speed, {"model": {"name": model}})


def _face(classes: int, rate: float, speed: float, memory: float) -> Published:
    sections = {
        "model": {"name": "iresnet50", "embedding_dim": 512},
        "loss": {"name": "cosface"},
        "centers": {"num_classes": classes, "sample_rate": rate},
        "optim": {"name": "sgd"},
    }
    name = f"R50, {classes / 1e6:g} M identities, rate {rate:g}"
    return Published(name, "v100", 8, 128, speed, sections, classes, memory)


RUNS = (
    _clip("ViT-B/32, open_clip", "ViT-B-32", "a100-40", 128, 256, 850),
    _clip("ViT-B/16, open_clip", "ViT-B-16", "a100-40", 344, 256, 390),
    _clip("ViT-L/14, open_clip", "ViT-L-14", "a100-40", 396, 224, 101),
    _clip("ViT-H/14, open_clip", "ViT-H-14", "a100-40", 824, 96, 42),
    _clip("ViT-g/14, NeMo", "ViT-g-14", "a100", 128, 80, 67.4),
    _clip("ViT-g/14, NeMo", "ViT-g-14", "h100", 128, 80, 108.0),
    _face(1_000_000, 1.0, 3449 / 8, 9966),
    _face(4_000_000, 1.0, 1748 / 8, 23238),
    _face(1_000_000, 0.1, 4803 / 8, 5620),
    _face(4_000_000, 0.1, 4208 / 8, 8284),
    _face(16_000_000, 0.1, 2679 / 8, 19950),
    _face(29_000_000, 0.1, 1855 / 8, 32324),
)


def compare(runs: Sequence[Published] = RUNS) -> list[dict[str, Any]]:
    """Each published run and its estimate."""
    return [_compare(run) for run in runs]


def _compare(run: Published) -> dict[str, Any]:
    tree: dict[str, dict[str, Any]] = {
        **run.sections,
        "data": {"shards": "none.tar"},
        "train": {"global_batch_size": run.batch * run.ranks, "precision": "bf16"},
    }
    config = parse_config(tree, run.name)
    nodes = max(1, run.ranks // 8)
    plan = plan_run(
        config,
        find_gpu(run.gpu),
        nodes=nodes,
        ranks_per_node=run.ranks // nodes,
        samples=1,
        classes=run.classes,
    )
    found = estimate(plan)
    return {
        "name": run.name,
        "gpu": f"{run.ranks} {run.gpu}",
        "published_speed": run.speed,
        "bound": found.samples_per_second / plan.world_size,
        "published_mb": run.memory_mb,
        "estimated_mb": found.memory_bytes / 2**20,
    }


def print_published(lines: list[dict[str, Any]]) -> None:
    """The table."""
    rows = [
        (
            line["name"],
            line["gpu"],
            f"{line['published_speed']:.0f}",
            f"{line['bound']:.0f}",
            f"{line['published_speed'] / line['bound']:.0%}",
            f"{line['published_mb']:.0f}" if line["published_mb"] else "",
            f"{line['estimated_mb']:.0f}",
        )
        for line in lines
    ]
    header = ("run", "GPUs", "samples/s/GPU", "bound", "of it", "MB, theirs", "MiB, ours")
    print_table("Published runs beside the estimate of ours", header, rows)
