"""The formulas of k1.5 against independent computations: autograd of the paper's squared loss, and closed forms."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rlvlm_rewards import Failure, Score
from rlvlm_rewards.group import length_reward

from rlvlm.learner.objective import length_weight, reward_group, surrogate
from rlvlm.recipe.schema import Length
from rlvlm.records import Group, Segment, StopReason, Task, Trajectory

_TASK = Task("t", (), (), "1", "exact", 1, "s")


def _group(values, lengths):
    scores = tuple(Score(value=v) if v is not None else Score(failure=Failure.TIMEOUT, detail="slow") for v in values)
    trajectories = tuple(
        Trajectory("t", j, (1,), (Segment((5,) * n, (-1.0,) * n, True, 0),), StopReason.END, "")
        for j, n in enumerate(lengths)
    )
    return Group(_TASK, trajectories, scores)


# --- length reward, section 2.3.3 -------------------------------------------------------------------------------------


def test_length_reward_worked_by_hand():
    # lengths 10..30: lambda = .5, 0, -.5; the wrong one in the middle gets min(0, 0), the short wrong one no bonus.
    assert length_reward([10, 20, 30], [True, True, True]) == [0.5, 0.0, -0.5]
    assert length_reward([10, 20, 30], [False, False, False]) == [0.0, 0.0, -0.5]
    assert length_reward([15, 30, 10], [True, True, True]) == [0.25, -0.5, 0.5]


def test_length_reward_is_zero_for_equal_lengths():
    assert length_reward([7, 7, 7], [True, False, True]) == [0.0, 0.0, 0.0]


@given(st.lists(st.tuples(st.integers(1, 500), st.booleans()), min_size=1, max_size=16))
def test_length_reward_never_favours_the_longer_of_two_equally_right(pairs):
    lengths, correct = zip(*pairs, strict=True)
    rewards = length_reward(lengths, correct)
    for i in range(len(pairs)):
        assert -0.5 <= rewards[i] <= 0.5
        assert correct[i] or rewards[i] <= 0
        for j in range(len(pairs)):
            if correct[i] == correct[j] and lengths[i] < lengths[j]:
                assert rewards[i] >= rewards[j]


@pytest.mark.parametrize(
    ("gate", "iteration", "correct", "weight"),
    [
        (0.5, 4, [True, True], 0.0),  # before the start
        (0.5, 5, [True, True], 0.7),
        (0.5, 5, [True, False], 0.0),  # exactly half does not open the gate
        (0.5, 5, [False, False], 0.0),
        (None, 5, [False, False], 0.7),  # the paper's own rule
        (None, 4, [False, False], 0.0),
    ],
)
def test_length_weight(gate, iteration, correct, weight):
    assert length_weight(Length(weight=0.7, start_iteration=5, gate=gate), iteration, correct) == weight


# --- advantages -------------------------------------------------------------------------------------------------------


def test_advantage_is_reward_minus_the_mean_with_itself_included():
    rewarded = reward_group(_group([1.0, 0.0, 0.0, 0.0], [9, 9, 9, 9]), Length(weight=0.0), iteration=1)
    assert rewarded.reward_K == (1.0, 0.0, 0.0, 0.0)
    assert rewarded.advantage_K == (0.75, -0.25, -0.25, -0.25)


def test_length_reward_enters_before_the_baseline():
    rewarded = reward_group(_group([1.0, 1.0, 0.0], [10, 30, 20]), Length(weight=1.0, start_iteration=0, gate=0.5), 1)
    assert rewarded.reward_K == (1.5, 0.5, 0.0)
    assert rewarded.advantage_K == pytest.approx((1.5 - 2 / 3, 0.5 - 2 / 3, -2 / 3))


def test_a_failure_is_masked_and_moves_nobody():
    with_failure = reward_group(_group([1.0, None, 0.0], [10, 500, 20]), Length(start_iteration=0, gate=None), 1)
    without = reward_group(_group([1.0, 0.0], [10, 20]), Length(start_iteration=0, gate=None), 1)
    assert with_failure.reward_K[1] is None and with_failure.advantage_K[1] is None
    assert (with_failure.reward_K[0], with_failure.reward_K[2]) == without.reward_K
    assert (with_failure.advantage_K[0], with_failure.advantage_K[2]) == without.advantage_K


def test_a_group_without_any_score_trains_on_nothing():
    assert reward_group(_group([None, None], [3, 4]), Length(), 9).advantage_K == (None, None)


@given(st.lists(st.tuples(st.floats(0, 1), st.integers(1, 99)), min_size=1, max_size=12), st.integers(0, 9))
def test_advantages_of_a_group_add_up_to_nothing(pairs, iteration):
    values, lengths = zip(*pairs, strict=True)
    rewarded = reward_group(_group(values, lengths), Length(), iteration)
    assert math.isclose(sum(rewarded.advantage_K), 0.0, abs_tol=1e-9)


# --- the surrogate ----------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=5), st.floats(0.01, 10), st.integers(0, 2**31))
def test_gradient_is_that_of_the_papers_squared_loss(group_sizes, tau, seed):
    """grad surrogate = grad of mean over prompts of 1/k sum_j (A_j - tau Delta_j)^2 / (2 tau), by autograd in float64,
    through a softmax policy over whole responses; groups of unequal size."""
    g = torch.Generator().manual_seed(seed)
    sizes = torch.tensor([k for k in group_sizes for _ in range(k)], dtype=torch.float64)
    n = len(sizes)
    logits = torch.randn(n, 7, dtype=torch.float64, generator=g, requires_grad=True)
    chosen = torch.randint(0, 7, (n, 1), generator=g)
    reference = torch.randn(n, 7, dtype=torch.float64, generator=g).log_softmax(-1).gather(1, chosen)[:, 0]
    advantage = torch.randn(n, dtype=torch.float64, generator=g)

    def logp():
        return logits.log_softmax(-1).gather(1, chosen)[:, 0]

    ours = surrogate(logp(), reference, advantage, sizes, prompts=len(group_sizes), tau=tau, normalisation=1.0)
    (gradient,) = torch.autograd.grad(ours, logits)
    squared = ((advantage - tau * (logp() - reference)) ** 2 / (2 * tau) / sizes).sum() / len(group_sizes)
    (expected,) = torch.autograd.grad(squared, logits)
    torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-12)


def test_gradient_by_the_papers_formula():
    """1/k sum_j [A_j grad log pi - tau/2 grad Delta_j^2], worked by hand for a Bernoulli policy with one parameter."""
    theta = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    logp = torch.stack([torch.nn.functional.logsigmoid(theta), torch.nn.functional.logsigmoid(-theta)])
    reference = torch.tensor([math.log(0.4), math.log(0.6)], dtype=torch.float64)
    advantage, tau = torch.tensor([0.5, -0.5], dtype=torch.float64), 0.2
    loss = surrogate(logp, reference, advantage, torch.tensor([2.0, 2.0]), prompts=1, tau=tau, normalisation=1.0)
    (gradient,) = torch.autograd.grad(loss, theta)
    p = 1 / (1 + math.exp(-0.3))
    grad_logp = [1 - p, -p]
    delta = [math.log(p) - math.log(0.4), math.log(1 - p) - math.log(0.6)]
    ascent = sum(a * g - tau * d * g for a, g, d in zip([0.5, -0.5], grad_logp, delta, strict=True)) / 2
    assert float(gradient) == pytest.approx(-ascent, rel=1e-12)


def test_parts_of_a_minibatch_add_up_and_the_constant_divides():
    logp, reference = torch.randn(6), torch.randn(6)
    advantage, sizes = torch.randn(6), torch.tensor([3, 3, 3, 2, 2, 1])
    whole = surrogate(logp, reference, advantage, sizes, prompts=3, tau=0.1, normalisation=1.0)
    parts = [
        surrogate(logp[s], reference[s], advantage[s], sizes[s], prompts=3, tau=0.1, normalisation=24.0)
        for s in (slice(0, 2), slice(2, 6))
    ]
    torch.testing.assert_close(sum(parts) * 24.0, whole)


def test_at_the_reference_it_is_reinforce_with_a_baseline():
    logp = torch.randn(4, requires_grad=True)
    advantage = torch.tensor([0.75, -0.25, -0.25, -0.25])
    surrogate(logp, logp.detach(), advantage, torch.full((4,), 4), prompts=1, tau=3.0, normalisation=1.0).backward()
    torch.testing.assert_close(logp.grad, -advantage / 4)
