"""On any version but the checked one nothing is touched. What the mends do is tested with the engine, by parity."""

import subprocess
import sys
from importlib import metadata

import pytest

from rlvlm.mends import vllm_cpu

_APPLY = """
import sys
from importlib import metadata
from rlvlm.mends import vllm_cpu

def version(name):
    if sys.argv[1] == "none":
        raise metadata.PackageNotFoundError(name)
    assert name == "vllm-cpu"
    return sys.argv[1]

metadata.version = version
vllm_cpu.apply()
print([name for name in sys.modules if name.split(".")[0] == "vllm"])
"""


@pytest.mark.parametrize("version", ["0.31.0", "0.32.1", "0.32.0.post1", "none"])
def test_on_another_version_vllm_is_not_even_imported(version):
    done = subprocess.run([sys.executable, "-c", _APPLY, version], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(("version", "applied"), [("0.32.0", 4), ("0.33.0", 0)])
def test_on_the_checked_version_all_four_are_applied(monkeypatch, version, applied):
    calls = []
    mends = ("_rotate_every_head", "_repack_experts_after_reload", "_repack_tied_heads_after_reload")
    for mend in (*mends, "_scan_only_real_modules"):
        monkeypatch.setattr(vllm_cpu, mend, lambda mend=mend: calls.append(mend))
    monkeypatch.setattr(metadata, "version", lambda name: version)
    vllm_cpu.apply()
    assert len(set(calls)) == len(calls) == applied
