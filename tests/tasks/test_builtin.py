"""The built-in generators, checked against answers worked out anew from the chains' words and from the pixels."""

import functools
import itertools
import random
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_digits

from rlvlm.records import Task
from rlvlm.tasks import ImageStore, load_generator
from rlvlm.tasks.digits import load_scans, split_of_scan
from rlvlm.tasks.generator import Split, make_task
from rlvlm.tasks.mix import GENERATORS

CELLS = [row + column for row in "abcd" for column in "1234"]
ITEMS = {
    "digits_largest": {1: 2, 2: 4, 3: 6, 4: 8, 5: 10},
    "digits_sum": {1: 2, 2: 3, 3: 4, 4: 5, 5: 6},
    "digits_count": {1: 3, 2: 5, 3: 7, 4: 9, 5: 11},
    "shapes_count": {1: 3, 2: 5, 3: 7, 4: 9, 5: 12},
    "bar_chart": {1: 2, 2: 3, 3: 3, 4: 4, 5: 4},
    "text_calculation": {1: 3, 2: 5, 3: 7, 4: 9, 5: 11},
}
STORE = ImageStore(Path("never-written"))


def draw(name: str, seed: int, level: int, split: Split = "train") -> Task:
    return make_task(load_generator(name), random.Random(seed), level, split, STORE)


def pixels(task: Task) -> np.ndarray:
    """[64, 64, 3], int."""
    return np.asarray(STORE.image(task.images[0])).astype(int)


def cell_of(image: np.ndarray, index: int) -> np.ndarray:
    row, column = divmod(index, 4)
    return image[16 * row : 16 * row + 16, 16 * column : 16 * column + 16]


def question(task: Task) -> str:
    return task.messages[0]["content"][1]["text"]


def triples(task: Task) -> list[tuple[str, str, int]]:
    words = task.chains["medium"].text.split(" ")
    return [(where, seen, int(running[1:-1])) for where, seen, running in zip(*[iter(words)] * 3, strict=True)]


def expected_results(name: str, asked: str, seen: list[str]) -> list[int]:
    """The result after each item, from the question's and the chain's words alone."""
    prefixes = [seen[: i + 1] for i in range(len(seen))]
    if asked in ("largest digit ?", "tallest bar ?"):
        return [max(map(int, prefix)) for prefix in prefixes]
    if asked in ("sum of digits ?", "sum of bars ?"):
        return [sum(map(int, prefix)) for prefix in prefixes]
    if asked == "difference tallest shortest bar ?":
        return [max(map(int, prefix)) - min(map(int, prefix)) for prefix in prefixes]
    if asked == "value of calculation ?":
        return [eval("".join(prefix).rstrip("+-")) for prefix in prefixes]
    if found := re.fullmatch(r"how many (\d) \?", asked):
        return [prefix.count(found[1]) for prefix in prefixes]
    found = re.fullmatch(r"count (red|green|blue|any) (circle|square|triangle|any) \?", asked)
    assert found is not None and found[0] != "count any any ?"
    wanted = re.compile(f"{found[1]}-{found[2]}".replace("any", r"\w+"))
    return [sum(wanted.fullmatch(word) is not None for word in prefix) for prefix in prefixes]


@pytest.mark.parametrize("name", GENERATORS)
@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32), level=st.integers(1, 5), split=st.sampled_from(["train", "held_out"]))
def test_answers_chains_and_levels(name: str, seed: int, level: int, split: Split) -> None:
    task = draw(name, seed, level, split)
    where, seen, running = map(list, zip(*triples(task), strict=True))
    assert len(seen) == ITEMS[name][level]
    assert where == (CELLS[12:] if name == "bar_chart" else CELLS)[: len(seen)]
    assert running == expected_results(name, question(task), seen)
    assert task.answer == str(running[-1])
    assert all(0 <= result <= 63 for result in running)
    assert len(question(task).split()) <= 8
    assert [task.chains["medium"].text[start:end] for start, end in task.chains["medium"].seen] == seen
    short = " ".join(f"{cell} ({result})" for cell, result in zip(where, running, strict=True))
    assert task.chains["short"].text == short
    medium = task.chains["medium"].text
    assert task.chains["verbose"].text == f"{medium} check {medium}"


@pytest.mark.parametrize("name", GENERATORS)
def test_picture_is_a_white_canvas_with_items_in_their_cells_only(name: str) -> None:
    for seed in range(10):
        task = draw(name, seed, 3)
        image = pixels(task)
        assert image.shape == (64, 64, 3)
        if name == "bar_chart":
            assert (image[:, 48:] == 255).all(), "three bars fill three columns"
            continue
        inked = [bool((cell_of(image, i) < 200).any()) for i in range(16)]
        assert inked == [i < ITEMS[name][3] for i in range(16)]


def test_shapes_are_what_the_chain_says() -> None:
    """Colour by the strongest channel; shape by the share of its box that is ink: square 1, circle .79, triangle .5."""
    for seed in range(40):
        task = draw("shapes_count", seed, 5)
        image = pixels(task)
        for i, (_, seen, _) in enumerate(triples(task)):
            cell = cell_of(image, i)
            ink = (255 - cell.min(axis=2)) / (255 - cell.min())
            rows, columns = (np.flatnonzero(ink.max(axis=axis) > 0.2) for axis in (1, 0))
            box = ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
            fill = box.mean()
            shape = "square" if fill > 0.9 else "circle" if fill > 0.65 else "triangle"
            darkest = cell.reshape(-1, 3)[cell.sum(axis=2).argmin()]
            assert seen == f"{('red', 'green', 'blue')[darkest.argmax()]}-{shape}", (seed, i, fill)


def test_shape_colours_vary_by_at_most_20() -> None:
    centres = {"red": (220, 40, 40), "green": (40, 170, 60), "blue": (50, 80, 230)}
    far = 0
    for seed in range(60):
        task = draw("shapes_count", seed, 5)
        image = pixels(task)
        for i, (_, seen, _) in enumerate(triples(task)):
            cell = cell_of(image, i)
            darkest = cell.reshape(-1, 3)[cell.sum(axis=2).argmin()]
            distance = np.abs(darkest - centres[seen.split("-")[0]]).max()
            assert distance <= 20
            far += distance >= 15
    assert far > 50, "the noise is there"


def test_bars_are_as_high_as_the_chain_says() -> None:
    heights = set()
    for seed in range(60):
        task = draw("bar_chart", seed, 5)
        image = pixels(task)
        for column, (_, seen, _) in enumerate(triples(task)):
            middle = image[:, 16 * column + 8]
            coloured = (middle.max(axis=1) - middle.min(axis=1) > 50).sum()
            # a unit has 8 rows, of which the grid takes one; the axis takes one more of the lowest unit
            height = int(seen)
            assert coloured == max(0, 7 * height - (height > 0)), (seed, column)
            heights.add(height)
    assert heights == set(range(9))


def test_glyphs_are_told_apart_and_minus_is_a_dash() -> None:
    for seed in range(20):
        task = draw("text_calculation", seed, 5)
        image = pixels(task)
        for i, (_, seen, _) in enumerate(triples(task)):
            ink = cell_of(image, i).min(axis=2) < 180
            rows, columns = np.flatnonzero(ink.any(axis=1)), np.flatnonzero(ink.any(axis=0))
            height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
            kind = "-" if height <= 3 else "+" if height <= 9 else "digit"
            assert kind == (seen if seen in "+-" else "digit"), (seed, i, height, width)
            assert width >= 5 or seen == "1", "too small to read"


@functools.cache
def normalised_scans() -> np.ndarray:
    """[1797, 64], every scan of length 1 around its mean."""
    flat = load_digits().data - load_digits().data.mean(axis=1, keepdims=True)
    return flat / np.linalg.norm(flat, axis=1, keepdims=True)


def nearest_scan(cell: np.ndarray) -> int:
    """The scan that a cell [16, 16, 3] shows, over all nine jitters."""
    ink = (255 - cell.mean(axis=2)).astype(np.float32)
    best = (-1.0, -1)
    for top, left in itertools.product(range(3), repeat=2):
        small = Image.fromarray(ink[top : top + 14, left : left + 14]).resize((8, 8), Image.Resampling.BOX)
        flat = np.asarray(small).ravel() - np.asarray(small).mean()
        likeness = normalised_scans() @ (flat / np.linalg.norm(flat))
        best = max(best, (float(likeness.max()), int(likeness.argmax())))
    return best[1]


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_pictures_show_scans_of_their_split_with_the_digit_of_the_chain(split: Split) -> None:
    right_digit = right_split = cells = 0
    for seed in range(12):
        task = draw("digits_sum", seed, 5, split)
        for i, (_, seen, _) in enumerate(triples(task)):
            scan = nearest_scan(cell_of(pixels(task), i))
            right_digit += int(load_digits().target[scan]) == int(seen)
            right_split += split_of_scan(scan) == split
            cells += 1
    # Blurring may take a scan for a twin of it. By chance, 10% of the digits and 20 or 80% of the splits would agree.
    assert right_digit >= 0.97 * cells
    assert right_split >= 0.95 * cells


def test_scans_are_split_four_to_one_and_used_as_split() -> None:
    scans = load_scans()
    by_split = {split: {i for same in scans.of[split] for i in same} for split in ("train", "held_out")}
    assert by_split["train"] | by_split["held_out"] == set(range(1797))
    assert not by_split["train"] & by_split["held_out"]
    assert 0.17 < len(by_split["held_out"]) / 1797 < 0.23
    target = load_digits().target
    for split, digit in itertools.product(by_split, range(10)):
        assert len(scans.of[split][digit]) >= 20
        assert {int(target[i]) for i in scans.of[split][digit]} == {digit}
    for name in ("digits_largest", "digits_sum", "digits_count"):
        generator = load_generator(name)
        for split in by_split:
            rng = random.Random(5)
            shown = {i for _ in range(100) for i in generator.draw(rng, 5, split).facts.scans}
            assert shown <= by_split[split]


def test_no_answer_can_be_guessed() -> None:
    """Always giving the commonest answer must not pay: below a half at level 1, below a third at level 5."""
    for name in GENERATORS:
        generator, rng = load_generator(name), random.Random(0)
        for level, bound in ((1, 0.5), (5, 0.34)):
            answers = [generator.solve(generator.draw(rng, level, "train")) for _ in range(400)]
            assert max(map(answers.count, set(answers))) / 400 < bound, (name, level)


def test_a_little_other_ink_is_no_new_held_out_task() -> None:
    """Where facts tell scenes apart, no held-out arrangement is ever trained on in another shade."""
    for name in ("text_calculation", "shapes_count", "bar_chart"):
        generator = load_generator(name)
        facts: dict[str, set[tuple[object, str]]] = {}
        for split in ("train", "held_out"):
            rng = random.Random(2)
            tasks = [make_task(generator, rng, 1, split, STORE) for _ in range(150)]
            facts[split] = {(tuple(triples(task)), question(task)) for task in tasks}
        assert facts["train"] and not facts["train"] & facts["held_out"]


def test_the_verifier_of_generators_cannot_be_cheated() -> None:
    from rlvlm_rewards.check import check_reward

    failed = [found for found in check_reward("rlvlm.tasks.digits:DigitsSum.verify", {}) if found.passed is False]
    assert failed == []
