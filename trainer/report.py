"""report.html of a run folder: plots, evaluations and the configuration, in one file to pass on.

Reads what `trainer/metrics.py` wrote, also of a run that is still going; the plots themselves are
in `trainer/plots.py`. Nothing is fetched when the page is opened: they are SVG inside it.
"""

import base64
import html
import io
import math
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

from trainer.config import ConfigError
from trainer.metrics import METRICS_FILE
from trainer.plots import STYLE, RunLog, build_figures, number

REPORT_FILE = "report.html"


def write_report(run_dir: Path) -> Path:
    """Write RUN/report.html and return its path; ConfigError if the folder has no metrics."""
    path = run_dir / METRICS_FILE
    if not path.is_file():
        raise ConfigError(
            f"{run_dir}: has no {METRICS_FILE}, so it is no run folder, or one not begun"
        )
    log = RunLog.read(path)
    config = run_dir / "config.toml"
    page = _page(run_dir.resolve().name, log, config.read_text() if config.is_file() else "")
    beside = run_dir / (REPORT_FILE + ".part")
    beside.write_text(page, encoding="utf-8")
    return beside.replace(run_dir / REPORT_FILE)


def _page(name: str, log: RunLog, config: str) -> str:
    plots = "".join(
        f'<img alt="{html.escape(title)}" src="data:image/svg+xml;base64,{_svg(figure)}">'
        for title, figure in build_figures(log).items()
    )
    return PAGE.format(
        name=html.escape(name),
        summary=_summary(log),
        plots=plots,
        evaluations=_evaluation_table(log),
        config=html.escape(config) or "no config.toml in the run folder",
    )


def _svg(figure: Figure) -> str:
    text = io.BytesIO()
    with rc_context(STYLE):
        figure.savefig(text, format="svg", metadata={"Date": None})
    return base64.b64encode(text.getvalue()).decode()


def _summary(log: RunLog) -> str:
    if not log.steps:
        return "<p>No step has been logged yet.</p>"
    last = log.steps[-1]
    facts = {
        "step": f"{last['step']:,}",
        "samples seen": f"{last['samples_seen']:,}",
        "epoch": _show(last.get("epoch")),
        "loss": _show(last.get("loss")),
        "samples/s": _show(_median(log, "samples_per_s")),
        "data wait": _percent(_median(log, "data_wait_s"), _median(log, "step_s")),
        "bad samples": _show(last.get("bad_samples")),
        "skipped steps": _show(last.get("skipped_steps")),
    }
    return "".join(
        f"<div><b>{value}</b>{html.escape(label)}</div>" for label, value in facts.items() if value
    )


def _median(log: RunLog, name: str) -> float:
    values = log.column(name)[1]
    values = values[np.isfinite(values)]
    return float(np.median(values)) if len(values) else math.nan


def _percent(part: float, whole: float) -> str:
    return f"{part / whole:.1%}" if math.isfinite(part) and whole > 0 else ""


def _show(value: Any) -> str:
    shown = number(value)
    if not math.isfinite(shown):
        return ""
    return f"{shown:,.0f}" if shown == round(shown) or abs(shown) >= 1000 else f"{shown:.4g}"


def _score(value: Any) -> str:
    """Shares with equal decimals, so that a column can be read down; counts as they are."""
    return f"{value:.4f}" if isinstance(value, float) else _show(value)


def _evaluation_table(log: RunLog) -> str:
    if not log.evaluations:
        return "<p>None yet.</p>"
    head = "".join(f"<th>step {line['step']:,}</th>" for line in log.evaluations)
    rows = "".join(
        f"<tr><th>{html.escape(name)}</th>"
        + "".join(f"<td>{_score(line['evaluation'].get(name))}</td>" for line in log.evaluations)
        + "</tr>"
        for name in log.evaluation_names()
    )
    return f"<table><tr><th></th>{head}</tr>{rows}</table>"


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{name}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; color: #1a202c; max-width: 1120px; margin: 2em auto;
       padding: 0 1em; }}
h1 {{ margin-bottom: .3em; }} h2 {{ margin-top: 1.6em; }}
.facts {{ display: flex; flex-wrap: wrap; gap: 2em; color: #4a5568; }}
.facts b {{ display: block; font-size: 1.35em; color: #1a202c; }}
.plots {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(480px, 1fr)); gap: 1em;
         margin-top: 1.5em; }}
.plots img {{ width: 100%; }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
td, th {{ padding: .15em .9em .15em 0; text-align: right; white-space: nowrap; }}
th:first-child {{ text-align: left; font-weight: normal; }}
tr + tr {{ border-top: 1px solid #e2e8f0; }}
pre {{ background: #f7fafc; padding: 1em; overflow-x: auto; font-size: 13px; }}
</style></head><body>
<h1>{name}</h1>
<div class="facts">{summary}</div>
<div class="plots">{plots}</div>
<h2>Evaluations</h2>
<div class="wide">{evaluations}</div>
<h2>Configuration</h2>
<details><summary>config.toml</summary><pre>{config}</pre></details>
</body></html>
"""
