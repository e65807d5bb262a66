"""The experts' load: counted, summed over ranks, and pushed towards even."""

import json
import math

import pytest
import torch
from tiny_policy import build

from learner.routers import PlainRouter, balance_on_one_of_two, tokens_to
from rlvlm.cluster.local import free_port, run_ranks
from rlvlm.learner.balance import LoadBalance


def test_counts_and_bias_by_hand():
    router = PlainRouter()
    balance = LoadBalance(router, step=0.25)
    router(tokens_to((0, 1), (0, 2)))
    router(tokens_to((1, 0), (0, 1)))
    balance.update()  # loads 4 3 1 0, mean 2
    assert router.e_score_correction_bias.tolist() == [-0.25, -0.25, 0.25, 0.25]
    metrics = balance.pop_metrics()
    assert metrics["load/max_mean"] == 2.0
    shares = [4 / 8, 3 / 8, 1 / 8]
    assert metrics["load/entropy"] == pytest.approx(-sum(p * math.log(p) for p in shares) / math.log(4), rel=1e-6)


def test_an_expert_at_the_mean_stays_where_it_is():
    router = PlainRouter()
    balance = LoadBalance(router, step=0.5)
    router(tokens_to((0, 1), (0, 2)))  # 2 1 1 0
    balance.update()
    assert router.e_score_correction_bias.tolist() == [-0.5, 0.0, 0.0, 0.5]


def test_every_update_starts_from_its_own_tokens():
    router = PlainRouter()
    balance = LoadBalance(router, step=0.25)
    router(tokens_to((0, 1), (0, 1)))
    balance.update()
    balance.update()  # nothing since: nothing moves
    assert router.e_score_correction_bias.tolist() == [-0.25, -0.25, 0.25, 0.25]
    router(tokens_to((2, 3)))
    balance.update()
    assert router.e_score_correction_bias.tolist() == [0.0, 0.0, 0.0, 0.0]


def test_figures_cover_all_updates_since_the_last_time():
    router = PlainRouter()
    balance = LoadBalance(router, step=0.0)
    for pairs in (((0, 1), (0, 1)), ((2, 3), (2, 3))):
        router(tokens_to(*pairs))
        balance.update()
    assert balance.pop_metrics() == {"load/entropy": pytest.approx(1.0), "load/max_mean": 1.0}
    assert balance.pop_metrics() == {}
    router(tokens_to((0, 1)))
    balance.update()
    assert balance.pop_metrics() == {"load/entropy": pytest.approx(0.5), "load/max_mean": 2.0}


def test_the_worst_layer_is_told():
    layers = torch.nn.ModuleList([PlainRouter(), PlainRouter()])
    balance = LoadBalance(layers, step=0.0)
    layers[0](tokens_to((0, 1), (2, 3)))
    layers[1](tokens_to((0, 1), (0, 2)))
    balance.update()
    metrics = balance.pop_metrics()
    assert metrics["load/max_mean"] == 2.0
    assert metrics["load/entropy"] == pytest.approx((0.5 * math.log(2) + 0.5 * math.log(4)) / math.log(4))


def test_step_zero_only_watches():
    router = PlainRouter()
    balance = LoadBalance(router, step=0.0)
    router(tokens_to((0, 1)))
    balance.update()
    assert router.e_score_correction_bias.tolist() == [0.0] * 4
    assert balance.pop_metrics()["load/max_mean"] == 2.0


def test_paused_passes_do_not_count_even_if_one_fails():
    router = PlainRouter()
    balance = LoadBalance(router, step=0.25)
    with pytest.raises(RuntimeError), balance.paused():
        router(tokens_to((2, 3)))
        raise RuntimeError
    router(tokens_to((0, 1)))
    balance.update()
    assert router.e_score_correction_bias.tolist() == [-0.25, -0.25, 0.25, 0.25]


def test_a_model_without_experts_has_no_figures():
    balance = LoadBalance(torch.nn.Linear(2, 2), step=0.1)
    balance.update()
    assert balance.pop_metrics() == {}


def test_the_policys_own_router_is_found_and_each_token_counts_once_per_chosen_expert():
    model, _ = build()
    balance = LoadBalance(model, step=1e-3)
    chosen = []
    gate = model.model.language_model.layers[1].mlp.gate
    gate.register_forward_hook(lambda module, args, output: chosen.extend(output[2].flatten().tolist()))
    with torch.no_grad():
        model(input_ids=torch.arange(300, 340)[None], use_cache=False)
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
    balance = LoadBalance(router, step=0.005)
    seen = []
    for _ in range(120):
        router(tokens)
        balance.update()
        seen.append(balance.pop_metrics())
    assert seen[0]["load/max_mean"] > 1.9
    assert seen[-1]["load/max_mean"] < 1.25
    assert seen[-1]["load/entropy"] > 0.99


def test_two_ranks_move_their_biases_by_the_load_of_both(tmp_path):
    """Rank 0: 4 2 0 2. Rank 1: 2 1 3 0. Together: 6 3 3 2, mean 3.5."""
    run_ranks(balance_on_one_of_two, 2, free_port(), tmp_path)
    results = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert results[0] == results[1]
    assert results[0]["bias"] == [-0.25, 0.25, 0.25, 0.25]
    assert results[0]["load/max_mean"] == pytest.approx(6 / 3.5)
    shares = [6 / 14, 3 / 14, 3 / 14, 2 / 14]
    assert results[0]["load/entropy"] == pytest.approx(-sum(p * math.log(p) for p in shares) / math.log(4))
