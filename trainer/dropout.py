"""Dropout drawn from (seed, position of the sample, layer, element), not from a generator's stream.

A mask then depends on nothing else: not on the rank or the chunk a sample falls to, not on what was
drawn before. So a step in chunks, a recomputed forward pass and a run resumed on another number of
ranks all see the same masks, and no generator's state need be saved or replayed.
"""

from collections.abc import Sequence

import open_clip.transformer
import torch
from timm.layers.drop import DropPath
from timm.layers.patch_dropout import PatchDropout
from torch import Tensor, nn

_MASK32 = 0xFFFFFFFF


def mix32(x: Tensor) -> Tensor:
    """Bijective 32-bit hash of int64 values below 2**32, elementwise.

    The `lowbias32` finaliser of Wellons' hash prospector: every output bit depends on every input.
    """
    x = (x ^ (x >> 16)) * 0x7FEB352D & _MASK32
    x = (x ^ (x >> 15)) * 0x846CA68B & _MASK32
    return x ^ (x >> 16)


def row_keys(seed: int, positions: Tensor) -> Tensor:
    """Keys of this step's samples: (n,) int64 below 2**32 from (n,) int64 global positions."""
    low, high = positions & _MASK32, (positions >> 32) & _MASK32
    return mix32(mix32(mix32(low + (seed & _MASK32) & _MASK32) ^ high) ^ (seed >> 32 & _MASK32))


def keyed_uniform(keys: Tensor, layer: int, shape: Sequence[int]) -> Tensor:
    """Uniform [0, 1) float32 of `shape` = (n, ...): a hash of (row key, layer, index) each."""
    per_row = 1
    for size in shape[1:]:
        per_row *= size
    index = mix32(torch.arange(per_row, device=keys.device))
    row = mix32(keys ^ (layer * 0x9E3779B9 & _MASK32))
    # 24 bits fill a float32's significand exactly
    return (mix32(row[:, None] ^ index) >> 8).to(torch.float32).mul_(2.0**-24).reshape(shape)


UNDROPPED = -1
"""Key of a row that loses nothing."""


class _Keyed(nn.Module):
    """A layer that draws by row key; `use_row_keys` sets `keys` before each forward pass."""

    def __init__(self, probability: float, layer: int) -> None:
        super().__init__()
        self.probability, self.layer = probability, layer
        self.keys: Tensor | None = None

    def keys_of(self, num_rows: int) -> Tensor:
        """(num_rows,) what was set; ValueError where it is not of these rows."""
        if self.keys is None or len(self.keys) != num_rows:
            have = "none" if self.keys is None else len(self.keys)
            raise ValueError(f"{num_rows} rows in training but row keys for {have}")
        return self.keys

    def _uniform(self, shape: Sequence[int]) -> Tensor:
        return keyed_uniform(self.keys_of(shape[0]), self.layer, shape)

    def _factors(self, shape: Sequence[int]) -> Tensor:
        """What elements are multiplied by: 0 where they are dropped, more than 1 elsewhere."""
        kept = (self._uniform(shape) >= self.probability) / (1.0 - self.probability)
        undropped = self.keys_of(shape[0]) == UNDROPPED
        if undropped.any():
            kept[undropped] = 1.0
        return kept

    def extra_repr(self) -> str:
        return f"{self.probability}, layer={self.layer}"


class KeyedDropout(_Keyed):
    """nn.Dropout: (n, ...) -> (n, ...)."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.probability == 0.0:
            return x
        return x * self._factors(x.shape).to(x.dtype)


class KeyedDropPath(_Keyed):
    """Stochastic depth (Huang et al. 2016, arXiv 1603.09382): drops a sample's residual branch."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.probability == 0.0:
            return x
        shape = (x.shape[0],) + (1,) * (x.ndim - 1)
        return x * self._factors(shape).to(x.dtype)


class KeyedPatchDropout(_Keyed):
    """FLIP (Li et al. 2022, arXiv 2212.00794): keeps a random share of the patches (n, T, d)."""

    def __init__(self, probability: float, layer: int, num_prefix_tokens: int) -> None:
        super().__init__(probability, layer)
        self.num_prefix_tokens = num_prefix_tokens

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.probability == 0.0:
            return x
        prefix, patches = x[:, : self.num_prefix_tokens], x[:, self.num_prefix_tokens :]
        kept = _draw_kept(self._uniform(patches.shape[:2]), self.probability)
        patches = patches.gather(1, kept[:, :, None].expand(-1, -1, patches.shape[2]))
        return torch.cat([prefix, patches], dim=1)


class KeyedPatchMask(_Keyed):
    """Random patches left out, to be filled in later: (n, T, d) -> kept patches and their places.

    Never anything but keyed; without row keys it cannot train. Places: (n, k), None where all stay.
    """

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        if not self.training or self.probability == 0.0:
            return x, None
        kept = _draw_kept(self._uniform(x.shape[:2]), self.probability)
        return x.gather(1, kept[:, :, None].expand(-1, -1, x.shape[2])), kept


class KeyedTokenDropout(_Keyed):
    """Leaves out a share of each text's tokens: (n, T) bool, which there are, to which stay.

    Never anything but keyed, in a layer number of its own; a text that would lose all keeps all.
    """

    def __init__(self, probability: float) -> None:
        super().__init__(probability, layer=-2)

    def forward(self, present: Tensor) -> Tensor:
        if not self.training or self.probability == 0.0:
            return present
        undropped = (self.keys_of(len(present)) == UNDROPPED).unsqueeze(1)
        kept = present & ((self._uniform(present.shape) >= self.probability) | undropped)
        return torch.where(kept.any(1, keepdim=True), kept, present)


class RowKeys(_Keyed):
    """Draws nothing: a model finds its rows' keys here, to hand on to some of its layers."""

    def __init__(self) -> None:
        super().__init__(0.0, layer=0)


def _draw_kept(uniform: Tensor, probability: float) -> Tensor:  # (n, T) -> (n, k)
    num_kept = max(1, int(uniform.shape[1] * (1.0 - probability)))
    return uniform.topk(num_kept, dim=1).indices


def make_dropout_keyed(model: nn.Module) -> None:
    """Replace the dropout layers of open_clip's and timm's towers by keyed ones, in place.

    A module already in use elsewhere keeps its own layer number, so masks differ between layers.
    """
    layer = 0
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            keyed = _keyed_version(child, layer)
            if keyed is not None:
                setattr(module, name, keyed)
                layer += 1


def _keyed_version(module: nn.Module, layer: int) -> nn.Module | None:
    if type(module) is nn.Dropout and module.p > 0:
        return KeyedDropout(module.p, layer)
    if isinstance(module, DropPath) and module.drop_prob:
        return KeyedDropPath(float(module.drop_prob), layer)
    if isinstance(module, open_clip.transformer.PatchDropout) and module.prob > 0:
        return KeyedPatchDropout(module.prob, layer, int(module.exclude_first_token))
    if isinstance(module, PatchDropout) and module.prob > 0:
        return KeyedPatchDropout(module.prob, layer, module.num_prefix_tokens)
    return None


def use_row_keys(model: nn.Module, keys: Tensor) -> None:
    """Tell every keyed layer which samples the next forward pass holds: (n,) keys, in row order."""
    for module in model.modules():
        if isinstance(module, _Keyed):
            module.keys = keys
