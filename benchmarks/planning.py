"""`python -m benchmarks.planning [--sizes 1e6x64,1e7x32] [--json]`: what a plan costs and brings.

Points on the sphere: topics with a falling spectrum, one in twenty a twin of another that no label
knows of. Planners: random, ours (balanced 2-means, laid into batches), faiss (two-level k-means:
sqrt(K) clusters, each cut again; sizes are what they are, laid into batches by our packer).

Seconds are of the whole plan, wall clock, with processor seconds beside as the machine may be busy;
memory is the peak above what the points take. Hardness is the mean over rows of the hardest
in-batch cosine; twins are the rows that meet their twin, the false negatives. An epoch is one pass
at `--samples-per-s`.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import faiss
import numpy as np
import torch

from benchmarks.machine import commit, load, machine, peak_extra_bytes, print_table
from data.config import NegativesConfig
from data.negatives.hardness import measure_hardness
from data.negatives.layout import BatchShape, lay_out
from data.negatives.plan import BatchPlan, make_plan
from data.negatives.store import Snapshot, unit_rows
from data.negatives.tree import Clusters, Work, read_rows

PIECE = 1 << 18
TWINS = 20  # one row in so many


def make_points(num: int, dim: int, seed: int = 0) -> tuple[Snapshot, np.ndarray]:
    """(snapshot in memory, (num,) number of the twin pair or -1)."""
    rng = np.random.default_rng(seed)
    spectrum = (np.arange(1, dim + 1) ** -0.3).astype(np.float32)
    topics = rng.standard_normal((max(1, num // 64), dim), dtype=np.float32) * spectrum
    rows = np.empty((num, dim), np.float16)
    for start in range(0, num, PIECE):
        count = min(PIECE, num - start)
        noise = rng.standard_normal((count, dim), dtype=np.float32) * spectrum
        rows[start : start + count] = unit_rows(
            topics[rng.integers(0, len(topics), count)] + 0.7 * noise
        )
    twins = np.full(num, -1, np.int64)
    both = rng.permutation(num)[: num // TWINS * 2].reshape(2, -1)
    twins[both] = np.arange(both.shape[1])
    for start in range(0, both.shape[1], PIECE):
        one, other = both[:, start : start + PIECE]
        noise = 0.02 * rng.standard_normal((len(one), dim), dtype=np.float32)
        rows[other] = unit_rows(read_rows(rows, one) + noise)
    steps = np.zeros(num, np.int32)
    return Snapshot(rows, steps, "", "benchmark"), twins


def ours(
    snapshot: Snapshot, planner: str, size: int, batch: int, work: Work
) -> Callable[[], BatchPlan]:
    """A plan by `make_plan`."""
    knobs = NegativesConfig.model_validate({"planner": planner, "cluster_size": size})
    ids = np.arange(len(snapshot.rows))
    return lambda: make_plan(snapshot, ids, knobs, seed=0, version=0, batch_size=batch, work=work)


def two_level(
    snapshot: Snapshot, size: int, batch: int, iterations: int
) -> Callable[[], BatchPlan]:
    """The same batches from faiss: k-means, then k-means inside each cluster."""

    def cluster(rows: np.ndarray, num: int, seed: int) -> np.ndarray:
        kmeans = faiss.Kmeans(
            rows.shape[1], num, niter=iterations, seed=seed, spherical=True,
            min_points_per_centroid=1, max_points_per_centroid=256,
        )  # fmt: skip
        kmeans.train(rows)
        return kmeans.index.search(rows, 1)[1][:, 0]

    def plan() -> BatchPlan:
        num = len(snapshot.rows)
        coarse = max(1, round((num / size) ** 0.5))
        rows = read_rows(snapshot.rows, np.arange(num))
        owner = cluster(rows, coarse, 1234)
        found = []
        for number in range(coarse):
            mine = np.flatnonzero(owner == number)
            if len(mine) <= size:
                found += [mine] if len(mine) else []
                continue
            within = cluster(rows[mine], -(-len(mine) // size), number)
            order = np.argsort(within, kind="stable")
            found += np.split(mine[order], np.flatnonzero(np.diff(within[order])) + 1)
        bounds = np.concatenate([[0], np.cumsum([len(part) for part in found])])
        clusters = Clusters(np.concatenate(found), bounds)
        layout = lay_out(clusters, np.zeros(0, np.int64), BatchShape(num, batch), 0)
        knobs = NegativesConfig(planner="random")
        bare = make_plan(None, np.arange(num), knobs, seed=0, version=0, batch_size=batch)
        return BatchPlan(layout.order, layout.bounds, bare.header)

    return plan


def measure(
    name: str, make: Callable[[], BatchPlan], snapshot: Snapshot, twins: np.ndarray, rate: float
) -> dict[str, Any]:
    """One planner's line."""
    made: list[BatchPlan] = []
    times: list[float] = []

    def timed() -> None:
        start, processor = time.perf_counter(), time.process_time()
        made.append(make())
        times.extend([time.perf_counter() - start, time.process_time() - processor])

    peak = peak_extra_bytes(timed, torch.device("cpu"))
    found = measure_hardness(made[0], snapshot, twins=twins, num_batches=8)
    num = len(snapshot.rows)
    sizes = np.diff(made[0].bounds)
    return {
        "plan": name,
        "seconds": times[0],
        "processor_seconds": times[1],
        "peak_bytes": peak,
        "bytes_a_point": peak / num,
        "share_of_epoch": times[0] / (num / rate),
        "hardest": found.hardest,
        "twins": found.twins,
        "mate_share": found.mate_share,
        "largest_cluster": int(sizes.max()),
    }


def progress(name: str) -> Callable[[int, int], None]:
    """A line on stderr that is written over."""

    def show(done: int, total: int) -> None:
        end = "\n" if done == total else ""
        print(f"\r{name}: {done / total:4.0%}", end=end, file=sys.stderr, flush=True)

    return show


def run(num: int, dim: int, sizes: list[int], given: argparse.Namespace) -> list[dict[str, Any]]:
    """Every planner on one set of points."""
    print(f"{num:,} x {dim}: making points", file=sys.stderr, flush=True)
    snapshot, twins = make_points(num, dim)
    random = ours(snapshot, "random", 1, given.batch, Work(given.threads))
    lines = [measure("random", random, snapshot, twins, given.samples_per_s)]
    for size in sizes:
        name = f"ours, {size}"
        work = Work(given.threads, progress(f"{num:,} x {dim}, {name}"))
        make = ours(snapshot, "tree", size, given.batch, work)
        lines.append(measure(name, make, snapshot, twins, given.samples_per_s))
        if num > given.faiss_up_to:
            continue
        name = f"faiss, about {size}"
        print(f"{num:,} x {dim}, {name}", file=sys.stderr, flush=True)
        faiss.omp_set_num_threads(given.threads)
        make = two_level(snapshot, size, given.batch, given.iterations)
        lines.append(measure(name, make, snapshot, twins, given.samples_per_s))
    return [{"points": num, "dim": dim, **line} for line in lines]


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", default="1e6x64,1e7x32", help="POINTSxDIM, several by commas")
    parser.add_argument("--cluster-sizes", default="32,4")
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--samples-per-s", type=float, default=2000.0, help="of the training run")
    parser.add_argument("--iterations", type=int, default=10, help="of faiss's k-means")
    parser.add_argument("--faiss-up-to", type=float, default=1e6, help="points")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")
    given = parser.parse_args()
    facts = {"machine": machine(), "commit": commit(), "load": load(), "threads": given.threads,
             "batch": given.batch, "samples_per_s": given.samples_per_s}  # fmt: skip
    sizes = [int(size) for size in given.cluster_sizes.split(",")]
    lines = []
    for points in given.sizes.split(","):
        num, dim = points.split("x")
        lines += run(int(float(num)), int(dim), sizes, given)
    if given.json:
        print(json.dumps(facts | {"plans": lines}))
        return
    print(" | ".join(f"{name}: {value}" for name, value in facts.items()))
    header = ("plan", "s", "processor s", "peak MB", "bytes/point", "of an epoch", "hardest cosine",
              "meet a twin", "hardest is a mate", "largest")  # fmt: skip
    for points in dict.fromkeys((line["points"], line["dim"]) for line in lines):
        rows = [
            (x["plan"], f"{x['seconds']:.1f}", f"{x['processor_seconds']:.1f}",
             f"{x['peak_bytes'] / 1e6:.0f}", f"{x['bytes_a_point']:.0f}",
             f"{x['share_of_epoch']:.2%}", f"{x['hardest']:.3f}", f"{x['twins']:.2%}",
             f"{x['mate_share']:.1%}", x["largest_cluster"])
            for x in lines if (x["points"], x["dim"]) == points
        ]  # fmt: skip
        title = f"{points[0]:,} x {points[1]} points, batches of {given.batch}"
        print_table(title, header, rows)


if __name__ == "__main__":
    main()
