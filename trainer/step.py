"""One optimizer step: embeddings, loss, gradients, update; whole or in chunks with one loss.

A step in chunks (gradient caching, Gao et al. 2021, arXiv 2101.06983) embeds the rank's inputs
chunk by chunk without a graph, takes the loss and its gradient on the embeddings once, and embeds
again to carry that gradient into the towers. It is the same step to rounding: masks of dropout are
keyed by sample (`trainer/dropout.py`), any other draw is re-seeded per chunk, and gradients are
reduced when the last chunk is done. Inputs may be of different lengths (queries, and the texts of
all labels): each is cut into as many chunks, and so are the outputs.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from data.loader import Batch
from trainer.dropout import row_keys, use_row_keys
from trainer.engine import Engine, StepResult
from trainer.metrics import StepClock
from trainer.models.recompute import statistics_kept
from trainer.objectives import Objective, Outputs


class StepOutput(NamedTuple):
    """What a step leaves behind for people's numbers."""

    loss: Tensor  # () this rank's share, detached
    result: StepResult
    outputs: Outputs  # of the model, detached, this rank's rows


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
        with self._first_pass() if cached else nullcontext():
            parts = [self._embed(chunk, step, i) for i, chunk in enumerate(chunks)]
        leaves = _leaves(parts)
        self.clock.mark("towers")
        loss = self.objective.loss(leaves, batch, step)
        if loss.requires_grad:
            loss.backward()
        self.clock.mark("loss")
        starts = [0] * len(leaves)
        for i, chunk in enumerate(chunks):
            part = self._embed(chunk, step, i) if cached else parts[i]
            surrogate = _surrogate(part, leaves, starts, share=1 / len(chunks))
            self.engine.backward(surrogate, last=i == len(chunks) - 1)
            starts = [start + len(output) for start, output in zip(starts, part, strict=True)]
        self.clock.mark("backward")
        result = self.engine.step(learning_rate)
        self.objective.after_step(learning_rate, applied=result.applied)
        self.clock.mark("optimizer")
        return StepOutput(loss.detach(), result, tuple(leaf.detach() for leaf in leaves))

    @contextmanager
    def _first_pass(self) -> Iterator[None]:
        """No graph; batch norms' averages move in the second pass alone."""
        with torch.no_grad(), statistics_kept(self.engine.model):
            yield

    def _chunks(self, batch: Batch) -> "Iterator[_Chunk]":
        keys = row_keys(self.seed, batch.positions.to(self.device))
        inputs = self.objective.inputs(batch)
        pieces = [tensor.tensor_split(self.num_chunks) for tensor in (keys, *inputs)]
        return (_Chunk(keys, inputs) for keys, *inputs in zip(*pieces, strict=True))

    def _embed(self, chunk: "_Chunk", step: int, number: int) -> Outputs:
        # Draws that are not keyed by sample (a tower of the user's own) repeat in the second pass.
        torch.manual_seed(self.seed * 1_000_003 + step * 1_009 + number)
        use_row_keys(self.engine.model, chunk.keys)
        with self._autocast():
            moved = (tensor.to(self.device, non_blocking=True) for tensor in chunk.inputs)
            outputs = self.engine.forward_model()(*moved)
        return tuple(output for output in outputs if output is not None)

    def _autocast(self) -> AbstractContextManager[object]:
        if self.autocast_dtype is None:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.autocast_dtype)


class _Chunk(NamedTuple):
    keys: Tensor  # (c,) int64
    inputs: list[Tensor]  # each (k, ...), the first (c, ...)


def _is_rows(output: Tensor) -> bool:
    """Rows of an input, (n, d); what has one dimension, (1,), belongs to all of it."""
    return output.ndim == 2


def _leaves(parts: list[Outputs]) -> Outputs:
    """The whole batch's outputs, cut from the model's graph, ready to receive a gradient."""
    leaves = []
    for pieces in zip(*parts, strict=True):
        whole = torch.cat(pieces) if _is_rows(pieces[0]) and len(pieces) > 1 else pieces[-1]
        leaves.append(whole.detach().requires_grad_())
    return tuple(leaves)


def _surrogate(part: Outputs, leaves: Outputs, starts: list[int], *, share: float) -> Tensor:
    """A scalar whose gradient is the loss's: sum of outputs times their known gradients.

    Output i of this chunk is rows from `starts[i]` on. Every chunk carries an equal share of the
    scale's and bias's gradient, also where it is 0: a parameter without a gradient in the reducing
    call would be left out of ZeRO's reduction.
    """
    total = leaves[0].new_zeros(())
    for output, leaf, start in zip(part, leaves, starts, strict=True):
        if not output.requires_grad:
            continue
        gradient = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        if _is_rows(output):
            total = total + (output * gradient[start : start + len(output)]).sum()
        else:
            total = total + (output * gradient).sum() * share
    return total
