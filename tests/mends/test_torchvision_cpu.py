"""The mend acts on the pair of versions that it was checked on, and on nothing else."""

import subprocess
import sys
from importlib import metadata

import pytest

from rlvlm.mends import torchvision_cpu

_INSTALLED = (metadata.version("torch"), metadata.version("torchvision"))
_RUN = """
import sys
from importlib import metadata
from rlvlm.mends import torchvision_cpu as mend

for name in ("torchvision", "torchaudio", "torchcodec"):  # as if the .pth file had not run
    sys.modules.pop(name, None)
sys.meta_path[:] = [finder for finder in sys.meta_path if type(finder).__name__ != "_DeclareSchemasFirst"]
versions = dict(torch=sys.argv[1], torchvision=sys.argv[2])
metadata.version = versions.__getitem__
finders = list(sys.meta_path)
mend.install()
mend.install()
hidden = [name for name in ("torchaudio", "torchcodec") if name in sys.modules]
print(len(sys.meta_path) - len(finders), hidden, "torch" in sys.modules)
"""


def _installed(torch, torchvision):
    done = subprocess.run([sys.executable, "-c", _RUN, torch, torchvision], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize(
    ("torch", "torchvision"),
    [("2.13.0", "0.28.0"), ("2.13.1+cpu", "0.28.0"), ("2.13.0+cpu", "0.28.1"), ("2.13.0+cu130", "0.28.0")],
)
def test_does_nothing_on_any_other_pair(torch, torchvision):
    assert _installed(torch, torchvision) == "0 [] False"


def test_on_the_checked_pair_it_waits_for_torchvision_once_and_imports_nothing_itself():
    assert _installed("2.13.0+cpu", "0.28.0") == "1 ['torchaudio', 'torchcodec'] False"


def test_needed_asks_for_both_versions(monkeypatch):
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(torchvision_cpu.metadata, "version", missing)
    assert not torchvision_cpu.needed()
    versions = {"torch": "2.13.0+cpu", "torchvision": "0.28.0"}
    monkeypatch.setattr(torchvision_cpu.metadata, "version", versions.__getitem__)
    assert torchvision_cpu.needed()


_FRESH = """
import importlib.util, sys
import torchvision
from torchvision.transforms import functional
import torch
print(functional.resize(torch.ones(3, 4, 4), [2, 2]).mean().item(), importlib.util.find_spec("torch") is not None)
print([type(f).__name__ for f in sys.meta_path].count("_DeclareSchemasFirst"), "torchaudio" in sys.modules)
"""


def test_torchvision_imports_in_a_fresh_process():
    done = subprocess.run([sys.executable, "-c", _FRESH], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    works, hook = done.stdout.splitlines()
    assert works == "1.0 True"
    if torchvision_cpu.needed():
        assert hook == "0 True"  # the hook has gone; torchaudio is hidden


_WITHOUT = """
import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if type(finder).__name__ != "_DeclareSchemasFirst"]
import torchvision
"""


@pytest.mark.skipif(not torchvision_cpu.needed(), reason=f"not the pair that needs it: {_INSTALLED}")
def test_without_the_mend_it_does_not_import():
    """When this fails, the defect has gone and the mend can go."""
    done = subprocess.run([sys.executable, "-c", _WITHOUT], capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert "torchvision::nms does not exist" in done.stderr
