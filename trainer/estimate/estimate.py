"""All terms of a run put together: memory at its two peaks, bytes, time, disk, and the verdict."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
)

from trainer.config import Config
from trainer.dropout import use_row_keys
from trainer.estimate.clock import DISK_BYTES_A_SECOND, StepTime, step_time, tower_flops
from trainer.estimate.machines import GIB, resident_bytes
from trainer.estimate.meter import Pass, extrapolate, measure_pass, run_pass
from trainer.estimate.plan import Plan
from trainer.estimate.rows import center_bytes, host_terms, loss_flops, loss_terms, table_terms
from trainer.estimate.state import EngineState, Towers
from trainer.estimate.terms import Term, total
from trainer.estimate.wire import Collective, loss_collectives, tower_collectives
from trainer.objectives import Model, build_model
from trainer.precision import autocast_dtype

# Measured: what reading, tokenizers and oneDNN add to a rank's process in its first step, above the
# imports (this process has made the same ones); and what glibc's heap wastes on activations.
LIBRARIES = 100 * 2**20
HEAP_WASTE = 0.30  # measured 0.27, 0.34 and 0.53: most where activations are fewest
# Passes with and without a graph take turns in the same heap: 0.3 to 0.9 by model and chunk.
HEAP_WASTE_CACHED = 0.55
CUDA_CONTEXT = int(0.6 * GIB)
NCCL_BUFFERS = int(0.5 * GIB)
CACHE_WASTE = 0.05  # of torch's caching allocator on a GPU, beside blocks that no request fits
KEY_BYTES = 100  # of a sample's key in a batch
FEW_ROWS = (8, 16)


@dataclass(frozen=True)
class Estimate:
    """What `estimate` found."""

    plan: Plan
    towers: Towers
    terms: list[Term]
    """Of a rank's memory at its peak."""
    peak: str
    """When that is."""
    host: list[Term]
    """Of the host's memory beside, for each rank: workers, what is offloaded, labels."""
    shared_bytes: int
    """/dev/shm of a node."""
    collectives: list[Collective]
    flops: float
    time: StepTime
    checkpoint_bytes: int
    checkpoint_seconds: float

    @property
    def memory_bytes(self) -> int:
        """Of a rank."""
        return total(self.terms)

    @property
    def sent_bytes(self) -> float:
        """By a rank in a step."""
        return sum(part.sent(self.plan.world_size) for part in self.collectives)

    @property
    def fits(self) -> bool:
        """In the machine's memory."""
        return self.memory_bytes <= self.plan.machine.memory_bytes

    @property
    def samples_per_second(self) -> float:
        """At most, of all ranks."""
        return self.plan.config.train.global_batch_size / self.time.seconds

    def gpu_hours(self, steps: float) -> float:
        """Of all ranks for so many steps, at least."""
        return steps * self.time.seconds * self.plan.world_size / 3600


def estimate(plan: Plan) -> Estimate:
    """Everything, in a few seconds: no shard is read and no parameter allocated."""
    config, machine = plan.config, plan.machine
    base = resident_bytes()
    model = _build(config, "meta")
    towers = Towers.of(model, config.optim)
    state = EngineState.of(towers, config, plan.world_size, is_gpu=machine.is_gpu)
    rows = -(-plan.rows // plan.num_chunks)
    passed = _measure(plan, model, rows)
    dim = int(model.embed_dim)
    terms, peak = _memory(plan, state, passed, model, base)
    collectives = tower_collectives(state, plan.num_chunks) + loss_collectives(plan, dim)
    flops = tower_flops(passed, plan.num_chunks)
    sent = sum(part.sent(plan.world_size) for part in collectives)
    written, slowest = checkpoint_bytes(plan, state)
    return Estimate(
        plan=plan,
        towers=towers,
        terms=[term for term in terms if term.size],
        peak=peak,
        host=_host(plan, state),
        shared_bytes=shared_bytes(plan, model),
        collectives=collectives,
        flops=flops,
        time=step_time(plan, flops, loss_flops(plan, dim), sent),
        checkpoint_bytes=written,
        checkpoint_seconds=slowest / DISK_BYTES_A_SECOND,
    )


def checkpoint_bytes(plan: Plan, state: EngineState) -> tuple[int, int]:
    """Of a checkpoint in all, and of the rank that writes most."""
    whole, own = state.checkpoint_bytes()
    size = center_bytes(plan)
    whole, own = whole + size * plan.num_classes, own + size * plan.share_of_classes
    if plan.config.train.ema:
        whole, own = whole + state.towers.trained, own + state.towers.trained
    return whole, own


def shared_bytes(plan: Plan, model: Model) -> int:
    """/dev/shm of a node: pieces of a batch that workers have read ahead."""
    data = plan.config.data
    piece = min(plan.rows, 256) * sample_bytes(model)
    return data.workers * data.prefetch * piece * plan.ranks_per_node


def sample_bytes(model: Model) -> int:
    """Of a sample in a batch."""
    height, width = _image_size(model) or (0, 0)
    pixels = 3 * height * width
    spec = model.tokenizer_spec
    return pixels + (8 * spec.context_length if spec else 0) + 4 * 8 + KEY_BYTES


def _image_size(model: Model) -> tuple[int, int] | None:
    """None for texts alone."""
    return model.image_size if model.image_size[0] else None


def _build(config: Config, device: str) -> Model:
    """The model without torch.compile, which fakes cannot pass."""
    plain = config.model.model_copy(update={"compile": False})
    return build_model(
        config.model_copy(update={"model": plain}), device=device, load_weights=False
    )


def _measure(plan: Plan, model: Model, rows: int) -> Pass:
    """On few rows; a tower that looks at its data (word bags do) is really run."""
    labels = -(-plan.label_rows // plan.num_chunks)
    device = torch.device("cuda" if plan.machine.is_gpu else "cpu")
    autocast = autocast_dtype(plan.config.train.precision, device)
    if autocast == torch.float16:  # counted on a CPU, which has bfloat16 alone; as large
        autocast = torch.bfloat16
    counts = [rows] if rows <= FEW_ROWS[1] else FEW_ROWS
    try:
        few = [
            measure_pass(model, partial(_inputs, model, count, count * labels // rows), autocast)
            for count in counts
        ]
    except (DynamicOutputShapeException, DataDependentOutputException):
        real = _build(plan.config, "cpu")
        few = [
            run_pass(real, _inputs(real, count, count * labels // rows), autocast)
            for count in counts
        ]
    return extrapolate(few, counts, rows) if len(few) > 1 else few[0]


def _inputs(model: Model, rows: int, labels: int) -> tuple[Tensor, ...]:
    given: list[Tensor] = []
    use_row_keys(model, torch.zeros(rows, dtype=torch.int64))
    size = _image_size(model)
    if size:
        given.append(torch.zeros(rows, 3, *size, dtype=torch.uint8))
    spec = model.tokenizer_spec
    if spec is not None:
        given.append(torch.ones(rows, spec.context_length, dtype=torch.int64))
    if labels and spec is not None:
        given.append(torch.ones(labels, spec.context_length, dtype=torch.int32))
        given.append(torch.zeros(labels, dtype=torch.int64))
    return tuple(given)


def _memory(
    plan: Plan, state: EngineState, passed: Pass, model: Model, base: int
) -> tuple[list[Term], str]:
    """Terms at the larger of the two peaks, and its name."""
    dim = int(model.embed_dim)
    cached = plan.num_chunks > 1
    activations = passed.peak_bytes
    name = f"activations of {-(-plan.rows // plan.num_chunks)} samples"
    always = [*_framework(plan, base), *state.at_rest(), *_average(plan, state)]
    always += [*table_terms(plan), *loss_terms(plan, dim), *_batch(plan, model)]
    always += _copy_for_saving(plan, state)
    embedding = [*state.while_embedding(cached=cached), Term(name, activations)]
    reducing = state.while_reducing()
    if plan.machine.is_gpu:
        phases = {"forward and backward": embedding, "reduction of gradients": reducing}
        peak = max(phases, key=lambda phase: total(phases[phase]))
        found = [*always, *phases[peak]]
        return [*found, Term("allocator", int(CACHE_WASTE * total(found)))], peak
    heap = state.heap_bytes(activations + (state.towers.small if cached else 0))
    share = HEAP_WASTE_CACHED if cached else HEAP_WASTE
    kept = heap - state.small_at_rest() + int(share * activations)
    in_heap = _small_of(reducing, state)
    late = [*reducing, Term("freed activations that stay in the heap", max(0, kept - in_heap))]
    waste = Term("allocator", int(share * activations))
    phases = {"forward and backward": [*embedding, waste], "reduction of gradients": late}
    peak = max(phases, key=lambda phase: total(phases[phase]))
    return [*always, *phases[peak]], peak


def _small_of(reducing: Sequence[Term], state: EngineState) -> int:
    """What of the reduction's terms lies in the heap itself: gradients in blocks of their own."""
    names = ("gradients",) if state.stage == 0 else ("parameters: gathered",)
    there = sum(term.size for term in reducing if term.name in names)
    return there * state.towers.small // max(1, state.towers.trained)


def _framework(plan: Plan, base: int) -> list[Term]:
    if not plan.machine.is_gpu:
        return [Term("Python, torch, DeepSpeed and libraries", base + LIBRARIES)]
    links = NCCL_BUFFERS if plan.world_size > 1 else 0
    return [Term("CUDA context and NCCL", CUDA_CONTEXT + links)]


def _average(plan: Plan, state: EngineState) -> list[Term]:
    if not plan.config.train.ema:
        return []
    trained = state.towers.trained
    own = state.part(trained) if state.stage == 3 else trained
    return [Term("averaged weights", own)]


def _batch(plan: Plan, model: Model) -> list[Term]:
    """The batch that is trained on and the next; on a GPU only what of one is moved there."""
    held = -(-plan.rows // plan.num_chunks) if plan.machine.is_gpu else 2 * plan.rows
    return [Term("batches at hand", held * sample_bytes(model))]


def _copy_for_saving(plan: Plan, state: EngineState) -> list[Term]:
    """A save in the background holds a copy of what this rank writes; on a GPU it is the host's."""
    if not plan.config.checkpoint.background or plan.machine.is_gpu:
        return []
    return [Term("copy that is saved in the background", checkpoint_bytes(plan, state)[1])]


def _host(plan: Plan, state: EngineState) -> list[Term]:
    found = [*host_terms(plan)]
    if plan.machine.is_gpu:
        found.append(Term("offloaded by ZeRO", state.on_host()))
        if plan.config.checkpoint.background:
            copy = checkpoint_bytes(plan, state)[1]
            found.append(Term("copy that is saved in the background", copy))
    return [term for term in found if term.size]
