"""What one rank finds on its own: versions, GPUs, limits, names, locks of compilers."""

import hashlib
import os
import platform
import resource
import shutil
import socket
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

PACKAGES = ("torch", "deepspeed", "accelerate", "open_clip_torch", "timm", "numpy", "pyarrow")
ROOT = Path(__file__).parents[2]
OUR_FOLDERS = ("launch", "trainer", "data")


@dataclass(frozen=True)
class Facts:
    """Of one rank; plain values, so that they travel."""

    rank: int
    host: str
    versions: dict[str, str]
    gpus: list[str]
    gpu_problem: str
    topology: str
    code: str
    """Digest of our own source files."""
    config: str
    """Digest of the resolved configuration, "" without one."""
    config_problem: str
    shared_free: int
    shared_total: int
    open_files: int
    locked_memory: int  # bytes, -1: unlimited
    threads: int
    cores: int
    name_problem: str
    port_problem: str
    jit_locks: list[str]
    disk: dict[str, float] = field(default_factory=dict)
    disk_problem: str = ""
    shards: dict[str, str] = field(default_factory=dict)
    """Shard -> digest of its ends, or "!" and why it cannot be read."""
    fingerprint: str = ""
    index_problem: str = ""


def versions() -> dict[str, str]:
    """Of Python and what the trainer stands on; "-" for what is absent."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "-"
    found["cuda"] = torch.version.cuda or "-"
    if torch.cuda.is_available():
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
        found["driver"] = _nvidia("--query-gpu=driver_version", "--format=csv,noheader")[:20]
    return found


def gpus() -> tuple[list[str], str, str]:
    """Names and memory, what is wrong, and how they are linked."""
    names = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        names.append(f"{properties.name} {properties.total_memory / 2**30:.0f} GiB")
    problem = ""
    if shutil.which("nvidia-smi") and not names:
        listed = _nvidia("--list-gpus")
        if listed.startswith("GPU "):
            problem = (
                f"nvidia-smi lists {len(listed.splitlines())} GPU(s) but torch {torch.__version__} "
                "sees none: a CPU build of torch, an old driver, or CUDA_VISIBLE_DEVICES= is set"
            )
    return names, problem, _nvidia("topo", "-m") if len(names) > 1 else ""


def _nvidia(*words: str) -> str:
    try:
        done = subprocess.run(["nvidia-smi", *words], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def code_digest(root: Path = ROOT) -> str:
    """Of the text of every module of ours, wherever it is installed."""
    digest = hashlib.blake2b(digest_size=8)
    for folder in OUR_FOLDERS:
        for path in sorted((root / folder).rglob("*.py")):
            digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def limits() -> tuple[int, int]:
    """Open files, and bytes that may be locked in memory (-1: no limit)."""
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    return files, -1 if locked == resource.RLIM_INFINITY else locked


def shared_memory(path: str = "/dev/shm") -> tuple[int, int]:
    """Free and total bytes."""
    try:
        usage = shutil.disk_usage(path)
    except OSError:
        return 0, 0
    return usage.free, usage.total


def name_problem(environment: Mapping[str, str]) -> str:
    """Names that do not resolve here."""
    wanted = {socket.gethostname(), environment.get("MASTER_ADDR", "")} - {""}
    missing = []
    for name in sorted(wanted):
        try:
            socket.getaddrinfo(name, None)
        except OSError as error:
            missing.append(f"{name} ({error.strerror})")
    return ", ".join(missing)


def port_problem(environment: Mapping[str, str]) -> str:
    """A port that somebody has named for the next run and that is taken here; "" if it is free.

    The ports of a rendezvous that this process stands in are taken by itself.
    """
    port = environment.get("MASTER_PORT", "")
    if not port or "RANK" in environment:
        return ""
    if not port.isdigit():
        return f"MASTER_PORT={port!r} is no number"
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind(("", int(port)))
        except (OSError, OverflowError) as error:
            return f"MASTER_PORT={port}: {error}"
    return ""


def jit_locks(environment: Mapping[str, str], older_than_s: float = 300.0) -> list[str]:
    """Locks of compiler extensions that no build is likely to hold any more.

    A build that is killed leaves its lock, and whoever needs the extension next waits for ever
    (pytorch #189245).
    """
    named = environment.get("TORCH_EXTENSIONS_DIR", "")
    home = environment.get("XDG_CACHE_HOME") or "~/.cache"
    folder = Path(named) if named else Path(home, "torch_extensions").expanduser()
    now, found = time.time(), []
    for depth in ("*/lock", "*/*/lock"):
        for path in sorted(folder.glob(depth)):
            try:
                age = now - path.stat().st_mtime
            except OSError:
                continue
            if age > older_than_s:
                found.append(str(path))
    return found


def thread_count(environment: Mapping[str, str]) -> tuple[int, int]:
    """Threads of this process, and cores it may use."""
    named = environment.get("OMP_NUM_THREADS", "")
    threads = int(named) if named.isdigit() else torch.get_num_threads()
    return threads, len(os.sched_getaffinity(0))
