"""The server, as other clients meet it: with the standard library's client, and with bytes on a socket."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rlvlm_sandbox import Sandbox, probe
from rlvlm_sandbox.fusion import read_order
from rlvlm_sandbox.messages import BadMessage, read_grade_order, read_run_order
from rlvlm_sandbox.sandbox import BACKENDS
from rlvlm_sandbox.serve import Server

HOLDS = sys.platform == "linux" and any(asyncio.run(probe(backend)) is None for backend in BACKENDS)
pytestmark = pytest.mark.skipif(not HOLDS, reason="no sandbox holds here")


class Process:
    """`python -m rlvlm_sandbox serve`, started. lines: what it has said on stderr once it listens."""

    def __init__(self, *options: str, **environment: str) -> None:
        command = [sys.executable, "-m", "rlvlm_sandbox", "serve", "--port", "0", *options]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | environment)
        assert self.process.stderr is not None
        self.line = self.process.stderr.readline()
        self.port = int(self.line.rsplit(" ", 1)[1])

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        with contextlib.closing(connection):
            connection.request(method, path, body if isinstance(body, bytes) else json.dumps(body), headers)
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read())

    def raw(self, sent: bytes) -> bytes:
        """All that comes back until the server closes."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=30) as client:
            client.sendall(sent)
            chunks = []
            while chunk := client.recv(1 << 16):
                chunks.append(chunk)
            return b"".join(chunks)

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(40)


@pytest.fixture(scope="module")
def server() -> Iterator[Process]:
    process = Process("--workers", "2", "--queue", "1")
    yield process
    process.process.kill()
    process.process.wait()


# ---- SandboxFusion


def run_code(server: Process, **order: Any) -> Any:
    status, answer = server.ask("POST", "/run_code", {"language": "python"} | order)
    assert status == 200, answer
    assert set(answer) == {"status", "message", "compile_result", "run_result", "executor_pod_name", "files"}
    return answer


def test_run_code_answers_as_sandbox_fusion_does(server: Process) -> None:
    answer = run_code(server, code="import sys; print(input()); print('e', file=sys.stderr)", stdin="hällo")
    result = answer["run_result"]
    assert 0 < result.pop("execution_time") < 5
    assert answer == {
        "status": "Success", "message": "", "compile_result": None, "executor_pod_name": None, "files": {},
        "run_result": {"status": "Finished", "return_code": 0, "stdout": "hällo\n", "stderr": "e\n"},
    }  # fmt: skip


def test_run_code_failures(server: Process) -> None:
    wrong = run_code(server, code="raise SystemExit(3)")
    assert (wrong["status"], wrong["run_result"]["status"], wrong["run_result"]["return_code"]) == (
        "Failed", "Finished", 3,
    )  # fmt: skip
    slow = run_code(server, code="import time; print(1, flush=True); time.sleep(9)", run_timeout=0.5)
    assert (slow["status"], slow["run_result"]["status"]) == ("Failed", "TimeLimitExceeded")
    assert (slow["run_result"]["return_code"], slow["run_result"]["stdout"]) == (None, "1\n")
    large = run_code(server, code="x = bytearray(300 << 20)", memory_limit_MB=100)
    assert large["status"] == "Failed" and "MemoryError" in large["run_result"]["stderr"]
    binary = run_code(server, code="import os; os.write(1, b'a\\xffb')")
    assert binary["run_result"]["stdout"] == "a\ufffdb"


def test_run_code_takes_and_returns_files(server: Process) -> None:
    files = {"in/a.bin": base64.b64encode(b"\0\xff").decode(), "empty": None}
    code = "data = open('in/a.bin', 'rb').read() + open('empty', 'rb').read()\nopen('b.bin', 'wb').write(data * 2)\n"
    code += "print(sorted(globals().keys() & {'before', 'data'}), __file__)\nraise SystemExit(2)"
    answer = run_code(server, code=code, files=files, fetch_files=["b.bin", "missing"])
    assert answer["files"] == {"b.bin": base64.b64encode(b"\0\xff\0\xff").decode()}
    assert (answer["run_result"]["return_code"], answer["run_result"]["stdout"]) == (2, "['data'] /tmp/main.py\n")
    large = run_code(server, code="open('x', 'wb').write(bytes(5 << 20))", fetch_files=["x"])
    assert len(base64.b64decode(large["files"]["x"])) == 5 << 20


@pytest.mark.skipif(shutil.which("g++") is None or shutil.which("bwrap") is None, reason="g++ or bwrap is missing")
def test_run_code_compiles(server: Process) -> None:
    answer = run_code(server, code='#include <cstdio>\nint main() { puts("x"); return 5; }', language="cpp")
    assert (answer["status"], answer["compile_result"]["return_code"]) == ("Failed", 0)
    assert (answer["run_result"]["return_code"], answer["run_result"]["stdout"]) == (5, "x\n")
    wrong = run_code(server, code="int main() {", language="cpp")
    assert (wrong["status"], wrong["run_result"]) == ("Failed", None)
    assert wrong["compile_result"]["return_code"] == 1 and "error" in wrong["compile_result"]["stderr"]


@pytest.mark.parametrize(
    ("order", "said"),
    [
        ([], "the message is []; give an object"),
        ({"language": "python"}, "code is missing in the message"),
        ({"code": 1, "language": "python"}, "code is 1; give text"),
        ({"code": "", "language": "cobol"}, "language is 'cobol'; give one of python, cpp, nodejs, bash"),
        ({"code": "", "language": "python", "timeout": 1}, "'timeout' is no field of the message"),
        ({"code": "", "language": "python", "run_timeout": "1"}, "run_timeout is '1'; give a number"),
        ({"code": "", "language": "python", "run_timeout": True}, "run_timeout is True; give a number"),
        ({"code": "", "language": "python", "run_timeout": 0}, "run_timeout is 0; give more than 0"),
        ({"code": "", "language": "python", "memory_limit_MB": 0}, "memory_limit_MB is 0; give at least 1"),
        ({"code": "", "language": "python", "files": {"a": "?"}}, "files is '?'; give base64"),
        ({"code": "", "language": "python", "files": {"a": 1}}, "files: 'a' is 1; give base64"),
        ({"code": "", "language": "python", "fetch_files": [1]}, "fetch_files holds something else than text"),
        ({"code": "", "language": "cpp", "fetch_files": ["a"]}, "files and fetch_files work for python only"),
        ({"code": "", "language": "python", "args": ["-k"]}, "args is ['-k']; give none"),
    ],
)
def test_a_wrong_order_is_told_which_field(server: Process, order: Any, said: str) -> None:
    status, answer = server.ask("POST", "/run_code", order)
    assert status == 422 and answer["detail"].startswith(said), answer


# ---- the native calls, as bytes of JSON


def test_run_and_grade(server: Process) -> None:
    code = base64.b64encode(b"import sys\ndef f(x):\n    return x * 2\nsys.stdout.buffer.write(b'\\xff')").decode()
    status, run = server.ask("POST", "/run", {"code": code, "limits": {"wall_s": 5}})
    assert (status, run["outcome"], base64.b64decode(run["stdout"]), run["exit_code"]) == (200, "ok", b"\xff", 0)
    tests = {"kind": "assert", "source": "assert f(2) == 4\nassert f(3) == 7", "entry_point": "f", "split": True}
    status, verdict = server.ask("POST", "/grade", {"code": code, "tests": tests})
    assert (status, verdict["passed"], verdict["total"], verdict["outcome"]) == (200, 1, 2, "ok")


@pytest.mark.parametrize(
    ("path", "order", "said"),
    [
        ("/run", {"code": "?"}, "code is '?'; give base64"),
        ("/run", {"code": "", "profile": "god"}, "profile is 'god'; give one of ('judge', 'tool')"),
        ("/run", {"code": "", "limits": {"wall": 1}}, "'wall' is no field of limits"),
        ("/run", {"code": "", "limits": {"wall_s": -1}}, "Limits.wall_s is -1"),
        ("/run", {"code": "", "limits": {"processes": 1.5}}, "processes is 1.5; give a whole number or null"),
        ("/grade", {"code": ""}, "tests is missing"),
        ("/grade", {"code": "", "tests": {"kind": "x"}}, "kind is 'x'; give 'stdio', 'call' or 'assert'"),
        ("/grade", {"code": "", "tests": {"kind": "stdio", "cases": [1]}}, "cases is [1]; give a list of [stdin"),
        ("/grade", {"code": "", "tests": {"kind": "stdio", "cases": [[{}, ""]]}}, "base64 is missing in a case"),
        ("/grade", {"code": "", "tests": {"kind": "call", "cases": [1], "entry_point": "f"}}, "cases is [1]"),
        ("/grade", {"code": "", "tests": {"kind": "call", "cases": [["?"], []], "entry_point": "f"}}, "cases: "),
        ("/grade", {"code": "", "tests": {"kind": "assert", "source": "(", "entry_point": "f"}}, "tests, line 1: "),
    ],
)
def test_wrong_native_orders(server: Process, path: str, order: Any, said: str) -> None:
    status, answer = server.ask("POST", path, order)
    assert status == 422 and answer["detail"].startswith(said), answer


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
FIELDS = ("code", "language", "stdin", "limits", "profile", "tests", "files", "fetch_files", "run_timeout",
          "memory_limit_MB", "trust", "fail_fast", "kind", "cases", "entry_point", "source", "args")  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(
    st.dictionaries(st.sampled_from(FIELDS), JSON | st.just("") | st.just("python"))
    | st.fixed_dictionaries(
        {
            "code": st.just(""),
            "tests": st.fixed_dictionaries(
                {"kind": st.sampled_from(("stdio", "call", "assert"))},
                optional={"cases": JSON, "entry_point": st.just("f"), "source": st.text(), "float_tolerance": JSON},
            ),
        }
    )
    | JSON
)
def test_whatever_comes_is_read_or_refused(message: Any) -> None:
    for read in (read_order, read_run_order, read_grade_order):
        with contextlib.suppress(ValueError):  # BadMessage and InvalidTests are
            read(message)
    assert issubclass(BadMessage, ValueError)


# ---- HTTP


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"POST /run HTTP/1.1\r\nContent-Length: 1\r\n\r\n{", b"400"),
        (b"POST /run HTTP/1.1\r\nContent-Length: 4\r\n\r\n\xff\xff\xff\xff", b"400"),
        (b"POST /run HTTP/1.1\r\nContent-Length: -1\r\n\r\n", b"400"),
        (b"POST /run HTTP/1.1\r\nContent-Length: 999999999999\r\n\r\n", b"413"),
        (b"POST /run HTTP/1.1\r\nContent-Length: " + b"9" * 99 + b"\r\n\r\n", b"413"),
        (b"POST /run HTTP/1.1\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{}", b"400"),
        (b"POST /run HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", b"411"),
        (b"GET /run HTTP/1.1\r\n\r\n", b"405"),
        (b"GET /etc/passwd HTTP/1.1\r\n\r\n", b"404"),
        (b"GET\r\n\r\n", b"400"),
        (b"GET /health HTTP/1.1\r\nX : y\r\n\r\n", b"400"),
        (b"\x16\x03\x01 hello\r\n\r\n", b"400"),
        (b"GET /health HTTP/1.1\r\nX: " + b"y" * (20 << 10) + b"\r\n\r\n", b"431"),
    ],
)
def test_what_is_no_request_gets_a_status(server: Process, sent: bytes, status: bytes) -> None:
    closing = sent.replace(b"HTTP/1.1\r\n", b"HTTP/1.1\r\nConnection: close\r\n", 1)
    first, _, rest = server.raw(closing).partition(b"\r\n")
    assert first.startswith(b"HTTP/1.1 " + status + b" ")
    assert json.loads(rest.partition(b"\r\n\r\n")[2])["detail"]


def test_a_connection_takes_one_request_after_the_other(server: Process) -> None:
    one = b"GET /health HTTP/1.1\r\n\r\n"
    answers = server.raw(one * 3 + b"GET /health HTTP/1.0\r\n\r\n")
    assert answers.count(b"HTTP/1.1 200 OK") == 4 and answers.count(b"Connection: close") == 1
    body = json.dumps({"code": "", "language": "python"}).encode()
    head = b"POST /run_code HTTP/1.1\r\nExpect: 100-continue\r\nConnection: close\r\nContent-Length: %d\r\n\r\n"
    answer = server.raw(head % len(body) + body)
    assert answer.startswith(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\n")


def test_a_full_queue_says_so_at_once(server: Process) -> None:
    async def crowd() -> list[tuple[int, Any]]:
        order = {"code": "import time; time.sleep(1)", "language": "python"}
        return await asyncio.gather(*(asyncio.to_thread(server.ask, "POST", "/run_code", order) for _ in range(6)))

    started = time.monotonic()
    answers = asyncio.run(crowd())
    assert sorted(status for status, _ in answers) == [200, 200, 200, 429, 429, 429]  # two run, one waits
    assert time.monotonic() - started < 6
    body = json.dumps({"code": "", "language": "python"}).encode()
    assert b"Retry-After" not in server.raw(b"GET /health HTTP/1.0\r\n\r\n")
    assert server.ask("POST", "/run_code", body)[0] == 200


def test_a_client_that_leaves_takes_its_run_along(server: Process) -> None:
    body = json.dumps({"code": "import time; time.sleep(20)", "language": "python", "run_timeout": 20}).encode()
    client = socket.create_connection(("127.0.0.1", server.port))
    client.sendall(b"POST /run_code HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
    deadline = time.monotonic() + 10
    while server.ask("GET", "/health")[1]["running"] != 1:
        assert time.monotonic() < deadline
    client.close()
    while server.ask("GET", "/health")[1]["running"] != 0:
        assert time.monotonic() < deadline
        time.sleep(0.05)


# ---- token, start, stop


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.2", "example.org"])
def test_others_are_served_with_a_token_only(host: str) -> None:
    with pytest.raises(ValueError, match="a token is needed; give --token-env NAME"):
        Server(Sandbox(), host, 0, workers=1, queue=1)


def test_the_token_is_asked_for_and_a_stop_lets_runs_finish() -> None:
    server = Process("--workers", "1", "--token-env", "H6_TOKEN", H6_TOKEN="geheim")
    order = {"code": "import time; time.sleep(1); print(1)", "language": "python"}
    assert server.ask("POST", "/run_code", order)[0] == 401
    assert server.ask("POST", "/run_code", order, Authorization="Bearer falsch")[0] == 401
    assert server.ask("POST", "/run_code", order, Authorization="Basic geheim")[0] == 401
    assert server.ask("GET", "/health")[0] == 200
    idle = socket.create_connection(("127.0.0.1", server.port))

    async def stop_in_the_middle() -> tuple[int, Any]:
        asked = asyncio.create_task(
            asyncio.to_thread(server.ask, "POST", "/run_code", order, Authorization="Bearer geheim")
        )
        while (await asyncio.to_thread(server.ask, "GET", "/health"))[1]["running"] == 0:
            await asyncio.sleep(0.02)
        started = time.monotonic()
        assert await asyncio.to_thread(server.stop) == 0
        assert time.monotonic() - started < 10  # the idle client does not hold it up
        return await asked

    status, answer = asyncio.run(stop_in_the_middle())
    idle.close()
    assert (status, answer["run_result"]["stdout"]) == (200, "1\n")
    assert "Traceback" not in server.process.stderr.read()  # type: ignore[union-attr]
