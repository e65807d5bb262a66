"""The objective of Kimi k1.5 (arXiv 2501.12599, section 2.3), formula by formula, and what others changed of it. k
samples y_1..y_k answer a prompt x.

    length reward   lambda_j = 0.5 - (len_j - min_len) / (max_len - min_len)
                    lambda_j if correct, min(0, lambda_j) if not
    advantage       A_j      = r_j - mean(r)
    log-ratio       Delta_j  = log pi(y_j|x) - log pi_i(y_j|x), summed over the whole response
    surrogate       L_j      = -A_j log pi(y_j|x) + tau/2 Delta_j^2, averaged over j and over prompts

The gradient of L_j is that of (A_j - tau Delta_j)^2 / (2 tau), the paper's squared loss
(tests/learner/test_objective.py).

The rest of the family differs from that in the keys of `rl.objective`:

    level           sequence        Delta_j, log pi(y_j|x): one term for a response
                    token           one term for a token, the response's loss is their sum
    surrogate       log_prob        -A log pi
                    ratio           -A rho; rho = exp(Delta_j / len_j) for a sequence (GSPO), pi / pi_i for a token
    clip            ppo             -min(A rho, A clip(rho, 1 - epsilon_low, 1 + epsilon_high))
                    mask            no term where rho is outside that range, whatever the sign of A (K2.5)
    baseline b      mean | leave_one_out | logmeanexp | none
                                    A_j = r_j - b, b = mean of the others' rewards | tau log mean exp(r/tau) | 0
    scale           std             A_j / (std(r) + 1e-4), std with k - 1 in the denominator
    positives_only  true            max(A_j, 0)
    normalisation   none            sum over the response, mean over j and over prompts
                    length          the same of L_j / len_j
                    fixed           the same of L_j / divisor
                    tokens          sum over all tokens of the minibatch / their number
    correction      tis             a token's gradient times min(pi_i / engine, cap)
                    icepop          ... times pi_i / engine where that is within [low, high]; other tokens are rejected

    preset   level     surrogate  clip             baseline       scale  tau  normalisation  source
    opmd     sequence  log_prob   none             mean           none   0.1  none           arXiv 2501.12599
    grpo     token     ratio      ppo 0.2, 0.2     mean           std    0    length         arXiv 2402.03300
    gspo     sequence  ratio      ppo 3e-4, 4e-4   mean           std    0    none           arXiv 2507.18071
    rloo     sequence  log_prob   none             leave_one_out  none   0    none           arXiv 2402.14740
    rest     sequence  log_prob   none             none, positives only  0    none           arXiv 2308.08998
    (K2.5)   token     ratio      mask             mean           none   > 0  tokens         arXiv 2602.02276

K2.5 writes tau Delta^2 where k1.5 has tau/2 Delta^2. GRPO and RLOO also have a KL term to the initial model, which is
not here. Lengths, sums and denominators count the tokens that are trained on: those of segments without loss (partial
rollouts) and rejected ones are in none of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from rlvlm_rewards import Score
from rlvlm_rewards.group import length_reward

from rlvlm.recipe.schema import RL, Clip, Length, Objective
from rlvlm.records import Group, Row

CORRECT = 0.5  # a score above this counts as correct where the paper asks for a yes or no
_STD_EPSILON = 1e-4  # TRL's


@dataclass(frozen=True, slots=True)
class Rewarded:
    """A group with what it is trained on: per response the reward (score + length part) and the advantage; None =
    masked, because the response could not be scored."""

    group: Group
    reward_K: tuple[float | None, ...]
    advantage_K: tuple[float | None, ...]


@dataclass(frozen=True, slots=True)
class Totals:
    """What a minibatch has in all its rows, on all ranks. tokens: trained on and not rejected."""

    prompts: int
    sequences: int
    tokens: int


@dataclass(frozen=True, slots=True)
class RowLoss:
    """loss: this row's part of the minibatch's loss (scalar; the parts of rows and ranks add up). figures: sums over
    the row's tokens, the same keys for every row; a mean is the sum over the number of tokens."""

    loss: torch.Tensor
    figures: dict[str, float]


def success(scores: Sequence[Score]) -> tuple[int, int]:
    """(correct, scored) of a group."""
    values = [score.value for score in scores if score.value is not None]
    return sum(value > CORRECT for value in values), len(values)


def length_weight(length: Length, iteration: int, correct_K: Sequence[bool]) -> float:
    """The weight of the length reward for a group: 0 before the start iteration, and where the gate is closed. As
    written in the paper (gate null) all-wrong groups are told to be shorter, too."""
    if iteration < length.start_iteration:
        return 0.0
    if length.gate is not None and sum(correct_K) / len(correct_K) <= length.gate:
        return 0.0
    return length.weight


def reward_group(group: Group, rl: RL, iteration: int) -> Rewarded:
    """Rewards and advantages of a scored group; responses without a score neither get nor influence any."""
    scored = [(j, score.value) for j, score in enumerate(group.scores) if score.value is not None]
    reward_K: list[float | None] = [None] * len(group.scores)
    advantage_K: list[float | None] = [None] * len(group.scores)
    if scored:
        correct = [value > CORRECT for _, value in scored]
        weight = length_weight(rl.length, iteration, correct)
        lambdas = length_reward([group.trajectories[j].length for j, _ in scored], correct)
        rewards = [value + weight * extra for (_, value), extra in zip(scored, lambdas, strict=True)]
        for (j, _), reward, advantage in zip(scored, rewards, advantages(rl.objective, rewards), strict=True):
            reward_K[j], advantage_K[j] = reward, advantage
    return Rewarded(group, tuple(reward_K), tuple(advantage_K))


def advantages(objective: Objective, reward_K: Sequence[float]) -> list[float]:
    """A_j of the k rewards of one prompt (k >= 1)."""
    k, total = len(reward_K), math.fsum(reward_K)
    match objective.baseline:
        case "mean":
            advantage_K = [r - total / k for r in reward_K]
        case "leave_one_out":  # a response without others has nothing to be compared with
            advantage_K = [r - (total - r) / (k - 1) if k > 1 else 0.0 for r in reward_K]
        case "logmeanexp":
            advantage_K = [r - _log_mean_exp(reward_K, objective.tau) for r in reward_K]
        case "none":
            advantage_K = list(reward_K)
    if objective.scale == "std":
        std = math.sqrt(math.fsum((r - total / k) ** 2 for r in reward_K) / max(k - 1, 1))
        advantage_K = [a / (std + _STD_EPSILON) for a in advantage_K]
    return [max(a, 0.0) for a in advantage_K] if objective.positives_only else advantage_K


def _log_mean_exp(reward_K: Sequence[float], tau: float) -> float:
    """tau log mean exp(r / tau), the sampled estimate of tau log Z. The largest reward is taken out, so that no
    exponential overflows however small tau is."""
    largest = max(reward_K)
    return largest + tau * math.log(math.fsum(math.exp((r - largest) / tau) for r in reward_K) / len(reward_K))


@torch.no_grad()
def correction(objective: Objective, reference_N: torch.Tensor, engine_N: torch.Tensor) -> torch.Tensor:
    """weight_N of each trained token for the engine's having sampled it with another probability than pi_i gives it
    (tis: fengyao.notion.site/off-policy-rl; icepop: ringtech.notion.site/icepop); 0 = rejected.

    reference_N, engine_N: log-probs by pi_i and by the engine, in nats.
    """
    bounds, weight_N = objective.correction, (reference_N - engine_N).exp()
    if bounds.kind == "tis":
        assert bounds.cap is not None
        return weight_N.clamp(max=bounds.cap)
    if bounds.kind == "icepop":
        assert bounds.low is not None and bounds.high is not None
        return torch.where((weight_N >= bounds.low) & (weight_N <= bounds.high), weight_N, 0.0)
    return torch.ones_like(weight_N)


def row_loss(
    objective: Objective,
    logp_N: torch.Tensor,
    reference_N: torch.Tensor,
    weight_N: torch.Tensor,
    row: Row,
    totals: Totals,
) -> RowLoss:
    """The loss of a packed row, as its part of the minibatch.

    logp_N, reference_N: log-probs of the row's trained tokens by pi (with gradient) and by pi_i, in nats. weight_N: of
    `correction`.
    """
    kept_N = weight_N > 0
    segment_N = row.segment_T[row.trained_T]
    length_S = _by_segment(kept_N.to(logp_N.dtype), segment_N, row)
    share_S = _share(objective, length_S, row, totals)
    # The weight is of a token's gradient: as a factor of its log-prob it would change ratios and Delta.
    logp_N = torch.where(kept_N, weight_N * logp_N + (1 - weight_N) * logp_N.detach(), 0.0)
    log_ratio_N = logp_N - torch.where(kept_N, reference_N, 0.0)
    advantage_S = row.advantage_S.to(logp_N.dtype)
    if objective.level == "sequence":
        logp_S, delta_S = _by_segment(logp_N, segment_N, row), _by_segment(log_ratio_N, segment_N, row)
        ratio_S = (delta_S / length_S.clamp(min=1)).exp()
        loss_S, clipped_S = _surrogate(objective, logp_S, delta_S, ratio_S, advantage_S)
        loss, clipped_N = (loss_S * share_S).sum(), clipped_S[segment_N]
    else:
        loss_N, clipped_N = _surrogate(objective, logp_N, log_ratio_N, log_ratio_N.exp(), advantage_S[segment_N])
        loss = torch.where(kept_N, loss_N * share_S[segment_N], 0.0).sum()
    figures = {
        "clip_ratio": float((clipped_N & kept_N).sum()),
        "correction/weight": float(weight_N.sum()),
        "correction/rejected": float((~kept_N).sum()),
    }
    return RowLoss(loss, figures)


def _surrogate(
    objective: Objective, logp_X: torch.Tensor, delta_X: torch.Tensor, ratio_X: torch.Tensor, advantage_X: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of each term (X: a response, or a token), and whether its ratio was clipped."""
    penalty_X = 0.5 * objective.tau * delta_X.square()
    policy_X = -advantage_X * (logp_X if objective.surrogate == "log_prob" else ratio_X)
    if objective.clip.kind == "none":
        return policy_X + penalty_X, torch.zeros_like(ratio_X, dtype=torch.bool)
    low, high = _range(objective.clip)
    if objective.clip.kind == "mask":
        outside_X = (ratio_X < low) | (ratio_X > high)
        return torch.where(outside_X, 0.0, policy_X + penalty_X), outside_X
    bounded_X = -advantage_X * ratio_X.clamp(low, high)
    return torch.maximum(policy_X, bounded_X) + penalty_X, bounded_X > policy_X


def _range(clip: Clip) -> tuple[float, float]:
    assert clip.epsilon_low is not None and clip.epsilon_high is not None
    return 1 - clip.epsilon_low, 1 + clip.epsilon_high


def _share(objective: Objective, length_S: torch.Tensor, row: Row, totals: Totals) -> torch.Tensor:
    """What the loss of each response, summed over its tokens, is multiplied with; 0 if all its tokens are rejected."""
    some_S = (length_S > 0).to(length_S.dtype)
    if objective.normalisation == "tokens":
        return some_S / max(totals.tokens, 1)
    mean_S = some_S / (row.group_size_S.to(length_S.dtype) * totals.prompts)
    if objective.normalisation == "length":
        return mean_S / length_S.clamp(min=1)
    if objective.normalisation == "fixed":
        assert objective.divisor is not None
        return mean_S / objective.divisor
    return mean_S


def _by_segment(value_N: torch.Tensor, segment_N: torch.Tensor, row: Row) -> torch.Tensor:
    """Sums over the trained tokens of each response, [S]."""
    return value_N.new_zeros(len(row.advantage_S)).index_add(0, segment_N, value_N)
