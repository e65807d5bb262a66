"""report.html: one file that needs nothing else, made only from what lies in the run folder.

It can be made again at any time, from an unfinished run too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import yaml

from rlvlm.recipe.schema import Parity, Report
from rlvlm.report import charts
from rlvlm.report.charts import Chart, Line
from rlvlm.report.console import duration
from rlvlm.report.decomposition import decompose, in_words
from rlvlm.report.files import replace_file
from rlvlm.report.metrics import MetricsLog, Record
from rlvlm.report.showcase import choose, parts_of

TEMPLATE = "html_template.html.j2"
SECONDS = ("sft", "rollout", "reward", "learner", "transfer", "evaluation", "other")
MOST_LINES = 8
# What the page asks for: a summary of an older or a partial run may lack some of it.
SUMMARY = (
    "policy", "versions", "zero_stage", "wall_s", "peak_rss_bytes", "accuracy_gain", "length_change", "parity",
)  # fmt: skip
RATE = ("accuracy", "ci95", "samples", "share", "mean_length", "greedy_accuracy", "failures")


class NotARunFolderError(FileNotFoundError):
    """A folder without recipe.yaml: nothing to report on."""


@dataclass(frozen=True, slots=True)
class Run:
    """What the run folder holds. summary: empty for an unfinished run."""

    folder: Path
    recipe_text: str
    recipe: Mapping[str, Any]
    sft: Sequence[Record]
    rl: Sequence[Record]
    evaluations: Sequence[Record]
    summary: Mapping[str, Any]

    @property
    def before(self) -> Mapping[str, Any]:
        return self.summary.get("evaluation", {}).get("sft") or {}

    @property
    def after(self) -> Mapping[str, Any]:
        return self.summary.get("evaluation", {}).get("rl") or {}

    def setting(self, *keys: str, default: Any) -> Any:
        """A value of the recipe, which is the resolved one; the default only serves recipes that were cut by hand."""
        value: Any = self.recipe
        for key in keys:
            if not isinstance(value, Mapping) or key not in value:
                return default
            value = value[key]
        return value


def write_report(run_folder: Path) -> Path:
    """Writes `run_folder`/report.html and returns its path. Raises NotARunFolderError."""
    run = read_run(run_folder)
    page = _environment().get_template(TEMPLATE).render(_page(run))
    path = run_folder / "report.html"
    replace_file(path, lambda temporary: temporary.write_text(page, encoding="utf-8"))
    return path


def read_run(run_folder: Path) -> Run:
    """Reads all but the trajectories and pictures."""
    recipe, summary = run_folder / "recipe.yaml", run_folder / "summary.json"
    if not recipe.exists():
        raise NotARunFolderError(f"{run_folder} has no recipe.yaml; name the folder of a run, such as runs/<name>")
    text = recipe.read_text(encoding="utf-8")
    records = MetricsLog(run_folder / "metrics.jsonl").read()
    return Run(
        folder=run_folder,
        recipe_text=text,
        recipe=yaml.safe_load(text) or {},
        sft=[r for r in records if r.get("stage") == "sft"],
        rl=[r for r in records if r.get("stage") == "rl"],
        evaluations=[r for r in records if r.get("stage") == "evaluation"],
        summary=json.loads(summary.read_text(encoding="utf-8")) if summary.exists() else {},
    )


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(number=charts.number, percent=_percent, duration=duration, signed=_signed)
    environment.globals.update(
        line_chart=charts.line_chart, dumbbell=charts.dumbbell, parts_of=parts_of, part_colour=SECONDS.index
    )
    return environment


def _page(run: Run) -> dict[str, Any]:
    return {
        "name": run.summary.get("name") or run.setting("name", default=run.folder.name),
        "seed": run.summary.get("seed", run.setting("seed", default=0)),
        "finished": bool(run.summary),
        "progress": _progress(run),
        "summary": _filled(run.summary, SUMMARY),
        "before": _filled(run.before, RATE) if run.before else None,
        "after": _filled(run.after, RATE) if run.after else None,
        "training": _training_ends(run),
        "explained": _explained(run),
        "counted": _by_side(run, "samples"),
        "failed": _by_side(run, "failures"),
        "comparison": _comparison(run),
        "styles": _styles(run),
        "rl_charts": [chart for chart in _rl_charts(run) if charts.has_data(chart)],
        "sft_charts": [chart for chart in _sft_charts(run) if charts.has_data(chart)],
        "responses": choose(run.folder, run.setting("report", "trajectories", default=Report().trajectories)),
        "seconds": charts.shares(_seconds(run)),
        "recipe": run.recipe_text,
    }


def _progress(run: Run) -> str:
    """How far an unfinished run has come."""
    if run.rl:
        return f"{_of(run.rl[-1]['iteration'], run.setting('rl', 'iterations', default=None))} RL iterations"
    if run.sft:
        steps = sum(phase["steps"] for phase in run.setting("sft", "phases", default=()))
        return f"{_of(run.sft[-1]['step'], steps)} SFT steps"
    return "nothing measured yet"


def _of(done: int, total: int | None) -> str:
    return f"{done} of {total}" if total else str(done)


def _training_ends(run: Run) -> list[tuple[int, float]]:
    """(iteration, accuracy) of the first and the latest RL iteration: what an unfinished run has for a headline."""
    known = [(r["iteration"], r["accuracy"]) for r in run.rl if r.get("accuracy") is not None]
    return [known[0], known[-1]] if known else []


def _explained(run: Run) -> str:
    parts = decompose(run.before.get("by_style", {}), run.after.get("by_style", {}))
    return in_words(parts) if parts else ""


def _by_side(run: Run, key: str) -> str:
    """Such as "720 before and 716 after"; a side where it is 0 goes unsaid."""
    sides = (("before", run.before), ("after", run.after))
    return " and ".join(f"{side[key]:,} {name}" for name, side in sides if side.get(key))


def _comparison(run: Run) -> list[dict[str, Any]]:
    """The rows of the table: all together, then each task, then each level."""
    rows = [_row("all tasks", "all", run.before, run.after)] if run.before or run.after else []
    for kind, prefix in (("by_task", ""), ("by_level", "level ")):
        first, second = run.before.get(kind, {}), run.after.get(kind, {})
        rows += [
            _row(f"{prefix}{name}", kind, first.get(name, {}), second.get(name, {}))
            for name in dict.fromkeys([*first, *second])
        ]
    return rows


def _styles(run: Run) -> list[dict[str, Any]]:
    first, second = run.before.get("by_style", {}), run.after.get("by_style", {})
    return [
        _row(name, f"c{i % 6}", first.get(name, {}), second.get(name, {}))
        for i, name in enumerate(dict.fromkeys([*first, *second]))
    ]


def _row(name: str, kind: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """kind: a class of the page: which part of the table, or the colour of a style."""
    return {"name": name, "kind": kind, "before": _filled(before, RATE), "after": _filled(after, RATE)}


def _filled(known: Mapping[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    return {**dict.fromkeys(keys), **known}


def _seconds(run: Run) -> list[tuple[str, float]]:
    if run.summary:
        return [(part, run.summary.get("seconds", {}).get(part) or 0.0) for part in SECONDS]
    measured = {part: sum(r.get(f"seconds/{part}") or 0.0 for r in run.rl) for part in SECONDS}
    measured["sft"] = (run.sft[-1].get("seconds") or 0.0) if run.sft else 0.0
    return list(measured.items())


def _rl_charts(run: Run) -> list[Chart]:
    def line(key: str, name: str = "", colour: str = "after") -> Line:
        return _line(run.rl, "iteration", key, name or key, colour)

    start = next((r["iteration"] for r in run.rl if r.get("length_reward")), None)
    begins = ("length reward on", float(start)) if start is not None else None
    cut = Chart("Clipped responses", (line("completions/clipped_ratio"),), "at max_tokens", percent=True, floor=0.0)
    bounded = Chart("Clipped ratios", (line("clip_ratio"),), "share of tokens", percent=True, floor=0.0)
    rejected = Chart("Rejected tokens", (line("correction/rejected"),), "by the correction", percent=True, floor=0.0)
    limit = run.setting("parity", "max", default=Parity().max)
    return [
        Chart("Reward", (line("reward"),), "band: standard deviation", band=_band(run.rl, "reward_std"), mark=begins),
        Chart("Accuracy", (line("accuracy"),), "on the sampled training tasks", percent=True),
        *_held_out_chart(run),
        Chart(
            "Chain length",
            (line("completions/mean_length", "mean"), line("completions/max_length", "max", "second")),
            "tokens",
            floor=0.0,
            mark=begins,
        ),
        Chart("KL", (line("kl"),), "to the weights that sampled", floor=0.0),
        Chart("Entropy", (line("entropy"),), "nats a token", floor=0.0),
        Chart(
            "Parity",
            (line("parity/max", "max"), line("parity/mean", "mean", "second")),
            "|engine − learner| log-prob",
            log=True,
            level=("limit", limit) if limit else None,
        ),
        Chart("Expert load, entropy", (line("load/entropy"),), "1 = even", ceiling=1.0),
        Chart("Expert load, max/mean", (line("load/max_mean"),), "1 = even", floor=1.0),
        Chart("Gradient norm", (line("grad_norm"),), floor=0.0),
        Chart("Loss", (line("loss"),), "squared surrogate"),
        Chart("Mean level", (line("mean_level"),), "of the sampled tasks", floor=1.0),
        *_keyed_charts(run, "reward/", "Parts of the reward", "mean over the responses that have it"),
        *_keyed_charts(run, "success_rate/", "Success rate", "as the sampler tracks it", percent=True),
        *(chart for chart in (cut, bounded, rejected) if any(chart.lines[0].ys)),
    ]


def _held_out_chart(run: Run) -> list[Chart]:
    """The curve of evaluation.every, where there is one."""
    if not run.evaluations:
        return []
    half_widths = tuple((r["ci95"][1] - r["ci95"][0]) / 2 for r in run.evaluations)
    line = _line(run.evaluations, "iteration", "accuracy", "accuracy", "after")
    return [Chart("Held-out accuracy", (line,), "T=1; band: 95% interval", percent=True, band=half_widths)]


def _keyed_charts(run: Run, prefix: str, title: str, note: str, percent: bool = False) -> list[Chart]:
    """One chart with a line for each key that starts with `prefix`, where there is any."""
    keys = sorted({key for r in run.rl for key in r if key.startswith(prefix)})[:MOST_LINES]
    if not keys:
        return []
    lines = [_line(run.rl, "iteration", key, key.removeprefix(prefix), f"c{i % 6}") for i, key in enumerate(keys)]
    return [Chart(title, tuple(lines), note, percent=percent)]


def _sft_charts(run: Run) -> list[Chart]:
    def chart(title: str, key: str, note: str = "", percent: bool = False, log: bool = False) -> Chart:
        return Chart(title, (_line(run.sft, "step", key, title),), note, percent=percent, log=log, x_name="step")

    return [
        chart("SFT loss", "loss", "log scale", log=True),
        chart("SFT token accuracy", "mean_token_accuracy", "teacher forced", percent=True),
        chart("SFT gradient norm", "grad_norm"),
    ]


def _line(records: Sequence[Record], x: str, key: str, name: str, colour: str = "after") -> Line:
    return Line(name, tuple(float(r[x]) for r in records), tuple(r.get(key) for r in records), colour)


def _band(records: Sequence[Record], key: str) -> tuple[float | None, ...]:
    return tuple(r.get(key) for r in records)


def _percent(value: float | None) -> str:
    return charts.number(value, percent=True)


def _signed(value: float | None, digits: int = 1) -> str:
    """With a true minus sign, as a page sets it."""
    return "–" if value is None else f"{value:+.{digits}f}".replace("-", "−")
