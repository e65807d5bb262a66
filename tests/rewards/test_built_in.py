"""Every built-in reward is there, loads nothing of the others, and passes the contract test."""

from __future__ import annotations

import dataclasses
import importlib
import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from rlvlm_rewards import load_reward
from rlvlm_rewards.builtin import BUILT_IN
from rlvlm_rewards.check import check_reward

_OPTIONS: dict[str, dict[str, Any]] = {
    "grounding": {"coordinates": "pixels"},
    "points": {"coordinates": "pixels"},
    "polygon": {"coordinates": "pixels"},
    "language": {"scripts": ["Latin"]},
}
_ALONE = sorted(set(BUILT_IN) - {"judge"})


class _Endpoint(BaseHTTPRequestHandler):
    """A judge that reads: it says correct where the response is the reference, and nothing else."""

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        asked = request["messages"][-1]["content"]
        response = asked.partition("<response")[2].partition(">")[2].partition("</response")[0].strip()
        verdict = json.dumps({"correct": response == "12"})
        body = json.dumps({"choices": [{"message": {"content": f"so\n{verdict}"}, "finish_reason": "stop"}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def endpoint() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Endpoint)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()


def _failed(name: str, options: dict[str, Any]) -> list[str]:
    findings = list(check_reward(name, options))
    assert findings[0].passed is not None or load_reward(name, **options).is_form, findings[0]
    return [f"{found.check}: {found.detail}" for found in findings if found.passed is False]


@pytest.mark.parametrize("name", _ALONE)
def test_the_contract(name: str) -> None:
    assert _failed(name, _OPTIONS.get(name, {})) == []


def test_the_contract_of_the_judge(endpoint: str) -> None:
    assert _failed("judge", {"url": endpoint, "model": "any"}) == []


def test_which_keep_time_themselves() -> None:
    judge = {"url": "http://127.0.0.1:9/v1", "model": "any"}
    options = {name: _OPTIONS.get(name, judge if name == "judge" else {}) for name in BUILT_IN}
    assert {name for name in BUILT_IN if load_reward(name, **options[name]).keeps_time} == {"math", "judge", "code"}


def test_loading_one_loads_nothing_of_the_others() -> None:
    heavy = {"scipy", "shapely", "sympy", "math_verify", "rapidfuzz", "httpx", "rlvlm_sandbox", "torch", "numpy"}
    program = (
        "import sys\nfrom rlvlm_rewards import load_reward\nload_reward('number'), load_reward('choice')\n"
        f"print(sorted({heavy!r} & set(sys.modules)))"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ended.stdout == "[]\n"


_README = (Path(__file__).parents[2] / "rewards" / "README.md").read_text()


def test_the_readme_names_every_reward_and_its_options() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \|.*\| (.*?) ?\|$", _README, re.MULTILINE))
    assert list(rows) == list(BUILT_IN)
    for name, told in rows.items():
        place, _, attribute = BUILT_IN[name].partition(":")
        fields = {field.name for field in dataclasses.fields(getattr(importlib.import_module(place), attribute))}
        named = set(re.findall(r"`(\w+)`", told)) - {"pixels", "thousandths"}
        assert named == fields if "..." not in told else named < fields, name


def test_the_readme_s_first_example(capsys: pytest.CaptureFixture[str]) -> None:
    first = re.findall(r"^```python\n(.*?)^```$", _README, re.DOTALL | re.MULTILINE)[0]
    exec(first, {})
    assert capsys.readouterr().out == "1.0\n"
