"""An estimate for people, and as plain values; what to change where it does not fit."""

from typing import Any

from trainer.estimate.estimate import Estimate
from trainer.estimate.machines import GIB, PEAK_SHARE
from trainer.estimate.terms import Term

# What makes a term smaller, the first words that its name begins with.
ADVICE = (
    ("activations", "lower train.chunk_size (exact), or model.grad_checkpointing = true"),
    ("optimizer", "zero.stage = 1 or higher, more ranks, or zero.offload_optimizer = 'cpu'"),
    ("gradients", "zero.stage = 2 or 3"),
    ("parameters", "zero.stage = 3"),
    (
        "centers",
        "centers.dtype and momentum_dtype = 'bfloat16', more ranks, centers.host = true",
    ),
    ("label rows", "centers.dtype and momentum_dtype = 'bfloat16', more ranks"),
    ("loss: visiting", 'loss.visiting = "ring"'),
    ("loss: their", 'loss.visiting = "ring"'),
    ("loss: sampled", "lower centers.sample_rate"),
    ("loss: label rows", 'labels.over = "batch"'),
    ("copy", "checkpoint.background = false"),
    ("averaged", "train.ema = 0, or zero.stage = 3"),
    ("batches", "more ranks"),
)


def describe(found: Estimate) -> str:
    """The page that `nsphere estimate` prints."""
    plan, machine = found.plan, found.plan.machine
    lines = [
        f"{plan.config.model.name}, {found.towers.num_parameters:,} parameters"
        + (f", {plan.num_classes:,} classes" if plan.num_classes else "")
        + f"; {plan.nodes} x {plan.ranks_per_node} {machine.name}, ZeRO {plan.config.zero.stage}, "
        f"{plan.rows} samples a rank in {plan.num_chunks} chunk(s)",
        "",
        f"memory of a rank at its peak ({found.peak})",
        *_table(found.terms, found.memory_bytes),
    ]
    if found.host or found.shared_bytes:
        lines += ["", "host memory beside, for each rank (/dev/shm: for each node)"]
        shared = [Term("/dev/shm: read ahead by workers", found.shared_bytes)]
        lines += _table([*found.host, *shared], None)
    lines += ["", *_wire(found), "", *_time(found), "", _disk(found), "", verdict(found)]
    return "\n".join(lines)


def _table(terms: list[Term], whole: int | None) -> list[str]:
    rows = [f"  {term.name:<48} {size(term.size):>11}" for term in terms if term.size]
    return [*rows, *([f"  {'in all':<48} {size(whole):>11}"] if whole is not None else [])]


def _wire(found: Estimate) -> list[str]:
    world_size = found.plan.world_size
    if world_size == 1:
        return ["one rank: nothing is sent"]
    lines = ["sent by a rank in a step"]
    lines += [f"  {part.name:<48} {size(part.sent(world_size)):>11}" for part in found.collectives]
    return [*lines, f"  {'in all':<48} {size(found.sent_bytes):>11}"]


def _time(found: Estimate) -> list[str]:
    plan, time = found.plan, found.time
    lines = [
        f"a step takes at least {seconds(time.seconds)}, bound by {time.bound_by} (towers "
        f"{seconds(time.towers)}, loss {seconds(time.loss)}, links {seconds(time.wire)}), at "
        f"{PEAK_SHARE:.0%} of the peak; reading samples is not in it",
        f"at most {found.samples_per_second:,.0f} samples/s, "
        f"{found.samples_per_second / plan.world_size:,.0f} a rank",
    ]
    unit = f"{plan.machine.name} hours"
    if plan.num_samples:
        hours = found.gpu_hours(plan.steps_of_an_epoch)
        lines.append(f"an epoch of {plan.num_samples:,} samples: at least {hours:,.2f} {unit}")
    else:
        lines.append("an epoch: unknown, the shards are not indexed here; give --samples N")
    if plan.total_steps:
        hours = found.gpu_hours(plan.total_steps)
        days = plan.total_steps * time.seconds
        lines.append(
            f"the run ({plan.config.train.duration}, {plan.total_steps:,} steps): at least "
            f"{hours:,.2f} {unit}, {seconds(days)}"
        )
    return lines


def _disk(found: Estimate) -> str:
    kept = found.plan.config.checkpoint.keep_last + 1  # the new one is whole before one goes
    return (
        f"a checkpoint: {size(found.checkpoint_bytes)}, {seconds(found.checkpoint_seconds)} at "
        f"1 GB/s a rank; checkpoint.keep_last = {kept - 1} needs "
        f"{size(kept * found.checkpoint_bytes)} of disk"
    )


def verdict(found: Estimate) -> str:
    """Fits, or the largest terms with what makes each smaller."""
    have, need = found.plan.machine.memory_bytes, found.memory_bytes
    name = found.plan.machine.name
    if found.fits:
        return f"fits: {size(need)} of {size(have)} of a {name} rank ({need / have:.0%})"
    lines = [f"DOES NOT FIT: {size(need)} needed, a {name} rank has {size(have)}; largest terms:"]
    for term in sorted(found.terms, key=lambda term: -term.size):
        advice = next((text for start, text in ADVICE if term.name.startswith(start)), "")
        if advice and len(lines) < 4:
            lines.append(f"  {term.name} ({size(term.size)}): {advice}")
    return "\n".join(lines)


def values(found: Estimate) -> dict[str, Any]:
    """For programs: bytes and seconds."""
    plan = found.plan
    return {
        "fits": found.fits,
        "memory_bytes": found.memory_bytes,
        "available_bytes": plan.machine.memory_bytes,
        "peak": found.peak,
        "terms": {term.name: term.size for term in found.terms},
        "host_terms": {term.name: term.size for term in found.host},
        "shared_memory_bytes": found.shared_bytes,
        "sent_bytes": found.sent_bytes,
        "collectives": [
            {"name": part.name, "kind": part.kind, "payload_bytes": part.payload}
            for part in found.collectives
        ],
        "step_seconds": found.time.seconds,
        "bound_by": found.time.bound_by,
        "tower_flops": found.flops,
        "samples_per_second": found.samples_per_second,
        "epoch_hours": found.gpu_hours(plan.steps_of_an_epoch) if plan.num_samples else None,
        "checkpoint_bytes": found.checkpoint_bytes,
        "checkpoint_seconds": found.checkpoint_seconds,
        "parameters": found.towers.num_parameters,
        "world_size": plan.world_size,
    }


def size(count: float) -> str:
    """Bytes for people."""
    if count >= GIB:
        return f"{count / GIB:,.2f} GiB"
    return f"{count / 2**20:,.1f} MiB" if count >= 2**20 else f"{count / 2**10:,.1f} KiB"


def seconds(count: float) -> str:
    """A time for people."""
    if count < 1:
        return f"{1000 * count:.1f} ms"
    if count < 120:
        return f"{count:.1f} s"
    return f"{count / 3600:.1f} h" if count < 48 * 3600 else f"{count / 86400:.1f} days"
