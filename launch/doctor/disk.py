"""The run folder's disk, and the shards as this rank can read them."""

import fcntl
import hashlib
import os
import shutil
import time
from contextlib import closing
from pathlib import Path

from data.errors import DataError
from data.remote import open_store
from data.shards import expand_shards
from data.table import index_paths
from trainer.config import Config
from trainer.lock import read_owner
from trainer.samples import build_samples

PROBE_BYTES = 64 * 2**20
ENDS = 4096  # bytes of a shard that are compared, at both ends
MOST_SHARDS = 64  # that a rank opens, evenly over all


def measure_disk(run: Path) -> tuple[dict[str, float], str]:
    """Free bytes and bytes a second of flushed writing where `run` will be; what is wrong."""
    folder = run
    while not folder.is_dir():
        folder = folder.parent
    facts: dict[str, float] = {"free": float(shutil.disk_usage(folder).free)}
    probe = folder / f".nsphere-doctor-{os.getpid()}"
    try:
        size = min(PROBE_BYTES, int(facts["free"]) // 2)
        data = os.urandom(2**20)
        start = time.perf_counter()
        with probe.open("wb") as file:
            for _ in range(max(1, size // len(data))):
                file.write(data)
            file.flush()
            os.fsync(file.fileno())
        facts["write"] = max(size, len(data)) / (time.perf_counter() - start)
    except OSError as error:
        return facts, f"{folder}: cannot be written to: {error.strerror}"
    finally:
        probe.unlink(missing_ok=True)
    return facts, _in_use(run)


def _in_use(run: Path) -> str:
    """Who runs in the folder now."""
    path = run / ".lock"
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return ""
    except OSError as error:
        return f"{path}: {error.strerror}"
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return f"{run} is in use by {read_owner(path) or 'another process'}"
    except OSError:
        return ""  # a file system without locks: the run itself watches the heartbeat
    finally:
        os.close(descriptor)
    return ""


def read_ends(config: Config) -> dict[str, str]:
    """Digests of the first and last bytes of the shards; "!" and the reason where they fail."""
    found: dict[str, str] = {}
    try:
        shards = [s for source in config.data.all_sources() for s in expand_shards(source.shards)]
    except DataError as error:
        return {str(config.data.shards): f"!{error}"}
    step = max(1, len(shards) // MOST_SHARDS)
    for shard in shards[::step]:
        found[shard] = _ends(shard)
    return found


def _ends(shard: str) -> str:
    if shard.startswith("pipe:"):
        return "pipe"
    try:
        with closing(open_store(shard)) as store:
            size, _ = store.version()
            head = bytes(store.read_at(0, ENDS))
            tail = bytes(store.read_at(max(0, size - ENDS), ENDS)) if size > 0 else b""
    except (DataError, OSError, ValueError, NotImplementedError) as error:
        return f"!{error}"
    return hashlib.blake2b(b"%d|" % size + head + tail, digest_size=8).hexdigest()


def fingerprint(config: Config) -> tuple[str, str]:
    """Of the training data as indexed, or why there is none; nothing is scanned."""
    try:
        for source in config.data.all_sources():
            for shard in expand_shards(source.shards):
                if not any(path.is_file() for path in index_paths(shard)):
                    return "", f"{shard} is not indexed: nsphere index SHARDS, once, saves the wait"
        return build_samples(config).fingerprint, ""
    except (DataError, ValueError, OSError) as error:
        return "", str(error)
