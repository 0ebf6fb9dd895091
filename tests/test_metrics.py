"""metrics.jsonl survives kills and resumes; trackers, progress and the clock say what happened."""

import io
import json
import math
import time
from pathlib import Path

import pytest
import torch

from trainer.config import Config, ConfigError, LogConfig
from trainer.metrics import (
    METRICS_FILE,
    MetricsWriter,
    StepClock,
    build_tracker,
    describe_step,
    peak_memory_bytes,
    read_metrics,
)
from trainer.ranks import Ranks

QUIET = Config(log=LogConfig(trackers=()))


def write_steps(run: Path, first: int, last: int, config: Config = QUIET) -> None:
    with MetricsWriter(run, config, Ranks(), total_steps=20, start_step=first) as writer:
        for step in range(first + 1, last + 1):
            writer.write_step(step, step * 8, {"loss": 1 / step, "step_s": 0.5})


def steps_of(run: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (run / METRICS_FILE).read_text().splitlines()]


def test_lines_come_back_exactly(tmp_path: Path):
    loss = float(torch.rand((), dtype=torch.float32))
    with MetricsWriter(tmp_path, QUIET, Ranks(), total_steps=5) as writer:
        writer.write_step(1, 8, {"loss": loss, "lr": 1e-3})
        writer.write_step(2, 16, {"loss": math.nan, "grad_norm": math.inf})
        writer.write_evaluation(2, 16, {"image_to_text_R@1": 0.25, "num_images": 4})
        writer.write_cosines(2, 16, {"positive": [0, 1]})
        # Every line is on disk when the call returns: a kill loses nothing.
        lines = [json.loads(line) for line in (tmp_path / METRICS_FILE).read_text().splitlines()]
    assert lines == [
        {"step": 1, "samples_seen": 8, "loss": loss, "lr": 1e-3},
        {"step": 2, "samples_seen": 16, "loss": None, "grad_norm": None},
        {
            "step": 2,
            "samples_seen": 16,
            "evaluation": {"image_to_text_R@1": 0.25, "num_images": 4},
        },
        {"step": 2, "samples_seen": 16, "cosines": {"positive": [0, 1]}},
    ]
    assert read_metrics(tmp_path / METRICS_FILE) == lines


@pytest.mark.parametrize(
    "torn", [b"", b'{"step": 11, "lo', b'{"step": 11, "loss": 1.0}', b"\xff\n"]
)
def test_after_a_resume_no_step_is_missing_or_twice(tmp_path: Path, torn: bytes):
    write_steps(tmp_path, 0, 10)
    with (tmp_path / METRICS_FILE).open("ab") as file:
        file.write(torn)
    write_steps(tmp_path, 7, 12)
    assert steps_of(tmp_path) == list(range(1, 13))
    assert [path.name for path in tmp_path.iterdir()] == [METRICS_FILE]


def test_a_resume_from_the_start_begins_afresh(tmp_path: Path):
    write_steps(tmp_path, 0, 10)
    write_steps(tmp_path, 0, 3)
    assert steps_of(tmp_path) == [1, 2, 3]


def test_only_the_first_rank_writes(tmp_path: Path):
    run = tmp_path / "run"
    with MetricsWriter(run, Config(), Ranks(rank=1, world_size=2), total_steps=5) as writer:
        writer.write_step(1, 8, {"loss": 1.0})
        writer.write_evaluation(1, 8, {"a": 1.0})
        writer.write_cosines(1, 8, {"positive": []})
    assert not run.exists()


def test_tensorboard_has_the_numbers_and_a_resume_overwrites(tmp_path: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with MetricsWriter(tmp_path, Config(), Ranks(), total_steps=9) as writer:
        for step in (1, 2, 3):
            writer.write_step(step, step * 8, {"loss": float(step)})
        writer.write_evaluation(3, 24, {"zero_shot_top1": 0.5})
    with MetricsWriter(tmp_path, Config(), Ranks(), total_steps=9, start_step=2) as writer:
        writer.write_step(3, 24, {"loss": 30.0})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    losses = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert losses == [(1, 1.0), (2, 2.0), (3, 30.0)]


def test_a_tracker_that_is_not_installed_is_one_clear_line(tmp_path: Path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "wandb", None)
    config = Config(log=LogConfig(trackers=("wandb",)))
    with pytest.raises(ConfigError, match=r"log.trackers: wandb cannot be imported.*pip install"):
        build_tracker("wandb", tmp_path, config, 0)


def test_progress_without_a_terminal_is_a_line_now_and_then(tmp_path: Path, capsys):
    write_steps(tmp_path, 0, 20)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("step 1/20  loss 1  ") and lines[0].endswith("ETA 0:00:10")
    assert lines[-1].startswith("step 20/20  loss 0.05") and lines[-1].endswith("ETA 0:00:00")
    assert len(lines) == 2, "a fast run does not flood its log"


def test_progress_on_a_terminal(tmp_path: Path, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    screen = Terminal()
    monkeypatch.setattr("sys.stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    with MetricsWriter(tmp_path, QUIET, Ranks(), total_steps=4) as writer:
        writer.write_step(3, 24, {"loss": 0.25, "step_s": 1.0})
        writer.write_evaluation(3, 24, {"num_images": 1423})
    assert "3/4" in screen.getvalue() and "loss 0.25" in screen.getvalue()
    assert "evaluation at step 3: num_images 1,423" in screen.getvalue()


def test_what_people_read_of_a_step():
    values = {
        "loss": 3.21987,
        "lr": 5e-4,
        "scale": 14.2857,
        "samples_per_s": 8123.4,
        "step_s": 0.5,
        "data_wait_s": 0.02,
    }
    assert describe_step(values, 4000.4) == (
        "loss 3.22  lr 0.0005  scale 14.29  8,123 samples/s  data wait 4%  ETA 1:06:40"
    )
    assert describe_step({"loss": 1.0}, math.nan) == "loss 1"


def test_the_clock_gives_every_second_to_the_next_mark():
    clock = StepClock(torch.device("cpu"))
    time.sleep(0.02)
    clock.restart()
    started = time.perf_counter()
    for _ in range(2):
        time.sleep(0.01)
        clock.mark("data_wait")
        time.sleep(0.03)
        clock.mark("towers")
    times = clock.drain(2)
    elapsed = time.perf_counter() - started
    assert list(times) == ["data_wait_s", "towers_s", "step_s"]
    assert times["step_s"] == pytest.approx(times["data_wait_s"] + times["towers_s"], abs=1e-12)
    assert times["data_wait_s"] >= 0.01 and times["towers_s"] >= 0.03
    assert 2 * times["step_s"] <= elapsed, "what was before the restart is forgotten"
    clock.mark("towers")
    again = time.perf_counter() - started
    assert clock.drain(1)["step_s"] <= again - 0.08, "drained seconds are gone"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")
def test_the_clock_measures_the_stream_of_a_gpu():
    device = torch.device("cuda")
    rows = torch.randn(4096, 4096, device=device)
    clock = StepClock(device)
    for _ in range(5):
        rows = rows @ rows / 4096
        clock.mark("towers")
    assert clock.drain(5)["towers_s"] > 1e-4
    assert peak_memory_bytes(device) >= rows.numel() * 4


def test_peak_memory_grows():
    before = peak_memory_bytes(torch.device("cpu"))
    rows = torch.ones(40_000_000)
    assert peak_memory_bytes(torch.device("cpu")) >= max(before, rows.numel() * 4)
