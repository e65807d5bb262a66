"""The length reward: by hand, and its range. tests/learner/test_objective.py has what the learner makes of it."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from rlvlm_rewards.group import length_reward


def test_by_hand() -> None:
    # (12 - 10) / (20 - 10) = 0.2: 0.5 - 0.2 if right, and at most 0 if wrong.
    assert length_reward([10, 12, 12, 20], [True, True, False, False]) == [0.5, 0.3, 0.0, -0.5]


@given(st.lists(st.tuples(st.integers(1, 10**6), st.booleans()), min_size=1))
def test_between_minus_a_half_and_a_half_and_never_positive_when_wrong(pairs: list[tuple[int, bool]]) -> None:
    lengths, correct = [length for length, _ in pairs], [ok for _, ok in pairs]
    for (_, ok), extra in zip(pairs, length_reward(lengths, correct), strict=True):
        assert -0.5 <= extra <= (0.5 if ok else 0.0)
