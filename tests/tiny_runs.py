"""A run small enough for a test: 60 drawn images in three shards, a two-layer CLIP, 16 a batch."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from trainer.config import Config, parse_config
from trainer.ranks import Ranks

MODEL = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {
        "context_length": 8,
        "vocab_size": 49408,
        "width": 32,
        "heads": 2,
        "layers": 1,
    },
}


def write_shards(folder: Path, *, num_shards: int = 3, per_shard: int = 20) -> str:
    """Shards of colored 24 x 24 JPEGs with captions and labels; returns their brace pattern."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for shard in range(num_shards):
        with tarfile.open(folder / f"x-{shard}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for row in range(per_shard):
                number = shard * per_shard + row
                pixels = rng.integers(0, 255, (3, 3, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
                image = io.BytesIO()
                Image.fromarray(pixels).save(image, "JPEG")
                _add(tar, f"{number:04d}.jpg", image.getvalue())
                _add(tar, f"{number:04d}.txt", f"picture number {number}".encode())
                _add(tar, f"{number:04d}.cls", str(number % 5).encode())
    return str(folder / f"x-{{0..{num_shards - 1}}}.tar")


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def tiny_config(folder: Path, **sections: dict) -> Config:
    """A float32 run of 12 steps of 16 samples, saved every 4, its parts replaced by `sections`."""
    model = folder / "model.json"
    if not model.exists():
        shards = write_shards(folder / "shards")
        (folder / "shards.txt").write_text(shards)
        model.write_text(json.dumps(MODEL))
    tree = {
        "data": {"shards": (folder / "shards.txt").read_text(), "workers": 0, "chunk": 4},
        "model": {"name": str(model)},
        "optim": {"lr": 1e-2, "clip_norm": 1.0},
        "schedule": {"warmup": "2 steps", "floor": 0.1},
        "train": {"duration": "12 steps", "global_batch_size": 16, "precision": "fp32"},
        "checkpoint": {"every": "4 steps"},
        "log": {"every": "1 steps", "samples": True, "trackers": []},
    }
    for name, section in sections.items():
        tree[name] = {**tree.get(name, {}), **section}
    return parse_config(tree, "tiny")


def train_rank(group, config: Config, run: str, kill_after: int = 0, resume: bool = True) -> bool:
    """Train as one rank of `group`; with `kill_after`, die by SIGKILL after that many steps."""
    import os
    import signal

    from trainer.train import train

    steps = 0

    def stop() -> bool:
        nonlocal steps
        steps += 1
        if steps == kill_after:
            os.kill(os.getpid(), signal.SIGKILL)
        return False

    ranks = Ranks(group, group.rank(), group.size(), group.rank())
    return train(config, Path(run), ranks, resume=resume, stop=stop)


def read_losses(run: Path) -> dict[int, float]:
    """Loss by step from metrics.jsonl; a step that stands there twice is an error."""
    losses: dict[int, float] = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        entry = json.loads(line)
        if "loss" in entry:
            assert entry["step"] not in losses, f"step {entry['step']} stands there twice"
            losses[entry["step"]] = entry["loss"]
    return losses


def read_samples(run: Path) -> dict[int, list[str]]:
    """Keys of every global batch by step."""
    entries = [json.loads(path.read_text()) for path in sorted((run / "samples").glob("*.json"))]
    return {entry["step"]: entry["keys"] for entry in entries}
