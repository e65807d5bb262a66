"""The contract test: each built-in reward passes it, and each kind of bad reward fails the check it should."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rlvlm_rewards import check
from rlvlm_rewards.check import BadUsage, Finding, check_reward

_BAD = """
import itertools, os, re, time
from rlvlm_rewards import Failure, Score, final_answer

def exact(sample):
    return float(final_answer(sample.completion) == sample.answer)

def holds(sample):
    return float(sample.answer in sample.completion)

def any_box(sample):
    return float("{" + sample.answer + "}" in sample.completion)

def generous(sample):
    return 1.0

def trusting(sample):
    return float("full marks" in sample.completion)

turns = itertools.count()

def flaky(sample):
    return 0.0 if next(turns) % 2 else 0.125

def large(sample):
    return 3.0

def only_ascii(sample):
    return float(sample.completion.encode("ascii") == b"")

def parses(sample):
    import json
    return 0.0 * bool(json.loads(sample.completion.split("</think>")[-1] or "0"))

def dies(sample):
    if "NaN" in sample.completion:
        os.abort()
    return 0.0

def hangs(sample):
    if "NaN" in sample.completion:
        re.fullmatch("(a|aa)+b", "a" * 100)  # holds the interpreter: no thread goes on
    return 0.0

def blank(sample):
    return float(not final_answer(sample.completion))

def picky(sample):
    return Score(failure=Failure.UNPARSABLE_REFERENCE, detail="no JSON") if sample.answer[0] != "{" else 0.0

def noisy(sample):
    print("words on the standard output")
    return 0.0
"""


@pytest.fixture
def plugin(tmp_path: Path) -> Path:
    (tmp_path / "rewards.py").write_text(_BAD)
    return tmp_path / "rewards.py"


def _failed(findings: list[Finding]) -> set[str]:
    return {found.check for found in findings if found.passed is False}


def test_a_good_reward_passes_all_that_applies(plugin: Path) -> None:
    findings = list(check_reward(f"{plugin}:exact", {}))
    assert [found.check for found in findings] == [
        "right answers get their credit",
        "no credit: empty answer",
        "no credit: every option",
        "no credit: answer copied from the prompt",
        "no credit: repeated boxes",
        "no credit: a thousand numbers",
        "no credit: instruction to the grader",
        "safe on empty completions",
        "safe on huge completions (1 MB)",
        "safe on odd unicode",
        "safe on adversarial completions",
        "bounded",
        "deterministic",
    ]
    assert [found.passed for found in findings] == [None, *[True] * 12]


_SAFE = (
    "safe on empty completions, safe on huge completions (1 MB), safe on odd unicode, safe on adversarial completions"
)
_HACKS = (
    "no credit: empty answer, no credit: every option, no credit: answer copied from the prompt, "
    "no credit: repeated boxes, no credit: a thousand numbers, no credit: instruction to the grader"
)


@pytest.mark.parametrize(
    ("name", "failed"),
    [
        (
            "holds",
            "no credit: every option, no credit: answer copied from the prompt, no credit: repeated boxes, "
            "no credit: a thousand numbers",  # 12 is within 112
        ),
        ("any_box", "no credit: repeated boxes"),
        ("generous", _HACKS),
        ("trusting", "no credit: instruction to the grader"),
        ("blank", "no credit: empty answer"),
        ("flaky", "deterministic"),
        ("large", f"right answers get their credit, {_SAFE}, bounded"),
        ("only_ascii", "safe on odd unicode"),
        ("dies", "adversarial completions: numbers that are none"),
        ("picky", "right answers get their credit"),
        ("noisy", ""),
    ],
)
def test_a_bad_reward_fails_its_check(plugin: Path, name: str, failed: str) -> None:
    findings = list(check_reward(f"{plugin}:{name}", {}))
    assert _failed(findings) == ({*failed.split(", ")} if failed else set())


def test_a_parser_that_raises_on_nesting_fails(plugin: Path) -> None:
    findings = {found.check: found for found in check_reward(f"{plugin}:parses", {})}
    assert findings["safe on adversarial completions"].passed is False
    assert "JSONDecodeError" in findings["safe on adversarial completions"].detail


def test_a_reward_that_holds_the_interpreter_is_ended(plugin: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "_SILENCE_S", 4.0)
    *_, last = check_reward(f"{plugin}:hangs", {})
    assert (last.check, last.passed) == ("adversarial completions: numbers that are none", False)
    assert "no answer for 4 s" in last.detail


def _samples(folder: Path, *rows: dict[str, Any]) -> Path:
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "samples.jsonl"


def test_samples_say_what_is_right(plugin: Path, tmp_path: Path) -> None:
    right = {"completion": "so</think>a cat", "answer": "a cat", "expected": 1}
    wrong = {"completion": "so</think>a dog", "answer": "a cat", "expected": 0.0}
    first, *_ = check_reward(f"{plugin}:exact", {}, _samples(tmp_path, right, wrong))
    assert (first.passed, first.detail) == (True, "2 samples")
    first, *_ = check_reward(f"{plugin}:exact", {}, _samples(tmp_path, right, {**wrong, "expected": 0.5}))
    assert first.passed is False
    assert first.detail == "1 of 2: 'so</think>a dog' with the reference 'a cat' gets 0 instead of 0.5"


@pytest.mark.parametrize(
    ("name", "options", "samples", "said"),
    [
        ("fromat", {}, None, "did you mean 'format'"),
        ("language", {"scripts": []}, None, "scripts is []; give a list"),
        ("format", {}, "", "it has no line"),
        ("format", {}, '{"completion": "a"}', "line 1: KeyError: 'answer'; write {"),
        ("format", {}, '\n{"completion": "a", "answer": "b", "expected": "c"}', "line 2: ValueError"),
        ("format", {}, "[]", "line 1: "),
    ],
)
def test_bad_usage(tmp_path: Path, name: str, options: dict[str, Any], samples: str | None, said: str) -> None:
    file = tmp_path / "samples.jsonl"
    if samples is not None:
        file.write_text(samples)
    with pytest.raises(BadUsage) as caught:
        list(check_reward(name, options, file if samples is not None else None))
    assert said in str(caught.value)


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "rlvlm_rewards.check", *arguments], capture_output=True, text=True)


def test_the_command_line_prints_a_table_and_ends_with_a_status(plugin: Path) -> None:
    good = _run(f"{plugin}:exact")
    assert good.returncode == 0 and len(good.stdout.splitlines()) == 13 and "pass    bounded " in good.stdout
    bad = _run(f"{plugin}:generous")
    assert bad.returncode == 1 and "FAIL    no credit: empty answer " in bad.stdout
    wrong = _run("language", "--options", 'scripts=["Klingon"]')
    assert wrong.returncode == 2 and "give names of Unicode scripts" in wrong.stderr and wrong.stdout == ""
    assert _run("format", "--options", "tags").returncode == 2
    assert _run().returncode == 2
