"""Exponential moving average of the towers' weights, in parts where ZeRO keeps parameters in parts.

Polyak averaging with a constant decay per step; the start is the first weights themselves, with the
decay warmed up as (1 + step) / (10 + step), so that early noise is forgotten. Running statistics of
batch norms are averaged over the same steps: those of the last weights would not fit the averages.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from trainer.buffers import average_buffers
from trainer.engine import Engine
from trainer.ranks import Ranks


class WeightAverage:
    """Float32 averages of trained parameters (at ZeRO stage 3 of this rank's part of each) and of
    this rank's running statistics."""

    def __init__(self, engine: Engine, decay: float, ranks: Ranks) -> None:
        self._decay, self._ranks = decay, ranks
        self._engine, self._model = engine, engine.model
        self._parts = {name: part.detach().float().clone() for name, part in _averaged(self._model)}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move towards the weights after optimizer step `step` (1-based)."""
        decay = min(self._decay, (1 + step) / (10 + step))
        for name, part in _averaged(self._model):
            self._parts[name].lerp_(part.detach().float(), 1 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange averages and weights in the model; a second call puts them back."""
        for name, part in _averaged(self._model):
            kept = part.detach().float().clone()
            part.copy_(self._parts[name])
            self._parts[name] = kept
        self._engine.release()

    def whole(self) -> dict[str, Tensor]:
        """Averages as whole tensors on the CPU, running statistics as their mean over ranks; a
        collective."""
        self.swap()
        average_buffers(self._model, self._ranks)
        averages = {}
        for name, tensor in self._whole():
            with self._engine.gathered(_parameters(tensor)):
                averages[name] = tensor.detach().float().cpu().clone()
        self.swap()
        return averages

    @torch.no_grad()
    def load(self, averages: dict[str, Tensor]) -> None:
        """Take whole averages, as `whole` gave them, at any world size and stage."""
        self.swap()
        for name, tensor in self._whole():
            with self._engine.gathered(_parameters(tensor), modify=True):
                tensor.copy_(averages[name])
        self.swap()

    def _whole(self) -> Iterator[tuple[str, Tensor]]:
        named = dict(self._model.named_parameters()) | dict(self._model.named_buffers())
        return ((name, named[name]) for name in self._parts)


def _averaged(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Trained parameters, or this rank's parts of them, then running statistics, by name."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            yield name, getattr(parameter, "ds_tensor", parameter.data)
    for prefix, module in model.named_modules():
        if isinstance(module, _BatchNorm):
            for name, buffer in module.named_buffers(prefix, recurse=False):
                if buffer.is_floating_point():
                    yield name, buffer


def _parameters(tensor: Tensor) -> list[nn.Parameter]:
    return [tensor] if isinstance(tensor, nn.Parameter) else []
