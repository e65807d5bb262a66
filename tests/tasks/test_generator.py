import random
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from rlvlm_rewards.records import Sample

from rlvlm.recipe.schema import Source
from rlvlm.records import Chain
from rlvlm.tasks import ImageStore, draw_pool, generator, load_generator
from rlvlm.tasks.errors import BadGeneratorError, TooFewTasksError
from rlvlm.tasks.generator import Generator, Scene, Step, make_task, split_of


class Shade(Generator[int]):
    """Pictures of one of 200 shades: a small world, to run out of."""

    def draw(self, rng: random.Random, level: int, split: str) -> Scene[int]:
        shade = rng.randrange(200)
        return Scene(Image.new("RGB", (2, 2), (shade, shade, shade)), shade)

    def ask(self, scene: Scene[int]) -> str:
        return "shade ?"

    def solve(self, scene: Scene[int]) -> str:
        return str(scene.facts)


class TwoSteps(Shade):
    def explain(self, scene: Scene[int]) -> list[Step]:
        return [Step("a1", 7, 7), Step("a2", "5", 12)]


class BlankInWord(Shade):
    def explain(self, scene: Scene[int]) -> list[Step]:
        return [Step("a1", "red circle", 1)]


def test_chain_styles_and_seen_words(store: ImageStore) -> None:
    chains = make_task(TwoSteps(), random.Random(0), 1, "train", store).chains
    assert chains["short"] == Chain("a1 (7) a2 (12)")
    assert chains["medium"] == Chain("a1 7 (7) a2 5 (12)", ((3, 4), (12, 13)))
    assert chains["verbose"].text == "a1 7 (7) a2 5 (12) check a1 7 (7) a2 5 (12)"
    assert [chains["verbose"].text[start:end] for start, end in chains["verbose"].seen] == ["7", "5", "7", "5"]


def test_task_has_what_the_contract_says(store: ImageStore) -> None:
    task = make_task(Shade(), random.Random(3), 4, "train", store)
    assert task.messages == ({"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "shade ?"}]},)
    assert str(store.image(task.images[0]).getpixel((0, 0))[0]) == task.answer
    assert task.reward == f"{__name__}:Shade.verify"
    assert (task.level, task.source, dict(task.chains)) == (4, "Shade", {})


def test_splits_never_share_a_scene_and_pools_never_repeat_one(store: ImageStore) -> None:
    expected = {s for s in range(200) if split_of(bytes([s] * 12) + b"shade ?") == "held_out"}
    drawn: dict[str, set[int]] = {}
    for split, size in (("train", 200 - len(expected)), ("held_out", len(expected))):
        used: set[str] = set()
        rng = random.Random(1)
        answers = [int(make_task(Shade(), rng, 1, split, store, used=used).answer) for _ in range(size)]
        drawn[split] = set(answers)
        assert len(drawn[split]) == size, "a scene came twice"
        with pytest.raises(TooFewTasksError, match=rf"key = Shade: 2000 draws gave no new {split} .*after {size} "):
            make_task(Shade(), rng, 1, split, store, used=used, key="key")
    assert drawn["held_out"] == expected
    assert drawn["train"] == set(range(200)) - expected


@given(st.integers(0, 1000))
def test_about_one_in_ten_is_held_out(start: int) -> None:
    share = sum(split_of(f"{start} {i}".encode()) == "held_out" for i in range(2000)) / 2000
    assert 0.06 < share < 0.14  # +- 6 standard deviations


@pytest.mark.parametrize(
    ("completion", "answer", "value"),
    [
        ("a1 7 (7)</think>7", "7", 1.0),
        ("a1 7 (7)</think> 7.0\n", "7", 1.0),
        ("x</think>07", "7", 1.0),
        ("x</think>-7", "7", 0.0),
        ("x</think>8", "7", 0.0),
        ("x</think>7 apples", "7", 0.0),
        ("x</think>", "7", 0.0),
        ("7", "7", 0.0),  # never stopped thinking
        ("", "7", 0.0),
        ("x</think>7</think>8", "8", 1.0),
        ("x</think>7</think>8", "7", 0.0),
        ("x</think>Red  Circle", "red circle", 1.0),
        ("x</think>nan", "nan", 1.0),  # a word like any other
        ("x</think>inf", "1", 0.0),
        ("x</think>1_0", "10", 0.0),  # Python's float() would take it
        ("x</think>" + "9" * 6000, "9", 0.0),  # Python's int() would raise
        ("x</think>0.1", "0.10", 1.0),
    ],
)
def test_default_verifier(completion: str, answer: str, value: float) -> None:
    assert Generator.verify(Sample(completion=completion, answer=answer)) == value


@given(st.text(), st.text())
def test_verifier_never_raises_and_never_rewards_an_open_thought(completion: str, answer: str) -> None:
    value = Generator.verify(Sample(completion=completion, answer=answer))
    assert value in (0.0, 1.0)
    if "</think>" not in completion:
        assert value == 0.0
    assert Generator.verify(Sample(completion=f"{completion}</think>{answer}", answer=answer)) == float(
        "</think>" not in answer
    )


def test_words_with_blanks_are_refused(store: ImageStore) -> None:
    with pytest.raises(BadGeneratorError, match=r"'red circle' of a medium chain .* has a blank"):
        make_task(BlankInWord(), random.Random(0), 1, "train", store)


def test_class_in_a_function_is_refused(store: ImageStore) -> None:
    class Hidden(Shade):
        pass

    with pytest.raises(BadGeneratorError, match="move the class to the top level"):
        make_task(Hidden(), random.Random(0), 1, "train", store)


def test_unknown_style_is_an_error() -> None:
    scene = Scene(Image.new("RGB", (1, 1)), 0)
    with pytest.raises(ValueError, match="cannot write chains in the style 'haiku'"):
        TwoSteps().words(scene, "haiku")


def test_documented_generator_runs(tmp_path: Path, store: ImageStore, monkeypatch: pytest.MonkeyPatch) -> None:
    example = re.search(r"```python\n(.*?)```", generator.__doc__ or "", re.DOTALL)
    assert example is not None
    assert len(example[1].splitlines()) <= 40
    (tmp_path / "dots.py").write_text(example[1])
    monkeypatch.chdir(tmp_path)
    pool = draw_pool([Source(generator="dots.py:Dots")], 30, 0, "train", store)
    assert [task.level for task in pool[:4]] == [1, 2, 3, 1]
    for task in pool:
        assert task.reward == "dots.py:Dots.verify"
        seen = [int(task.chains["medium"].text[start:end]) for start, end in task.chains["medium"].seen]
        assert len(seen) == task.level + 1
        assert sum(seen) == int(task.answer)
        verify = type(load_generator("dots.py:Dots")).verify
        assert verify(Sample(completion=f"{task.chains['short'].text}</think>{task.answer}", answer=task.answer)) == 1.0
