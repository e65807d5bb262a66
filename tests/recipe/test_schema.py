"""The checks that no single key can tell: each names the key, its value and numbers that would do."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlvlm.recipe.errors import RecipeError
from rlvlm.recipe.load import load_recipe, recipe_from
from rlvlm.recipe.schema import Clip, Objective


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            "rl.prompts=30 | rl.minibatches=4",
            "rl.minibatches = 4: does not divide rl.prompts = 30; give 3 or 5, or rl.prompts=28 or 32",
        ),
        (
            "rl.prompts=7 | rl.minibatches=8",
            "rl.minibatches = 8: does not divide rl.prompts = 7; give 1 or 7, or rl.prompts=8",
        ),
        (
            "sft.batch=50 | sft.ranks=4",
            "sft.ranks = 4: does not divide sft.batch = 50; give 2 or 5, or sft.batch=48 or 52",
        ),
        ("rl.pool=31", "rl.pool = 31: smaller than rl.prompts = 32; give at least 32, or rl.prompts=31"),
        ("rl.samples=1", "rl.samples = 1: one response is its own mean, so its advantage is always 0; give at least 2"),
        (
            "rl.max_tokens=512",
            "rl.max_tokens = 512: leaves no room for the prompt in rollout.max_model_len = 512; "
            "give fewer, or a larger rollout.max_model_len",
        ),
        (
            "stages=[rl,sft]",
            "stages = [rl, sft]: each stage at most once, sft before rl; give [sft, rl], [sft] or [rl]",
        ),
        (
            "stages=[sft,sft]",
            "stages = [sft, sft]: each stage at most once, sft before rl; give [sft, rl], [sft] or [rl]",
        ),
        (
            "stages=[rl]",
            "stages = [rl]: policy.model = tiny_kimi starts untrained, and RL cannot teach it to read; "
            "give stages=[sft,rl], or a policy.model that has been fine-tuned",
        ),
        (
            "tasks.train[0].dataset=a.parquet",
            "tasks.train[0]: has a generator and a dataset; give one of the two; "
            "two sources are two elements of the list",
        ),
        (
            "tasks.train[0].generator=null",
            "tasks.train[0]: has neither a generator nor a dataset; give one of the two; "
            "two sources are two elements of the list",
        ),
        (
            "tasks.evaluation=[{dataset: a.parquet}]",
            "tasks.evaluation[0].reward: missing: a.parquet brings no verifier; "
            "name a reward, or give path/to/file.py:function",
        ),
        (
            "tasks.train=[{dataset: a.csv, reward: exact, levels: [1]}]",
            "tasks.train[0].levels = [1]: levels are what a generator draws; "
            "leave it out; tasks.train[0].columns.level names the column with the level",
        ),
        (
            "tasks.train[0].split=test",
            "tasks.train[0].split = test: a generator has no split; leave it out, or give a dataset",
        ),
        (
            "tasks.train[0].columns.answer=label",
            "tasks.train[0].columns = {prompt: prompt, answer: label, image: null, level: null, chain: null}: "
            "a generator has no columns; leave it out, or give a dataset",
        ),
        (
            "evaluation.tasks=1 | tasks.train=[{generator: a}, {generator: b}]",
            "evaluation.tasks = 1: too few for 2 sources of held-out tasks; give at least 2",
        ),
        (
            "policy.model=org/m | policy.tiny.layers=4",
            "policy.tiny: describes tiny_kimi, but policy.model is org/m; leave it out, or give policy.model=tiny_kimi",
        ),
        (
            "policy.tiny.experts_per_token=9",
            "policy.tiny.experts_per_token = 9: more than policy.tiny.experts = 8; give at most 8",
        ),
        (
            "policy.tiny.vision_hidden=40",
            "policy.tiny.vision_hidden = 40: not a multiple of 16 (4 heads with rotary positions in 2 dimensions); "
            "give for example 32",
        ),
        (
            "rollout.max_model_len=4097",
            "rollout.max_model_len = 4097: more positions than tiny_kimi has; give at most 4096",
        ),
    ],
)
def test_cross_checks(minimal: Path, overrides: str, message: str) -> None:
    with pytest.raises(RecipeError) as raised:
        load_recipe(minimal, overrides.split(" | "))
    assert str(raised.value) == message


def test_what_is_allowed(minimal: Path) -> None:
    load_recipe(minimal, ["stages=[rl]", "policy.model=org/tuned"])
    load_recipe(minimal, ["stages=[sft]", "rl.samples=1"])
    load_recipe(minimal, ["rl.max_tokens=511", "rl.pool=32", "rl.prompts=32"])
    load_recipe(minimal, ["tasks.train=[{dataset: a.csv, reward: exact, split: 'train[:5]', columns: {image: scan}}]"])
    load_recipe(minimal, ["tasks.train[0].reward=exact"])  # overrides the generator's own verifier


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            "clip.kind=ppo",
            "rl.objective.clip.kind = ppo: rl.objective.surrogate = log_prob has no ratio to clip; "
            "give mask or none, or surrogate=ratio",
        ),
        (
            "preset=rloo | baseline=logmeanexp",
            "rl.objective.baseline = logmeanexp: tau log mean exp(r/tau) needs a tau, and rl.objective.tau = 0; "
            "give rl.objective.tau=0.1, or baseline=mean",
        ),
        (
            "preset=rest | scale=std",
            "rl.objective.scale = std: the standard deviation is about a mean that is not taken off; "
            "give none, or baseline=mean",
        ),
        (
            "normalisation=fixed",
            "rl.objective.divisor: missing: rl.objective.normalisation = fixed divides by it; "
            "give the usual length of a response in tokens, or 1 for the plain sum",
        ),
        (
            "divisor=24",
            "rl.objective.divisor = 24.0: not read with rl.objective.normalisation = none; "
            "leave it out, or give normalisation=fixed",
        ),
        (
            "clip.kind=mask | clip.epsilon_low=0.5",
            "rl.objective.clip.epsilon_high: missing: rl.objective.clip.kind = mask needs it; give a number",
        ),
        (
            "clip.epsilon_high=0.5",
            "rl.objective.clip.epsilon_high = 0.5: not read with rl.objective.clip.kind = none; "
            "leave it out, or give rl.objective.clip.kind=ppo",
        ),
        (
            "correction.kind=tis | correction.low=0.5",
            "rl.objective.correction.low = 0.5: not read with rl.objective.correction.kind = tis; "
            "leave it out, or give rl.objective.correction.kind=icepop",
        ),
        (
            "correction.kind=icepop | correction.low=1.5",
            "rl.objective.correction.low = 1.5: rejects tokens that engine and learner agree on, whose ratio is 1; "
            "give a number below 1",
        ),
        ("preset=ppo", "rl.objective.preset = ppo: not one of the choices; give opmd, grpo, gspo, rloo or rest"),
        (
            "levle=token",
            "rl.objective.levle = token: no such key; did you mean rl.objective.level?",
        ),
        ("clip=3", "rl.objective.clip = 3: this is a whole number; give a section (kind, epsilon_low, epsilon_high)"),
        (
            "clip.kind=[1]",
            "rl.objective.clip.kind = [1]: not one of the choices; give none, ppo or mask",
        ),
    ],
)
def test_objectives_that_mean_nothing(minimal: Path, overrides: str, message: str) -> None:
    with pytest.raises(RecipeError) as raised:
        load_recipe(minimal, [f"rl.objective.{key}" for key in overrides.split(" | ")])
    assert str(raised.value) == message


def test_a_preset_fills_what_is_not_given(minimal: Path) -> None:
    def objective(*overrides: str) -> Objective:
        return load_recipe(minimal, [f"rl.objective.{key}" for key in overrides]).rl.objective

    grpo = objective("preset=grpo")
    assert (grpo.level, grpo.surrogate, grpo.scale, grpo.normalisation) == ("token", "ratio", "std", "length")
    assert (grpo.clip.kind, grpo.clip.epsilon_low, grpo.clip.epsilon_high) == ("ppo", 0.2, 0.2)
    assert (grpo.tau, grpo.optimizer_reset) == (0.0, False)
    gspo = objective("preset=gspo")
    assert (gspo.level, gspo.clip.epsilon_low, gspo.clip.epsilon_high) == ("sequence", 3e-4, 4e-4)
    assert objective("preset=rloo").baseline == "leave_one_out"
    rest = objective("preset=rest")
    assert (rest.baseline, rest.positives_only, rest.tau) == ("none", True, 0.0)
    assert objective() == objective("preset=opmd") == Objective()
    # what is given stays, the rest of the preset too; another kind of clip leaves the preset's bounds behind
    assert objective("preset=grpo", "tau=0.5") == grpo.model_copy(update={"tau": 0.5})
    wide = objective("preset=grpo", "clip.epsilon_high=0.28").clip
    assert (wide.kind, wide.epsilon_low, wide.epsilon_high) == ("ppo", 0.2, 0.28)
    assert objective("preset=gspo", "clip.kind=none").clip == Clip()
    assert objective("correction.kind=tis").correction.cap == 2.0
    icepop = objective("correction.kind=icepop", "correction.high=4").correction
    assert (icepop.low, icepop.high, icepop.cap) == (0.5, 4.0, None)


def test_a_single_sample_needs_a_baseline_that_is_not_itself(minimal: Path) -> None:
    load_recipe(minimal, ["rl.samples=1", "rl.objective.preset=rest"])


def test_experts_are_shared_out_only_where_that_works(minimal: Path) -> None:
    fits = ["learner.ranks=4", "learner.expert_parallel=2", "learner.balance.kind=off"]
    assert load_recipe(minimal, fits).learner.expert_parallel == 2
    others = ["learner.expert_parallel=3", "learner.zero_stage=3", "learner.offload=optimizer", "rl.router_replay=r2"]
    with pytest.raises(RecipeError) as raised:
        load_recipe(minimal, ["learner.ranks=4", *others, "policy.lora.rank=4"])
    told = str(raised.value).splitlines()
    assert told[0] == "learner.expert_parallel = 3: does not divide learner.ranks = 4; give a divisor of 4"
    key = "learner.expert_parallel = 3: does not work with"
    assert f"{key} learner.zero_stage = 3; give learner.zero_stage=1 or 2, or learner.expert_parallel=1" in told
    assert f"{key} learner.balance.kind = auto; give learner.balance.kind=off, or learner.expert_parallel=1" in told
    assert f"{key} rl.router_replay = r2; give rl.router_replay=none, or learner.expert_parallel=1" in told
    assert len(told) == 6


def test_every_failed_check_is_told(minimal: Path) -> None:
    with pytest.raises(RecipeError) as raised:
        load_recipe(minimal, ["rl.prompts=7", "rl.pool=3", "stages=[rl]"])
    assert [error.key for error in raised.value.errors] == ["stages", "rl.minibatches", "rl.pool"]


@settings(deadline=None)
@given(prompts=st.integers(1, 300), minibatches=st.integers(1, 300))
def test_the_mend_of_a_batch_does_divide(prompts: int, minibatches: int) -> None:
    def data(prompts: int, minibatches: int) -> dict[str, object]:
        rl = {"prompts": prompts, "minibatches": minibatches, "pool": 10_000}
        return {"name": "x", "tasks": {"train": [{"generator": "g"}]}, "rl": rl}

    if prompts % minibatches == 0:
        assert recipe_from(data(prompts, minibatches)).rl.prompts == prompts
        return
    with pytest.raises(RecipeError) as raised:
        recipe_from(data(prompts, minibatches))
    error = raised.value
    assert (error.key, error.value) == ("rl.minibatches", minibatches)
    first, second = error.mend.removeprefix("give ").split(", or rl.prompts=")
    for divisor in first.split(" or "):
        recipe_from(data(prompts, int(divisor)))
    for multiple in second.split(" or "):
        recipe_from(data(int(multiple), minibatches))
