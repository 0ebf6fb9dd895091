"""A face run small enough for a test: 11 identities of 6 drawn images, a two-layer ViT."""

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image
from tiny_runs import _add

from trainer.config import Config, parse_config

NUM_CLASSES = 11


def write_faces(
    folder: Path, *, num_classes: int = NUM_CLASSES, each: int = 6, seed: int = 0, first: int = 0
) -> str:
    """Shards of 32 x 32 PNGs with labels: an identity is a coarse pattern, an image adds noise."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    patterns = rng.integers(0, 255, (num_classes, 4, 4, 3)).repeat(8, 1).repeat(8, 2)
    order = rng.permutation(num_classes * each)
    for shard in range(3):
        with tarfile.open(folder / f"f-{shard}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for number in order[shard::3].tolist():
                label, copy = divmod(number, each)
                noise = rng.normal(0, 40, (32, 32, 3))
                pixels = (patterns[label] + noise).clip(0, 255).astype(np.uint8)
                image = io.BytesIO()
                Image.fromarray(pixels).save(image, "PNG")
                _add(tar, f"{label:03d}_{copy}.png", image.getvalue())
                _add(tar, f"{label:03d}_{copy}.cls", str(first + label).encode())
    return str(folder / "f-{0..2}.tar")


def face_config(folder: Path, **sections: dict) -> Config:
    """A float32 run of 12 steps of 16 faces, saved every 4, its parts replaced by `sections`."""
    shards = folder / "faces"
    if not shards.exists():
        write_faces(shards)
    tree = {
        "data": {"shards": str(shards / "f-{0..2}.tar"), "workers": 0, "chunk": 4},
        "model": {
            "name": "timm:test_vit",
            "image_size": 32,
            "embedding_dim": 16,
            "global_batch_norm": True,
        },
        "loss": {"name": "arcface", "scale": 16.0, "margin": 0.2},
        "centers": {"lr_scale": 10.0},
        "optim": {"lr": 3e-3, "weight_decay": 0.05, "clip_norm": 1.0},
        "schedule": {"warmup": "2 steps", "floor": 0.1},
        "train": {"duration": "12 steps", "global_batch_size": 16, "precision": "fp32"},
        "checkpoint": {"every": "4 steps"},
        "log": {"every": "1 steps", "samples": True, "trackers": []},
    }
    for name, section in sections.items():
        tree[name] = {**tree.get(name, {}), **section}
    return parse_config(tree, "tiny faces")
