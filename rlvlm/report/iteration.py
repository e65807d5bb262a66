"""An iteration of RL as one line of metrics.jsonl. Key names are TRL's where TRL has one."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from rlvlm_rewards import Score

from rlvlm.evaluation.metrics import Evaluated
from rlvlm.learner.learner import Parity
from rlvlm.learner.objective import Rewarded, length_weight, success
from rlvlm.recipe.schema import Length
from rlvlm.records import StopReason


def iteration_record(
    iteration: int,
    rewarded: Sequence[Rewarded],
    learned: Mapping[str, float],
    parity: Parity,
    length: Length,
    seconds: Mapping[str, float],
) -> dict[str, Any]:
    """reward: mean of what is trained on; reward_std: mean over groups of the standard deviation within the group;
    accuracy: share of correct among scored responses; length_reward: share of groups that it applied to; reward/<part>:
    mean of a part of the rewards over the responses that have it."""
    trajectories = [trajectory for one in rewarded for trajectory in one.group.trajectories]
    lengths = [trajectory.length for trajectory in trajectories]
    counts = [success(one.group.scores) for one in rewarded]
    correct, scored = sum(ok for ok, _ in counts), sum(seen for _, seen in counts)
    rewards = [[reward for reward in one.reward_K if reward is not None] for one in rewarded]
    penalised = [length_weight(length, iteration, [j < ok for j in range(seen)]) > 0.0 for ok, seen in counts if seen]
    wall = sum(seconds.values())
    return {
        "stage": "rl",
        "iteration": iteration,
        "reward": statistics.fmean([reward for group in rewards for reward in group]) if scored else None,
        "reward_std": statistics.fmean([statistics.pstdev(group) for group in rewards if group]) if scored else None,
        "accuracy": correct / scored if scored else None,
        "completions/mean_length": statistics.fmean(lengths),
        "completions/max_length": max(lengths),
        "completions/clipped_ratio": statistics.fmean([t.stop is StopReason.LENGTH for t in trajectories]),
        "mean_level": statistics.fmean([one.group.task.level for one in rewarded]),
        "length_reward": statistics.fmean(penalised) if penalised else 0.0,
        "failures": len(trajectories) - scored,
        **_part_means([score for one in rewarded for score in one.group.scores]),
        **learned,
        "parity/max": parity.max,
        "parity/mean": parity.mean,
        "parity/tokens": parity.tokens,
        "tokens": sum(lengths),
        "tokens_per_s": sum(lengths) / wall,
        **{f"seconds/{part}": value for part, value in seconds.items()},
        "seconds/iteration": wall,
    }


def evaluation_record(iteration: int, result: Evaluated) -> dict[str, Any]:
    """An evaluation on held-out tasks at T=1, made after `iteration`, as one line of metrics.jsonl."""
    return {
        "stage": "evaluation",
        "iteration": iteration,
        "accuracy": result["accuracy"],
        "ci95": result["ci95"],
        "samples": result["samples"],
        "mean_length": result["mean_length"],
        "failures": result["failures"],
    }


def _part_means(scores: Sequence[Score]) -> dict[str, float]:
    parts = dict.fromkeys(part for score in scores for part in score.parts)
    return {
        f"reward/{part}": statistics.fmean(score.parts[part] for score in scores if part in score.parts)
        for part in parts
    }
