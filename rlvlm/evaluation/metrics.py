"""What an evaluation reaches, with intervals that respect that the samples of one task resemble each other. No torch.

Notation: task t has n_t scored samples whose values sum to S_t; N = sum n_t; there are m tasks.

    accuracy   p = sum S_t / N
    variance   v = m / (m - 1) * sum_t (S_t - p n_t)^2 / N^2
    interval   p -+ 1.96 sqrt(v), cut to [0, 1]

This is the linearised variance of a ratio (Cochran, Sampling Techniques, 3rd ed., section 6.4) with tasks as the
sampled units: tasks may have unequal numbers of scored samples, and how strongly samples of a task agree is accounted
for. With equal n_t it is exactly the standard error of the mean of the per-task means.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypedDict

from rlvlm.records import Group, Trajectory

Z95 = 1.959963984540054  # the 97.5% point of the standard normal distribution
STYLE_TOLERANCE = math.log(1.15)
OTHER = "other"


class UnscoredGroupError(ValueError):
    """A group whose number of scores is not its number of trajectories."""


class NothingScoredError(ValueError):
    """An evaluation without a single scored sample has no accuracy."""


class UnpairedTasksError(ValueError):
    """Two evaluations that are to be compared were made on different tasks."""


class Rate(TypedDict):
    """One slice of an evaluation. What was not measured (no scored sample, no greedy response) is None."""

    accuracy: float | None
    samples: int
    mean_length: float | None
    greedy_accuracy: float | None


class StyleRate(TypedDict):
    """share: of the scored samples, in [0, 1]. accuracy: within the style; None if no sample has it."""

    share: float
    accuracy: float | None
    samples: int


class Evaluated(TypedDict):
    """accuracy, ci95: at the sampling temperature. mean_length: in tokens. failures: samples without a value."""

    accuracy: float
    ci95: list[float]
    samples: int
    greedy_accuracy: float | None
    mean_length: float
    by_task: dict[str, Rate]
    by_level: dict[str, Rate]
    by_style: dict[str, StyleRate]
    failures: int


class Gain(TypedDict):
    """points: percentage points, after minus before. ci95: [low, high], in points."""

    points: float
    ci95: list[float]


@dataclass(frozen=True, slots=True)
class _Sample:
    group: Group
    trajectory: Trajectory
    value: float


def style_of(length: int, styles: Mapping[str, int]) -> str:
    """The style of the reference chain that a response of `length` tokens imitates, told by its length alone.

    styles: style -> length in tokens of the task's reference response in that style. The nearest one by |log ratio|
    counts if the longer of the two is at most 15% longer than the other; otherwise the answer is "other". Of styles of
    equal length the first counts.
    """
    if length <= 0 or not styles:
        return OTHER
    distance = {style: abs(math.log(length / reference)) for style, reference in styles.items()}
    nearest = min(distance, key=distance.__getitem__)
    return nearest if distance[nearest] <= STYLE_TOLERANCE else OTHER


def styles_of(groups: Sequence[Group], style_lengths: Mapping[str, Mapping[str, int]]) -> list[list[str]]:
    """`style_of` for every trajectory, [groups][k]; "other" where a task has no reference chains."""
    return [
        [style_of(trajectory.length, style_lengths.get(group.task.id, {})) for trajectory in group.trajectories]
        for group in groups
    ]


def evaluate(
    groups: Sequence[Group], greedy: Sequence[Group], style_lengths: Mapping[str, Mapping[str, int]]
) -> Evaluated:
    """The evaluation of a policy from its scored responses.

    groups: k responses a task at the sampling temperature. greedy: one response a task; may be empty.
    style_lengths: task id -> style -> length in tokens of the reference response; tasks without chains may be absent.
    Samples whose reward failed are left out of every number and counted in `failures`.
    Raises UnscoredGroupError, or NothingScoredError if no response in `groups` has a value.
    """
    samples, best = _scored(groups), _scored(greedy)
    if not samples:
        raise NothingScoredError(_nothing_scored(groups))
    return {
        "accuracy": _mean(s.value for s in samples),
        "ci95": _interval(samples),
        "samples": len(samples),
        "greedy_accuracy": _mean_or_none([s.value for s in best]),
        "mean_length": _mean(s.trajectory.length for s in samples),
        "by_task": _by(samples, best, lambda s: s.group.task.source),
        "by_level": _by(samples, best, lambda s: s.group.task.level),
        "by_style": _by_style(samples, style_lengths),
        "failures": sum(len(group.scores) for group in groups) - len(samples),
    }


def gain(before: Sequence[Group], after: Sequence[Group]) -> Gain:
    """By how many points the accuracy rose from `before` to `after`, both made on the same tasks.

    With e_t = (S_t - p n_t) / N of each evaluation, the variance of the difference is
    m / (m - 1) * sum_t (e'_t - e_t)^2, so that what a task adds to both evaluations (being easy, say) cancels.
    With equal n_t this is the standard error of the mean of the per-task differences.
    Raises UnpairedTasksError if the task ids differ, and what `evaluate` raises.
    """
    ids_before, ids_after = ({group.task.id for group in groups} for groups in (before, after))
    if ids_before != ids_after:
        raise UnpairedTasksError(_unpaired(ids_before, ids_after))
    first, second = _scored(before), _scored(after)
    for groups, samples in ((before, first), (after, second)):
        if not samples:
            raise NothingScoredError(_nothing_scored(groups))
    points = 100 * (_mean(s.value for s in second) - _mean(s.value for s in first))
    error_first, error_second = _errors(first), _errors(second)
    half = 100 * _half_width([error_second.get(t, 0.0) - error_first.get(t, 0.0) for t in ids_before])
    return {"points": points, "ci95": [max(points - half, -100.0), min(points + half, 100.0)]}


def length_change(before: Sequence[Group], after: Sequence[Group]) -> float:
    """Relative change of the mean length of scored responses; -0.23 is 23% shorter. Raises as `evaluate` does."""
    means = []
    for groups in (before, after):
        samples = _scored(groups)
        if not samples:
            raise NothingScoredError(_nothing_scored(groups))
        means.append(_mean(s.trajectory.length for s in samples))
    return means[1] / means[0] - 1


def _scored(groups: Sequence[Group]) -> list[_Sample]:
    samples = []
    for group in groups:
        if len(group.scores) != len(group.trajectories):
            raise UnscoredGroupError(
                f"task {group.task.id!r} has {len(group.trajectories)} responses but {len(group.scores)} scores;"
                " score the groups before they are evaluated"
            )
        for trajectory, score in zip(group.trajectories, group.scores, strict=True):
            if score.value is not None:
                samples.append(_Sample(group, trajectory, score.value))
    return samples


def _errors(samples: Sequence[_Sample]) -> dict[str, float]:
    """(S_t - p n_t) / N of each task."""
    mean = _mean(s.value for s in samples)
    errors: dict[str, float] = defaultdict(float)
    for s in samples:
        errors[s.group.task.id] += (s.value - mean) / len(samples)
    return errors


def _half_width(errors: Sequence[float]) -> float:
    """Infinite for a single task, which says nothing about how tasks differ."""
    m = len(errors)
    return Z95 * math.sqrt(m / (m - 1) * math.fsum(e * e for e in errors)) if m > 1 else math.inf


def _interval(samples: Sequence[_Sample]) -> list[float]:
    mean, errors = _mean(s.value for s in samples), _errors(samples)
    if mean in (0.0, 1.0):
        # All right or all wrong: the variance is 0 and the normal interval would have no width. The exact binomial
        # bound for m equal outcomes takes its place, with tasks as the units.
        bound = 0.025 ** (1 / len(errors))
        return [0.0, 1 - bound] if mean == 0.0 else [bound, 1.0]
    half = _half_width(list(errors.values()))
    return [max(mean - half, 0.0), min(mean + half, 1.0)]


def _by(samples: Sequence[_Sample], greedy: Sequence[_Sample], key: Callable[[_Sample], str | int]) -> dict[str, Rate]:
    slices: dict[str | int, list[_Sample]] = defaultdict(list)
    best: dict[str | int, list[float]] = defaultdict(list)
    for s in samples:
        slices[key(s)].append(s)
    for s in greedy:
        best[key(s)].append(s.value)
    names = sorted(slices.keys() | best.keys(), key=lambda name: (name if isinstance(name, int) else 0, str(name)))
    return {
        str(name): {
            "accuracy": _mean_or_none([s.value for s in slices[name]]),
            "samples": len(slices[name]),
            "mean_length": _mean_or_none([s.trajectory.length for s in slices[name]]),
            "greedy_accuracy": _mean_or_none(best[name]),
        }
        for name in names
    }


def _by_style(samples: Sequence[_Sample], style_lengths: Mapping[str, Mapping[str, int]]) -> dict[str, StyleRate]:
    """Every style that some task has a chain in, shortest first, then "other"; empty without any chains."""
    references: dict[str, list[int]] = defaultdict(list)
    values: dict[str, list[float]] = defaultdict(list)
    for s in samples:
        styles = style_lengths.get(s.group.task.id, {})
        for style, length in styles.items():
            references[style].append(length)
        values[style_of(s.trajectory.length, styles)].append(s.value)
    if not references:
        return {}
    return {
        style: {
            "share": len(values[style]) / len(samples),
            "accuracy": _mean_or_none(values[style]),
            "samples": len(values[style]),
        }
        for style in [*sorted(references, key=lambda style: (_mean(references[style]), style)), OTHER]
    }


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return math.fsum(listed) / len(listed)


def _mean_or_none(values: Sequence[float]) -> float | None:
    return _mean(values) if values else None


def _nothing_scored(groups: Sequence[Group]) -> str:
    failed = [score for group in groups for score in group.scores]
    why = f"; the first of {len(failed)} failures: {failed[0].failure} {failed[0].detail}".rstrip() if failed else ""
    return f"none of the evaluation's {len(groups)} tasks has a scored response{why}; see `rewards` in the recipe"


def _unpaired(before: set[str], after: set[str]) -> str:
    only = sorted(before ^ after)
    return (
        f"{len(only)} tasks were evaluated only before or only after, {only[0]!r} among them;"
        " evaluate the same held-out tasks both times (same `seed` and `tasks.evaluation`)"
    )
