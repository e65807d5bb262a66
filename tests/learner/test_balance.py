"""The experts' load: counted, summed over ranks, pushed towards even by either method, and told when it collapses."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file
from tiny_policy import build
from torch.utils.checkpoint import checkpoint
from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import load_balancing_loss_func

from learner.routers import Dense, Plain, PlainRouter, balance_on_one_of_two, run, tokens_to
from rlvlm.cluster.local import free_port, run_ranks
from rlvlm.learner.balance import CollapseWatch, LoadBalance, expert_load, is_collapsed, load_loss
from rlvlm.learner.replay import RouterReplay
from rlvlm.policy.checkpoint import load_policy, save_policy, save_weights
from rlvlm.policy.families.kimi_k25 import KimiK25
from rlvlm.policy.family import Router
from rlvlm.recipe.errors import RecipeError
from rlvlm.recipe.schema import Balance
from rlvlm.sft import _balanced


def _balance(model: torch.nn.Module, step: float = 0.25, **more: object) -> LoadBalance:
    return LoadBalance(model, Plain(), Balance(step=step, **more))


def test_counts_and_bias_by_hand():
    router = PlainRouter()
    balance = _balance(router)
    run(router, balance, (0, 1), (0, 2))
    run(router, balance, (1, 0), (0, 1))
    balance.update()  # loads 4 3 1 0, mean 2
    assert router.e_score_correction_bias.tolist() == [-0.25, -0.25, 0.25, 0.25]
    metrics = balance.pop_metrics()
    assert metrics["load/max_mean"] == 2.0
    assert metrics["load/unused"] == 1.0
    shares = [4 / 8, 3 / 8, 1 / 8]
    assert metrics["load/entropy"] == pytest.approx(-sum(p * math.log(p) for p in shares) / math.log(4), rel=1e-6)


def test_an_expert_at_the_mean_stays_where_it_is():
    router = PlainRouter()
    balance = _balance(router, step=0.5)
    run(router, balance, (0, 1), (0, 2))  # 2 1 1 0
    balance.update()
    assert router.e_score_correction_bias.tolist() == [-0.5, 0.0, 0.0, 0.5]


def test_padding_and_blank_pictures_do_not_count():
    router = PlainRouter()
    balance = _balance(router)
    router(tokens_to((0, 1), (2, 3), (0, 1), (2, 3)))
    balance.count(torch.tensor([[True, False], [True, False]]))
    balance.update()
    assert router.e_score_correction_bias.tolist() == [-0.25, -0.25, 0.25, 0.25]


def test_every_update_starts_from_its_own_tokens():
    router = PlainRouter()
    balance = _balance(router)
    run(router, balance, (0, 1), (0, 1))
    balance.update()
    balance.update()  # nothing since: nothing moves
    assert router.e_score_correction_bias.tolist() == [-0.25, -0.25, 0.25, 0.25]
    run(router, balance, (2, 3))
    balance.update()
    assert router.e_score_correction_bias.tolist() == [0.0, 0.0, 0.0, 0.0]


def test_figures_cover_all_updates_since_the_last_time():
    router = PlainRouter()
    balance = _balance(router, kind="off")
    for pairs in (((0, 1), (0, 1)), ((2, 3), (2, 3))):
        run(router, balance, *pairs)
        balance.update()
    expected = {"load/entropy": pytest.approx(1.0), "load/max_mean": 1.0, "load/unused": 0.0, "load/collapsed": 0.0}
    assert balance.pop_metrics() == expected
    assert balance.pop_metrics() == {}
    run(router, balance, (0, 1))
    balance.update()
    metrics = balance.pop_metrics()
    assert (metrics["load/entropy"], metrics["load/max_mean"]) == (pytest.approx(0.5), 2.0)


def test_the_worst_layer_is_told():
    layers = torch.nn.ModuleList([PlainRouter(), PlainRouter()])
    balance = _balance(layers, kind="off")
    layers[0](tokens_to((0, 1), (2, 3)))
    layers[1](tokens_to((0, 1), (0, 2)))
    balance.count(torch.ones(2))
    balance.update()
    metrics = balance.pop_metrics()
    assert metrics["load/max_mean"] == 2.0
    assert metrics["load/unused"] == 1.0
    assert metrics["load/entropy"] == pytest.approx((0.5 * math.log(2) + 0.5 * math.log(4)) / math.log(4))


def test_off_only_watches():
    router = PlainRouter()
    balance = _balance(router, kind="off")
    run(router, balance, (0, 1))
    balance.update()
    assert router.e_score_correction_bias.tolist() == [0.0] * 4
    assert balance.pop_metrics()["load/max_mean"] == 2.0


def test_passes_without_gradients_do_not_count():
    router = PlainRouter()
    balance = _balance(router)
    with torch.no_grad():
        router(tokens_to((2, 3)))
        balance.count(torch.ones(1))
    balance.update()
    assert balance.pop_metrics() == {}
    run(router, balance, (0, 1))
    balance.update()
    assert router.e_score_correction_bias.tolist() == [-0.25, -0.25, 0.25, 0.25]


def test_activation_checkpointing_counts_once_and_the_loss_is_the_same():
    results = []
    for checkpointed in (False, True):
        router = PlainRouter()
        router.weight.requires_grad_()
        balance = _balance(router, kind="auxiliary", coefficient=0.5)
        tokens = tokens_to((0, 1), (0, 2), (0, 3))
        _, weights, _ = checkpoint(router, tokens, use_reentrant=False) if checkpointed else router(tokens)
        (weights.square().sum() + balance.count(torch.ones(3))).backward()
        balance.update()
        results.append((router.weight.grad.tolist(), balance.pop_metrics()))
    assert results[0] == results[1]
    assert results[0][1]["load/max_mean"] == 2.0


def test_a_replayed_choice_is_not_the_routers_own():
    router = PlainRouter()
    replay = RouterReplay(router, Plain(), "r3")
    balance = _balance(router)
    forced = torch.tensor([[[2, 3]], [[2, 3]]], dtype=torch.int16)
    with replay.replay(forced):
        assert router(tokens_to((0, 1), (0, 1)))[2].tolist() == [[2, 3], [2, 3]]
        balance.count(torch.ones(2))
    balance.update()
    assert router.e_score_correction_bias.tolist() == [-0.25, -0.25, 0.25, 0.25]


def test_a_dense_model_has_no_figures():
    balance = LoadBalance(torch.nn.Linear(2, 2), Dense(), Balance())
    assert balance.kind == "off"
    assert float(balance.count(torch.ones(3))) == 0.0
    balance.update()
    assert balance.pop_metrics() == {}


def test_a_bias_that_is_not_there_is_refused():
    router = PlainRouter()
    del router.e_score_correction_bias
    with pytest.raises(RecipeError) as caught:
        _balance(router, kind="bias")
    assert "learner.balance.kind" in str(caught.value) and "no selection bias" in str(caught.value)


def test_the_bias_of_a_frozen_router_stays():
    router = PlainRouter()
    balance = LoadBalance(router, Plain(), Balance(step=0.25), frozen=True)
    run(router, balance, (0, 1))
    balance.update()
    assert router.e_score_correction_bias.tolist() == [0.0] * 4
    assert balance.pop_metrics()["load/max_mean"] == 2.0, "watched all the same"
    with pytest.raises(RecipeError, match="frozen"):
        LoadBalance(router, Plain(), Balance(kind="bias"), frozen=True)


def test_a_refused_step_moves_no_bias():
    router = PlainRouter()
    balance = _balance(router)
    run(router, balance, (0, 1))
    balance.discard()
    balance.update()
    assert router.e_score_correction_bias.tolist() == [0.0] * 4
    assert balance.pop_metrics() == {}


def test_the_policys_own_router_is_found_and_each_token_counts_once_per_chosen_expert():
    model, _ = build()
    balance = LoadBalance(model, KimiK25(), Balance(step=1e-3))
    chosen = []
    gate = model.model.language_model.layers[1].mlp.gate
    gate.register_forward_hook(lambda module, args, output: chosen.extend(output[2].flatten().tolist()))
    model(input_ids=torch.arange(300, 340)[None], use_cache=False)
    assert float(balance.count(torch.ones(1, 40))) == 0.0, "a family with a bias has no auxiliary loss"
    balance.update()
    loads = [chosen.count(expert) for expert in range(4)]
    assert sum(loads) == 40 * 2
    expected = [1e-3 * ((load < 20) - (load > 20)) for load in loads]
    assert gate.e_score_correction_bias.tolist() == pytest.approx(expected)
    assert balance.pop_metrics()["load/max_mean"] == pytest.approx(max(loads) / 20)


def test_a_skewed_router_becomes_even():
    """Two experts start with nearly all tokens; sign updates bring the busiest close to the mean."""
    router = PlainRouter((1.0, 1.0, 0.3, 0.3))
    tokens = torch.rand(400, 4, generator=torch.Generator().manual_seed(0)) + 0.5
    balance = _balance(router, step=0.005)
    seen = []
    for _ in range(120):
        router(tokens)
        balance.count(torch.ones(400))
        balance.update()
        seen.append(balance.pop_metrics())
    assert seen[0]["load/max_mean"] > 1.9
    assert seen[-1]["load/max_mean"] < 1.25
    assert seen[-1]["load/entropy"] > 0.99


def test_the_auxiliary_loss_makes_a_skewed_router_even_through_its_weight():
    router = PlainRouter((1.0, 1.0, 0.3, 0.3))
    router.weight.requires_grad_()
    tokens = torch.rand(400, 4, generator=torch.Generator().manual_seed(0)) + 0.5
    balance = _balance(router, kind="auxiliary", coefficient=1.0)
    optimizer = torch.optim.SGD([router.weight], lr=0.1)
    seen = []
    for _ in range(100):
        router(tokens)
        optimizer.zero_grad()
        balance.count(torch.ones(400)).backward()
        optimizer.step()
        balance.update()
        seen.append(balance.pop_metrics()["load/max_mean"])
    assert seen[0] > 1.9
    assert seen[-1] < 1.25
    assert router.e_score_correction_bias.tolist() == [0.0] * 4


@pytest.mark.parametrize("masked", [False, True])
def test_the_auxiliary_loss_of_a_layer_is_that_of_transformers(masked):
    logits_TE = torch.randn(50, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()
    real_T = torch.arange(50) % 3 > 0 if masked else torch.ones(50, dtype=torch.bool)
    theirs = load_balancing_loss_func((logits_TE,), 8, 3, real_T[None] if masked else None)
    load_E = expert_load(logits_TE.topk(3).indices, real_T, 8)
    ours = load_loss(logits_TE.softmax(-1), load_E, real_T)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)
    gradients = [torch.autograd.grad(loss, logits_TE)[0] for loss in (ours, theirs)]
    assert torch.allclose(*gradients, atol=1e-7)
    assert gradients[0].abs().max() > 1e-4


def test_layers_that_lean_to_different_experts_are_not_even():
    """Summed over layers, as transformers has it, these two would cancel."""
    layers = torch.nn.ModuleList([PlainRouter(), PlainRouter()])
    balance = _balance(layers, kind="auxiliary", coefficient=1.0)
    layers[0](tokens_to((0, 1)))
    layers[1](tokens_to((2, 3)))
    both = float(balance.count(torch.ones(1)))
    score = torch.tensor([9.0, 8.0, 0.0, 0.0]).softmax(-1)
    assert both == pytest.approx(4 * float(score[0] + score[1]))  # f = 1 for two experts; even would be 2
    assert both > 3.9


def test_scores_of_a_sigmoid_router_are_normalised_over_all_experts():
    logits = torch.tensor([[0.0, math.log(3.0), -math.log(3.0)]])  # sigmoids 1/2, 3/4, 1/4
    router = KimiK25.router
    assert isinstance(router, Router)
    assert router.scores(logits)[0].tolist() == pytest.approx([1 / 3, 1 / 2, 1 / 6])


def test_the_bias_of_a_bfloat16_policy_keeps_small_steps_and_lands_in_checkpoints_and_pushes(tmp_path):
    """bfloat16 has 8 bits: 1 + 0.001 would stay 1."""
    start, processor = build()
    start.model.language_model.layers[1].mlp.gate.e_score_correction_bias.fill_(1.0)
    save_policy(start, processor, tmp_path / "start")
    model, _ = load_policy(str(tmp_path / "start"), "bfloat16")
    assert model.lm_head.weight.dtype == torch.bfloat16
    balance = LoadBalance(model, KimiK25(), Balance(step=1e-3))
    model(input_ids=torch.arange(300, 341)[None], use_cache=False)  # 82 choices for 4 experts: none is at the mean
    balance.count(torch.ones(1, 41))
    balance.update()
    bias = model.model.language_model.layers[1].mlp.gate.e_score_correction_bias
    assert {round(b, 6) for b in bias.tolist()} == {0.999, 1.001}
    save_policy(model, processor, tmp_path / "hf")
    again, _ = load_policy(str(tmp_path / "hf"), "bfloat16")
    assert torch.equal(again.model.language_model.layers[1].mlp.gate.e_score_correction_bias, bias)
    save_weights(model, model.state_dict(), tmp_path / "push.safetensors")
    pushed = load_file(tmp_path / "push.safetensors")
    (name,) = (name for name in pushed if name.endswith("e_score_correction_bias"))
    assert torch.equal(pushed[name], bias)


@pytest.mark.parametrize("outputs", [False, True])
def test_under_sft_the_load_counts_and_its_loss_is_added(outputs):
    class Trainer:
        def compute_loss(self, model, inputs, return_outputs=False):
            model(inputs["tokens"])
            return (torch.tensor(3.0), "outputs") if return_outputs else torch.tensor(3.0)

    router = PlainRouter()
    balance = _balance(router, kind="auxiliary", coefficient=0.1)
    inputs = {"tokens": tokens_to((0, 1), (2, 3)), "attention_mask": torch.tensor([[1, 0]])}
    loss = _balanced(Trainer, balance)().compute_loss(router, inputs, return_outputs=outputs)
    if outputs:
        loss, rest = loss
        assert rest == "outputs"
    score = torch.tensor([9.0, 8.0, 0.0, 0.0]).softmax(-1)
    assert float(loss) == pytest.approx(3.0 + 0.1 * 4 * float(score[0] + score[1]))
    balance.update()
    assert balance.pop_metrics()["load/unused"] == 2.0


def test_collapse_is_told_by_the_experts_in_use_beyond_those_of_one_token():
    def load(*experts: float) -> torch.Tensor:
        return torch.tensor(experts) * 1000

    assert is_collapsed(load(1, 1, 0, 0, 0, 0, 0, 0), 2, 0.1)
    assert not is_collapsed(load(1, 1, 1, 0, 0, 0, 0, 0), 2, 0.1)  # 3 in use: (3 - 2) / (8 - 2) = 0.17
    assert is_collapsed(load(1, 1, 1, 0, 0, 0, 0, 0), 2, 0.2)
    assert not is_collapsed(load(1, 1, 1, 1, 1, 1, 1, 1), 2, 0.99)
    assert not is_collapsed(load(1, 1, 0, 0, 0, 0, 0, 0), 2, 0.0), "0 = never"
    assert not is_collapsed(load(1, 1), 2, 0.5), "every token takes every expert"
    assert not is_collapsed(torch.tensor([3.0, 3.0, 0.0, 0.0]), 2, 0.5), "too few tokens to tell"


def test_collapse_warns_once_and_says_what_to_do():
    router = PlainRouter()
    balance = _balance(router)
    run(router, balance, *[(0, 1)] * 64)
    balance.update()
    figures = balance.pop_metrics()
    assert figures["load/collapsed"] == 1.0
    watch = CollapseWatch()
    assert watch.note({"load/entropy": 1.0, "load/collapsed": 0.0}) is None
    note = watch.note(figures)
    assert note is not None and "learner.balance.step" in note and "0.50, 2 experts unused" in note
    assert watch.note(figures) is None


def test_two_ranks_move_their_biases_by_the_load_of_both(tmp_path):
    """Rank 0: 4 2 0 2. Rank 1: 2 1 3 0. Together: 6 3 3 2, mean 3.5."""
    run_ranks(balance_on_one_of_two, 2, free_port(), tmp_path)
    results = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert results[0] == results[1]
    assert results[0]["bias"] == [-0.25, 0.25, 0.25, 0.25]
    assert results[0]["load/max_mean"] == pytest.approx(6 / 3.5)
    shares = [6 / 14, 3 / 14, 3 / 14, 2 / 14]
    assert results[0]["load/entropy"] == pytest.approx(-sum(p * math.log(p) for p in shares) / math.log(4))
