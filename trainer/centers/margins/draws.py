"""Margins drawn by (seed, step, sample id): the same on any rank, in any order of the batch."""

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_FIRST, _SECOND = 0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64
_MARGINS = 18  # what the key is for


def draw_normal(
    sample_ids: Tensor,  # (N,) int64
    *,
    seed: int,
    step: int,
) -> Tensor:  # (N,) float64
    """One standard normal number a sample."""
    bits = derive_keys(seed, _MARGINS, step, sample_ids)
    # 52 bits and a half: never 0, never 1.
    return torch.special.ndtri((_shift_right(bits, 12).double() + 0.5) * 2.0**-52)


def derive_keys(*fields: int | Tensor) -> Tensor:  # int64
    """`data.order.derive_key` on torch's own device: the same bits, as signed integers."""
    device = next((x.device for x in fields if isinstance(x, Tensor)), None)
    key = torch.zeros(1, dtype=torch.int64, device=device)
    for field in fields:
        words = torch.as_tensor(field, dtype=torch.int64, device=device)
        key = _mix_bits((key + _GOLDEN) ^ _mix_bits(words + _GOLDEN))
    return key


def deal(
    margins: Tensor,  # (N,) drawn
    cosines: Tensor,  # (N,) of the targets
    sample_ids: Tensor,  # (N,)
) -> Tensor:  # (N,)
    """The same margins, so that the sample with the largest cosine has the smallest.

    Samples of equal cosine go by their ids.
    """
    by_id = sample_ids.argsort(stable=True)
    order = by_id[cosines[by_id].argsort(descending=True, stable=True)]
    dealt = torch.empty_like(margins)
    dealt[order] = margins.sort().values
    return dealt


def _mix_bits(words: Tensor) -> Tensor:
    words = (words ^ _shift_right(words, 30)) * _FIRST
    words = (words ^ _shift_right(words, 27)) * _SECOND
    return words ^ _shift_right(words, 31)


def _shift_right(words: Tensor, by: int) -> Tensor:
    """As of unsigned integers: zeros come in, where torch copies the sign."""
    return (words >> by) & (2 ** (64 - by) - 1)
