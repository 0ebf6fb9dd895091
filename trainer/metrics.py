"""Numbers for people: metrics.jsonl, trackers, progress on stderr, and where a step's time goes.

Lines of metrics.jsonl are of three kinds: a step (has "loss"), an evaluation (has "evaluation") and
a histogram of cosines (has "cosines"); all have "step" and "samples_seen". Plots of them are in
`trainer/report.py`. Only the first rank writes; every rank may call.
"""

import json
import logging
import math
import os
import resource
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from trainer.config import Config, ConfigError
from trainer.durable import LineFile
from trainer.ranks import Ranks

METRICS_FILE = "metrics.jsonl"
logger = logging.getLogger("nsphere.metrics")

PLAIN_LINE_EVERY_S = 2.0  # without a terminal, progress is one line at most this often

_DETAILS = ("_std", "_grid", "_by_kind", "_error", "_low", "_high")  # ends of names
_OF_LABELS = ("xmc_P@", "xmc_PSP@", "xmc_R@100")  # of task xmc, which has dozens


class Tracker(Protocol):
    """The part of accelerate's trackers that is used here."""

    def log(self, values: dict[str, Any], step: int | None = None) -> None:
        """Record named numbers of one step."""

    def finish(self) -> None:
        """Flush and close."""


class MetricsWriter:
    """Appends to RUN/metrics.jsonl, feeds the trackers and shows progress, on the first rank.

    Opening it at `start_step` drops the lines of later steps (and a torn last line), so that after
    a resume no step appears twice.
    """

    def __init__(
        self,
        run_dir: Path,
        config: Config,
        ranks: Ranks,
        *,
        total_steps: int,
        start_step: int = 0,  # steps already done; the next line is of a later one
    ) -> None:
        self._trackers: list[Tracker] = []
        self._file: LineFile | None = None
        self._run_dir = run_dir
        if not ranks.is_first:
            return
        run_dir.mkdir(parents=True, exist_ok=True)
        path = run_dir / METRICS_FILE
        truncate_metrics(path, start_step)
        self._file = LineFile(path)
        self._trackers = [
            build_tracker(name, run_dir, config, start_step) for name in config.log.trackers
        ]
        self._progress = ProgressLine(total_steps, start_step)

    def write_step(self, step: int, samples_seen: int, values: Mapping[str, float]) -> None:
        """One line of `values`: loss, lr, scale, grad_norm, samples_per_s, step_s, data_wait_s, ...

        A number that is not finite is written as null: JSON has no NaN.
        """
        if self._file is None:
            return
        self._append({"step": step, "samples_seen": samples_seen, **values})
        self._track(values, step, "train")
        self._progress.show(step, values)

    def write_evaluation(self, step: int, samples_seen: int, results: Mapping[str, float]) -> None:
        """One line {"step", "samples_seen", "evaluation": results}."""
        if self._file is None:
            return
        self._append({"step": step, "samples_seen": samples_seen, "evaluation": dict(results)})
        self._track(results, step, "eval")
        shown = (f"{name} {_short(value)}" for name, value in results.items() if _headline(name))
        self._progress.say(f"evaluation at step {step}: " + "  ".join(shown))

    def write_cosines(
        self, step: int, samples_seen: int, histograms: Mapping[str, list[int]]
    ) -> None:
        """One line of `trainer.evaluate.cosines.cosine_histograms`' counts."""
        if self._file is not None:
            self._append({"step": step, "samples_seen": samples_seen, "cosines": dict(histograms)})

    def rewind(self, step: int) -> None:
        """Drop the lines of later steps: the run goes back and takes them again."""
        if self._file is None:
            return
        path = self._run_dir / METRICS_FILE
        self._file.close()
        truncate_metrics(path, step)
        self._file = LineFile(path)

    def close(self) -> None:
        """Close file, trackers and progress; a second call does nothing."""
        if self._file is None:
            return
        self._progress.close()
        self._file.close()
        self._file = None
        for tracker in self._trackers:
            try:
                tracker.finish()
            except OSError as error:
                logger.warning("%s has lost its last numbers: %s", type(tracker).__name__, error)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _append(self, line: Mapping[str, Any]) -> None:
        if self._file is not None:
            self._file.write(json.dumps(_finite(line), allow_nan=False))

    def _track(self, values: Mapping[str, float], step: int, prefix: str) -> None:
        numbers = {f"{prefix}/{name}": value for name, value in values.items()}
        for tracker in tuple(self._trackers):
            try:
                tracker.log(numbers, step=step)
            except OSError as error:  # no reason to lose a run: metrics.jsonl has them all
                logger.warning("%s is given up: %s", type(tracker).__name__, error)
                self._trackers.remove(tracker)


class ProgressLine:
    """Where the run is and when it ends: a live bar on a terminal, else a line now and then."""

    def __init__(self, total_steps: int, start_step: int) -> None:
        self._total_steps = total_steps
        self._seconds: deque[float] = deque(maxlen=20)  # recent step_s, for the ETA
        self._last_line = -math.inf
        self._live: Progress | None = None
        if sys.stderr.isatty():
            self._live = Progress(
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[text]}"),
                console=Console(stderr=True),
            )
            self._live.start()
            self._task = self._live.add_task("", total=total_steps, completed=start_step, text="")

    def show(self, step: int, values: Mapping[str, float]) -> None:
        """Tell people about one logged step."""
        self._seconds.append(values.get("step_s", math.nan))
        text = describe_step(values, self._remaining_s(step))
        if self._live is not None:
            self._live.update(self._task, completed=step, text=text)
            return
        now = time.monotonic()
        if now - self._last_line >= PLAIN_LINE_EVERY_S or step >= self._total_steps:
            self._last_line = now
            self.say(f"step {step}/{self._total_steps}  {text}")

    def say(self, text: str) -> None:
        """One line on stderr, above the live bar if there is one."""
        if self._live is not None:
            self._live.console.print(text, highlight=False, markup=False)
        else:
            sys.stderr.write(text + "\n")
            sys.stderr.flush()

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._live is not None:
            self._live.stop()

    def _remaining_s(self, step: int) -> float:
        middle = sorted(self._seconds)[len(self._seconds) // 2]
        return max(0, self._total_steps - step) * middle


def describe_step(values: Mapping[str, float], remaining_s: float) -> str:
    """The numbers people watch, in one short line."""
    parts = [f"{name} {_short(values[name])}" for name in ("loss", "lr", "scale") if name in values]
    if "samples_per_s" in values:
        parts.append(f"{values['samples_per_s']:,.0f} samples/s")
    if values.get("step_s", 0) > 0 and "data_wait_s" in values:
        parts.append(f"data wait {values['data_wait_s'] / values['step_s']:.0%}")
    if math.isfinite(remaining_s):
        hours, seconds = divmod(round(remaining_s), 3600)
        parts.append(f"ETA {hours}:{seconds // 60:02d}:{seconds % 60:02d}")
    return "  ".join(parts)


def truncate_metrics(path: Path, last_step: int) -> None:
    """Drop the lines after `last_step` and what is not a whole line; atomic."""
    if not path.exists():
        return
    kept = [line for line in read_metrics(path) if line["step"] <= last_step]
    beside = path.with_name(path.name + ".part")
    with beside.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in kept)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All whole lines of a metrics.jsonl, in order; a torn one (the run was killed) is left out."""
    lines = []
    for text in path.read_bytes().split(b"\n"):
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            lines.append(line)
    return lines


def build_tracker(name: str, run_dir: Path, config: Config, start_step: int) -> Tracker:
    """One of accelerate's trackers, started. Raises ConfigError when its package is missing.

    Only the first rank has trackers, so to accelerate it is the only process: no environment that
    it would read, no thread count that it would change, no rank that would wait for another.
    """
    from accelerate import PartialState
    from accelerate.tracking import TensorBoardTracker, WandBTracker
    from accelerate.utils import clear_environment

    with clear_environment():
        PartialState(cpu=True)
    try:
        if name == "tensorboard":
            tracker = TensorBoardTracker("tensorboard", run_dir, purge_step=start_step + 1)
        else:
            tracker = WandBTracker(
                "nsphere", name=run_dir.name, id=run_dir.name, dir=run_dir, resume="allow"
            )
        tracker.start()
        if name == "wandb":
            tracker.store_init_configuration(config.model_dump(mode="json"))
    except ImportError as error:
        raise ConfigError(
            f"log.trackers: {name} cannot be imported ({error}); pip install {name}, "
            f"or leave it out with --log.trackers='[]'"
        ) from None
    return tracker


class StepClock:
    """Where a step's time goes: the time since the last mark belongs to the name of the next.

    On a GPU the marks are events in the stream, read only when drained, so that measuring does not
    wait for the device at every step.
    """

    def __init__(
        self, device: torch.device, told: Callable[[str], None] = lambda _name: None
    ) -> None:
        """`told` hears every mark's name."""
        self._device, self._told = device, told
        self._marks: list[tuple[str, float | torch.cuda.Event]] = [("", self._now())]

    def restart(self) -> None:
        """Forget everything: what comes next (after an evaluation, a save) starts now."""
        self._marks = [("", self._now())]

    def mark(self, name: str) -> None:
        """The time since the last mark was spent on `name`."""
        self._marks.append((name, self._now()))
        self._told(name)

    def drain(self, num_steps: int) -> dict[str, float]:
        """Mean seconds a step by name as `NAME_s`, and their sum `step_s`; starts afresh."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        seconds: dict[str, float] = {}
        for (_, start), (name, end) in zip(self._marks, self._marks[1:], strict=False):
            seconds[f"{name}_s"] = seconds.get(f"{name}_s", 0.0) + _between(start, end) / num_steps
        self._marks = [("", self._marks[-1][1])]
        return {**seconds, "step_s": sum(seconds.values())}

    def _now(self) -> float | torch.cuda.Event:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _between(start: float | torch.cuda.Event, end: float | torch.cuda.Event) -> float:
    if isinstance(start, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
        return start.elapsed_time(end) / 1000
    if isinstance(start, float) and isinstance(end, float):
        return end - start
    raise TypeError("marks of one clock are of one kind")


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory this rank has held: on the GPU if there is one, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts KiB


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _short(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _headline(name: str) -> bool:
    """Scores that fit a line; counts, deviations and points of a curve stand in metrics.jsonl."""
    if name.startswith("xmc_"):
        return name.startswith(_OF_LABELS)
    detail = name.startswith("num_") or "@F" in name or name.endswith(_DETAILS)
    return name == "num_images" or not detail
