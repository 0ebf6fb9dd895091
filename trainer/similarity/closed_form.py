"""Losses whose gradients are known in closed form, as autograd sees them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function


@contextmanager
def plain_arithmetic(device: torch.device) -> Iterator[None]:
    """No graph and no autocast: the dtypes are those that the code names."""
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield


def needs_gradient(*inputs: Tensor) -> tuple[bool, ...]:
    """For each input, whether a backward pass could ask for its gradient."""
    return tuple(torch.is_grad_enabled() and x.requires_grad for x in inputs)


class _WithGradients(Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, count: int, *inputs_and_gradients: Any) -> Tensor:
        ctx.count = count
        ctx.save_for_backward(*inputs_and_gradients[count:])
        return value.clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        if torch.is_grad_enabled():  # create_graph=True: silently wrong if it went on
            raise RuntimeError("this loss has first derivatives only: leave out create_graph=True")
        gradients = [
            g * upstream.to(g.dtype) if g is not None and needed else None
            for g, needed in zip(ctx.saved_tensors, ctx.needs_input_grad[2:], strict=False)
        ]
        return None, None, *gradients, *[None] * ctx.count


def attach_gradients(
    value: Tensor,  # () the loss
    inputs: Sequence[Tensor],  # what it depends on
    gradients: Sequence[Tensor | None],  # dvalue/dinput, or None for an input that needs none
) -> Tensor:  # () the loss, as a function of the inputs
    """The loss whose backward pass only scales gradients that are there already.

    They were computed with the value, while tiles and visiting rows were at hand; so the backward
    pass holds no collective, and may run twice or not at all. It cannot be differentiated again.
    """
    shaped = [
        None if g is None else g.reshape(x.shape).to(x.dtype)
        for x, g in zip(inputs, gradients, strict=True)
    ]
    result: Tensor = _WithGradients.apply(value, len(inputs), *inputs, *shaped)
    return result
