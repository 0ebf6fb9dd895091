"""Copies of tensors in host memory that is used again at every save.

Fresh memory costs a page fault every 4 KiB when it is first written, which is more than the copy
itself; from a GPU, pinned memory is filled at the speed of its link.
"""

import copy
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor

from trainer.durable import RowStream

_PLAIN = (int, float, bool, str, bytes, type(None), RowStream)


class HostCopies:
    """One copy of a tree of tensors at a time: `take` overwrites what it gave before."""

    def __init__(self, device: torch.device) -> None:
        self._pinned = device.type == "cuda"
        self._buffers: dict[tuple[Any, ...], Tensor] = {}

    def take(self, item: Any) -> Any:
        """A deep copy with its tensors in CPU memory; training may change the live ones then."""
        used: dict[tuple[Any, ...], Tensor] = {}
        copied = self._copy(item, (), used)
        self._buffers = used  # what this tree has no tensor for is let go
        if self._pinned:
            torch.cuda.synchronize()
        return copied

    def _copy(self, item: Any, path: tuple[Any, ...], used: dict[tuple[Any, ...], Tensor]) -> Any:
        if isinstance(item, Tensor):
            used[path] = self._fill(item.detach(), self._buffers.get(path))
            return used[path]
        if type(item) in (dict, OrderedDict):
            return type(item)((k, self._copy(v, (*path, k), used)) for k, v in item.items())
        if type(item) in (list, tuple):
            return type(item)(self._copy(v, (*path, n), used) for n, v in enumerate(item))
        return item if isinstance(item, _PLAIN) else copy.deepcopy(item)

    def _fill(self, tensor: Tensor, buffer: Tensor | None) -> Tensor:
        if buffer is None or (buffer.shape, buffer.dtype) != (tensor.shape, tensor.dtype):
            pinned = self._pinned and tensor.device.type == "cuda"
            buffer = torch.empty_like(tensor, device="cpu", pin_memory=pinned)
        return buffer.copy_(tensor, non_blocking=tensor.device.type == "cuda")
