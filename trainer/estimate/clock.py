"""Time of a step as a bound: arithmetic and links at the share of their peak that runs reach."""

from dataclasses import dataclass

from trainer.estimate.machines import LINK_SHARE, PEAK_SHARE, Machine
from trainer.estimate.meter import Pass
from trainer.estimate.plan import Plan

DISK_BYTES_A_SECOND = 1e9  # what a checkpoint is written with: a local NVMe, or a good share of one


@dataclass(frozen=True)
class StepTime:
    """Seconds that a step cannot be shorter than; loading samples is not in it."""

    towers: float
    loss: float
    wire: float
    latency: float = 0.0

    @property
    def seconds(self) -> float:
        """Exchange overlaps with arithmetic where it can, at best."""
        return max(self.towers + self.loss, self.wire)

    @property
    def bound_by(self) -> str:
        """The larger part."""
        if self.wire > self.towers + self.loss:
            return "links between ranks"
        return "towers" if self.towers >= self.loss else "loss"


def tower_flops(passed: Pass, num_chunks: int) -> float:
    """Of a rank in a step; cached chunks are embedded once more, without a graph."""
    again = passed.forward_flops if num_chunks > 1 else 0
    return float(num_chunks) * (passed.forward_flops + passed.backward_flops + again)


def step_time(plan: Plan, flops: float, loss: float, sent: float) -> StepTime:
    """From FLOPs of towers and loss, and bytes that a rank sends."""
    machine = plan.machine
    low = plan.config.train.precision != "fp32"
    peak = machine.tensor_flops if low else _float_flops(machine, tf32=plan.config.train.tf32)
    own = _float_flops(machine, tf32=plan.config.train.tf32)
    link = machine.network if plan.nodes > 1 else machine.link
    return StepTime(
        towers=flops / (peak * PEAK_SHARE),
        loss=loss / (own * PEAK_SHARE),
        wire=sent / (link * LINK_SHARE),
    )


def _float_flops(machine: Machine, *, tf32: bool) -> float:
    has_tf32 = machine.is_gpu and machine.name != "v100"
    return machine.float_flops if tf32 or not has_tf32 else machine.float_flops / 8
