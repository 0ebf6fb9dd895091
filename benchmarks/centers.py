"""`python -m benchmarks.centers [--json] [--insightface FOLDER]`: our centers beside other heads.

One step is loss, gradients and optimizer (SGD with momentum). The plain head keeps all centers of
its rank as one parameter and leaves the (samples x centers) logits to autograd, as most trainers
do; with a rate below 1 it samples as PartialFC does. `--insightface` names the folder
recognition/arcface_torch of a checkout, whose PartialFC_V2 then runs beside both.

Time: interleaved rounds of one run, processor time of one process, the median of the rounds'
ratios. Memory: the peak above what the process had before, each size in a process of its own; over
two numbers of classes and two batches it is `bytes a class + bytes a pair * batch`.
"""

import argparse
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.machine import commit, load, machine, peak_extra_bytes, print_table
from trainer.centers import ClassCenters
from trainer.centers.parts import Part
from trainer.config import CentersConfig, LossConfig

MARGIN, SCALE, LR, MOMENTUM, DECAY = 0.4, 64.0, 0.1, 0.9, 5e-4
Step = Callable[[Tensor, Tensor], Tensor]


class PlainHead(nn.Module):
    """A dense head over this rank's classes: logits stored, autograd, a dense optimizer."""

    def __init__(self, num_classes: int, dim: int, group: Any, rate: float) -> None:
        super().__init__()
        rank, world_size = (0, 1) if group is None else (group.rank(), group.size())
        self.part, self.group, self.rate = Part.of_rank(num_classes, rank, world_size), group, rate
        self.weight = nn.Parameter(torch.randn(len(self.part), dim) * 0.01)

    def forward(self, rows: Tensor, labels: Tensor) -> Tensor:
        """CosFace over all ranks' classes, the mean over the global batch."""
        if self.group is not None:
            import torch.distributed.nn.functional as dnn

            rows = torch.cat(dnn.all_gather(rows, self.group))
            parts = [torch.empty_like(labels) for _ in range(self.group.size())]
            dist.all_gather(parts, labels, group=self.group)
            labels = torch.cat(parts)
        weight, places = self._sampled(labels)
        here = (places >= 0).nonzero()[:, 0]
        cosines = (F.normalize(rows) @ F.normalize(weight).T).clamp(-1, 1)
        logits = cosines.clone()
        logits[here, places[here]] -= MARGIN
        logits = logits * SCALE
        top = logits.detach().amax(1, keepdim=True)
        if self.group is not None:
            dist.all_reduce(top, op=dist.ReduceOp.MAX, group=self.group)
        logits = logits - top
        total = logits.exp().sum(1)
        target = torch.zeros_like(total).index_put((here,), logits[here, places[here]])
        if self.group is not None:
            both = torch.stack([total, target])
            both = _AllReduce.apply(both, self.group)
            total, target = both.unbind()
        return (total.log() - target).mean()

    def _sampled(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        own = (labels >= self.part.start) & (labels < self.part.stop)
        local = torch.where(own, labels - self.part.start, -1)
        if self.rate == 1:
            return self.weight, local
        keys = torch.rand(len(self.part))
        keys[local[own]] = 2.0
        index = (
            keys.topk(max(int(self.rate * len(self.part)), int(own.sum()))).indices.sort().values
        )
        return self.weight[index], torch.where(own, torch.searchsorted(index, local), -1)


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, group: Any) -> Tensor:  # noqa: ARG004
        value = value.clone()
        dist.all_reduce(value, group=group)
        return value

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # noqa: ARG004 - each rank has the whole loss
        return gradient, None


def plain(num_classes: int, dim: int, rate: float, group: Any = None) -> Step:
    """The plain head with torch's SGD."""
    head = PlainHead(num_classes, dim, group, rate)
    return dense_step(head)


def dense_step(head: nn.Module) -> Step:
    """A head's loss, gradients and torch's SGD on all of its centers."""
    optimizer = torch.optim.SGD(head.parameters(), LR, MOMENTUM, weight_decay=DECAY)

    def step(rows: Tensor, labels: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = head(rows, labels)
        loss.backward()
        optimizer.step()
        return loss

    return step


def ours(dtype: str) -> Callable[..., Step]:
    """ClassCenters with rows and momentum in `dtype`."""

    def build(num_classes: int, dim: int, rate: float, group: Any = None) -> Step:
        centers = ClassCenters(
            num_classes,
            dim,
            group,
            loss=LossConfig(name="cosface", scale=SCALE, margin=MARGIN),
            config=CentersConfig(
                sample_rate=rate,
                momentum=MOMENTUM,
                weight_decay=DECAY,
                dtype=dtype,  # type: ignore[arg-type]
                momentum_dtype=dtype,  # type: ignore[arg-type]
            ),
        )

        def step(rows: Tensor, labels: Tensor) -> Tensor:
            loss = centers(rows, labels)
            loss.backward()
            centers.step(LR)
            return loss

        return step

    return build


def insightface(folder: str) -> Callable[..., Step]:
    """PartialFC_V2 of a checkout, on its own process group of gloo ranks."""

    def build(num_classes: int, dim: int, rate: float, group: Any = None) -> Step:  # noqa: ARG001
        sys.path.insert(0, folder)
        import partial_fc_v2

        if not dist.is_initialized():
            store = dist.FileStore(tempfile.mktemp(), 1)
            dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        partial_fc_v2.rank, partial_fc_v2.world_size = dist.get_rank(), dist.get_world_size()
        _let_it_run_on_a_cpu(partial_fc_v2)
        from losses import CombinedMarginLoss

        head = partial_fc_v2.PartialFC_V2(
            CombinedMarginLoss(SCALE, 1, 0, MARGIN), dim, num_classes, rate, fp16=False
        )
        return dense_step(head)

    return build


def _let_it_run_on_a_cpu(module: Any) -> None:
    """Its calls to move tensors to a GPU do nothing where there is none."""
    if not torch.cuda.is_available():
        Tensor.cuda = lambda self, *_, **__: self  # type: ignore[method-assign,assignment]
        module.torch.cuda.amp.autocast = lambda *_, **__: torch.autocast("cpu", enabled=False)


def draw(batch: int, dim: int, num_classes: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Embeddings and labels of a batch."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(batch, dim, generator=generator).requires_grad_()
    return rows, torch.randint(0, num_classes, (batch,), generator=generator)


def time_steps(
    who: dict[str, Callable[..., Step]], size: tuple[int, int, int, float], rounds: int
) -> list[dict[str, Any]]:
    """Seconds of a step of every head, in interleaved rounds after one that does not count."""
    classes, dim, batch, rate = size
    steps = {name: build(classes, dim, rate) for name, build in who.items()}
    rows, labels = draw(batch, dim, classes)
    taken: dict[str, list[float]] = {name: [] for name in who}
    for number in range(rounds + 1):
        for name, step in steps.items():
            start = time.process_time()
            step(rows, labels)
            if number:
                taken[name].append(time.process_time() - start)
    return [
        {
            "C": classes,
            "d": dim,
            "B": batch,
            "rate": rate,
            "who": name,
            "seconds": min(taken[name]),
            "time_ratio": statistics.median(
                x / y for x, y in zip(taken[name], taken["plain"], strict=True)
            ),
        }
        for name in who
    ]


def _peak(job: tuple[str, str, int, int, int, float]) -> int:
    """Peak of building a head and of two steps, in a process of its own."""
    name, folder, classes, dim, batch, rate = job
    torch.set_num_threads(1)
    build = _contestants(folder)[name]
    step = build(64, dim, 1.0)  # libraries are loaded and threads started before the count
    step(*draw(4, dim, 64))

    def run() -> None:
        step = build(classes, dim, rate)
        for seed in range(2):
            step(*draw(batch, dim, classes, seed))

    return peak_extra_bytes(run, torch.device("cpu"))


def measure_memory(
    names: Sequence[str], folder: str, dim: int, rate: float
) -> list[dict[str, Any]]:
    """Bytes a class and bytes a (sample, sampled center) pair."""
    lines = []
    # Many sampled pairs, or the C library's habits would be counted as bytes of a pair.
    (few, many), (small, large) = (int(50_000 / rate**0.5), int(150_000 / rate**0.5)), (64, 768)
    context = multiprocessing.get_context("spawn")
    for name in names:
        peaks = {}
        for classes in (few, many):
            for batch in (small, large):
                with ProcessPoolExecutor(1, mp_context=context) as pool:
                    job = (name, folder, classes, dim, batch, rate)
                    peaks[classes, batch] = pool.submit(_peak, job).result()
        slope = {b: (peaks[many, b] - peaks[few, b]) / (many - few) for b in (small, large)}
        pair = (slope[large] - slope[small]) / (large - small)
        a_class = slope[small] - pair * small
        lines.append({"d": dim, "rate": rate, "who": name, "class": a_class, "pair": pair / rate})
        print(json.dumps(lines[-1]), file=sys.stderr, flush=True)
    (reference,) = (x["class"] for x in lines if x["who"] == "plain")
    return [line | {"class_ratio": line["class"] / reference} for line in lines]


def _contestants(folder: str) -> dict[str, Callable[..., Step]]:
    who = {"plain": plain, "nsphere": ours("float32"), "nsphere bf16": ours("bfloat16")}
    return who | ({"PartialFC_V2": insightface(folder)} if folder else {})


def print_time(lines: list[dict[str, Any]]) -> None:
    rows = [
        (x["who"], f"{x['C']:,}", x["d"], x["B"], x["rate"], f"{x['seconds']:.3f}",
         f"{x['time_ratio']:.2f}x")
        for x in lines
    ]  # fmt: skip
    header = ("who", "C", "d", "B", "rate", "seconds", "/plain")
    print_table("A step in one process, float32 arithmetic", header, rows)


def print_memory(lines: list[dict[str, Any]]) -> None:
    rows = [
        (x["who"], x["d"], x["rate"], f"{x['class']:.0f}", f"{x['class'] / x['d']:.1f}",
         f"{x['class_ratio']:.2f}x", f"{x['pair']:.2f}")
        for x in lines
    ]  # fmt: skip
    header = ("who", "d", "rate", "bytes a class", "/ d", "/plain", "bytes a pair")
    print_table("Peak memory, fitted over classes and batch", header, rows)


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")
    parser.add_argument("--insightface", default="", help="folder recognition/arcface_torch")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--largest", type=int, default=1_000_000, help="classes")
    given = parser.parse_args()
    torch.set_num_threads(1)
    who = _contestants(given.insightface)
    sizes = [
        (classes, dim, 256, rate)
        for classes, dim in ((100_000, 512), (300_000, 256), (1_000_000, 128))
        for rate in (1.0, 0.1)
        if classes <= given.largest
    ]
    facts = {"machine": machine(), "commit": commit(), "load": load()}
    timed = []
    for size in sizes:
        timed += time_steps(who, size, given.rounds)
        print(json.dumps(timed[-len(who) :]), file=sys.stderr, flush=True)
    memory = [
        line
        for rate in (1.0, 0.1)
        for line in measure_memory(list(who), given.insightface, 256, rate)
    ]
    if given.json:
        print(json.dumps(facts | {"time": timed, "memory": memory}))
        return
    print(" | ".join(f"{name}: {value}" for name, value in facts.items()))
    print_time(timed)
    print_memory(memory)


if __name__ == "__main__":
    main()
