"""The plots of a run, one function each, drawn from the lines of its metrics.jsonl."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter
from numpy.typing import NDArray

from trainer.metrics import read_metrics

MAX_POINTS = 1000  # of a line: more cannot be seen
SMOOTHING_SHARE = 0.01  # time constant of the smoothed line, as a share of the run
COLORS = ("#2b6cb0", "#dd6b20", "#2f855a", "#b83280", "#6b46c1", "#b7791f", "#4a5568", "#2c7a7b")
NO_SCORES = ("flip", "_std", "_error", "_low", "_high", "_by_kind", "_grid", "_MAP@R")
DASHES = ("-", "--", ":", "-.")
STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "grid.color": "#e2e8f0",
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "nsphere",
}

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class RunLog:
    """The lines of a metrics.jsonl, sorted by kind; of a step that comes twice, the last."""

    steps: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    cosines: list[dict[str, Any]]

    @classmethod
    def read(cls, path: Path) -> "RunLog":
        """Whole lines only, by rising step."""
        by_kind: dict[str, dict[int, dict[str, Any]]] = {
            "loss": {},
            "evaluation": {},
            "cosines": {},
        }
        for line in read_metrics(path):
            for kind, lines in by_kind.items():
                if kind in line:
                    lines[line["step"]] = line
        return cls(*([lines[step] for step in sorted(lines)] for lines in by_kind.values()))

    def column(self, name: str) -> tuple[Floats, Floats]:
        """Steps and values of one number, NaN where a line lacks it or it was not finite."""
        steps = np.array([line["step"] for line in self.steps], dtype=np.float64)
        return steps, np.array([number(line.get(name)) for line in self.steps], dtype=np.float64)

    def parts_of_a_step(self) -> list[str]:
        """Names of the seconds that add up to `step_s`, in the order of a step."""
        names = dict.fromkeys(name for line in self.steps for name in line)
        others = ("step_s", "samples_per_s", "plan_wait_s", "refresh_s")  # sums, or inside others
        return [name for name in names if name.endswith("_s") and name not in others]

    def evaluation_names(self) -> list[str]:
        """Names of the numbers of any evaluation."""
        return list(dict.fromkeys(name for line in self.evaluations for name in line["evaluation"]))


def build_figures(log: RunLog) -> dict[str, Figure]:
    """The plots that the lines have numbers for, by title, in reading order."""
    figures: dict[str, Figure] = {}
    with rc_context(STYLE):
        for title, draw in PLOTS.items():
            figure = Figure(figsize=(5.4, 2.9), layout="constrained")
            axes = figure.subplots()
            if draw(axes, log):
                axes.set_title(title)
                figures[title] = figure
    return figures


def _draw_loss(axes: Axes, log: RunLog) -> bool:
    steps, loss = log.column("loss")
    axes.plot(*_thin(steps, loss), color=COLORS[0], alpha=0.35, linewidth=0.8)
    axes.plot(*_thin(steps, smooth(loss)), color=COLORS[0])
    return _finish(axes, steps, loss)


def _draw_column(
    name: str,
    label: str = "",
    *,
    unit: float = 1.0,
    from_zero: bool = False,
    logarithmic: bool = False,
) -> "Draw":
    def draw(axes: Axes, log: RunLog) -> bool:
        steps, values = log.column(name)
        values = values / unit
        axes.plot(*_thin(steps, values), color=COLORS[0])
        axes.set_ylabel(label)
        if logarithmic and (values > 0).any():
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(LogFormatter())
            axes.yaxis.set_minor_formatter(LogFormatter())
        return _finish(axes, steps, values, from_zero=from_zero)

    return draw


def _draw_columns(names: dict[str, str], ylabel: str, *, from_zero: bool = False) -> "Draw":
    """Lines of those numbers, by name and label, that the run has."""

    def draw(axes: Axes, log: RunLog) -> bool:
        drawn = []
        for color, (name, label) in zip(COLORS, names.items(), strict=False):
            steps, values = log.column(name)
            if np.isfinite(values).any():
                axes.plot(*_thin(steps, values), color=color, alpha=0.25, linewidth=0.8)
                axes.plot(*_thin(steps, smooth(values)), color=color, label=label)
                drawn.append(values)
        if not drawn:
            return False
        axes.set_ylabel(ylabel)
        axes.legend(fontsize=7)
        return _finish(axes, steps, np.concatenate(drawn), from_zero=from_zero)

    return draw


def _draw_times(axes: Axes, log: RunLog) -> bool:
    names = log.parts_of_a_step()
    if not names:
        return False
    steps = log.column(names[0])[0]
    parts = np.nan_to_num(np.stack([log.column(name)[1] for name in names])) * 1000
    thin = slice(None, None, _stride(len(steps)))
    labels = [
        f"{name.removesuffix('_s').replace('_', ' ')} {share:.0%}"
        for name, share in zip(names, parts.sum(1) / max(parts.sum(), 1e-12), strict=True)
    ]
    axes.stackplot(steps[thin], parts[:, thin], labels=labels, colors=COLORS)
    axes.set_ylabel("ms a step")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), reverse=True)
    return _finish(axes, steps, parts.sum(0), from_zero=True)


def _draw_cosines(axes: Axes, log: RunLog) -> bool:
    if not log.cosines:
        return False
    line = log.cosines[-1]
    for color, (name, counts) in zip(COLORS, line["cosines"].items(), strict=False):
        edges = np.linspace(-1, 1, len(counts) + 1)
        label = f"{name.replace('_', ' ')}"
        axes.stairs(
            np.array(counts) / max(1, sum(counts)),
            edges,
            fill=True,
            alpha=0.55,
            color=color,
            label=label,
        )
    axes.set_xlabel(f"cosine at step {line['step']}")
    axes.set_ylabel("share of rows")
    axes.legend()
    return True


def _draw_margins(axes: Axes, log: RunLog) -> bool:
    if len(log.cosines) < 2:
        return False
    steps = np.array([line["step"] for line in log.cosines], dtype=np.float64)
    for color, name in zip(COLORS, log.cosines[-1]["cosines"], strict=False):
        bands = np.array(
            [quantiles(line["cosines"][name], (0.1, 0.5, 0.9)) for line in log.cosines]
        )
        axes.fill_between(steps, bands[:, 0], bands[:, 2], color=color, alpha=0.2, linewidth=0)
        axes.plot(steps, bands[:, 1], color=color, label=name.replace("_", " "))
    axes.set_ylabel("cosine: median, 10-90 %")
    axes.legend()
    return _finish(axes, steps, steps)


def _draw_evaluations(axes: Axes, log: RunLog) -> bool:
    if len(log.evaluations) < 2:
        return False
    steps = np.array([line["step"] for line in log.evaluations], dtype=np.float64)
    names = [name for name in log.evaluation_names() if _is_score(name)]
    tasks = list(dict.fromkeys(name.rpartition("_")[0] for name in names))
    used = [0] * len(tasks)  # a color for what belongs together, a dash for each number of it
    for name in names:
        values = np.array([number(line["evaluation"].get(name)) for line in log.evaluations])
        task = tasks.index(name.rpartition("_")[0])
        axes.plot(
            steps,
            values,
            color=COLORS[task % len(COLORS)],
            linestyle=DASHES[used[task] % len(DASHES)],
            marker=".",
            label=name,
        )
        used[task] += 1
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=7)
    return _finish(axes, steps, steps, from_zero=True)


def _is_score(name: str) -> bool:
    """Counts, options and what says how sure a score is are in the table alone."""
    return not name.startswith("num_") and not name.endswith(NO_SCORES)


Draw = Callable[[Axes, RunLog], bool]

PLOTS: dict[str, Draw] = {
    "Loss": _draw_loss,
    "Evaluation": _draw_evaluations,
    "Learning rate": _draw_column("lr", from_zero=True),
    "Scale of the cosines": _draw_column("scale"),
    "Bias of the logits": _draw_column("bias"),
    "Gradient norm": _draw_column("grad_norm", logarithmic=True),
    "Throughput": _draw_column("samples_per_s", "samples a second", from_zero=True),
    "Where a step's time goes": _draw_times,
    "Positives and hardest negatives": _draw_cosines,
    "Cosines over the run": _draw_margins,
    "Hardness of the negatives": _draw_columns(
        {
            "positive_cosine": "positive",
            "hardest_negative": "hardest negative",
            "top10_negatives": "10 hardest negatives",
        },
        "mean cosine of sampled rows",
    ),
    "Negatives that come close": _draw_columns(
        {
            "margin_violations": "rows: hardest within the margin",
            "closer_than_positive": "rows: hardest above the positive",
            "suspected_false_negatives": "negatives above the positive",
            "masked_share": "masked pairs",
            "cluster_mates": "hardest is a cluster mate",
        },
        "share",
        from_zero=True,
    ),
    "Effective negatives": _draw_column(
        "effective_negatives", "exp(entropy over negatives)", logarithmic=True
    ),
    "Age of plan and embeddings": _draw_columns(
        {
            "plan_age": "plan",
            "store_age_p50": "embeddings, median",
            "store_age_p90": "embeddings, 90 %",
        },
        "steps",
        from_zero=True,
    ),
    "Drift of stored embeddings": _draw_column("store_drift", "1 - cosine", from_zero=True),
    "Peak memory": _draw_column("peak_memory_bytes", "GiB, first rank", unit=2**30, from_zero=True),
}


def _finish(axes: Axes, steps: Floats, values: Floats, *, from_zero: bool = False) -> bool:
    """Common axes; whether there is anything to see."""
    axes.set_xlabel("step")
    axes.set_xlim(0, max(1, *steps) if len(steps) else 1)
    if from_zero:
        axes.set_ylim(bottom=0)
    return bool(len(steps)) and bool(np.isfinite(values).any())


def smooth(values: Floats) -> Floats:
    """Exponential moving average over a share of the run, unbiased at its start, blind to NaN."""
    keep = 1 - 1 / max(1.0, SMOOTHING_SHARE * len(values))
    mean = weight = 0.0
    smoothed = np.full_like(values, math.nan)
    for i, value in enumerate(values):
        if math.isfinite(value):
            mean = keep * mean + (1 - keep) * value
            weight = keep * weight + (1 - keep)
        smoothed[i] = mean / weight if weight else math.nan
    return smoothed


def quantiles(counts: Sequence[int], shares: Iterable[float]) -> list[float]:
    """Quantiles of a histogram of cosines over [-1, 1], linear inside a bin; NaN when empty."""
    total = np.concatenate([[0], np.cumsum(counts)])
    edges = np.linspace(-1, 1, len(total))
    if total[-1] == 0:
        return [math.nan for _ in shares]
    return [float(np.interp(share * total[-1], total, edges)) for share in shares]


def _stride(count: int) -> int:
    return max(1, -(-count // MAX_POINTS))


def _thin(steps: Floats, values: Floats) -> tuple[Floats, Floats]:
    return steps[:: _stride(len(steps))], values[:: _stride(len(steps))]


def number(value: Any) -> float:
    """NaN for what is missing or was not finite."""
    return float(value) if isinstance(value, int | float) else math.nan
