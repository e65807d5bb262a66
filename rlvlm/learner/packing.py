"""Responses -> packed rows: sequences end to end, no padding, pictures by the forward's own keyword tensors.

transformers keeps packed sequences apart by their positions, which restart with each sequence, IF no attention mask is
given and no cache is used (tests/learner/test_packing.py holds it to that: packed equals separate).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from rlvlm.learner.objective import Rewarded
from rlvlm.policy.prompts import Prompt, stack_images
from rlvlm.records import Batch, Row, Task, Trajectory


@dataclass(frozen=True, slots=True)
class _Sequence:
    prompt: Prompt
    trajectory: Trajectory
    advantage: float
    group_size: int

    @property
    def length(self) -> int:
        return len(self.prompt.input_ids) + self.trajectory.length


def pack(
    rewarded: Sequence[Rewarded], prompt_of: Callable[[Task], Prompt], minibatches: int, row_tokens: int, seed: int
) -> Batch:
    """Deals the groups into minibatches (samples of a prompt stay together) and packs each into rows of <= row_tokens,
    or one sequence where that is longer. Responses that could not be scored are left out."""
    order = list(rewarded)
    random.Random(seed).shuffle(order)
    parts = [order[i::minibatches] for i in range(minibatches)]
    packed = [_rows([s for group in part for s in _sequences(group, prompt_of)], row_tokens) for part in parts]
    return Batch(tuple(packed), tuple(len(part) for part in parts))


def _sequences(rewarded: Rewarded, prompt_of: Callable[[Task], Prompt]) -> list[_Sequence]:
    prompt = prompt_of(rewarded.group.task)
    size = sum(advantage is not None for advantage in rewarded.advantage_K)
    return [
        _Sequence(prompt, trajectory, advantage, size)
        for trajectory, advantage in zip(rewarded.group.trajectories, rewarded.advantage_K, strict=True)
        if advantage is not None
    ]


def _rows(sequences: Sequence[_Sequence], row_tokens: int) -> tuple[Row, ...]:
    """First fit, longest first."""
    bins: list[list[_Sequence]] = []
    room: list[int] = []
    for sequence in sorted(sequences, key=lambda s: -s.length):
        fitting = next((i for i, free in enumerate(room) if free >= sequence.length), None)
        if fitting is None:
            bins.append([])
            room.append(row_tokens)
            fitting = len(bins) - 1
        bins[fitting].append(sequence)
        room[fitting] -= sequence.length
    return tuple(_row(members) for members in bins)


def _row(members: Sequence[_Sequence]) -> Row:
    ids: list[int] = []
    segments: list[int] = []
    positions: list[int] = []
    trained: list[bool] = []
    logp: list[float] = []
    for s, member in enumerate(members):
        prompt_ids, trajectory = member.prompt.input_ids, member.trajectory
        ids += [*prompt_ids, *trajectory.response_ids]
        segments += [s] * member.length
        positions += range(member.length)
        trained += [False] * len(prompt_ids)
        trained += [segment.trained for segment in trajectory.segments for _ in segment.token_ids]
        logp += [0.0] * len(prompt_ids) + list(trajectory.engine_logp_T)
    return Row(
        input_ids_T=torch.tensor(ids),
        segment_T=torch.tensor(segments),
        position_ids=torch.tensor(positions)[None],
        trained_T=torch.tensor(trained),
        advantage_S=torch.tensor([member.advantage for member in members]),
        group_size_S=torch.tensor([member.group_size for member in members]),
        engine_logp_T=torch.tensor(logp),
        images=stack_images([member.prompt.images for member in members]),
    )
