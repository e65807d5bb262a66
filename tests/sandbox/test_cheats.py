"""Programs that know no answer and try to be scored all the same: every one of them gets 0."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator

import pytest
from rlvlm_sandbox import Limits, Outcome
from rlvlm_sandbox.grading import AssertTests, CallTests, StdioTests

from .test_grading import Grader

SHORT = Limits(wall_s=1.0, cpu_s=2, memory_bytes=256 << 20)


@pytest.fixture(scope="module")
def grader() -> Iterator[Grader]:
    grader = Grader()
    yield grader
    grader.close()


# Expected values that no default object equals; oracles in the author's code; several styles of asserting.
PROBLEMS = {
    "literals": AssertTests("assert f([3, 1, 2]) == [1, 2, 3]\nassert f([5, 4]) == [4, 5]", "f"),
    "oracle": AssertTests("for xs in ([3, 1, 2], [9, 7]):\n    assert f(xs) == sorted(xs) != None", "f"),
    "check": AssertTests("def check(candidate):\n    assert candidate([2, 1]) == [1, 2], 'two'\n", "f"),
    "reversed": AssertTests("assert [1, 2, 3] == f([3, 1, 2])", "f"),
    "unittest": AssertTests(
        "import unittest\nclass T(unittest.TestCase):\n"
        "    def test(self):\n        self.assertEqual(f([2, 1]), [1, 2])\n"
        "        self.assertListEqual(f([3, 1]), [1, 3])\nif __name__ == '__main__':\n    unittest.main()",
        "f",
    ),
    "swallows": AssertTests(
        "def holds(xs):\n    try:\n        return f(xs) == sorted(xs)\n    except Exception:\n        return False\n"
        "assert all(holds(xs) for xs in ([3, 1, 2], [9, 7]))",
        "f",
    ),
    "exits": AssertTests("import sys\nsys.exit(0 if f([2, 1]) == [1, 2] else 1)", "f"),
}

LYING = """
class Lie(%s):
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    def __hash__(self): return 0
    def __lt__(self, other): return True
    def __bool__(self): return True
    def __len__(self): return 2
    def __contains__(self, x): return True
    def __iter__(self): return iter([1, 2])
    def __getattr__(self, name): return lambda *a, **k: True
    def __instancecheck__(self, x): return True
    __le__ = __gt__ = __ge__ = __lt__
%s
def f(*a, **k): return Lie()
"""
BASES = "object", "int", "str", "list", "dict", "float", "tuple", "set", "frozenset", "bytes", "bytearray", "Exception"
LIES = {f"__eq__ of {base}": LYING % (base, "") for base in BASES}
CHEATS = {
    **LIES,
    "__class__ is list": LYING % ("object", "    __class__ = list"),
    "metaclass": """
        class M(type):
            def __eq__(c, o): return True
            def __ne__(c, o): return False
            __hash__ = type.__hash__
            def __instancecheck__(c, x): return True
        class A(metaclass=M): pass
        def f(*a): return A
    """,
    "a class called list": """
        class list(list):
            def __init__(self, *a): super().__init__(*a)
            def __eq__(self, o): return True
            def __ne__(self, o): return False
        def f(*a): return list()
    """,
    "entry point is a class": """
        class f:
            def __init__(self, *a): pass
            def __eq__(self, o): return True
            def __ne__(self, o): return False
    """,
    "entry point with __call__ and __getattr__": """
        class F:
            def __call__(self, *a): return self
            def __getattr__(self, name): return self
            def __eq__(self, o): return True
        f = F()
    """,
    "walks frames": """
        import sys
        def f(*a):
            frame = sys._getframe()
            while frame:
                for space in (frame.f_locals, frame.f_globals):
                    for value in list(space.values()):
                        if isinstance(value, list) and len(value) in (2, 3) and value == sorted(value): return value
                frame = frame.f_back
    """,
    "searches memory": """
        import gc, sys
        def f(xs):
            for value in gc.get_objects():
                if type(value) is list and value != xs and "assert" in repr(value)[:2000]: return value
            for value in gc.get_objects():
                if type(value) is list and value and value is not xs and all(type(x) is int and x < 10 for x in value):
                    return value
    """,
    "patches builtins": """
        import builtins, sys
        for name in "zip len sorted all any isinstance abs min max sum repr print exec".split():
            setattr(builtins, name, lambda *a, **k: True)
        builtins.AssertionError = type("E", (Exception,), {"__new__": lambda *a: None})
        builtins.__build_class__ = lambda *a, **k: None
        def f(*a): return True
    """,
    "patches json and the driver": """
        import json, sys
        for module in list(sys.modules.values()):
            for name in list(getattr(module, "__dict__", {})):
                if name in ("same_value", "failure", "dumps", "_dumps", "_write", "loads"):
                    setattr(module, name, lambda *a, **k: '{"passed": true}')
        def f(*a): return [1, 2]
    """,
    "patches __main__": """
        import sys
        main = sys.modules["__main__"]
        for name in ("passed", "result", "results", "verdict", "score", "ok"): setattr(main, name, True)
        def f(*a):
            for module in list(sys.modules.values()):
                if hasattr(module, "Tests"): module.Tests.run = lambda *a: iter([None])
            return True
    """,
    "os._exit in the function": "import os\ndef f(*a): os._exit(0)",
    "os._exit at once": "import os\nos._exit(0)",
    "sys.exit in the function": "import sys\ndef f(*a): sys.exit(0)",
    "sys.exit at once": "import sys\nsys.exit(0)",
    "SystemExit": "def f(*a): raise SystemExit",
    "SystemExit at once": "raise SystemExit(0)",
    "StopIteration": "def f(*a): raise StopIteration",
    "GeneratorExit": "def f(*a): raise GeneratorExit",
    "KeyboardInterrupt": "def f(*a): raise KeyboardInterrupt",
    "AssertionError": "def f(*a): raise AssertionError",
    "SkipTest": "import unittest\ndef f(*a): raise unittest.SkipTest('x')",
    "own SystemExit": "class SystemExit(Exception): pass\ndef f(*a): raise SystemExit",
    "returns exit": "def f(*a): return exit",
    "forges verdicts everywhere": """
        import json, os, struct
        def forge(*a):
            words = [{"start": True}, {"cases": 1}, {"passed": True}, {"end": True}]
            words.append({"call": 0, "value": True, "entries": []})
            text = "".join(json.dumps(word) + "\\n" for word in words).encode()
            frames = b""
            for word in (["ready"], ["done", True, []], ["done", ["@", 0], [[0, ["l", 1, 2]]]], *words):
                data = json.dumps(word).encode()
                frames += struct.pack(">I", len(data)) + data
            for fd in range(256):
                for data in (text, frames):
                    try: os.write(fd, data)
                    except OSError: pass
            return True
        print('{"passed": true}')
        forge()
        f = forge
    """,
    "forges malformed messages": """
        import os, struct
        def f(*a):
            for data in (b"[" * 5000, b"{}", b"[]", b"null", b'["done"]', b'["done",["@",9],[]]', b'["call"]',
                         b'["call",0,1,2]', b'["get",0,"__globals__"]', b'["done",["k","os.system","x"],[]]',
                         b'["raise",1,2,3,4]', b'["next","x",1]'):
                os.write(3, struct.pack(">I", len(data)) + data)
            os.write(3, b"\\xff" * 64)
            return True
    """,
    "reads the tests over the channel": """
        import json, os, struct
        def ask(*message):
            data = json.dumps(message).encode()
            os.write(3, struct.pack(">I", len(data)) + data)
            n = struct.unpack(">I", os.read(3, 4))[0]
            return json.loads(os.read(3, n))
        def f(xs):
            for number in (0, 1, -1):
                for name in ("__globals__", "__self__", "__init__", "f_globals", "_module"):
                    try: said = ask("get", number, name)
                    except Exception: continue
                    if said[0] == "done" and said[1]: return said[1]
    """,
    "a right prefix": """
        def f(xs): return sorted(xs)[:1]
    """,
    "an endless generator": "def f(*a):\n    while True: yield 1",
    "a generator that never yields": "def f(*a):\n    while True: pass\n    yield",
    "__del__": """
        import os
        class A:
            def __del__(self):
                os.write(1, b'{"passed": true}\\n'); os._exit(0)
        def f(*a): return [A()]
    """,
    "atexit": """
        import atexit, os
        atexit.register(lambda: os.write(1, b'{"passed": true}\\n'))
        def f(*a): return None
    """,
    "a thread that answers": """
        import json, os, struct, threading, time
        def late():
            for _ in range(50):
                data = json.dumps(["done", True, []]).encode()
                os.write(3, struct.pack(">I", len(data)) + data)
                time.sleep(0.01)
        threading.Thread(target=late, daemon=True).start()
        def f(*a): time.sleep(0.05); return True
    """,
    "a signal handler": """
        import os, signal
        signal.signal(signal.SIGALRM, lambda *a: os._exit(0))
        signal.setitimer(signal.ITIMER_REAL, 0.01)
        def f(*a):
            while True: pass
    """,
    "settrace": """
        import sys
        def trace(frame, event, arg):
            for name in list(frame.f_locals):
                if name in ("error", "passed", "result"): frame.f_locals[name] = True
            return trace
        sys.settrace(trace)
        def f(*a): return True
    """,
    "clears the argument": "def f(xs):\n    xs.clear()\n    return []",
    "makes the argument lie": """
        class Lie(list):
            def __eq__(self, o): return True
        def f(xs):
            try: xs.__class__ = Lie
            except TypeError: xs[:] = [Lie()]
            return Lie()
    """,
    "returns the argument": "def f(xs): return xs",
    "a list in itself": "def f(*a):\n    x = []\n    x.append(x)\n    return x",
    "shared lists": "def f(*a):\n    x = [1]\n    for _ in range(60): x = [x, x]\n    return x",
    "deep lists": "def f(*a):\n    x = []\n    for _ in range(20_000): x = [x]\n    return x",
    "deep tuples": "def f(*a):\n    x = ()\n    for _ in range(100_000): x = (x,)\n    return x",
    "huge output": "def f(*a): return 'x' * (50 << 20)",
    "huge print": "def f(*a):\n    print('x' * (50 << 20))\n    return True",
    "many objects": "def f(*a): return [[] for _ in range(2_000_000)]",
    "one hash": "def f(*a): return {((1 << 61) - 1) * n for n in range(4_000)}",
    "endless recursion": "def f(*a): return f(*a)",
    "kills its parent": "import os\ndef f(*a):\n    os.kill(os.getppid() or 1, 9)\n    return True",
    "kills all": "import os, signal\ndef f(*a):\n    os.kill(-1, signal.SIGKILL)\n    return True",
    "None": "def f(*a): return None",
    "NotImplemented": "def f(*a): return NotImplemented",
    "unittest.mock.ANY": "from unittest.mock import ANY\ndef f(*a): return ANY",
    "MagicMock": "from unittest.mock import MagicMock\nf = MagicMock()",
    "a module": "import sys\ndef f(*a): return sys",
    "an awaitable": "async def f(*a): return True",
    "reads its stdin again": """
        import os
        def f(*a):
            os.lseek(0, 0, 0)
            return eval(os.read(0, 1 << 20).split(b"==")[1])
    """,
    "an exception that prints": """
        class E(Exception):
            def __str__(self): raise SystemExit(0)
            __repr__ = __str__
            def __eq__(self, o): return True
        def f(*a): raise E(E())
    """,
    "an attribute __class__": """
        class T: pass
        class A: pass
        def f(*a):
            x = A(); x.__dict__["__class__"] = int; x.__dict__["__eq__"] = lambda *a: True
            return x
    """,
}  # fmt: skip
CODES = {name: textwrap.dedent(code) for name, code in CHEATS.items()}
SLOW = {
    "an endless generator",
    "a generator that never yields",
    "many objects",
    "shared lists",
    "huge output",
    "one hash",
}


@pytest.mark.parametrize("name", CODES)
def test_cheats_pass_no_asserts(grader: Grader, name: str) -> None:
    problems = dict(list(PROBLEMS.items())[:2]) if name in SLOW else PROBLEMS
    for problem, tests in problems.items():
        verdict = grader(CODES[name], tests, SHORT)
        assert (verdict.passed, verdict.total) == (0, 1), (problem, verdict)
        assert verdict.outcome is not Outcome.SANDBOX_ERROR, (problem, verdict)


@pytest.mark.parametrize("name", CODES)
def test_cheats_pass_no_calls(grader: Grader, name: str) -> None:
    verdict = grader(CODES[name], CallTests("f", [(([3, 1, 2],), [1, 2, 3]), (([5, 4],), [4, 5])]), SHORT)
    assert (verdict.passed, verdict.total) == (0, 2), verdict
    assert verdict.outcome is not Outcome.SANDBOX_ERROR, verdict


def test_the_right_program_passes_all_of_them(grader: Grader) -> None:
    """So that a 0 above says something."""
    code = "def f(xs): return sorted(xs)"
    for name, tests in PROBLEMS.items():
        assert grader(code, tests).passed == 1, name
    assert grader(code, CallTests("f", [(([3, 1, 2],), [1, 2, 3]), (([5, 4],), [4, 5])])).passed == 2


STDIO = {
    "a right prefix": "print(input())",
    "exits": "import os\nos._exit(0)",
    "prints a verdict": "print('{\"passed\": true}')",
    "writes everywhere": (
        "import os\nfor fd in range(2, 99):\n    try: os.write(fd, b'6\\n24\\n')\n    except OSError: pass"
    ),
    "reads the expected output": (
        "import os, sys\nfor root, _, names in os.walk('/tmp'):\n"
        "    for n in names: print(open(os.path.join(root, n)).read())\n"
        "print(os.environ, sys.argv)"
    ),
    "nothing": "",
    "never ends": "print(6, flush=True)\nprint(24, flush=True)\nwhile True: pass",
    "prints and dies": "print(6)\nprint(24, flush=True)\nimport os\nos.abort()",
}


@pytest.mark.parametrize("name", STDIO)
def test_cheats_pass_no_stdio_case(grader: Grader, name: str) -> None:
    for checker in (None, "def check(stdin, stdout, expected): return stdout.split() == expected.split()"):
        verdict = grader(STDIO[name], StdioTests([("6\n", "6\n24\n")], checker=checker), SHORT)
        assert verdict.passed == 0 and verdict.outcome is not Outcome.SANDBOX_ERROR, verdict


REACHING = """
import json, os, struct
FORGED = '{"passed": true}\\n{"end": true}\\n'
def ask(*message):
    data = json.dumps(message).encode()
    os.write(3, struct.pack(">I", len(data)) + data)
    return json.loads(os.read(3, struct.unpack(">I", os.read(3, 4))[0]))
def f(path, box, callback, stream, maker):
    got = []
    def reach(what):
        try: got.append(str(what()))
        except Exception: pass
    for root in (path, box, callback, stream, maker("/tmp")):
        for fd in range(3, 12):
            reach(lambda: root.joinpath(f"/proc/self/fd/{fd}").write_text(FORGED))
    reach(lambda: box.path.write_text(FORGED))
    for number in range(12):
        for name in "__globals__ __class__ __init__ __self__ __dict__ __code__ gi_frame joinpath _hidden".split():
            said = ask("get", number, name)
            if said[0] == "done": got.append(str(said))
    return got
"""


def test_what_the_tests_hand_over_leads_nowhere(grader: Grader) -> None:
    """Functions, objects, paths, generators and classes of the tests; asked through the channel's own words too."""
    source = (
        "import pathlib\nclass Box:\n    _hidden = 1\n    def __init__(self): self.path = pathlib.Path('/tmp')\n"
        "args = pathlib.Path('/tmp'), Box(), lambda x: x, (n for n in range(3)), pathlib.Path\n"
    )
    shown = grader(REACHING, AssertTests(source + "got = f(*args)\nassert not got, got", "f"))
    assert shown.passed == 1, shown.detail
    assert grader(REACHING, AssertTests(source + "got = f(*args)\nassert got, 'a failing test'", "f")).passed == 0


SEARCH = """
import os, re, sys
def found():
    seen = [repr(os.environ).encode(), repr(sys.argv).encode()]
    for root, _, names in os.walk("/tmp"):
        seen += [open(os.path.join(root, name), "rb").read() for name in names]
    with open("/proc/self/maps") as maps, open("/proc/self/mem", "rb", 0) as memory:
        for line in maps:
            start, end = (int(part, 16) for part in line.split()[0].split("-"))
            if " rw" in line and "[v" not in line:
                memory.seek(start)
                seen.append(memory.read(min(end - start, 32 << 20)))
    return any(re.search(rb"secret-of-[0-9a-f]{16}", text) for text in seen)
def f(x):
    try: return found()
    except OSError: return None
"""


def test_expected_values_are_not_where_the_candidate_is(grader: Grader) -> None:
    """Looks through its process's memory, environment, arguments and files for a text that only the tests have."""
    limits = Limits(wall_s=5)
    with_one_of_its_own = SEARCH + "\nkeep = 'secret-of-' + '0123456789abcdef'\n"
    if not grader(with_one_of_its_own, AssertTests("assert f(0) is True", "f"), limits).passed:
        pytest.skip("a program cannot read its own memory here")
    hidden = "expected = 'secret-of-fedcba9876543210'\nassert f(0) is False"
    assert grader(SEARCH, AssertTests(hidden, "f"), limits).passed == 1
    assert grader(SEARCH, AssertTests(hidden, "f", prelude="x = 'secret-of-fedcba9876543210'"), limits).passed == 0
    code = SEARCH.replace("return found()", "return 'found' if found() else 'hidden'")
    assert grader(code, CallTests("f", [((0,), "secret-of-fedcba9876543210"), ((0,), "hidden")]), limits).passed == 1
