"""The errors that a user of rlvlm is meant to meet: each says what is wrong and what to do, and the command line prints
it without a traceback. Anything else that is raised is a bug."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import ClassVar, Final

from rlvlm.recipe import yaml12


class Absent(Enum):
    """The value of a key that is not there (`None` is a value: null)."""

    ABSENT = "absent"


ABSENT: Final = Absent.ABSENT


class RlvlmError(Exception):
    """Base of all errors that carry a mend. exit_code: what the command line exits with."""

    exit_code: ClassVar[int] = 1


class RecipeError(RlvlmError):
    """Something in a recipe, on the command line, or that either names, is not right; exit code 2.

    key: dotted, as on the command line (`tasks.train[0].weight`). value: what was given, or ABSENT. problem: what is
    wrong with it. mend: what to do. errors: all that were found; this one first.
    """

    exit_code: ClassVar[int] = 2

    def __init__(self, key: str, value: object, problem: str, mend: str) -> None:
        super().__init__(key, value, problem, mend)
        self.key, self.value, self.problem, self.mend = key, value, problem, mend
        self.errors: tuple[RecipeError, ...] = (self,)

    @classmethod
    def of(cls, errors: Sequence[RecipeError]) -> RecipeError:
        """One error that tells all of the given ones (at least one), each once."""
        told = list({error._line(): error for several in errors for error in several.errors}.values())
        result = RecipeError(told[0].key, told[0].value, told[0].problem, told[0].mend)
        result.errors = tuple(told)
        return result

    def _line(self) -> str:
        given = "" if self.value is ABSENT else f" = {yaml12.show(self.value)}"
        return f"{self.key}{given}: {self.problem}" + (f"; {self.mend}" if self.mend else "")

    def __str__(self) -> str:
        return "\n".join(error._line() for error in self.errors)


class RunError(RlvlmError):
    """A run that cannot go on for a reason that has a name (parity, the gate, an engine that died); exit code 1.

    problem: what happened, with its numbers. mend: what to do.
    """

    def __init__(self, problem: str, mend: str) -> None:
        super().__init__(problem, mend)
        self.problem, self.mend = problem, mend

    def __str__(self) -> str:
        return f"{self.problem}; {self.mend}" if self.mend else self.problem
