"""The judge: which reward scores what, what a failure becomes, and when the run stops."""

import asyncio

import pytest
from PIL import Image
from rlvlm_rewards import Failure, load_reward

from rlvlm import scoring
from rlvlm.recipe.errors import RunError
from rlvlm.recipe.schema import Rewards
from rlvlm.records import Group, Segment, StopReason, Task, Trajectory
from rlvlm.scoring import Judge, TooManyFailures
from rlvlm.tasks.images import ImageStore

_REWARDS = """
import time

def echo(sample):
    return float(sample.completion)

def picky(sample):
    if sample.completion.startswith("crash"):
        raise RuntimeError(sample.completion)
    return 1.0

async def slow_first(sample):
    import asyncio
    await asyncio.sleep(0.2 if sample.completion == "0.25" else 0.0)
    return float(sample.completion)

tries = []

def flaky(sample):
    tries.append(sample.completion)
    if tries.count(sample.completion) <= 2:
        raise ConnectionError("down")
    return 1.0

def wide(sample):
    return float((sample.images[0].width, sample.task, sample.answer, len(sample.messages)) == (3, "t", "7", 1))
"""


@pytest.fixture
def file(tmp_path):
    (tmp_path / "rewards.py").write_text(_REWARDS)
    return tmp_path / "rewards.py"


def _group(reward, *texts, images=(), task="t"):
    asked = Task(task, ({"role": "user", "content": "?"},), images, "7", reward, 1, "s")
    segment = Segment((5,), (-1.0,), True, 0)
    said = tuple(Trajectory(task, j, (1,), (segment,), StopReason.END, text) for j, text in enumerate(texts))
    return Group(asked, said)


def _score(groups, store=None, **rewards):
    judge = Judge(Rewards(**rewards), store)
    return asyncio.run(judge.score(groups))


def _values(groups):
    return [[score.value for score in group.scores] for group in groups]


def test_scores_come_in_the_order_of_the_responses(file):
    groups = [
        _group(f"{file}:slow_first", "0.25", "0.5", "0.75"),
        _group(f"{file}:echo", "0.125"),
        _group(f"{file}:slow_first", "1.0", "0.25"),
    ]
    scored = _score(groups)
    assert _values(scored) == [[0.25, 0.5, 0.75], [0.125], [1.0, 0.25]]
    assert [group.trajectories for group in scored] == [group.trajectories for group in groups]
    assert all(group.scores == () for group in groups)


def test_the_built_in_reward_reads_the_answer_after_the_thought():
    assert _values(_score([_group("exact", "3 4</think>7", "7</think>3")])) == [[1.0, 0.0]]


def test_a_failure_stays_a_failure_beside_its_neighbours(file):
    ((good, failed, also_good),) = (group.scores for group in _score([_group(f"{file}:picky", "a", "crash", "b")]))
    assert (good.value, also_good.value) == (1.0, 1.0)
    assert failed.value is None and failed.failure is Failure.INFRASTRUCTURE
    assert "crash" in failed.detail


def test_a_reward_that_does_not_answer_in_time_has_failed(file):
    (group,) = _score([_group(f"{file}:slow_first", "0.25", "0.5")], timeout_s=0.05, retries=0)
    assert group.scores[0].failure is Failure.TIMEOUT
    assert group.scores[1].value == 0.5


@pytest.mark.parametrize(("retries", "value"), [(1, None), (2, 1.0)])
def test_a_failure_is_tried_again_as_often_as_the_recipe_says(file, retries, value):
    assert _values(_score([_group(f"{file}:flaky", "a")], retries=retries, max_failures=1.0)) == [[value]]


@pytest.mark.parametrize(("limit", "stops"), [(0.49, True), (0.5, False), (1.0, False)])
def test_more_failures_than_allowed_stop_the_run(file, limit, stops):
    groups = [_group(f"{file}:picky", "crash a", "fine"), _group(f"{file}:picky", "fine", "crash b")]
    if not stops:
        assert _values(_score(groups, max_failures=limit)) == [[None, 1.0], [1.0, None]]
        return
    with pytest.raises(TooManyFailures, match="2 of 4 responses could not be scored"):
        _score(groups, max_failures=limit)


def test_the_error_names_the_commonest_failure_and_the_mend(file):
    groups = [_group(f"{file}:picky", "crash rare", *["crash often"] * 3, "fine")]
    with pytest.raises(RunError) as caught:
        _score(groups, max_failures=0.25)
    message = str(caught.value)
    assert "4 of 5 responses" in message and "rewards.max_failures = 0.25" in message
    assert "3 times: infrastructure" in message and "crash often" in message and "crash rare" not in message
    assert "--resume" in message


def test_a_reward_sees_the_task_and_its_pictures(file, tmp_path):
    store = ImageStore(tmp_path / "images")
    groups = [_group(f"{file}:wide", "a", images=(store.add(Image.new("RGB", (width, 2))),)) for width in (3, 4)]
    assert _values(_score(groups, store)) == [[1.0], [0.0]]


def test_pictures_are_loaded_only_if_the_reward_looks(file, tmp_path):
    store, loads = ImageStore(tmp_path / "images"), []

    def load():
        loads.append(1)
        return Image.new("RGB", (3, 2))

    key = store.add_lazy(b"k", load)
    _score([_group(f"{file}:echo", "1.0", images=(key,))], store)
    assert loads == []
    _score([_group(f"{file}:wide", "1.0", images=(key,))], store)
    assert loads == [1]


def test_a_reward_is_loaded_once_for_all_tasks_and_rounds(file, monkeypatch):
    names = []

    def counting(name):
        names.append(name)
        return load_reward(name)

    monkeypatch.setattr(scoring, "load_reward", counting)
    judge = Judge(Rewards(), None)
    for _ in range(2):
        asyncio.run(judge.score([_group(f"{file}:echo", "1.0", "0.0"), _group(f"{file}:echo", "1.0", task="u")]))
    assert names == [f"{file}:echo"]
