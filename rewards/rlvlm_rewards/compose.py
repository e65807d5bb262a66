"""Several rewards as one: the weighted mean of their values."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlvlm_rewards.records import Failure, Sample, Score
from rlvlm_rewards.reward import Kind, Reward, keeps_time

RIGHT = 0.5  # a value above this counts as right


@dataclass(frozen=True, slots=True)
class Part:
    """One reward of a composition. weight: above 0; only its ratio to the other weights counts."""

    reward: Reward
    weight: float = 1.0


def compose(name: str, parts: Sequence[Part]) -> Reward:
    """The reward sum w_i v_i / sum w_i over its parts.

    A part that fails makes the whole a failure. A bonus (`ToolBonus`) counts as 0 unless the weighted mean of the parts
    that are no bonus is above 0.5. The score's parts are the values by the rewards' names (`grounding`; of
    `file.py:attr` what follows the colon; equal names are numbered `~2`, `~3`) and their own parts (`grounding/iou`).
    Raises ValueError if there is no part but bonuses, or a weight is not above 0.
    """
    for part in parts:
        if not part.weight > 0:
            raise ValueError(f"weight is {part.weight} for {part.reward.name}; give a number above 0")
    if all(part.reward.is_bonus for part in parts):
        raise ValueError(f"{name} has no part that judges the answer; give one beside the bonus")
    labelled = dict(zip(_labels(part.reward.name for part in parts), parts, strict=True))
    if all(part.reward.kind is Kind.INLINE for part in parts):
        return Reward(name, _InTurn(labelled), Kind.INLINE, _just_sample, _as_it_is)
    function = _AtOnceInTheirTime(labelled) if any(part.reward.keeps_time for part in parts) else _AtOnce(labelled)
    return Reward(name, function, Kind.ASYNC, _just_sample, _as_it_is)


def _just_sample(sample: Sample) -> tuple[tuple[Sample], Mapping[str, Any]]:
    return (sample,), {}


def _as_it_is(score: Score) -> Score:
    return score


def _labels(names: Iterable[str]) -> Iterator[str]:
    seen: dict[str, int] = {}
    for name in names:
        label = name.rpartition(":")[2]
        seen[label] = seen.get(label, 0) + 1
        yield label if seen[label] == 1 else f"{label}~{seen[label]}"


@dataclass(frozen=True, slots=True)
class _InTurn:
    """Of inline rewards only."""

    parts: Mapping[str, Part]

    def __call__(self, sample: Sample) -> Score:
        return _whole(self.parts, [part.reward.now(sample) for part in self.parts.values()])


@dataclass(frozen=True, slots=True)
class _AtOnce:
    parts: Mapping[str, Part]

    async def __call__(self, sample: Sample) -> Score:
        return _whole(self.parts, await asyncio.gather(*(part.reward(sample) for part in self.parts.values())))

    async def aclose(self) -> None:
        for part in self.parts.values():
            await part.reward.aclose()


@keeps_time
class _AtOnceInTheirTime(_AtOnce):
    """With a part that keeps time itself."""


def _whole(parts: Mapping[str, Part], scores: Sequence[Score]) -> Score:
    failed = {label: score for label, score in zip(parts, scores, strict=True) if score.failure is not None}
    if failed:
        # What no retry mends comes first.
        final = (label for label, score in failed.items() if score.failure is Failure.UNPARSABLE_REFERENCE)
        label = next(final, next(iter(failed)))
        return Score(failure=failed[label].failure, detail=f"part {label}: {failed[label].detail}")
    values = {label: score.value or 0.0 for label, score in zip(parts, scores, strict=True)}
    if _mean(values, {label: part.weight for label, part in parts.items() if not part.reward.is_bonus}) <= RIGHT:
        values |= {label: 0.0 for label, part in parts.items() if part.reward.is_bonus}
    theirs = {f"{label}/{k}": v for label, score in zip(parts, scores, strict=True) for k, v in score.parts.items()}
    return Score(value=_mean(values, {label: part.weight for label, part in parts.items()}), parts=values | theirs)


def _mean(values: Mapping[str, float], weights: Mapping[str, float]) -> float:
    # Rounding may take a mean of ones above one.
    return min(1.0, sum(weight * values[label] for label, weight in weights.items()) / sum(weights.values()))
