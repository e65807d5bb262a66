"""The checkpoint that a run starts from: the recipe's own, or the tiny policy built on the spot."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from rlvlm.policy.checkpoint import save_policy
from rlvlm.policy.tiny import build_tiny_kimi
from rlvlm.recipe.schema import Recipe
from rlvlm.records import Task
from rlvlm.tasks.pools import TaskPools

TINY = "tiny_kimi"


def initial_checkpoint(recipe: Recipe, folder: Path, pools: TaskPools) -> Path:
    """Where the initial policy lies; builds the tiny one in `folder`, with the words of the SFT tasks as its
    vocabulary."""
    if recipe.policy.model != TINY:
        return Path(recipe.policy.model)
    model, processor = build_tiny_kimi(recipe.policy.tiny, _texts(pools.sft()), recipe.seed)
    save_policy(model, processor, folder)
    return folder


def _texts(tasks: list[Task]) -> Iterator[str]:
    for task in tasks:
        yield from (part["text"] for message in task.messages for part in message["content"] if part["type"] == "text")
        yield from (chain.text for chain in task.chains.values())
        yield task.answer
