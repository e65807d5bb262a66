"""What the README tells people to write and to type works."""

from __future__ import annotations

import asyncio
import json
import re
import shlex
from pathlib import Path

import pytest
from PIL import Image
from rlvlm_rewards import Failure, Sample, load_reward

from rlvlm.cli import _parse, main
from rlvlm.recipe.load import load_recipe
from rlvlm.recipe.schema import Source
from rlvlm.tasks import ImageStore, draw_pool

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def _blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


def _commands(program: str) -> list[list[str]]:
    lines = [shlex.split(line, comments=True) for block in _blocks("bash") for line in block.splitlines()]
    return [words[1:] for words in lines if words and words[0] == program]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with every file of the README: the blocks that begin with `# its_name`."""
    for block in [*_blocks("python"), *_blocks("yaml")]:
        name = re.match(r"# (\w+\.\w+)\n", block)
        assert name, block
        (tmp_path / name[1]).write_text(block)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _score(reward: str, completion: str, answer: str) -> float | Failure | None:
    result = asyncio.run(load_reward(reward)(Sample(completion=completion, answer=answer, task="t")))
    return result.failure or result.value


def test_the_rewards(folder: Path) -> None:
    for completion, answer, expected in (
        ("a1 7 (7)</think>12", "12", 1.0),
        ("</think>\\boxed{9}", "12", 0.7),
        ("</think>30", "12", 0.0),
        ("</think>twelve", "12", 0.0),
        ("never ends 12", "12", 0.0),
        ("</think>12", "a dozen", Failure.UNPARSABLE_REFERENCE),
    ):
        assert _score("my_reward.py:close", completion, answer) == expected
    for form in ("judged", "as_in_trl"):
        assert _score(f"my_reward.py:{form}", "</think>it is 12", "12") == 1.0
        assert _score(f"my_reward.py:{form}", "</think>it is 13", "12") == 0.0


def test_the_generator(folder: Path) -> None:
    pool = draw_pool([Source(generator="dots.py:Dots")], 60, 0, "train", ImageStore(folder / "images"))
    assert [task.level for task in pool[:4]] == [1, 2, 3, 1]
    for task in pool:
        chain = task.chains["medium"]
        seen = [int(chain.text[start:end]) for start, end in chain.seen]
        assert len(seen) == task.level + 1 and sum(seen) == int(task.answer)
        assert _score(task.reward, f"{chain.text}</think>{task.answer}", task.answer) == 1.0


def test_the_recipe(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "receipts").mkdir()
    Image.new("RGB", (8, 8)).save(folder / "receipts" / "0.png")
    row = {"question": "total ?", "total": 12, "photo": "0.png", "reasoning": "7 (7) 5 (12)"}
    (folder / "receipts" / "train.jsonl").write_text(json.dumps(row))
    assert main(["check", "receipts.yaml"]) == 0, capsys.readouterr().err
    task = draw_pool(load_recipe("receipts.yaml").tasks.train[:1], 1, 0, "train", ImageStore(folder / "images"))[0]
    assert (task.answer, len(task.images), task.chains["medium"].text) == ("12", 1, "7 (7) 5 (12)")


def test_every_rlvlm_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    commands = [_parse(words) for words in _commands("rlvlm")]
    assert len(commands) >= 4
    for arguments in commands:
        if "recipe" in arguments:
            load_recipe(arguments.recipe, arguments.overrides)


def test_what_it_says_about_cheating(folder: Path) -> None:
    from rlvlm_rewards.check import check_reward

    def failed(reward: str) -> set[str]:
        return {found.check for found in check_reward(f"my_reward.py:{reward}", {}) if found.passed is False}

    assert failed("close") == set()
    assert "no credit: every option" in failed("judged") & failed("as_in_trl")


def test_every_make_command() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
    assert targets
    asked = {word for words in _commands("make") for word in words if "=" not in word}
    assert {"demo", "test"} <= asked <= set(targets[1].split())


def test_links_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", README)
    assert {"CONTRIBUTING.md", "docs/recipe.md", "LICENSE"} <= set(links)
    assert [link for link in links if "://" not in link and not (ROOT / link).exists()] == []


def test_every_built_in_generator_is_named() -> None:
    from rlvlm.tasks.mix import GENERATORS

    assert [name for name in GENERATORS if name not in README] == []
