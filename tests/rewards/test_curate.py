"""Test generation: k1.5's two rules on tables of outputs that were worked out by hand."""

from __future__ import annotations

import asyncio
import json
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rlvlm_rewards import Sample, load_reward
from rlvlm_rewards.code import Curated, GeneratorFailed, SandboxFailed, curate
from rlvlm_rewards.code.curate import _judged, _Output, _Runner
from rlvlm_sandbox import Limits, Outcome, Run, Sandbox
from rlvlm_sandbox.grading import CallTests, StdioTests

FOUR = "print(int(input()) % 4)"  # the inputs 0, 1, 2, 3, again and again


def made(generator: str, solutions: list[str], **options: object) -> Curated:
    async def work() -> Curated:
        async with Sandbox(backend="unsafe-subprocess", workers=2) as sandbox:
            return await curate(generator, solutions, sandbox=sandbox, **options)

    return asyncio.run(work())


def program(wrong: set[int]) -> str:
    """Prints 10 times its input; for the inputs in `wrong` its own memory address instead, which nobody else prints."""
    return f"x = int(input())\nprint(id(object()) if x in {wrong} else 10 * x)"


def solutions(wrong: dict[int, int]) -> list[str]:
    """Ten programs. wrong: for an input, how many of them are wrong there, counted from the last."""
    return [program({x for x, count in wrong.items() if index >= 10 - count}) for index in range(10)]


def test_seven_of_ten_make_a_test_and_six_do_not() -> None:
    """Wrong on input 1: 3 of 10, so it counts. On input 2: 4 of 10, so it does not. Hence 7 of 10 pass all."""
    result = made(FOUR, solutions({1: 3, 2: 4}), tests=8)
    assert result.inputs == ("0\n", "1\n", "2\n", "3\n")
    assert result.agreement == (1.0, 0.7, 0.6, 1.0)
    assert result.tests == StdioTests([("0\n", "0\n"), ("1\n", "10\n"), ("3\n", "30\n")])
    assert result.pass_share == (1.0,) * 7 + (2 / 3,) * 3
    assert not result.kept
    assert "3 of 4 inputs" in result.reasons[0] and "7 of 10 solutions" in result.reasons[1]


@pytest.mark.parametrize(("wrong", "kept"), [({}, True), ({3: 1}, True), ({3: 2}, False)])
def test_nine_of_ten_keep_a_problem_and_eight_do_not(wrong: dict[int, int], kept: bool) -> None:
    assert made(FOUR, solutions(wrong), tests=4).kept is kept


def test_nine_of_ten_on_each_test_are_not_nine_of_ten_on_all() -> None:
    """Solution 9 is wrong on input 0 and solution 8 on input 1: both count, and 8 of 10 pass all."""
    ten = [program(set())] * 8 + [program({1}), program({0})]
    result = made(FOUR, ten, tests=4)
    assert result.agreement == (0.9, 0.9, 1.0, 1.0)
    assert result.pass_share == (1.0,) * 8 + (0.75, 0.75)
    assert not result.kept


def test_a_test_that_does_not_count_harms_no_solution() -> None:
    result = made(FOUR, solutions({2: 4}), tests=4)
    assert result.pass_share == (1.0,) * 10
    assert result.kept


def test_who_fails_agrees_with_nobody() -> None:
    """Three print the right line and then raise, exit or run out of time: 2 of 5 agree, those who failed do not."""
    good = "print(input())"
    bad = [
        "print(input()); 1 / 0",
        "print(input()); raise SystemExit(3)",
        "print(input()); import time; time.sleep(60)",
    ]
    result = made("print(5)", [good, good, *bad], tests=1, limits=Limits(wall_s=0.5))
    assert result.agreement == (0.4,)
    assert result.tests is None
    assert not result.kept
    assert result.pass_share == (0.0,) * 5


def test_outputs_are_compared_as_stdio_tests_compare() -> None:
    result = made("print(5)", ["print(input())", "print(input() + '  ')", "print(input() + '\\n\\n')"], tests=1)
    assert result.agreement == (1.0,)
    assert result.tests == StdioTests([("5\n", "5\n")])


def test_the_same_seeds_give_the_same_tests() -> None:
    generator = "import random\nrandom.seed(int(input()))\nprint(random.randrange(10**9))"
    one, two = (made(generator, ["print(int(input()) + 1)"] * 2, tests=5) for _ in range(2))
    assert one == two
    assert len(one.inputs) == 5


def test_functions() -> None:
    """Both agree with ==, as 2 == 2.0; lists and tuples are the same in JSON."""
    result = made(
        "import json\nn = int(input())\nprint(json.dumps([n, [n] * 2]))",
        ["def f(n, ns):\n    print('x')\n    return n, sum(ns)", "def f(n, ns):\n    return [float(n), 2 * n]"],
        tests=2,
        entry_point="f",
    )
    assert result.kept
    assert result.tests == CallTests("f", [([0, [0, 0]], [0, 0]), ([1, [1, 1]], [1, 2])])


def test_what_is_made_can_be_graded_with() -> None:
    result = made(FOUR, solutions({}), tests=4)
    assert isinstance(result.tests, StdioTests)
    reward = load_reward("code", backend="unsafe-subprocess")
    answer = json.dumps({"stdio": result.tests.cases})
    score = asyncio.run(reward(Sample("```python\nprint(int(input()) * (10 if 1 else 0) % 30)\n```", answer)))
    assert score.value == 0.75  # 0, 10, 20 are right, and 30 % 30 is not 30


@pytest.mark.parametrize(
    ("generator", "entry_point", "said"),
    [
        ("print(1 // (int(input()) - 2))", None, "seed 2 ended with runtime_error: ZeroDivisionError"),
        ("print((", None, "seed 0 ended with runtime_error: SyntaxError"),
        ("while True: pass", None, "seed 0 ended with time"),
        ("import sys; sys.stdout.buffer.write(b'\\xff')", None, "seed 0 printed b'\\xff', which is no UTF-8"),
        ("print('x')", "f", "seed 0 printed b'x\\n', which is no JSON"),
        ("print(5)", "f", "seed 0 printed '5\\n'; print a JSON list"),
    ],
)
def test_a_broken_generator_is_named(generator: str, entry_point: str | None, said: str) -> None:
    with pytest.raises(GeneratorFailed) as caught:
        made(generator, ["print(1)"] * 2, tests=3, entry_point=entry_point, limits=Limits(wall_s=0.5))
    assert said in str(caught.value).replace("\\\\", "\\")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"solutions": ["pass"]}, "solutions has 1"),
        ({"tests": 0}, "tests is 0"),
        ({"agree": 0.5}, "agree is 0.5"),
        ({"agree": 1.1}, "agree is 1.1"),
        ({"pass_share": 0}, "pass_share is 0"),
    ],
)
def test_bad_options(options: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        made("print(1)", **{"solutions": ["pass"] * 2, **options})


def test_a_failing_sandbox_is_no_verdict() -> None:
    class Failing:
        calls = 0

        async def run(self, *_: object, **__: object) -> Run:
            self.calls += 1
            return Run(Outcome.SANDBOX_ERROR, None, b"", b"", False, 0.0, 0.0, 0, "fake", "the fork server is gone")

    failing = Failing()
    with pytest.raises(SandboxFailed, match="the fork server is gone"):
        asyncio.run(_Runner(failing, Limits())("print(1)", ""))
    assert failing.calls == 3


TABLES = st.integers(2, 12).flatmap(
    lambda n: st.lists(st.lists(st.sampled_from([None, "a", "b", "c"]), min_size=n, max_size=n), min_size=1, max_size=6)
)


@given(TABLES, st.sampled_from([0.51, 0.6, 0.7, 1.0]), st.sampled_from([0.5, 0.9, 1.0]))
def test_the_rules_on_any_table(table: list[list[str | None]], agree: float, pass_share: float) -> None:
    rows = [[None if value is None else _Output(value) for value in row] for row in table]
    result = _judged([str(index) for index in range(len(table))], rows, agree, pass_share, None)
    count = len(table[0])
    common = [Counter(filter(None, row)).most_common(1) for row in table]
    counting = {i: top[0][0] for i, top in enumerate(common) if top and top[0][1] >= agree * count - 1e-9}
    cases = [] if result.tests is None else [tuple(case) for case in result.tests.cases]
    assert cases == [(str(index), value) for index, value in counting.items()]
    for solution, share in enumerate(result.pass_share):
        right = [table[index][solution] == value for index, value in counting.items()]
        assert share == pytest.approx(sum(right) / len(right) if right else 0.0)
    whole = sum(share == 1.0 for share in result.pass_share)
    assert result.kept == (whole >= pass_share * count - 1e-9)
