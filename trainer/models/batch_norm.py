"""Batch norm over the global batch: what a run computes does not depend on the number of ranks.

Each rank takes mean and variance of its own samples; they are merged without cancellation (Chan et
al. 1983, "Algorithms for computing the sample variance"), in float64. The backward pass adds up the
two sums of the gradient that a batch norm needs. One exchange each way and layer, of 2 C numbers;
torch's SyncBatchNorm does the same on GPUs alone. In a step in chunks (`trainer/step.py`) the batch
is what the ranks pass at once, a chunk each.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup
from torch.nn.modules.batchnorm import _BatchNorm

from trainer.collectives import count_ranks, gather_rows, sum_over_ranks
from trainer.config import ConfigError

BLOCK = 131_072  # elements a thread: temporaries stay in its cache, and are never paged in anew


class Moments(NamedTuple):
    """Of every channel, over all ranks' samples; float64, equal on all ranks."""

    mean: Tensor  # (C,)
    variance: Tensor  # (C,), biased
    total: Tensor  # () values of a channel


class GlobalBatchNorm(_BatchNorm):
    """nn.BatchNorm1d, 2d, 3d by what all ranks hold: (n, C, ...) -> (n, C, ...), n may be 0.

    In training every rank must call it together, and go backward together.
    """

    group: ProcessGroup | None

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return _BatchNorm.forward(self, x)
        moments = global_moments(x, self.group)
        self._move_averages(moments)
        normalised: Tensor = _Normalise.apply(
            x, self.weight, self.bias, moments, self.eps, self.group
        )
        return normalised

    def _check_input_dim(self, input: Tensor) -> None:
        """Any number of dimensions after the channels'."""

    @torch.no_grad()
    def _move_averages(self, moments: Moments) -> None:
        if self.running_mean is None or self.running_var is None:
            return
        share = self.momentum
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if share is None:
                share = 1.0 / float(self.num_batches_tracked)
        unbiased = moments.variance * (moments.total / (moments.total - 1).clamp_min(1))
        self.running_mean.lerp_(moments.mean.to(self.running_mean.dtype), share or 0.0)
        self.running_var.lerp_(unbiased.to(self.running_var.dtype), share or 0.0)


class GlobalBatchNormAct(GlobalBatchNorm):
    """timm's norm that has its activation inside."""

    drop: nn.Module
    act: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.act(self.drop(super().forward(x)))
        return result


GLOBAL: dict[type, type[GlobalBatchNorm]] = {
    nn.BatchNorm1d: GlobalBatchNorm,
    nn.BatchNorm2d: GlobalBatchNorm,
    nn.BatchNorm3d: GlobalBatchNorm,
    BatchNormAct2d: GlobalBatchNormAct,
}


def make_batch_norm_global(model: nn.Module, group: ProcessGroup | None) -> int:
    """Make every batch norm one over `group`, in place; the number of them. One rank: nothing.

    Parameters, averages, their names and the hooks on the modules stay: a module only changes its
    class. Raises ConfigError for a kind of batch norm that has no global version.
    """
    if count_ranks(group) == 1:
        return 0
    norms = [(n, m) for n, m in model.named_modules() if isinstance(m, _BatchNorm)]
    for name, norm in norms:
        if type(norm) not in GLOBAL:
            raise ConfigError(
                f"model.global_batch_norm: {name} is a {type(norm).__name__}, which has no version"
                " over ranks; set it to false"
            )
        norm.__class__ = GLOBAL[type(norm)]
        cast(GlobalBatchNorm, norm).group = group
    return len(norms)


@torch.no_grad()
def global_moments(x: Tensor, group: ProcessGroup | None) -> Moments:
    """Mean and variance of (n, C, ...) over all dimensions but C, and over ranks; a collective."""
    num_channels = x.shape[1]
    mean = torch.zeros(num_channels, dtype=_statistics_dtype(x), device=x.device)
    variance, count = mean, x.numel() // num_channels
    if count:
        # What a batch norm in training takes first; the averages it would move are not wanted.
        mean, variance = torch.batch_norm_update_stats(_dense(x), mean.clone(), mean, 0.0)
    own = torch.cat([mean.double(), variance.double(), mean.new_full((1,), count).double()])
    every = gather_rows(own[None], [1] * count_ranks(group), group)
    means, variances, counts = every.split([num_channels, num_channels, 1], dim=1)
    total = counts.sum()
    shares = counts / total.clamp_min(1)
    mean = (shares * means).sum(0)
    return Moments(mean, (shares * (variances + (means - mean).square())).sum(0), total)


class _Normalise(torch.autograd.Function):
    """(x - mean) / sqrt(variance + eps) * weight + bias; the moments are functions of every x."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # (n, C, ...)
        weight: Tensor | None,  # (C,)
        bias: Tensor | None,  # (C,)
        moments: Moments,
        eps: float,
        group: ProcessGroup | None,
    ) -> Tensor:  # (n, C, ...)
        x = _dense(x)
        ctx.save_for_backward(x, weight, *moments)
        ctx.eps, ctx.group = eps, group
        if not x.numel():
            return torch.empty_like(x)
        mean, variance, weight, bias = _cast(x, moments.mean, moments.variance, weight, bias)
        return F.batch_norm(x, mean, variance, weight, bias, eps=eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, weight, *saved = ctx.saved_tensors
        moments = Moments(*saved)
        gradient = gradient.contiguous(memory_format=_memory_format(x))
        sums = _gradient_sums(gradient, x, moments, ctx.eps)
        x_gradient = None
        if ctx.needs_input_grad[0]:
            means = sum_over_ranks(sums, ctx.group) / moments.total.clamp_min(1)
            x_gradient = _input_gradient(gradient, x, weight, moments, means, ctx.eps)
        weight_gradient, bias_gradient = (
            own.to(x.dtype if weight is None else weight.dtype) if needed else None
            for own, needed in zip(sums, ctx.needs_input_grad[1:3], strict=True)
        )
        return x_gradient, weight_gradient, bias_gradient, None, None, None


def _gradient_sums(gradient: Tensor, x: Tensor, moments: Moments, eps: float) -> Tensor:
    """(2, C) float64 over this rank's samples: of gradient times normalised x, and of gradient."""
    if not x.numel():
        return moments.mean.new_zeros(2, x.shape[1])
    mean, variance, one = _cast(x, moments.mean, moments.variance, torch.ones_like(moments.mean))
    _, *sums = torch.ops.aten.native_batch_norm_backward(
        gradient, x, one, mean, variance, None, None, False, eps, [False, True, True]
    )
    return torch.stack(sums).double()


def _input_gradient(
    gradient: Tensor,  # (n, C, ...)
    x: Tensor,  # (n, C, ...)
    weight: Tensor | None,
    moments: Moments,
    means: Tensor,  # (2, C) of `_gradient_sums`, over all ranks' samples
    eps: float,
) -> Tensor:  # (n, C, ...)
    """weight / sqrt(variance + eps) * (gradient - its mean - normalised x * the other mean).

    Twice torch's kernel, which computes in float32 whatever it reads and writes.
    """
    slope = (moments.variance + eps).rsqrt()
    if weight is not None:
        slope = slope * weight
    mean, variance, slope, of_x, shift = _cast(
        x, moments.mean, moments.variance, slope, *(-slope * means)
    )
    zero, one = torch.zeros_like(slope), torch.ones_like(slope)
    result = torch.empty_like(x)
    for to, incoming, own in zip(_blocks(result), _blocks(gradient), _blocks(x), strict=True):
        torch.add(
            F.batch_norm(incoming, zero, one, slope, zero, eps=0.0),
            F.batch_norm(own, mean, variance, of_x, shift, eps=eps),
            out=to,
        )
    return result


def _blocks(x: Tensor) -> Iterator[Tensor]:
    """Views of all of x, each small enough for a cache; on a GPU x itself."""
    size = BLOCK * torch.get_num_threads() // max(1, x.shape[1])
    if x.device.type != "cpu" or not x.numel():
        yield x
    elif x.ndim == 2 or _memory_format(x) == torch.channels_last:
        rows = x.movedim(1, -1).view(1, -1, 1, x.shape[1]).movedim(-1, 1)
        yield from rows.split(max(1, size), dim=2)
    else:
        yield from x.split(max(1, size * len(x) * x.shape[1] // x.numel()))


def _memory_format(x: Tensor) -> torch.memory_format:
    last = x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


def _dense(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=_memory_format(x))


def _cast(x: Tensor, *numbers: Tensor | None) -> Iterator[Any]:
    """What belongs to channels, as torch's kernels take it beside x."""
    dtype = _statistics_dtype(x)
    return (None if number is None else number.to(dtype) for number in numbers)


def _statistics_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
