"""Ordinary programs, which must not notice where they run, and what one leaves to the next. Standard library only.

What they say was worked out by hand, or is what CPython 3.11 says of the same program.
"""

from __future__ import annotations

import re
from typing import Any

from .cases import OWN_ROOT, Case


def _honest(name: str, code: str, says: str | bytes | None = None, **more: Any) -> Case:
    return Case(name, code, says=says.encode() if isinstance(says, str) else says, told=False, **more)


def _fails(name: str, code: str, complains: str, says: str | None = "", exit_code: int = 1, **more: Any) -> Case:
    return _honest(name, code, says, complains=complains, exit_code=exit_code, outcomes=("runtime_error",), **more)


_LANGUAGE = [
    _honest(
        "50,000 frames",
        "import sys\nsys.setrecursionlimit(60_000)\ndef f(n): return n and 1 + f(n - 1)\nprint(f(50_000))",
        "50000\n",
    ),
    _honest(
        "more frames in a thread with a stack of its own",
        "import sys, threading\nsys.setrecursionlimit(1 << 20)\nthreading.stack_size(1 << 28)\n"
        "def f(n): return n and 1 + f(n - 1)\nthread = threading.Thread(target=lambda: print(f(100_000)))\n"
        "thread.start()\nthread.join()",
        "100000\n",
    ),
    _honest(
        "10,000 frames through C",
        "import functools, sys\nsys.setrecursionlimit(60_000)\n@functools.cache\ndef f(n): return n and 1 + f(n - 1)\n"
        "print(f(10_000))",
        "10000\n",
    ),
    _honest(
        "a recursion without end, caught",
        "def f(): f()\ntry: f()\nexcept RecursionError as error: print(error)",
        "maximum recursion depth exceeded\n",
    ),
    _honest(
        "it is the main module",
        "import sys\nx: int = 3\nprint(__name__, __annotations__, sys.modules['__main__'].x, len(sys.argv), __doc__)\n"
        "print([name for name in globals() if not name.startswith('__')])\nfrom __main__ import x as y\nprint(y)",
        "__main__ {'x': <class 'int'>} 3 1 None\n['sys', 'x']\n3\n",
    ),
    _honest(
        "its classes can be pickled and inspected",
        "from __future__ import annotations\nimport dataclasses, inspect, pickle, typing\n@dataclasses.dataclass\n"
        "class Point:\n    x: int\n    y: Point | None = None\nprint(pickle.loads(pickle.dumps(Point(1, Point(2)))))\n"
        "print(typing.get_type_hints(Point)['x'], inspect.getsource(Point).splitlines()[1])",
        "Point(x=1, y=Point(x=2, y=None))\n<class 'int'> class Point:\n",
    ),
    _honest(
        "decimal, fractions, dates, statistics",
        "import datetime, decimal, fractions, statistics\nprint(decimal.Decimal('0.1') + decimal.Decimal('0.2'))\n"
        "print(fractions.Fraction(1, 3) + fractions.Fraction(1, 6), statistics.median([3, 1, 2]))\n"
        "print(datetime.date(2024, 2, 28) + datetime.timedelta(2))",
        "0.3\n1/2 2\n2024-03-01\n",
    ),
    _honest("a seed", "import random\nprint(random.Random(0).random())", "0.8444218515250481\n"),
    _honest(
        "the library",
        "import hashlib, importlib\nfor name in '''argparse array ast base64 bisect calendar cmath codecs collections"
        " concurrent.futures contextlib copy csv ctypes decimal difflib dis doctest email enum fractions functools gc"
        " getpass glob gzip heapq hmac html http.client inspect io itertools json keyword linecache locale logging lzma"
        " math mmap multiprocessing operator optparse os.path pathlib pickle platform pprint queue random re sched"
        " secrets select selectors shelve shlex shutil signal socket sqlite3 ssl statistics string struct subprocess"
        " tarfile tempfile textwrap threading timeit token tokenize traceback types typing unicodedata unittest"
        " urllib.request uuid warnings weakref xml.etree.ElementTree zipfile zlib zoneinfo'''.split():\n"
        "    importlib.import_module(name)\nprint(hashlib.sha256(b'').hexdigest()[:8])",
        "e3b0c442\n",
    ),
    _honest(
        "a data base in memory",
        "import sqlite3\ndb = sqlite3.connect(':memory:')\ndb.execute('create table t (x)')\n"
        "db.executemany('insert into t values (?)', [(1,), (2,)])\n"
        "print(db.execute('select sum(x) from t').fetchone())",
        "(3,)\n",
    ),
    _honest(
        "tests of its own",
        "import unittest\nclass T(unittest.TestCase):\n    def test(self): self.assertEqual(1, 1)\nunittest.main()",
        "",
        complains=r"Ran 1 test in [\s\S]*OK",
    ),
]

_TOGETHER = [
    _honest(
        "threads",
        "import threading\nlock, total = threading.Lock(), 0\ndef add():\n    global total\n    for _ in range(1000):\n"
        "        with lock: total += 1\nthreads = [threading.Thread(target=add) for _ in range(8)]\n"
        "for t in threads: t.start()\nfor t in threads: t.join()\nprint(total)",
        "8000\n",
    ),
    _honest(
        "a pool of threads",
        "from concurrent.futures import ThreadPoolExecutor\nprint(list(ThreadPoolExecutor(4).map(abs, [-1, -2])))",
        "[1, 2]\n",
    ),
    _honest(
        "a thread that outlives the main one, and one that does not count",
        "import threading, time\ndef late():\n    time.sleep(0.1)\n    print('late')\n"
        "threading.Thread(target=late).start()\nthreading.Thread(target=time.sleep, args=(60,), daemon=True).start()\n"
        "print('main')",
        "main\nlate\n",
    ),
    _honest(
        "asyncio",
        "import asyncio\nasync def f(x):\n    await asyncio.sleep(0.01 * x)\n    return x\nasync def main():\n"
        "    print(await asyncio.gather(f(2), f(1), asyncio.to_thread(abs, -3)))\nasyncio.run(main())",
        "[2, 1, 3]\n",
    ),
    _honest(
        "a pipe and a pair of sockets",
        "import os, socket\na, b = socket.socketpair()\na.sendall(b'pair')\nr, w = os.pipe()\nos.write(w, b'pipe')\n"
        "print(b.recv(9), os.read(r, 9))",
        "b'pair' b'pipe'\n",
    ),
    _honest(
        "processes",
        "import multiprocessing, os, subprocess, sys\nprint(multiprocessing.Pool(4).map(abs, [-1, -2]), flush=True)\n"
        "print(subprocess.run(['sh', '-c', 'echo $0', 'x'], capture_output=True, text=True).stdout, end='')\n"
        "print(subprocess.check_output([sys.executable, '-c', 'print(1)']), os.system('exit 3') >> 8)",
        "[1, 2]\nx\nb'1\\n' 3\n",
        profile="tool",
        backends=OWN_ROOT,
    ),
    _honest(
        "a server and its client",
        "import socket, threading\nserver = socket.socket(socket.AF_UNIX)\nserver.bind('s')\nserver.listen()\n"
        "threading.Thread(target=lambda: server.accept()[0].sendall(b'hello')).start()\n"
        "client = socket.socket(socket.AF_UNIX)\nclient.connect('s')\nprint(client.recv(9))",
        "b'hello'\n",
        profile="tool",
        backends=OWN_ROOT,
    ),
]

_STREAMS = [
    _honest("input by lines", "print(int(input()) + int(input()))\nprint(input())", "5\nx y\n", stdin=b"2\n3\nx y\n"),
    _honest(
        "no more input",
        "import sys\nprint(input())\ntry: input()\nexcept EOFError: print('end')\nprint(repr(sys.stdin.read()))",
        "1\nend\n''\n",
        stdin=b"1",
    ),
    _honest("input as bytes", "import sys\nprint(sys.stdin.buffer.read())", "b'\\xff\\x00'\n", stdin=b"\xff\0"),
    _honest("input by iteration", "import sys\nprint([*sys.stdin])", "['a\\r\\n', 'b']\n", stdin=b"a\r\nb"),
    _honest("input by descriptor", "import os\nprint(os.read(0, 3), open(0).read())", "b'abc' de\n", stdin=b"abcde"),
    _honest("input by name", "print(open('/dev/stdin').read())", "by name\n", stdin=b"by name", backends=OWN_ROOT),
    _honest("input by readline", "import sys\nprint(repr(sys.stdin.readline()))", "'a\\n'\n", stdin=b"a\nb"),
    _honest("no terminal", "import sys\nprint(sys.stdin.isatty(), sys.stdout.isatty())", "False False\n"),
    _honest("input in words of the world", "print(input()[::-1])", "π🙂\n", stdin="🙂π\n".encode()),
    _honest(
        "much input",
        "import sys\nprint(sum(map(int, sys.stdin.read().split())))",
        "499999500000\n",
        stdin="\n".join(map(str, range(1_000_000))).encode(),
    ),
    _honest("words of the world", "print('π🙂', '\\udcff')", "π🙂 ".encode() + b"\xff\n"),
    _fails("half a character", "print('\\ud800')", "UnicodeEncodeError"),
    _honest("no newline at the end", "import sys\nsys.stdout.write('x')", "x"),
    _honest(
        "the output's own way",
        "import os, sys\nos.write(1, b'1')\nprint(2, file=open(1, 'w', closefd=False))\nprint(3)",
        "12\n3\n",
    ),
    _honest("as much output as allowed", "print('x' * 999)", b"x" * 999 + b"\n", limits={"output_bytes": 1000}),
    _honest("stdout closed", "import sys\nprint('x')\nsys.stdout.close()", "x\n"),
]

_FAILS = """def f(x):
    return 1 / x

try:
    f(0)
except ZeroDivisionError as error:
    raise KeyError('k') from error
"""
# The whole of stderr: no frame of ours. Some builds of Python underline what failed.
_TRACEBACK = (
    r'^Traceback \(most recent call last\):\n  File "[^"\n]*main.py", line 5, in <module>\n    f\(0\)\n'
    r'  File "[^"\n]*main.py", line 2, in f\n    return 1 / x\n(?: +~~\^~~\n)?'
    r"ZeroDivisionError: division by zero\n\nThe above exception was the direct cause of the following exception:\n\n"
    r'Traceback \(most recent call last\):\n  File "[^"\n]*main.py", line 7, in <module>\n'
    r"    raise KeyError\('k'\) from error\nKeyError: 'k'\n$"
)
# Where there is no file the lines themselves may be missing.
_TRACEBACK_WITHOUT_LINES = re.sub(r"\\n    .*?\\n", lambda _: r"\n(?:    .*\n)*", _TRACEBACK)

_ENDS = [
    *(
        _honest(f"sys.exit({what})", f"import sys\nprint('x')\nsys.exit({what})", "x\n", exit_code=0)
        for what in ("", "None", "0", "256")
    ),
    *(
        _fails(f"sys.exit({what})", f"import sys\nprint('x')\nsys.exit({what})", complains, "x\n", exit_code)
        for what, complains, exit_code in (("3", "^$", 3), ("-1", "^$", 255), ("'y'", "^y\n$", 1), ("[]", "", 1))
    ),
    _honest("exit and quit", "print(callable(quit))\nexit(0)", "True\n"),
    _fails("words on leaving", "exit('words')", "^words\n$"),
    _honest("left at once", "import os\nprint('lost')\nos._exit(0)", "", exit_code=0),
    _honest(
        "left in a thread",
        "import sys, threading\nt = threading.Thread(target=sys.exit, args=(3,))\nt.start()\nt.join()\nprint('on')",
        "on\n",
        exit_code=0,
    ),
    _fails(
        "atexit",
        "import atexit, sys\natexit.register(print, 'second')\natexit.register(print, 'first')\n"
        "print('main')\nsys.exit(2)",
        "^$",
        "main\nfirst\nsecond\n",
        2,
    ),
    _honest(
        "atexit after an error in it",
        "import atexit\natexit.register(print, 'after')\natexit.register(lambda: 1 / 0)\nprint('main')",
        "main\nafter\n",
        exit_code=0,
        complains="ZeroDivisionError",
    ),
    _fails(
        "an excepthook",
        "import sys\ndef hook(kind, error, trace): print('hook', kind.__name__, error)\nsys.excepthook = hook\n1 / 0",
        "^$",
        "hook ZeroDivisionError division by zero\n",
    ),
    _fails("a traceback", _FAILS, _TRACEBACK, backends=OWN_ROOT),
    _fails("a traceback where there is no file", _FAILS, _TRACEBACK_WITHOUT_LINES, backends=("landlock",)),
    _honest(
        "the stack",
        "import traceback\ndef f(): traceback.print_stack()\nf()",
        "",
        complains=r'File "[^"\n]*main.py", line 3, in <module>\n    f\(\)\n'
        r'  File "[^"\n]*main.py", line 2, in f\n    def f\(\): traceback.print_stack\(\)\n(    +\^+\n)?$',
    ),
    _fails(
        "a syntax error",
        "x = 1\ndef f(:\n    pass",
        r'^  File "[^"\n]*main.py", line 2\n    def f\(:\n +\^\nSyntaxError: invalid syntax\n$',
    ),
    _honest("memory caught", "try: x = bytearray(1 << 40)\nexcept MemoryError: print('caught')", "caught\n"),
    _honest("memory not caught", "x = bytearray(1 << 40)", outcomes=("memory",), exit_code=1),
    _honest("memory within the limit", "x = bytearray(700 << 20)\nprint(len(x) >> 20)", "700\n"),
    _honest(
        "a signal of its own, handled",
        "import os, signal\nsignal.signal(signal.SIGTERM, lambda *_: print('handled'))\nos.kill(os.getpid(), 15)",
        "handled\n",
    ),
    _honest(
        "an alarm",
        "import signal, time\ndef ring(*_): raise TimeoutError('late')\nsignal.signal(signal.SIGALRM, ring)\n"
        "signal.setitimer(signal.ITIMER_REAL, 0.05)\ntry: time.sleep(3)\nexcept TimeoutError as error: print(error)",
        "late\n",
    ),
    _honest(
        "an interrupt of its own, caught",
        "import os, signal, time\ntry:\n    os.kill(os.getpid(), signal.SIGINT)\n    time.sleep(1)\n"
        "except KeyboardInterrupt: print('caught')",
        "caught\n",
    ),
    _honest("ended by SIGTERM", "import os\nos.kill(os.getpid(), 15)", "", outcomes=("signal",), exit_code=-15),
    _honest("ended by SIGUSR1", "import os\nos.kill(os.getpid(), 10)", "", outcomes=("signal",), exit_code=-10),
    _fails("a process is not for a judge", "import os\nos.fork()", "PermissionError"),
]

_FILES = [
    _honest(
        "files",
        "import os, pathlib, tempfile\nwith tempfile.TemporaryDirectory() as place:\n"
        "    path = pathlib.Path(place, 'x')\n    path.write_text('y' * 1000)\n"
        "    print(path.stat().st_size, os.listdir(place))\nwith tempfile.NamedTemporaryFile('w+') as file:\n"
        "    file.write('a')\n    file.seek(0)\n    print(file.read())\nopen('here', 'w').close()\n"
        "print(os.getcwd(), os.path.exists('/tmp/here'), os.environ['HOME'])",
        "1000 ['x']\na\n/tmp True /tmp\n",
        backends=OWN_ROOT,
    ),
    _honest(
        "a module of its own",
        "open('mine.py', 'w').write('x = 5')\nimport mine\nprint(mine.x, open(__file__).readline(), end='')",
        "5 open('mine.py', 'w').write('x = 5')\n",
        backends=OWN_ROOT,
    ),
    _honest(
        "the devices",
        "print(len(open('/dev/urandom', 'rb').read(8)), open('/dev/zero', 'rb').read(2), open('/dev/null').read())\n"
        "open('/dev/null', 'w').write('x')",
        "8 b'\\x00\\x00' \n",
    ),
]

_SCIENCE = [
    _honest(
        "numpy and sympy",
        "import numpy as np, sympy\na = np.arange(6.0).reshape(2, 3)\nprint((a @ a.T).tolist())\n"
        "print(np.linalg.det([[1, 2], [3, 4]]).round(9))\nx = sympy.symbols('x')\n"
        "print(sympy.factor(x**2 - 1), sympy.integrate(2 * x, x), sympy.Rational(1, 3) + 1)",
        "[[5.0, 14.0], [14.0, 50.0]]\n-2.0\n(x - 1)*(x + 1) x**2 4/3\n",
        image="py-sci",
    ),
    _honest(
        "seeds of numpy",
        "import numpy as np\nnp.random.seed(0)\nprint(round(np.random.rand(), 6))\n"
        "print(round(np.random.default_rng(0).random(), 6))",
        "0.548814\n0.636962\n",
        image="py-sci",
    ),
]

HONEST = [*_LANGUAGE, *_TOGETHER, *_STREAMS, *_ENDS, *_FILES, *_SCIENCE]

# Run in turn on one worker: what `look` says must not change by what `soil` does; what `chance` says must change.
STATE = [
    _honest(
        "look",
        r"""
import builtins, decimal, gc, json, locale, os, re, resource, signal, socket, sys, threading, time, warnings
def names(place):
    try:
        return sorted(os.listdir(place))
    except OSError as error:
        return type(error).__name__
mask = os.umask(0)
print(json.dumps({
    "files": [names(place) for place in (".", "/tmp", "/dev/shm")], "place": os.getcwd(), "mask": mask,
    "env": sorted(os.environ.items()), "path": sys.path, "argv": sys.argv, "modules": sorted(sys.modules),
    "print": type(print).__name__, "len": len.__module__, "builtins": sorted(vars(builtins)),
    "dumps": json.dumps.__module__, "compile": re.compile.__module__, "hooks": sys.excepthook.__module__,
    "recursion": sys.getrecursionlimit(), "switch": sys.getswitchinterval(), "digits": sys.get_int_max_str_digits(),
    "gc": [gc.isenabled(), gc.get_threshold()], "trace": str(sys.gettrace()), "filters": len(warnings.filters),
    "handlers": [str(signal.getsignal(number)) for number in (1, 10, 13, 14, 15)],
    "blocked": str(signal.pthread_sigmask(0, [])), "timer": signal.getitimer(signal.ITIMER_REAL),
    "limits": [resource.getrlimit(kind) for kind in range(16)], "threads": threading.active_count(),
    "stack": threading.stack_size(), "decimals": decimal.getcontext().prec, "locale": locale.setlocale(locale.LC_ALL),
    "streams": [stream.name for stream in (sys.stdin, sys.stdout, sys.stderr)], "input": sys.stdin.read(),
    "host": socket.gethostname(), "zone": time.tzname,
}))
""",
    ),
    _honest(
        "soil",
        r"""
import builtins, decimal, gc, json, os, re, resource, signal, sys, threading, time, types, warnings
for place in ("/tmp", ".", "/dev/shm"):
    try:
        open(f"{place}/left", "w").close()
    except OSError:
        pass
decimal.getcontext().prec = 3
os.environ["LEFT"] = "x"
sys.path.insert(0, "/left")
sys.modules["left"] = types.ModuleType("left")
sys.argv.append("left")
builtins.left = 1
builtins.len = lambda x: 7
json.dumps = lambda *_, **__: "{}"
re.compile = None
signal.signal(signal.SIGUSR1, lambda *_: None)
signal.signal(signal.SIGHUP, signal.SIG_IGN)
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
resource.setrlimit(resource.RLIMIT_NOFILE, (20, 20))
sys.setrecursionlimit(777)
sys.setswitchinterval(1)
sys.excepthook = print
threading.stack_size(1 << 20)
warnings.simplefilter("error")
gc.disable()
gc.set_threshold(1)
sys.set_int_max_str_digits(0)
os.umask(0o777)
os.chdir("/")
os.environ["TZ"] = "America/Lima"
time.tzset()
sys.stdout = sys.stderr
builtins.print = None
""",
    ),
    _honest(
        "chance",
        "import os, random, secrets, tempfile, uuid\nprint(random.random(), random.randrange(10**9), uuid.uuid4(),"
        " secrets.token_hex(), os.urandom(9).hex(), next(tempfile._get_candidate_names()), sep=',')",
    ),
    _honest(
        "numpy's chance",
        "import numpy as np\nprint(np.random.rand(), np.random.default_rng().random(), sep=',')",
        image="py-sci",
    ),
    _honest(
        "hold a secret", "x = input(), '0fedcba987654321' * 2\nprint(len(x[0]))", "32\n", stdin=b"0123456789abcdef" * 2
    ),
    _honest(
        "look for a secret",
        r"""
import re
found = set()
with open("/proc/self/maps") as maps, open("/proc/self/mem", "rb", 0) as memory:
    for line in maps:
        start, end = (int(address, 16) for address in line.split()[0].split("-"))
        if line.split()[1][0] == "r" and "[v" not in line:
            memory.seek(start)
            try:
                found |= set(re.findall(rb"(?:0123456[7]89abcdef|[0]fedcba987654321){2}", memory.read(end - start)))
            except OSError:
                pass
print(found)
""",
        "set()\n",
        backends=OWN_ROOT,
    ),
]
