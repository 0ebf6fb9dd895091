"""SGD with momentum whose state ZeRO can carry to another number of ranks."""

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer
from torch.optim.sgd import sgd


class MomentumSGD(Optimizer):
    """torch.optim.SGD's step, bit for bit, with its state under Adam's names.

    DeepSpeed's universal checkpoints (0.19.8, ds_to_universal.py) know `exp_avg`, `exp_avg_sq` and
    `step` alone. The momentum is `exp_avg`; `exp_avg_sq` stays zero: 4 bytes a parameter, in parts.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        *,
        lr: float,
        momentum: float,
        nesterov: bool = False,
        weight_decay: float = 0.0,  # coupled: part of the gradient, so momentum remembers it
        fused: bool | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "nesterov": nesterov,
            "weight_decay": weight_decay,
        }
        super().__init__(groups, defaults)
        self._fused = fused

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        if closure is not None:
            raise ValueError("a closure is not supported")
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if not parameters:
                continue
            gradients: list[Tensor] = [p.grad for p in parameters]
            sgd(
                parameters,
                gradients,
                [self._momentum(parameter) for parameter in parameters],
                fused=self._fused,
                lr=group["lr"],
                momentum=group["momentum"],
                weight_decay=group["weight_decay"],
                dampening=0.0,
                nesterov=group["nesterov"],
                maximize=False,
            )

    def _momentum(self, parameter: Tensor) -> Tensor | None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        state["step"] += 1
        buffer: Tensor = state["exp_avg"]
        return buffer
