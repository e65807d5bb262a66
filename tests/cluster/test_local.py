"""Ranks side by side: what one of them says reaches the command line as what it is."""

import pytest
import torch

from rlvlm.cluster.local import run_ranks
from rlvlm.recipe.errors import RecipeError, RunError


def _fails_by_name(rank: int, told: str) -> None:
    if rank == 1:
        raise RecipeError("tasks.train[0].dataset", told, "row 3 is no picture", "mend the row")


def _fails_as_a_run(rank: int) -> None:
    raise RunError("the disk is full", mend="free some")


def _has_a_bug(rank: int) -> None:
    raise ZeroDivisionError("a bug")


def test_a_named_error_of_a_rank_arrives_whole():
    with pytest.raises(RecipeError) as caught:
        run_ranks(_fails_by_name, 2, "data.parquet")
    assert (caught.value.key, caught.value.value) == ("tasks.train[0].dataset", "data.parquet")
    assert "mend the row" in str(caught.value) and caught.value.exit_code == 2


def test_a_run_error_keeps_its_mend():
    with pytest.raises(RunError, match="the disk is full; free some"):
        run_ranks(_fails_as_a_run, 1)


def test_a_bug_comes_with_the_ranks_traceback():
    with pytest.raises(torch.multiprocessing.ProcessRaisedException, match="ZeroDivisionError: a bug"):
        run_ranks(_has_a_bug, 1)
