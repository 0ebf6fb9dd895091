"""RUN/events.jsonl: what befell a run, a line each, for `nsphere status` and for people.

Starts, ends, lost ranks, rollbacks, stragglers, refused saves. Any process of the run may append:
a line is one write to a file opened for appending, so that lines do not mix.
"""

import json
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

EVENTS_FILE = "events.jsonl"


def record_event(run: Path, event: str, details: Mapping[str, Any] | None = None) -> bool:
    """Append {"time", "event", "host", **details}; a folder that refuses is no reason to die.

    False where it did: the caller may have something to tell later.
    """
    line = {"time": time.time(), "event": event, "host": socket.gethostname(), **(details or {})}
    text = (json.dumps(line) + "\n").encode()
    try:
        file = os.open(run / EVENTS_FILE, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    except OSError:
        return False
    try:
        return os.write(file, text) == len(text)
    except OSError:
        return False
    finally:
        os.close(file)


def read_events(run: Path) -> list[dict[str, Any]]:
    """All whole lines, oldest first; none where there is no such file."""
    try:
        texts = (run / EVENTS_FILE).read_bytes().split(b"\n")
    except OSError:
        return []
    events = []
    for text in texts:
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and "event" in line:
            events.append(line)
    return events
