"""Exponential moving average of the towers' weights, in parts where ZeRO keeps parameters in parts.

Polyak averaging with a constant decay per step; the start is the first weights themselves, with the
decay warmed up as (1 + step) / (10 + step), so that early noise is forgotten.
"""

import torch
from torch import Tensor, nn

from trainer.engine import Engine


class WeightAverage:
    """Float32 averages of the trained parameters; at ZeRO stage 3 of this rank's part of each."""

    def __init__(self, engine: Engine, decay: float) -> None:
        self._decay = decay
        self._engine, self._model = engine, engine.model
        self._parts = {
            name: _part(parameter).detach().float().clone()
            for name, parameter in self._model.named_parameters()
            if parameter.requires_grad
        }

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move towards the weights after optimizer step `step` (1-based)."""
        decay = min(self._decay, (1 + step) / (10 + step))
        for name, parameter in self._model.named_parameters():
            if name in self._parts:
                self._parts[name].lerp_(_part(parameter).detach().float(), 1 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange averages and weights in the model; a second call puts them back."""
        for name, parameter in self._model.named_parameters():
            if name in self._parts:
                part = _part(parameter)
                kept = part.detach().float().clone()
                part.copy_(self._parts[name])
                self._parts[name] = kept
        self._engine.release()

    def whole(self) -> dict[str, Tensor]:
        """Averages as whole tensors on the CPU; a collective at stage 3."""
        self.swap()
        named = dict(self._model.named_parameters())
        averages = {}
        for name in self._parts:
            with self._engine.gathered([named[name]]):
                averages[name] = named[name].detach().float().cpu().clone()
        self.swap()
        return averages

    @torch.no_grad()
    def load(self, averages: dict[str, Tensor]) -> None:
        """Take whole averages, as `whole` gave them, at any world size and stage."""
        named = dict(self._model.named_parameters())
        self.swap()
        for name, value in averages.items():
            with self._engine.gathered([named[name]], modify=True):
                named[name].copy_(value)
        self.swap()


def _part(parameter: nn.Parameter) -> Tensor:
    part: Tensor = getattr(parameter, "ds_tensor", parameter.data)
    return part
