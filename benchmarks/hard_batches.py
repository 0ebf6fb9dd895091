"""`python -m benchmarks.hard_batches --shards TRAIN --val VAL`: are planned batches better?

The same run, the same steps, in random batches and in planned ones, once a seed: final figure, its
curve over samples, and what the plans did to the batches' hardness. Negatives are the batch's own
(`labels.over = "batch"` in the configuration), or planned batches could not matter.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.machine import commit, load, machine, print_table

HARDNESS = ("hardest_negative", "cluster_mates", "suspected_false_negatives")
PLANNED = "--data.batching=planned"


def tree(size: int, *words: str) -> list[str]:
    """Batches of clusters of one size, renewed every epoch unless `words` say otherwise."""
    return [PLANNED, f"--negatives.cluster_size={size}", *words]


GRID = {
    "random": [],
    "C=2": tree(2),
    "C=4": tree(4),
    "C=8": tree(8),
    "C=32": tree(32),
    "C=128": tree(128),
    "C=256": tree(256),
    "C=32, planned once": tree(32, "--negatives.refresh=100 epochs"),
    "C=32, half random": tree(32, "--negatives.random_share=0.5"),
    "C=256, planned once": tree(256, "--negatives.refresh=100 epochs"),
    "C=256, twice an epoch": tree(256, "--negatives.refresh=0.5 epochs"),
    "C=256, half random": tree(256, "--negatives.random_share=0.5"),
    "C=8, doubling": tree(8, "--negatives.grow_at=[2]"),
}


def train(folder: Path, words: Sequence[str]) -> dict[str, Any]:
    """Evaluations and hardness of a run on one rank and one thread."""
    command = [sys.executable, "-m", "launch.cli", "train", "--nproc=1", f"--run={folder}", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: exit code {done.returncode}\n{done.stderr}")
    lines = [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    tail = steps[len(steps) // 2 :]
    hardness = {
        name: statistics.mean(line[name] for line in tail)
        for name in HARDNESS
        if all(name in line for line in tail)
    }
    return {"lines": lines, "hardness": hardness}


def curve(lines: Sequence[dict[str, Any]], metric: str) -> list[tuple[int, float]]:
    """(samples seen, figure) of every evaluation."""
    found = [(line["samples_seen"], line.get("evaluation", {})) for line in lines]
    return [(samples, numbers[metric]) for samples, numbers in found if metric in numbers]


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/xmc_batches.toml")
    parser.add_argument("--shards", required=True)
    parser.add_argument("--val", required=True)
    parser.add_argument("--metric", default="xmc_P@1")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="*", default=list(GRID), help="names of the grid")
    parser.add_argument("--jobs", type=int, default=2, help="runs at once, a core each")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")
    parser.add_argument("words", nargs="*", help="further --section.key=value of every run")
    given = parser.parse_args()
    facts = {"machine": machine(), "commit": commit(), "load": load()}
    data = [given.config, f"--data.shards={given.shards}", f"--data.val_shards={given.val}"]
    wanted = [(name, seed) for name in given.only for seed in range(given.seeds)]
    done = 0

    def run(place: tuple[int, tuple[str, int]]) -> dict[str, Any]:
        nonlocal done
        number, (name, seed) = place
        words = [*data, f"--train.seed={seed}", *GRID[name], *given.words]
        found = train(Path(folder) / str(number), words)
        done += 1
        end = curve(found["lines"], given.metric)[-1][1]
        print(f"{done}/{len(wanted)} {name}, seed {seed}: {end:.4f}", file=sys.stderr, flush=True)
        return {"run": name, "seed": seed, "curve": curve(found["lines"], given.metric),
                "hardness": found["hardness"]}  # fmt: skip

    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(given.jobs) as pool:
        runs = list(pool.map(run, enumerate(wanted)))
    if given.json:
        print(json.dumps(facts | {"metric": given.metric, "runs": runs}))
        return
    print(" | ".join(f"{name}: {value}" for name, value in facts.items()))
    _print(given.metric, given.only, runs)


def _print(metric: str, names: Sequence[str], runs: Sequence[dict[str, Any]]) -> None:
    by_name = {name: [x for x in runs if x["run"] == name] for name in names}
    first = [x["curve"][-1][1] for x in by_name[names[0]]]
    rows, curves = [], []
    for name, found in by_name.items():
        ends = [x["curve"][-1][1] for x in found]
        better = sum(end > start for end, start in zip(ends, first, strict=True))
        means = [statistics.mean(x["hardness"].get(k, float("nan")) for x in found)
                 for k in HARDNESS]  # fmt: skip
        rows.append((name, *(f"{end:.4f}" for end in ends), f"{statistics.mean(ends):.4f}",
                     f"{better}/{len(ends)}", *(f"{mean:.3f}" for mean in means)))  # fmt: skip
        points = [statistics.mean(y) for y in zip(*([v for _, v in x["curve"]] for x in found),
                                                  strict=True)]  # fmt: skip
        curves.append((name, *(f"{point:.4f}" for point in points)))
    seeds = [f"seed {x['seed']}" for x in by_name[names[0]]]
    header = ("batches", *seeds, "mean", "better", "hardest negative", "mates", "suspected")
    print_table(f"{metric} at the end; better: seeds above {names[0]}", header, rows)
    seen = [f"{samples:,}" for samples, _ in by_name[names[0]][0]["curve"]]
    print_table(f"{metric} over samples, mean of the seeds", ("batches", *seen), curves)


if __name__ == "__main__":
    main()
