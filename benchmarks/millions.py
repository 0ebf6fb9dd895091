"""`python -m benchmarks.millions [--json]`: real runs with millions of identities on this machine.

Each is `nsphere train` on tar shards with a small backbone: two ranks, a checkpoint, and the same
run going on with one rank and with three. Memory is the ranks' peak resident sets, summed; the
formula beside it is ClassCenters.bytes_per_class times the classes, plus what the same run takes
with a thousand classes (interpreters, libraries, the batch).
"""

import argparse
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import commit, load, machine, print_table
from trainer.centers import ClassCenters
from trainer.config import load_config

BATCH, FEW = 128, 1000
CONFIG = """
[model]
name = "timm:test_vit"
image_size = 32
[loss]
name = "cosface"
margin = 0.4
[optim]
name = "sgd"
lr = 0.1
[train]
duration = "8 steps"
global_batch_size = 128
precision = "fp32"
[data]
workers = 0
[checkpoint]
every = "6 steps"
[log]
every = "1 steps"
trackers = []
"""
MEASURED = 6  # the step before a checkpoint: resumed runs do the last two again


@dataclass(frozen=True)
class Case:
    """One kind of run."""

    classes: int
    dim: int
    rate: float
    dtype: str

    def overrides(self, classes: int) -> list[str]:
        return [
            f"--centers.num_classes={classes}",
            f"--centers.sample_rate={self.rate}",
            f"--centers.dtype={self.dtype}",
            f"--centers.momentum_dtype={self.dtype}",
            f"--model.embedding_dim={self.dim}",
        ]


CASES = (
    Case(10_000_000, 128, 0.01, "bfloat16"),
    Case(10_000_000, 128, 0.1, "bfloat16"),
    Case(1_000_000, 512, 1.0, "float32"),
)


def write_shard(path: Path, classes: int, count: int = 8 * BATCH) -> None:
    """Images of noise with labels from all of the classes, the last one included."""
    from PIL import Image

    rng = np.random.default_rng(0)
    labels = rng.integers(0, classes, count)
    labels[0] = classes - 1
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for number, label in enumerate(labels.tolist()):
            image = io.BytesIO()
            Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(image, "PNG")
            for ending, content in (("png", image.getvalue()), ("cls", str(label).encode())):
                member = tarfile.TarInfo(f"{number:06d}.{ending}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def train(folder: Path, shard: Path, overrides: Sequence[str], ranks: int) -> dict[str, Any]:
    """Run `nsphere train`; peak resident bytes of its ranks, and its metrics."""
    words = [sys.executable, "-m", "launch.cli", "train", str(folder / "millions.toml")]
    words += [f"--nproc={ranks}", f"--run={folder / 'run'}", f"--data.shards={shard}", *overrides]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
    start = time.monotonic()
    process = subprocess.Popen(words, env=environment, stderr=subprocess.PIPE, text=True)
    peaks: dict[int, int] = {}
    while process.poll() is None:
        for pid in _ranks_below(process.pid, alone=ranks == 1):
            peaks[pid] = max(peaks.get(pid, 0), _peak(pid))
        time.sleep(0.05)
    if process.returncode:
        raise SystemExit(process.stderr.read() if process.stderr else "failed")
    lines = [json.loads(x) for x in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = {line["step"]: line for line in lines if "loss" in line}
    return {
        "bytes": sum(sorted(peaks.values())[-ranks:]),
        "losses": {step: line["loss"] for step, line in steps.items()},
        "step_s": sorted(line["step_s"] for line in steps.values())[len(steps) // 2],
        "seconds": time.monotonic() - start,
    }


def _ranks_below(pid: int, *, alone: bool) -> list[int]:
    """The launcher's children; with one rank the launcher is the rank."""
    if alone:
        return [pid]
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [int(child) for child in children]


def _peak(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    found = [line for line in status.splitlines() if line.startswith("VmHWM")]
    return int(found[0].split()[1]) * 1024 if found else 0


def measure(case: Case, folder: Path) -> dict[str, Any]:
    """Two ranks, then the last steps again on one and on three ranks from their checkpoint."""
    config = folder / "millions.toml"
    config.write_text(CONFIG)
    small, large = folder / "few.tar", folder / "many.tar"
    write_shard(small, FEW)
    write_shard(large, case.classes)
    base = train(folder, small, case.overrides(FEW), 2)["bytes"]
    shutil.rmtree(folder / "run")
    found = train(folder, large, case.overrides(case.classes), 2)
    centers = load_config(config, case.overrides(case.classes)).centers
    formula = ClassCenters.bytes_per_class(centers, case.dim) * case.classes
    line = {
        "C": case.classes,
        "d": case.dim,
        "rate": case.rate,
        "dtype": case.dtype,
        "centers_bytes": formula,
        "base_bytes": base,
        "peak_bytes": found["bytes"],
        "ratio": found["bytes"] / (formula + base),
        "step_s": found["step_s"],
        "resumed": {},
    }
    kept = folder / "run" / "checkpoints"
    for ranks in (1, 3):
        shutil.rmtree(kept / "step-00000008", ignore_errors=True)
        again = train(folder, large, case.overrides(case.classes), ranks)
        differences = [abs(again["losses"][s] - found["losses"][s]) for s in (7, 8)]
        line["resumed"][ranks] = {"bytes": again["bytes"], "loss_difference": max(differences)}
    shutil.rmtree(folder / "run")
    print(json.dumps(line), file=sys.stderr, flush=True)
    return line


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    parser.add_argument("--folder", default=None, help="where checkpoints of 5 GB find room")
    parser.add_argument("--cases", type=int, nargs="*", default=list(range(len(CASES))))
    given = parser.parse_args()
    facts = {"machine": machine(), "commit": commit(), "load": load()}
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        lines = [measure(CASES[number], Path(folder)) for number in given.cases]
    if given.json:
        print(json.dumps(facts | {"runs": lines}))
        return
    print(" | ".join(f"{name}: {value}" for name, value in facts.items()))
    rows = [
        (
            f"{x['C']:,}",
            x["d"],
            x["rate"],
            x["dtype"],
            f"{x['centers_bytes'] / 1e9:.2f}",
            f"{x['base_bytes'] / 1e9:.2f}",
            f"{x['peak_bytes'] / 1e9:.2f}",
            f"{x['ratio']:.2f}x",
            f"{x['step_s']:.2f}",
            *(f"{x['resumed'][ranks]['loss_difference']:.1e}" for ranks in (1, 3)),
        )
        for x in lines
    ]
    header = ("C", "d", "rate", "rows", "centers GB", "+ base GB", "peak GB", "/formula",
              "step s", "2 -> 1", "2 -> 3")  # fmt: skip
    print_table(
        "Two ranks; loss differences of the steps done again on 1 and 3 ranks", header, rows
    )


if __name__ == "__main__":
    main()
