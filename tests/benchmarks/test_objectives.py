"""The comparison of objectives: what its table says about runs whose numbers are known, and that it runs at all."""

from __future__ import annotations

import importlib.util
import json
import math
import statistics
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pyarrow
import pytest
from pyarrow import parquet

ROOT = Path(__file__).parent.parent.parent
SCRIPT = ROOT / "benchmarks" / "objectives.py"


@pytest.fixture(scope="module")
def objectives() -> ModuleType:
    spec = importlib.util.spec_from_file_location("objectives", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["objectives"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def _run(
    folder: Path, accuracies: list[float], length: float = 20.0, clipped: float = 0.0, iterations: int | None = None
) -> None:
    folder.mkdir(parents=True)
    lines = [
        {"stage": "evaluation", "iteration": i, "accuracy": a, "mean_length": length} for i, a in enumerate(accuracies)
    ]
    lines += [{"stage": "rl", "iteration": i, "clip_ratio": clipped} for i in range(1, len(accuracies))]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "trajectories").mkdir()
    for stage, values in (("sft", [1.0, 0.0]), ("rl", [1.0, 1.0, 1.0, 0.0])):
        table = pyarrow.table({"value": values})
        parquet.write_table(table, folder / "trajectories" / f"evaluation-{stage}-greedy.parquet")
    rl = {"iterations": iterations or len(accuracies) - 1}
    (folder / "recipe.yaml").write_text(json.dumps({"tasks": {}, "rl": rl, "sampling": {}, "evaluation": {}}))


def test_end_and_area_of_a_curve(objectives):
    curve = objectives.Curve((0.2, 0.4, 0.6, 0.6, 0.8), (1.0, 30.0, 20.0, 20.0, 10.0), 0.0, (0.0, 0.0))
    assert curve.end == pytest.approx(0.6)  # of the last four
    assert curve.area == pytest.approx((0.3 + 0.5 + 0.6 + 0.7) / 4)  # trapezoids, by hand
    assert curve.end_length == 20.0


def test_interval_is_students(objectives):
    mean, half = objectives.interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert (mean, half) == pytest.approx((3.0, 2.776445 * math.sqrt(2.5) / math.sqrt(5)), rel=1e-6)
    assert objectives.interval([0.5]) == (0.5, math.inf)


def test_the_table_is_paired_by_seed_and_leaves_out_what_is_not_complete(objectives, tmp_path):
    starts = {0: 0.1, 1: 0.3, 2: 0.5}
    for seed, start in starts.items():
        of_seed = tmp_path / f"seed-{seed}"
        _run(of_seed / "opmd", [start, *[start + 0.2] * 5])
        _run(of_seed / "grpo", [start, *[start + 0.3 + 0.01 * seed] * 5], length=10.0, clipped=0.25)
        running = 6 if seed == 2 else None  # the sixth of its evaluations is still to come
        _run(of_seed / "rest", [start, *[start + 0.2 + 0.1 * (seed - 1)] * 5], iterations=running)
    for seed, accuracy in ((2, 0.8), (9, 0.79)):
        (tmp_path / f"sft-{seed}" / "checkpoints" / "sft" / "hf").mkdir(parents=True)
        gate = tmp_path / f"sft-{seed}" / "checkpoints" / "sft" / "gate.json"
        gate.write_text(json.dumps({"reading_accuracy": accuracy}))
    page = tmp_path / "results.md"
    objectives.write_page(tmp_path, page)
    rows = {line.split(" | ")[0]: line.split(" | ") for line in page.read_text().splitlines() if line.startswith("| ")}
    half = 4.302653 * statistics.stdev([10, 11, 12]) / math.sqrt(3)
    assert rows["| GRPO, clip 0.2"][1:] == [
        "3",
        "61.0% ± 52.2",
        f"+11.0 ± {half:.1f}",
        "57.9% ± 51.9",
        "+9.9 ± 2.2",
        "10.0",
        "25%",
        "50.0%",
        "75.0% |",
    ]
    assert rows["| ReST: correct responses only"][1] == "2"
    text = page.read_text()
    assert "seeds 0, 1, 2 " in text and "take no part (here 9)" in text
    assert "These are 2 seeds; nothing can be told apart with fewer than 5" in text
    assert rows["| grpo"][1:] == ["30", "61", "61", "61", "61", "61 |"]


def test_what_differs_is_told_by_five_seeds_and_their_intervals(objectives, tmp_path):
    # Points over OPMD: mean, standard deviation, half the 95% interval (t = 2.7764), the same for 4 at once (4.3147).
    wide = (0.005, 0.02, 0.005, 0.035, 0.035)  # 2.0, 1.50, 1.86, 2.89
    near = (0.01, 0.02, 0.015, 0.03, 0.035)  # 2.2, 1.04, 1.29, 2.00
    for seed in range(5):
        _run(tmp_path / f"seed-{seed}" / "opmd", [0.3] * 6)
        _run(tmp_path / f"seed-{seed}" / "grpo", [0.3, *[0.3 + wide[seed]] * 5])
        _run(tmp_path / f"seed-{seed}" / "rest", [0.3, *[0.3 + near[seed]] * 5])
    objectives.write_page(tmp_path, tmp_path / "results.md")
    text = (tmp_path / "results.md").read_text()
    assert "At the end, what differs from OPMD by its own interval: rest (+2.2 ± 1.3), grpo (+2.0 ± 1.9).\n" in text
    assert "At the end, what still does when all 4 hold at once: rest.\n" in text
    assert objectives.interval(near, 4)[1] == pytest.approx(4.3147 * statistics.stdev(near) / math.sqrt(5), rel=1e-4)


def test_arms_that_start_from_different_policies_are_no_comparison(objectives, tmp_path):
    _run(tmp_path / "seed-0" / "opmd", [0.1, 0.2])
    _run(tmp_path / "seed-0" / "grpo", [0.2, 0.2])
    with pytest.raises(ValueError, match="seed 0 did not start from the same policy"):
        objectives.curves(tmp_path)


@pytest.mark.engine
def test_two_arms_run_on_one_engine(demo, objectives, tmp_path):
    page = tmp_path / "results.md"
    command = [sys.executable, SCRIPT, "--smoke", "--seeds", "0", "--arms", "opmd", "grpo", "--output", tmp_path]
    command += ["--page", page, "--checkpoint", demo / "checkpoints" / "sft" / "hf"]
    subprocess.run([str(part) for part in command], cwd=ROOT, check=True, timeout=600)
    found = objectives.curves(tmp_path)
    assert {arm: len(runs[0].accuracy) for arm, runs in found.items()} == {"opmd": 3, "grpo": 3}
    rl = [objectives._lines(tmp_path / "seed-0" / arm, "rl") for arm in found]
    assert all(0 < line["parity/max"] <= 1e-3 for of_arm in rl for line in of_arm)
    # Both began with the same weights, so their first iterations sampled and scored the same.
    assert rl[0][0]["tokens"] == rl[1][0]["tokens"] and rl[0][0]["reward"] == rl[1][0]["reward"]
    before = page.read_text()
    subprocess.run([str(part) for part in command], cwd=ROOT, check=True, timeout=60)  # complete: nothing runs again
    assert page.read_text() == before
