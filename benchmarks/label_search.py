"""`python -m benchmarks.label_search [--json]`: all labels' scores against a walk through a graph.

The first k of a million labels for ten thousand queries, by `nsphere eval --task xmc`'s exact tiles
and by its HNSW (faiss), whose recall is told. Rows lie in clusters, as embeddings do: a query is a
label's row with noise. Seconds of processor time stand beside those of the clock, which other
people's work on the machine makes longer.
"""

import argparse
import json
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.machine import commit, load, machine, print_table
from trainer.config import HnswConfig
from trainer.evaluate.xmc_hnsw import approximate_labels, recall_of
from trainer.evaluate.xmc_search import Pairs, top_labels

LABELS_OF_A_CLUSTER = 50
SPREAD, NOISE = 0.7, 0.7  # of labels round their cluster, of queries round their label
KS = (1, 10, 100)


def clustered(num_labels: int, num_queries: int, dim: int) -> tuple[Tensor, Tensor]:
    """Unit rows of labels and of queries."""
    draw = torch.Generator().manual_seed(0)

    def noise(count: int) -> Tensor:
        return torch.randn(count, dim, generator=draw) / dim**0.5

    middles = F.normalize(noise(-(-num_labels // LABELS_OF_A_CLUSTER)), dim=1)
    of_label = torch.randint(len(middles), (num_labels,), generator=draw)
    labels = F.normalize(middles[of_label] + SPREAD * noise(num_labels), dim=1)
    chosen = torch.randint(num_labels, (num_queries,), generator=draw)
    return labels, F.normalize(labels[chosen] + NOISE * noise(num_queries), dim=1)


def timed(search: Callable[[], Tensor]) -> tuple[Tensor, float, float]:
    """What it found, seconds of the clock and of the processor."""
    clock, processor = time.perf_counter(), time.process_time()
    found = search()
    return found, time.perf_counter() - clock, time.process_time() - processor


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--queries", type=int, default=10_000)
    parser.add_argument("--labels", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--m", type=int, default=HnswConfig().m)
    parser.add_argument("--ef-construction", type=int, default=HnswConfig().ef_construction)
    parser.add_argument("--ef-search", type=int, default=HnswConfig().ef_search)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    given = parser.parse_args()
    facts = {"machine": machine(), "commit": commit(), "load": load()}
    labels, queries = clustered(given.labels, given.queries, given.dim)
    ids, k, none = torch.arange(given.labels), max(KS), Pairs.none(queries.device)
    exact, *of_exact = timed(lambda: top_labels(queries, labels, ids, k, None)[1])
    options = HnswConfig(
        m=given.m, ef_construction=given.ef_construction, ef_search=given.ef_search
    )
    parts = {}

    def approximate() -> Tensor:
        found = approximate_labels(queries, labels, ids, k, None, options, left_out=none)
        parts.update(build_s=found.build_s, search_s=found.search_s)
        return found.labels

    found, *of_graph = timed(approximate)
    recalls = recall_of(found, exact, KS, None)
    if given.json:
        seconds = {"exact_s": of_exact, "hnsw_s": of_graph, **parts}
        print(json.dumps(facts | vars(given) | seconds | {"recall": recalls}))
        return
    print(" | ".join(f"{name}: {value}" for name, value in facts.items()))
    rows = [
        ("exact tiles", f"{of_exact[0]:.1f}", f"{of_exact[1]:.1f}", "", "", *["1"] * len(KS)),
        (
            f"HNSW m {given.m}, ef {given.ef_construction}, {given.ef_search}",
            f"{of_graph[0]:.1f}",
            f"{of_graph[1]:.1f}",
            f"{parts['build_s']:.1f}",
            f"{parts['search_s']:.1f}",
            *(f"{recalls[k]:.4f}" for k in KS),
        ),
    ]
    header = ("", "clock s", "processor s", "build s", "search s", *(f"recall@{k}" for k in KS))
    title = f"{given.queries:,} queries, {given.labels:,} labels, d = {given.dim}, first {k}"
    print_table(title, header, rows)


if __name__ == "__main__":
    main()
