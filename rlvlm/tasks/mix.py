"""From a recipe's task sources to a pool of tasks. Imports neither torch nor datasets until a data set is drawn."""

from __future__ import annotations

import random
from collections.abc import Sequence
from fractions import Fraction
from types import ModuleType
from typing import TYPE_CHECKING, Any

from rlvlm_rewards.plugins import PluginBroken, PluginNotFound, import_plugin

from rlvlm.recipe.errors import ABSENT
from rlvlm.records import Task
from rlvlm.tasks import dataset
from rlvlm.tasks.errors import BadGeneratorError, BadLevelsError, MissingRewardError, UnknownGeneratorError, nearest
from rlvlm.tasks.generator import Generator, Split, make_task, reward_of
from rlvlm.tasks.images import ImageStore

if TYPE_CHECKING:
    from rlvlm.recipe.schema import Source, Tasks

GENERATORS = {
    "digits_largest": "rlvlm.tasks.digits:DigitsLargest",
    "digits_sum": "rlvlm.tasks.digits:DigitsSum",
    "digits_count": "rlvlm.tasks.digits:DigitsCount",
    "shapes_count": "rlvlm.tasks.shapes:ShapesCount",
    "bar_chart": "rlvlm.tasks.charts:BarChart",
    "text_calculation": "rlvlm.tasks.text:TextCalculation",
}


def load_generator(name: str, key: str = "generator") -> Generator[Any]:
    """The generator `name`: a built-in one, `package.module:Class` or `path/to/file.py:Class`.

    Paths count from the working directory. key: the recipe key for messages.
    Raises UnknownGeneratorError or BadGeneratorError.
    """
    place, colon, attribute = GENERATORS.get(name, name).rpartition(":")
    if not colon:
        mend = f"did you mean {nearest(name, GENERATORS)!r}? Or give package.module:Class or path/to/file.py:Class"
        raise UnknownGeneratorError(key, name, f"no such generator; there are {', '.join(GENERATORS)}", mend)
    module = _import(place, name, key)
    cls = getattr(module, attribute, None)
    if cls is None:
        classes = [n for n, v in vars(module).items() if isinstance(v, type) and issubclass(v, Generator)]
        mend = f"did you mean {nearest(attribute, classes)!r}?" if classes else "write a subclass of Generator there"
        raise UnknownGeneratorError(key, name, f"{place} has no {attribute!r}", mend)
    if not (isinstance(cls, type) and issubclass(cls, Generator)):
        raise BadGeneratorError(
            key, name, "it is no subclass of Generator", "derive it from rlvlm.tasks.generator.Generator"
        )
    missing = [method for method in ("draw", "ask", "solve") if getattr(cls, method) is getattr(Generator, method)]
    if missing:
        raise BadGeneratorError(key, name, f"it lacks {', '.join(missing)}", f"implement {missing[0]}()")
    generator = cls()
    if place.endswith(".py"):
        generator.reward = generator.reward or f"{place}:{attribute}.verify"
    return generator


def _import(place: str, name: str, key: str) -> ModuleType:
    try:
        return import_plugin(place)
    except PluginNotFound as error:
        raise UnknownGeneratorError(key, name, error.problem, error.mend) from error
    except PluginBroken as error:
        raise BadGeneratorError(key, name, error.problem, error.mend) from error


def check_sources(tasks: Tasks) -> None:
    """Finds what is wrong with the sources without drawing a task: missing files and columns, unknown generators,
    levels that do not fit, a data set without reward. Raises a TaskSourceError."""
    for part, sources in (("train", tasks.train), ("evaluation", tasks.evaluation)):
        for i, source in enumerate(sources):
            _check_source(source, f"tasks.{part}[{i}]")


def _check_source(source: Source, key: str) -> None:
    if source.generator is not None:
        generator = load_generator(source.generator, f"{key}.generator")
        reward_of(generator, f"{key}.generator")
        _levels(source, generator, key)
        return
    if source.levels is not None:
        problem = "levels are drawn by generators only"
        raise BadLevelsError(
            f"{key}.levels", source.levels, problem, "remove it; name the rows' level with columns.level"
        )
    if source.reward is None:
        mend = "give the reward: a name, package.module:attr or path/to/file.py:attr"
        raise MissingRewardError(f"{key}.reward", ABSENT, f"the data set {source.dataset!r} brings no verifier", mend)
    dataset.check(source, key)


def _levels(source: Source, generator: Generator[Any], key: str) -> tuple[int, ...]:
    levels = generator.levels if source.levels is None else source.levels
    if not levels or len(set(levels)) < len(levels) or not set(levels) <= set(generator.levels):
        problem = f"{generator.name} draws the levels {', '.join(map(str, generator.levels))}"
        raise BadLevelsError(
            f"{key}.levels", levels, problem, "give some of them, each once, or leave the key out for all"
        )
    return levels


def draw_tasks(tasks: Tasks, n: int, seed: int, split: Split, store: ImageStore) -> list[Task]:
    """A pool of n tasks by the recipe: `train` from `tasks.train`; `held_out` from `tasks.evaluation` or, if that is
    empty, from the held-out part of `tasks.train`. See `draw_pool`."""
    if split == "train" or not tasks.evaluation:
        return draw_pool(tasks.train, n, seed, split, store)
    return draw_pool(tasks.evaluation, n, seed, split, store, key="tasks.evaluation", trained=tasks.train)


def draw_pool(
    sources: Sequence[Source],
    n: int,
    seed: int,
    split: Split,
    store: ImageStore,
    *,
    key: str = "tasks.train",
    trained: Sequence[Source] | None = None,
) -> list[Task]:
    """A pool of n different tasks, the same for the same arguments.

    The mix is exact (largest remainders of the weights) and even: every stretch of the pool has nearly the same mix. A
    generator's levels take turns. A data set gives its rows in random order, each at most once.
    trained: where `sources` are an evaluation of their own, the sources trained on. A data set that is not among them
    is taken whole; any other is split by the hash of its rows.
    Raises TooFewTasksError if a source runs out, or another TaskSourceError.
    """
    counts = _shares([source.weight for source in sources], n)
    labels = _labels(sources)
    used: set[str] = set()
    drawn: list[tuple[Fraction, int, Task]] = []
    for j, (source, count, label) in enumerate(zip(sources, counts, labels, strict=True)):
        _check_source(source, f"{key}[{j}]")
        if count == 0:
            continue
        if source.generator is not None:
            tasks = _draw_generator(source, count, seed, split, store, label, used, f"{key}[{j}]")
        else:
            whole = trained is not None and not any(dataset.same_rows(source, other) for other in trained)
            part = "all" if whole else split
            tasks = dataset.draw(source, count, seed, part, store, f"{label}-{split}", used, f"{key}[{j}]")
        drawn += [(Fraction(2 * i + 1, 2 * count), j, task) for i, task in enumerate(tasks)]
    return [task for _, _, task in sorted(drawn, key=lambda item: item[:2])]


def _draw_generator(
    source: Source, n: int, seed: int, split: Split, store: ImageStore, label: str, used: set[str], key: str
) -> list[Task]:
    assert source.generator is not None
    generator = load_generator(source.generator, f"{key}.generator")
    if source.reward is not None:
        generator.reward = source.reward
    levels = _levels(source, generator, key)
    rng = random.Random(f"{seed} {split} {label}")
    return [
        make_task(
            generator,
            rng,
            levels[i % len(levels)],
            split,
            store,
            prefix=f"{label}-{split}-{i:05d}",
            used=used,
            key=f"{key}.generator",
        )
        for i in range(n)
    ]


def _shares(weights: Sequence[float], n: int) -> list[int]:
    """Splits n by the weights: whole parts first, what is left goes to the largest remainders (the first of equals)."""
    exact = [Fraction(weight) for weight in weights]  # a float is a fraction: no rounding may move a task
    quotas = [weight * n / sum(exact) for weight in exact]
    counts = [int(quota) for quota in quotas]
    by_remainder = sorted(range(len(quotas)), key=lambda j: counts[j] - quotas[j])
    for j in by_remainder[: n - sum(counts)]:
        counts[j] += 1
    return counts


def _labels(sources: Sequence[Source]) -> list[str]:
    """The start of each source's task ids: its name, with a number where a name comes again."""
    labels: list[str] = []
    for source in sources:
        name = dataset.name_of(source) if source.generator is None else load_generator(source.generator).name
        again = sum(1 for label in labels if label.partition("~")[0] == name)
        labels.append(f"{name}~{again + 1}" if again else name)
    return labels
