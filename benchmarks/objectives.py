"""Compares objectives, sampling and length rewards on the tiny policy, and writes docs/results.md.

    .venv/bin/python benchmarks/objectives.py [--seeds 0 1 2 3 4 5] [--arms opmd grpo] [--output runs/objectives]

Every seed has one SFT model, from which all its arms start; one engine serves them, with the weights pushed back to the
start between arms. Every iteration is followed by an evaluation on held-out pictures. What is complete is kept: a run
that was stopped goes on with the arm it was in. `--table` only writes the page from what is there, `--smoke` takes next
to no time and says nothing about anything.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import multiprocessing
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RECIPE = ROOT / "recipes" / "tiny_demo.yaml"
PAGE = ROOT / "docs" / "results.md"
ENOUGH = 5  # seeds; with two or three, differences agree by chance often enough
LAST = 4  # evaluations at the end that are taken together
PICTURES = 200  # held-out ones, a sample each, in every evaluation

# Fine-tuned on all levels, improved and measured on the hard ones, where there is something to gain.
_HARD = json.dumps(
    [
        {"generator": name, "weight": weight, "levels": [3, 4, 5]}
        for name, weight in (("digits_largest", 2), ("digits_sum", 2), ("shapes_count", 1))
    ]
)
_SFT = (
    "stages=[sft]",
    "sft.ranks=1",
    "sft.phases[0].steps=340",
    "sft.phases[1].steps=120",
    f"tasks.evaluation={_HARD}",
    "evaluation.tasks=24",
    "evaluation.samples=1",
)
_RL = (
    "stages=[rl]",
    f"tasks.train={_HARD}",
    "rl.iterations=12",
    "rl.prompts=16",
    "rl.length.start_iteration=3",
    f"evaluation.tasks={PICTURES}",
    "evaluation.samples=1",
    "evaluation.every=1",
    "checkpoint.every=1000",
)
_SMOKE = ("rl.iterations=2", "rl.prompts=4", "rl.samples=4", "rl.pool=40", "evaluation.tasks=8")


@dataclass(frozen=True, slots=True)
class Arm:
    """What it is, and what it changes."""

    title: str
    overrides: tuple[str, ...] = ()


def _objective(preset: str, normalisation: str) -> tuple[str, ...]:
    keys: dict[str, Any] = {"preset": preset, "normalisation": normalisation, "optimizer_reset": True}
    if normalisation == "fixed":
        keys["divisor"] = 24  # tokens that a response usually has
    return (f"rl.objective={json.dumps(keys)}",)


ARMS = {
    "opmd": Arm("OPMD (k1.5); curriculum + priority; length reward gated", _objective("opmd", "fixed")),
    "rest": Arm("ReST: correct responses only", _objective("rest", "fixed")),
    "grpo": Arm("GRPO, clip 0.2", _objective("grpo", "length")),
    "gspo": Arm("GSPO, clip 3e-4 / 4e-4", _objective("gspo", "none")),
    "uniform": Arm("OPMD, prompts drawn uniformly", ("sampling.curriculum=off", "sampling.prioritised=false")),
    "length_ungated": Arm("OPMD, length reward as in k1.5 (no gate)", ("rl.length.gate=null",)),
    "length_off": Arm("OPMD, no length reward", ("rl.length.weight=0.0",)),
}


@dataclass(frozen=True, slots=True)
class Curve:
    """The evaluations of one run, from iteration 0 (before RL) to the last."""

    accuracy: tuple[float, ...]
    length: tuple[float, ...]
    clipped: float
    greedy: tuple[float, float]  # before and after RL

    @property
    def end(self) -> float:
        return statistics.fmean(self.accuracy[-LAST:])

    @property
    def area(self) -> float:
        """Area under the curve by trapezoids, over its width: the mean accuracy on the way."""
        inner = math.fsum(self.accuracy) - (self.accuracy[0] + self.accuracy[-1]) / 2
        return inner / (len(self.accuracy) - 1)

    @property
    def end_length(self) -> float:
        return statistics.fmean(self.length[-LAST:])


# --- runs -------------------------------------------------------------------------------------------------------------


def fine_tuned(seed: int, output: Path) -> Path:
    """The checkpoint that the seed's arms start from; made if it is not there."""
    folder = output / f"sft-{seed}"
    if not (folder / "summary.json").exists():
        shutil.rmtree(folder, ignore_errors=True)
        names = (f"output={output}", f"name=sft-{seed}", f"seed={seed}")
        subprocess.run([sys.executable, "-m", "rlvlm", "train", str(RECIPE), *names, *_SFT], cwd=ROOT, check=True)
    return folder / "checkpoints" / "sft" / "hf"


def reads(checkpoint: Path) -> bool:
    """Whether the SFT model passes the demo's gate: without reading pictures there is nothing for RL to improve."""
    from rlvlm.recipe.load import load_recipe
    from rlvlm.sft import read_gate

    return read_gate(checkpoint) >= load_recipe(RECIPE).sft.gate.min_accuracy


def run_seed(seed: int, arms: Sequence[str], checkpoint: Path, output: Path, more: Sequence[str]) -> None:
    """All arms of a seed that are not complete yet, in a process of its own."""
    from rlvlm.recipe.load import load_recipe

    recipes = {}
    for arm in arms:
        folder = output / f"seed-{seed}"
        names = (f"output={folder}", f"name={arm}", f"seed={seed}", f"policy.model={checkpoint}")
        recipe = load_recipe(RECIPE, [*ARMS["opmd"].overrides, *_RL, *names, *ARMS[arm].overrides, *more])
        if len(_evaluations(folder / arm)) != recipe.rl.iterations + 1:
            shutil.rmtree(folder / arm, ignore_errors=True)
            recipes[arm] = recipe
    if recipes:
        asyncio.run(_run_arms(recipes, checkpoint))


async def _run_arms(recipes: dict[str, Any], checkpoint: Path) -> None:
    """One engine and one set of tasks for all arms: they differ in nothing that these know of."""
    from rlvlm.report.console import Console
    from rlvlm.run import RunFolder
    from rlvlm.scoring import Judge, opens_thinking
    from rlvlm.tasks.pools import TaskPools
    from rlvlm.trainer import PolicyParts

    first = next(iter(recipes.values()))
    pools = TaskPools(first, Path(first.output) / "images")
    parts = PolicyParts(first, RunFolder.of(first), pools, checkpoint)
    judge = Judge(first.rewards, pools.store, thinking=opens_thinking(parts.processor))
    with Console() as console:
        async with aclosing(judge), parts.engine() as engine:
            for arm, recipe in recipes.items():
                console.stage("arm", f"{arm}, seed {recipe.seed}: {ARMS[arm].title}")
                await _run_arm(recipe, checkpoint, pools, engine, judge, console)


async def _run_arm(recipe: Any, checkpoint: Path, pools: Any, engine: Any, judge: Any, console: Any) -> None:
    from rlvlm.report.clock import Clock
    from rlvlm.report.metrics import MetricsLog
    from rlvlm.run import RunFolder
    from rlvlm.trainer import PolicyParts, improve
    from rlvlm.weights.parcel import Parcel

    def start(path: Path) -> None:
        shutil.copyfile(checkpoint / "model.safetensors", path)

    await engine.update_weights(Parcel(start), version=0)
    with RunFolder.of(recipe) as run:
        run.create(recipe)
        parts = PolicyParts(recipe, run, pools, checkpoint)
        await improve(parts, engine, judge, console, MetricsLog(run.metrics), Clock())
        shutil.rmtree(run.checkpoints)


def _lines(folder: Path, stage: str) -> list[dict[str, Any]]:
    path = folder / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [line for line in lines if line["stage"] == stage]


def _evaluations(folder: Path) -> list[dict[str, Any]]:
    return _lines(folder, "evaluation")


# --- the table --------------------------------------------------------------------------------------------------------


def curves(output: Path) -> dict[str, dict[int, Curve]]:
    """arm -> seed -> its curve, of all complete runs. Raises ValueError if arms of a seed did not start equal."""
    found: dict[str, dict[int, Curve]] = {}
    for folder in sorted(output.glob("seed-*/*/")):
        lines = _evaluations(folder)
        iterations = [line["iteration"] for line in lines]
        seed, rl = int(folder.parent.name.removeprefix("seed-")), _lines(folder, "rl")
        if folder.name in ARMS and iterations == list(range(_iterations(folder) + 1)):
            found.setdefault(folder.name, {})[seed] = Curve(
                tuple(line["accuracy"] for line in lines),
                tuple(line["mean_length"] for line in lines),
                statistics.fmean(line["clip_ratio"] for line in rl),
                (_greedy(folder, "sft"), _greedy(folder, "rl")),
            )
    _check_starts(found)
    return found


def _iterations(folder: Path) -> int:
    """How many its recipe asks for."""
    import yaml

    return int(yaml.safe_load((folder / "recipe.yaml").read_text())["rl"]["iterations"])


def _greedy(folder: Path, stage: str) -> float:
    from pyarrow import parquet

    path = folder / "trajectories" / f"evaluation-{stage}-greedy.parquet"
    return statistics.fmean(parquet.read_table(path, columns=["value"])["value"].to_pylist())


def _check_starts(found: dict[str, dict[int, Curve]]) -> None:
    """Same weights, same pictures, same random numbers: the first evaluation is the same, or something leaked."""
    for seed in {seed for of_arm in found.values() for seed in of_arm}:
        starts = {arm: of_arm[seed].accuracy[0] for arm, of_arm in found.items() if seed in of_arm}
        if len(set(starts.values())) > 1:
            raise ValueError(f"the arms of seed {seed} did not start from the same policy: {starts}")


def interval(values: Sequence[float], comparisons: int = 1) -> tuple[float, float]:
    """(mean, half width of its 95% interval) by Student's t over seeds; infinite for a single one. comparisons: how
    many intervals shall hold at once with 95% (Bonferroni)."""
    from scipy.stats import t

    n = len(values)
    half = t.ppf(1 - 0.025 / comparisons, n - 1) * statistics.stdev(values) / math.sqrt(n) if n > 1 else math.inf
    return statistics.fmean(values), float(half)


def page(found: dict[str, dict[int, Curve]], closed: Sequence[int], recipe_text: str) -> str:
    """docs/results.md. closed: the seeds that stopped at the gate."""
    base = found["opmd"]
    seeds = sorted(base)
    evaluations = len(base[seeds[0]].accuracy) - 1
    starts = interval([base[seed].accuracy[0] for seed in seeds])
    rows = [_row(arm, found[arm], base) for arm in ARMS if arm in found]
    head = (
        "arm | seeds | accuracy at the end | difference to OPMD | accuracy on the way | difference to OPMD | "
        "length at the end | clipped | greedy before | after"
    )
    return "\n".join(
        [
            "# Results",
            "",
            "Written by `benchmarks/objectives.py` from the runs' own `metrics.jsonl`; change it there.",
            "",
            "## Objectives, sampling, length reward",
            "",
            *_METHOD.format(
                closed=f" (here {_listed(closed)})" if closed else " (here none)",
                seeds=_listed(seeds),
                iterations=evaluations,
                start=_percent(*starts),
                pictures=PICTURES,
                last=LAST,
            ).splitlines(),
            "",
            f"| {head} |",
            "|" + "---|" * 10,
            *rows,
            "",
            *_verdict(found, base),
            "",
            "Mean accuracy over seeds after each iteration (0 is the SFT model):",
            "",
            "| arm | " + " | ".join(str(i) for i in range(evaluations + 1)) + " |",
            "|" + "---|" * (evaluations + 2),
            *[_curve_row(arm, found[arm]) for arm in ARMS if arm in found],
            "",
            "What the arms have in common:",
            "",
            "```yaml",
            recipe_text.strip(),
            "```",
            "",
        ]
    )


_METHOD = """\
The tiny policy (`tiny_kimi`, float32, CPU), fine-tuned with seeds {seeds} on the tasks of `recipes/tiny_demo.yaml`,
then {iterations} iterations of RL on their levels 3 to 5, where the SFT models get {start} right. All arms of a seed
start from the same SFT model and see the same random numbers. After every iteration {pictures} held-out pictures are
answered once at T=1. *At the end* is the mean of the last {last} evaluations, *on the way* the area under the curve of
all. Seeds whose SFT model did not pass the demo's gate (it reads fewer than 80% of what it sees) take no part{closed}.
Intervals are 95%, by Student's t over seeds; differences are paired by seed, in percentage points.

Every arm has the same Adam step size, optimizer reset, gradient clip and batch: Adam does not see the scale of a loss,
so one rate means steps of the same size to all. None was tuned for any arm: this compares them as they come, on a small
problem with short chains. It says nothing about large models. The SFT model samples badly what it does well greedily
(last columns): much of the gain is in sampling the better of what SFT taught."""


def _row(arm: str, of_arm: dict[int, Curve], base: dict[int, Curve]) -> str:
    seeds = sorted(of_arm.keys() & base.keys())
    ours = [of_arm[seed] for seed in seeds]
    ends, areas = [curve.end for curve in ours], [curve.area for curve in ours]
    cells = [
        ARMS[arm].title,
        str(len(seeds)),
        _percent(*interval(ends)),
        "" if arm == "opmd" else _points(*_difference(of_arm, base, "end")),
        _percent(*interval(areas)),
        "" if arm == "opmd" else _points(*_difference(of_arm, base, "area")),
        f"{statistics.fmean(curve.end_length for curve in ours):.1f}",
        f"{statistics.fmean(curve.clipped for curve in ours):.0%}",
        *(f"{statistics.fmean(curve.greedy[i] for curve in ours):.1%}" for i in (0, 1)),
    ]
    return "| " + " | ".join(cells) + " |"


def _difference(
    of_arm: dict[int, Curve], base: dict[int, Curve], what: str, comparisons: int = 1
) -> tuple[float, float]:
    seeds = sorted(of_arm.keys() & base.keys())
    return interval([getattr(of_arm[seed], what) - getattr(base[seed], what) for seed in seeds], comparisons)


def _verdict(found: dict[str, dict[int, Curve]], base: dict[int, Curve]) -> list[str]:
    """Which arms differ from OPMD, by the intervals alone."""
    arms = [arm for arm in ARMS if arm in found and arm != "opmd"]
    seeds = min(len(found[arm].keys() & base.keys()) for arm in [*arms, "opmd"])
    if seeds < ENOUGH:
        return [
            f"These are {seeds} seeds; nothing can be told apart with fewer than {ENOUGH}, whatever the intervals say."
        ]
    lines = []
    for what, name in (("end", "At the end"), ("area", "On the way")):
        apart = [arm for arm in arms if _apart(*_difference(found[arm], base, what))]
        surely = [arm for arm in arms if _apart(*_difference(found[arm], base, what, comparisons=2 * len(arms)))]
        said = ", ".join(f"{arm} ({_points(*_difference(found[arm], base, what))})" for arm in apart)
        lines.append(f"{name}, what differs from OPMD by its own interval: {said or 'nothing'}.")
        lines.append(
            f"{name}, what still does when all {2 * len(arms)} hold at once: {', '.join(surely) or 'nothing'}."
        )
    return lines


def _apart(mean: float, half: float) -> bool:
    return abs(mean) > half


def _curve_row(arm: str, of_arm: dict[int, Curve]) -> str:
    means = [statistics.fmean(values) for values in zip(*(c.accuracy for c in of_arm.values()), strict=True)]
    return f"| {arm} | " + " | ".join(f"{100 * mean:.0f}" for mean in means) + " |"


def _percent(mean: float, half: float) -> str:
    return f"{100 * mean:.1f}%" + (f" ± {100 * half:.1f}" if math.isfinite(half) else "")


def _points(mean: float, half: float) -> str:
    return f"{100 * mean:+.1f}" + (f" ± {100 * half:.1f}" if math.isfinite(half) else "")


def _listed(seeds: Sequence[int]) -> str:
    return ", ".join(map(str, seeds))


def _common(recipe_file: Path) -> str:
    """The parts of an arm's saved recipe that its numbers depend on."""
    import yaml

    recipe = yaml.safe_load(recipe_file.read_text())
    sections = {name: recipe[name] for name in ("tasks", "rl", "sampling", "evaluation")}
    return str(yaml.safe_dump(sections, sort_keys=False, default_flow_style=None, width=110))


def write_page(output: Path, path: Path) -> None:
    found = curves(output)
    if "opmd" not in found:
        raise SystemExit(f"{output} has no complete run of opmd, which the others are compared with; leave out --table")
    seed = min(found["opmd"])
    sfts = {
        int(folder.name.removeprefix("sft-")): folder / "checkpoints" / "sft" / "hf" for folder in output.glob("sft-*")
    }
    closed = [seed for seed, checkpoint in sorted(sfts.items()) if checkpoint.is_dir() and not reads(checkpoint)]
    path.write_text(page(found, closed, _common(output / f"seed-{seed}" / "opmd" / "recipe.yaml")))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4, 5])
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "objectives")
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--checkpoint", type=Path, help="a fine-tuned policy to start from instead of own ones")
    parser.add_argument("--table", action="store_true", help="only write the page")
    parser.add_argument("--smoke", action="store_true")
    arguments = parser.parse_args()
    output, arms = arguments.output.resolve(), list(dict.fromkeys(["opmd", *arguments.arms]))
    for seed in [] if arguments.table else arguments.seeds:
        checkpoint = arguments.checkpoint.resolve() if arguments.checkpoint else fine_tuned(seed, output)
        if not reads(checkpoint):
            print(f"seed {seed} takes no part: its SFT model does not pass the gate")
            continue
        more = _SMOKE if arguments.smoke else ()
        process = multiprocessing.get_context("spawn").Process(
            target=run_seed, args=(seed, arms, checkpoint, output, more)
        )
        process.start()
        process.join()
        if process.exitcode:
            return process.exitcode
    write_page(output, arguments.page)
    print(arguments.page.read_text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
