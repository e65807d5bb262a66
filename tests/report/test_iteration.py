"""A line of metrics.jsonl, each number worked out by hand."""

import math

import pytest
from rlvlm_rewards import Failure, Score

from rlvlm.learner.learner import Parity
from rlvlm.learner.objective import Rewarded
from rlvlm.recipe.schema import Length
from rlvlm.records import Group, Segment, StopReason, Task, Trajectory
from rlvlm.report.iteration import iteration_record

_PARITY = Parity(max=2e-5, mean=1e-7, tokens=60)
_SECONDS = {"rollout": 3.0, "reward": 0.5, "learner": 4.0, "other": 0.5}


def _rewarded(level, *responses):
    """responses: (length, cut off, score or None, reward or None)."""
    task = Task("t", (), (), "1", "exact", level, "s")
    trajectories, scores = [], []
    for j, (length, cut, value, _) in enumerate(responses):
        segments = (Segment((5,) * (length - 1), (-1.0,) * (length - 1), True, 0), Segment((1,), (-1.0,), True, 1))
        stop = StopReason.LENGTH if cut else StopReason.END
        trajectories.append(Trajectory("t", j, (1, 2, 3), segments, stop, ""))
        scores.append(Score(value=value) if value is not None else Score(failure=Failure.TIMEOUT, detail="slow"))
    rewards = tuple(reward for *_, reward in responses)
    return Rewarded(Group(task, tuple(trajectories), tuple(scores)), rewards, rewards)


_LENGTH = Length(weight=1.0, start_iteration=2, gate=0.5)


def _record(rewarded, length=_LENGTH, iteration=3, learned=None):
    return iteration_record(iteration, rewarded, learned or {}, _PARITY, length, _SECONDS)


_GROUPS = [
    _rewarded(1, (10, False, 1.0, 1.5), (20, False, 1.0, 0.5), (12, True, None, None)),
    _rewarded(4, (8, False, 0.0, 0.0), (30, True, 1.0, 1.0), (16, False, 0.25, 0.25)),
]


def test_by_hand():
    record = _record(_GROUPS, learned={"loss": -0.25, "kl": 0.01, "grad_norm": 2.0, "entropy": 0.5})
    deviation = math.sqrt(((0 - 5 / 12) ** 2 + (1 - 5 / 12) ** 2 + (0.25 - 5 / 12) ** 2) / 3)
    assert record == {
        "stage": "rl",
        "iteration": 3,
        "reward": pytest.approx((1.5 + 0.5 + 0 + 1 + 0.25) / 5),
        "reward_std": pytest.approx((0.5 + deviation) / 2),
        "accuracy": 3 / 5,
        "completions/mean_length": 96 / 6,
        "completions/max_length": 30,
        "completions/clipped_ratio": pytest.approx(2 / 6),
        "mean_level": 2.5,
        "length_reward": 0.5,  # 2 of 2 right opens the gate, 1 of 3 does not
        "failures": 1,
        "loss": -0.25,
        "kl": 0.01,
        "grad_norm": 2.0,
        "entropy": 0.5,
        "parity/max": 2e-5,
        "parity/mean": 1e-7,
        "parity/tokens": 60,
        "tokens": 96,
        "tokens_per_s": 96 / 8,
        "seconds/rollout": 3.0,
        "seconds/reward": 0.5,
        "seconds/learner": 4.0,
        "seconds/other": 0.5,
        "seconds/iteration": 8.0,
    }


@pytest.mark.parametrize(
    ("length", "iteration", "share"),
    [
        (Length(weight=1.0, start_iteration=4, gate=None), 3, 0.0),
        (Length(weight=1.0, start_iteration=3, gate=None), 3, 1.0),
        (Length(weight=1.0, start_iteration=3, gate=0.3), 3, 1.0),
        (Length(weight=0.0, start_iteration=3, gate=None), 3, 0.0),
    ],
)
def test_share_of_groups_with_a_length_reward(length, iteration, share):
    assert _record(_GROUPS, length, iteration)["length_reward"] == share


def test_nothing_scored_is_null_and_not_zero():
    record = _record([_rewarded(2, (5, False, None, None), (7, False, None, None))])
    assert (record["reward"], record["reward_std"], record["accuracy"]) == (None, None, None)
    assert (record["failures"], record["length_reward"], record["completions/mean_length"]) == (2, 0.0, 6.0)


def test_a_group_without_any_score_does_not_count_in_the_deviation():
    record = _record([*_GROUPS[:1], _rewarded(2, (5, False, None, None))])
    assert record["reward_std"] == pytest.approx(0.5)
    assert record["failures"] == 2
    assert record["length_reward"] == 1.0


def test_means_of_the_parts_of_the_reward():
    one, other = _rewarded(1, (5, False, 1.0, 1.0), (5, False, 0.5, 0.5)), _rewarded(1, (5, False, None, None))
    scores = (
        Score(value=1.0, parts={"grounding": 1.0, "format": 0.0}),
        Score(value=0.5, parts={"grounding": 0.25, "format": 0.5}),
    )
    alone = (Score(value=0.5, parts={"format": 1.0, "format/tags": 0.5}),)
    record = _record(
        [
            Rewarded(Group(one.group.task, one.group.trajectories, scores), one.reward_K, one.advantage_K),
            Rewarded(Group(other.group.task, other.group.trajectories, alone), (0.5,), (0.0,)),
            _rewarded(1, (5, False, None, None)),  # a failure has no parts
        ]
    )
    parts = {key: value for key, value in record.items() if key.startswith("reward/")}
    assert parts == {"reward/grounding": 0.625, "reward/format": 0.5, "reward/format/tags": 0.5}
