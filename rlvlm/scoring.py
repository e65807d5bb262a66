"""From responses to scores: finds each task's reward, scores all responses, stops the run when too many have none."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rlvlm_rewards import InvalidReward, Reward, RewardNotFound, Sample, Score, load_reward, score_all
from rlvlm_rewards.builtin import BUILT_IN
from rlvlm_rewards.compose import Part as Loaded
from rlvlm_rewards.compose import compose

from rlvlm.limits import HotLimits
from rlvlm.recipe.errors import RecipeError, RunError
from rlvlm.recipe.schema import Named, Rewards
from rlvlm.records import Group, Task
from rlvlm.tasks.images import ImageStore


class TooManyFailures(RunError):
    """More responses than `rewards.max_failures` could not be scored."""


def reward_named(name: str, rewards: Rewards, key: str) -> Reward:
    """The reward that a source names: one of the recipe's own, or what `load_reward` finds.

    key: the recipe key for messages. Raises RecipeError.
    """
    if name in rewards.named:
        return own_reward(name, rewards.named[name])
    try:
        return load_reward(name)
    except (RewardNotFound, InvalidReward) as error:
        problem, mend = _told(name, error)
        if isinstance(error, InvalidReward) and error.option is not None:
            part = f"{{reward: {name}, options: {{{error.option}: ...}}}}"
            mend = f"{mend}; name it with its options: rewards.named.my_{name}.parts=[{part}], and reward: my_{name}"
        elif isinstance(error, RewardNotFound) and rewards.named:
            mend = f"{mend}; this recipe's own are {', '.join(rewards.named)}"
        raise RecipeError(key, name, problem, mend) from error


def own_reward(name: str, named: Named) -> Reward:
    """A reward of the recipe's `rewards.named`. Raises RecipeError with everything that is wrong with it."""
    key = f"rewards.named.{name}"
    errors, parts = [], []
    if name in BUILT_IN:
        errors.append(RecipeError(key, name, "a built-in reward has this name", f"choose another, like my_{name}"))
    for index, part in enumerate(named.parts):
        where = f"{key}.parts[{index}]"
        try:
            parts.append(Loaded(load_reward(part.reward, **part.options), part.weight))
        except (RewardNotFound, InvalidReward) as error:
            problem, mend = _told(part.reward, error)
            option = error.option if isinstance(error, InvalidReward) else None
            if option in part.options:
                problem = f"{part.reward} {problem}" if problem.startswith("has no") else problem
                errors.append(RecipeError(f"{where}.options.{option}", part.options[option], problem, mend))
            else:
                errors.append(RecipeError(f"{where}.reward", part.reward, problem, mend))
    if errors:
        raise RecipeError.of(errors)
    try:
        return compose(name, parts)
    except ValueError as error:
        problem, _, mend = str(error).partition("; ")
        raise RecipeError(f"{key}.parts", [part.reward for part in named.parts], problem, mend) from error


def _told(name: str, error: Exception) -> tuple[str, str]:
    """(problem, mend) of an error of `load_reward`."""
    problem, _, mend = str(error).removeprefix(f"reward {name!r}").lstrip(": ").partition("; ")
    return problem, mend


def opens_thinking(processor: Any) -> bool:
    """Whether the policy's chat template ends the prompt with `<think>`, so that every response begins as a thought.

    processor: of transformers, or anything with its `apply_chat_template`.
    """
    message = {"role": "user", "content": [{"type": "text", "text": "?"}]}
    prompt: str = processor.apply_chat_template([message], add_generation_prompt=True, tokenize=False)
    return prompt.rstrip().endswith("<think>")


class Judge:
    """Scores groups with the rewards that their tasks name.

    thinking: the policy's prompts open `<think>` (see `opens_thinking`). limits_file: overrides limits while the run
    goes on (see `HotLimits`). tell: takes what is to be told about that file.
    """

    def __init__(
        self,
        rewards: Rewards,
        store: ImageStore,
        *,
        thinking: bool,
        limits_file: Path | None = None,
        tell: Callable[[str], None] = print,
    ) -> None:
        self._rewards, self._store, self._thinking = rewards, store, thinking
        self._limits = HotLimits(rewards, limits_file, tell)
        self._loaded: dict[str, Reward] = {}

    async def score(self, groups: Sequence[Group], progress: float = 1.0) -> list[Group]:
        """The groups with their scores, one per response; a failure stays a failure.

        progress: share of the training that is done, for rewards that get stricter. Raises TooManyFailures.
        """
        pairs = [
            (self._reward(group.task.reward), self._sample(group.task, trajectory.text, progress))
            for group in groups
            for trajectory in group.trajectories
        ]
        scores = iter(await score_all(pairs, limits_of=self._limits))
        scored = [replace(group, scores=tuple(next(scores) for _ in group.trajectories)) for group in groups]
        self._check([score for group in scored for score in group.scores])
        return scored

    async def aclose(self) -> None:
        """Gives back what the rewards hold open."""
        for reward in self._loaded.values():
            await reward.aclose()

    def _reward(self, name: str) -> Reward:
        if name not in self._loaded:
            self._loaded[name] = reward_named(name, self._rewards, "reward")
        return self._loaded[name]

    def _sample(self, task: Task, completion: str, progress: float) -> Sample:
        return Sample(
            completion=completion,
            answer=task.answer,
            task=task.id,
            messages=task.messages,
            load_images=lambda: [self._store.image(key) for key in task.images],
            thinking=self._thinking,
            progress=progress,
            columns=task.columns,
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
