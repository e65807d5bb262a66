"""What several engine tests share: one real run of the demo recipe, with its fixed seed."""

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "recipes" / "tiny_demo.yaml"


def rlvlm(*arguments: str, cwd: Path = ROOT, **options) -> subprocess.CompletedProcess:
    """Runs the command line as a user does, in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "rlvlm", *map(str, arguments)], cwd=cwd, capture_output=True, text=True, **options
    )


def pytest_addoption(parser) -> None:
    parser.addoption("--demo-run", type=Path, help="a finished run of the demo recipe to take instead of making one")
    parser.addoption("--policies", default="qwen3_vl_moe", help="families for test_policies.py: NAME,NAME,... or all")


@pytest.fixture(scope="session")
def demo(tmp_path_factory, pytestconfig) -> Path:
    """The run folder of `rlvlm train recipes/tiny_demo.yaml`, seed 0."""
    if given := pytestconfig.getoption("--demo-run"):
        return given.resolve()
    output = tmp_path_factory.mktemp("runs")
    done = rlvlm("train", DEMO, f"output={output}", "seed=0", timeout=850)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    (output / "tiny_demo" / "terminal.txt").write_text(done.stdout)
    return output / "tiny_demo"


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[str]:
    """The address of a Ray cluster that others started. Tests join it: starting one takes longer, and changes the
    process that does for good."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp") as folder:
        options = f"--head --block --port={port} --num-cpus=8 --include-dashboard=false --object-store-memory=100000000"
        command = [Path(sys.executable).with_name("ray"), "start", *options.split(), f"--temp-dir={folder}"]
        head = subprocess.Popen(
            command,
            env={**os.environ, "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            _wait_for(port)
            yield f"127.0.0.1:{port}"
        finally:
            head.terminate()
            head.wait(60)


def _wait_for(port: int) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        with socket.socket() as one:
            if one.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise TimeoutError(f"Ray does not listen on {port}")


def pytest_collection_modifyitems(items) -> None:
    """Fast tests first: a broken formula should not wait for the demo."""
    items.sort(key=lambda item: item.get_closest_marker("engine") is not None)


os.environ.setdefault("OMP_NUM_THREADS", "1")
# A busy machine is no defect: no time limit for a single example. The rest stays as hypothesis has it, in CI too.
settings.register_profile("rlvlm", settings(), deadline=None)
settings.load_profile("rlvlm")
