"""One optimizer step: embeddings, loss, gradients, update; whole or in chunks with one loss.

A step in chunks (gradient caching, Gao et al. 2021, arXiv 2101.06983) embeds the rank's batch
chunk by chunk without a graph, takes the loss and its gradient on the embeddings once, and embeds
again to carry that gradient into the towers. It is the same step to rounding: masks of dropout are
keyed by sample (`trainer/dropout.py`), any other draw is re-seeded per chunk, and gradients are
reduced when the last chunk is done.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from data.loader import Batch
from trainer.dropout import row_keys, use_row_keys
from trainer.engine import Engine, StepResult
from trainer.metrics import StepClock
from trainer.objective import Objective, Pairs


class StepOutput(NamedTuple):
    """What a step leaves behind for people's numbers."""

    loss: Tensor  # () this rank's share, detached
    result: StepResult
    embeddings: Pairs  # detached, this rank's rows


@dataclass(frozen=True)
class Stepper:
    """All that a step needs and that does not change from step to step."""

    engine: Engine
    objective: Objective
    seed: int
    num_chunks: int  # the same on every rank: DeepSpeed reduces together
    device: torch.device
    autocast_dtype: torch.dtype | None
    clock: StepClock

    def __call__(self, batch: Batch, step: int, learning_rate: float) -> StepOutput:
        """Train on this rank's rows of global batch `step`."""
        chunks = list(self._chunks(batch))
        cached = len(chunks) > 1
        with torch.no_grad() if cached else nullcontext():
            parts = [self._embed(chunk, step, i) for i, chunk in enumerate(chunks)]
        leaves = _leaves(parts)
        self.clock.mark("towers")
        loss = self.objective(leaves, batch)
        if loss.requires_grad:
            loss.backward()
        self.clock.mark("loss")
        start = 0
        for i, chunk in enumerate(chunks):
            part = self._embed(chunk, step, i) if cached else parts[i]
            stop = start + chunk.num_rows
            surrogate = _surrogate(part, leaves, slice(start, stop), share=1 / len(chunks))
            self.engine.backward(surrogate, last=i == len(chunks) - 1)
            start = stop
        self.clock.mark("backward")
        result = self.engine.step(learning_rate)
        self.clock.mark("optimizer")
        return StepOutput(loss.detach(), result, _detached(leaves))

    def _chunks(self, batch: Batch) -> "Iterator[_Chunk]":
        keys = row_keys(self.seed, batch.positions.to(self.device))
        pieces = [
            tensor.tensor_split(self.num_chunks) for tensor in (batch.images, batch.texts, keys)
        ]
        return (_Chunk(*piece) for piece in zip(*pieces, strict=True))

    def _embed(self, chunk: "_Chunk", step: int, number: int) -> Pairs:
        # Draws that are not keyed by sample (a tower of the user's own) repeat in the second pass.
        torch.manual_seed(self.seed * 1_000_003 + step * 1_009 + number)
        use_row_keys(self.engine.model, chunk.keys)
        with self._autocast():
            embeddings = self.engine.forward_model()(
                chunk.images.to(self.device, non_blocking=True),
                chunk.texts.to(self.device, non_blocking=True),
            )
        return Pairs(*embeddings)

    def _autocast(self) -> AbstractContextManager[object]:
        if self.autocast_dtype is None:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.autocast_dtype)


class _Chunk(NamedTuple):
    images: Tensor  # (c, 3, H, W) uint8
    texts: Tensor  # (c, T) int64
    keys: Tensor  # (c,) int64

    @property
    def num_rows(self) -> int:
        return len(self.keys)


def _leaves(parts: list[Pairs]) -> Pairs:
    """The whole batch's embeddings, cut from the towers' graph, ready to receive a gradient."""

    def leaf(tensors: list[Tensor]) -> Tensor:
        tensor = torch.cat(tensors) if len(tensors) > 1 else tensors[0]
        return tensor.detach().requires_grad_()

    last = parts[-1]
    return Pairs(
        images=leaf([part.images for part in parts]),
        texts=leaf([part.texts for part in parts]),
        scale=leaf([last.scale]),
        bias=None if last.bias is None else leaf([last.bias]),
    )


def _detached(embeddings: Pairs) -> Pairs:
    bias = None if embeddings.bias is None else embeddings.bias.detach()
    return Pairs(
        embeddings.images.detach(), embeddings.texts.detach(), embeddings.scale.detach(), bias
    )


def _surrogate(part: Pairs, leaves: Pairs, rows: slice, *, share: float) -> Tensor:
    """A scalar whose gradient is the loss's: sum of outputs times their known gradients.

    Every chunk carries an equal share of the scale's and bias's gradient: a parameter without a
    gradient in the reducing call would be left out of ZeRO's reduction.
    """
    total = part.scale.new_zeros(())
    for output, gradient in (
        (part.images, leaves.images.grad),
        (part.texts, leaves.texts.grad),
    ):
        if gradient is not None and output.requires_grad:
            total = total + (output * gradient[rows]).sum()
    for scalar, leaf in ((part.scale, leaves.scale), (part.bias, leaves.bias)):
        if scalar is not None and leaf is not None and leaf.grad is not None:
            total = total + (scalar * leaf.grad).sum() * share
    return total
