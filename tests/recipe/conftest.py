"""The shortest recipe there is, and one that says everything."""

from __future__ import annotations

from pathlib import Path

import pytest

MINIMAL = """\
name: demo
tasks:
  train:
    - generator: digits_sum
"""


@pytest.fixture
def minimal(tmp_path: Path) -> Path:
    path = tmp_path / "minimal.yaml"
    path.write_text(MINIMAL)
    return path
