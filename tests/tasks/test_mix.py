import collections
import hashlib
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rlvlm_rewards.records import Sample

from rlvlm.recipe.schema import Source, Tasks
from rlvlm.records import Task
from rlvlm.tasks import ImageStore, check_sources, draw_pool, draw_tasks, load_generator
from rlvlm.tasks.errors import BadGeneratorError, BadLevelsError, UnknownGeneratorError
from rlvlm.tasks.mix import GENERATORS, _shares

ALL = tuple(Source(generator=name) for name in GENERATORS)


def digest(pool: list[Task]) -> str:
    return hashlib.sha256(repr([(t.id, t.images, t.messages, t.answer, t.chains) for t in pool]).encode()).hexdigest()


def test_shares_by_hand() -> None:
    assert _shares([1, 1, 1], 10) == [4, 3, 3]
    assert _shares([3, 1], 10) == [8, 2]  # 7.5 and 2.5: equal remainders, the first wins
    assert _shares([0.5, 0.3, 0.2], 11) == [6, 3, 2]  # 5.5, 3.3, 2.2
    assert _shares([1000, 1], 10) == [10, 0]


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=6), st.integers(0, 5000))
def test_shares_add_up_and_are_off_by_less_than_one(weights: list[float], n: int) -> None:
    counts = _shares(weights, n)
    assert sum(counts) == n
    assert all(abs(count - n * weight / sum(weights)) < 1 + 1e-6 for count, weight in zip(counts, weights, strict=True))


def test_mix_is_exact_even_and_goes_round_the_levels(store: ImageStore) -> None:
    sources = (Source(generator="digits_sum", weight=3.0, levels=(2, 4)), Source(generator="bar_chart"))
    pool = draw_pool(sources, 400, 0, "train", store)
    assert collections.Counter(t.source for t in pool) == {"digits_sum": 300, "bar_chart": 100}
    for start in range(0, 400, 40):
        assert 29 <= sum(t.source == "digits_sum" for t in pool[start : start + 40]) <= 31
    assert [t.level for t in pool if t.source == "digits_sum"] == [2, 4] * 150
    assert [t.level for t in pool if t.source == "bar_chart"] == [1, 2, 3, 4, 5] * 20


def test_ids_name_source_split_and_position_and_never_clash(store: ImageStore) -> None:
    twice = (Source(generator="digits_sum", levels=(1,)), Source(generator="digits_sum", levels=(5,)))
    pools = [draw_pool(twice, 60, seed, split, store) for seed in (0, 1) for split in ("train", "held_out")]
    by_id = {task.id: task for pool in pools for task in pool}
    assert len(by_id) == 240
    assert pools[0][0].id.startswith("digits_sum-train-00000-")
    assert pools[0][1].id.startswith("digits_sum~2-train-00000-")
    assert pools[1][2].id.startswith("digits_sum-held_out-00001-")
    assert {task.source for task in by_id.values()} == {"digits_sum"}


def test_pools_of_both_splits_share_nothing(store: ImageStore) -> None:
    def content(task: Task) -> tuple[object, ...]:
        return (*task.images, task.messages[0]["content"][1]["text"])

    tasks = Tasks(train=ALL)
    train = [content(t) for seed in (0, 1) for t in draw_tasks(tasks, 600, seed, "train", store)]
    held_out = [content(t) for t in draw_tasks(tasks, 300, 0, "held_out", store)]
    assert len(set(held_out)) == 300
    assert len(set(train[:600])) == len(set(train[600:])) == 600
    assert not set(train) & set(held_out)


def test_longer_pool_has_the_same_tasks_of_a_source_first(store: ImageStore) -> None:
    short, long = (draw_pool(ALL[:1], n, 7, "train", store) for n in (10, 40))
    assert [t.id for t in short] == [t.id for t in long[:10]]
    assert [t.images for t in short] != [t.images for t in draw_pool(ALL[:1], 10, 8, "train", store)]


def test_other_process_draws_the_same_pool_and_checks_without_torch_or_datasets(
    tmp_path: Path, store: ImageStore
) -> None:
    code = """
import sys
from pathlib import Path
from tasks.test_mix import ALL, digest
from rlvlm.recipe.schema import Source, Tasks
from rlvlm.tasks import ImageStore, check_sources, draw_tasks
Path("x.jsonl").write_text('{"prompt": "a", "answer": 1}')
check_sources(Tasks(train=(*ALL, Source(dataset="x.jsonl", reward="number"))))
heavy = {"torch", "datasets", "sklearn", "transformers"} & set(sys.modules)
print(digest(draw_tasks(Tasks(train=ALL), 120, 3, "train", ImageStore(Path("i")))), heavy or "light")
"""
    environment = {
        "PYTHONHASHSEED": "12345",
        "PYTHONPATH": ":".join([str(Path(__file__).parents[1]), *filter(None, sys.path)]),
    }
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [digest(draw_tasks(Tasks(train=ALL), 120, 3, "train", store)), "light"]


def test_drawing_is_fast(store: ImageStore) -> None:
    draw_pool(ALL, 12, 0, "train", store)  # scikit-learn is imported, masks are drawn
    start = time.process_time()
    draw_pool(ALL, 1000, 0, "train", store)
    assert time.process_time() - start < 2.5  # 0.25 s on the machine it was written on


def test_generator_of_a_module_and_reward_override(store: ImageStore) -> None:
    assert load_generator("rlvlm.tasks.digits:DigitsSum").name == "digits_sum"
    source = Source(generator="rlvlm.tasks.digits:DigitsSum", reward="number")
    assert {t.reward for t in draw_pool([source], 5, 0, "train", store)} == {"number"}


@pytest.mark.parametrize("source", ALL, ids=str)
def test_reward_name_leads_to_the_verifier(source: Source, store: ImageStore) -> None:
    from rlvlm_rewards import load_reward

    task = draw_pool([source], 1, 0, "train", store)[0]
    assert load_reward(task.reward) is not None
    place, _, attribute = task.reward.partition(":")
    verify = getattr(getattr(sys.modules[place], attribute.split(".")[0]), "verify")  # noqa: B009 - as load_reward does
    for answer, value in ((task.answer, 1.0), (str(int(task.answer) + 1), 0.0)):
        assert verify(Sample(completion=f"{task.chains['medium'].text}</think>{answer}", answer=task.answer)) == value


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("digit_sum", UnknownGeneratorError, r"no such generator.*mean 'digits_sum'"),
        ("rlvlm.tasks.digits:DigitSum", UnknownGeneratorError, r"has no 'DigitSum'.*mean 'DigitsSum'"),
        ("rlvlm.tasks.digit:DigitsSum", UnknownGeneratorError, r"there is no module 'rlvlm\.tasks\.digit'; install"),
        ("rlvlm.tasks.digits:load_scans", BadGeneratorError, r"no subclass of Generator"),
        ("rlvlm.tasks.digits:DigitCells", BadGeneratorError, r"it lacks ask.*implement ask\(\)"),
        ("dot.py:Dots", UnknownGeneratorError, r"no file '.*/dot\.py'; did you mean 'dots\.py'"),
        ("nowhere/dots.py:Dots", UnknownGeneratorError, r"no file '.*/nowhere/dots\.py'; give a path from /"),
        (
            "dots.py:Dots",
            BadGeneratorError,
            r"importing file '.*dots\.py' raised SyntaxError: .* \(.*dots\.py:1\); mend it there",
        ),
        (
            "name.py:Dots",
            BadGeneratorError,
            r"raised NameError: name 'undefined' is not defined \(.*name\.py:3\); mend",
        ),
        ("ends.py:Dots", BadGeneratorError, r"raised SystemExit: 3 \(.*ends\.py:1\)"),
        ("plain.py:Dots", UnknownGeneratorError, r"has no 'Dots'.*write a subclass"),
    ],
)
def test_names_that_lead_nowhere(
    name: str, error: type[Exception], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "dots.py").write_text("class Dots(:\n")
    (tmp_path / "plain.py").write_text("x = 1\n")
    (tmp_path / "name.py").write_text("import json\n\nundefined\n")
    (tmp_path / "ends.py").write_text("raise SystemExit(3)\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=rf"^tasks\.train\[1\]\.generator = {name}: .*{message}"):
        check_sources(Tasks(train=(ALL[0], Source(generator=name))))


@pytest.mark.parametrize("levels", [(6,), (1, 1), (5, 7)])
def test_levels_that_a_generator_does_not_draw(levels: tuple[int, ...], store: ImageStore) -> None:
    tasks = Tasks(train=(Source(generator="digits_sum", levels=levels),))
    with pytest.raises(BadLevelsError, match=r"tasks\.train\[0\]\.levels .*digits_sum draws the levels 1, 2, 3, 4, 5"):
        check_sources(tasks)
    with pytest.raises(BadLevelsError):
        draw_tasks(tasks, 5, 0, "train", store)
