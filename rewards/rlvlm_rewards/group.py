"""Rewards of a whole group: of all k responses to one prompt together."""

from __future__ import annotations

from collections.abc import Sequence


def length_reward(length_K: Sequence[int], correct_K: Sequence[bool]) -> list[float]:
    """The length reward of Kimi k1.5 (arXiv 2501.12599, section 2.3.3), in tokens: lambda_j = 0.5 - (len_j - min_len) /
    (max_len - min_len) if correct, min(0, lambda_j) if not.

    Between -0.5 and 0.5; all 0 if every response has the same length. To be added to the rewards, with a weight.
    """
    shortest, longest = min(length_K), max(length_K)
    if shortest == longest:
        return [0.0] * len(length_K)
    lambda_K = [0.5 - (length - shortest) / (longest - shortest) for length in length_K]
    return [value if correct else min(0.0, value) for value, correct in zip(lambda_K, correct_K, strict=True)]
