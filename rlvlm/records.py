"""The records that flow around the loop, in the order in which they come to be.

    Task -> Trajectory (k of them: a Group) -> Score -> Row (packed, a Batch)

Each part of rlvlm sees only the records before it. `Score` belongs to the rewards distribution (`rlvlm_rewards.Score`),
because reward functions are used without the rest of rlvlm. This file imports nothing of ours and no torch at run time.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import torch
    from rlvlm_rewards import Score


class Seen(str):
    """A word of a chain that states what was read off the picture (and not what was worked out from it).

    The gate between SFT and RL measures how well exactly these words are predicted.
    """


@dataclass(frozen=True, slots=True)
class Chain:
    """A chain of thought to imitate.

    text: what stands between `<think>` and `</think>`.
    seen: character spans [start, end) of `text` that state what was read off the picture; empty if not known.
    """

    text: str
    seen: tuple[tuple[int, int], ...] = ()

    @classmethod
    def of(cls, words: Iterable[str]) -> Chain:
        """Joins words by single blanks; words that are `Seen` leave their span."""
        text, seen = "", []
        for word in words:
            start = len(text) + (1 if text else 0)
            text = f"{text} {word}" if text else str(word)
            if isinstance(word, Seen):
                seen.append((start, len(text)))
        return cls(text, tuple(seen))


@dataclass(frozen=True, slots=True)
class Task:
    """One prompt with a verifiable answer.

    id: stable over runs with the same seed; the key of success rates and trajectories.
    messages: chat messages in the format of transformers' chat templates; each picture is `{"type": "image"}`.
    images: keys into the run's ImageStore, in the order of the placeholders: pictures travel by reference.
    answer: the reference answer that the reward compares with.
    reward: one of the recipe's `rewards.named`, or how `rlvlm_rewards.load_reward` finds it: `name`,
    `package.module:attr` or `path/to/file.py:attr`.
    level: difficulty, 1 (easy) and up; the curriculum goes by it.
    source: the name of the task source (the generator's name or the recipe's name for a data set).
    chains: style -> chain to imitate in SFT; empty where the source has none.
    columns: the other columns of the data's row, for the reward.
    """

    id: str
    messages: tuple[Mapping[str, Any], ...]
    images: tuple[str, ...]
    answer: str
    reward: str
    level: int
    source: str
    chains: Mapping[str, Chain] = field(default_factory=dict)
    columns: Mapping[str, Any] = field(default_factory=dict)


class StopReason(StrEnum):
    """Why a response ended."""

    END = "end"  # the policy emitted its end-of-turn token
    LENGTH = "length"  # the response reached `max_tokens`


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of response tokens that one version of the weights produced.

    token_ids, logp_T: the sampled tokens and the ENGINE's log-probability of each (natural log), same length.
    trained: whether these tokens carry loss (a tool's answer would not).
    weight_version: the iteration whose weights sampled them.
    """

    token_ids: tuple[int, ...]
    logp_T: tuple[float, ...]
    trained: bool
    weight_version: int


@dataclass(frozen=True, slots=True)
class Trajectory:
    """One response to one task. `prompt_ids` has the image placeholders expanded, as engine and learner both see it.

    routing_TLK: which experts the ENGINE chose for each token that it computed, int16 [prompt + response - 1, MoE
    layers, experts per token], -1 where that was not recorded; None unless rl.router_replay asks for it.
    """

    task_id: str
    index: int
    prompt_ids: tuple[int, ...]
    segments: tuple[Segment, ...]
    stop: StopReason
    text: str
    routing_TLK: np.ndarray | None = field(default=None, compare=False, repr=False)

    @property
    def response_ids(self) -> tuple[int, ...]:
        return tuple(t for segment in self.segments for t in segment.token_ids)

    @property
    def engine_logp_T(self) -> tuple[float, ...]:
        return tuple(p for segment in self.segments for p in segment.logp_T)

    @property
    def length(self) -> int:
        """Response length in tokens, the end-of-turn token included."""
        return sum(len(segment.token_ids) for segment in self.segments)


@dataclass(frozen=True, slots=True)
class Group:
    """The k responses to one task, and their scores once the rewards have seen them (same order)."""

    task: Task
    trajectories: tuple[Trajectory, ...]
    scores: tuple[Score, ...] = ()


@dataclass(frozen=True, slots=True)
class Row:
    """Several sequences laid end to end without padding (T tokens in all, S responses that are trained on).

    input_ids_T, segment_T: token ids, and which of the row's sequences each token belongs to: 0..S-1, and from S on
    sequences that carry no loss (the blank picture that some ranks need, see `Minibatch`).
    position_ids: what the model family wants, `[P, T]`; positions restart with every sequence.
    trained_T: True where the token at this position is a response token that carries loss.
    advantage_S: A_j of each response. group_size_S: how many responses to the same prompt are trained on.
    engine_logp_T: the rollout engine's log-probability of the token at this position, 0 elsewhere.
    images: keyword tensors of the model's forward for the row's pictures (e.g. pixel_values, image_grid_thw).
    routing_TLK: the engine's choice of experts (`Trajectory.routing_TLK`), -1 where the router is free; None if the
    engine's choice is not replayed.
    """

    input_ids_T: torch.Tensor
    segment_T: torch.Tensor
    position_ids: torch.Tensor
    trained_T: torch.Tensor
    advantage_S: torch.Tensor
    group_size_S: torch.Tensor
    engine_logp_T: torch.Tensor
    images: Mapping[str, torch.Tensor]
    routing_TLK: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class Minibatch:
    """What one optimizer step trains on.

    rows: by rank. Every rank has the same number of rows, and pictures in a row where any other rank has: sharded
    parameters are gathered by all ranks together. prompts, sequences: over all ranks, what the loss is divided by.
    """

    rows: tuple[tuple[Row, ...], ...]
    prompts: int
    sequences: int


@dataclass(frozen=True, slots=True)
class Batch:
    """What the learner trains on in one iteration. Minibatches without a scored response are not in it."""

    minibatches: tuple[Minibatch, ...]

    def share(self, rank: int) -> Batch:
        """The batch with the rows of one rank only."""
        return Batch(tuple(replace(minibatch, rows=(minibatch.rows[rank],)) for minibatch in self.minibatches))
