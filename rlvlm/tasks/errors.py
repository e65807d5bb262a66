"""What can be wrong with a source of tasks."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import SequenceMatcher

from rlvlm.recipe.errors import RecipeError


class TaskSourceError(RecipeError):
    """A source of tasks cannot give its tasks; some of these are found only when tasks are drawn (a broken picture)."""


class MissingDataError(TaskSourceError):
    """The data set's file, folder, split or hub page does not exist."""


class UnreadableDataError(TaskSourceError):
    """The data set exists, but cannot be parsed."""


class EmptyDataError(TaskSourceError):
    """The data set has no rows."""


class TooFewTasksError(TaskSourceError):
    """The source cannot give as many different tasks as were asked for."""


class MissingColumnError(TaskSourceError):
    """The recipe names a column that the data set does not have."""


class BadCellError(TaskSourceError):
    """A row holds something that cannot be used (an empty answer, a level that is no number, ...); names the row."""


class UnreadableImageError(TaskSourceError):
    """A picture is missing, broken or of an unknown kind; names the file and the row."""


class MissingRewardError(TaskSourceError):
    """A data set comes without a verifier, and the recipe names none."""


class BadLevelsError(TaskSourceError):
    """The levels do not fit the source."""


class UnknownGeneratorError(TaskSourceError):
    """No generator goes by this name."""


class BadGeneratorError(TaskSourceError):
    """The generator's code was found but cannot be used."""


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name most alike to `name`, capitals aside; None if none is known."""
    return max(known, key=lambda k: SequenceMatcher(None, name.casefold(), k.casefold()).ratio(), default=None)
