"""How one row moves: SGD with momentum, AdamW and row-wise Adagrad on a tile of rows, in place."""

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor
from torch.optim.sgd import sgd

from trainer.centers.rows import Scratch
from trainer.config import CentersConfig

Matrix = tuple[tuple[float, ...], ...]


class Rule(Protocol):
    """One optimizer. Beside the rows it keeps `wide` (n, d) and `narrow` (n,) tables by name."""

    wide: tuple[str, ...]
    narrow: dict[str, torch.dtype]
    missed: tuple[str, ...]
    """Tables that a dense optimizer would move in a step without gradient; empty: none."""

    def without_gradient(self, lr: float) -> Matrix:
        """The matrix by which `missed` tables move in a step without gradient."""
        ...

    def update(
        self,
        tile: Mapping[str, Tensor],  # "rows" and `wide` (k, d), `narrow` (k,)
        gradients: Tensor,  # (k, d)
        lr: float,
        scratch: Scratch,
    ) -> None:
        """Move a tile's rows and their state in place."""
        ...


class Sgd:
    """torch.optim.SGD: m <- momentum m + (g + decay w); w <- w - lr m, or Nesterov's look ahead."""

    def __init__(self, config: CentersConfig) -> None:
        self._momentum, self._nesterov = config.momentum, config.nesterov
        self._decay = config.weight_decay
        self.wide: tuple[str, ...] = ("momentum",) if config.momentum else ()
        self.narrow: dict[str, torch.dtype] = {}
        self.missed: tuple[str, ...] = (
            ("rows", *self.wide) if config.momentum or config.weight_decay else ()
        )

    def without_gradient(self, lr: float) -> Matrix:
        momentum, decay = self._momentum, self._decay
        if not momentum:
            return ((1 - lr * decay,),)
        # Nesterov's step is along g + momentum m, with g = decay w here.
        ahead = momentum if self._nesterov else 1.0
        shrink = decay * (1 + momentum) if self._nesterov else decay
        return ((1 - lr * shrink, -lr * momentum * ahead), (decay, momentum))

    def update(
        self, tile: Mapping[str, Tensor], gradients: Tensor, lr: float, scratch: Scratch
    ) -> None:
        del scratch
        momentum = [tile[name] for name in self.wide]
        # Fused: one pass over the tile. On a CPU torch rounds the last numbers of a tile otherwise
        # if they fill no vector (64 bytes): where `dim` is no multiple, the last bit may differ.
        sgd(
            [tile["rows"]],
            [gradients],
            list(momentum) or [None],
            fused=True,
            weight_decay=self._decay,
            momentum=self._momentum,
            lr=lr,
            dampening=0.0,
            nesterov=self._nesterov,
            maximize=False,
        )


class AdamW:
    """Loshchilov and Hutter 2019, arXiv 1711.05101, with a step count for each row.

    Moments move only with their row, and bias is corrected by the row's own count: a row seen for
    the first time after 1000 steps moves by about lr, as any row does on its first step. With one
    count for all it would move by three times that and, with moments that shrink while it is not
    touched, by up to thirty times over the steps that follow (`reference/faces.md` 1.2).
    """

    def __init__(self, config: CentersConfig) -> None:
        self._betas, self._eps, self._decay = config.betas, config.eps, config.weight_decay
        self.wide: tuple[str, ...] = ("moment1", "moment2")
        self.narrow = {"row_steps": torch.int32}
        self.missed: tuple[str, ...] = ("rows",) if config.weight_decay else ()

    def without_gradient(self, lr: float) -> Matrix:
        return ((1 - lr * self._decay,),)

    def update(
        self, tile: Mapping[str, Tensor], gradients: Tensor, lr: float, scratch: Scratch
    ) -> None:
        rows, (beta1, beta2) = tile["rows"], self._betas
        steps = tile["row_steps"].add_(1).double()
        bias1 = (1 - torch.pow(beta1, steps)).to(rows.dtype)[:, None]
        bias2 = (1 - torch.pow(beta2, steps)).rsqrt_().to(rows.dtype)[:, None]
        moment1 = tile["moment1"].lerp_(gradients, 1 - beta1)
        moment2 = tile["moment2"].mul_(beta2).addcmul_(gradients, gradients, value=1 - beta2)
        room = scratch.take("denominator", len(rows), rows.dtype)
        torch.sqrt(moment2, out=room).mul_(bias2).add_(self._eps).mul_(bias1)
        _decay(rows, lr * self._decay)
        rows.addcdiv_(moment1, room, value=-lr)


class Adagrad:
    """Duchi et al. 2011 with one accumulator a row: the mean square of the row's gradients, summed.

    Decay is decoupled: a coupled one would wear the step size down on its own.
    """

    def __init__(self, config: CentersConfig) -> None:
        self._eps, self._decay = config.eps, config.weight_decay
        self.wide: tuple[str, ...] = ()
        self.narrow = {"accumulator": torch.float32}
        self.missed: tuple[str, ...] = ("rows",) if config.weight_decay else ()

    def without_gradient(self, lr: float) -> Matrix:
        return ((1 - lr * self._decay,),)

    def update(
        self, tile: Mapping[str, Tensor], gradients: Tensor, lr: float, scratch: Scratch
    ) -> None:
        del scratch
        rows, dim = tile["rows"], gradients.shape[1]
        squares = torch.linalg.vector_norm(gradients, dim=1).square_().div_(dim)
        speed = tile["accumulator"].add_(squares).sqrt().add_(self._eps)
        _decay(rows, lr * self._decay)
        rows.addcmul_(gradients, (-lr / speed)[:, None])


def _decay(rows: Tensor, share: float) -> None:
    if share:
        rows.mul_(1 - share)


RULES: dict[str, type[Sgd] | type[AdamW] | type[Adagrad]] = {
    "sgd": Sgd,
    "adamw": AdamW,
    "adagrad": Adagrad,
}
