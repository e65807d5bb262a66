"""What the tests here score with."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

from rlvlm_rewards import Sample, Score, load_reward


@dataclass
class Picture:
    """The only thing of a PIL image that a reward asks for, the size."""

    size: tuple[int, int]


def judge(
    name: str,
    completion: str,
    answer: str,
    *,
    thinking: bool = False,
    picture: tuple[int, int] | None = None,
    progress: float = 1.0,
    **options: Any,
) -> Score:
    """The score of a completion as task row-7. picture: its width and height in pixels, where there is one."""

    def load_images() -> list[Any]:
        return [] if picture is None else [Picture(picture)]

    sample = Sample(completion, answer, "row-7", load_images=load_images, thinking=thinking, progress=progress)
    return asyncio.run(load_reward(name, **options)(sample))


def value(*arguments: Any, **options: Any) -> float:
    """That of a score, which is no failure."""
    score = judge(*arguments, **options)
    assert score.value is not None, score
    return score.value
