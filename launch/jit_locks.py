"""Locks that a killed compiler run has left: torch waits for them for ever (pytorch #189245).

nsphere compiles nothing on the CPU. On GPUs DeepSpeed builds its operators for offloading when they
are first used, and a rank killed in those minutes leaves its lock.
"""

import os
import time
from collections.abc import Mapping
from pathlib import Path

from launch.signals import say

STALE_S = 1800.0  # builds were seen to take 11 minutes on a busy machine


def remove_stale_locks(environment: Mapping[str, str]) -> None:
    """Remove locks in whose folder nothing has changed for STALE_S, with a line each.

    They lie in $TORCH_EXTENSIONS_DIR, or in torch's own folder: VERSION/OPERATOR/lock.
    """
    cache = Path(environment.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "torch_extensions"
    folders = [cache, Path(environment.get("TORCH_EXTENSIONS_DIR", cache))]
    for folder in folders:
        for lock in (*folder.glob("*/lock"), *folder.glob("*/*/lock")):
            try:
                latest = max(os.stat(path).st_mtime for path in (lock, *lock.parent.iterdir()))
                if time.time() - latest > STALE_S:
                    lock.unlink()
                    say(f"nsphere: {lock} removed: nothing has been built there for long")
            except OSError:  # another rank was quicker, or it is another user's
                continue
