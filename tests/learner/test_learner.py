"""The DeepSpeed learner against plain PyTorch: AdamW, the paper's squared loss, one sequence at a time, no packing.

DeepSpeed lives in a process of its own here (`rank`): it changes the environment of the process that it runs in.
"""

from __future__ import annotations

import dataclasses
import math
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_policy import TINY, build
from transformers import PreTrainedModel

from learner.mixed import Alone, alone, logits_alone, logp_alone, mixed
from rlvlm.cluster.local import become_rank, free_port
from rlvlm.learner.learner import Learner
from rlvlm.learner.objective import Rewarded
from rlvlm.learner.packing import pack
from rlvlm.policy.checkpoint import load_policy, save_policy
from rlvlm.policy.prompts import PromptEncoder
from rlvlm.recipe.load import recipe_from
from rlvlm.recipe.schema import Recipe
from rlvlm.records import Batch
from rlvlm.tasks.images import ImageStore

_BANNED = (6, 8, 9, 10, 450)
_ITERATIONS, _MINIBATCHES, _ROW = 2, 3, 64
# A bias on all keys moves no attention weight: its gradient is rounding alone, which Adam blows up to full steps.
_ROUNDING = "k_proj.bias"


@pytest.fixture(scope="module")
def rank() -> Iterator[Executor]:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, initializer=become_rank, initargs=(0, 1, free_port(), 1)) as pool:
        yield pool


def _recipe(zero_stage: int = 1, bias_step: float | None = None, objective: dict | None = None, **rl: Any) -> Recipe:
    """bias_step: None leaves the experts' balance alone."""
    keys = {"learning_rate": 1e-3, "betas": [0.8, 0.9], "weight_decay": 0.1, "grad_clip": 1e4}
    return recipe_from(
        {
            "name": "test",
            "tasks": {"train": [{"generator": "digits_sum"}]},
            "policy": {"tiny": TINY.model_dump()},
            "rl": {
                **keys,
                "prompts": 6,
                "minibatches": _MINIBATCHES,
                "objective": {"tau": 0.5, **(objective or {})},
                **rl,
            },
            "learner": {
                "zero_stage": zero_stage,
                "balance": {"kind": "bias", "step": bias_step} if bias_step else {"kind": "off"},
                "logp_chunk": 16,
                "row_tokens": _ROW,
            },
        }
    )


def _samples(folder: Path) -> tuple[PreTrainedModel, PromptEncoder, list[list[Rewarded]]]:
    """The policy at the start and the scored groups of each iteration."""
    model, processor = build(spread=0.2)
    store = ImageStore(folder)
    encoder = PromptEncoder(processor, store, model.config)
    return model, encoder, [mixed(encoder, store, seed=10 + i, per_kind=2) for i in range(_ITERATIONS)]


def _batches(recipe: Recipe, folder: Path) -> list[Batch]:
    _, encoder, samples = _samples(folder)
    return [pack(one, encoder, recipe, seed=i) for i, one in enumerate(samples)]


def _learner(recipe: Recipe, folder: Path, banned: tuple[int, ...] = (), seed: int = 0) -> Learner:
    """Of a checkpoint of the policy, which is written first."""
    start = folder / f"start-{seed}"
    save_policy(*build(seed, spread=0.2), start)
    return Learner(recipe, start, banned)


def _snapshot(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


# --- runs in the rank's process --------------------------------------------------------------------------------------


def _train(
    recipe: Recipe, folder: Path, banned: tuple[int, ...]
) -> tuple[dict[str, torch.Tensor], list[dict[str, float]]]:
    """All iterations with the learner: the weights at the end, and the figures of each iteration."""
    learner = _learner(recipe, folder, banned)
    figures = []
    for batch in _batches(recipe, folder):
        assert all(len(minibatch.rows[0]) > 1 for minibatch in batch.minibatches)  # gradients accumulate over rows
        reference = learner.reference(batch)
        figures.append({**learner.step(batch, reference), "entropy": reference.entropy})
    state = learner.full_state()
    assert state.keys() == build()[0].state_dict().keys()
    return {name: tensor.clone() for name, tensor in state.items()}, figures


def _resume(recipe: Recipe, folder: Path) -> dict[str, Any]:
    """Uninterrupted: all iterations. Resumed: the last one, by a learner that began with other weights."""
    first, second = _batches(recipe, folder)
    uninterrupted = _learner(recipe, folder)
    uninterrupted.step(first, uninterrupted.reference(first))
    uninterrupted.save(folder / "checkpoint")
    saved = _copy(uninterrupted)
    figures = uninterrupted.step(second, uninterrupted.reference(second))
    resumed = _learner(recipe, folder, seed=9)
    resumed.load(folder / "checkpoint")
    loaded = _copy(resumed)
    again = resumed.step(second, resumed.reference(second))
    states = [saved, loaded, _copy(uninterrupted), _copy(resumed)]
    plain = load_policy(str(folder / "checkpoint" / "hf"), "float32")[0].state_dict()
    return {"states": states, "figures": (figures, again), "plain": plain}


def _copy(learner: Learner) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in learner.full_state().items()}


def _parity(recipe: Recipe, folder: Path, engine_logp: list[torch.Tensor]) -> Any:
    """What `reference` says when the engine's log-probs are `engine_logp`: a tensor a response, ordered as `alone`."""
    _, encoder, (samples, _) = _samples(folder)
    given = iter(engine_logp)
    groups = []
    for one in samples:
        trajectories = []
        for trajectory, advantage in zip(one.group.trajectories, one.advantage_K, strict=True):
            if advantage is not None:
                (segment,) = trajectory.segments
                segment = dataclasses.replace(segment, logp_T=tuple(next(given).tolist()))
                trajectory = dataclasses.replace(trajectory, segments=(segment,))
            trajectories.append(trajectory)
        groups.append(dataclasses.replace(one, group=dataclasses.replace(one.group, trajectories=tuple(trajectories))))
    reference = _learner(recipe, folder, _BANNED).reference(pack(groups, encoder, recipe, seed=0))
    return reference.parity, reference.entropy


def _one_bias_update(recipe: Recipe, folder: Path) -> tuple[torch.Tensor, dict[str, float]]:
    """Reference passes over both iterations, training on the first minibatch alone."""
    batch, other = _batches(recipe, folder)
    one = Batch(batch.minibatches[:1])
    learner = _learner(recipe, folder)
    for passed in (batch, other):
        learner.reference(passed)
    figures = learner.step(one, learner.reference(one))
    return learner.full_state()["model.language_model.layers.1.mlp.gate.e_score_correction_bias"].clone(), figures


def _names(recipe: Recipe, folder: Path) -> dict[str, torch.Tensor]:
    batch, _ = _batches(recipe, folder)
    learner = _learner(recipe, folder)
    learner.step(batch, learner.reference(batch))
    learner.write_weights(folder / "weights.safetensors")
    return {
        "published": load_file(folder / "weights.safetensors")["language_model.lm_head.weight"],
        "own": learner.full_state()["lm_head.weight"].clone(),
        "before": build(spread=0.2)[0].lm_head.weight.detach(),
    }


def _passes(recipe: Recipe, folder: Path) -> tuple[int, int, float]:
    """How often a decoder layer computes in the reference, how often in the step, and the step's loss."""
    batch, _ = _batches(recipe, folder)
    learner = _learner(recipe, folder)
    counted = [0]

    def count(*_: Any) -> None:
        counted[0] += 1

    learner._policy.model.language_model.layers[0].self_attn.register_forward_hook(count)
    reference = learner.reference(batch)
    before, counted[0] = counted[0], 0
    figures = learner.step(batch, reference)
    return before, counted[0], figures["loss"]


# --- the independent computation -------------------------------------------------------------------------------------


@dataclasses.dataclass
class Plain:
    """Plain PyTorch, one response at a time."""

    recipe: Recipe
    model: PreTrainedModel
    banned: tuple[int, ...]

    def optimizer(self) -> torch.optim.Optimizer:
        rl = self.recipe.rl
        return torch.optim.AdamW(self.model.parameters(), rl.learning_rate, rl.betas, weight_decay=rl.weight_decay)

    def logp(self, one: Alone) -> torch.Tensor:
        return logp_alone(self.model, one, self.recipe.rl.temperature, self.banned)

    def iteration(self, minibatches: list[list[Alone]], prompts: list[int], optimizer: torch.optim.Optimizer) -> dict:
        with torch.no_grad():
            reference = {one.advantage: self.logp(one) for part in minibatches for one in part}
        losses, norms, kl = [], [], []
        for part, count in zip(minibatches, prompts, strict=True):
            optimizer.zero_grad()
            loss = 0.0
            for one in part:
                logp_T = self.logp(one)
                loss += self._backward(one, logp_T, reference[one.advantage], count)
                ratio = (reference[one.advantage] - logp_T.detach()).double().exp()  # pi_i / pi
                kl += (1 / ratio - 1 + ratio.log()).tolist()
            losses.append(loss)
            norms.append(self._clip())
            optimizer.step()
        steps = len(losses)
        return {"loss": sum(losses) / steps, "grad_norm": sum(norms) / steps, "kl": sum(kl) / len(kl)}

    def _backward(self, one: Alone, logp_T: torch.Tensor, reference_T: torch.Tensor, prompts: int) -> float:
        """Backward of the paper's squared loss; gives the surrogate's value."""
        objective = self.recipe.rl.objective
        tau, divisor = objective.tau, one.group_size * prompts * (objective.divisor or 1.0)
        delta = logp_T.sum() - reference_T.sum()
        ((one.advantage - tau * delta) ** 2 / (2 * tau) / divisor).backward()
        return float((-one.advantage * logp_T.sum() + tau / 2 * delta**2).detach()) / divisor

    def _clip(self) -> float:
        for p in self.model.parameters():
            if p.grad is None:  # no picture in this minibatch: the optimizer sees zeros
                p.grad = torch.zeros_like(p)
        norm = math.sqrt(sum(float(p.grad.double().square().sum()) for p in self.model.parameters()))
        for p in self.model.parameters():
            p.grad.mul_(min(1.0, self.recipe.rl.grad_clip / norm))
        return norm


def _dealt(
    recipe: Recipe, samples: list[Rewarded], encoder: PromptEncoder, seed: int
) -> tuple[list[list[Alone]], list[int]]:
    """The responses of each minibatch, told by their advantages, and its number of prompts."""
    batch = pack(samples, encoder, recipe, seed)
    of = {one.advantage: one for one in alone(samples, encoder)}
    members = [[of[a] for row in part.rows[0] for a in row.advantage_S.tolist()] for part in batch.minibatches]
    assert sum(map(len, members)) == len(of)
    return members, [2] * _MINIBATCHES  # 6 prompts


def _plainly(
    recipe: Recipe, folder: Path, banned: tuple[int, ...], reset: bool
) -> tuple[dict[str, torch.Tensor], list[dict]]:
    model, encoder, samples = _samples(folder)
    plain = Plain(recipe, model, banned)
    optimizer, figures = plain.optimizer(), []
    for i, one in enumerate(samples):
        figures.append(plain.iteration(*_dealt(recipe, one, encoder, i), optimizer))
        if reset:
            optimizer = plain.optimizer()
    return _snapshot(model), figures


def _apart(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], tolerance: float = 1e-5) -> float:
    """The share of a tensor's elements that differ by more than `tolerance`, where it is largest. A few do where the
    gradient is next to nothing: Adam divides by its size, and so magnifies its rounding. One such element is let pass
    in every tensor, because in one of 16 it would already be a share of 6%."""
    gaps = ((one[name] - other[name]).abs() for name in one if not name.endswith(_ROUNDING))
    return max(max(int((gap > tolerance).sum()) - 1, 0) / gap.numel() for gap in gaps)


# --- learner = plain PyTorch -----------------------------------------------------------------------------------------

_WARM = {"temperature": 0.7, "objective": {"normalisation": "fixed", "divisor": 4.0, "tau": 1.0}}
_CASES = [
    pytest.param(1, {}, (), id="zero-1"),
    pytest.param(2, {}, (), id="zero-2"),
    pytest.param(1, {"grad_clip": 0.05}, (), id="clipped"),
    pytest.param(2, _WARM, _BANNED, id="temperature-banned-normalised"),
    pytest.param(1, {"objective": {"optimizer_reset": False}}, (), id="continuing"),
    pytest.param(3, {"objective": {"optimizer_reset": False}}, (), id="zero-3-continuing"),
]


@pytest.mark.parametrize(("zero_stage", "rl", "banned"), _CASES)
def test_training_is_that_of_plain_pytorch(rank, tmp_path, zero_stage, rl, banned):
    recipe = _recipe(zero_stage, **rl)
    running = rank.submit(_train, recipe, tmp_path, banned)
    expected, expected_figures = _plainly(recipe, tmp_path, banned, recipe.rl.objective.optimizer_reset)
    state, figures = running.result()
    start = _snapshot(build(spread=0.2)[0])
    assert _apart(expected, start, 1e-3) > 0.5
    assert _apart(state, expected) < 0.01  # at a learning rate of 1e-3
    for ours, theirs in zip(figures, expected_figures, strict=True):
        for name in ("loss", "grad_norm", "kl"):
            assert ours[name] == pytest.approx(theirs[name], rel=2e-4, abs=1e-7), name
        assert theirs["kl"] > 1e-5


def test_the_cases_above_can_tell_their_options_apart(tmp_path):
    """Else equality would say nothing about the option."""
    reset = _plainly(_recipe(), tmp_path, (), reset=True)[0]
    assert _apart(reset, _plainly(_recipe(), tmp_path, (), reset=False)[0]) > 0.8
    assert _apart(reset, _plainly(_recipe(grad_clip=0.05), tmp_path, (), reset=True)[0]) > 0.8
    warm = _recipe(**_WARM)
    assert _apart(_plainly(warm, tmp_path, (), reset=True)[0], _plainly(warm, tmp_path, _BANNED, reset=True)[0]) > 0.8


# --- resume, parity, balance, names ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("zero_stage", "reset"), [(1, True), (1, False), (2, False)])
def test_a_resumed_learner_takes_the_same_step_to_the_bit(rank, tmp_path, zero_stage, reset):
    recipe = _recipe(zero_stage, bias_step=0.01, objective={"optimizer_reset": reset})
    found = rank.submit(_resume, recipe, tmp_path).result()
    saved, loaded, after, resumed = found["states"]
    assert all(torch.equal(saved[name], loaded[name]) for name in saved)
    assert any(not torch.equal(saved[name], after[name]) for name in saved)
    assert [name for name in after if not torch.equal(after[name], resumed[name])] == []
    for name in ("loss", "grad_norm", "kl", "load/entropy"):
        assert found["figures"][0][name] == found["figures"][1][name]
    assert [name for name in saved if not torch.equal(saved[name], found["plain"][name])] == []


def test_parity_and_entropy(rank, tmp_path):
    """Engine log-probs are off by known amounts: +0.01 everywhere, -0.04 at the first token of the third response."""
    recipe = _recipe(temperature=0.7)
    model, encoder, (samples, _) = _samples(tmp_path)
    responses = alone(samples, encoder)
    entropies, engine = [], []
    with torch.no_grad():
        for one in responses:
            engine.append(logp_alone(model, one, 0.7, _BANNED) + 0.01)
            entropies.append(_entropy(model, one))
        engine[2][0] -= 0.05
    parity, entropy = rank.submit(_parity, recipe, tmp_path, engine).result()
    tokens = sum(len(one.response) for one in responses)
    assert parity.tokens == tokens
    assert parity.max == pytest.approx(0.04, abs=3e-5)
    assert parity.mean == pytest.approx((0.01 * (tokens - 1) + 0.04) / tokens, abs=1e-5)
    assert entropy == pytest.approx(float(torch.cat(entropies).mean()), abs=1e-5)


def _entropy(model: PreTrainedModel, one: Alone) -> torch.Tensor:
    logits = logits_alone(model, one).double() / 0.7
    p = torch.softmax(logits[:, [i for i in range(logits.shape[1]) if i not in _BANNED]], 1)
    return -(p * p.log()).sum(1)


def test_a_minibatch_moves_the_experts_bias_once_by_what_it_was_trained_on(rank, tmp_path):
    """The load as counted by running each sequence alone; passes of the reference do not count."""
    model, encoder, (samples, _) = _samples(tmp_path)
    load = torch.zeros(4)

    def count(module: Any, args: Any, output: Any) -> None:
        load.add_(torch.tensor([float((output[2] == expert).sum()) for expert in range(4)]))

    model.model.language_model.layers[1].mlp.gate.register_forward_hook(count)
    recipe = _recipe(bias_step=0.01)
    for one in _dealt(recipe, samples, encoder, 0)[0][0]:
        logp_alone(model, one)
    bias, figures = rank.submit(_one_bias_update, recipe, tmp_path).result()
    torch.testing.assert_close(bias, 0.01 * torch.sign(load.mean() - load))
    assert figures["load/max_mean"] == pytest.approx(float(load.max() / load.mean()))


def test_weights_go_out_under_published_names_as_they_are_now(rank, tmp_path):
    found = rank.submit(_names, _recipe(), tmp_path).result()
    assert torch.equal(found["published"], found["own"])
    assert not torch.equal(found["published"], found["before"])


def test_checkpointed_layers_compute_again_in_backward_and_nothing_else_changes(rank, tmp_path):
    kept = _recipe()
    again = kept.model_copy(update={"learner": kept.learner.model_copy(update={"gradient_checkpointing": True})})
    rows, computed, loss = rank.submit(_passes, kept, tmp_path).result()
    rows_again, computed_again, loss_again = rank.submit(_passes, again, tmp_path).result()
    assert computed == rows == rows_again
    assert computed_again == 2 * rows
    assert loss_again == loss
