"""`python -m benchmarks.estimate [--json] [--only NAME]`: memory as estimated and as measured.

Each case is trained for a few steps by the real trainer, in fresh processes, with a checkpoint at
the end. Measured is the largest resident size of a rank over its whole life (`ru_maxrss`, nothing
taken off: what Python and its libraries take alone is the base). The estimate is what `nsphere
estimate --gpu cpu` says before, in a process of its own. Figures of other people's published runs
follow, of which an estimate can only be a bound.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.machine import commit, load, machine, print_table

WANTED = 0.10
STEPS = 3
CLIP_SMALL = {
    "embed_dim": 128,
    "vision_cfg": {
        "image_size": 64,
        "layers": 6,
        "width": 256,
        "head_width": 64,
        "patch_size": 8,
    },
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 128, "heads": 2, "layers": 4},
}
CLIP_WIDE = {
    "embed_dim": 256,
    "vision_cfg": {
        "image_size": 64,
        "layers": 8,
        "width": 640,
        "head_width": 64,
        "patch_size": 8,
    },
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 256, "heads": 4, "layers": 4},
}
LABELS = 300_000


@dataclass(frozen=True)
class Case:
    """One run: what differs from the others."""

    data: str  # scenes, faces or texts
    ranks: int
    sections: dict[str, dict[str, Any]] = field(default_factory=dict)
    classes: int = 0


def _clip(ranks: int, model: str, batch: int, chunk: int, stage: int) -> Case:
    train = {"global_batch_size": batch, "chunk_size": chunk}
    sections = {"model": {"name": f"{model}.json"}, "train": train, "zero": {"stage": stage}}
    return Case("scenes", ranks, sections)


CASES = {
    "CLIP, 256 at once": _clip(1, "small", 256, 0, 0),
    "CLIP, 512 in chunks of 64": _clip(1, "small", 512, 64, 1),
    "CLIP, 48 in chunks of 12": _clip(1, "wide", 48, 12, 0),
    "CLIP, ZeRO 1, 2 ranks": _clip(2, "wide", 32, 0, 1),
    "CLIP, ZeRO 3, 2 ranks": _clip(2, "wide", 16, 0, 3),
    "faces, 600,000 centers": Case(
        "faces",
        1,
        {
            "model": {"name": "resnet10", "image_size": 64, "embedding_dim": 256},
            "loss": {"name": "cosface"},
            "centers": {"num_classes": 600_000},
            "train": {"global_batch_size": 64},
        },
    ),
    "faces, 1,000,000, rate 0.1, 2 ranks": Case(
        "faces",
        2,
        {
            "model": {"name": "resnet10", "image_size": 64, "embedding_dim": 256},
            "loss": {"name": "cosface"},
            "centers": {"num_classes": 1_000_000, "sample_rate": 0.1},
            "train": {"global_batch_size": 64},
        },
    ),
    "label rows, 300,000": Case(
        "texts",
        1,
        {
            "model": {"name": "bag", "width": 256, "embedding_dim": 256, "layers": 1},
            "loss": {"name": "decoupled"},
            "labels": {"rows": "classifiers", "over": "all"},
            "train": {"global_batch_size": 256},
        },
        classes=LABELS,
    ),
}


def build_tree(folder: Path, case: Case) -> dict[str, Any]:
    """The configuration of a case."""
    tree: dict[str, dict[str, Any]] = {
        "data": {"shards": str(folder / f"{case.data}-*.tar"), "workers": 1},
        "train": {"duration": f"{STEPS} steps", "precision": "fp32"},
        "checkpoint": {"every": f"{STEPS} steps"},
        "log": {"every": "1 steps", "trackers": []},
    }
    if case.data == "texts":
        tree["data"] |= {"image_key": "", "workers": 0}
    for name, section in case.sections.items():
        tree[name] = tree.get(name, {}) | section
    name = tree["model"]["name"]
    if name.endswith(".json"):
        tree["model"]["name"] = str(folder / name)
    return tree


def write_data(folder: Path) -> None:
    """Drawn scenes (as faces too: their classes are labels), texts of random words with labels."""
    import numpy as np
    import pyarrow as pa

    from data.label_table import LabelTable, write_label_table
    from data.pack.scenes import iter_scenes
    from data.pack.writer import pack_iterable

    (folder / "small.json").write_text(json.dumps(CLIP_SMALL))
    (folder / "wide.json").write_text(json.dumps(CLIP_WIDE))
    pack_iterable(iter_scenes(1024, seed=0), folder / "scenes.tar", max_samples=256)
    pack_iterable(iter_scenes(512, seed=1), folder / "faces.tar", max_samples=256)
    rng = np.random.default_rng(0)

    def texts() -> Iterator[tuple[str, dict[str, str]]]:
        for number in range(2048):
            words = " ".join(f"w{word}" for word in rng.integers(5000, size=24))
            labels = sorted(set(rng.integers(LABELS, size=4).tolist()))
            yield f"{number:06d}", {"txt": words, "labels": " ".join(map(str, labels))}

    pack_iterable(texts(), folder / "texts.tar", max_samples=1024)
    names = pa.array([f"label {number}" for number in range(LABELS)], pa.large_string())
    counts = np.ones(LABELS, np.int64)
    write_label_table(folder / "labels.parquet", LabelTable(names, counts, 2048))


def run_rank(folder: Path, name: str) -> None:
    """Train as a rank, and leave its largest resident size."""
    from launch.ranks import open_ranks
    from trainer.config import parse_config
    from trainer.train import train

    config = parse_config(build_tree(folder, CASES[name]), "benchmarks.estimate")
    with open_ranks(os.environ) as ranks:
        train(config, folder / _slug(name), ranks)
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        (folder / f"{_slug(name)}.rank-{ranks.rank}").write_text(str(most))


def measure(folder: Path, name: str) -> dict[str, Any]:
    """Bytes of a case as estimated, and of each rank as measured; of a checkpoint likewise."""
    case = CASES[name]
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    toml = folder / f"{_slug(name)}.toml"
    from trainer.config import dump_config, parse_config

    toml.write_text(dump_config(parse_config(build_tree(folder, case), name)))
    words = ["estimate", str(toml), "--gpu", "cpu", "--ranks-per-node", str(case.ranks), "--json"]
    words += ["--classes", str(case.classes)] if case.classes else []
    said = _run([sys.executable, "-m", "launch.cli", *words], environment)
    expected = json.loads(said.splitlines()[-1])
    own = [sys.executable, "-m", "benchmarks.estimate", "--rank-of", str(folder), "--only", name]
    if case.ranks > 1:
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
        own = [sys.executable, *torchrun, str(case.ranks), *own[1:]]
    _run(own, environment)
    saved = max((folder / _slug(name) / "checkpoints").glob("step-*"))
    return {
        "name": name,
        "estimated": expected["memory_bytes"],
        "base": expected["terms"]["Python, torch, DeepSpeed and libraries"],
        "measured": [
            int((folder / f"{_slug(name)}.rank-{rank}").read_text()) for rank in range(case.ranks)
        ],
        "checkpoint_estimated": expected["checkpoint_bytes"],
        "checkpoint_measured": sum(p.stat().st_size for p in saved.rglob("*") if p.is_file()),
        "terms": expected["terms"],
    }


def _run(command: list[str], environment: dict[str, str]) -> str:
    root = Path(__file__).parents[1]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr}")
    return done.stdout


def _slug(name: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in name)


def print_measured(lines: list[dict[str, Any]]) -> None:
    rows = []
    for line in lines:
        most = max(line["measured"])
        off = line["estimated"] / most - 1
        rows.append(
            (
                line["name"],
                f"{line['base'] / 2**20:.0f}",
                f"{line['estimated'] / 2**20:.0f}",
                "  ".join(f"{size / 2**20:.0f}" for size in line["measured"]),
                f"{off:+.1%}",
                "yes" if abs(off) <= WANTED else "NO",
                f"{line['checkpoint_estimated'] / line['checkpoint_measured'] - 1:+.2%}",
            )
        )
    header = ("run", "base", "estimated", "measured, each rank", "off", f"within {WANTED:.0%}",
              "checkpoint off")  # fmt: skip
    print_table("Largest resident size of a rank, MiB", header, rows)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")
    parser.add_argument("--only", choices=list(CASES), help="one case")
    parser.add_argument("--rank-of", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.rank_of:
        run_rank(given.rank_of, given.only)
        return
    from benchmarks.published import compare, print_published

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_data(folder)
        lines = []
        for case in [given.only] if given.only else CASES:
            lines.append(measure(folder, case))
            print(json.dumps(lines[-1]), file=sys.stderr, flush=True)
    published = compare()
    if given.json:
        facts = {"machine": machine(), "commit": commit(), "load": load()}
        print(json.dumps(facts | {"measured": lines, "published": published}))
        return
    print(f"{machine()}, load {load()}, commit {commit()}")
    print_measured(lines)
    print_published(published)


if __name__ == "__main__":
    main()
