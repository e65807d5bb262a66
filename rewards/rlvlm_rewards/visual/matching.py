"""F1 of things found against things wanted, under the assignment that is best for the answer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable

import numpy as np
from scipy.optimize import linear_sum_assignment

from rlvlm_rewards.records import Score


def soft_f1(similarity: np.ndarray) -> Score:
    """F1 with partial credit: S the largest sum of similarities (each in [0, 1]) over all one-to-one assignments,
    precision S / n, recall S / m, F1 = 2 S / (n + m). Parts: precision, recall.

    similarity: n things found x m things wanted. Nothing found where nothing is wanted is worth 1.
    """
    found, wanted = similarity.shape
    if not found or not wanted:
        value = float(found == wanted)
        return Score(value=value, parts={"precision": value, "recall": value})
    total = float(similarity[linear_sum_assignment(similarity, maximize=True)].sum())
    precision, recall = (min(total / count, 1.0) for count in (found, wanted))  # sums of floats round
    return Score(value=min(2 * total / (found + wanted), 1.0), parts={"precision": precision, "recall": recall})


def repeats(found: Iterable[Hashable], wanted: Iterable[Hashable]) -> bool:
    """Whether an answer names the same thing twice, or more often than the reference does."""
    often = Counter(wanted)
    return any(count > max(often[one], 1) for one, count in Counter(found).items())
