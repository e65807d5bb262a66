"""The objective family against independent computations: autograd of the paper's squared loss, the papers' formulas
written out response by response and token by token, and numbers worked out by hand."""

import dataclasses
import math
import statistics
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rlvlm_rewards import Failure, Score
from rlvlm_rewards.group import length_reward

from rlvlm.learner.objective import Totals, advantages, correction, length_weight, reward_group, row_loss
from rlvlm.recipe.schema import RL, Length, Objective
from rlvlm.records import Group, Row, Segment, StopReason, Task, Trajectory

_TASK = Task("t", (), (), "1", "exact", 1, "s")


def _group(values, lengths):
    scores = tuple(Score(value=v) if v is not None else Score(failure=Failure.TIMEOUT, detail="slow") for v in values)
    trajectories = tuple(
        Trajectory("t", j, (1,), (Segment((5,) * n, (-1.0,) * n, True, 0),), StopReason.END, "")
        for j, n in enumerate(lengths)
    )
    return Group(_TASK, trajectories, scores)


def _rl(length=None, **objective):
    return RL(objective=Objective(**objective), length=length or Length(weight=0.0))


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
    rewarded = reward_group(_group([1.0, 0.0, 0.0, 0.0], [9, 9, 9, 9]), _rl(), iteration=1)
    assert rewarded.reward_K == (1.0, 0.0, 0.0, 0.0)
    assert rewarded.advantage_K == (0.75, -0.25, -0.25, -0.25)


def test_length_reward_enters_before_the_baseline():
    rl = _rl(Length(weight=1.0, start_iteration=0, gate=0.5))
    rewarded = reward_group(_group([1.0, 1.0, 0.0], [10, 30, 20]), rl, 1)
    assert rewarded.reward_K == (1.5, 0.5, 0.0)
    assert rewarded.advantage_K == pytest.approx((1.5 - 2 / 3, 0.5 - 2 / 3, -2 / 3))


@pytest.mark.parametrize("preset", ["opmd", "grpo", "rloo", "rest"])
def test_a_failure_is_masked_and_moves_nobody(preset):
    rl = _rl(Length(start_iteration=0, gate=None), preset=preset)
    with_failure = reward_group(_group([1.0, None, 0.0], [10, 500, 20]), rl, 1)
    without = reward_group(_group([1.0, 0.0], [10, 20]), rl, 1)
    assert with_failure.reward_K[1] is None and with_failure.advantage_K[1] is None
    assert (with_failure.reward_K[0], with_failure.reward_K[2]) == without.reward_K
    assert (with_failure.advantage_K[0], with_failure.advantage_K[2]) == without.advantage_K


def test_a_group_without_any_score_trains_on_nothing():
    assert reward_group(_group([None, None], [3, 4]), _rl(), 9).advantage_K == (None, None)


@pytest.mark.parametrize("baseline", ["mean", "leave_one_out"])
@given(st.lists(st.tuples(st.floats(0, 1), st.integers(1, 99)), min_size=1, max_size=12), st.integers(0, 9))
def test_advantages_of_a_group_add_up_to_nothing(baseline, pairs, iteration):
    values, lengths = zip(*pairs, strict=True)
    rewarded = reward_group(_group(values, lengths), _rl(Length(), baseline=baseline), iteration)
    assert math.isclose(sum(rewarded.advantage_K), 0.0, abs_tol=1e-9)


@given(st.lists(st.floats(-1, 2), min_size=2, max_size=12))
def test_leave_one_out_is_the_reward_minus_the_mean_of_the_others(reward_K):
    found = advantages(Objective(baseline="leave_one_out"), reward_K)
    others = [statistics.fmean(reward_K[:j] + reward_K[j + 1 :]) for j in range(len(reward_K))]
    assert found == pytest.approx([r - b for r, b in zip(reward_K, others, strict=True)], abs=1e-12)
    k = len(reward_K)  # which is k / (k - 1) times the advantage over the mean
    over_mean = advantages(Objective(), reward_K)
    assert found == pytest.approx([a * k / (k - 1) for a in over_mean], abs=1e-12)


def test_a_response_alone_is_compared_with_nothing():
    assert advantages(Objective(baseline="leave_one_out"), [0.7]) == [0.0]
    assert advantages(Objective(preset="grpo"), [0.7]) == [0.0]
    assert advantages(Objective(preset="rest"), [0.7]) == [0.7]


@pytest.mark.parametrize(("tau", "baseline"), [(0.01, 0.986), (0.1, 0.861), (1.0, 0.357), (10.0, 0.260)])
def test_logmeanexp_at_a_success_rate_of_a_quarter(tau, baseline):
    """shared/notes/ALGORITHM.md has these numbers; in closed form tau log(3/4 + 1/4 e^(1/tau))."""
    (advantage, *_) = advantages(Objective(baseline="logmeanexp", tau=tau), [1.0, 0.0, 0.0, 0.0])
    assert 1 - advantage == pytest.approx(baseline, abs=5e-4)


@given(st.lists(st.floats(-2, 3), min_size=1, max_size=9), st.floats(1e-6, 1e4))
def test_logmeanexp_lies_between_mean_and_maximum_and_never_overflows(reward_K, tau):
    baseline = reward_K[0] - advantages(Objective(baseline="logmeanexp", tau=tau), reward_K)[0]
    assert statistics.fmean(reward_K) - 1e-9 * (1 + tau) <= baseline <= max(reward_K) + 1e-9
    expected = tau * (torch.logsumexp(torch.tensor(reward_K, dtype=torch.float64) / tau, 0) - math.log(len(reward_K)))
    assert baseline == pytest.approx(float(expected), abs=1e-9 * (1 + tau))


@given(st.lists(st.floats(0, 1), min_size=2, max_size=12))
def test_grpo_divides_by_the_sample_standard_deviation(reward_K):
    mean, std = statistics.fmean(reward_K), statistics.stdev(reward_K)
    found = advantages(Objective(preset="grpo"), reward_K)
    assert found == pytest.approx([(r - mean) / (std + 1e-4) for r in reward_K], abs=1e-8)


def test_positives_only_pushes_nothing_down():
    assert advantages(Objective(preset="rest"), [1.0, 0.0, -0.2, 1.3]) == [1.0, 0.0, 0.0, 1.3]
    assert advantages(Objective(positives_only=True), [1.0, 0.0, 0.0, 0.0]) == [0.75, 0.0, 0.0, 0.0]


# --- the weight of a token that engine and learner disagree on -------------------------------------------------------


def test_correction_worked_by_hand():
    reference_N = torch.tensor([0.8, 0.3, 0.09, 0.5], dtype=torch.float64).log()
    engine_N = torch.tensor([0.4, 0.6, 0.01, 0.5], dtype=torch.float64).log()  # ratios 2, 0.5, 9, 1
    kinds = {
        "none": ({}, [1.0, 1.0, 1.0, 1.0]),
        "tis": ({"cap": 1.5}, [1.5, 0.5, 1.5, 1.0]),
        "icepop": ({"low": 0.6, "high": 8.0}, [2.0, 0.0, 0.0, 1.0]),
    }
    for kind, (bounds, expected) in kinds.items():
        objective = Objective(correction={"kind": kind, **bounds})
        assert correction(objective, reference_N, engine_N).tolist() == pytest.approx(expected)


# --- the loss of a row ------------------------------------------------------------------------------------------------


@dataclass
class Case:
    """One minibatch of random responses through a softmax policy, a column of logits a token, in float64."""

    row: Row
    logits_NV: torch.Tensor  # requires grad
    chosen_N: torch.Tensor
    reference_N: torch.Tensor
    weight_N: torch.Tensor
    prompts: int

    def logp_N(self):
        return self.logits_NV.log_softmax(-1).gather(1, self.chosen_N[:, None])[:, 0]

    def totals(self):
        return Totals(self.prompts, len(self.row.advantage_S), int((self.weight_N > 0).sum()))

    def gradient(self, objective):
        result = row_loss(objective, self.logp_N(), self.reference_N, self.weight_N, self.row, self.totals())
        return torch.autograd.grad(result.loss, self.logits_NV)[0], result

    def responses(self):
        """(advantage, group size, indices into N of the tokens that are not rejected) of each response."""
        segment_N = self.row.segment_T[self.row.trained_T].tolist()
        for s, (advantage, size) in enumerate(zip(self.row.advantage_S, self.row.group_size_S, strict=True)):
            tokens = [n for n, of in enumerate(segment_N) if of == s and float(self.weight_N[n]) > 0]
            yield float(advantage), int(size), tokens


def _case(group_sizes, seed, rejected=0.0, weighted=False, far=0.3):
    """Responses of 1..6 trained tokens after a prompt, with untrained tokens in their middle. far: how far pi is from
    pi_i, in logits."""
    g = torch.Generator().manual_seed(seed)
    segments, trained = [], []
    for s in range(sum(group_sizes)):
        length = int(torch.randint(1, 7, (), generator=g))
        flags = [False, False] + [True] * length
        if length > 2 and bool(torch.rand((), generator=g) < 0.5):
            flags[4:4] = [False] * 2  # a segment that carries no loss
        segments += [s] * len(flags)
        trained += flags
    n, tokens = sum(trained), len(segments)
    logits_NV = torch.randn(n, 7, dtype=torch.float64, generator=g)
    chosen_N = torch.randint(0, 7, (n,), generator=g)
    before_NV = logits_NV + far * torch.randn(n, 7, dtype=torch.float64, generator=g)
    weight_N = torch.ones(n, dtype=torch.float64)
    if weighted:
        weight_N = 0.2 + 2 * torch.rand(n, dtype=torch.float64, generator=g)
    weight_N[torch.rand(n, generator=g) < rejected] = 0.0
    sizes = [k for k in group_sizes for _ in range(k)]
    row = Row(
        input_ids_T=torch.zeros(tokens, dtype=torch.long),
        segment_T=torch.tensor(segments),
        position_ids=torch.zeros(1, tokens, dtype=torch.long),
        trained_T=torch.tensor(trained),
        advantage_S=torch.randn(len(sizes), dtype=torch.float64, generator=g),
        group_size_S=torch.tensor(sizes),
        engine_logp_T=torch.zeros(tokens),
        images={},
    )
    reference_N = before_NV.log_softmax(-1).gather(1, chosen_N[:, None])[:, 0]
    return Case(row, logits_NV.requires_grad_(), chosen_N, reference_N, weight_N, len(group_sizes))


_SIZES = st.lists(st.integers(1, 5), min_size=1, max_size=4)
_SEEDS = st.integers(0, 2**31)
_EQUAL = {"rtol": 1e-9, "atol": 1e-12}


def _same(gradient, expected):
    torch.testing.assert_close(gradient, expected, **_EQUAL)


@settings(max_examples=25, deadline=None)
@given(_SIZES, st.floats(0.01, 10), _SEEDS)
def test_opmd_has_the_gradient_of_the_papers_squared_loss(group_sizes, tau, seed):
    """grad = grad of mean over prompts of 1/k sum_j (A_j - tau Delta_j)^2 / (2 tau), by autograd."""
    case = _case(group_sizes, seed)
    delta_N = case.logp_N() - case.reference_N
    squared = sum((a - tau * delta_N[n].sum()) ** 2 / (2 * tau) / k for a, k, n in case.responses())
    (expected,) = torch.autograd.grad(squared / len(group_sizes), case.logits_NV)
    _same(case.gradient(Objective(tau=tau))[0], expected)


def test_gradient_by_the_papers_formula():
    """1/k sum_j [A_j grad log pi - tau/2 grad Delta_j^2], worked by hand for a Bernoulli policy with one parameter."""
    theta = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    logp_N = torch.stack([torch.nn.functional.logsigmoid(theta), torch.nn.functional.logsigmoid(-theta)])
    reference_N = torch.tensor([math.log(0.4), math.log(0.6)], dtype=torch.float64)
    row = dataclasses.replace(
        _case([2], 0).row,
        segment_T=torch.tensor([0, 0, 1, 1]),
        trained_T=torch.tensor([False, True, False, True]),
        advantage_S=torch.tensor([0.5, -0.5]),
    )
    result = row_loss(Objective(tau=0.2), logp_N, reference_N, torch.ones(2), row, Totals(1, 2, 2))
    (gradient,) = torch.autograd.grad(result.loss, theta)
    p = 1 / (1 + math.exp(-0.3))
    grad_logp = [1 - p, -p]
    delta = [math.log(p) - math.log(0.4), math.log(1 - p) - math.log(0.6)]
    ascent = sum(a * g - 0.2 * d * g for a, g, d in zip([0.5, -0.5], grad_logp, delta, strict=True)) / 2
    assert float(gradient) == pytest.approx(-ascent, rel=1e-12)


@settings(max_examples=12, deadline=None)
@given(_SIZES, _SEEDS)
def test_at_the_reference_every_preset_is_a_policy_gradient(group_sizes, seed):
    """pi = pi_i: grad = - mean over prompts of 1/k sum_j A_j c_j sum_t grad log pi(token), where c_j = 1, and 1/len_j
    for GRPO (by token) and GSPO (whose ratio is length-normalised)."""
    case = _case(group_sizes, seed, far=0.0)
    for preset in ("opmd", "rloo", "rest", "grpo", "gspo"):
        logp_N = case.logp_N()
        divide = preset in ("grpo", "gspo")
        loss = sum(-a * logp_N[n].sum() / (len(n) if divide else 1) / k for a, k, n in case.responses())
        (expected,) = torch.autograd.grad(loss / len(group_sizes), case.logits_NV)
        _same(case.gradient(Objective(preset=preset))[0], expected)


@settings(max_examples=25, deadline=None)
@given(_SIZES, _SEEDS, st.floats(0, 1), st.floats(0.01, 0.9), st.floats(0.01, 3))
def test_grpo_token_by_token(group_sizes, seed, tau, low, high):
    """The clipped surrogate of PPO with min written as the three cases it comes to, in closed form: grad of a token is
    -A rho grad log pi, and nothing where the ratio is already too far in the advantage's direction."""
    case = _case(group_sizes, seed, far=0.8)
    rho_N = (case.logp_N() - case.reference_N).exp().tolist()
    probability_NV = case.logits_NV.softmax(-1).detach()
    expected = torch.zeros_like(case.logits_NV)
    clipped = 0
    for a, k, tokens in case.responses():
        for n in tokens:
            grad_logp = -probability_NV[n]
            grad_logp[case.chosen_N[n]] += 1
            stopped = (a > 0 and rho_N[n] > 1 + high) or (a < 0 and rho_N[n] < 1 - low)
            clipped += stopped
            pull = -a * rho_N[n] * (not stopped) + tau * math.log(rho_N[n])
            expected[n] = pull * grad_logp / len(tokens) / k / len(group_sizes)
    clip = {"kind": "ppo", "epsilon_low": low, "epsilon_high": high}
    gradient, result = case.gradient(Objective(preset="grpo", clip=clip, tau=tau))
    _same(gradient, expected)
    assert result.figures["clip_ratio"] == clipped


@settings(max_examples=25, deadline=None)
@given(_SIZES, _SEEDS)
def test_gspo_response_by_response(group_sizes, seed):
    """s_j = (pi(y)/pi_i(y))^(1/len_j); min(s A, clip(s, 1 - 3e-4, 1 + 4e-4) A), by autograd of torch.min."""
    case = _case(group_sizes, seed, far=1e-3)
    logp_N, loss, clipped = case.logp_N(), 0.0, 0
    for a, k, tokens in case.responses():
        s = torch.prod((logp_N[tokens] - case.reference_N[tokens]).exp()) ** (1 / len(tokens))
        clipped += len(tokens) * ((a > 0 and s.item() > 1.0004) or (a < 0 and s.item() < 0.9997))
        loss = loss - torch.min(s * a, torch.clamp(s, 0.9997, 1.0004) * a) / k / len(group_sizes)
    (expected,) = torch.autograd.grad(loss, case.logits_NV)
    gradient, result = case.gradient(Objective(preset="gspo"))
    _same(gradient, expected)
    assert float(result.loss) == pytest.approx(float(loss), rel=1e-9, abs=1e-12)
    assert result.figures["clip_ratio"] == clipped


@pytest.mark.parametrize("surrogate", ["ratio", "log_prob"])
@settings(max_examples=15, deadline=None)
@given(_SIZES, _SEEDS, st.floats(0, 1))
def test_k25_leaves_out_tokens_whose_ratio_is_too_far_whatever_the_sign(surrogate, group_sizes, seed, tau):
    case = _case(group_sizes, seed, far=0.8)
    logp_N, loss = case.logp_N(), torch.zeros(())
    for a, _, tokens in case.responses():
        for n in tokens:
            log_ratio = logp_N[n] - case.reference_N[n]
            if math.log(0.7) <= float(log_ratio) <= math.log(1.5):
                policy = a * (log_ratio.exp() if surrogate == "ratio" else logp_N[n])
                loss = loss - policy + tau / 2 * log_ratio**2
    (expected,) = torch.autograd.grad(loss / len(logp_N) + 0 * logp_N.sum(), case.logits_NV)
    keys = {"level": "token", "surrogate": surrogate, "normalisation": "tokens", "tau": tau}
    objective = Objective(clip={"kind": "mask", "epsilon_low": 0.3, "epsilon_high": 0.5}, **keys)
    _same(case.gradient(objective)[0], expected)


@pytest.mark.parametrize("level", ["sequence", "token"])
@settings(max_examples=12, deadline=None)
@given(_SIZES, _SEEDS, st.floats(0, 2), st.floats(0.5, 40))
def test_normalisations(level, group_sizes, seed, tau, divisor):
    case = _case(group_sizes, seed)
    logp_N = case.logp_N()
    delta_N = logp_N - case.reference_N
    total = len(logp_N)
    for normalisation in ("none", "length", "fixed", "tokens"):
        loss = 0.0
        for a, k, n in case.responses():
            penalty = delta_N[n].sum() ** 2 if level == "sequence" else (delta_N[n] ** 2).sum()
            part = -a * logp_N[n].sum() + tau / 2 * penalty
            usual = 1 / (k * len(group_sizes))
            shares = {"none": usual, "length": usual / len(n), "fixed": usual / divisor, "tokens": 1 / total}
            loss = loss + part * shares[normalisation]
        (expected,) = torch.autograd.grad(loss, case.logits_NV, retain_graph=True)
        fixed = divisor if normalisation == "fixed" else None
        objective = Objective(level=level, tau=tau, normalisation=normalisation, divisor=fixed)
        gradient, result = case.gradient(objective)
        _same(gradient, expected)
        assert float(result.loss) == pytest.approx(float(loss), rel=1e-9, abs=1e-12)


_FAMILY = [
    {"preset": "opmd"},
    {"preset": "opmd", "normalisation": "length"},
    {"preset": "grpo", "tau": 0.3},
    {"preset": "gspo"},
    {"preset": "opmd", "level": "token", "normalisation": "tokens"},
    {"preset": "gspo", "normalisation": "tokens", "tau": 0.2},
]


@pytest.mark.parametrize("keys", _FAMILY)
@settings(max_examples=12, deadline=None)
@given(_SIZES, _SEEDS)
def test_a_rejected_token_might_as_well_not_be_there(keys, group_sizes, seed):
    """Loss and gradient with rejected tokens are those of the responses without them: also in lengths and totals. A
    response of which nothing is left counts in k, and gives nothing."""
    case = _case(group_sizes, seed, rejected=0.4)
    objective = Objective(**keys)
    gradient, result = case.gradient(objective)
    kept_N = case.weight_N > 0
    trained_T = case.row.trained_T.clone()
    trained_T[trained_T.clone()] = kept_N
    without = dataclasses.replace(
        case,
        row=dataclasses.replace(case.row, trained_T=trained_T),
        logits_NV=case.logits_NV.detach()[kept_N].requires_grad_(),
        chosen_N=case.chosen_N[kept_N],
        reference_N=case.reference_N[kept_N],
        weight_N=case.weight_N[kept_N],
    )
    expected, alone = without.gradient(objective)
    _same(gradient[kept_N], expected)
    assert not gradient[~kept_N].any()
    assert float(result.loss) == pytest.approx(float(alone.loss), rel=1e-9, abs=1e-12)
    assert result.figures["correction/rejected"] == int((~kept_N).sum())
    assert result.figures["clip_ratio"] == alone.figures["clip_ratio"]
    if not kept_N.any():
        assert float(result.loss) == 0.0


@pytest.mark.parametrize("keys", _FAMILY)
@settings(max_examples=12, deadline=None)
@given(_SIZES, _SEEDS)
def test_a_weight_scales_the_gradient_of_its_token(keys, group_sizes, seed):
    """... and nothing else: not ratios, nor what is clipped."""
    objective = Objective(**keys)
    case = _case(group_sizes, seed, weighted=True)
    plain, unweighted = dataclasses.replace(case, weight_N=torch.ones_like(case.weight_N)).gradient(objective)
    gradient, result = case.gradient(objective)
    _same(gradient, plain * case.weight_N[:, None])
    assert float(result.loss) == pytest.approx(float(unweighted.loss), rel=1e-12)
    assert result.figures["clip_ratio"] == unweighted.figures["clip_ratio"]
    assert result.figures["correction/weight"] == pytest.approx(float(case.weight_N.sum()))


@pytest.mark.parametrize("keys", _FAMILY)
@settings(max_examples=12, deadline=None)
@given(_SIZES, _SEEDS, st.data())
def test_the_parts_of_a_minibatch_add_up(keys, group_sizes, seed, data):
    """However its responses are dealt to rows and ranks."""
    objective, case = Objective(**keys), _case(group_sizes, seed, rejected=0.2, weighted=True)
    whole, result = case.gradient(objective)
    responses = len(case.row.advantage_S)
    row_of = torch.tensor(data.draw(st.lists(st.integers(0, 2), min_size=responses, max_size=responses)))
    loss, gradient = 0.0, torch.zeros_like(whole)
    figures = dict.fromkeys(result.figures, 0.0)
    for r in range(3):  # a row may well be empty: ranks without work go along
        members = (row_of == r).nonzero()[:, 0]
        here_T = torch.isin(case.row.segment_T, members)
        here_N = here_T[case.row.trained_T]
        row = dataclasses.replace(
            case.row,
            input_ids_T=case.row.input_ids_T[here_T],
            segment_T=torch.searchsorted(members, case.row.segment_T[here_T]),
            trained_T=case.row.trained_T[here_T],
            advantage_S=case.row.advantage_S[members],
            group_size_S=case.row.group_size_S[members],
        )
        part = row_loss(
            objective, case.logp_N()[here_N], case.reference_N[here_N], case.weight_N[here_N], row, case.totals()
        )
        loss += float(part.loss)
        gradient += torch.autograd.grad(part.loss, case.logits_NV)[0]
        figures = {name: value + part.figures[name] for name, value in figures.items()}
    assert loss == pytest.approx(float(result.loss), rel=1e-9, abs=1e-12)
    _same(gradient, whole)
    assert figures == pytest.approx(result.figures)


def test_a_sequence_without_loss_is_beyond_the_advantages_and_changes_nothing():
    """The blank picture of a rank without pictures: its segment has an id, and no advantage."""
    case = _case([2, 1], seed=4)
    blank = dataclasses.replace(
        case.row,
        segment_T=torch.cat([case.row.segment_T, torch.full((5,), 3)]),
        trained_T=torch.cat([case.row.trained_T, torch.zeros(5, dtype=torch.bool)]),
    )
    for preset in ("opmd", "grpo", "gspo"):
        plain, result = case.gradient(Objective(preset=preset))
        with_blank, other = dataclasses.replace(case, row=blank).gradient(Objective(preset=preset))
        assert torch.equal(plain, with_blank) and float(result.loss) == float(other.loss)
