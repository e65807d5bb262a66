"""From responses to scores: finds each task's reward, scores all responses, stops the run when too many have none."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from rlvlm_rewards import Reward, Sample, Score, load_reward, score_all

from rlvlm.recipe.errors import RunError
from rlvlm.recipe.schema import Rewards
from rlvlm.records import Group, Task
from rlvlm.tasks.images import ImageStore


class TooManyFailures(RunError):
    """More responses than `rewards.max_failures` could not be scored."""


class Judge:
    """Scores groups with the rewards that their tasks name."""

    def __init__(self, rewards: Rewards, store: ImageStore) -> None:
        self._rewards = rewards
        self._store = store
        self._loaded: dict[str, Reward] = {}

    async def score(self, groups: Sequence[Group]) -> list[Group]:
        """The groups with their scores, one per response; a failure stays a failure. Raises TooManyFailures."""
        pairs = [
            (self._reward(group.task.reward), self._sample(group.task, trajectory.text))
            for group in groups
            for trajectory in group.trajectories
        ]
        scores = iter(await score_all(pairs, timeout_s=self._rewards.timeout_s, retries=self._rewards.retries))
        scored = [replace(group, scores=tuple(next(scores) for _ in group.trajectories)) for group in groups]
        self._check([score for group in scored for score in group.scores])
        return scored

    def _reward(self, name: str) -> Reward:
        if name not in self._loaded:
            self._loaded[name] = load_reward(name)
        return self._loaded[name]

    def _sample(self, task: Task, completion: str) -> Sample:
        return Sample(
            completion=completion,
            answer=task.answer,
            task=task.id,
            messages=task.messages,
            load_images=lambda: [self._store.image(key) for key in task.images],
        )

    def _check(self, scores: Sequence[Score]) -> None:
        failures = Counter(f"{score.failure}: {score.detail}" for score in scores if score.failure is not None)
        if failures.total() > self._rewards.max_failures * len(scores):
            (commonest, count), *_ = failures.most_common(1)
            raise TooManyFailures(
                f"{failures.total()} of {len(scores)} responses could not be scored "
                f"(rewards.max_failures = {self._rewards.max_failures:g}); {count} times: {commonest}",
                mend="mend the reward or what it depends on, then `--resume` goes on from the last checkpoint",
            )
