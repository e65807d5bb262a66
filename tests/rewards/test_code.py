"""The reward `code`: references of every form, outcomes, and the life of the sandbox behind it."""

from __future__ import annotations

import asyncio
import json
import shutil
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rlvlm_rewards import Failure, Sample, Score, load_reward
from rlvlm_rewards.code import Code
from rlvlm_rewards.code.reference import ENTRY_POINT as CALL
from rlvlm_rewards.code.reference import read_reference
from rlvlm_sandbox import Outcome
from rlvlm_sandbox.grading import AssertTests, CallTests, Case, InvalidTests, StdioTests, Verdict

UNSAFE = "unsafe-subprocess"  # the logic is the same on every backend, and it runs wherever the tests do
DOUBLES = json.dumps({"stdio": [["1\n", "2\n"], ["2\n", "4\n"], ["5\n", "10\n"], ["-3\n", "-6\n"]]})


def fenced(source: str, tag: str = "python") -> str:
    return f"Here it is.\n```{tag}\n{source}\n```\n"


def judge(completion: str, answer: object, **options: object) -> Score:
    text = answer if isinstance(answer, str) else json.dumps(answer)
    reward = load_reward("code", **{"backend": UNSAFE, "workers": 2, **options})
    return asyncio.run(reward(Sample(completion=completion, answer=text, task="row-7")))


def value(source: str, answer: object, **options: object) -> float:
    score = judge(fenced(source), answer, **options)
    assert score.value is not None, score.detail
    return score.value


@pytest.mark.parametrize(
    ("source", "fraction", "whole"),
    [
        ("print(2 * int(input()))", 1.0, 1.0),
        ("print(abs(2 * int(input())))", 0.75, 0.0),  # wrong for -3
        ("n = int(input())\nprint(2 if n == 1 else 4)", 0.5, 0.0),
        ("print('x')", 0.0, 0.0),
        ("print(2 * int(input()))\nraise SystemExit(1)", 0.0, 0.0),
        ("import os\nos._exit(0)", 0.0, 0.0),
    ],
)
def test_fraction_and_all(source: str, fraction: float, whole: float) -> None:
    score = judge(fenced(source), DOUBLES)
    assert score.value == fraction
    assert score.parts == {"passed": fraction, "extracted": 1.0, "compiled": 1.0}
    assert value(source, DOUBLES, score="all") == whole


SQUARES = "def square(x):\n    return {body}"


@pytest.mark.parametrize(
    "answer",
    [
        {"calls": [[[2], 4], [[3], 9]], "entry_point": "square"},
        {"calls": [[[], {"x": 2}, 4], [[3], {}, 9.0]], "entry_point": "square"},
        {"calls": [[[2], 4.0000001]], "entry_point": "square", "float_tolerance": 1e-6},
        {"asserts": "assert square(2) == 4\nassert square(3) == 9", "entry_point": "square"},
        {"asserts": "assert square(a()) == 9", "entry_point": "square", "prelude": "def a(): return 3"},
        {"asserts": "def check(candidate):\n    assert candidate(3) == 9", "entry_point": "square"},
        {"fn_name": "square", "inputs": [[2], [3]], "outputs": [[4], [9]]},
        {"fn_name": "square", "inputs": [[2], [3]], "outputs": [4, 9]},
        {"fn_name": "square", "inputs": ["2", "3\n"], "outputs": ["4", "9"]},
    ],
)
@pytest.mark.parametrize("score", ["fraction", "all"])
def test_functions(answer: dict[str, object], score: str) -> None:
    assert value(SQUARES.format(body="x * x"), answer, score=score) == 1.0
    assert value(SQUARES.format(body="x + x + 1"), answer, score=score) == 0.0


def test_a_class_solution_as_leetcode_writes_it() -> None:
    source = "class Solution:\n    def square(self, x):\n        return x * x"
    assert value(source, {"fn_name": "square", "inputs": [[2], [3]], "outputs": [[4], [9]]}) == 1.0
    assert value(source, {"fn_name": "cube", "inputs": [[2], [3]], "outputs": [[8], [27]]}) == 0.0


def test_a_tuple_is_a_list_where_the_reference_is_json() -> None:
    source = "def split(x):\n    return [(x, 1)], (x, x)"
    assert value(source, {"calls": [[[2], [[[2, 1]], [2, 2]]]], "entry_point": "split"}) == 1.0
    assert value(source, {"fn_name": "split", "inputs": [[2]], "outputs": [[[[[2, 1]], [2, 2]]]]}) == 1.0
    recursive = "list = dict = 3\ndef down(n):\n    return (n,) + down(n - 1) if n else ()"
    assert value(recursive, {"calls": [[[3], [3, 2, 1]]], "entry_point": "down"}) == 1.0


def test_a_fraction_of_asserts_and_of_calls() -> None:
    source = SQUARES.format(body="x * x if x < 3 else 0")
    asserts = {"asserts": "\n".join(f"assert square({x}) == {x * x}" for x in (0, 1, 2, 3)), "entry_point": "square"}
    assert value(source, asserts) == 0.75
    assert value(source, asserts, score="all") == 0.0
    calls = {"calls": [[[x], x * x] for x in (1, 2, 3, 4)], "entry_point": "square"}
    assert value(source, calls) == 0.5


def test_a_checker_decides() -> None:
    checker = "def check(stdin, stdout, expected):\n    return int(stdout) ** 2 == int(stdin)"
    answer = {"stdio": [["9\n", ""], ["16\n", ""]], "checker": checker}
    assert value("print(-int(int(input()) ** 0.5))", answer) == 1.0
    assert value("print(3)", answer) == 0.5
    assert value("print('x')", answer) == 0.0
    half = {**answer, "checker": "def check(stdin, stdout, expected):\n    return 0.5"}
    assert (value("print(3)", half), value("print(3)", half, score="all")) == (0.5, 0.0)


def test_float_tolerance_of_stdout() -> None:
    answer = {"stdio": [["", "0.3333333 ok"]], "float_tolerance": 1e-6}
    assert value("print(1 / 3, 'ok')", answer) == 1.0
    assert value("print(0.34, 'ok')", answer) == 0.0


@pytest.mark.parametrize(
    ("answer", "tests"),
    [
        (
            {"inputs": ["1\n", ["2", "3"]], "outputs": ["a", ["b", "c"]]},
            StdioTests([("1\n", "a"), ("2\n3", "b\nc")]),
        ),
        (
            {"fn_name": "f", "inputs": [[{"1": 2}]], "outputs": [[{"-3": 4}]]},
            CallTests(CALL, [([{1: 2}], {-3: 4})]),
        ),
        ({"fn_name": "f", "inputs": [[{"a": 2}]], "outputs": [[[1]]]}, CallTests(CALL, [([{"a": 2}], [1])])),
        ({"fn_name": "f", "inputs": ['[1]\n"x"'], "outputs": ["[[2]]"]}, CallTests(CALL, [([[1], "x"], [[2]])])),
        (
            {"fn_name": "f", "inputs": [[1], [2]], "outputs": [[1], [1, 2]]},
            CallTests(CALL, [([1], [1]), ([2], [1, 2])]),
        ),
        ({"asserts": "assert f()", "entry_point": "f"}, AssertTests("assert f()", "f")),
    ],
)
def test_what_references_mean(answer: dict[str, object], tests: object) -> None:
    assert read_reference(json.dumps(answer)).tests == tests


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ("42", "int, not an object"),
        ("print(1)", "no JSON"),
        ("[" * 100_000, "no JSON"),
        ({}, "keys []"),
        ({"stdio": []}, "at least one case"),
        ({"stdio": [["1"]]}, "list of 2"),
        ({"stdio": [[1, "1"]]}, "1 is not a text"),
        ({"stdio": [["1", "1"]], "tolerance": 1}, "did you mean 'float_tolerance'?"),
        ({"stdio": [["1", "1"]], "checker": "def check("}, ""),
        ({"calls": [[[1], 1]]}, "no 'entry_point'"),
        ({"calls": [[[1], 1]], "entry_point": "1f"}, ""),
        ({"calls": [[1, 1]], "entry_point": "f"}, ""),
        ({"asserts": "assert f(", "entry_point": "f"}, "line 1"),
        ({"asserts": 3, "entry_point": "f"}, "3 is not a text"),
        ({"inputs": ["1"], "outputs": []}, "at least one case"),
        ({"inputs": ["1"], "outputs": ["1", "2"]}, "1 inputs and 2 outputs"),
        ({"inputs": [[1]], "outputs": ["1"]}, "is not a text"),
        ({"inputs": [1], "outputs": [1], "fn_name": "f"}, "list of arguments"),
        ({"inputs": ["{"], "outputs": ["1"], "fn_name": "f"}, "cannot be read"),
    ],
)
def test_an_unreadable_reference_names_the_row(answer: object, said: str) -> None:
    score = judge(fenced("print(1)"), answer)
    assert score.failure is Failure.UNPARSABLE_REFERENCE
    assert "row-7" in score.detail and said in score.detail


def test_a_prelude_that_raises_is_the_references_fault() -> None:
    answer = {"asserts": "assert f(1)", "entry_point": "f", "prelude": "import nothing_of_this_name"}
    assert judge(fenced("def f(x): return 1"), answer).failure is Failure.UNPARSABLE_REFERENCE


@given(st.text(max_size=50) | st.recursive(st.none() | st.integers() | st.text(max_size=3), st.lists).map(json.dumps))
def test_any_reference_is_read_or_refused(answer: str) -> None:
    with pytest.raises(InvalidTests):
        read_reference(answer)


FORMS = ("stdio", "calls", "asserts", "entry_point", "prelude", "inputs", "outputs", "fn_name", "float_tolerance")
VALUES = st.recursive(
    st.none() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("1-a", max_size=2), inner, max_size=2),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from(FORMS), VALUES, max_size=4))
def test_any_object_is_read_or_refused(answer: dict[str, object]) -> None:
    try:
        read_reference(json.dumps(answer))
    except InvalidTests as error:
        assert str(error)


@pytest.mark.parametrize(
    ("completion", "extracted"),
    [
        ("", 0.0),
        ("I do not know.", 0.0),
        ("```cpp\nint main() {}\n```", 0.0),
        ("<think>```python\nprint(2 * int(input()))\n```", 0.0),
        (fenced("print(("), 1.0),
        (fenced("x\x00y"), 1.0),
        (fenced("print('\ud800')"), 1.0),
        (fenced("-" * 100_000 + "1"), 1.0),
        (fenced("(" * 100_000), 1.0),
    ],
)
def test_what_does_not_compile_is_worth_nothing(completion: str, extracted: float) -> None:
    score = judge(completion, DOUBLES)
    assert score.value == 0.0
    assert score.parts == {"passed": 0.0, "extracted": extracted, "compiled": 0.0}


def test_all_of_an_answer_that_compiles_is_the_program() -> None:
    score = judge("<think>easy</think>\nprint(2 * int(input()))", DOUBLES)
    assert score.value == 1.0
    assert score.parts["extracted"] == 1.0


@pytest.mark.parametrize("score", ["fraction", "all"])
def test_an_endless_loop_is_the_programs_fault_and_not_a_failure(score: str) -> None:
    start = time.monotonic()
    result = judge(fenced("while True: pass"), DOUBLES, wall_s=0.5, score=score)
    assert result.value == 0.0
    assert "time" in result.detail
    assert time.monotonic() - start < 5


def test_once_the_time_is_up_the_tests_to_come_have_failed() -> None:
    """The first test goes alone, then four at a time: if one of the second to fifth never ends, seven are not begun."""
    answer = {"stdio": [[f"{x}\n", f"{2 * x}\n"] for x in range(12)]}
    source = "x = int(input())\nwhile x == 2: pass\nprint(2 * x)"
    assert value(source, answer, wall_s=0.5) == 4 / 12
    assert value(source.replace("== 2", "== 7"), answer, wall_s=0.5) == 8 / 12
    assert value(source.replace("== 2", "== 12"), answer, wall_s=0.5) == 1.0


@pytest.mark.parametrize(
    "answer", [DOUBLES, {"calls": [[[2], 4]], "entry_point": "f"}, {"asserts": "assert f(2) == 4", "entry_point": "f"}]
)
@pytest.mark.parametrize(
    "source",
    [
        "class E:\n    def __eq__(self, other): return True\ndef f(x): return E()\nprint(E())",
        "import os\nos.write(1, b'passed\\n')\nos._exit(0)",
        "raise SystemExit(0)",
        "import sys, builtins\nbuiltins.len = lambda x: 0\nbuiltins.all = lambda x: True\ndef f(x): return None",
        "import sys\ndef f(x):\n    frame = sys._getframe()\n    while frame.f_back: frame = frame.f_back\n"
        "    return frame.f_globals.get('expected')",
    ],
)
def test_cheats_get_nothing(source: str, answer: object) -> None:
    assert value(source, answer) == 0.0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"score": "some"}, "score is 'some'"),
        ({"language": "cobol"}, "language is 'cobol'"),
        ({"wall_s": 0}, "wall_s is 0"),
        ({"memory_mb": -1}, "memory_mb is -1"),
        ({"workers": 0}, "workers is 0"),
        ({"image": "ubuntu"}, "image is 'ubuntu'"),
        ({"backend": "namespace"}, "backend is 'namespace'"),
        ({"url": "http://127.0.0.1:1"}, "url is 'http://127.0.0.1:1'"),
        ({"backend": "http"}, "url is None"),
    ],
)
def test_bad_options(options: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Code(**options)


def test_a_sandbox_that_failed_says_nothing_about_the_program() -> None:
    whole = Verdict(4, 4, Outcome.OK, (Case(True, score=1.0),) * 4, "x")
    broken = Verdict(0, 1, Outcome.SANDBOX_ERROR, (Case(False, Outcome.SANDBOX_ERROR),), "x", "no fork server")
    score = Code(backend=UNSAFE)._scored([whole, broken], total=5)
    assert (score.value, score.failure, score.detail) == (None, Failure.INFRASTRUCTURE, "no fork server")


def test_a_sandbox_that_is_not_there_is_infrastructure() -> None:
    score = judge(fenced("print(1)"), DOUBLES, backend="http", url="http://127.0.0.1:9")
    assert score.failure is Failure.INFRASTRUCTURE


def test_functions_are_python() -> None:
    answer = {"calls": [[[1], 1]], "entry_point": "f"}
    score = judge(fenced("int f() {}", "cpp"), answer, language="cpp")
    assert score.failure is Failure.UNPARSABLE_REFERENCE


@pytest.mark.parametrize(
    ("language", "compiler", "source"),
    [
        ("cpp", "g++", "#include <iostream>\nint main() { int n; std::cin >> n; std::cout << 2 * n; }"),
        ("bash", "bash", "read n; echo $((2 * n))"),
    ],
)
def test_other_languages(language: str, compiler: str, source: str) -> None:
    if shutil.which(compiler) is None or shutil.which("bwrap") is None:
        pytest.skip(f"it takes {compiler} and bubblewrap")
    options = {"language": language, "backend": "auto", "wall_s": 10}
    score = judge(fenced(source, language), DOUBLES, **options)
    if score.failure is Failure.INFRASTRUCTURE and "bubblewrap" in score.detail:
        pytest.skip(score.detail)
    assert (score.value, score.parts) == (1.0, {"passed": 1.0, "extracted": 1.0})
    assert judge(fenced(source.replace("2", "3"), language), DOUBLES, **options).value == 0.0
