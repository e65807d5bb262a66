"""Rows without padding: nothing is lost, nothing is added, and a sequence in a row is the sequence on its own."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_policy import build, group, picture, task

from learner.mixed import alone, by_advantage, logp_alone, mixed, reward
from rlvlm.learner.logprobs import RowLogProbs
from rlvlm.learner.packing import pack
from rlvlm.policy.prompts import Prompt, PromptEncoder
from rlvlm.records import Group, Segment, StopReason, Task, Trajectory
from rlvlm.tasks.images import ImageStore


@pytest.fixture(scope="module")
def policy():
    return build(spread=0.25)


@pytest.fixture
def store(tmp_path):
    return ImageStore(tmp_path)


@pytest.fixture
def encoder(policy, store):
    return PromptEncoder(policy[1], store)


def _module(policy):
    return RowLogProbs(policy[0], 1.0, (), 64)


# --- packed = separate -----------------------------------------------------------------------------------------------


def test_log_probs_in_a_row_are_those_of_the_sequence_alone(policy, store, encoder):
    rewarded = mixed(encoder, store, seed=1, per_kind=2)
    (rows,) = pack(rewarded, encoder.prompt, minibatches=1, row_tokens=120, seed=0).minibatches
    assert 2 < len(rows) < 8 and max(row.advantage_S.numel() for row in rows) >= 3
    assert max(len(row.images.get("image_grid_thw", ())) for row in rows) >= 3  # pictures of several tasks
    with torch.no_grad():
        packed = {}
        for row in rows:
            packed |= by_advantage(row, _module(policy)(row)[0])
        for one in alone(rewarded, encoder):
            torch.testing.assert_close(packed[one.advantage], logp_alone(policy[0], one), atol=1e-5, rtol=0)


def test_gradients_through_rows_are_those_of_the_sequences_alone(policy, store, encoder):
    """Of a sum of log-probs, each response with a weight of its own, for every parameter."""
    model = policy[0]
    rewarded = mixed(encoder, store, seed=2)
    (rows,) = pack(rewarded, encoder.prompt, minibatches=1, row_tokens=100, seed=0).minibatches
    model.zero_grad()
    for row in rows:
        for advantage, logp_T in by_advantage(row, _module(policy)(row)[0]).items():
            (advantage * logp_T.sum()).backward(retain_graph=True)
    packed = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    for one in alone(rewarded, encoder):
        (one.advantage * logp_alone(model, one).sum()).backward()
    assert packed.keys() == dict(model.named_parameters()).keys()
    for name, p in model.named_parameters():
        scale = max(1.0, float(p.grad.abs().max()))
        torch.testing.assert_close(packed[name], p.grad, atol=1e-5 * scale, rtol=0, msg=lambda m, n=name: f"{n}: {m}")
    assert float(packed["model.vision_tower.patch_embed.proj.weight"].abs().max()) > 1e-3
    model.zero_grad()


@pytest.mark.parametrize("change", ["prompt", "picture", "response"])
def test_a_sequence_never_moves_its_neighbours_in_the_row(policy, store, encoder, change):
    def rewarded_with(question, seed, response):
        changed = task(f"a{question}{seed}", store, question, picture(seed, 32, 16))
        fixed = [task("b", store, "sum of digits ?", picture(7, 16, 16)), task("c", store, "what is left ?")]
        groups = [group(changed, encoder, response), *(group(t, encoder, (300, 301, 302)) for t in fixed)]
        return reward(groups, iter([0.5, 1.5, 2.5]))

    changes = {"prompt": ("what is a1 ?", 1, (310,) * 5), "picture": ("sum of a1 ?", 2, (310,) * 5)}
    other = changes.get(change, ("sum of a1 ?", 1, (311, 312, 313, 314, 310)))
    found = []
    for arguments in (("sum of a1 ?", 1, (310,) * 5), other):
        (rows,) = pack(rewarded_with(*arguments), encoder.prompt, 1, 1000, 0).minibatches
        (row,) = rows
        assert float(row.advantage_S[0]) == 0.5  # the changed one comes first: causality alone would not keep it out
        with torch.no_grad():
            found.append(by_advantage(row, _module(policy)(row)[0]))
    before, after = found
    assert float((before[0.5] - after[0.5]).abs().max()) > 1e-2
    for neighbour in (1.5, 2.5):
        torch.testing.assert_close(after[neighbour], before[neighbour], atol=1e-5, rtol=0)


# --- what goes into which row ----------------------------------------------------------------------------------------


def _plain_group(name: str, prompt_length: int, lengths: list[int]) -> Group:
    """Token ids of response j: a running number, so that every token of the batch can be told apart."""
    of = Task(name, (), (), "7", "exact", 1, "s")
    trajectories = []
    for j, length in enumerate(lengths):
        ids = tuple(10_000 * int(name) + 100 * j + i for i in range(1, length + 1))
        segment = Segment(ids, tuple(-i / 1e4 for i in ids), True, 0)
        trajectories.append(Trajectory(name, j, (5,) * prompt_length, (segment,), StopReason.END, ""))
    return Group(of, tuple(trajectories))


def _prompt_of(lengths: dict[str, int]):
    return lambda of: Prompt((5,) * lengths[of.id], (5,) * lengths[of.id], {})


_GROUP = st.tuples(st.integers(1, 40), st.lists(st.tuples(st.integers(1, 60), st.booleans()), min_size=1, max_size=5))


@settings(max_examples=60, deadline=None)
@given(st.lists(_GROUP, min_size=1, max_size=8), st.integers(1, 4), st.integers(20, 150), st.integers(0, 99))
def test_every_scored_response_is_in_exactly_one_row_and_nothing_else_is(drawn, minibatches, row_tokens, seed):
    groups = [_plain_group(str(g), prompt, [n for n, _ in responses]) for g, (prompt, responses) in enumerate(drawn)]
    failed = tuple((g, j) for g, (_, responses) in enumerate(drawn) for j, (_, ok) in enumerate(responses) if not ok)
    rewarded = reward(groups, iter(float(i) for i in range(99)), failed)
    lengths = {str(g): prompt for g, (prompt, _) in enumerate(drawn)}
    batch = pack(rewarded, _prompt_of(lengths), minibatches, row_tokens, seed)

    expected = {
        t.response_ids: (int(one.group.task.id), a, sum(x is not None for x in one.advantage_K))
        for one in rewarded
        for t, a in zip(one.group.trajectories, one.advantage_K, strict=True)
        if a is not None
    }
    seen, minibatch_of = [], {}
    for m, rows in enumerate(batch.minibatches):
        for row in rows:
            sequences = row.advantage_S.numel()
            assert row.input_ids_T.numel() <= row_tokens or sequences == 1
            assert row.segment_T.unique_consecutive().tolist() == list(range(sequences))
            for s in range(sequences):
                here = row.segment_T == s
                ids, trained = row.input_ids_T[here], row.trained_T[here]
                response = tuple(ids[trained].tolist())
                g, advantage, size = expected[response]
                assert ids.tolist() == [5] * lengths[str(g)] + list(response)
                assert trained.tolist() == [False] * lengths[str(g)] + [True] * len(response)
                assert row.position_ids[0, here].tolist() == list(range(ids.numel()))
                assert (float(row.advantage_S[s]), int(row.group_size_S[s])) == (advantage, size)
                engine = row.engine_logp_T[here]
                torch.testing.assert_close(engine, torch.where(trained, -ids / 1e4, 0.0))
                assert minibatch_of.setdefault(g, m) == m  # the samples of a prompt stay together
                seen.append(response)
    assert sorted(seen) == sorted(expected)
    assert sum(batch.prompts) == len(groups)
    assert len(batch.prompts) == minibatches and max(batch.prompts) - min(batch.prompts) <= 1


def test_rows_are_filled_longest_first_into_the_first_that_fits():
    """Lengths 60, 50, 40, 30, 20 into rows of 100: 60+40, 50+30+20."""
    groups = [_plain_group(str(g), 10, [n - 10]) for g, n in enumerate((20, 50, 40, 60, 30))]
    rewarded = reward(groups, iter([2.0, 5.0, 4.0, 6.0, 3.0]))
    (rows,) = pack(rewarded, _prompt_of({str(g): 10 for g in range(5)}), 1, 100, 0).minibatches
    assert [row.advantage_S.tolist() for row in rows] == [[6.0, 4.0], [5.0, 3.0, 2.0]]


def test_the_deal_into_minibatches_is_the_seeds():
    groups = [_plain_group(str(g), 3, [4]) for g in range(12)]
    rewarded = reward(groups, iter(float(i) for i in range(12)))

    def deal(seed):
        batch = pack(rewarded, _prompt_of({str(g): 3 for g in range(12)}), 3, 100, seed)
        return [sorted(a for row in rows for a in row.advantage_S.tolist()) for rows in batch.minibatches]

    assert deal(1) == deal(1)
    assert deal(1) != deal(2)
    assert [len(part) for part in deal(1)] == [4, 4, 4]


def test_tokens_that_the_policy_did_not_choose_carry_no_loss():
    """A tool's answer in the middle of a response: in the row, not trained on."""
    one = _plain_group("0", 2, [6])
    ids = one.trajectories[0].response_ids
    segments = tuple(
        Segment(ids[a:b], (-0.5,) * (b - a), trained, 0)
        for a, b, trained in ((0, 2, True), (2, 5, False), (5, 6, True))
    )
    one = dataclasses.replace(one, trajectories=(dataclasses.replace(one.trajectories[0], segments=segments),))
    ((row,),) = pack(reward([one], iter([1.0])), _prompt_of({"0": 2}), 1, 100, 0).minibatches
    assert row.input_ids_T.tolist() == [5, 5, *ids]
    assert row.trained_T.tolist() == [False, False, True, True, False, False, False, True]


def test_a_minibatch_in_which_nothing_was_scored_has_no_rows_and_still_counts_its_prompts():
    groups = [_plain_group(str(g), 3, [4, 4]) for g in range(2)]
    rewarded = reward(groups, iter([1.0, 2.0]), failed=((0, 0), (0, 1)))
    batch = pack(rewarded, _prompt_of({"0": 3, "1": 3}), 2, 100, 0)
    assert sorted(len(rows) for rows in batch.minibatches) == [0, 1]
    assert batch.prompts == (1, 1)
