"""The four pools of tasks that a run draws from its recipe. Each is a function of the recipe alone, so that every
process and every resumed run sees the same tasks without passing them around."""

from __future__ import annotations

from pathlib import Path

from rlvlm.recipe.schema import Recipe
from rlvlm.records import Task
from rlvlm.tasks.images import ImageStore
from rlvlm.tasks.mix import draw_tasks

# Different draws of the same sources. The held-out tasks do not depend on the run's seed: runs are compared on
# the same ones.
_SFT, _RL = 100, 500
_GATE, _EVALUATION = 11, 7


class TaskPools:
    """Draws pools; their pictures go to `store`."""

    def __init__(self, recipe: Recipe, images: Path) -> None:
        self._recipe = recipe
        self.store = ImageStore(images)

    def sft(self) -> list[Task]:
        return draw_tasks(self._recipe.tasks, self._recipe.sft.examples, _SFT + self._recipe.seed, "train", self.store)

    def rl(self) -> list[Task]:
        return draw_tasks(self._recipe.tasks, self._recipe.rl.pool, _RL + self._recipe.seed, "train", self.store)

    def gate(self) -> list[Task]:
        return draw_tasks(self._recipe.tasks, self._recipe.sft.gate.tasks, _GATE, "held_out", self.store)

    def evaluation(self) -> list[Task]:
        return draw_tasks(self._recipe.tasks, self._recipe.evaluation.tasks, _EVALUATION, "held_out", self.store)
