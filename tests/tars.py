"""Shards for tests, written by the standard library's tarfile: our own code is not its judge."""

import functools
import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from unittest import mock

import numpy as np
from PIL import Image

from data.augment import ImageTransform
from data.config import AugmentConfig, DataConfig, SourceConfig
from data.dataset import build_sample_set
from data.index import load_index
from data.loader import Batch, TrainLoader
from data.text import TokenizerSpec, build_tokenizer

Members = Mapping[str, bytes | str | int | dict]


def picture(seed: int, width: int = 24, height: int = 20, kind: str = "JPEG") -> bytes:
    """A small picture of smooth noise."""
    noise = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC).save(stream, kind)
    return stream.getvalue()


def sample(number: int, **others) -> dict:
    """Members of a good sample: jpg, txt and cls."""
    return {"jpg": picture(number), "txt": f"caption of {number}", "cls": number % 7, **others}


def write_tar(
    path: Path, samples: Mapping[str, Members] | Sequence[tuple[str, Members]], mode: str = "w"
) -> Path:
    """A shard of samples by key; repeat a key by giving pairs."""
    pairs = samples.items() if isinstance(samples, Mapping) else samples
    with tarfile.open(path, mode) as archive:
        for key, members in pairs:
            for ending, value in members.items():
                content = value if isinstance(value, bytes) else _encode(value)
                info = tarfile.TarInfo(f"{key}.{ending}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return path


def _encode(value: str | int | dict) -> bytes:
    return (json.dumps(value) if isinstance(value, dict) else str(value)).encode()


def write_set(folder: Path, counts: Sequence[int], broken: Sequence[int] = ()) -> str:
    """Shards s-000.tar, ... of numbered samples; the jpg of `broken` ones is no JPEG."""
    folder.mkdir(exist_ok=True)
    number = 0
    for shard, count in enumerate(counts):
        samples = {}
        for _ in range(count):
            junk = {"jpg": b"not a picture"} if number in broken else {}
            samples[f"{number:05d}"] = sample(number, **junk)
            number += 1
        write_tar(folder / f"s-{shard:03d}.tar", samples)
    return str(folder / f"s-{{000..{len(counts) - 1:03d}}}.tar")


def loader_of(
    spec: str | Sequence[str],
    *,
    batch: int,
    rank: int = 0,
    world: int = 1,
    weights: Sequence[float] = (1.0,),
    size: int = 16,
    **config,
) -> TrainLoader:
    """A TrainLoader over shards, one source a weight; without a caption key, of images only."""
    settings = DataConfig(**{"workers": 0, **config})
    keys = {"image_key": settings.image_key, "caption_key": settings.caption_key}
    specs = [spec] if len(weights) == 1 else spec
    sources = tuple(
        SourceConfig(shards=spec, weight=w) for spec, w in zip(specs, weights, strict=True)
    )
    indexes = [load_index(spec, **keys) for spec in specs]
    samples = build_sample_set(indexes, settings.model_copy(update={"sources": sources}), seed=3)
    with mock.patch("data.batch.build_tokenizer", _TOKENIZER):  # half a second, once
        return TrainLoader(
            samples,
            settings,
            image_transform=ImageTransform(size, AugmentConfig(scale=(0.5, 1.0), flip=0.5)),
            tokenizer_spec=TokenizerSpec(context_length=12) if settings.caption_key else None,
            global_batch_size=batch,
            seed=3,
            rank=rank,
            world_size=world,
        )


_TOKENIZER = functools.cache(build_tokenizer)


def rows_of(batches: Sequence[Batch], world: int = 1) -> list[tuple]:
    """Rows of the ranks' batches of one step, back in the order of the global batch."""
    total = sum(len(batch.ids) for batch in batches)
    rows: list = [None] * total
    for rank, batch in enumerate(batches):
        rows[rank::world] = [
            (
                int(batch.positions[row]),
                int(batch.ids[row]),
                batch.keys[row],
                int(batch.labels[row]),
                int(batch.caption_ids[row]),
                tuple(batch.texts[row].tolist()),
                batch.images[row].numpy().tobytes(),
            )
            for row in range(len(batch.ids))
        ]
    return rows
