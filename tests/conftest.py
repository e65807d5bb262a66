"""What several engine tests share: one real run of the demo recipe, with its fixed seed."""

import os
import subprocess
import sys
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


def pytest_collection_modifyitems(items) -> None:
    """Fast tests first: a broken formula should not wait for the demo."""
    items.sort(key=lambda item: item.get_closest_marker("engine") is not None)


os.environ.setdefault("OMP_NUM_THREADS", "1")
# A busy machine is no defect: no time limit for a single example. The rest stays as hypothesis has it, in CI too.
settings.register_profile("rlvlm", settings(), deadline=None)
settings.load_profile("rlvlm")
