"""Runs the demo recipe with several seeds and prints what each reached, and the mean: the table in the README.

    .venv/bin/python benchmarks/demo_seeds.py [--seeds 0 1 2] [--output runs/demo_seeds] [--judge]

A run whose summary.json is there already is taken as it is. `--judge` exits with 1 unless the claims of the README
hold. Paired: every seed compares the policy after RL with the SFT model that it started from, on the same held-out
tasks.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RECIPE = ROOT / "recipes" / "tiny_demo.yaml"


def run(seed: int, output: Path) -> dict[str, Any]:
    """The summary of one seed's run, which is made if it is not there."""
    folder = output / f"seed-{seed}"
    if not (folder / "summary.json").exists():
        command = [
            sys.executable,
            "-m",
            "rlvlm",
            "train",
            str(RECIPE),
            f"output={output}",
            f"name=seed-{seed}",
            f"seed={seed}",
        ]
        subprocess.run(command, cwd=ROOT, check=True)
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rl = [line for line in lines if line["stage"] == "rl"]
    summary["loop_other"] = sum(line["seconds/other"] for line in rl) / sum(line["seconds/iteration"] for line in rl)
    return summary


def row(summary: dict[str, Any]) -> list[str]:
    before, after = summary["evaluation"]["sft"], summary["evaluation"]["rl"]
    gain = summary["accuracy_gain"]
    return [
        str(summary["seed"]),
        f"{before['accuracy']:.1%}",
        f"{after['accuracy']:.1%}",
        f"{gain['points']:+.1f}",
        f"{gain['ci95'][0]:+.1f} to {gain['ci95'][1]:+.1f}",
        f"{summary['length_change']:+.0%}",
        f"{summary['parity']['max']:.1e}",
        f"{summary['loop_other']:.1%}",
        f"{summary['peak_rss_bytes'] / 2**30:.1f} GiB",
        f"{summary['wall_s'] / 60:.1f} min",
    ]


def judge(summaries: list[dict[str, Any]]) -> list[str]:
    """What of the claims does not hold."""
    gains = [summary["accuracy_gain"] for summary in summaries]
    claims = {
        "mean gain >= 12 points": statistics.fmean(gain["points"] for gain in gains) >= 12,
        "each gain >= 8 points": all(gain["points"] >= 8 for gain in gains),
        "each interval above 0": all(gain["ci95"][0] > 0 for gain in gains),
        "each >= 720 samples": all(
            s["evaluation"][stage]["samples"] >= 720 for s in summaries for stage in ("sft", "rl")
        ),
        "chains >= 15% shorter": statistics.fmean(summary["length_change"] for summary in summaries) <= -0.15,
        "parity <= 1e-3": all(summary["parity"]["max"] <= 1e-3 for summary in summaries),
        "loop outside its parts <= 5%": all(summary["loop_other"] <= 0.05 for summary in summaries),
        "memory <= 8 GB": all(summary["peak_rss_bytes"] <= 8e9 for summary in summaries),
    }
    return [claim for claim, holds in claims.items() if not holds]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "demo_seeds")
    parser.add_argument("--judge", action="store_true")
    arguments = parser.parse_args()
    summaries = [run(seed, arguments.output.resolve()) for seed in arguments.seeds]
    head = [
        "seed",
        "before RL",
        "after RL",
        "gain",
        "95% interval",
        "length",
        "parity max",
        "other",
        "peak memory",
        "wall",
    ]
    rows = [head, ["---"] * len(head), *map(row, summaries)]
    print(*("| " + " | ".join(cells) + " |" for cells in rows), sep="\n")
    points = statistics.fmean(summary["accuracy_gain"]["points"] for summary in summaries)
    shorter = statistics.fmean(summary["length_change"] for summary in summaries)
    print(f"\nmean gain {points:+.1f} points, mean length {shorter:+.0%}")
    broken = judge(summaries)
    if broken:
        print("does not hold: " + "; ".join(broken))
    return 1 if broken and arguments.judge else 0


if __name__ == "__main__":
    sys.exit(main())
