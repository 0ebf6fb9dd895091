"""Running reductions of tiles, one value a row or a column, in at least float32."""

import torch
from torch import Tensor


def add_logsumexp(
    total: Tensor,  # (m,) or (k,): log of the sum so far, -inf for none; updated in place
    logits: Tensor,  # (m, k); -inf where a pair does not count
    dim: int,
    scratch: Tensor,  # (m, k) overwritten
) -> None:
    """total = log(exp(total) + sum over `dim` of exp(logits)), finite for any finite logits."""
    # A line without any finite entry has no maximum to subtract: -inf - (-inf) would be NaN.
    top = logits.amax(dim, keepdim=True).clamp_(min=torch.finfo(logits.dtype).min)
    part = torch.sub(logits, top, out=scratch).exp_().sum(dim).log_().add_(top.squeeze(dim))
    torch.logaddexp(total, part, out=total)


def finite_shift(logsumexps: Tensor) -> Tensor:
    """The log-sum-exps with 0 for those of nothing, so that exp(-inf - shift) is 0, not NaN."""
    return logsumexps.masked_fill(logsumexps == -torch.inf, 0.0)


def softplus_sums(
    logits: Tensor,  # (m, k)
    dim: int,
    scratch: Tensor,  # (m, k) overwritten
) -> Tensor:  # (m,) or (k,)
    """Sums over `dim` of log(1 + exp(z)) = max(z, 0) + log(1 + exp(-|z|)), which cannot overflow.

    torch's softplus is linear above 20, which a float64 check sees, and 8 times slower on a CPU.
    """
    positive = torch.clamp(logits, min=0, out=scratch).sum(dim)
    return torch.abs(logits, out=scratch).neg_().exp_().log1p_().sum(dim).add_(positive)
