"""The objective of Kimi k1.5 (arXiv 2501.12599, section 2.3), formula by formula. k samples y_1..y_k answer a prompt x.

    length reward   lambda_j = 0.5 - (len_j - min_len) / (max_len - min_len)
                    lambda_j if correct, min(0, lambda_j) if not
    advantage       A_j      = r_j - mean(r)
    log-ratio       Delta_j  = log pi(y_j|x) - log pi_i(y_j|x), summed over the whole response
    surrogate       L_j      = -A_j log pi(y_j|x) + tau/2 Delta_j^2, averaged over j and over prompts

The gradient of L_j is that of (A_j - tau Delta_j)^2 / (2 tau), the paper's squared loss
(tests/learner/test_objective.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from rlvlm_rewards import Score
from rlvlm_rewards.group import length_reward

from rlvlm.recipe.schema import Length
from rlvlm.records import Group

CORRECT = 0.5  # a score above this counts as correct where the paper asks for a yes or no


@dataclass(frozen=True, slots=True)
class Rewarded:
    """A group with what it is trained on: per response the reward (score + length part) and the advantage; None =
    masked, because the response could not be scored."""

    group: Group
    reward_K: tuple[float | None, ...]
    advantage_K: tuple[float | None, ...]


def length_weight(length: Length, iteration: int, correct_K: Sequence[bool]) -> float:
    """The weight of the length reward for a group: 0 before the start iteration, and where the gate is closed. As
    written in the paper (gate null) all-wrong groups are told to be shorter, too."""
    if iteration < length.start_iteration:
        return 0.0
    if length.gate is not None and sum(correct_K) / len(correct_K) <= length.gate:
        return 0.0
    return length.weight


def reward_group(group: Group, length: Length, iteration: int) -> Rewarded:
    """Rewards and advantages of a scored group; responses without a score neither get nor influence any."""
    scored = [(j, score.value) for j, score in enumerate(group.scores) if score.value is not None]
    reward_K: list[float | None] = [None] * len(group.scores)
    advantage_K: list[float | None] = [None] * len(group.scores)
    if scored:
        correct = [value > CORRECT for _, value in scored]
        weight = length_weight(length, iteration, correct)
        lambdas = length_reward([group.trajectories[j].length for j, _ in scored], correct)
        rewards = [value + weight * extra for (_, value), extra in zip(scored, lambdas, strict=True)]
        mean = sum(rewards) / len(rewards)
        for (j, _), reward in zip(scored, rewards, strict=True):
            reward_K[j], advantage_K[j] = reward, reward - mean
    return Rewarded(group, tuple(reward_K), tuple(advantage_K))


def success(scores: Sequence[Score]) -> tuple[int, int]:
    """(correct, scored) of a group."""
    values = [score.value for score in scores if score.value is not None]
    return sum(value > CORRECT for value in values), len(values)


def surrogate(
    logp_S: torch.Tensor,
    reference_logp_S: torch.Tensor,
    advantage_S: torch.Tensor,
    group_size_S: torch.Tensor,
    *,
    prompts: int,
    tau: float,
    normalisation: float,
) -> torch.Tensor:
    """The minibatch's loss as far as these S responses go (scalar; the parts of a minibatch add up).

    logp_S, reference_logp_S: log pi(y|x) and log pi_i(y|x), sums over the response's tokens, in nats. group_size_S:
    scored responses to the same prompt (k). prompts: prompts in the whole minibatch. normalisation: constant divisor, 1
    in the paper.
    """
    delta_S = logp_S - reference_logp_S
    loss_S = -advantage_S * logp_S + 0.5 * tau * delta_S.square()
    return (loss_S / group_size_S).sum() / (prompts * normalisation)
