from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rlvlm_rewards.records import Failure, Score

from rlvlm.evaluation.metrics import (
    NothingScoredError,
    UnpairedTasksError,
    UnscoredGroupError,
    evaluate,
    gain,
    length_change,
    style_of,
    styles_of,
)
from rlvlm.records import Group, Segment, StopReason, Task, Trajectory

FAILED = None
STYLES = {"short": 12, "medium": 16, "verbose": 29}


def group(
    name: str, values: Sequence[float | None], lengths: Sequence[int] | None = None, source: str = "sum", level: int = 1
) -> Group:
    """A task whose responses got these values (None: the reward failed) and have these lengths."""
    lengths = lengths or [10] * len(values)
    task = Task(name, ({"role": "user", "content": "?"},), (), "1", "exact", level, source)
    said = tuple(
        Trajectory(name, j, (1,), (Segment((5,) * n, (-0.1,) * n, True, 0),), StopReason.END, "")
        for j, n in enumerate(lengths)
    )
    scores = tuple(Score(value=v) if v is not None else Score(failure=Failure.TIMEOUT, detail="late") for v in values)
    return Group(task, said, scores)


@pytest.mark.parametrize(
    ("length", "style"),
    [
        (12, "short"),
        (13, "short"),  # 13/12 = 1.083
        (14, "medium"),  # 14/12 = 1.167 is too far, 16/14 = 1.143 is not
        (16, "medium"),
        (18, "medium"),  # 1.125
        (19, "other"),  # 1.1875 from medium
        (25, "other"),  # 29/25 = 1.16
        (26, "verbose"),  # 1.115
        (33, "verbose"),  # 1.138
        (34, "other"),  # 1.172
        (10, "other"),  # 1.2
        (0, "other"),
    ],
)
def test_style_is_the_nearest_reference_within_15_percent(length: int, style: str) -> None:
    assert style_of(length, STYLES) == style


def test_styles_of_knows_tasks_without_chains() -> None:
    groups = [group("a", [1, 1], [12, 29]), group("b", [1], [12])]
    assert styles_of(groups, {"a": STYLES}) == [["short", "verbose"], ["other"]]


def test_evaluate_by_hand() -> None:
    groups = [
        group("a", [1, 1, 0], [12, 16, 30], source="sum", level=2),
        group("b", [0, FAILED], [20, 99], source="sum", level=10),
        group("c", [1, 0], [16, 12], source="max", level=2),
    ]
    greedy = [group("a", [1], source="sum", level=2), group("c", [0], source="max", level=2)]
    got = evaluate(groups, greedy, {name: STYLES for name in "abc"})

    assert got["accuracy"] == 0.5  # 3 of 6
    # S - p n: a 2 - 1.5, b 0 - 0.5, c 1 - 1; so v = 3/2 * (0.25 + 0.25) / 36 = 1/48
    half = 1.959964 * math.sqrt(1 / 48)
    assert got["ci95"] == pytest.approx([0.5 - half, 0.5 + half], abs=1e-6)
    assert (got["samples"], got["failures"], got["greedy_accuracy"]) == (6, 1, 0.5)
    assert got["mean_length"] == pytest.approx((12 + 16 + 30 + 20 + 16 + 12) / 6)
    assert got["by_task"] == {
        "max": {"accuracy": 0.5, "samples": 2, "mean_length": 14.0, "greedy_accuracy": 0.0},
        "sum": {"accuracy": 0.5, "samples": 4, "mean_length": 19.5, "greedy_accuracy": 1.0},
    }
    assert list(got["by_level"]) == ["2", "10"]  # by number, not by letter
    assert got["by_level"]["2"] == {"accuracy": 0.6, "samples": 5, "mean_length": 17.2, "greedy_accuracy": 0.5}
    assert got["by_level"]["10"] == {"accuracy": 0.0, "samples": 1, "mean_length": 20.0, "greedy_accuracy": None}
    assert list(got["by_style"]) == ["short", "medium", "verbose", "other"]
    assert got["by_style"]["short"] == {"share": pytest.approx(2 / 6), "accuracy": 0.5, "samples": 2}
    assert got["by_style"]["medium"] == {"share": pytest.approx(2 / 6), "accuracy": 1.0, "samples": 2}
    assert got["by_style"]["other"] == {"share": pytest.approx(1 / 6), "accuracy": 0.0, "samples": 1}


def test_no_styles_without_chains_and_no_greedy_without_greedy_responses() -> None:
    got = evaluate([group("a", [1, 0])], [], {})
    assert got["by_style"] == {}
    assert got["greedy_accuracy"] is None


def test_interval_equals_the_standard_error_of_task_means_for_equal_sizes() -> None:
    rng = np.random.default_rng(0)
    values_tk = rng.random((50, 4))
    got = evaluate([group(f"t{i}", list(row)) for i, row in enumerate(values_tk)], [], {})
    means = values_tk.mean(axis=1)
    half = 1.959964 * means.std(ddof=1) / math.sqrt(50)
    assert got["ci95"] == pytest.approx([means.mean() - half, means.mean() + half], abs=1e-6)


def test_interval_is_that_of_a_cluster_bootstrap_for_unequal_sizes() -> None:
    rng = np.random.default_rng(1)
    rows = [list((rng.random(rng.integers(1, 9)) < rng.beta(1, 1)).astype(float)) for _ in range(150)]
    low, high = evaluate([group(f"t{i}", row) for i, row in enumerate(rows)], [], {})["ci95"]
    sums, sizes = np.array([sum(r) for r in rows]), np.array([len(r) for r in rows])
    drawn = rng.integers(0, len(rows), size=(4000, len(rows)))
    bootstrap = (sums[drawn].sum(axis=1) / sizes[drawn].sum(axis=1)).std()
    assert (high - low) / (2 * 1.96) == pytest.approx(bootstrap, rel=0.05)


def correlated_run(rng: np.random.Generator, tasks: int = 80) -> list[list[float]]:
    """Unequal numbers of samples of tasks that are mostly all right or all wrong; the true accuracy is 0.6."""
    return [list((rng.random(rng.integers(4, 9)) < rng.beta(0.3, 0.2)).astype(float)) for _ in range(tasks)]


def test_interval_covers_the_truth_19_times_of_20_where_a_binomial_one_does_not() -> None:
    rng, covered, naive = np.random.default_rng(2), 0, 0
    for _ in range(400):
        rows = correlated_run(rng)
        got = evaluate([group(f"t{i}", row) for i, row in enumerate(rows)], [], {})
        covered += got["ci95"][0] <= 0.6 <= got["ci95"][1]
        half = 1.96 * math.sqrt(got["accuracy"] * (1 - got["accuracy"]) / got["samples"])
        naive += abs(got["accuracy"] - 0.6) <= half
    assert 0.92 <= covered / 400 <= 0.98  # a fair interval leaves this range in 1 of 100 seeds
    assert naive / 400 < 0.8


def test_all_right_keeps_a_width() -> None:
    right = evaluate([group(f"t{i}", [1, 1]) for i in range(36)], [], {})
    assert right["ci95"] == pytest.approx([0.025 ** (1 / 36), 1.0])  # scipy.stats.binomtest(36, 36).proportion_ci()
    assert right["ci95"][0] == pytest.approx(0.9026, abs=1e-4)
    wrong = evaluate([group(f"t{i}", [0]) for i in range(36)], [], {})
    assert wrong["ci95"] == pytest.approx([0.0, 0.0974], abs=1e-4)


def test_a_single_task_says_nothing_about_others() -> None:
    assert evaluate([group("a", [1, 0])], [], {})["ci95"] == [0.0, 1.0]


def test_gain_equals_the_paired_standard_error_for_equal_sizes() -> None:
    rng = np.random.default_rng(3)
    before_tk = rng.random((40, 2)) * 0.6
    after_tk = np.clip(before_tk + rng.normal(0.2, 0.1, (40, 2)), 0, 1)
    before = [group(f"t{i}", list(row)) for i, row in enumerate(before_tk)]
    after = [group(f"t{i}", list(row)) for i, row in reversed(list(enumerate(after_tk)))]  # paired by id, not by place
    got = gain(before, after)
    difference = 100 * (after_tk.mean(axis=1) - before_tk.mean(axis=1))
    half = 1.959964 * difference.std(ddof=1) / math.sqrt(40)
    assert got["points"] == pytest.approx(difference.mean())
    assert got["ci95"] == pytest.approx([difference.mean() - half, difference.mean() + half], abs=1e-4)


def test_gain_covers_the_truth_19_times_of_20() -> None:
    """After: every wrong sample has a chance of 1/4 to be right; so the gain is 0.4 / 4 = 10 points."""
    rng, covered = np.random.default_rng(4), 0
    for _ in range(400):
        chances = [rng.beta(0.3, 0.2) for _ in range(80)]
        sides = []
        for lift in (0.0, 0.25):
            rows = [list((rng.random(rng.integers(2, 5)) < c + lift * (1 - c)).astype(float)) for c in chances]
            sides.append([group(f"t{i}", row) for i, row in enumerate(rows)])
        low, high = gain(*sides)["ci95"]
        covered += low <= 10 <= high
    assert 0.92 <= covered / 400 <= 0.98


VALUES = st.lists(st.sampled_from([0.0, 0.25, 1.0, FAILED]), min_size=1, max_size=5)


@given(st.lists(st.tuples(VALUES, VALUES), min_size=1, max_size=8))
def test_gain_is_the_difference_of_the_accuracies_whatever_failed(rows: list[tuple[list, list]]) -> None:
    before = [group(f"t{i}", first) for i, (first, _) in enumerate(rows)]
    after = [group(f"t{i}", second) for i, (_, second) in enumerate(rows)]
    flat = [[v for side in rows for v in side[k] if v is not None] for k in (0, 1)]
    if not all(flat):
        with pytest.raises(NothingScoredError, match="timeout late"):
            gain(before, after)
        return
    got, accuracies = gain(before, after), [sum(side) / len(side) for side in flat]
    assert got["points"] == pytest.approx(100 * (accuracies[1] - accuracies[0]))
    assert got["ci95"][0] - 1e-9 <= got["points"] <= got["ci95"][1] + 1e-9
    assert evaluate(before, [], {})["accuracy"] == pytest.approx(accuracies[0])


def test_length_change() -> None:
    before = [group("a", [1, 0], [10, 20]), group("b", [FAILED], [500])]
    assert length_change(before, [group("a", [1], [12])]) == pytest.approx(12 / 15 - 1)


def test_other_tasks_after_than_before() -> None:
    with pytest.raises(UnpairedTasksError, match=r"2 tasks .* 'a'"):
        gain([group("a", [1])], [group("b", [1])])


def test_scores_are_missing() -> None:
    unscored = group("a", [1, 0])
    with pytest.raises(UnscoredGroupError, match="'a' has 2 responses but 0 scores"):
        evaluate([Group(unscored.task, unscored.trajectories)], [], {})


def test_nothing_scored_names_the_first_failure() -> None:
    with pytest.raises(NothingScoredError, match="timeout late"):
        evaluate([group("a", [FAILED])], [], {})
