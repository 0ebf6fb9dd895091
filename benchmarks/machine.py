"""What every benchmark prints with its figures: machine, commit, table, peak memory."""

import ctypes
import gc
import os
import platform
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import torch


def machine() -> str:
    """One line: processor, cores in use of those present, GPU, torch."""
    names = [
        line.split(":", 1)[1].strip()
        for line in _lines("/proc/cpuinfo")
        if line.startswith("model name")
    ]
    processor = names[0] if names else platform.processor() or platform.machine()
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return (
        f"{processor}, {os.cpu_count()} cores, {torch.get_num_threads()} thread(s) used{gpu},"
        f" torch {torch.__version__}"
    )


def commit() -> str:
    """Short hash of the checkout, with `+` where files differ from it; "unknown" outside of git."""
    folder = Path(__file__).parent

    def git(*words: str) -> str:
        asked = subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True)
        return asked.stdout.strip()

    try:
        head = git("rev-parse", "--short", "HEAD")
        return (head + ("+" if git("status", "--porcelain", "-uno") else "")) or "unknown"
    except OSError:
        return "unknown"


def load() -> str:
    """How busy the machine is with other people's work: the load average of the last minute."""
    return f"{os.getloadavg()[0]:.1f}"


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Columns as wide as their widest entry, numbers to the right."""
    cells = [[str(x) for x in line] for line in (header, *rows)]
    widths = [max(len(line[k]) for line in cells) for k in range(len(header))]
    print(f"\n{title}")
    for number, line in enumerate(cells):
        left = line[0].ljust(widths[0])
        print("  ".join([left, *(x.rjust(w) for x, w in zip(line[1:], widths[1:], strict=True))]))
        if number == 0:
            print("  ".join("-" * w for w in widths))


def peak_extra_bytes(call: Callable[[], object], device: torch.device) -> int:
    """Memory that `call` needed at its peak, above what was in use before; -1 where unknown."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if not os.access("/proc/self/clear_refs", os.W_OK):
        call()
        return -1
    # Freed memory that the C library kept would hide the same amount of what is asked for next.
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = _status_bytes("VmRSS")
    call()
    return _status_bytes("VmHWM") - before


def _status_bytes(name: str) -> int:
    (line,) = (line for line in _lines("/proc/self/status") if line.startswith(name))
    return int(line.split()[1]) * 1024


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []
