"""Router replay: the choice is forced and nothing else, in every pass that a training step makes."""

import copy
import dataclasses
import math

import pytest
import torch
from tiny_policy import TEXTS, TINY
from transformers import DeepseekV3Config, Kimi_K25ForConditionalGeneration
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.glm4v_moe.configuration_glm4v_moe import Glm4vMoeTextConfig
from transformers.models.glm4v_moe.modeling_glm4v_moe import Glm4vMoeTextTopkRouter
from transformers.models.qwen3_vl_moe.configuration_qwen3_vl_moe import Qwen3VLMoeTextConfig
from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import Qwen3VLMoeTextTopKRouter

from learner.mixed import alone, by_advantage, logp_alone, mixed
from learner.replayed import learn_on_one_of_two, recipe
from learner.routers import Dense, Plain, PlainRouter, tokens_to
from rlvlm.cluster.local import free_port, run_ranks
from rlvlm.learner.logprobs import RowLogProbs
from rlvlm.learner.objective import Rewarded
from rlvlm.learner.packing import pack
from rlvlm.learner.replay import RouterReplay, in_backward, routers_of
from rlvlm.policy.checkpoint import save_policy
from rlvlm.policy.families.glm4v_moe import Glm4vMoe
from rlvlm.policy.families.kimi_k25 import KimiK25
from rlvlm.policy.families.qwen3_vl_moe import Qwen3VLMoe
from rlvlm.policy.prompts import PromptEncoder
from rlvlm.policy.tiny import build_tiny_kimi
from rlvlm.recipe.errors import RecipeError
from rlvlm.recipe.load import load_recipe
from rlvlm.records import Batch
from rlvlm.tasks.images import ImageStore
from tests.conftest import DEMO

_IDS = torch.arange(300, 340)[None]


@pytest.fixture(scope="module")
def kimi() -> Kimi_K25ForConditionalGeneration:
    """Two MoE layers of four experts, two of them per token; weights large enough that the choice matters."""
    model, _ = build_tiny_kimi(TINY.model_copy(update={"layers": 3}), TEXTS, seed=0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(0.2 / parameter.std())
    return model.train()


@pytest.fixture(scope="module")
def replay(kimi) -> RouterReplay:
    return RouterReplay(kimi, KimiK25(), "r2")


@pytest.fixture(params=[False, True], ids=["plain", "checkpointed"])
def policy(kimi, request):
    if request.param:
        kimi.gradient_checkpointing_enable({"use_reentrant": False})
    yield kimi
    kimi.gradient_checkpointing_disable()


def _gates(model) -> tuple[torch.nn.Module, ...]:
    return routers_of(model, KimiK25())


def _pass(model, ids=_IDS) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and gradients of a forward and a backward."""
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def _random_routing(tokens: int, seed: int = 0) -> torch.Tensor:
    """Two of four experts for each token in each of two layers."""
    scores = torch.rand(tokens, 2, 4, generator=torch.Generator().manual_seed(seed))
    return scores.topk(2).indices.to(torch.int16)


def test_record_is_what_the_routers_chose(kimi, replay):
    chosen = {}
    handles = [
        gate.register_forward_hook(lambda module, args, output, layer=layer: chosen.update({layer: output[2]}))
        for layer, gate in enumerate(_gates(kimi))
    ]
    with torch.no_grad(), replay.record():
        kimi(input_ids=_IDS, use_cache=False)
    for handle in handles:
        handle.remove()
    recorded = replay.pop_recorded()
    assert recorded.dtype == torch.int16 and recorded.shape == (40, 2, 2)
    for layer in (0, 1):
        assert recorded[:, layer].tolist() == chosen[layer].tolist()
    assert replay.pop_recorded() is None, "given out once"


def test_replaying_ones_own_choice_changes_no_bit(policy, replay):
    loss, gradients = _pass(policy)
    with torch.no_grad(), replay.record():
        policy(input_ids=_IDS, use_cache=False)
    with replay.replay(replay.pop_recorded()):
        again, replayed = _pass(policy)
    assert torch.equal(loss, again)
    assert gradients.keys() == replayed.keys()
    assert all(torch.equal(gradients[name], replayed[name]) for name in gradients)
    assert replay.pop_mismatch().tolist() == [0.0, 80.0]


def test_a_forced_choice_changes_loss_and_gradients_and_reaches_the_router(policy, replay):
    loss, gradients = _pass(policy)
    with replay.replay(_random_routing(40)):
        forced_loss, forced = _pass(policy)
    assert abs(float(loss - forced_loss)) > 1e-2
    for layer in (1, 2):
        name = f"model.language_model.layers.{layer}.mlp.gate.weight"
        assert forced[name].norm() > 1e-4
        assert (forced[name] - gradients[name]).norm() > 1e-4
    differing, compared = replay.pop_mismatch().tolist()
    assert compared == 80 and differing > 40  # 5 of 6 random pairs are another one
    assert torch.equal(loss, _pass(policy)[0]), "over when the block ends"


def test_checkpointing_recomputes_with_the_forced_choice(kimi, replay):
    """A backward that recomputed with free routers would give other gradients."""
    gradients = []
    for checkpointed in (False, True):
        if checkpointed:
            kimi.gradient_checkpointing_enable({"use_reentrant": False})
        with replay.replay(_random_routing(40)):
            gradients.append(_pass(kimi)[1])
    kimi.gradient_checkpointing_disable()
    replay.pop_mismatch()
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


def test_weights_come_from_the_live_logits(kimi):
    """DeepSeek-V3's equations 13 and 14 by hand: sigmoid, share of the two, times the scale."""
    gate = _gates(kimi)[0]
    hidden = torch.randn(5, TINY.hidden, generator=torch.Generator().manual_seed(2))
    logits = hidden @ gate.weight.T
    forced = torch.tensor([[0, 3], [1, 2], [2, 0], [3, 1], [0, 1]])
    for t, (a, b) in enumerate(forced.tolist()):
        scores = logits[t].sigmoid()
        weights = KimiK25.router.weights(gate, logits, forced)[t]
        assert weights.tolist() == pytest.approx(
            [(scores[i] / (scores[a] + scores[b])).item() for i in (a, b)], rel=1e-6
        )


_ROUTERS = {
    "kimi_k25": (KimiK25(), DeepseekV3TopkRouter, DeepseekV3Config, {"n_group": 2, "topk_group": 1}),
    "glm4v_moe": (Glm4vMoe(), Glm4vMoeTextTopkRouter, Glm4vMoeTextConfig, {"n_group": 1, "topk_group": 1}),
    "qwen3_vl_moe": (Qwen3VLMoe(), Qwen3VLMoeTextTopKRouter, Qwen3VLMoeTextConfig, {}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", _ROUTERS)
def test_a_familys_weights_are_those_that_its_router_gives_its_own_choice(name, dtype):
    family, router, config, more = _ROUTERS[name]
    sizes = {"hidden_size": 16, "num_experts_per_tok": 3, "n_routed_experts": 8, "num_experts": 8}
    module = router(config(**sizes, norm_topk_prob=True, routed_scaling_factor=2.446, **more))
    generator = torch.Generator().manual_seed(5)
    module.weight.data = torch.randn(module.weight.shape, generator=generator).to(dtype)
    assert routers_of(torch.nn.ModuleList([module]), family) == (module,)
    logits_TE, weights_TK, chosen_TK = module(torch.randn(20, 16, generator=generator).to(dtype))
    ours_TK = family.router.weights(module, logits_TE, chosen_TK)
    assert torch.equal(ours_TK, weights_TK) and ours_TK.dtype == weights_TK.dtype
    assert torch.allclose(family.router.scores(logits_TE.float()).sum(-1), torch.ones(20))


def test_free_tokens_go_where_their_router_sends_them():
    router = PlainRouter()
    replay = RouterReplay(router, Plain(), "r3")
    routing = torch.tensor([[[2, 3]], [[-1, -1]], [[1, 0]]], dtype=torch.int16)
    with replay.replay(routing):
        _, weights, chosen = router(tokens_to((0, 1), (3, 0), (0, 1)))
    assert chosen.tolist() == [[2, 3], [3, 0], [1, 0]]
    assert weights.tolist() == [[0.0, 0.0], [9.0, 8.0], [8.0, 9.0]]
    assert replay.pop_mismatch().tolist() == [1.0, 2.0]  # the third one's set is the same, in another order
    assert replay.pop_mismatch().tolist() == [0.0, 0.0]


def test_kinds_of_reference():
    """r2 keeps what pi_i chose, r3 forces what the engine chose, none does neither."""
    tokens, routing = tokens_to((0, 1)), torch.tensor([[[2, 3]]], dtype=torch.int16)
    for kind, given, chosen, recorded in (
        ("none", None, [[0, 1]], None),
        ("r2", None, [[0, 1]], [[[0, 1]]]),
        ("r3", routing, [[2, 3]], None),
    ):
        router = PlainRouter()
        replay = RouterReplay(router, Plain(), kind)
        with replay.reference(given):
            assert router(tokens)[2].tolist() == chosen
        found = replay.pop_recorded()
        assert (found if found is None else found.tolist()) == recorded


def test_a_routing_of_another_shape_is_refused():
    router = PlainRouter()
    replay = RouterReplay(router, Plain(), "r3")
    with pytest.raises(ValueError, match=r"\(1, 2\) for choices of \(2, 2\)"), replay.replay(_random_routing(1)):
        router(tokens_to((0, 1), (0, 1)))
    assert router(tokens_to((0, 1)))[2].tolist() == [[0, 1]], "a failure leaves nothing forced"


def test_replay_without_experts_is_refused():
    with pytest.raises(RecipeError) as caught:
        RouterReplay(torch.nn.Linear(2, 2), Dense(), "r2")
    assert "rl.router_replay" in str(caught.value)
    assert RouterReplay(torch.nn.Linear(2, 2), Dense(), "none").layers == 0


def test_backward_is_told_from_forward():
    seen = []
    x = torch.ones(2, requires_grad=True)
    x.register_hook(lambda gradient: seen.append(in_backward()))
    x.sum().backward()
    assert seen == [True] and not in_backward()


def test_packed_rows_are_replayed_as_their_sequences_alone(kimi, replay, tmp_path):
    """The experts of each sequence on its own, laid end to end, are those of the packed row; forced, every sequence
    gives what it gives alone under the same routing."""
    encoder, rewarded = _routed(kimi.config, tmp_path)
    routings = {
        advantage: trajectory.routing_TLK
        for one in rewarded
        for trajectory, advantage in zip(one.group.trajectories, one.advantage_K, strict=True)
    }
    demo = load_recipe(DEMO, ["rl.minibatches=1", "rl.router_replay=r3", "learner.row_tokens=4096"])
    (minibatch,) = pack(rewarded, encoder, demo, seed=0).minibatches
    ((row,),) = minibatch.rows
    module = RowLogProbs(kimi, 1.0, (), chunk=16)
    with torch.no_grad(), replay.record():
        free_N, _ = module(row)
    packed_TLK = replay.pop_recorded()
    with torch.no_grad(), replay.replay(row.routing_TLK):
        forced_N, _ = module(row)
    assert (forced_N - free_N).abs().max() > 0.1
    free, forced = by_advantage(row, free_N), by_advantage(row, forced_N)
    for one in alone(rewarded, encoder):
        segment = row.advantage_S.tolist().index(one.advantage)
        with torch.no_grad(), replay.record():
            assert torch.allclose(free[one.advantage], logp_alone(kimi, one), atol=1e-5)
        assert packed_TLK[row.segment_T == segment].tolist() == replay.pop_recorded().tolist()
        whole = torch.cat([torch.from_numpy(routings[one.advantage]), torch.full((1, 2, 2), -1, dtype=torch.int16)])
        with torch.no_grad(), replay.replay(whole):
            assert torch.allclose(forced[one.advantage], logp_alone(kimi, one), atol=1e-5)
    replay.pop_mismatch()


def _routed(config, folder) -> tuple[PromptEncoder, list[Rewarded]]:
    """Scored responses with and without pictures, whose trajectories carry a random routing."""
    store = ImageStore(folder)
    _, processor = build_tiny_kimi(TINY, TEXTS, seed=0)
    encoder = PromptEncoder(processor, store, config)
    rewarded = []
    for n, one in enumerate(mixed(encoder, store, seed=4)):
        trajectories = [
            dataclasses.replace(t, routing_TLK=_random_routing(len(t.prompt_ids) + t.length - 1, 10 * n + j).numpy())
            for j, t in enumerate(one.group.trajectories)
        ]
        group = dataclasses.replace(one.group, trajectories=tuple(trajectories))
        rewarded.append(dataclasses.replace(one, group=group))
    return encoder, rewarded


def test_in_bfloat16_with_pictures_ones_own_choice_changes_no_bit(kimi, tmp_path):
    model = copy.deepcopy(kimi).to(torch.bfloat16)
    replay, module = RouterReplay(model, KimiK25(), "r2"), RowLogProbs(model, 1.0, (), chunk=16)
    encoder, rewarded = _routed(kimi.config, tmp_path)
    (minibatch,) = pack(rewarded, encoder, load_recipe(DEMO, ["rl.minibatches=1"]), seed=0).minibatches
    for row in minibatch.rows[0]:
        with torch.no_grad(), replay.record():
            free_N, _ = module(row)
        with torch.no_grad(), replay.replay(replay.pop_recorded()):
            assert torch.equal(module(row)[0], free_N)
    differing, compared = replay.pop_mismatch().tolist()
    assert differing == 0.0 and compared > 100


# --- two ranks, ZeRO-3, activation checkpointing ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def ranks(kimi, tmp_path_factory):
    """The cases that two ranks learned from, and what each rank found."""
    folder = tmp_path_factory.mktemp("ranks")
    save_policy(kimi, build_tiny_kimi(TINY, TEXTS, seed=0)[1], folder / "hf")
    encoder, rewarded = _routed(kimi.config, folder / "images")
    even = [dataclasses.replace(one, advantage_K=tuple(a and 0.0 for a in one.advantage_K)) for one in rewarded]
    auxiliary = {"balance": {"kind": "auxiliary", "coefficient": 0.5}}
    recipes = {"r3": recipe("r3"), "r2": recipe("r2"), "auxiliary": recipe("none", **auxiliary)}
    cases = {}
    for name, given in recipes.items():
        batch = pack(even if name == "auxiliary" else rewarded, encoder, given, seed=0)
        if name != "r3":  # nothing but the kind of replay says whose routing it is
            batch = Batch(tuple(dataclasses.replace(m, rows=_without_routing(m.rows)) for m in batch.minibatches))
        cases[name] = (given, batch)
    torch.save(cases, folder / "cases.pt")
    run_ranks(learn_on_one_of_two, 2, free_port(), folder)
    return cases, [torch.load(folder / f"found-{rank}.pt", weights_only=False) for rank in (0, 1)]


def _without_routing(rows):
    return tuple(tuple(dataclasses.replace(row, routing_TLK=None) for row in part) for part in rows)


@pytest.mark.engine
def test_two_ranks_replay_the_engines_routing(kimi, replay, ranks):
    """pi_i under the engine's routing is that of one process without DeepSpeed; so is the mismatch."""
    cases, found = ranks
    (minibatch,) = cases["r3"][1].minibatches
    module, worst = RowLogProbs(kimi, 1.0, (), chunk=16), 0.0
    for rank, rows in enumerate(minibatch.rows):
        for row, logp_N in zip(rows, found[rank]["r3"]["logp"][0], strict=True):
            with torch.no_grad(), replay.replay(row.routing_TLK):
                worst = max(worst, float((module(row)[0] - logp_N).abs().max()))
    assert worst < 1e-5
    differing, compared = replay.pop_mismatch().tolist()
    assert found[0]["r3"]["mismatch"] == found[1]["r3"]["mismatch"] == differing / compared > 0.5
    assert found[0]["r3"]["first"]["router/mismatch"] == differing / compared
    assert found[0]["r3"]["first"]["kl"] == pytest.approx(0.0, abs=1e-9)
    assert found[0]["r3"]["second"]["kl"] > 1e-3


@pytest.mark.engine
def test_two_ranks_replay_their_own_routing(kimi, replay, ranks):
    """The first step is taken at pi_i: not one choice has moved. The second is not, and choices would have."""
    cases, found = ranks
    (minibatch,) = cases["r2"][1].minibatches
    module = RowLogProbs(kimi, 1.0, (), chunk=16)
    for rank, rows in enumerate(minibatch.rows):
        for row, logp_N in zip(rows, found[rank]["r2"]["logp"][0], strict=True):
            with torch.no_grad():
                assert torch.allclose(module(row)[0], logp_N, atol=1e-5)
    for one in (rank["r2"] for rank in found):
        assert one["mismatch"] is None
        assert one["first"]["router/drift"] == 0.0
        assert one["first"]["kl"] == pytest.approx(0.0, abs=1e-9)
        assert one["second"]["router/drift"] > 0.05
    assert found[0]["r2"]["second"] == pytest.approx(found[1]["r2"]["second"], nan_ok=True)


@pytest.mark.engine
def test_two_ranks_add_the_auxiliary_loss_by_tokens(kimi, ranks):
    """Without advantages the gradient is that of the auxiliary loss alone: over rows of both ranks, each weighed by its
    share of the tokens, here with the formula of transformers layer by layer on normalised sigmoids."""
    cases, found = ranks
    (minibatch,) = cases["auxiliary"][1].minibatches
    rows = [row for part in minibatch.rows for row in part]
    tokens = [int((row.segment_T < row.advantage_S.numel()).sum()) for row in rows]
    module, seen = RowLogProbs(kimi, 1.0, (), chunk=16), []
    handles = [gate.register_forward_hook(lambda module, args, output: seen.append(output)) for gate in _gates(kimi)]
    loss = torch.zeros(())
    for row, count in zip(rows, tokens, strict=True):
        seen.clear()
        module(row)
        for logits_TE, _, chosen_TK in seen:
            score_TE = logits_TE.sigmoid() / logits_TE.sigmoid().sum(-1, keepdim=True)
            given_TE = torch.zeros_like(score_TE).scatter(1, chosen_TK, 1.0)
            part = 4 * (given_TE[:count].mean(0) * score_TE[:count].mean(0)).sum()
            loss = loss + 0.5 / 2 * part * count / sum(tokens)
    for handle in handles:
        handle.remove()
    kimi.zero_grad()
    loss.backward()
    norm = math.sqrt(sum(float(p.grad.double().square().sum()) for p in kimi.parameters() if p.grad is not None))
    kimi.zero_grad()
    assert norm > 1e-3
    assert found[0]["auxiliary"]["first"]["grad_norm"] == pytest.approx(norm, rel=1e-3)
    assert found[0]["auxiliary"]["first"]["loss"] == pytest.approx(0.0, abs=1e-7)
