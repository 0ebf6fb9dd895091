"""`python -m benchmarks.contrastive [--json]`: our contrastive losses beside other people's.

Forward and backward, in interleaved rounds of one run, so that a busy machine slows all: seconds
are the best round's, ratios to open_clip's time the median of the rounds'. One process on a CPU is
timed by its processor time, which other people's work changes least; ranks by the clock. Memory is
the peak above what was in use before. Bytes sent are counted at torch.distributed's calls.
"""

import argparse
import json
import math
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from benchmarks.machine import commit, load, machine, peak_extra_bytes, print_table
from trainer.losses import clip_loss, siglip_loss

DIM = 512
MIB = 2**20
Contestants = dict[str, Callable[[], Tensor]]


def draw(count: int, device: torch.device) -> list[Tensor]:
    """Unit images, texts that match them loosely, a trained run's scale, SigLIP's bias."""
    torch.manual_seed(0)
    images = F.normalize(torch.randn(count, DIM, device=device), dim=1)
    texts = F.normalize(images + 2 * F.normalize(torch.randn_like(images), dim=1), dim=1)
    scale, bias = torch.tensor(50.0, device=device), torch.tensor(-10.0, device=device)
    return [x.requires_grad_() for x in (images, texts, scale, bias)]


def contestants(inputs: Sequence[Tensor], group: Any = None) -> dict[str, Contestants]:
    """For each kind of loss, ours first, then who is compared with it."""
    from open_clip.loss import ClipLoss, SigLipLoss

    images, texts, scale, bias = inputs
    ranks = (
        {"rank": dist.get_rank(group), "world_size": dist.get_world_size(group)} if group else {}
    )
    clip = ClipLoss(local_loss=True, gather_with_grad=True, **ranks)
    siglip = SigLipLoss(**ranks)
    kinds: dict[str, Contestants] = {
        "clip": {
            "nsphere": lambda: clip_loss(images, texts, scale, group),
            "open_clip": lambda: clip(images, texts, scale),
        },
        "siglip": {
            "nsphere": lambda: siglip_loss(images, texts, scale, bias, group),
            "open_clip": lambda: siglip(images, texts, scale, bias),
        },
    }
    if group is not None:
        for name, loss in (("clip", clip_loss), ("siglip", siglip_loss)):
            kinds[name]["nsphere ring"] = _with(loss, inputs, group, visiting="ring")
            kinds[name]["nsphere bf16 wire"] = _with(loss, inputs, group, wire=torch.bfloat16)
    elif hasattr(F, "linear_cross_entropy"):
        kinds["clip"]["torch linear_cross_entropy"] = lambda: _linear_cross_entropy(*inputs[:3])
    return kinds


def _with(loss: Callable[..., Tensor], inputs: Sequence[Tensor], group: Any, **options: Any) -> Any:
    used = inputs if loss is siglip_loss else inputs[:3]
    return lambda: loss(*used, group, **options)


def _linear_cross_entropy(images: Tensor, texts: Tensor, scale: Tensor) -> Tensor:
    """torch's fused kernel, once in each direction, in chunks."""
    target = torch.arange(len(images), device=images.device)
    options = torch.nn.LinearCrossEntropyOptions()
    one = F.linear_cross_entropy(images * scale, texts, target, options=options)
    return (one + F.linear_cross_entropy(texts * scale, images, target, options=options)) / 2


def seconds_of(call: Callable[[], Tensor], clock: Callable[[], float]) -> float:
    """Forward and backward once."""
    start = clock()
    call().backward()
    return clock() - start


def device_clock() -> float:
    """The clock, once the GPU has done what it was given."""
    torch.cuda.synchronize()
    return time.perf_counter()


def time_rounds(
    who: Contestants, rounds: int, clock: Callable[[], float], group: Any = None
) -> dict[str, list[float]]:
    """Seconds of every contestant in every round, after one round that does not count."""
    taken: dict[str, list[float]] = {name: [] for name in who}
    for number in range(rounds + 1):
        for name, call in who.items():
            if group is not None:
                dist.barrier(group)
            seconds = seconds_of(call, clock)
            if number:
                taken[name].append(seconds)
    return taken


def figures(kind: str, count: int, name: str, taken: dict[str, list[float]]) -> dict[str, Any]:
    """One contestant's time, and its median ratio to open_clip's in the same round."""
    ratios = [x / y for x, y in zip(taken[name], taken["open_clip"], strict=True)]
    return {
        "loss": kind,
        "N": count,
        "who": name,
        "seconds": min(taken[name]),
        "time_ratio": statistics.median(ratios),
    }


def one_process(sizes: Sequence[int], rounds: int, device: torch.device) -> list[dict[str, Any]]:
    """Time and peak memory, all samples in one process."""
    clock, lines = device_clock if device.type == "cuda" else time.process_time, []
    for count in sizes:
        inputs = draw(count, device)
        for kind, who in contestants(inputs).items():
            peaks = {}
            for name, call in who.items():
                for tensor in inputs:
                    tensor.grad = None
                peaks[name] = peak_extra_bytes(lambda call=call: call().backward(), device)
            fewer = max(1, rounds * 8192 // max(count, 8192))  # one at 16384 costs half a minute
            taken = time_rounds(who, fewer, clock)
            for name in who:
                memory = {"extra_bytes": peaks[name]}
                if min(peaks.values()) > 0:
                    memory["memory_ratio"] = peaks[name] / peaks["open_clip"]
                lines.append(figures(kind, count, name, taken) | memory)
                print(json.dumps(lines[-1]), file=sys.stderr, flush=True)
    return lines


# ------------------------------------------------------------------------------- several ranks


class SentBytes:
    """Bytes that this rank sends, by collective, counted at the calls of torch.distributed."""

    def __init__(self, world_size: int, rank: int) -> None:
        self.sent: Counter[str] = Counter()
        others = world_size - 1
        self._count: dict[str, Callable[..., float]] = {
            "all_gather": lambda _, tensor, **__: others * tensor.nbytes,
            "all_gather_into_tensor": lambda _, tensor, **__: others * tensor.nbytes,
            "all_reduce": lambda tensor, *_, **__: 2 * others / world_size * tensor.nbytes,
            "all_to_all_single": lambda _out, tensor, _mine, theirs, **_: (
                tensor.nbytes * (1 - theirs[rank] / max(sum(theirs), 1))
            ),
            "scatter": lambda _, tensors, *__, **___: sum(
                x.nbytes for r, x in enumerate(tensors or []) if r != rank
            ),
            "batch_isend_irecv": lambda moves: sum(
                move.tensor.nbytes for move in moves if move.op is dist.isend
            ),
        }

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count what is sent inside."""
        originals = {name: getattr(dist, name) for name in self._count}
        for name, original in originals.items():
            setattr(dist, name, self._counted(name, original))
        try:
            yield
        finally:
            for name, original in originals.items():
                setattr(dist, name, original)

    def _counted(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.sent[name] += round(self._count[name](*args, **kwargs))
            return original(*args, **kwargs)

        return call


def _rank(job: tuple[int, int, str, Sequence[int], int]) -> list[dict[str, Any]]:
    rank, world_size, store, sizes, rounds = job
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", FutureWarning)  # open_clip's, once a rank and loss
    device = torch.device("cpu")
    file = dist.FileStore(store, world_size)
    dist.init_process_group("gloo", store=file, rank=rank, world_size=world_size)
    group, lines = dist.group.WORLD, []
    for count in sizes:
        cut = slice(rank * count // world_size, (rank + 1) * count // world_size)
        images, texts, *rest = draw(count, device)
        own = [x.detach()[cut].requires_grad_() for x in (images, texts)]
        for kind, who in contestants([*own, *rest], group).items():
            taken = time_rounds(who, rounds, time.perf_counter, group)
            for name, call in who.items():
                bytes_sent = SentBytes(world_size, rank)
                with bytes_sent.counting():
                    call().backward()
                sent = {"sent_bytes": dict(bytes_sent.sent)}
                lines.append(figures(kind, count, name, taken) | sent)
    dist.destroy_process_group()
    return lines


def several_ranks(world_size: int, sizes: Sequence[int], rounds: int) -> list[dict[str, Any]]:
    """Time and bytes over gloo ranks of one thread each; the first rank's figures."""
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder, "store"))
        jobs = [(rank, world_size, store, sizes, rounds) for rank in range(world_size)]
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(world_size, mp_context=context) as pool:
            return next(iter(pool.map(_rank, jobs)))


# -------------------------------------------------------------------------------------- tables


def print_one_process(lines: list[dict[str, Any]]) -> None:
    rows = [
        (
            x["loss"],
            x["N"],
            x["who"],
            f"{x['seconds']:.3f}",
            f"{x['time_ratio']:.2f}x",
            f"{x['extra_bytes'] / MIB:.0f}",
            f"{x.get('memory_ratio', math.nan):.1%}",
        )
        for x in lines
    ]
    header = ("loss", "N", "who", "seconds", "/open_clip", "peak extra MiB", "/open_clip")
    print_table(f"One process, float32, d = {DIM}, forward and backward", header, rows)


def print_several_ranks(world_size: int, lines: list[dict[str, Any]]) -> None:
    sent = {(x["loss"], x["N"], x["who"]): sum(x["sent_bytes"].values()) for x in lines}
    rows = []
    for x in lines:
        bytes_sent = sent[x["loss"], x["N"], x["who"]]
        by_call = ", ".join(f"{k} {v / MIB:.3f}" for k, v in x["sent_bytes"].items())
        rows.append(
            (
                x["loss"],
                x["N"],
                x["who"],
                f"{x['seconds']:.3f}",
                f"{x['time_ratio']:.2f}x",
                f"{bytes_sent / MIB:.2f}",
                f"{bytes_sent / sent['clip', x['N'], 'open_clip']:.3f}x",
                by_call,
            )
        )
    header = ("loss", "N", "who", "seconds", "/open_clip", "MiB sent", "/ClipLoss", "by call")
    print_table(f"{world_size} gloo ranks, float32, d = {DIM}, N over all ranks", header, rows)


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")
    parser.add_argument("--sizes", type=int, nargs="+", default=[2048, 4096, 8192, 16384])
    parser.add_argument("--ranks", type=int, default=2, help="0: one process only")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # of the ranks that are started from here
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    facts = {"machine": machine(), "commit": commit(), "load": load()}
    alone = one_process(given.sizes, given.rounds, device)
    shared_sizes = [n for n in given.sizes if n <= 8192] or given.sizes[:1]
    together = several_ranks(given.ranks, shared_sizes, given.rounds) if given.ranks else []
    if given.json:
        print(json.dumps(facts | {"one_process": alone, f"ranks_{given.ranks}": together}))
        return
    print(" | ".join(f"{name}: {value}" for name, value in facts.items()))
    print_one_process(alone)
    if together:
        print_several_ranks(given.ranks, together)


if __name__ == "__main__":
    main()
