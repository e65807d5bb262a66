"""The judge: which reward scores what, what a failure becomes, and when the run stops."""

import asyncio

import pytest
from PIL import Image
from rlvlm_rewards import Failure, load_reward

from rlvlm import scoring
from rlvlm.recipe.errors import RecipeError, RunError
from rlvlm.recipe.schema import Named, Rewards
from rlvlm.records import Group, Segment, StopReason, Task, Trajectory
from rlvlm.scoring import Judge, TooManyFailures, opens_thinking, own_reward
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

def context(sample):
    return float(sample.progress == 0.25 and sample.columns == {"shade": 3} and not sample.thinking)

def half(sample):
    return 0.5

def share(sample, of=2.0):
    return 1.0 / of

class Opened:
    closed = 0

    def __call__(self, sample):
        return 1.0

    async def aclose(self):
        self.closed += 1

opened = Opened()

def wide(sample):
    return float((sample.images[0].width, sample.task, sample.answer, len(sample.messages)) == (3, "t", "7", 1))
"""


@pytest.fixture
def file(tmp_path):
    (tmp_path / "rewards.py").write_text(_REWARDS)
    return tmp_path / "rewards.py"


def _group(reward, *texts, images=(), task="t", columns=()):
    asked = Task(task, ({"role": "user", "content": "?"},), images, "7", reward, 1, "s", columns=dict(columns))
    segment = Segment((5,), (-1.0,), True, 0)
    said = tuple(Trajectory(task, j, (1,), (segment,), StopReason.END, text) for j, text in enumerate(texts))
    return Group(asked, said)


def _score(groups, store=None, *, thinking=True, progress=1.0, **rewards):
    judge = Judge(Rewards.model_validate(rewards, strict=False), store, thinking=thinking)
    return asyncio.run(judge.score(groups, progress))


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
    judge = Judge(Rewards(), None, thinking=True)
    for _ in range(2):
        asyncio.run(judge.score([_group(f"{file}:echo", "1.0", "0.0"), _group(f"{file}:echo", "1.0", task="u")]))
    assert names == [f"{file}:echo"]


def test_an_unfinished_thought_is_no_answer_where_the_prompt_opens_it():
    groups = [_group("exact", "7", "3</think>7", "<think>7")]
    assert _values(_score(groups, thinking=True)) == [[0.0, 1.0, 0.0]]
    assert _values(_score(groups, thinking=False)) == [[1.0, 1.0, 0.0]]


class _Processor:
    def __init__(self, ending):
        self.ending = ending

    def apply_chat_template(self, messages, add_generation_prompt, tokenize):
        assert add_generation_prompt and not tokenize and messages[0]["role"] == "user"
        return f"<|user|>?<|assistant|>{self.ending}"


@pytest.mark.parametrize(("ending", "opens"), [("<think>", True), ("<think>\n", True), ("", False)])
def test_whether_prompts_open_a_thought_is_seen_in_the_template(ending, opens):
    assert opens_thinking(_Processor(ending)) is opens


def test_the_reward_sees_progress_and_the_row_s_other_columns(file):
    groups = [_group(f"{file}:context", "a", columns={"shade": 3}), _group(f"{file}:context", "a", task="u")]
    assert _values(_score(groups, thinking=False, progress=0.25)) == [[1.0], [0.0]]
    assert _values(_score(groups, thinking=False)) == [[0.0], [0.0]]


def test_a_composition_of_the_recipe(file):
    parts = [
        {"reward": f"{file}:echo", "weight": 3.0},
        {"reward": f"{file}:share", "weight": 1.0, "options": {"of": 4.0}},
    ]
    (group,) = _score([_group("mine", "1.0", "0.5")], named={"mine": {"parts": parts}})
    # (3 x 1 + 1 x 1/4) / 4 and (3 x 1/2 + 1 x 1/4) / 4
    assert [score.value for score in group.scores] == [0.8125, 0.4375]
    assert [score.parts for score in group.scores] == [{"echo": 1.0, "share": 0.25}, {"echo": 0.5, "share": 0.25}]


def test_a_composition_has_its_own_time_limit(file):
    parts = [{"reward": f"{file}:slow_first"}, {"reward": f"{file}:half"}]
    named = {"mine": {"parts": parts, "timeout_s": 0.05}}
    (group,) = _score([_group("mine", "0.25", "0.5")], named=named, retries=0)
    assert group.scores[0].failure is Failure.TIMEOUT
    assert group.scores[1].value == 0.5


@pytest.mark.parametrize(
    ("name", "parts", "told"),
    [
        (
            "mine",
            [{"reward": "FILE:share", "options": {"off": 2.0}}],
            "rewards.named.mine.parts[0].options.off = 2.0: FILE:share has no option 'off'; did you mean 'of'?",
        ),
        ("mine", [{"reward": "fromat"}], "rewards.named.mine.parts[0].reward = fromat: is not known; did you mean"),
        (
            "mine",
            [{"reward": "language"}],
            "rewards.named.mine.parts[0].reward = language: option 'scripts' is missing; give",
        ),
        (
            "mine",
            [{"reward": "format"}, {"reward": "repetition", "options": {"ngram": "3"}}],
            "rewards.named.mine.parts[1].options.ngram = '3': ngram is '3'; give a whole number",
        ),
        (
            "mine",
            [{"reward": "repetition", "options": {"ngram": 0}}],
            "rewards.named.mine.parts[0].options.ngram = 0: ngram is 0; give 1 or more words",
        ),
        ("mine", [{"reward": "tool_bonus"}], "rewards.named.mine.parts = [tool_bonus]: mine has no part that judges"),
        ("format", [{"reward": "format"}], "rewards.named.format = format: a built-in reward has this name; choose"),
    ],
)
def test_what_is_wrong_with_a_composition_is_told_with_its_key(file, name, parts, told):
    named = Named.model_validate(
        {"parts": [{**part, "reward": part["reward"].replace("FILE", str(file))} for part in parts]}, strict=False
    )
    with pytest.raises(RecipeError) as caught:
        own_reward(name, named)
    assert told.replace("FILE", str(file)) in str(caught.value)


def test_closing_the_judge_closes_its_rewards(file):
    judge = Judge(Rewards(), None, thinking=True)
    asyncio.run(judge.score([_group(f"{file}:opened", "a")]))
    asyncio.run(judge.aclose())
    assert load_reward(f"{file}:opened").function.closed == 1
