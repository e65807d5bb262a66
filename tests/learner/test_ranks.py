"""The learner on several ranks under ZeRO 1, 2 and 3: the same numbers as one rank, checkpoints that one number of
ranks writes and another reads, and ranks that end together. Float32, gloo, Ray actors for two ranks.

Every run takes two iterations of batches in which some rows have pictures and others none.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_policy import TINY, build

from learner.mixed import mixed
from rlvlm.cluster.local import become_rank, free_port, ready_for_deepspeed
from rlvlm.cluster.ray import RankDied, RayRanks
from rlvlm.learner.checkpoints import MANIFEST, CheckpointRefused
from rlvlm.learner.group import LearnerGroup
from rlvlm.learner.learner import Learner
from rlvlm.learner.packing import pack
from rlvlm.policy.checkpoint import save_policy
from rlvlm.policy.prompts import PromptEncoder
from rlvlm.recipe.load import recipe_from
from rlvlm.recipe.schema import Recipe
from rlvlm.records import Batch
from rlvlm.tasks.images import ImageStore

pytestmark = pytest.mark.engine

Run = Callable[..., dict[str, Any]]


def _recipe(zero_stage: int, ranks: int, folder: Path, **learner: Any) -> Recipe:
    rl = {"learning_rate": 1e-3, "betas": [0.8, 0.9], "weight_decay": 0.1, "grad_clip": 1e4}
    return recipe_from(
        {
            "name": "test",
            "output": str(folder),
            "tasks": {"train": [{"generator": "digits_sum"}]},
            "policy": {"tiny": TINY.model_dump()},
            "rl": {**rl, "prompts": 4, "minibatches": 2, "objective": {"tau": 0.5, "optimizer_reset": False}},
            "learner": {
                "zero_stage": zero_stage,
                "ranks": ranks,
                "balance": {"step": 0.01},
                "logp_chunk": 8,
                "row_tokens": 64,
                **learner,
            },
        }
    )


def _batches(recipe: Recipe, folder: Path) -> list[Batch]:
    """Two groups of text and two with pictures in each."""
    model, processor = build()
    store = ImageStore(folder / "images")
    encoder = PromptEncoder(processor, store, model.config)
    kinds = ((), ((32, 16),), (), ((16, 32), (32, 32)))
    return [pack(mixed(encoder, store, 10 + i, kinds=kinds), encoder, recipe, i) for i in range(2)]


class Worker:
    """One rank, for as many runs as are asked of it."""

    def __init__(self) -> None:
        ready_for_deepspeed(1)

    def run(self, recipe: Recipe, folder: Path, to: Path | None = None, since: Path | None = None) -> dict[str, Any]:
        """Both iterations, with a checkpoint between them in `to`; or the second alone, from the checkpoint `since`, by
        a learner that began elsewhere."""
        learner = Learner(recipe, folder / ("start" if since is None else "elsewhere"), ())
        first, second = (batch.share(int(os.environ["RANK"])) for batch in _batches(recipe, folder))
        if since is not None:
            learner.load(since)
        figures = [] if since else [learner.step(first, learner.reference(first))]
        if to is not None:
            learner.save(to)
        figures.append(learner.step(second, learner.reference(second)))
        state = {name: tensor.clone() for name, tensor in learner.full_state().items()}
        return {"state": state, "figures": figures}


def _alone(*arguments: Any) -> dict[str, Any]:
    return Worker().run(*arguments)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """With two checkpoints of the policy, `start` and `elsewhere`."""
    folder = tmp_path_factory.mktemp("ranks")
    for seed, name in enumerate(("start", "elsewhere")):
        model, processor = build(seed, spread=0.2)
        save_policy(model, processor, folder / name)
    return folder


@pytest.fixture(scope="module")
def run(folder, ray_cluster) -> Iterator[Run]:
    """Does `Worker.run` on one rank or two, which live on from run to run; gives what rank 0 says."""
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(1, context, initializer=become_rank, initargs=(0, 1, free_port(), 1))
    pair = RayRanks(Worker, 2, limit_s=300.0, address=ray_cluster)

    def run(recipe: Recipe, to: Path | None = None, since: Path | None = None) -> dict[str, Any]:
        if recipe.learner.ranks == 1:
            return pool.submit(_alone, recipe, folder, to, since).result()
        return pair.call("run", *([one] * 2 for one in (recipe, folder, to, since)))[0]

    with pool:
        yield run
        pair.close()


@pytest.fixture(scope="module")
def runs(run, folder) -> Callable[[int, int], dict[str, Any]]:
    """The run of a stage and a number of ranks, each made once; its checkpoint is in `at`."""
    made: dict[tuple[int, int], dict[str, Any]] = {}

    def get(zero_stage: int, ranks: int) -> dict[str, Any]:
        if (zero_stage, ranks) not in made:
            at = folder / f"z{zero_stage}-{ranks}"
            made[zero_stage, ranks] = run(_recipe(zero_stage, ranks, folder), at) | {"at": at}
        return made[zero_stage, ranks]

    return get


def _assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Up to the order in which float32 sums are taken. Adam makes full steps of next to no gradient, so that single
    weights may differ by more than others."""
    for ours, theirs in zip(one["figures"], other["figures"], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-6)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-5)
        assert ours.get("load/max_mean") == theirs.get("load/max_mean")
    assert one["state"].keys() == other["state"].keys()
    for name, tensor in one["state"].items():
        gap = (tensor - other["state"][name]).abs()
        assert float(gap.mean()) < 1e-7 and float(gap.max()) < 5e-5, name  # the learning rate is 1e-3


def test_rows_of_the_ranks_differ_in_pictures(folder):
    """Else the tests here would not show that such ranks wait for each other."""
    (first, second) = _batches(_recipe(1, 2, folder), folder)
    turns = [turn for batch in (first, second) for m in batch.minibatches for turn in zip(*m.rows, strict=True)]
    blank = [[int((row.segment_T >= row.advantage_S.numel()).sum()) for row in turn] for turn in turns]
    assert any(min(one) == 0 and max(one) > 1 for one in blank)
    assert len({len(row.trained_T.nonzero()) // 8 for turn in turns for row in turn}) > 1  # chunks of log-probs too


@pytest.mark.parametrize(("zero_stage", "ranks"), [(2, 1), (3, 1), (1, 2), (2, 2), (3, 2)])
def test_stages_and_ranks_compute_the_same(runs, folder, zero_stage, ranks):
    _assert_same(runs(zero_stage, ranks), runs(1, 1))
    start = build(spread=0.2)[0].state_dict()
    moved = [float((tensor - start[name]).abs().max()) for name, tensor in runs(1, 1)["state"].items()]
    assert min(moved) > 1e-4


def test_checkpointing_and_offload_change_nothing(run, runs, folder):
    recipe = _recipe(3, 2, folder, gradient_checkpointing=True, offload="optimizer")
    _assert_same(run(recipe), runs(1, 1))


@pytest.mark.parametrize(("zero_stage", "ranks"), [(3, 1), (1, 2), (2, 2), (3, 2)])
def test_as_many_ranks_go_on_to_the_bit(run, runs, folder, zero_stage, ranks):
    through = runs(zero_stage, ranks)
    again = run(_recipe(zero_stage, ranks, folder), since=through["at"])
    assert [n for n in through["state"] if not torch.equal(through["state"][n], again["state"][n])] == []
    for name in ("loss", "grad_norm", "kl"):
        assert again["figures"][0][name] == through["figures"][1][name]


@pytest.mark.parametrize(("there", "here"), [((2, 2), (2, 1)), ((3, 2), (1, 1)), ((1, 1), (3, 2)), ((3, 1), (1, 2))])
def test_another_number_of_ranks_or_stage_goes_on(run, runs, folder, there, here):
    """Adam's moments and step counts go on too: optimizer_reset is off."""
    through = runs(*there)
    again = run(_recipe(*here, folder), since=through["at"])
    _assert_same(again, {**through, "figures": through["figures"][1:]})


def test_experts_that_are_shared_out_compute_the_same(run, folder, tmp_path):
    """And a state that is cut this way is only read by ranks that cut it so."""
    off: dict[str, Any] = {"balance": {"kind": "off"}}
    whole = run(_recipe(1, 1, folder, **off))
    whole["figures"] = [{k: v for k, v in figures.items() if k != "load/max_mean"} for figures in whole["figures"]]
    shared = _recipe(1, 2, folder, expert_parallel=2, **off)
    through = run(shared, tmp_path / "shared")
    _assert_same(through, whole)
    again = run(shared, None, tmp_path / "shared")
    assert [n for n in through["state"] if not torch.equal(through["state"][n], again["state"][n])] == []
    with pytest.raises(CheckpointRefused, match="expert_parallel 2 there, 1 here; ranks 2 there, 1 here"):
        run(_recipe(1, 1, folder, **off), None, tmp_path / "shared")


def test_a_state_of_another_policy_is_refused_with_the_difference(run, runs, folder, tmp_path):
    at = tmp_path / "other"
    at.mkdir()
    (at / "state").mkdir()
    manifest = json.loads((runs(1, 1)["at"] / MANIFEST).read_text())
    manifest["learner"] |= {"dtype": "bfloat16"}
    manifest["learner"]["trained"]["lm_head.weight"][0] += 1
    del manifest["learner"]["trained"]["model.language_model.norm.weight"]
    (at / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(CheckpointRefused) as caught:
        run(_recipe(1, 1, folder), since=at)
    vocabulary = build()[0].lm_head.weight.shape[0]
    for told in (
        "dtype bfloat16 there, float32 here",
        f"lm_head.weight {vocabulary + 1}x32 there, {vocabulary}x32 here",
        "model.language_model.norm.weight does not train there, 32 here",
    ):
        assert told in caught.value.problem


def test_the_trainers_learner_is_killed_in_the_middle_of_a_step(runs, folder, ray_cluster):
    """LearnerGroup over Ray: the same figures as one rank, its weights in a file, and its end."""
    recipe = _recipe(2, 2, folder, ray_address=ray_cluster)
    group = LearnerGroup(recipe, folder / "start", ())
    first, second = _batches(recipe, folder)
    figures = group.step(first, group.reference(first))
    assert figures["loss"] == pytest.approx(runs(1, 1)["figures"][0]["loss"], rel=1e-6)
    with group.parcel() as parcel:
        assert Path(parcel.info["path"]).stat().st_size > 4 * sum(t.numel() for t in runs(1, 1)["state"].values())
    references = group.reference(second)
    pid = group._ranks._places[1].pid
    threading.Timer(0.05, partial(os.kill, pid, signal.SIGKILL)).start()
    started = time.monotonic()
    with pytest.raises(RankDied, match=rf"rank 1 of 2 \(process {pid} .*was killed \(SIGKILL\).*in `step`"):
        while True:
            group.step(second, references)
    assert time.monotonic() - started < 60
    group.close()
