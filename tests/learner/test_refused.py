"""A step that is not finite leaves the weights as they were, is written down, and can be computed again."""

from __future__ import annotations

import dataclasses
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch
from tiny_policy import TINY, build

from learner.mixed import mixed
from rlvlm.cli import main
from rlvlm.cluster.local import become_rank, free_port
from rlvlm.learner.learner import Learner
from rlvlm.learner.packing import pack
from rlvlm.learner.refused import NotFinite, replay
from rlvlm.policy.checkpoint import save_policy
from rlvlm.policy.prompts import PromptEncoder
from rlvlm.recipe.errors import RecipeError
from rlvlm.recipe.load import recipe_from
from rlvlm.recipe.schema import Recipe
from rlvlm.records import Batch
from rlvlm.tasks.images import ImageStore


def _recipe(folder: Path, zero_stage: int) -> Recipe:
    return recipe_from(
        {
            "name": "refusing",
            "output": str(folder),
            "tasks": {"train": [{"generator": "digits_sum"}]},
            "policy": {"tiny": TINY.model_dump()},
            "rl": {"prompts": 6, "minibatches": 3, "learning_rate": 1e-3},
            "learner": {"zero_stage": zero_stage, "row_tokens": 64, "max_refused": 2},
        }
    )


def _batch(folder: Path, recipe: Recipe) -> Batch:
    model, processor = build(spread=0.2)
    save_policy(model, processor, folder / "hf")
    store = ImageStore(folder / "images")
    encoder = PromptEncoder(processor, store, model.config)
    return pack(mixed(encoder, store, seed=1, per_kind=2), encoder, recipe, seed=0)


def _poison(batch: Batch, number: int, **fields: torch.Tensor) -> Batch:
    """The batch with some tensors of the second row of minibatch `number` replaced."""
    minibatch = batch.minibatches[number]
    rows = list(minibatch.rows[0])
    rows[1] = dataclasses.replace(rows[1], **fields)
    poisoned = dataclasses.replace(minibatch, rows=(tuple(rows),))
    return Batch((*batch.minibatches[:number], poisoned, *batch.minibatches[number + 1 :]))


def _refuse(folder: Path, zero_stage: int) -> dict:
    recipe = _recipe(folder, zero_stage)
    batch = _batch(folder, recipe)
    row = batch.minibatches[1].rows[0][1]
    poisoned = _poison(batch, 1, advantage_S=torch.full_like(row.advantage_S, torch.inf))
    learner = Learner(recipe, folder / "hf", ())
    found: dict = {}
    reference = learner.reference(poisoned)
    start = {name: tensor.clone() for name, tensor in learner.full_state().items()}
    one = Batch(poisoned.minibatches[1:2])
    its_own = dataclasses.replace(reference, logp=reference.logp[1:2], routing=reference.routing[1:2])
    figures = learner.step(one, its_own)
    found["refused alone"] = figures["refused_steps"]
    found["weights stay"] = all(torch.equal(t, start[n]) for n, t in learner.full_state().items())
    figures = learner.step(poisoned, reference)  # two good steps around the bad one
    found["refused among others"] = figures["refused_steps"]
    found["loss of the others"] = figures["loss"]
    state = learner.full_state()
    found["finite"] = all(bool(torch.isfinite(t).all()) for t in state.values() if t.is_floating_point())
    found["moved"] = not all(torch.equal(tensor, start[name]) for name, tensor in state.items())
    try:
        twice = Batch((poisoned.minibatches[1],) * 2)
        again = dataclasses.replace(reference, logp=reference.logp[1:2] * 2, routing=reference.routing[1:2] * 2)
        learner.step(twice, again)
    except NotFinite as error:
        found["stopped"] = str(error)
    return found


@pytest.fixture(scope="module", params=[1, 3])
def refused(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("refused")
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, initializer=become_rank, initargs=(0, 1, free_port(), 1)) as pool:
        yield folder, pool.submit(_refuse, folder, request.param).result(timeout=300)


def test_the_step_is_refused_and_the_others_are_taken(refused):
    _, found = refused
    assert found["refused alone"] == 1 and found["weights stay"]
    assert found["refused among others"] == 1 and found["moved"] and found["finite"]
    assert abs(found["loss of the others"]) < 10


def test_the_run_stops_after_so_many_in_a_row_and_says_what_to_do(refused):
    folder, found = refused
    assert "2 steps one after another (learner.max_refused = 2)" in found["stopped"]
    assert f"rlvlm replay-batch {folder / 'refusing' / 'refused' / '4'}" in found["stopped"]


def test_replaying_finds_where_it_begins(refused, capsys):
    folder, _ = refused
    findings = list(replay(folder / "refusing" / "refused" / "1"))
    bad = [found for found in findings if found.inputs]
    assert [(found.row, found.inputs) for found in bad] == [(1, ("advantage_S",))]
    assert findings[0].where == "nowhere" and not torch.isfinite(torch.tensor(bad[0].loss))
    assert main(["replay-batch", str(folder / "refusing" / "refused" / "1")]) == 0
    assert "the batch itself: advantage_S" in capsys.readouterr().out


def test_a_policy_that_overflows_is_named_by_module(refused, tmp_path):
    folder, _ = refused
    dump = folder / "refusing" / "refused" / "1"
    from rlvlm.policy.checkpoint import load_policy

    policy, processor = load_policy(str(dump / "hf"), "float32")
    with torch.no_grad():
        policy.model.language_model.layers[1].self_attn.o_proj.weight.fill_(3e38)
    save_policy(policy, processor, tmp_path / "hf")
    for name in ("recipe.yaml", "rank-0.pt"):
        (tmp_path / name).write_bytes((dump / name).read_bytes())
    first = next(replay(tmp_path))
    assert first.module == "model.language_model.layers.1.self_attn.o_proj"


def test_a_folder_without_a_dump_is_refused(tmp_path, capsys):
    with pytest.raises(RecipeError, match="holds no refused minibatch"):
        list(replay(tmp_path))
    assert main(["replay-batch", str(tmp_path)]) == 2
