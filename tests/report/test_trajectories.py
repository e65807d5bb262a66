from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from rlvlm_rewards.records import Failure, Score

from rlvlm.records import Group, Segment, StopReason, Task, Trajectory
from rlvlm.report.trajectories import (
    SCHEMA,
    Sampled,
    TokenSpan,
    evaluation_file,
    iteration_file,
    prompt_text,
    read_groups,
    read_trajectories,
    write_trajectories,
)

LETTERS = {7: "<think>", 8: " a", 9: "</think>", 10: " é\n"}


@pytest.fixture
def groups() -> list[Group]:
    asked = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Which?"}]}
    task = Task("sum/1", ({"role": "system", "content": "Think."}, asked), ("ab12",), "3", "exact", 2, "sum")
    first = Trajectory(
        "sum/1",
        0,
        (1, 2),
        (Segment((7, 8), (-0.1, -2.5), False, 4), Segment((9, 10), (-0.25, 0.0), True, 5)),
        StopReason.END,
        "<think> a</think> é\n",
    )
    second = Trajectory("sum/1", 1, (1, 2), (Segment((8,), (-1.0,), True, 5),), StopReason.LENGTH, " a")
    scores = (Score(value=0.5, parts={"exact": 0.0, "format": 1.0}), Score(failure=Failure.TIMEOUT, detail="late"))
    return [Group(task, (first, second), scores)]


def test_a_row_holds_all_that_is_known_of_a_response(groups: list[Group], tmp_path: Path) -> None:
    path = iteration_file(tmp_path, 5)
    write_trajectories(
        path,
        groups,
        LETTERS.__getitem__,
        iteration=5,
        rewards=[[0.75, None]],
        advantages=[[0.25, None]],
        styles=[["short", "other"]],
    )
    first, second = read_trajectories(path)
    assert first == Sampled(
        iteration=5,
        task_id="sum/1",
        source="sum",
        level=2,
        index=0,
        prompt="Think.\nWhich?",
        answer="3",
        images=("ab12",),
        text="<think> a</think> é\n",
        token_ids=(7, 8, 9, 10),
        tokens=("<think>", " a", "</think>", " é\n"),
        segments=(TokenSpan(0, 2, False, 4), TokenSpan(2, 4, True, 5)),
        engine_logp=(-0.1, -2.5, -0.25, 0.0),
        value=0.5,
        failure=None,
        parts={"exact": 0.0, "format": 1.0},
        reward=0.75,
        advantage=0.25,
        length=4,
        stop="end",
        style="short",
    )
    assert (second.value, second.failure, second.reward, second.advantage) == (None, "timeout", None, None)
    assert (second.stop, second.length, second.index) == ("length", 1, 1)


def test_an_evaluation_has_neither_rewards_nor_advantages(groups: list[Group], tmp_path: Path) -> None:
    path = evaluation_file(tmp_path, "sft")
    write_trajectories(path, groups, LETTERS.__getitem__, iteration=0)
    assert [(s.reward, s.advantage, s.style) for s in read_trajectories(path)] == [(None, None, None)] * 2


def test_any_parquet_reader_finds_the_documented_columns(groups: list[Group], tmp_path: Path) -> None:
    path = iteration_file(tmp_path, 12)
    write_trajectories(path, groups, LETTERS.__getitem__, iteration=12)
    assert path.relative_to(tmp_path) == Path("trajectories/iteration-0012.parquet")
    assert pq.read_schema(path).equals(SCHEMA)
    assert pq.read_table(path)["segments"].to_pylist()[0][1] == {
        "start": 2, "end": 4, "trained": True, "weight_version": 5,
    }  # fmt: skip
    assert [p.name for p in path.parent.iterdir()] == ["iteration-0012.parquet"]


def test_a_write_that_fails_leaves_the_file_before_it(groups: list[Group], tmp_path: Path) -> None:
    path = iteration_file(tmp_path, 1)
    write_trajectories(path, groups, LETTERS.__getitem__, iteration=1)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"rewards has rows of \[1\] entries"):
        write_trajectories(path, groups, LETTERS.__getitem__, iteration=1, rewards=[[0.1]])
    with pytest.raises(KeyError):
        write_trajectories(path, groups, {7: "x"}.__getitem__, iteration=1)
    assert path.read_bytes() == before
    assert len(list(path.parent.iterdir())) == 1


def test_groups_come_back_as_they_were_but_for_the_prompt_s_tokens(groups: list[Group], tmp_path: Path) -> None:
    path = evaluation_file(tmp_path, "rl")
    write_trajectories(path, groups, LETTERS.__getitem__, iteration=3)
    (back,) = read_groups(path, [groups[0].task])
    assert back.task is groups[0].task
    assert back.trajectories == tuple(replace(t, prompt_ids=()) for t in groups[0].trajectories)
    assert back.scores == (groups[0].scores[0], replace(groups[0].scores[1], detail=""))


def test_no_groups_make_an_empty_file_with_columns(tmp_path: Path) -> None:
    path = iteration_file(tmp_path, 3)
    write_trajectories(path, [], str, iteration=3, rewards=[])
    assert read_trajectories(path) == []


def test_prompt_text_leaves_pictures_out() -> None:
    content = [{"type": "text", "text": "a"}, {"type": "image"}, {"type": "text", "text": "b"}]
    assert prompt_text([{"role": "user", "content": content}, {"role": "user", "content": "c"}]) == "a b\nc"
