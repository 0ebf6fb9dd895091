"""What `train.precision` means on a device: the dtype that towers compute in."""

from functools import cache

import torch

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """Of `torch.autocast` over float32 parameters; None: float32 throughout.

    A CPU without instructions for bfloat16 would emulate it: a convolution or a matrix product
    takes 20 to 40 times as long as in float32. Such a CPU computes in float32.
    """
    if precision == "bf16" and device.type == "cpu" and not cpu_has_bfloat16():
        return None
    return AUTOCAST[precision]


@cache
def cpu_has_bfloat16() -> bool:
    """Whether oneDNN has kernels for bfloat16 on this CPU: AVX-512 and newer, on x86."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
