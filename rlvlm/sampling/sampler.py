"""Which prompts the next iteration takes: a curriculum over levels, then priority for what is not yet solved (Kimi
k1.5, section 2.3.4: probability proportional to 1 - s_i).

k1.5 leaves two cases open. A prompt that was never sampled has no s_i: it starts from the rate of its (source, level)
bucket, as if `prior_strength` samples of it had been seen. A prompt that is always solved has 1 - s_i = 0: a floor
keeps it alive. Draws are a function of (seed, iteration, success rates), so a resumed run draws the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rlvlm.learner.objective import success
from rlvlm.recipe.schema import Sampling
from rlvlm.records import Group, Task

Counts = tuple[float, float]  # (successes, samples), decayed


class Sampler:
    """Draws tasks without replacement within an iteration and keeps the success rates."""

    def __init__(self, tasks: Sequence[Task], sampling: Sampling, seed: int) -> None:
        self._tasks = tasks
        self._sampling = sampling
        self._seed = seed
        self._levels = sorted({task.level for task in tasks})
        self._of_task: dict[str, Counts] = {}
        self._of_bucket: dict[str, Counts] = {}

    def draw(self, iteration: int, prompts: int) -> list[Task]:
        """`prompts` distinct tasks for this iteration (counted from 1)."""
        admitted = self._admitted(iteration, prompts)
        rng = np.random.default_rng((self._seed, iteration))
        if not self._sampling.prioritised:
            return [admitted[i] for i in rng.choice(len(admitted), prompts, replace=False)]
        weight = np.array([max(1.0 - self.success_rate(task), self._sampling.floor) for task in admitted])
        weight = np.maximum(weight, 1e-9)  # floor 0 is allowed; a draw without replacement needs every task possible
        return [admitted[i] for i in rng.choice(len(admitted), prompts, replace=False, p=weight / weight.sum())]

    def _admitted(self, iteration: int, prompts: int) -> list[Task]:
        levels = len(self._levels)
        if self._sampling.curriculum == "linear":
            levels = math.ceil(levels * min(1.0, iteration / self._sampling.curriculum_iterations))
        while True:
            admitted = [task for task in self._tasks if task.level <= self._levels[levels - 1]]
            if len(admitted) >= prompts or levels == len(self._levels):
                return admitted
            levels += 1  # the easiest levels alone do not fill the batch

    def success_rate(self, task: Task) -> float:
        """s_i: the prompt's own decayed evidence, shrunk towards its bucket's rate."""
        ok, seen = self._of_task.get(task.id, (0.0, 0.0))
        bucket_ok, bucket_seen = self._of_bucket.get(_bucket(task), (0.0, 0.0))
        prior = (bucket_ok + 1.0) / (bucket_seen + 2.0)
        strength = self._sampling.prior_strength
        return (ok + strength * prior) / (seen + strength)

    def update(self, groups: Sequence[Group]) -> None:
        """Takes in an iteration's scores. Responses that could not be scored say nothing about a prompt."""
        decay = self._sampling.decay
        fresh: dict[str, Counts] = {}
        for group in groups:
            ok, seen = success(group.scores)
            if not seen:
                continue
            self._of_task[group.task.id] = _add(self._of_task.get(group.task.id, (0.0, 0.0)), ok, seen, decay)
            fresh[_bucket(group.task)] = _add(fresh.get(_bucket(group.task), (0.0, 0.0)), ok, seen, 1.0)
        for bucket, counts in fresh.items():
            self._of_bucket[bucket] = _add(self._of_bucket.get(bucket, (0.0, 0.0)), *counts, decay)

    def state_dict(self) -> dict[str, Any]:
        """JSON-able; JSON keeps floats exactly."""
        return {"tasks": self._of_task, "buckets": self._of_bucket}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._of_task = {key: (ok, seen) for key, (ok, seen) in state["tasks"].items()}
        self._of_bucket = {key: (ok, seen) for key, (ok, seen) in state["buckets"].items()}


def _bucket(task: Task) -> str:
    return f"{task.source}/{task.level}"


def _add(counts: Counts, ok: float, seen: float, decay: float) -> Counts:
    return counts[0] * decay + ok, counts[1] * decay + seen
