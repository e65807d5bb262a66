"""The responses of a run as parquet, one file an iteration and one an evaluation: trajectories/iteration-0007.parquet,
trajectories/evaluation-sft.parquet, trajectories/evaluation-rl.parquet. One row a response; `SCHEMA` has the columns.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
from rlvlm_rewards import Failure, Score

from rlvlm.records import Group, Segment, StopReason, Task, Trajectory
from rlvlm.report.files import replace_file

SEGMENT = pa.struct(
    [("start", pa.int32()), ("end", pa.int32()), ("trained", pa.bool_()), ("weight_version", pa.int32())]
)
SCHEMA = pa.schema(
    [
        ("iteration", pa.int32()),
        ("task_id", pa.string()),
        ("source", pa.string()),
        ("level", pa.int32()),
        ("index", pa.int32()),  # which of the task's k responses
        ("prompt", pa.string()),  # the text of the messages
        ("answer", pa.string()),  # the reference
        ("images", pa.list_(pa.string())),  # keys: the files are images/<key>.png in the run folder
        ("text", pa.string()),
        ("token_ids", pa.list_(pa.int32())),
        ("tokens", pa.list_(pa.string())),  # each token decoded alone
        ("segments", pa.list_(SEGMENT)),  # [start, end) of the response's tokens
        ("engine_logp", pa.list_(pa.float64())),  # natural log
        ("value", pa.float64()),  # null where the reward failed
        ("failure", pa.string()),  # null where it did not
        ("parts", pa.string()),  # JSON: name -> number
        ("reward", pa.float64()),  # with the length reward; null in an evaluation
        ("advantage", pa.float64()),  # null where the response does not train
        ("length", pa.int32()),  # tokens
        ("stop", pa.string()),
        ("style", pa.string()),  # null where the task has no reference chains
    ]
)

Numbers = Sequence[Sequence[float | None]]
Names = Sequence[Sequence[str | None]]
Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class TokenSpan:
    """[start, end) of a response's tokens, sampled by one version of the weights."""

    start: int
    end: int
    trained: bool
    weight_version: int


@dataclass(frozen=True, slots=True)
class Sampled:
    """One row: a response with all that is known of it. Fields are the columns of `SCHEMA`."""

    iteration: int
    task_id: str
    source: str
    level: int
    index: int
    prompt: str
    answer: str
    images: tuple[str, ...]
    text: str
    token_ids: tuple[int, ...]
    tokens: tuple[str, ...]
    segments: tuple[TokenSpan, ...]
    engine_logp: tuple[float, ...]
    value: float | None
    failure: str | None
    parts: Mapping[str, float]
    reward: float | None
    advantage: float | None
    length: int
    stop: str
    style: str | None


def iteration_file(run_folder: Path, iteration: int) -> Path:
    return run_folder / "trajectories" / f"iteration-{iteration:04d}.parquet"


def evaluation_file(run_folder: Path, stage: str) -> Path:
    """stage: "sft" (before RL), "rl" (after), or the iteration that it was made after."""
    return run_folder / "trajectories" / f"evaluation-{stage}.parquet"


def write_trajectories(
    path: Path,
    groups: Sequence[Group],
    decode: Callable[[int], str],
    *,
    iteration: int,
    rewards: Numbers | None = None,
    advantages: Numbers | None = None,
    styles: Names | None = None,
) -> None:
    """Writes the groups' responses to `path` in one step; makes its folder.

    decode: a token id -> its text. rewards, advantages, styles: [groups][k]; None where there is none.
    Groups that were not scored yet get neither value nor failure. Raises ValueError if shapes differ.
    """
    for name, array in (("rewards", rewards), ("advantages", advantages), ("styles", styles)):
        _check_shape(name, array, groups)
    rows = [
        {
            **_columns_of(group, index, decode),
            "iteration": iteration,
            "reward": _at(rewards, g, index),
            "advantage": _at(advantages, g, index),
            "style": _at(styles, g, index),
        }
        for g, group in enumerate(groups)
        for index in range(len(group.trajectories))
    ]
    table = pa.Table.from_pylist(rows, schema=SCHEMA)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, lambda temporary: pq.write_table(table, temporary, compression="zstd"))


def read_trajectories(path: Path) -> list[Sampled]:
    """All rows of one file, in the order of groups and responses."""
    return [_sampled(row) for row in pq.read_table(path, schema=SCHEMA).to_pylist()]


def read_groups(path: Path, tasks: Sequence[Task]) -> list[Group]:
    """The groups that `write_trajectories` wrote, back as records. tasks: the tasks that were answered, in any order.

    What the file does not hold stays empty: the prompt's tokens, and the detail of a failure.
    """
    known = {task.id: task for task in tasks}
    rows: dict[str, list[Sampled]] = {}
    for row in read_trajectories(path):
        rows.setdefault(row.task_id, []).append(row)
    return [
        Group(known[task_id], tuple(map(_trajectory, members)), tuple(map(_score, members)))
        for task_id, members in rows.items()
    ]


def _trajectory(row: Sampled) -> Trajectory:
    segments = tuple(
        Segment(row.token_ids[s.start : s.end], row.engine_logp[s.start : s.end], s.trained, s.weight_version)
        for s in row.segments
    )
    return Trajectory(row.task_id, row.index, (), segments, StopReason(row.stop), row.text)


def _score(row: Sampled) -> Score:
    failure = Failure(row.failure) if row.failure is not None else None
    return Score(value=row.value, parts=row.parts, failure=failure)


def prompt_text(messages: Sequence[Mapping[str, Any]]) -> str:
    """The words of chat messages, one paragraph a message; pictures are left out."""
    paragraphs = []
    for message in messages:
        content = message["content"]
        parts = [content] if isinstance(content, str) else [part["text"] for part in content if part["type"] == "text"]
        paragraphs.append(" ".join(parts))
    return "\n".join(paragraph for paragraph in paragraphs if paragraph)


def _columns_of(group: Group, index: int, decode: Callable[[int], str]) -> dict[str, Any]:
    task, trajectory = group.task, group.trajectories[index]
    score = group.scores[index] if group.scores else None
    return {
        "task_id": task.id,
        "source": task.source,
        "level": task.level,
        "index": trajectory.index,
        "prompt": prompt_text(task.messages),
        "answer": task.answer,
        "images": list(task.images),
        "text": trajectory.text,
        "token_ids": list(trajectory.response_ids),
        "tokens": [decode(token) for token in trajectory.response_ids],
        "segments": _spans(group, index),
        "engine_logp": list(trajectory.engine_logp_T),
        "value": score.value if score else None,
        "failure": str(score.failure) if score and score.failure else None,
        "parts": json.dumps(dict(score.parts) if score else {}),
        "length": trajectory.length,
        "stop": str(trajectory.stop),
    }


def _spans(group: Group, index: int) -> list[dict[str, Any]]:
    spans, start = [], 0
    for segment in group.trajectories[index].segments:
        end = start + len(segment.token_ids)
        spans.append({"start": start, "end": end, "trained": segment.trained, "weight_version": segment.weight_version})
        start = end
    return spans


def _check_shape(name: str, array: Numbers | Names | None, groups: Sequence[Group]) -> None:
    if array is None:
        return
    given, wanted = [len(row) for row in array], [len(group.trajectories) for group in groups]
    if given != wanted:
        raise ValueError(f"{name} has rows of {given} entries, but the groups have {wanted} responses")


def _at(array: Sequence[Sequence[Value]] | None, g: int, index: int) -> Value | None:
    return None if array is None else array[g][index]


def _sampled(row: dict[str, Any]) -> Sampled:
    listed = {name: tuple(row[name]) for name in ("images", "token_ids", "tokens", "engine_logp")}
    segments = tuple(TokenSpan(**segment) for segment in row["segments"])
    return Sampled(**{**row, **listed, "segments": segments, "parts": json.loads(row["parts"])})
