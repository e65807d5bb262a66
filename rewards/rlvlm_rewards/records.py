"""What a reward sees (`Sample`) and what it gives (`Score`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


class Failure(StrEnum):
    """Why there is no value. A failure is retried where that makes sense, then masked from training and counted; it is
    never a score of 0."""

    TIMEOUT = "timeout"  # the reward did not answer in time
    INFRASTRUCTURE = "infrastructure"  # the reward raised, or what it depends on is broken
    UNPARSABLE_REFERENCE = "unparsable_reference"  # the data's own answer cannot be read; names the row


@dataclass(frozen=True, slots=True)
class Sample:
    """One response to be scored.

    completion: the response as text, without the end-of-turn token. answer: the reference answer.
    task: the id of the task. messages: the prompt. load_images: gives its pictures (PIL) when the reward wants them.
    thinking: the prompt opened `<think>` itself, so a completion without `</think>` never came to an answer.
    progress: share of the training that is done, 0 to 1, for rewards that get stricter; 1 is the strictest.
    columns: other columns of the data's row.
    """

    completion: str
    answer: str
    task: str = ""
    messages: Sequence[Mapping[str, Any]] = ()
    load_images: Callable[[], list[Any]] = list
    thinking: bool = False
    progress: float = 1.0
    columns: Mapping[str, Any] = field(default_factory=dict)

    @property
    def images(self) -> list[Any]:
        return self.load_images()


@dataclass(frozen=True, slots=True)
class Score:
    """A value in [0, 1] with its named parts, or a failure with its explanation; never both.

    Raises ValueError if neither or both are given, or the value is not a number in [0, 1].
    """

    value: float | None = None
    parts: Mapping[str, float] = field(default_factory=dict)
    failure: Failure | None = None
    detail: str = ""

    def __post_init__(self) -> None:
        if (self.value is None) == (self.failure is None):
            raise ValueError(f"a Score has a value or a failure, not {self.value!r} with {self.failure!r}")
        if self.value is not None and not 0.0 <= self.value <= 1.0:
            raise ValueError(f"a Score's value lies in [0, 1], not {self.value!r}")
