"""Log-probs a chunk at a time against one softmax over everything."""

import math

import pytest
import torch
from tiny_policy import build
from torch import nn

from learner.mixed import alone, by_advantage, logits_alone, logp_alone, mixed, packed_rows
from rlvlm.learner.logprobs import RowLogProbs, fused_logp, is_plain_matrix
from rlvlm.policy.prompts import PromptEncoder
from rlvlm.tasks.images import ImageStore

_BANNED = (6, 8, 9, 10, 350)


@pytest.fixture(scope="module")
def policy():
    return build(spread=0.25)


@pytest.fixture(scope="module")
def sample(policy, tmp_path_factory):
    """One row with everything in it, and its responses alone (none of them holds a banned token)."""
    store = ImageStore(tmp_path_factory.mktemp("images"))
    encoder = PromptEncoder(policy[1], store, policy[0].config)
    rewarded = mixed(encoder, store, seed=4)
    (row,) = packed_rows(rewarded, encoder)
    responses = alone(rewarded, encoder)
    assert not any(token in _BANNED for one in responses for token in one.response)
    return row, responses


@pytest.mark.parametrize("temperature", [1.0, 0.6, 2.5])
@pytest.mark.parametrize("banned", [(), _BANNED])
def test_against_a_softmax_over_the_whole_vocabulary(policy, sample, temperature, banned):
    row, responses = sample
    with torch.no_grad():
        found = by_advantage(row, RowLogProbs(policy[0], temperature, banned, 16)(row)[0])
        for one in responses:
            expected = logp_alone(policy[0], one, temperature, banned)
            torch.testing.assert_close(found[one.advantage], expected, atol=2e-5, rtol=0)


def test_they_are_in_float32_and_in_the_order_of_the_row(policy, sample):
    row, _ = sample
    logp_N, entropy_N = RowLogProbs(policy[0], 1.0, (), 16)(row)
    assert logp_N.dtype == entropy_N.dtype == torch.float32
    assert logp_N.shape == entropy_N.shape == (int(row.trained_T.sum()),)


def test_entropy_in_closed_form(policy, sample):
    """-sum p log p over the allowed ids, in float64."""
    row, responses = sample
    with torch.no_grad():
        _, entropy_N = RowLogProbs(policy[0], 0.7, _BANNED, 16)(row)
        found = by_advantage(row, entropy_N)
        for one in responses:
            logits = logits_alone(policy[0], one).double() / 0.7
            allowed = [i for i in range(logits.shape[1]) if i not in _BANNED]
            p = logits[:, allowed].exp() / logits[:, allowed].exp().sum(1, keepdim=True)
            torch.testing.assert_close(found[one.advantage].double(), -(p * p.log()).sum(1), atol=5e-5, rtol=0)


def test_a_policy_that_knows_nothing_has_the_entropy_of_a_fair_die(sample):
    model = build()[0]
    with torch.no_grad():
        model.lm_head.weight.zero_()
        logp_N, entropy_N = RowLogProbs(model, 1.0, _BANNED, 16)(sample[0])
    sides = model.config.text_config.vocab_size - len(_BANNED)
    torch.testing.assert_close(entropy_N, torch.full_like(entropy_N, math.log(sides)))
    torch.testing.assert_close(logp_N, torch.full_like(logp_N, -math.log(sides)))


@pytest.mark.parametrize("chunk", [1, 5, 7, 10_000])
def test_the_size_of_a_chunk_changes_nothing(policy, sample, chunk):
    row, _ = sample
    with torch.no_grad():
        one, other = (RowLogProbs(policy[0], 0.8, _BANNED, size)(row) for size in (chunk, 16))
    torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


def test_gradients_through_chunks_are_those_of_the_full_softmax(policy, sample):
    model, (row, responses) = policy[0], sample
    model.zero_grad()
    logp_N, _ = RowLogProbs(model, 0.8, _BANNED, 3)(row)
    (logp_N * row.advantage_S[row.segment_T[row.trained_T]]).sum().backward()
    chunked = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    sum(one.advantage * logp_alone(model, one, 0.8, _BANNED).sum() for one in responses).backward()
    for name, p in model.named_parameters():
        scale = max(1.0, float(p.grad.abs().max()))
        torch.testing.assert_close(chunked[name], p.grad, atol=1e-5 * scale, rtol=0, msg=lambda m, n=name: f"{n}: {m}")
    model.zero_grad()


def test_no_gradient_flows_through_the_entropy(policy, sample):
    assert not RowLogProbs(policy[0], 1.0, (), 16)(sample[0])[1].requires_grad


# --- the fused kernel, in torch where there is no Triton ------------------------------------------------------------


def _head(bias: bool, vocabulary: int = 20_000) -> tuple[nn.Linear, torch.Tensor, torch.Tensor]:
    """A head of three tiles, states, and targets from each of them."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        head = nn.Linear(24, vocabulary, bias=bias)
        return head, torch.randn(50, 24, requires_grad=True), torch.arange(7, vocabulary, vocabulary // 50)[:50]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("banned", [(), (3, 9_000, 19_999)])
def test_the_fused_kernel_against_a_softmax_over_what_is_allowed(bias, banned):
    head, hidden_NH, target_N = _head(bias)
    logp_N, entropy_N = fused_logp(hidden_NH, target_N, head, 0.7, banned)
    allowed = torch.tensor([i for i in range(20_000) if i not in banned])
    logits = head(hidden_NH).double() / 0.7
    expected_N = logits.gather(1, target_N[:, None])[:, 0] - logits[:, allowed].logsumexp(1)
    torch.testing.assert_close(logp_N.double(), expected_N, atol=1e-5, rtol=0)
    p = logits[:, allowed].softmax(1)
    torch.testing.assert_close(entropy_N.double(), -(p * p.log()).sum(1), atol=1e-5, rtol=0)
    assert not entropy_N.requires_grad
    weight_N = torch.linspace(-1, 1, 50)
    found, expected = (
        torch.autograd.grad((weight_N * one).sum(), (hidden_NH, *head.parameters())) for one in (logp_N, expected_N)
    )
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_a_head_that_is_no_plain_matrix_is_called_and_not_read():
    """Sharded by ZeRO-3 (its matrix is empty until the module is called), or wrapped by an adapter."""
    head, *_ = _head(False, 100)
    assert is_plain_matrix(head)
    head.weight.ds_id = 1
    assert not is_plain_matrix(head)
    assert not is_plain_matrix(nn.Sequential(nn.Linear(2, 2)))
