"""`python -m benchmarks.sampling --shards PATTERN [--json]`: does the sample rate move the loss?

The same run several times: all centers in every step; a tenth of them with the correction; the
same with the lazy mode of the optimizer, where momentum rests while a center is not touched; with
four fifths of such a tenth the nearest centers, which stand for themselves, so that the
weighed sum is as right and less noisy; and a tenth without the correction.

Two losses of each: the one it logs, over the last quarter of its steps, and that of its final
weights over all centers, whatever it was trained with (the logarithm of an unbiased sum is a little
low, so the first flatters). The offset without the correction is told at the first step, where all
have the same weights and it should be the logarithm of the share of classes that take part.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.machine import commit, load, machine, print_table

CONFIG = """
[data]
workers = 0
[data.augment]
crop = false
shift = 0.05
[model]
name = "resnet10"
width = 16
image_size = 32
embedding_dim = 128
[loss]
name = "cosface"
scale = 16.0
margin = 0.1
[centers]
norm_bounds = [1.0, 1.0]
[optim]
name = "sgd"
lr = 0.05
weight_decay = 5e-4
[schedule]
warmup = "50 steps"
[train]
global_batch_size = 32
precision = "fp32"
[checkpoint]
every = "1 epochs"
[log]
every = "1 steps"
trackers = []
"""
RUNS = {
    "all": ["--centers.sample_rate=1.0"],
    "0.1, corrected": ["--centers.sample_rate=0.1"],
    "0.1, corrected, lazy": ["--centers.sample_rate=0.1", "--centers.mode=lazy"],
    "0.1, corrected, nearest": [
        "--centers.sample_rate=0.1",
        "--centers.hard_share=0.8",
        "--centers.hard_every=20",
    ],
    "0.1, not corrected": ["--centers.sample_rate=0.1", "--centers.correction=false"],
}


JUDGE_STEPS = 100


def nsphere(*words: str) -> None:
    """One command, to its end."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
    command = [sys.executable, "-m", "launch.cli", *words]
    done = subprocess.run(
        command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(words)}: exit code {done.returncode}\n{done.stderr}")


def losses_of(run: Path) -> list[float]:
    """Of every step."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def train(run: Path, name: str, words: Sequence[str], steps: int) -> tuple[list[float], float]:
    """Losses of every step, and the mean loss of the final weights over all centers."""
    config = run.with_suffix(".toml")
    config.write_text(CONFIG)
    length = f"--train.duration={steps} steps"
    nsphere("train", str(config), f"--run={run}", *words, *RUNS[name], length)
    weights, judged = run.with_suffix(".safetensors"), run.with_suffix(".judged")
    nsphere("export", str(run), str(weights), "--format=safetensors")
    nsphere(
        "train", str(config), f"--run={judged}", *words, f"--train.duration={JUDGE_STEPS} steps",
        f"--model.pretrained={weights}", f"--centers.init={run}", "--optim.lr=1e-12",
        "--train.seed=1",
    )  # fmt: skip
    return losses_of(run), statistics.mean(losses_of(judged))


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shards", required=True)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    given = parser.parse_args()
    facts = {"machine": machine(), "commit": commit(), "load": load()}
    words = [f"--data.shards={given.shards}", f"--nproc={given.ranks}"]
    losses, judged = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for number, name in enumerate(RUNS):
            losses[name], judged[name] = train(Path(folder) / str(number), name, words, given.steps)
            print(f"{number + 1}/{len(RUNS)} {name}", file=sys.stderr, flush=True)
    ends = {name: statistics.mean(found[-(len(found) // 4) :]) for name, found in losses.items()}
    lines = [
        {
            "run": name,
            "first": losses[name][0],
            "first_offset": losses[name][0] - losses["all"][0],
            "end": ends[name],
            "end_ratio": ends[name] / ends["all"],
            "over_all": judged[name],
            "over_all_ratio": judged[name] / judged["all"],
        }
        for name in RUNS
    ]
    if given.json:
        print(json.dumps(facts | {"ln_rate": math.log(0.1), "runs": lines}))
        return
    print(" | ".join(f"{name}: {value}" for name, value in facts.items()))
    rows = [
        (x["run"], f"{x['first']:.3f}", f"{x['first_offset']:+.3f}", f"{x['end']:.3f}",
         f"{x['end_ratio']:.3f}", f"{x['over_all']:.3f}", f"{x['over_all_ratio']:.3f}")
        for x in lines
    ]  # fmt: skip
    ratio = "/ all"
    judged_by = ("last quarter", ratio, "final weights, over all", ratio)
    header = ("centers in a step", "first loss", "offset", *judged_by)
    print_table(f"{given.steps} steps of 32; ln 0.1 = {math.log(0.1):.3f}", header, rows)


if __name__ == "__main__":
    main()
