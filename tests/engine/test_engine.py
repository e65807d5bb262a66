"""The real vLLM engine against the learner's transformers: same tokens in, same log-probs out, also after a push."""

import asyncio
import dataclasses

import numpy as np
import pytest
import torch

from rlvlm.learner.logprobs import RowLogProbs
from rlvlm.learner.objective import Rewarded
from rlvlm.learner.packing import pack
from rlvlm.learner.replay import RouterReplay
from rlvlm.policy.checkpoint import load_policy, save_policy, save_weights
from rlvlm.policy.initial import _texts
from rlvlm.policy.prompts import PromptEncoder
from rlvlm.policy.tiny import build_tiny_kimi
from rlvlm.recipe.load import load_recipe
from rlvlm.rollout.engine import PromptMismatch, RolloutEngine, Sampling
from rlvlm.tasks.pools import TaskPools
from rlvlm.weights.parcel import Parcel
from tests.conftest import DEMO

pytestmark = pytest.mark.engine

_ROUND = Sampling(samples=4, temperature=1.0, max_tokens=32, round="r1")
_ROUTED = dataclasses.replace(_ROUND, round="routed", routing=True)


def _gap(model, encoder, banned, groups, temperature=1.0) -> float:
    """max |engine log-prob - learner log-prob| over all sampled tokens."""
    module = RowLogProbs(model, temperature, banned, chunk=64)
    ones = [Rewarded(group, (1.0,) * len(group.trajectories), (0.0,) * len(group.trajectories)) for group in groups]
    (minibatch,) = pack(ones, encoder, load_recipe(DEMO, ["rl.minibatches=1"]), seed=0).minibatches
    with torch.no_grad():
        return max(float((row.engine_logp_T[row.trained_T] - module(row)[0]).abs().max()) for row in minibatch.rows[0])


def _long(task):
    """The task with a question of more than a block of vLLM's KV cache (128 tokens on a CPU), which samples share."""
    picture, question = task.messages[0]["content"]
    content = [picture, {"type": "text", "text": " ".join((question["text"].split() * 160)[:160])}]
    return dataclasses.replace(task, id=f"{task.id}-long", messages=({"role": "user", "content": content},))


@torch.no_grad()
def _routing(model, encoder, groups) -> dict[str, int]:
    """The engine's choices of experts against those of a forward of transformers over each sequence alone."""
    replay, compared = RouterReplay(model, encoder.family, "r2"), {"differing": 0, "compared": 0, "missing": 0}
    for group in groups:
        prompt = encoder.prompt(group.task)
        for one in group.trajectories:
            with replay.record():
                model(input_ids=torch.tensor([prompt.input_ids + one.response_ids]), use_cache=False, **prompt.images)
            ours = np.sort(replay.pop_recorded().numpy(), axis=-1)[:-1]
            assert one.routing_TLK.dtype == np.int16 and one.routing_TLK.shape == ours.shape
            compared["missing"] += int((one.routing_TLK < 0).sum())
            compared["differing"] += int((np.sort(one.routing_TLK, axis=-1) != ours).any(-1).sum())
            compared["compared"] += ours.shape[0] * ours.shape[1]
    return compared


def _parcel(model) -> Parcel:
    return Parcel(lambda path: save_weights(model, model.state_dict(), path))


def _tokens(groups):
    return [[t.response_ids for t in group.trajectories] for group in groups]


def _logps(groups):
    return [[t.engine_logp_T for t in group.trajectories] for group in groups]


def _shake(model, seed: int) -> None:
    """Other weights, and other selection biases of the experts."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(
                    0.3 * tensor.std().nan_to_num(0.02).clamp(min=0.01) * torch.randn(tensor.shape, generator=generator)
                )


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Everything that the tests below look at, from one engine start."""
    folder = tmp_path_factory.mktemp("engine")
    recipe = load_recipe(DEMO, ["sft.examples=40", "evaluation.tasks=12", "rl.router_replay=r3"])
    pools = TaskPools(recipe, folder / "images")
    model, processor = build_tiny_kimi(recipe.policy.tiny, _texts(pools.sft()), seed=3)
    _shake(model, 0)  # away from the flat logits of an initial model
    save_policy(model, processor, folder / "hf")
    model, processor = load_policy(str(folder / "hf"), "float32")
    encoder, tasks = PromptEncoder(processor, pools.store, model.config), pools.evaluation()
    banned = encoder.family.placeholder_ids(model.config)
    results = {"tasks": tasks, "banned": banned}

    async def scenario() -> None:
        async with RolloutEngine(recipe, folder / "hf", encoder, banned) as engine:
            first = await engine.generate(tasks, _ROUND)
            results["first"] = first
            results["gap at start"] = _gap(model, encoder, banned, first)
            results["again"] = await engine.generate(tasks, _ROUND)
            results["reversed"] = (await engine.generate(tasks[::-1], _ROUND))[::-1]
            results["other round"] = await engine.generate(tasks, dataclasses.replace(_ROUND, round="r2"))
            warm = dataclasses.replace(_ROUND, temperature=0.7, round="warm")
            results["gap at T=0.7"] = _gap(model, encoder, banned, await engine.generate(tasks, warm), temperature=0.7)
            cached, group = [], engine._group
            engine._group = lambda task, output, sampling: (
                cached.append(output.num_cached_tokens) or group(task, output, sampling)
            )
            long = [_long(task) for task in tasks[:4]]
            results["routing"] = _routing(model, encoder, await engine.generate([*tasks, *long], _ROUTED))
            results["cached tokens"] = cached
            engine._group = group
            results["greedy"] = await engine.generate(tasks, Sampling(1, 0.0, 8, "greedy"))
            results["argmax"] = [_greedy(model, encoder, task, banned, 8) for task in tasks]

            _shake(model, 1)
            results["gap to stale weights"] = _gap(model, encoder, banned, first)
            await engine.update_weights(_parcel(model), version=7)
            results["routing after push"] = _routing(model, encoder, await engine.generate(tasks, _ROUTED))
            pushed = await engine.generate(tasks, _ROUND)
            results["gap after push"] = _gap(model, encoder, banned, pushed)
            results["versions"] = {s.weight_version for g in pushed for t in g.trajectories for s in t.segments}

            with torch.no_grad():  # a policy that wants nothing but image placeholders
                hidden = model.lm_head.weight
                hidden[list(banned)] = 50 * hidden.mean(0) / hidden.mean(0).norm()
            await engine.update_weights(_parcel(model), version=8)
            results["wanting placeholders"] = await engine.generate(tasks, _ROUND)
            results["gap with placeholders wanted"] = _gap(model, encoder, banned, results["wanting placeholders"])

            wrong = dataclasses.replace(encoder.prompt(tasks[0]), input_ids=encoder.prompt(tasks[0]).input_ids[:-1])
            encoder._prompts[tasks[0].id] = wrong
            with pytest.raises(PromptMismatch, match=tasks[0].id):
                await engine.generate(tasks[:1], _ROUND)

    asyncio.run(scenario())
    return results


@torch.no_grad()
def _greedy(model, encoder, task, banned, tokens: int) -> list[int]:
    """argmax decoding by whole forwards, no cache."""
    prompt = encoder.prompt(task)
    ids, eos = list(prompt.input_ids), encoder._processor.tokenizer.eos_token_id
    for _ in range(tokens):
        logits = model(input_ids=torch.tensor([ids]), use_cache=False, **prompt.images).logits[0, -1]
        logits[list(banned)] = -torch.inf
        ids.append(int(logits.argmax()))
        if ids[-1] == eos:
            break
    return ids[len(prompt.input_ids) :]


def test_log_probs_agree_at_start_and_after_a_push(found):
    assert found["gap at start"] < 2e-5
    assert found["gap after push"] < 2e-5
    assert found["gap to stale weights"] > 0.1, "the push would prove nothing"


def test_every_token_carries_the_experts_that_the_engine_chose(found):
    """The prompt's tokens too, whose keys and values came out of the prefix cache; and after a push."""
    assert max(found["cached tokens"]) >= 128
    for place in ("routing", "routing after push"):
        assert found[place]["missing"] == 0
        assert found[place]["differing"] <= 1, "a tie may fall to either side of rounding"
        assert found[place]["compared"] > 4000
    assert {t.routing_TLK is None for group in found["first"] for t in group.trajectories} == {True}, "nobody asked"


def test_log_probs_are_those_of_the_distribution_sampled_from(found):
    assert found["gap at T=0.7"] < 3e-5


def test_the_same_round_is_the_same_bits(found):
    assert _tokens(found["again"]) == _tokens(found["first"])
    assert _logps(found["again"]) == _logps(found["first"])
    assert _tokens(found["reversed"]) == _tokens(found["first"])
    assert _tokens(found["other round"]) != _tokens(found["first"])


def test_samples_of_a_task_differ_and_tasks_keep_their_order(found):
    assert [group.task.id for group in found["first"]] == [task.id for task in found["tasks"]]
    assert all(len(set(samples)) == 4 for samples in _tokens(found["first"]))


def test_greedy_is_argmax(found):
    assert [list(samples[0]) for samples in _tokens(found["greedy"])] == found["argmax"]


def test_versions_are_carried_by_every_segment(found):
    assert found["versions"] == {7}
    assert {s.weight_version for g in found["first"] for t in g.trajectories for s in t.segments} == {0}


def test_placeholders_cannot_be_sampled_however_much_the_policy_wants_to(found):
    sampled = {token for samples in _tokens(found["wanting placeholders"]) for ids in samples for token in ids}
    assert sampled and not sampled & set(found["banned"])
    assert found["gap with placeholders wanted"] < 1e-4
