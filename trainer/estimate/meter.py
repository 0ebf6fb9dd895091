"""What one pass of the towers holds and computes: counted on tensors that have no memory.

A forward and a backward pass run under torch's FakeTensorMode: every operation says which tensors
it makes and how large they are, none is computed. So the rule is that of any tower that torch can
run, with autocast, checkpointing and fused attention as they are. Both are linear in the rows, so
two small numbers of them say what any number takes.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, fields
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

HEAP_BLOCK = 32 * 2**20
"""glibc maps blocks of at least this size one by one and gives them back; smaller ones come from a
heap that grows and, in a process that trains, hardly shrinks (mallopt(3), M_MMAP_THRESHOLD)."""


class LiveBytes(TorchDispatchMode):
    """Bytes of all tensors that operations inside have made and that still live, and their most.

    `known`: tensors that were there before; their views are no new memory.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.now = self.most = 0
        self.small_now = self.small_most = 0  # of blocks below HEAP_BLOCK
        self._known = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self._see(tensor)
        return made

    def _see(self, tensor: Tensor) -> None:
        if tensor.is_meta:  # DeepSpeed notes shapes so; a fake is none of these
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes()
        self._known.add(key)
        self._add(size)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._add(-size)

    def _add(self, size: int) -> None:
        self.now += size
        self.most = max(self.most, self.now)
        if abs(size) < HEAP_BLOCK:
            self.small_now += size
            self.small_most = max(self.small_most, self.small_now)


@dataclass(frozen=True)
class Pass:
    """One forward and one backward pass of some rows through a model."""

    kept_bytes: int
    """Activations that live when the forward pass is done."""
    peak_bytes: int
    """Most that lives at once, parameters' gradients left out: those go as these come."""
    forward_flops: int
    backward_flops: int


Inputs = Callable[[], tuple[Tensor, ...]]


def measure_pass(
    model: nn.Module,  # on any device, also "meta"
    inputs: Inputs,  # makes them, on the CPU
    autocast: torch.dtype | None,
) -> Pass:
    """Count a pass through `model`, which is left as it was; a second for a hundred layers.

    Fused kernels of the CPU stand for those of a GPU: both keep queries, keys, values and a number
    a row of attention. Raises DynamicOutputShapeException for a model that looks at its data.
    """
    with FakeTensorMode(), _faked(model):
        return run_pass(model, inputs(), autocast)


def run_pass(model: nn.Module, inputs: Sequence[Tensor], autocast: torch.dtype | None) -> Pass:
    """Run a pass and count it; parameters are left without gradients."""
    casting: AbstractContextManager[Any] = nullcontext()
    if autocast is not None:
        casting = torch.autocast("cpu", dtype=autocast)
    known = [*model.parameters(), *model.buffers(), *inputs]
    counted = LiveBytes(known)
    with _without_gradients(model), FlopCounterMode(display=False) as flops, counted as live:
        with casting:
            outputs = [x for x in model(*inputs) if x is not None]
        kept, forward = live.now, flops.get_total_flops()
        slopes = [x.float().sum() for x in outputs if x.requires_grad]
        if slopes:
            torch.stack(slopes).sum().backward()
    return Pass(kept, live.most, forward, flops.get_total_flops() - forward)


def extrapolate(passes: Sequence[Pass], rows: Sequence[int], wanted: int) -> Pass:
    """The pass of `wanted` rows on the line through two others."""
    (one, other), (few, many) = passes, rows
    share = (wanted - few) / (many - few)

    def at(name: str) -> int:
        low, high = getattr(one, name), getattr(other, name)
        return max(0, round(low + (high - low) * share))

    return Pass(*(at(field.name) for field in fields(Pass)))


@contextmanager
def _without_gradients(model: nn.Module) -> Iterator[None]:
    """Inside, a parameter's gradient is dropped as soon as it is complete."""

    def drop(parameter: Tensor) -> None:
        parameter.grad = None

    hooks = [
        parameter.register_post_accumulate_grad_hook(drop)
        for parameter in model.parameters()
        if parameter.requires_grad
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _faked(model: nn.Module) -> Iterator[None]:
    """Inside, parameters and buffers are fakes on the CPU; tied ones stay tied."""
    fakes: dict[int, Tensor] = {}
    homes = [
        (cast(dict[str, Any], table), name, tensor)
        for module in model.modules()
        for table in (module._parameters, module._buffers)
        for name, tensor in table.items()
        if tensor is not None
    ]
    for table, name, tensor in homes:
        if id(tensor) not in fakes:
            fake = torch.empty(tensor.shape, dtype=tensor.dtype)
            if isinstance(tensor, nn.Parameter):
                fake = nn.Parameter(fake, requires_grad=tensor.requires_grad)
            fakes[id(tensor)] = fake
        table[name] = fakes[id(tensor)]
    try:
        yield
    finally:
        for table, name, tensor in homes:
            table[name] = tensor
