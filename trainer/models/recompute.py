"""Gradient checkpointing that leaves batch norms' running averages alone when it recomputes.

A block whose activations are recomputed in the backward pass runs twice, and its batch norms would
move their averages twice. Nothing else in a block may have a memory: dropout is keyed by sample
(`trainer/dropout.py`), so no generator's state is kept either.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint


@contextmanager
def statistics_kept(model: nn.Module) -> Iterator[None]:
    """Inside, batch norms in training normalise by the batch and leave their averages as they are.

    They write to copies, so what the graph has saved of the first pass stays valid.
    """
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    averages = [_set_aside(norm) for norm in norms]
    try:
        yield
    finally:
        for norm, kept in zip(norms, averages, strict=True):
            _put_back(norm, kept)


def recomputed(block: nn.Module, *inputs: Tensor) -> Tensor:
    """`block(*inputs)`, of whose activations only these are kept for the backward pass."""
    result: Tensor = checkpoint(
        block,
        *inputs,
        use_reentrant=False,
        preserve_rng_state=False,
        context_fn=lambda: (nullcontext(), statistics_kept(block)),
    )
    return result


def keep_statistics_unless(model: nn.Module, in_forward: Callable[[], bool]) -> None:
    """For a model that checkpoints by itself (timm's): any pass outside its forward is a second."""
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            aside: list[dict[str, Tensor]] = []
            module.register_forward_pre_hook(_before(in_forward, aside))
            module.register_forward_hook(_after(aside), always_call=True)


def _before(
    in_forward: Callable[[], bool], aside: list[dict[str, Tensor]]
) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def hook(norm: nn.Module, _: tuple[Tensor, ...]) -> None:
        if not in_forward():
            aside.append(_set_aside(norm))

    return hook


def _after(
    aside: list[dict[str, Tensor]],
) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
    def hook(norm: nn.Module, _: tuple[Tensor, ...], __: Tensor) -> None:
        if aside:
            _put_back(norm, aside.pop())

    return hook


@torch.no_grad()
def _set_aside(norm: nn.Module) -> dict[str, Tensor]:
    kept = dict(norm.named_buffers(recurse=False))
    for name, average in kept.items():
        setattr(norm, name, average.clone())
    return kept


def _put_back(norm: nn.Module, kept: dict[str, Tensor]) -> None:
    for name, average in kept.items():
        setattr(norm, name, average)
