"""What a rank runs on: memory, peak arithmetic, links. Of GPUs their maker's data sheets."""

import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from trainer.config import ConfigError

GIB = 2**30
# No published CLIP run passes 40 % of a GPU's dense peak (reference/clip.md 2.4), so a step is
# hardly ever shorter than at this share. Links: what NCCL's own tests reach of the data sheet.
PEAK_SHARE = 0.4
LINK_SHARE = 0.8


@dataclass(frozen=True)
class Machine:
    """One rank's share of a machine."""

    name: str
    memory_bytes: int
    """What the device shows as usable in all."""
    tensor_flops: float
    """Dense peak of bf16 (V100: fp16) matrix products, a second."""
    float_flops: float
    """The same of float32 products: TF32 where there is TF32."""
    link: float
    """Bytes a second to the other GPUs of the node, in one direction."""
    network: float
    """Bytes a second to other nodes, in one direction, as usually sold with it."""
    source: str
    is_gpu: bool = True


def _gpu(
    name: str, gib: float, tensor: float, float32: float, link: float, network: float, source: str
) -> Machine:
    return Machine(
        name, int(gib * GIB), tensor * 1e12, float32 * 1e12, link * 1e9, network * 1e9, source
    )


# GiB as nvidia-smi shows them; TFLOP/s dense; GB/s in one direction.
GPUS = {
    machine.name: machine
    for machine in (
        _gpu("b200", 178, 2250, 1125, 900, 50, "NVIDIA DGX B200 data sheet, dense"),
        _gpu("h200", 140, 989, 494, 450, 50, "NVIDIA H200 SXM data sheet, dense"),
        _gpu("h100", 79, 989, 494, 450, 50, "NVIDIA H100 SXM data sheet, dense"),
        _gpu("h100-pcie", 79, 756, 378, 64, 25, "NVIDIA H100 PCIe data sheet, dense"),
        _gpu("a100", 79, 312, 156, 300, 25, "NVIDIA A100 80GB SXM data sheet"),
        _gpu("a100-40", 39, 312, 156, 300, 25, "NVIDIA A100 40GB SXM data sheet"),
        _gpu("a800", 79, 312, 156, 200, 25, "NVIDIA A800 80GB SXM data sheet"),
        _gpu("v100", 31, 125, 15.7, 150, 12.5, "NVIDIA V100 SXM2 32GB data sheet; fp16, fp32"),
        _gpu("l40s", 44, 362, 183, 32, 12.5, "NVIDIA L40S data sheet, dense"),
        _gpu("a10", 22, 125, 62.5, 32, 12.5, "NVIDIA A10 data sheet"),
        _gpu("rtx4090", 23, 165, 82.6, 32, 1.25, "NVIDIA Ada whitepaper, fp32 accumulation"),
    )
}


def find_gpu(name: str) -> Machine:
    """A GPU of the table by name. Raises ConfigError with the names that there are."""
    if name.lower() not in GPUS:
        raise ConfigError(f"--gpu={name}: choose one of {', '.join(GPUS)}, or cpu")
    return GPUS[name.lower()]


def this_processor(ranks_per_node: int) -> Machine:
    """A rank on this machine's processor: its rate is measured, in a twentieth of a second."""
    one = torch.ones(384, 384)
    product, seconds = one @ one, []
    for _ in range(20):  # the fastest: others may be at work here
        start = time.perf_counter()
        torch.mm(one, one, out=product)
        seconds.append(time.perf_counter() - start)
    rate = 2 * 384**3 / min(seconds)
    memory = total_memory() // max(1, ranks_per_node)
    source = f"measured here on {torch.get_num_threads()} thread(s); gloo over loopback assumed"
    return Machine("cpu", memory, rate, rate, 2e9, 1e9, source, is_gpu=False)


def total_memory() -> int:
    """Bytes of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def available_memory() -> int:
    """Bytes that are free here, or can be made so."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return total_memory()


def resident_bytes() -> int:
    """What this process holds now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
