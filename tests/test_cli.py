"""The command line, run as a user runs it."""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import rlvlm
from rlvlm.cli import _telling_how_to_go_on, main
from rlvlm.recipe.errors import RecipeError, RlvlmError, RunError
from rlvlm.recipe.load import load_recipe
from rlvlm.run import RunFolder

_HEAVY = {"torch", "vllm", "transformers", "datasets", "deepspeed", "trl", "sklearn"}


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "demo.yaml"
    path.write_text(f"name: demo\noutput: {tmp_path}/runs\ntasks:\n  train:\n  - generator: digits_sum\n")
    return path


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0 and capsys.readouterr().out == f"rlvlm {rlvlm.__version__}\n"


def test_check_prints_the_resolved_recipe(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(recipe), "rl.iterations=3"]) == 0
    shown = capsys.readouterr()
    assert shown.err == f"{recipe} is fine\n"
    (tmp_path / "shown.yaml").write_text(shown.out)
    assert load_recipe(tmp_path / "shown.yaml") == load_recipe(recipe, ["rl.iterations=3"])
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["check", "none.yaml"], "rlvlm: recipe = none.yaml: no such file or directory; give the path of a recipe"),
        (["check", "RECIPE", "rl.promts=3"], "rlvlm: rl.promts = 3: no such key; did you mean rl.prompts?\n"),
        (["train", "RECIPE", "rl.promts=3"], "rlvlm: rl.promts = 3: no such key; did you mean rl.prompts?\n"),
        (
            ["train", "RECIPE", "--resume", "threads=0"],
            "rlvlm: threads = 0: out of range; give a whole number of at least 1\n",
        ),
        (["train", "RECIPE", "policy.model=nope"], "rlvlm: policy.model = nope: no such directory; give tiny_kimi, "),
        (["train", "RECIPE", "--resume"], "holds no run to resume; leave out --resume to start it\n"),
        (
            ["report", "nowhere"],
            "rlvlm: run = nowhere: no run is in this folder; give a run folder, like runs/tiny_demo\n",
        ),
        (
            ["train", "RECIPE", "tasks.train[0].generator=FOLDER/mine.py:Mine"],
            "raised NameError: name 'undefined' is not defined (FOLDER/mine.py:2); mend it there\n",
        ),
        (
            ["train", "RECIPE", "tasks.train[0].reward=FOLDER/mine.py:reward"],
            "raised NameError: name 'undefined' is not defined (FOLDER/mine.py:2); mend it there\n",
        ),
        (["check", "RECIPE", "a=1", "b=2"], "rlvlm: a = 1: no such key; a recipe has the keys name, "),
        (["reward", "check", "exct"], "rlvlm: reward = exct: is not known; did you mean 'exact'?"),
        (
            ["reward", "check", "format", "--options", "tag=x"],
            "reward = format: has no option 'tag'; did you mean 'tags'?",
        ),
        (
            ["reward", "check", "format", "--samples", "none.jsonl"],
            "No such file or directory: 'none.jsonl'; give a file",
        ),
    ],
)
def test_bad_input_is_one_message_and_exit_code_2(
    recipe: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (recipe.parent / "mine.py").write_text("import json\nundefined\n")
    places = {"RECIPE": str(recipe), "FOLDER": str(recipe.parent)}
    for name, place in places.items():
        arguments = [argument.replace(name, place) for argument in arguments]
        message = message.replace(name, place)
    assert main(arguments) == 2
    told = capsys.readouterr()
    assert message in told.err and "Traceback" not in told.err and told.out == ""


def test_checking_a_reward(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.py").write_text(
        "from rlvlm_rewards import final_answer\n"
        "def right(sample, off=''): return float(final_answer(sample.completion) == sample.answer + off)\n"
        "def holds(sample): return float(sample.answer in sample.completion)\n"
    )
    samples = tmp_path / "samples.jsonl"
    samples.write_text('{"completion": "</think>a cat", "answer": "a cat", "expected": 1}\n')
    place = f"{tmp_path}/mine.py"
    assert main(["reward", "check", f"{place}:right", "--samples", str(samples)]) == 0
    told = capsys.readouterr()
    assert "right answers get their credit" in told.out and "FAIL" not in told.out and told.err == ""
    assert main(["reward", "check", f"{place}:right", "--samples", str(samples), "--options", "off=x"]) == 1
    told = capsys.readouterr()
    assert told.out.count("FAIL") == 1 and "1 of 13 checks failed; mend the reward" in told.err
    assert main(["reward", "check", f"{place}:holds"]) == 1
    assert capsys.readouterr().out.count("FAIL") == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: COMMAND"),
        (["reward"], "required: WHAT"),
        (["reward", "check"], "required: plugin"),
        (["reward", "check", "exact", "--smaples=3"], "--smaples=3 is not known here"),
        (["train"], "required: RECIPE\n"),
        (["train", "r.yaml", "--rl.prompts=4"], "--rl.prompts=4 is not known here; keys of the recipe take no dashes"),
        (["train", "r.yaml", "--resum3"], "--resum3 is not known here\n"),
        (["report", "a", "b=1"], "b=1 is not known here"),
    ],
)
def test_wrong_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2 and message in capsys.readouterr().err


def test_train_refuses_a_folder_with_another_run(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loaded = load_recipe(recipe)
    with RunFolder.of(loaded) as run:
        run.create(loaded)
    assert main(["train", str(recipe)]) == 2
    assert (
        "already holds a run; go on with it: --resume, or choose another name, like name=demo-2"
        in capsys.readouterr().err
    )
    assert main(["train", str(recipe), "seed=1", "--resume"]) == 2
    assert "seed = 1: the run was started with 0" in capsys.readouterr().err


def test_exit_codes_of_the_errors() -> None:
    assert (RlvlmError.exit_code, RunError.exit_code, RecipeError.exit_code) == (1, 1, 2)
    assert str(RunError("parity is 0.2 at iteration 3, above parity.max = 0.001", "see the report")) == (
        "parity is 0.2 at iteration 3, above parity.max = 0.001; see the report"
    )


@pytest.mark.parametrize(
    "error", [RuntimeError("a bug"), RunError("the engine died", "look above"), KeyboardInterrupt()]
)
def test_what_ends_a_run_tells_how_to_go_on(error: BaseException, tmp_path: Path) -> None:
    arguments = argparse.Namespace(recipe=Path("my recipe.yaml"), overrides=["rl.temperature=0.9", "name=x"])
    with pytest.raises(type(error)) as raised, _telling_how_to_go_on(RunFolder(tmp_path / "x"), arguments):
        raise error
    assert raised.value.__notes__ == [
        f"The run is in {tmp_path / 'x'}; it goes on with:\n"
        "  rlvlm train 'my recipe.yaml' rl.temperature=0.9 name=x --resume"
    ]


def test_checking_loads_nothing_heavy_and_is_quick(recipe: Path) -> None:
    program = (
        "import sys, time\nfrom rlvlm.cli import main\n"
        f"code = main(['check', {str(recipe)!r}])\n"
        f"print(code, sorted({_HEAVY!r} & set(sys.modules)), time.process_time())"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    code, heavy, seconds = re.fullmatch(r"(\d) (\[.*\]) ([\d.]+)", ended.stdout.splitlines()[-1]).groups()  # type: ignore[union-attr]
    assert (code, heavy) == ("0", "[]")
    assert float(seconds) < 1.0


def test_as_a_module_and_ctrl_c(recipe: Path, tmp_path: Path) -> None:
    generator = tmp_path / "slow.py"
    generator.write_text("import time\nprint('waiting', flush=True)\ntime.sleep(60)\n")
    command = [sys.executable, "-m", "rlvlm", "check", str(recipe), f"tasks.train[0].generator={generator}:Slow"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == "waiting\n"
        os.kill(process.pid, signal.SIGINT)
        assert process.wait(timeout=30) == 130
        assert process.stderr.read() == "rlvlm: interrupted\n"
