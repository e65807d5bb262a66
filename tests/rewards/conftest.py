"""What these tests leave open for each other is closed after the last of them."""

from collections.abc import Iterator

import pytest
from rlvlm_rewards.math import pool


@pytest.fixture(scope="package", autouse=True)
def _close_the_readers() -> Iterator[None]:
    yield
    for workers, timeout_s in list(pool._pools):
        pool.close(workers, timeout_s)
