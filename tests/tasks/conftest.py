from pathlib import Path

import pytest

from rlvlm.tasks import ImageStore


@pytest.fixture
def store(tmp_path: Path) -> ImageStore:
    return ImageStore(tmp_path / "images")
