"""Grading: honest programs pass, wrong ones fail, the author's errors are the author's."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rlvlm_sandbox import Limits, Outcome, Sandbox, SandboxUnavailable
from rlvlm_sandbox.grading import AssertTests, CallTests, InvalidTests, StdioTests, Verdict
from rlvlm_sandbox.grading.compare import same_output, same_value

QUICK = Limits(wall_s=5, cpu_s=5)


class Grader:
    """A sandbox in an event loop of its own, open for all tests of a module."""

    def __init__(self) -> None:
        self.loop = asyncio.Runner()
        self.sandbox = Sandbox(workers=2)
        try:
            self.loop.run(self.sandbox.__aenter__())
        except SandboxUnavailable as error:
            pytest.skip(f"no sandbox holds here: {error}")

    def __call__(self, code: str | bytes, tests: Any, limits: Limits = QUICK, **options: Any) -> Verdict:
        return self.loop.run(self.sandbox.grade(code, tests, limits, **options))

    def close(self) -> None:
        self.loop.run(self.sandbox.__aexit__())
        self.loop.close()


@pytest.fixture(scope="module")
def grader() -> Iterator[Grader]:
    grader = Grader()
    yield grader
    grader.close()


# ---- problems: name, entry point, prelude, tests, right code, a change that makes it wrong

NODE = """
class Node:
    def __init__(self, value, next=None):
        self.value, self.next = value, next
"""
PROBLEMS = {
    "square": ("f", "", "assert f(3) == 9\nassert f(-4) == 16", "def f(x): return x * x", ("x * x", "x + x")),
    "sort in place": (
        "f", "", "xs = [[3, 1], {2: [5]}]\nassert f(xs) is None\nassert xs == [[1, 3], {2: [5, 6]}]",
        "def f(xs):\n    xs[0].sort()\n    xs[1][2].append(6)", ("sort()", "reverse(); xs[0].append(0)"),
    ),
    "changes and returns": (
        "f", "", "xs = [1, 1, 2]\nk = f(xs)\nassert k == 2\nassert xs[:k] == [1, 2]",
        "def f(xs):\n    xs[:] = sorted(set(xs))\n    return len(xs)", ("sorted(set(xs))", "list(xs)"),
    ),
    "returns what it changed": (
        "f", "", "xs = [[2, 1], [4, 3]]\nassert f(xs) == [[1, 2], [3, 4]]\nassert xs == [[1, 2], [3, 4]]",
        "def f(xs):\n    for x in xs: x.sort()\n    return xs", ("x.sort()", "pass"),
    ),
    "other containers in place": (
        "f", "", "s, b, d = {1}, bytearray(b'a'), {}\nf(s, b, d)\n"
        "assert (s, b, d) == ({1, 2}, bytearray(b'ab'), {'k': s})"
        "\nassert d['k'] is s",
        "def f(s, b, d):\n    s.add(2); b += b'b'; d['k'] = s", ("s.add(2)", "s.add(3)"),
    ),
    "exception expected": (
        "f", "class Empty(Exception): pass",
        "try:\n    f([])\nexcept Empty as error:\n    assert error.args == ('nothing', 0)\nelse:\n    assert False\n"
        "try:\n    f(None)\nexcept TypeError:\n    pass\nelse:\n    assert False\nassert f([2]) == 2",
        "def f(xs):\n    if len(xs) == 0: raise Empty('nothing', 0)\n    return max(xs)",
        ("Empty('nothing', 0)", "ValueError()"),
    ),
    "generator": (
        "f", "", "from itertools import islice\nassert list(islice(f(), 40)) == [n * n for n in range(40)]\n"
        "g = f()\nassert [next(g), next(g), next(g)] == [0, 1, 4]",
        "def f():\n    n = 0\n    while True:\n        yield n * n\n        n += 1", ("n * n", "2 * n"),
    ),
    "generator that fails": (
        "f", "", "got = []\ntry:\n    for x in f(): got.append(x)\nexcept KeyError:\n    got.append('end')\n"
        "assert got == [*range(30), 'end']",
        "def f():\n    yield from range(30)\n    raise KeyError(1)", ("range(30)", "range(29)"),
    ),
    "callback": (
        "f", "", "seen = []\ndef keep(x):\n    seen.append(x)\n    return -x\nassert f(keep, [1, 3, 2]) == [3, 2, 1]\n"
        "assert seen == [1, 3, 2]",
        "def f(key, xs): return sorted(xs, key=key)", ("key=key", "key=lambda x: -key(x)"),
    ),
    "function that makes a function": (
        "f", "", "add = f(3)\nassert add(4) == 7\nassert callable(add)\n"
        "twice = f(lambda x: x * 2)\nassert twice(5) == 10",
        "def f(n):\n    return n if callable(n) else lambda x: x + n", ("x + n", "x - n"),
    ),
    "callback that raises": (
        "f", "", "def bad(x): raise LookupError(x)\nassert f(bad) == 'LookupError 1'",
        "def f(g):\n    try: g(1)\n    except LookupError as e: return f'{type(e).__name__} {e}'", ("g(1)", "int('x')"),
    ),
    "counter, deque, set, tuple": (
        "f", "from collections import Counter, deque",
        "assert f('aab') == (Counter(a=2, b=1), deque('aab'), {'a', 'b'}, ('a',))",
        "def f(s): return Counter(s), deque(s), set(s), tuple(s[:1])", ("Counter(s)", "Counter(s[1:])"),
    ),
    "nested dicts": (
        "f", "", "assert f([('a', 'x', 1), ('a', 'y', 2)]) == {'a': {'x': [1], 'y': [2]}}",
        "def f(rows):\n    d = {}\n    for a, b, c in rows: d.setdefault(a, {}).setdefault(b, []).append(c)\n"
        "    return d",
        ("append(c)", "append(0)"),
    ),
    "linked list": (
        "f", NODE, "node = None\nfor n in range(3000): node = Node(n, node)\nback = f(node)\ngot = []\n"
        "while back:\n    got.append(back.value)\n    back = back.next\nassert got == list(range(3000))",
        "def f(node):\n    back = None\n    while node: node.next, back, node = back, node, node.next\n    return back",
        ("return back", "return back.next"),
    ),
    "object of the prelude in place": (
        "f", NODE, "n = Node(1)\nf(n)\nassert n.value == 2 and type(n) is Node", "def f(n): n.value += 1", ("1", "2"),
    ),
    "class of the candidate": (
        "f", "", "assert f(Pair(2, 5)) == 7",
        "class Pair:\n    def __init__(s, a, b): s.a, s.b = a, b\n    def swapped(s): return Pair(s.b, s.a)\n"
        "def f(p): return p.a + p.b", ("p.a + p.b", "p.a * p.b"),
    ),
    "class as entry point": (
        "Stack", "", "s = Stack()\ns.push(1)\ns.push([2])\nassert s.pop() == [2]\nassert s.pop() == 1\n"
        "try: s.pop()\nexcept IndexError: pass\nelse: assert False",
        "class Stack:\n    def __init__(self): self.items = []\n    def push(self, x): self.items.append(x)\n"
        "    def pop(self): return self.items.pop()", ("items.pop()", "items.pop(0)"),
    ),
    "operators of a class": (
        "V", "", "assert V(1, 2) + V(2, 2) == V(3, 4)\nassert V(1, 2) != V(2, 1)\nv = V(5, 6)\nv[1] = 8\n"
        "assert str(v) == 'V(5, 8)' and len(v) == 2 and list(v) == [5, 8] and v[0] == 5 and 8 in v and 6 not in v",
        "class V:\n    def __init__(s, *x): s.x = list(x)\n    def __add__(s, o): return V(*map(sum, zip(s.x, o.x)))\n"
        "    def __eq__(s, o): return s.x == o.x\n    def __str__(s): return f'V({s.x[0]}, {s.x[1]})'\n"
        "    def __len__(s): return len(s.x)\n    def __getitem__(s, i): return s.x[i]\n"
        "    def __setitem__(s, i, x): s.x[i] = x", ("s.x[i] = x", "pass"),
    ),
    "a match": (
        "f", "", "assert f('abc').group(0) == 'ab'\nassert not f('b')\nassert f('ab')",
        "import re\ndef f(s): return re.match('a.', s)", ("'a.'", "'.'"),
    ),
    "recursion 50,000 deep": (
        "f", "", "assert f(50_000) == 50_000",
        "import sys\nsys.setrecursionlimit(10**6)\ndef f(n): return 0 if n == 0 else 1 + f(n - 1)", ("1 + f", "2 + f"),
    ),
    "bytes and large ints": (
        "f", "", "assert f(b'\\xff\\0', 7) == (b'\\0\\xff', 7 ** 9999)", "def f(b, n): return b[::-1], n ** 9999",
        ("n ** 9999", "n ** 9998"),
    ),
    "check(candidate)": (
        "f", "", "METADATA = {}\n\n\ndef check(candidate):\n    assert candidate('ab') == 'ba'\n",
        "def f(s): return s[::-1]",
        ("[::-1]", "[:]"),
    ),
    "unittest": (
        "f", "", "import unittest\nclass T(unittest.TestCase):\n"
        "    def test(self):\n        self.assertEqual(f(2), [0, 1])\n"
        "        with self.assertRaises(ValueError): f(-1)\nif __name__ == '__main__':\n    unittest.main()",
        "def f(n):\n    if n < 0: raise ValueError\n    return list(range(n))", ("range(n)", "range(n + 1)"),
    ),
    "stub in the prelude": (
        "f", "def helper(x): return x + 1\ndef f(x):\n    raise NotImplementedError", "assert f(1) == helper(1) * 2",
        "def f(x): return helper(x) * 2", ("* 2", "* 3"),
    ),
    "floats": (
        "f", "import math", "assert math.isnan(f('nan'))\nassert f('-inf') == -math.inf\n"
        "assert math.copysign(1, f('-0')) == -1",
        "def f(s): return float(s)", ("float(s)", "abs(float(s))"),
    ),
    "named tuple and enum": (
        "f", "from typing import NamedTuple\nfrom enum import Enum\nclass P(NamedTuple):\n    x: int\n    y: int\n"
        "class C(Enum):\n    RED = 1\n    BLUE = 2",
        "p, c = f(P(1, 2), C.RED)\nassert p.x == 2 and p == P(2, 1) and c is C.BLUE",
        "def f(p, c): return P(p.y, p.x), C.BLUE", ("C.BLUE", "C.RED"),
    ),
    "named tuple of the candidate": (
        "f", "", "p = f(1)\nassert p == (1, 2) and p.x == 1 and p.y == 2",
        "from collections import namedtuple\nP = namedtuple('P', 'x y')\ndef f(x): return P(x, 2 * x)", ("2 * x", "x"),
    ),
    "object of the tests": (
        "f", "", "import io\nclass K:\n    n = 0\n    def hit(self, x):\n        self.n += x\n        return self.n\n"
        "k = K()\n"
        "assert f(3, k.hit) == 3\nassert f(4, hook=k.hit) == 7\nassert k.n == 7\nout = io.StringIO()\n"
        "f(1, out.write)\nf(2, file=out)\nassert out.getvalue() == '2'",
        "def f(x, hook=None, file=None):\n    if file: file.write(str(x))\n"
        "    return hook(x) if hook and isinstance(x, int) and x > 1 else x", ("write(str(x))", "write('0')"),
    ),
    "async": (
        "f", "", "import asyncio\nassert asyncio.run(f(2)) == 4",
        "import asyncio\nasync def f(x):\n    await asyncio.sleep(0)\n    return x * 2", ("x * 2", "x"),
    ),
    "prints and input": (
        "f", "", "print('from the tests')\nassert f(1) == 'end'",
        "print('hello')\ndef f(x):\n    print('{}' * 10_000)\n    try: input()\n    except EOFError: return 'end'",
        ("'end'", "'more'"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PROBLEMS)
def test_honest_code_passes_and_changed_code_fails(grader: Grader, name: str) -> None:
    entry_point, prelude, source, code, (right, wrong) = PROBLEMS[name]
    tests = AssertTests(source, entry_point, prelude)
    verdict = grader(code, tests)
    assert (verdict.passed, verdict.total, verdict.outcome) == (1, 1, Outcome.OK), verdict.detail
    assert right in code
    assert grader(code.replace(right, wrong), tests).passed == 0


def test_a_plain_run_says_the_same() -> None:
    """So the problems above are right themselves."""
    for name, (entry_point, prelude, source, code, (right, wrong)) in PROBLEMS.items():
        for text, passes in ((code, True), (code.replace(right, wrong), False)):
            namespace: dict[str, Any] = {"__name__": "solution", "print": lambda *_: None, "input": _no_input}
            exec(prelude, namespace)
            exec(text, namespace)
            try:
                exec(source.partition("if __name__")[0], namespace)
                for case in [namespace["T"]("test")] if "T" in namespace else []:
                    case.debug()
                if "check" in namespace:
                    namespace["check"](namespace[entry_point])
                assert passes, name
            except Exception as error:  # noqa: BLE001 (whatever a wrong program makes the tests raise)
                assert not passes, (name, error)


def _no_input() -> str:
    raise EOFError


def test_arguments_are_the_authors_until_the_statement_ends(grader: Grader) -> None:
    tests = AssertTests("xs = [3, 1, 2]\nassert f(xs) == sorted(xs)", "f")
    assert grader("def f(xs):\n    xs.clear()\n    return []", tests).passed == 0
    assert grader("def f(xs): return sorted(xs)", tests).passed == 1
    assert grader("def f(xs):\n    xs.sort()\n    return xs", tests).passed == 1


def test_operators_are_not_asked_where_they_would_decide(grader: Grader) -> None:
    lie = "class A:\n    def __getattr__(s, name): return 0\n    __eq__ = lambda *a: True\n    __sub__ = lambda *a: 0\n"
    for source in (
        "assert f(1) == 2",
        "assert abs(f(1) - 2) < 1e-6",
        "assert f(1) == g(1)\ng = abs",
        "assert f(1) == f(2)",
    ):
        verdict = grader(lie + "def f(x): return A()", AssertTests(f"g = int\n{source}", "f"))
        assert verdict.passed == 0, source
    for source in ("assert f(1) == 2", "assert abs(f(1) - 2) < 1e-6"):
        assert (
            grader(lie.replace("class A", "class f") + "    def __init__(s, x): pass", AssertTests(source, "f")).passed
            == 0
        )


@pytest.mark.parametrize(
    "source",
    [
        "assert close(f(1), 2)",
        "assert distance(f(1), 2) < 1e-6",
        "assert f(1) == RIGHT",
        "assert Same(f(1)) == Same(2)",
        "assert Same(f(1))",
        "assert len(Same(f(1))) == 1",
        "assert Same(f(1)).is_right",
    ],
)
def test_what_only_the_candidate_defines_does_not_judge_it(grader: Grader, source: str) -> None:
    code = (
        "close = lambda *_: True\ndistance = lambda *_: 0\n"
        "class Always(int):\n    def __eq__(s, o): return True\nRIGHT = Always()\n"
        "class Same:\n    is_right = True\n    def __init__(s, x): pass\n    def __eq__(s, o): return True\n"
        "    def __len__(s): return 1\ndef f(x): return 0"
    )
    with pytest.raises(InvalidTests, match=r"tests, line 1: name '\w+'.*put it into the prelude"):
        grader(code, AssertTests(source, "f"))


def test_modules_that_the_author_forgot_to_import_are_the_standard_librarys(grader: Grader) -> None:
    tests = AssertTests("assert math.isclose(f(1), 2)", "f")
    assert grader("import math\ndef f(x): return 2.0", tests).passed == 1
    lie = "import math, types\nmath.isclose = lambda *a: True\n"
    assert grader(lie + "def f(x): return 0.0", tests).passed == 0


def test_cancelled_gradings_leave_nothing(grader: Grader) -> None:
    tests = AssertTests("assert f(1) == 1", "f")

    async def main() -> None:
        for pause in (0.0, 0.002, 0.01, 0.1):
            task = asyncio.ensure_future(grader.sandbox.grade("while True: pass", tests, QUICK))
            await asyncio.sleep(pause)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        verdicts = [grader.sandbox.grade("def f(x): return x", tests, QUICK) for _ in range(12)]
        assert all(verdict.passed for verdict in await asyncio.gather(*verdicts))

    grader.loop.run(main())
    before = len(os.listdir("/proc/self/fd"))
    grader.loop.run(main())
    assert len(os.listdir("/proc/self/fd")) == before


def test_split_counts_each_assert(grader: Grader) -> None:
    tests = AssertTests(
        "assert f(1) == 1\nx = 2\nassert f(x) == 4\nfor y in (3, 4):\n    assert f(y) == y * y", "f", split=True
    )
    verdict = grader("def f(x): return x * x if x != 2 else 0", tests)
    assert [case.passed for case in verdict.cases] == [True, False, True]
    assert (verdict.passed, verdict.total, verdict.outcome, verdict.fraction) == (2, 3, Outcome.OK, 2 / 3)


def test_split_looks_into_check(grader: Grader) -> None:
    source = "def check(g):\n    assert g(1) == 1\n    double = lambda x: 2 * x\n    assert g(2) == double(2)\n"
    verdict = grader("def f(x): return x", AssertTests(source, "f", split=True))
    assert [case.passed for case in verdict.cases] == [True, False]


def test_split_fails_what_comes_after_the_end_of_the_candidate(grader: Grader) -> None:
    code = "import os\ndef f(x):\n    if x == 2: os._exit(0)\n    return x"
    verdict = grader(code, AssertTests("assert f(1) == 1\nassert f(2) == 2\nassert f(3) == 3", "f", split=True))
    assert [case.passed for case in verdict.cases] == [True, False, False]
    assert verdict.outcome is Outcome.RUNTIME_ERROR


@pytest.mark.parametrize(
    ("code", "outcome"),
    [
        ("def f(x) return x", Outcome.RUNTIME_ERROR),
        ("def g(x): return x", Outcome.RUNTIME_ERROR),
        (b"\xff\xfe\x00def f", Outcome.RUNTIME_ERROR),
        ("def f(x): return '\ud800'", Outcome.RUNTIME_ERROR),
        ("import nothing_of_this_name", Outcome.RUNTIME_ERROR),
        ("raise SystemExit(0)", Outcome.RUNTIME_ERROR),
        ("def f(x): raise KeyError(x)", Outcome.RUNTIME_ERROR),
        ("def f(x): return x + 1", Outcome.OK),
        ("def f(x): return [0] * 10**10", Outcome.MEMORY),
        ("def f(x):\n    while True: pass", Outcome.TIME),
        ("while True: pass", Outcome.TIME),
        ("import os, signal\ndef f(x): os.kill(os.getpid(), signal.SIGSEGV)", Outcome.SIGNAL),
        ("", Outcome.RUNTIME_ERROR),
    ],
)
def test_outcomes_of_assert_tests_and_calls(grader: Grader, code: str | bytes, outcome: Outcome) -> None:
    limits = Limits(wall_s=1, cpu_s=5, memory_bytes=512 << 20)
    for tests in (AssertTests("assert f(1) == 1", "f"), CallTests("f", [((1,), 1)])):
        verdict = grader(code, tests, limits)
        assert (verdict.passed, verdict.total, verdict.outcome) == (0, 1, outcome), verdict.detail
        assert verdict.detail


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: AssertTests("assert f(1) ==", "f"), "tests, line 1: "),
        (lambda: AssertTests("x = 1\n\ndef f(:\n", "f"), "tests, line 3: "),
        (lambda: AssertTests("assert f(1)\0", "f"), "tests: "),
        (lambda: AssertTests("assert 1", "f", prelude="\nreturn"), "prelude, line 2: "),
        (lambda: AssertTests("assert 1", "Solution().f"), "entry_point is 'Solution"),
        (lambda: AssertTests("assert 1", "class"), "entry_point is 'class'"),
        (lambda: CallTests("f", []), "cases is"),
        (lambda: CallTests("f", [(1, 2)]), "case 1 is"),
        (lambda: CallTests("f", [((1,), 1), ((object(),), 1)]), "case 2: "),
        (lambda: CallTests("f", [((1,), 1)], float_tolerance=-1.0), "float_tolerance is -1.0"),
        (lambda: StdioTests([("1",)]), "case 1 is"),
        (lambda: StdioTests([("1", "1"), ("\ud800", "2")]), "case 2: "),
        (lambda: StdioTests([("1", "2")], checker="def chek(): pass"), "checker: "),
        (lambda: StdioTests([("1", "2")], checker="def check(:"), "checker, line 1: "),
    ],
)
def test_tests_that_cannot_run_are_refused_when_made(make: Any, said: str) -> None:
    with pytest.raises(InvalidTests) as caught:
        make()
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("tests", "said"),
    [
        (AssertTests("assert f(1)", "f", prelude="x = 1\ny = 1 / 0"), "prelude, line 2: ZeroDivisionError"),
        (AssertTests("\nimport no_such_module", "f"), "tests, line 2: ModuleNotFoundError"),
        (StdioTests([("", "")], checker="def check(i, o, e):\n    return unknown"), "checker, line 2: NameError"),
        (StdioTests([("", "")], checker="1 / 0\ndef check(i, o, e): return 1"), "checker, line 1: ZeroDivisionError"),
        (StdioTests([("", "")], checker="def check(i, o, e): return 'yes'"), "check returned 'yes'"),
    ],
)
def test_errors_of_the_author_that_show_when_it_runs(grader: Grader, tests: Any, said: str) -> None:
    with pytest.raises(InvalidTests) as caught:
        grader("def f(x): return 1", tests)
    assert said in str(caught.value)


def test_a_remote_import_error_is_not_the_authors(grader: Grader) -> None:
    verdict = grader("def f(x): import no_such_module", AssertTests("assert f(1) == 1", "f"))
    assert (verdict.passed, verdict.outcome) == (0, Outcome.RUNTIME_ERROR)


# ---- stdin and stdout


def test_stdio_cases(grader: Grader) -> None:
    cases = [("1 2", "3\n"), ("-1 1\n", "0"), (b"5 5", b"11")]
    verdict = grader("print(sum(map(int, input().split())))", StdioTests(cases))
    assert [case.passed for case in verdict.cases] == [True, True, False]
    assert (verdict.outcome, verdict.fraction) == (Outcome.OK, 2 / 3)


def test_stdio_output_of_a_program_that_fails_does_not_count(grader: Grader) -> None:
    verdict = grader("print(1)\nraise SystemExit(3)", StdioTests([("", "1")]))
    assert (verdict.passed, verdict.outcome) == (0, Outcome.RUNTIME_ERROR)


def test_stdio_fail_fast_runs_no_more(grader: Grader) -> None:
    code = "import time\nx = int(input())\ntime.sleep(x)\nprint(x)"
    started = time.monotonic()
    verdict = grader(code, StdioTests([("0", "1"), ("3", "3"), ("3", "3")]), fail_fast=True)
    assert time.monotonic() - started < 2.5
    assert (verdict.passed, verdict.total) == (0, 3)


def test_stdio_checker(grader: Grader) -> None:
    checker = "def check(stdin, stdout, expected):\n    return sorted(stdout.split()) == sorted(expected.split())"
    tests = StdioTests([("", "1 2 3")], checker=checker)
    assert grader("print(3, 1, 2)", tests).passed == 1
    assert grader("print(3, 1, 1)", tests).passed == 0
    partial = grader(
        "print(3)", StdioTests([("", "4"), ("", "3")], checker="def check(i, o, e): return int(o) / int(e)")
    )
    assert [case.score for case in partial.cases] == [0.75, 1.0] and partial.passed == 1 and partial.fraction == 0.875
    silent = grader("pass", StdioTests([("", "4")], checker="def check(i, o, e): return int(o) == 4"))
    assert (silent.passed, silent.outcome) == (0, Outcome.OK)


@pytest.mark.parametrize(
    ("got", "expected", "tolerance", "same"),
    [
        ("1 2  \n3\n\n", "1 2\n3", None, True), ("1\r\n2\r\n", "1\n2\n", None, True), ("1  2", "1 2", None, False),
        ("", "\n\n", None, True), ("\n1", "1", None, False), ("1\n2", "1", None, False), ("1", "1\n2", None, False),
        ("0.3000001", "0.3", 1e-6, True), ("0.300002", "0.3", 1e-6, False), ("1000000.5", "1000000", 1e-6, True),
        ("1e3", "1000", 0.0, True), ("nan", "nan", 1e-6, True), ("nan", "1", 1e-6, False), ("inf", "1", 1e-6, False),
        ("1e999", "1e998", 1e-6, False), ("1_0", "10", 1e-6, False), ("a  1.0", "a 1", 1e-6, True),
        ("1 1", "1", 1e-6, False),
        ("0x10", "16", 1e-6, False), ("\u0661", "1", 1e-6, False),
    ],
)  # fmt: skip
def test_same_output(got: str, expected: str, tolerance: float | None, same: bool) -> None:
    assert same_output(got.encode(), expected.encode(), tolerance) is same


@given(st.text(st.sampled_from("ab1. \n\t")), st.text(st.sampled_from("ab1. \n\t")))
def test_same_output_is_symmetric(a: str, b: str) -> None:
    assert same_output(a.encode(), b.encode(), None) == same_output(b.encode(), a.encode(), None)
    assert same_output(a.encode(), a.encode(), None)


# ---- calls


def test_calls(grader: Grader) -> None:
    code = "def f(a, b=1, *, c=0): return [a + b + c, (a, b)]"
    cases = [((1,), [2, (1, 1)]), ([5], {"b": 2, "c": 3}, [10, (5, 2)]), ((1,), [2, [1, 1]]), (("x",), [])]
    verdict = grader(code, CallTests("f", cases))
    assert [case.passed for case in verdict.cases] == [True, True, False, False]
    assert [case.outcome for case in verdict.cases] == [Outcome.OK] * 3 + [Outcome.RUNTIME_ERROR]


def test_calls_that_never_come_fail(grader: Grader) -> None:
    code = "import os\ndef f(x):\n    if x: os._exit(0)\n    return x"
    verdict = grader(code, CallTests("f", [((0,), 0), ((1,), 1), ((0,), 0)]))
    assert [case.passed for case in verdict.cases] == [True, False, False]


def test_calls_take_an_iterator_for_a_list(grader: Grader) -> None:
    assert grader("def f(n): yield from range(n)", CallTests("f", [((3,), [0, 1, 2])])).passed == 1
    verdict = grader("def f(n):\n    while True: yield n", CallTests("f", [((3,), [0, 1, 2])]))
    assert (verdict.passed, verdict.outcome) == (0, Outcome.RUNTIME_ERROR)


def test_calls_with_large_results_and_prints(grader: Grader) -> None:
    code = "def f(n):\n    print('x' * (1 << 21))\n    return 'y' * n"
    assert grader(code, CallTests("f", [((2_000_000,), "y" * 2_000_000)])).passed == 1


def test_code_of_50_mb(grader: Grader) -> None:
    code = "def f(x): return x\n#" + "x" * (50 << 20)
    for tests in (AssertTests("assert f(1) == 1", "f"), CallTests("f", [((1,), 1)])):
        assert grader(code, tests).passed == 1


def test_calls_keep_arguments_from_each_other(grader: Grader) -> None:
    xs = [1, 2]
    verdict = grader("def f(xs):\n    xs.append(3)\n    return len(xs)", CallTests("f", [((xs,), 3), ((xs,), 3)]))
    assert verdict.passed == 2 and xs == [1, 2]


@pytest.mark.parametrize(
    ("got", "expected", "tolerance", "same"),
    [
        (1, True, None, True), (1.0, 1, None, True), ([1], (1,), None, False),
        ([1, 2], [1], None, False), ([1], [1, 2], None, False),
        ({"a": [1.0]}, {"a": [1 + 1e-9]}, None, False), ({"a": [1.0]}, {"a": [1 + 1e-9]}, 1e-6, True),
        ({"a": 1}, {"b": 1}, 1e-6, False),
        ({"a": 1, "b": 2}, {"a": 1}, None, False), (2.0, True, 5.0, False), (10**400, 1.0, 1e-6, False),
        (10**400, 10**400, 1e-6, True),
        (float("nan"), 1.0, 1e-6, False), (float("inf"), float("inf"), 1e-6, True), ("1", 1, None, False),
        ({1, 2}, {2, 1}, None, True),
        (None, 0, None, False), ("", [], None, False), ((1.0, "a"), (1.0000001, "a"), 1e-6, True),
    ],
)  # fmt: skip
def test_same_value(got: Any, expected: Any, tolerance: float | None, same: bool) -> None:
    assert same_value(got, expected, tolerance) is same


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(0, 3) | st.floats(0, 2) | st.text(max_size=2),
    lambda inner: (
        st.lists(inner, max_size=3) | st.tuples(inner) | st.dictionaries(st.integers(0, 3), inner, max_size=2)
    ),
)


@given(PLAIN, PLAIN)
def test_same_value_is_equality_of_plain_data(a: Any, b: Any) -> None:
    assert same_value(a, b, None) == (a == b)
    assert same_value(a, a, None)


# ---- weak


def test_weak_trust_grades_in_one_process_and_can_be_cheated(grader: Grader) -> None:
    tests = AssertTests("assert f(2) == 4", "f")
    assert grader("def f(x): return x * x", tests, trust="weak").passed == 1
    wrong = grader("def f(x): return x", tests, trust="weak")
    assert (wrong.passed, wrong.outcome) == (0, Outcome.OK)
    cheat = "class A(int):\n    def __eq__(self, other): return True\ndef f(x): return A()"
    assert grader(cheat, tests, trust="weak").passed == 1
    assert grader(cheat, tests).passed == 0
