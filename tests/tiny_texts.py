"""Texts against labels small enough for a test: 90 texts, 23 labels with words of their own."""

from pathlib import Path

import numpy as np
import pyarrow as pa
from tars import write_tar

from data.label_table import LabelTable, write_label_table
from trainer.config import Config, parse_config

NUM_LABELS, NUM_TEXTS = 23, 90


def write_texts(folder: Path, *, num_texts: int = NUM_TEXTS, seed: int = 0) -> str:
    """Three shards of texts that name their one to four labels' words, some without a label."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    shards: list[dict] = [{}, {}, {}]
    counts = np.zeros(NUM_LABELS, np.int64)
    for number in range(num_texts):
        many = 0 if number % 17 == 5 else int(rng.integers(1, 5))
        labels = sorted(rng.choice(NUM_LABELS, many, replace=False).tolist())
        words = [f"w{label}x{rng.integers(3)}" for label in labels] + [f"n{rng.integers(40)}"]
        text = " ".join(rng.permutation(words))
        shards[number % 3][f"{number:04d}"] = {"txt": text, "labels": " ".join(map(str, labels))}
        counts[labels] += 1
    for shard, samples in enumerate(shards):
        write_tar(folder / f"t-{shard}.tar", samples)
    named = [f"w{n}x0 w{n}x1 meaning {n % 5}" for n in range(NUM_LABELS)]
    texts = pa.array(named, pa.large_string())
    write_label_table(folder / "labels.parquet", LabelTable(texts, counts, num_texts))
    return str(folder / "t-{0..2}.tar")


def text_config(folder: Path, **sections: dict) -> Config:
    """A float32 run of 12 steps of 16 texts, saved every 4, its parts replaced by `sections`."""
    shards = folder / "texts"
    if not shards.exists():
        write_texts(shards)
    tree = {
        "data": {"shards": str(shards / "t-{0..2}.tar"), "image_key": "", "workers": 0, "chunk": 4},
        "model": {
            "name": "bag",
            "width": 16,
            "embedding_dim": 16,
            "layers": 1,
            "buckets": 500,
            "context_length": 12,
        },
        "loss": {"name": "decoupled"},
        "labels": {"rows": "texts", "over": "all"},
        "optim": {"lr": 1e-2, "weight_decay": 0.01, "clip_norm": 1.0},
        "schedule": {"warmup": "2 steps", "floor": 0.1},
        "train": {"duration": "12 steps", "global_batch_size": 16, "precision": "fp32"},
        "checkpoint": {"every": "4 steps"},
        "log": {"every": "1 steps", "samples": True, "trackers": []},
    }
    for name, section in sections.items():
        tree[name] = {**tree.get(name, {}), **section}
    return parse_config(tree, "tiny texts")
