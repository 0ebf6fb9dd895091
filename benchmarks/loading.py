"""`python -m benchmarks.loading [--json]`: tar -> batch beside webdataset with open_clip's steps.

What one worker does for a batch, in one thread, by its processor time, which other people's work on
the machine changes least; in interleaved rounds of one run, the ratio being the median of theirs.
The pictures are drawn here, with the bytes per pixel of photographs. The peer is webdataset's own
iterator with open_clip's steps: open_clip's pipeline itself does not run on webdataset 1.0.
"""

import argparse
import io
import json
import os
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.machine import commit, load, machine, print_table
from data.augment import ImageTransform
from data.config import AugmentConfig, DataConfig
from data.dataset import SampleSet
from data.index import load_index
from data.loader import TrainLoader
from data.order import Order, report
from data.text import TokenizerSpec

BATCH = 256
SHUFFLE_BUFFER = 1000


@dataclass(frozen=True)
class Task:
    """A kind of data and what both sides make of it."""

    name: str
    width: int
    height: int
    quality: int
    noise: float
    """Standard deviation of the pixel noise, which sets the bytes per pixel."""
    size: int
    """Pixels of the model's input."""
    captions: bool
    crop: bool
    """A random resized crop of 90-100 % of the area; else the whole picture."""
    num_samples: int
    wanted: float
    """Ratio that issue 2 asks for."""


TASKS = (
    Task("clip 500x375, crop to 224", 500, 375, 90, 6.8, 224, True, True, 1024, 3.0),
    Task("faces 112x112, whole", 112, 112, 95, 4.1, 112, False, False, 4096, 5.0),
    Task("faces 112x112, crop", 112, 112, 95, 4.1, 112, False, True, 4096, 5.0),
)


def draw_picture(task: Task, rng: np.random.Generator) -> bytes:
    """A JPEG with smooth shades, edges and noise, about as many bytes as a photograph's."""
    shades = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
    smooth = Image.fromarray(shades).resize((task.width, task.height), Image.Resampling.BICUBIC)
    pixels = np.asarray(smooth).astype(np.float32)
    rows, columns = np.mgrid[: task.height, : task.width]
    for _ in range(12):
        angle, offset = rng.uniform(0, np.pi), rng.uniform(0, 1)
        side = np.cos(angle) * rows / task.height + np.sin(angle) * columns / task.width > offset
        pixels[side] += rng.uniform(-25, 25, 3)
    pixels += rng.normal(0, task.noise, (task.height, task.width, 1))
    stream = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(stream, "JPEG", quality=task.quality)
    return stream.getvalue()


def write_shards(task: Task, folder: Path) -> tuple[list[str], float]:
    """Four tars; the paths, and the mean bytes of a picture."""
    rng = np.random.default_rng(0)
    pictures = [draw_picture(task, rng) for _ in range(128)]
    paths = []
    for shard in range(4):
        path = folder / f"{shard:05d}.tar"
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
            for number in range(shard, task.num_samples, 4):
                label = number % 100
                text = f"a photograph of thing number {label} beside another, on a {number % 9}"
                members = {"jpg": pictures[number % 128], "cls": str(label).encode()}
                members |= {"txt": text.encode()} if task.captions else {}
                for ending, content in members.items():
                    info = tarfile.TarInfo(f"{number:08d}.{ending}")
                    info.size = len(content)
                    archive.addfile(info, io.BytesIO(content))
        paths.append(str(path))
    return paths, statistics.mean(map(len, pictures))


def iter_ours(task: Task, paths: list[str], workers: int) -> Iterator[Any]:
    """nsphere: index, order, one positional read a member, uint8 batches."""
    config = DataConfig(workers=workers, caption_key="txt" if task.captions else "")
    index = load_index(paths, caption_key=config.caption_key)
    augment = AugmentConfig(scale=(0.9, 1.0)) if task.crop else None
    loader = TrainLoader(
        SampleSet([index], seed=0),
        config,
        image_transform=ImageTransform(task.size, augment),
        tokenizer_spec=TokenizerSpec() if task.captions else None,
        global_batch_size=BATCH,
        seed=0,
        rank=0,
        world_size=1,
    )
    with closing(loader):
        yield from loader.batches(0, 1 << 40)


def iter_webdataset(task: Task, paths: list[str], workers: int) -> Iterator[Any]:
    """webdataset: tarfile, shuffle buffer, PIL, open_clip's transform, float32 batches."""
    import open_clip
    import webdataset as wds
    from open_clip.transform import AugmentationCfg

    transform = open_clip.image_transform(
        task.size,
        is_train=task.crop,
        aug_cfg=AugmentationCfg(scale=(0.9, 1.0)),
    )
    tokenizer = open_clip.get_tokenizer("ViT-B-32")
    parts: dict[str, Callable[[Any], Any]] = {"jpg": transform}
    if task.captions:
        parts["txt"] = lambda text: tokenizer(text)[0]
    else:
        parts["cls"] = int
    dataset = (
        wds.WebDataset(
            paths, shardshuffle=4, nodesplitter=wds.split_by_node, seed=0, empty_check=False
        )
        .repeat()
        .shuffle(SHUFFLE_BUFFER, initial=SHUFFLE_BUFFER)
        .decode("pilrgb")
        .map_dict(**parts)
        .to_tuple(*parts)
        .batched(BATCH, partial=False)
    )
    options = {"prefetch_factor": 4} if workers else {}
    yield from wds.WebLoader(dataset, batch_size=None, num_workers=workers, **options)


CONTESTANTS = {"nsphere": iter_ours, "webdataset": iter_webdataset}


def seconds_per_sample(batches: Iterator[Any], num_batches: int) -> float:
    """Processor time of some batches."""
    start = time.process_time()
    for _ in range(num_batches):
        next(batches)
    return (time.process_time() - start) / (num_batches * BATCH)


def compare(task: Task, rounds: int, num_batches: int) -> dict[str, Any]:
    """Both contestants on one task: medians over the rounds."""
    with tempfile.TemporaryDirectory() as folder:
        paths, mean_bytes = write_shards(task, Path(folder))
        seconds: dict[str, list[float]] = {name: [] for name in CONTESTANTS}
        streams = {name: iter_batches(task, paths, 0) for name, iter_batches in CONTESTANTS.items()}
        for stream in streams.values():
            next(stream)  # index, shuffle buffer, caches
        for _ in range(rounds):
            for name, stream in streams.items():
                seconds[name].append(seconds_per_sample(stream, num_batches))
    ratios = sorted(b / a for a, b in zip(*seconds.values(), strict=True))
    return {
        "task": task.name,
        "jpeg_bytes": round(mean_bytes),
        **{f"{name}_us": round(1e6 * statistics.median(s)) for name, s in seconds.items()},
        **{f"{name}_per_s": round(1 / statistics.median(s)) for name, s in seconds.items()},
        "ratio": round(statistics.median(ratios), 2),
        "ratio_range": [round(ratios[0], 2), round(ratios[-1], 2)],
        "wanted": task.wanted,
    }


def start_up_s(task: Task) -> float:
    """Two ranks' loaders with two workers each on this machine: until both have a batch."""
    with tempfile.TemporaryDirectory() as folder:
        paths, _ = write_shards(task, Path(folder))
        load_index(paths, caption_key="txt" if task.captions else "")
        start = time.perf_counter()
        streams = [iter_ours(task, paths, 2) for _ in range(2)]
        for stream in streams:
            next(stream)
        taken = time.perf_counter() - start
        for stream in streams:
            stream.close()  # type: ignore[attr-defined]
    return taken


def mixing_lines() -> list[dict[str, Any]]:
    """Distinct shards in a batch of 4,096 against a full permutation's, for two large sets."""
    lines = []
    for num_shards, size in ((128, 1000), (1024, 1000), (10_000, 10_000)):
        mixing = report(Order(np.full(num_shards, size), seed=0), 4096)
        lines.append(
            {"shards": num_shards, "per_shard": size, **asdict(mixing), "ratio": mixing.ratio}
        )
    return lines


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--samples", type=int, default=512, help="samples a round, of clip")
    options = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["NSPHERE_CACHE"] = tempfile.mkdtemp()
    results = []
    for task in TASKS:
        num_batches = max(1, options.samples * task.num_samples // TASKS[0].num_samples // BATCH)
        results.append(compare(task, options.rounds, num_batches))
    figures = {
        "machine": machine(),
        "commit": commit(),
        "load": load(),
        "loading": results,
        "start_up_s": round(start_up_s(TASKS[1]), 2),
        "mixing": mixing_lines(),
    }
    if options.json:
        print(json.dumps(figures))
    else:
        print_figures(figures)


def print_figures(figures: dict[str, Any]) -> None:
    """The tables for people."""
    print(f"{figures['machine']}, commit {figures['commit']}, load {figures['load']}")
    print_table(
        "tar -> batch, one worker: samples per second of processor time",
        ["data", "bytes", "nsphere/s", "webdataset/s", "ratio", "range", "wanted"],
        [
            [
                line["task"],
                line["jpeg_bytes"],
                line["nsphere_per_s"],
                line["webdataset_per_s"],
                f"{line['ratio']:.2f}",
                "-".join(map(str, line["ratio_range"])),
                f">= {line['wanted']:g}",
            ]
            for line in figures["loading"]
        ],
    )
    print_table(
        "distinct shards in a batch of 4,096 (wanted: >= 85 % of a full permutation)",
        ["set", "first batch", "mean", "worst", "full permutation", "ratio"],
        [
            [
                f"{line['shards']:,} shards of {line['per_shard']:,}",
                line["first"],
                f"{line['mean']:.0f}",
                line["worst"],
                f"{line['ideal']:.0f}",
                f"{line['ratio']:.1%}",
            ]
            for line in figures["mixing"]
        ],
    )
    print(f"\nfirst batches of 2 ranks x 2 workers after {figures['start_up_s']} s")


if __name__ == "__main__":
    main()
