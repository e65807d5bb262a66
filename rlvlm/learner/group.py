"""The learner as the trainer sees it: all ranks at once. Batches are dealt out, figures come back."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rlvlm.cluster.local import LocalRank, Ranks, ready_for_deepspeed
from rlvlm.learner.learner import Learner, Parity, Reference
from rlvlm.recipe.errors import RunError
from rlvlm.recipe.schema import Recipe
from rlvlm.records import Batch
from rlvlm.weights.parcel import Parcel


class NothingToLearn(RunError):
    """A batch without a single scored response."""


@dataclass(frozen=True, slots=True)
class References:
    """pi_i on a batch, by rank."""

    by_rank: tuple[Reference, ...]

    @property
    def parity(self) -> Parity:
        return self.by_rank[0].parity

    @property
    def entropy(self) -> float:
        return self.by_rank[0].entropy


class LearnerGroup:
    """`learner.ranks` ranks of the learner: one in this process, several as Ray actors."""

    def __init__(self, recipe: Recipe, checkpoint: Path, banned: Sequence[int]) -> None:
        self._ranks = _start(recipe, checkpoint, banned)

    def reference(self, batch: Batch) -> References:
        """pi_i on the batch. Raises NothingToLearn if no response of the iteration could be scored."""
        if not batch.minibatches:
            raise NothingToLearn(
                "not one response of this iteration could be scored",
                mend="mend the reward, then `--resume`; rewards.max_failures below 1 stops with the cause",
            )
        return References(tuple(self._ranks.call("reference", self._shares(batch))))

    def step(self, batch: Batch, references: References) -> dict[str, float]:
        """Learns from the batch; gives the figures of Learner.step."""
        return self._ranks.call("step", self._shares(batch), references.by_rank)[0]

    def _shares(self, batch: Batch) -> list[Batch]:
        return [batch.share(rank) for rank in range(self._ranks.size)]

    def parcel(self) -> Parcel:
        """The weights for the engine."""
        return Parcel(lambda path: self._all("write_weights", path))

    def save(self, folder: Path) -> None:
        self._all("save", folder)

    def load(self, folder: Path) -> None:
        self._all("load", folder)

    def _all(self, method: str, argument: object) -> None:
        self._ranks.call(method, [argument] * self._ranks.size)

    def close(self) -> None:
        self._ranks.close()


def _start(recipe: Recipe, checkpoint: Path, banned: Sequence[int]) -> Ranks:
    learner = recipe.learner
    if learner.ranks == 1:
        return LocalRank(partial(Learner, recipe, checkpoint, banned), learner.port, recipe.threads)
    from rlvlm.cluster.ray import RayRanks

    make = partial(_rank, recipe, checkpoint.resolve(), banned, Path.cwd())
    return RayRanks(make, learner.ranks, limit_s=learner.limit_s, port=learner.port, address=learner.ray_address)


def _rank(recipe: Recipe, checkpoint: Path, banned: Sequence[int], folder: Path) -> Learner:
    """The learner in a process that Ray started. folder: where the recipe's relative paths begin."""
    os.chdir(folder)
    ready_for_deepspeed(recipe.threads)
    return Learner(recipe, checkpoint, banned)
