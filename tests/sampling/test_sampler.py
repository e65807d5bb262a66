"""Success rates in closed form, draws by their weights, and the curriculum."""

import json
import math
from collections import Counter

import pytest
from rlvlm_rewards import Failure, Score

from rlvlm.recipe.schema import Sampling
from rlvlm.records import Group, Task
from rlvlm.sampling.sampler import Sampler

_FAILED = Score(failure=Failure.TIMEOUT, detail="slow")


def _task(name, level=1, source="s"):
    return Task(name, (), (), "1", "exact", level, source)


def _group(task, right, wrong, failed=0):
    scores = [Score(value=1.0)] * right + [Score(value=0.0)] * wrong + [_FAILED] * failed
    return Group(task, (), tuple(scores))


def _sampler(tasks, seed=0, **sampling):
    return Sampler(tasks, Sampling(**{"curriculum": "off", **sampling}), seed)


# --- success rates ---------------------------------------------------------------------------------------------------


def test_a_prompt_that_nobody_saw_has_the_rate_of_a_fair_coin_and_then_its_buckets():
    a, b, c = _task("a"), _task("b"), _task("c", level=2)
    sampler = _sampler([a, b, c], prior_strength=4.0)
    assert sampler.success_rate(a) == 0.5
    sampler.update([_group(a, right=6, wrong=2)])
    assert sampler.success_rate(b) == pytest.approx((6 + 1) / (8 + 2))
    assert sampler.success_rate(c) == 0.5  # another level, another bucket


def test_rate_with_prior_and_decay_by_hand():
    a, b = _task("a"), _task("b")
    sampler = _sampler([a, b], prior_strength=3.0, decay=0.5)
    sampler.update([_group(a, 4, 4), _group(b, 1, 3)])
    sampler.update([_group(a, 8, 0)])
    # a: 4/8 halved plus 8/8. Its bucket: 5/12 halved plus 8/8.
    prior = (2.5 + 8 + 1) / (6 + 8 + 2)
    assert sampler.success_rate(a) == pytest.approx((2 + 8 + 3 * prior) / (4 + 8 + 3))
    assert sampler.success_rate(b) == pytest.approx((1 + 3 * prior) / (4 + 3))  # not seen again: nothing decays


def test_buckets_are_of_source_and_level():
    sampler = _sampler([_task("a", 1, "x"), _task("b", 1, "y")])
    sampler.update([_group(_task("a", 1, "x"), 8, 0)])
    assert sampler.success_rate(_task("new", 1, "x")) == pytest.approx(9 / 10)
    assert sampler.success_rate(_task("b", 1, "y")) == 0.5


def test_several_groups_of_a_bucket_decay_its_past_once():
    a, b, c = (_task(name) for name in "abc")
    sampler = _sampler([a, b, c], decay=0.5)
    sampler.update([_group(a, 0, 8)])
    sampler.update([_group(a, 4, 0), _group(b, 4, 0)])
    assert sampler.success_rate(c) == pytest.approx((0 + 8 + 1) / (4 + 8 + 2))


def test_failures_say_nothing():
    a, b = _task("a"), _task("b")
    sampler = _sampler([a, b], prior_strength=4.0, decay=0.5)
    sampler.update([_group(a, 2, 1, failed=5)])
    expected = (2 + 4 * (3 / 5)) / (3 + 4)
    assert sampler.success_rate(a) == pytest.approx(expected)
    sampler.update([_group(a, 0, 0, failed=8), _group(b, 0, 0, failed=8)])
    assert sampler.success_rate(a) == pytest.approx(expected)  # not even its past decays
    assert sampler.success_rate(b) == pytest.approx(3 / 5)


# --- draws -----------------------------------------------------------------------------------------------------------


def test_draws_are_distinct_and_as_many_as_asked_for():
    sampler = _sampler([_task(str(i)) for i in range(20)])
    for iteration in range(1, 30):
        assert len({task.id for task in sampler.draw(iteration, 15)}) == 15
    assert len(sampler.draw(1, 20)) == 20


def _drawn(sampler, tasks, draws):
    counts = Counter(sampler.draw(iteration, 1)[0].id for iteration in range(1, draws + 1))
    return [counts[task.id] for task in tasks]


def _chi_square(counts, shares):
    expected = [share / sum(shares) * sum(counts) for share in shares]
    return sum((c - e) ** 2 / e for c, e in zip(counts, expected, strict=True))


def test_probability_is_one_minus_the_success_rate_but_not_below_the_floor():
    """Rates 1/10, 1/2, 4/5 and 1 (the floor, 0.1, holds) with a prior too weak to matter. 16.27: the 99.9% quantile of
    chi-square with 3 degrees of freedom."""
    tasks = [_task(str(i), level=i) for i in range(4)]
    sampler = _sampler(tasks, prior_strength=1e-6, floor=0.1)
    sampler.update([_group(tasks[0], 1, 9), _group(tasks[1], 5, 5), _group(tasks[2], 8, 2), _group(tasks[3], 10, 0)])
    counts = _drawn(sampler, tasks, 3000)
    assert _chi_square(counts, [0.9, 0.5, 0.2, 0.1]) < 16.27
    assert _chi_square(counts, [0.9, 0.5, 0.2, 0.05]) > 16.27  # the test can tell


def test_without_priority_every_prompt_is_as_likely():
    tasks = [_task(str(i), level=i) for i in range(4)]
    sampler = _sampler(tasks, prioritised=False)
    sampler.update([_group(tasks[0], 0, 10), _group(tasks[3], 10, 0)])
    assert _chi_square(_drawn(sampler, tasks, 3000), [1, 1, 1, 1]) < 16.27
    assert len({task.id for task in sampler.draw(1, 4)}) == 4


def test_solved_prompts_fill_the_batch_when_nothing_else_is_left_even_with_floor_0():
    tasks = [_task(str(i), level=i) for i in range(4)]
    sampler = _sampler(tasks, prior_strength=1e-9, floor=0.0)
    sampler.update([_group(task, 10, 0) for task in tasks[1:]])
    for iteration in range(1, 50):
        drawn = sampler.draw(iteration, 2)
        assert len(drawn) == 2 and drawn[0].id == "0"


# --- curriculum ------------------------------------------------------------------------------------------------------


def test_levels_open_linearly_from_the_easiest():
    """Levels 1, 2, 4, 7 over 8 iterations: the first ceil(4 i / 8)."""
    tasks = [_task(f"{level}-{i}", level) for level in (7, 1, 4, 2) for i in range(50)]
    sampler = _sampler(tasks, curriculum="linear", curriculum_iterations=8)
    opened = [max(task.level for task in sampler.draw(i, 48)) for i in range(1, 12)]
    assert opened == [1, 1, 2, 2, 4, 4, 7, 7, 7, 7, 7]
    assert {task.level for task in sampler.draw(6, 48)} == {1, 2, 4}


@pytest.mark.parametrize("levels", [1, 3, 5, 10])
@pytest.mark.parametrize("over", [1, 3, 7, 10])
def test_how_many_levels_are_open(levels, over):
    tasks = [_task(str(level), level) for level in range(1, levels + 1)]
    sampler = _sampler(tasks, curriculum="linear", curriculum_iterations=over)
    for iteration in range(1, over + 3):
        opened = min(levels, -(-levels * iteration // over))
        assert {task.level for task in sampler.draw(iteration, opened)} == set(range(1, opened + 1))


def test_off_opens_all_levels_at_once():
    tasks = [_task(str(level), level) for level in range(1, 6)]
    assert len(_sampler(tasks).draw(1, 5)) == 5


def test_harder_levels_open_early_where_the_easy_ones_do_not_fill_the_batch():
    tasks = [_task(f"{level}-{i}", level) for level in (1, 2, 3, 4) for i in range(5)]
    sampler = _sampler(tasks, curriculum="linear", curriculum_iterations=100)
    assert {task.level for task in sampler.draw(1, 5)} == {1}
    assert {task.level for task in sampler.draw(1, 10)} == {1, 2}
    assert max(task.level for task in sampler.draw(1, 11)) <= 3
    assert len(sampler.draw(1, 20)) == 20


# --- resume ----------------------------------------------------------------------------------------------------------


def _ids(tasks):
    return [task.id for task in tasks]


def test_draws_are_a_function_of_seed_iteration_and_rates():
    tasks = [_task(str(i)) for i in range(200)]
    one, same, other = _sampler(tasks, 3), _sampler(tasks, 3), _sampler(tasks, 4)
    for sampler in (one, other):
        sampler.draw(1, 10)  # what was drawn before does not matter
    assert _ids(one.draw(7, 10)) == _ids(same.draw(7, 10))
    assert _ids(one.draw(7, 10)) != _ids(one.draw(8, 10))
    assert _ids(one.draw(7, 10)) != _ids(other.draw(7, 10))


def test_through_json_and_back_the_next_draws_are_the_same():
    tasks = [_task(str(i), level=i % 3) for i in range(60)]
    run = _sampler(tasks, 5, decay=0.7)
    for iteration in range(1, 6):
        run.update([_group(task, hash_ % 9, 8 - hash_ % 9) for hash_, task in enumerate(run.draw(iteration, 20))])
    resumed = _sampler(tasks, 5, decay=0.7)
    resumed.load_state_dict(json.loads(json.dumps(run.state_dict())))
    assert [resumed.success_rate(task) for task in tasks] == [run.success_rate(task) for task in tasks]
    assert len({run.success_rate(task) for task in tasks}) > 20
    for sampler in (run, resumed):
        sampler.update([_group(tasks[0], 3, 5), _group(tasks[1], 8, 0)])
    assert _ids(resumed.draw(6, 30)) == _ids(run.draw(6, 30))
    assert not math.isclose(resumed.success_rate(tasks[0]), resumed.success_rate(tasks[1]))
