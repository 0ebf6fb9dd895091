"""report.html of whole, running, resumed and hardly begun runs."""

import base64
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from trainer.metrics import METRICS_FILE
from trainer.plots import MAX_POINTS, RunLog, build_figures, quantiles, smooth
from trainer.report import write_report


def step_line(step: int) -> dict:
    return {
        "step": step,
        "samples_seen": step * 256,
        "epoch": step / 100,
        "loss": 5 / step,
        "lr": 1e-3,
        "scale": 14.0,
        "bias": -10.0,
        "grad_norm": 1.5,
        "data_wait_s": 0.01,
        "towers_s": 0.2,
        "optimizer_s": 0.04,
        "step_s": 0.25,
        "samples_per_s": 1024.0,
        "peak_memory_bytes": 2**30,
    }


def eval_line(step: int) -> dict:
    results = {"image_to_text_R@1": step / 1000, "num_images": 1423}
    return {"step": step, "samples_seen": step * 256, "evaluation": results}


def cosine_line(step: int) -> dict:
    counts = [0] * 60 + [step] * 20 + [0] * 20
    return {
        "step": step,
        "samples_seen": step * 256,
        "cosines": {"positive": counts, "hardest_negative": counts[::-1]},
    }


def write_run(run: Path, lines: list[dict], torn: str = "") -> Path:
    run.mkdir(exist_ok=True)
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (run / METRICS_FILE).write_text(text + torn)
    (run / "config.toml").write_text('[model]\nname = "<tiny> & small"\n')
    return run


class Page(HTMLParser):
    """Titles of the plots, their SVG, cells of the table, and addresses that would be fetched."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.plots: dict[str, str] = {}
        self.addresses: list[str] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        source = values.get("src") or values.get("href") or ""
        if source.startswith("data:image/svg+xml;base64,"):
            self.plots[values["alt"] or ""] = base64.b64decode(source.split(",")[1]).decode()
        elif source:
            self.addresses.append(source)

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_report_of_a_whole_run(tmp_path: Path):
    lines = [step_line(step) for step in range(1, 101)]
    lines += [line(step) for step in (50, 100) for line in (eval_line, cosine_line)]
    path = write_report(write_run(tmp_path / "a <b>", lines))
    page = Page(path.read_text())
    assert path == tmp_path / "a <b>" / "report.html"
    assert list(page.plots) == [
        "Loss",
        "Evaluation",
        "Learning rate",
        "Scale of the cosines",
        "Bias of the logits",
        "Gradient norm",
        "Throughput",
        "Where a step's time goes",
        "Positives and hardest negatives",
        "Cosines over the run",
        "Peak memory",
    ]
    for svg in page.plots.values():
        ElementTree.fromstring(svg)
    assert page.addresses == [], "the page stands alone"
    times = re.findall(r"(\w[\w ]*) (\d+%)", page.plots["Where a step's time goes"])
    assert times == [("optimizer", "16%"), ("towers", "80%"), ("data wait", "4%")]
    words = " ".join(page.words)
    assert "image_to_text_R@1" in words and "0.05" in words and "1,423" in words
    assert "<tiny> & small" in words and "a <b>" in words
    assert sorted(file.name for file in path.parent.iterdir()) == [
        "config.toml",
        "metrics.jsonl",
        "report.html",
    ]


def test_report_is_the_same_every_time(tmp_path: Path):
    run = write_run(tmp_path, [step_line(step) for step in range(1, 5)])
    assert write_report(run).read_text() == write_report(run).read_text()


@pytest.mark.parametrize(
    "lines",
    [
        [],
        [step_line(1)],
        [eval_line(0)],
        [cosine_line(3)],
        [step_line(1) | {"loss": None, "grad_norm": None, "step_s": 0.0}],
        [{"step": 4, "samples_seen": 9, "loss": 1.5}],
        [step_line(1) | {"grad_norm": 0.0, "scale": None}],
    ],
)
def test_report_of_a_run_that_has_hardly_begun(tmp_path: Path, lines):
    page = Page(write_report(write_run(tmp_path, lines, torn='{"step": 7, "lo')).read_text())
    finite = any(line.get("loss") is not None for line in lines)
    assert ("Loss" in page.plots) == finite


def test_a_folder_without_metrics_is_one_clear_line(tmp_path: Path):
    with pytest.raises(ValueError, match=r"has no metrics.jsonl"):
        write_report(tmp_path)


def test_of_a_step_that_comes_twice_the_last_counts(tmp_path: Path):
    lines = [
        step_line(1),
        step_line(2),
        step_line(2) | {"loss": 9.0},
        step_line(1) | {"loss": None},
    ]
    log = RunLog.read(write_run(tmp_path, lines) / METRICS_FILE)
    steps, loss = log.column("loss")
    assert steps.tolist() == [1, 2]
    assert math.isnan(loss[0]) and loss[1] == 9.0


def test_a_long_run_stays_small(tmp_path: Path):
    lines = [step_line(step) for step in range(1, 20 * MAX_POINTS)]
    log = RunLog.read(write_run(tmp_path, lines) / METRICS_FILE)
    figures = build_figures(log)
    drawn = [len(line.get_xdata()) for line in figures["Loss"].axes[0].lines]
    assert drawn and max(drawn) <= MAX_POINTS


def test_smoothing_is_unbiased_and_blind_to_gaps():
    assert smooth(np.array([])).tolist() == []
    constant = np.full(500, 3.0)
    constant[[0, 7, 400]] = math.nan
    smoothed = smooth(constant)
    assert math.isnan(smoothed[0])
    np.testing.assert_allclose(smoothed[1:], 3.0, rtol=1e-12)
    noise = np.random.default_rng(0).normal(size=1000)
    assert smooth(noise).std() < noise.std() / 2


def test_quantiles_of_a_histogram():
    cosines = np.random.default_rng(0).uniform(-0.5, 0.75, 100_000)
    counts = np.histogram(cosines, np.linspace(-1, 1, 101))[0]
    expected = np.quantile(cosines, [0.1, 0.5, 0.9])
    np.testing.assert_allclose(quantiles(counts, (0.1, 0.5, 0.9)), expected, atol=0.005)
    assert all(math.isnan(value) for value in quantiles([0, 0], (0.1, 0.5)))
