"""What train.precision means on a device."""

import time

import pytest
import torch

from trainer import precision
from trainer.precision import autocast_dtype

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize("has_bfloat16", [True, False])
def test_a_cpu_that_would_emulate_bfloat16_computes_in_float32(monkeypatch, has_bfloat16):
    monkeypatch.setattr(precision, "cpu_has_bfloat16", lambda: has_bfloat16)
    assert autocast_dtype("bf16", CPU) is (torch.bfloat16 if has_bfloat16 else None)
    assert autocast_dtype("bf16", GPU) is torch.bfloat16
    assert autocast_dtype("fp16", CPU) is autocast_dtype("fp16", GPU) is torch.float16
    assert autocast_dtype("fp32", CPU) is autocast_dtype("fp32", GPU) is None


def test_what_this_cpu_is_said_to_have_is_true():
    """A product in bfloat16 is no 8 times slower than in float32 where bfloat16 is said to be."""
    one = torch.randn(512, 512)
    times = {}
    for dtype in (torch.float32, torch.bfloat16):
        factor = one.to(dtype)
        factor @ factor
        seconds = [_seconds(lambda: factor @ factor) for _ in range(5)]  # noqa: B023
        times[dtype] = min(seconds)
    slow = times[torch.bfloat16] > 8 * times[torch.float32]
    assert slow != precision.cpu_has_bfloat16(), times


def _seconds(call) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start
