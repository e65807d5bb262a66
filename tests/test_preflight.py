"""What preflight finds, each on the real thing: files, a port that is taken, a model larger than the machine."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rlvlm import memory
from rlvlm.preflight import (
    check_compile_locks,
    check_compilers_there,
    check_memory,
    check_model,
    check_output,
    check_port,
    check_ray,
    check_rewards,
    check_shared_memory,
    preflight,
)
from rlvlm.recipe.errors import RecipeError
from rlvlm.recipe.load import recipe_from
from rlvlm.recipe.schema import Recipe

TIB = 1 << 40


def _recipe(tmp_path: Path, **keys: Any) -> Recipe:
    data = {"name": "demo", "output": str(tmp_path / "runs"), "tasks": {"train": [{"generator": "digits_sum"}]}}
    return recipe_from({**data, **keys})


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A directory with the names that a checkpoint has; bfloat16 weights of 4 TiB that take no room (a sparse file)."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"text_config": {"dtype": "bfloat16"}}))
    for name in ("preprocessor_config.json", "tokenizer.json"):
        (folder / name).write_text("{}")
    with open(folder / "model.safetensors", "wb") as file:
        os.truncate(file.fileno(), 4 * TIB)
    return folder


def test_a_good_recipe_passes_and_writes_nothing(tmp_path: Path) -> None:
    preflight(_recipe(tmp_path))
    assert not list(tmp_path.iterdir())


def test_everything_is_told_at_once(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("")
    tasks = {"train": [{"generator": "digit_sum"}], "evaluation": [{"generator": "digits_sum", "reward": "exct"}]}
    with pytest.raises(RecipeError) as raised:
        preflight(_recipe(tmp_path, tasks=tasks, policy={"model": "nowhere"}))
    assert {error.key: error.value for error in raised.value.errors} == {
        "tasks.train[0].generator": "digit_sum",
        "tasks.evaluation[0].reward": "exct",
        "policy.model": "nowhere",
        "output": str(tmp_path / "runs"),
    }
    told = str(raised.value)
    assert "did you mean 'exact'?" in told and "did you mean 'digits_sum'?" in told
    assert not any(error.problem.startswith(error.key) for error in raised.value.errors)  # the key is told once


def test_a_reward_that_cannot_be_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = Path("mine.py")
    file.write_text("def reward(sample): return 1.0\n")
    good = {"train": [{"generator": "digits_sum", "reward": f"{file}:reward"}]}
    check_rewards(_recipe(tmp_path, tasks=good))
    with pytest.raises(RecipeError, match=r"tasks.train\[0\].reward = mine.py:rewrad: .*did you mean 'reward'"):
        check_rewards(_recipe(tmp_path, tasks={"train": [{"generator": "digits_sum", "reward": f"{file}:rewrad"}]}))


def test_the_rewards_of_the_recipe_and_their_options(tmp_path: Path) -> None:
    good = {"parts": [{"reward": "number", "weight": 0.8, "options": {"absolute": 0.1}}, {"reward": "format"}]}
    tasks = {
        "train": [{"generator": "digits_sum", "reward": "mine"}, {"generator": "digits_largest", "reward": "mien"}]
    }
    check_rewards(_recipe(tmp_path, tasks={"train": tasks["train"][:1]}, rewards={"named": {"mine": good}}))
    off = {"parts": [{"reward": "number", "options": {"absolut": 0.1}}, {"reward": "grounding", "options": {}}]}
    with pytest.raises(RecipeError) as raised:
        check_rewards(_recipe(tmp_path, tasks=tasks, rewards={"named": {"mine": good, "off": off}}))
    told = str(raised.value)
    assert [error.key for error in raised.value.errors] == [
        "rewards.named.off.parts[0].options.absolut",
        "rewards.named.off.parts[1].reward",
        "tasks.train[1].reward",
    ]
    assert "absolut = 0.1: number has no option 'absolut'; did you mean 'absolute'?; it has absolute, relative" in told
    assert "parts[1].reward = grounding: option 'coordinates' is missing; give 'pixels' or 'thousandths'" in told
    assert "this recipe's own are mine, off" in told


def test_coordinates_are_said_in_the_recipe(tmp_path: Path) -> None:
    def check(options: dict[str, Any]) -> None:
        named = {"boxes": {"parts": [{"reward": "grounding", "options": options}]}}
        tasks = {"train": [{"generator": "digits_sum", "reward": "boxes"}]}
        check_rewards(_recipe(tmp_path, tasks=tasks, rewards={"named": named}))

    check({"coordinates": "thousandths"})
    with pytest.raises(RecipeError) as raised:
        check({"coordinates": "promille"})
    assert (raised.value.key, raised.value.value) == ("rewards.named.boxes.parts[0].options.coordinates", "promille")
    assert raised.value.mend == "give 'pixels' or 'thousandths'"
    with pytest.raises(RecipeError) as raised:
        check_rewards(_recipe(tmp_path, tasks={"train": [{"generator": "digits_sum", "reward": "grounding"}]}))
    assert str(raised.value) == (
        "tasks.train[0].reward = grounding: option 'coordinates' is missing; give 'pixels' or 'thousandths'; name it "
        "with its options: rewards.named.my_grounding.parts=[{reward: grounding, options: {coordinates: ...}}], and "
        "reward: my_grounding"
    )


@pytest.mark.parametrize("name", ["tiny_kimi", "moonshotai/Kimi-VL-A3B-Instruct"])
def test_models_that_are_no_directory(tmp_path: Path, name: str) -> None:
    check_model(_recipe(tmp_path, policy={"model": name}))


@pytest.mark.parametrize("name", ["tinykimi", "./models/x", "models/a/b", "/nowhere/model", "~/no such model"])
def test_a_directory_that_is_not_there(tmp_path: Path, name: str) -> None:
    with pytest.raises(RecipeError) as raised:
        check_model(_recipe(tmp_path, policy={"model": name}))
    assert (raised.value.key, raised.value.value, raised.value.problem) == ("policy.model", name, "no such directory")


@pytest.mark.parametrize(
    ("lost", "problem"),
    [
        ("config.json", "the directory has no config (config.json)"),
        ("model.safetensors", "the directory has no weights (*.safetensors or *.bin)"),
        (
            "preprocessor_config.json",
            "the directory has no processor (preprocessor_config.json or processor_config.json)",
        ),
        ("tokenizer.json", "the directory has no tokenizer (tokenizer.json or tokenizer_config.json)"),
    ],
)
def test_a_directory_that_lacks_a_part(tmp_path: Path, model: Path, lost: str, problem: str) -> None:
    recipe = _recipe(tmp_path, policy={"model": str(model)})
    check_model(recipe)
    (model / lost).unlink()
    with pytest.raises(RecipeError) as raised:
        check_model(recipe)
    assert (raised.value.key, raised.value.value, raised.value.problem) == ("policy.model", str(model), problem)


def test_a_file_or_a_broken_config(tmp_path: Path, model: Path) -> None:
    with pytest.raises(RecipeError, match="this is a file; give the directory"):
        check_model(_recipe(tmp_path, policy={"model": str(model / "config.json")}))
    (model / "config.json").write_text("{")
    with pytest.raises(RecipeError, match=r"config.json is not JSON: .*; copy the file anew"):
        check_model(_recipe(tmp_path, policy={"model": str(model)}))


def test_too_little_shared_memory(tmp_path: Path, model: Path) -> None:
    with pytest.raises(RecipeError) as raised:
        check_shared_memory(_recipe(tmp_path, policy={"model": str(model), "dtype": "bfloat16"}))
    assert "free of the 4096.0 GiB needed" in raised.value.problem  # 4 TiB of weights and a little more
    assert "--shm-size=4097g" in raised.value.mend
    with pytest.raises(RecipeError, match=r"8192\.0 GiB needed"):  # the same parameters in float32
        check_shared_memory(_recipe(tmp_path, policy={"model": str(model), "dtype": "float32"}))


def test_too_little_disk(tmp_path: Path, model: Path) -> None:
    # 2 Ti parameters x (2 bytes of weights + 12 of optimizer) x (2 checkpoints kept + 1 being written) + 0.5 GiB.
    with pytest.raises(RecipeError) as raised:
        check_output(_recipe(tmp_path, policy={"model": str(model), "dtype": "bfloat16"}))
    assert raised.value.key == "output" and "free of the 86016.5 GiB needed" in raised.value.problem


def test_several_ranks_without_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_ray(_recipe(tmp_path, learner={"ranks": 2}))
    monkeypatch.setitem(sys.modules, "ray", None)
    check_ray(_recipe(tmp_path))
    with pytest.raises(RecipeError, match=r"learner\.ranks = 2: several ranks need Ray.*install rlvlm\[ray\]"):
        check_ray(_recipe(tmp_path, learner={"ranks": 2}))


def test_a_port_in_use(tmp_path: Path) -> None:
    with socket.socket() as server:
        server.bind(("", 0))
        server.listen()
        port = server.getsockname()[1]
        with pytest.raises(RecipeError) as raised:
            check_port(_recipe(tmp_path, learner={"port": port}))
    message = f"learner.port = {port}: address already in use; give another port, or 0 for one that is free"
    assert str(raised.value) == message
    check_port(_recipe(tmp_path, learner={"port": port}))
    check_port(_recipe(tmp_path, learner={"port": 0}))


def test_an_output_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("")
    with pytest.raises(RecipeError, match=r"output = .*runs is a file; give a folder"):
        check_output(_recipe(tmp_path))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_an_output_that_is_not_writable(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir(mode=0o500)
    with pytest.raises(RecipeError, match="is not writable for this user; give another folder"):
        check_output(_recipe(tmp_path))


@pytest.mark.parametrize(
    ("keys", "gigabytes"),
    [
        ({"policy": {"dtype": "bfloat16"}}, 2 + 2 + 12),
        ({}, 4 + 4 + 12),
        ({"policy": {"dtype": "bfloat16"}, "learner": {"zero_stage": 1, "ranks": 4}}, 2 + 2 + 12 / 4),
        ({"policy": {"dtype": "bfloat16"}, "learner": {"zero_stage": 2, "ranks": 4}}, 2 + 2 / 4 + 12 / 4),
        ({"policy": {"dtype": "bfloat16"}, "learner": {"zero_stage": 3, "ranks": 4}}, (2 + 2 + 12) / 4),
        ({"policy": {"dtype": "bfloat16", "lora": {}}}, 2 + 0.02 * (2 + 12)),
    ],
)
def test_memory_of_a_rank_for_a_thousand_million_parameters(tmp_path: Path, keys: dict, gigabytes: float) -> None:
    assert memory.learner_bytes(_recipe(tmp_path, **keys), 10**9) == pytest.approx(gigabytes * 1e9)


def test_activations_by_hand(tmp_path: Path) -> None:
    config = {"text_config": {"hidden_size": 2048, "num_hidden_layers": 27, "vocab_size": 163840}}
    keys = {"policy": {"dtype": "bfloat16"}, "learner": {"row_tokens": 16384, "logp_chunk": 256}}
    logits = 256 * 163840 * 12
    assert memory.activation_bytes(_recipe(tmp_path, **keys), config) == 16384 * 2048 * 27 * 17 * 2 + logits
    keys["learner"]["gradient_checkpointing"] = True
    assert memory.activation_bytes(_recipe(tmp_path, **keys), config) == 16384 * 2048 * 27 * 2 + logits


def test_a_model_that_does_not_fit_into_memory(tmp_path: Path, model: Path) -> None:
    with pytest.raises(RecipeError, match=r"needs about .* of memory .* has .* free; give policy.lora") as raised:
        check_memory(_recipe(tmp_path, policy={"model": str(model), "dtype": "bfloat16"}, stages=["rl"]))
    assert raised.value.key == "policy.model"
    check_memory(_recipe(tmp_path))


def test_the_lock_of_a_killed_compile(tmp_path: Path) -> None:
    check_compile_locks(tmp_path)
    lock = tmp_path / "py311_cpu" / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    with pytest.raises(RecipeError, match=f"rm {lock}"):
        check_compile_locks(tmp_path)
    compiler = tmp_path / "ninja"  # while something compiles the lock is rightly there
    compiler.symlink_to("/bin/sleep")
    with subprocess.Popen([str(compiler), "30"]) as compiling:
        check_compile_locks(tmp_path)
        compiling.kill()


def test_a_missing_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    check_compilers_there()
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RecipeError, match="no C compiler is on the PATH"):
        check_compilers_there()
