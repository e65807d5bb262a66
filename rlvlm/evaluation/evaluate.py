"""Measures a policy on held-out tasks: samples at T=1 and one greedy response each, through the rollout engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rlvlm.evaluation.metrics import Evaluated, evaluate, styles_of
from rlvlm.policy.prompts import PromptEncoder
from rlvlm.recipe.schema import Recipe
from rlvlm.records import Group
from rlvlm.report.trajectories import evaluation_file, read_groups, write_trajectories
from rlvlm.rollout.engine import RolloutEngine, Sampling
from rlvlm.scoring import Judge
from rlvlm.tasks.pools import TaskPools


@dataclass(frozen=True, slots=True)
class Measured:
    """What an evaluation found, and the responses that it found it on."""

    result: Evaluated
    groups: Sequence[Group]


class Evaluator:
    """Measures at different times on the same tasks; what was measured before a kill is read back, not repeated."""

    def __init__(
        self, recipe: Recipe, run: Path, pools: TaskPools, engine: RolloutEngine, judge: Judge, encoder: PromptEncoder
    ) -> None:
        self._recipe, self._run, self._store, self._tasks = recipe, run, pools.store, pools.evaluation()
        self._engine, self._judge, self._encoder = engine, judge, encoder
        self._style_lengths = {
            task.id: {
                style: len(encoder.response(chain, task.answer).token_ids) for style, chain in task.chains.items()
            }
            for task in self._tasks
        }

    async def measure(self, stage: str) -> Measured:
        """stage: "sft" (before RL) or "rl" (after); names the files that the responses go to."""
        # Different rounds before and after: the noise of one evaluation is not that of the other.
        sampled = await self._respond(stage, samples=self._recipe.evaluation.samples, temperature=1.0)
        greedy = await self._respond(f"{stage}-greedy", samples=1, temperature=0.0)
        return Measured(evaluate(sampled, greedy, self._style_lengths), sampled)

    async def watch(self, iteration: int) -> Measured:
        """Samples only, while RL goes on."""
        # Written anew in a resumed run: there, this iteration is done again.
        evaluation_file(self._run, f"{iteration:04d}").unlink(missing_ok=True)
        sampled = await self._respond(f"{iteration:04d}", samples=self._recipe.evaluation.samples, temperature=1.0)
        return Measured(evaluate(sampled, (), self._style_lengths), sampled)

    async def _respond(self, name: str, samples: int, temperature: float) -> list[Group]:
        path = evaluation_file(self._run, name)
        if path.exists():
            return read_groups(path, self._tasks)
        sampling = Sampling(samples, temperature, self._recipe.rl.max_tokens, f"evaluation-{name}")
        groups = await self._judge.score(await self._engine.generate(self._tasks, sampling))
        self._store.save_all(key for group in groups for key in group.task.images)
        write_trajectories(
            path,
            groups,
            self._encoder.piece,
            iteration=self._engine.weight_version,
            styles=styles_of(groups, self._style_lengths),
        )
        return groups
