"""Rows without padding: nothing is lost, nothing is added, and a sequence in a row is the sequence on its own."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from policy.families import blip2, glm4v_moe, instructblip, llava, qwen2_5_omni, qwen2_5_vl, qwen2_vl, qwen3_vl_moe
from tiny_policy import TEXTS, build, group, picture, task

from learner.mixed import (
    ONE,
    TEXT,
    TWO,
    WORDS,
    alone,
    by_advantage,
    logits_alone,
    logp_alone,
    mixed,
    packed_rows,
    packing_recipe,
    reward,
)
from rlvlm.learner.attention import packed
from rlvlm.learner.logprobs import RowLogProbs
from rlvlm.learner.packing import SequenceCost, balance, pack
from rlvlm.policy.checkpoint import load_policy
from rlvlm.policy.family import Family
from rlvlm.policy.prompts import Prompt, PromptEncoder
from rlvlm.records import Group, Segment, StopReason, Task, Trajectory
from rlvlm.tasks.images import ImageStore


def _kimi(folder):
    """One position a token, a mixture of experts."""
    return build(spread=0.25)


def _qwen2_vl(folder):
    """Four rows of positions, no experts."""
    return _built(qwen2_vl, folder)


def _built(family, folder):
    family.build(folder, 3, (*TEXTS, *(f"w{i}" for i in range(80))))
    model, processor = load_policy(str(folder), "float32")
    assert len(processor.tokenizer) > WORDS.stop
    return model.eval(), processor


@pytest.fixture(scope="module", params=[_kimi, _qwen2_vl], ids=["kimi", "qwen2_vl"])
def policy(request, tmp_path_factory):
    model, processor = request.param(tmp_path_factory.mktemp("policy"))
    return SimpleNamespace(model=model, processor=processor, rows=RowLogProbs(model, 1.0, (), 64))


@pytest.fixture
def store(tmp_path):
    return ImageStore(tmp_path)


@pytest.fixture
def encoder(policy, store):
    return PromptEncoder(policy.processor, store, policy.model.config)


def _gradients(model, loss) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def _assert_same_gradients(found, expected):
    """Parameters that nothing reached have none, or zeros."""
    for name in found.keys() | expected.keys():
        one, other = found.get(name), expected.get(name)
        if one is None or other is None:
            assert float((other if one is None else one).abs().max()) == 0, name
            continue
        scale = max(1.0, float(other.abs().max()))
        torch.testing.assert_close(one, other, atol=1e-5 * scale, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


# --- packed = separate -----------------------------------------------------------------------------------------------

_KINDS = {
    "text only": (TEXT, TEXT),
    "one picture": (ONE, ONE),
    "many pictures": (TWO, ONE, TWO),
    "mixed": (TEXT, ONE, TWO),
}


@pytest.mark.parametrize("kinds", _KINDS.values(), ids=_KINDS.keys())
def test_log_probs_and_gradients_in_a_row_are_those_of_the_sequences_alone(policy, store, encoder, kinds):
    expected = _assert_packed_is_separate(policy, mixed(encoder, store, seed=1, kinds=kinds), encoder)
    seen = [float(g.abs().max()) for name, g in expected.items() if encoder.family.group_of(name) == "vision"]
    assert (set(kinds) == {TEXT} and not any(seen)) or max(seen) > 1e-3


@pytest.mark.parametrize(
    ("family", "kinds"),
    [
        *((one, (TEXT, ONE, TWO)) for one in (glm4v_moe, llava, qwen2_5_omni, qwen2_5_vl, qwen3_vl_moe)),
        *((one, (TEXT, ONE)) for one in (blip2, instructblip)),  # no more than a picture
    ],
    ids=lambda value: getattr(value, "__name__", "").split(".")[-1] or str(len(value)),
)
def test_so_they_are_in_every_other_family(family, kinds, store, tmp_path):
    model, processor = _built(family, tmp_path / "hf")
    encoder = PromptEncoder(processor, store, model.config)
    policy = SimpleNamespace(model=model, rows=RowLogProbs(model, 1.0, (), 64))
    _assert_packed_is_separate(policy, mixed(encoder, store, seed=1, kinds=kinds), encoder)


def _assert_packed_is_separate(policy, rewarded, encoder) -> dict[str, torch.Tensor]:
    """Log-probs, and the gradient of their sum, each response with a weight of its own, for every parameter. Gives the
    gradient."""
    rows = packed_rows(rewarded, encoder, row_tokens=150)
    assert max(row.advantage_S.numel() for row in rows) >= 3
    logp = {}
    for row in rows:
        logp |= by_advantage(row, policy.rows(row)[0])
    one_by_one = {one.advantage: logp_alone(policy.model, one) for one in alone(rewarded, encoder)}
    assert logp.keys() == one_by_one.keys()
    for advantage, expected in one_by_one.items():
        torch.testing.assert_close(logp[advantage], expected, atol=2e-5, rtol=0)
    found = _gradients(policy.model, sum(a * logp_T.sum() for a, logp_T in logp.items()))
    expected = _gradients(policy.model, sum(a * logp_T.sum() for a, logp_T in one_by_one.items()))
    assert len(expected) > 20
    _assert_same_gradients(found, expected)
    return expected


@torch.no_grad()
def test_logits_in_a_row_are_those_of_the_sequence_alone(policy, store, encoder):
    rewarded = mixed(encoder, store, seed=2, per_kind=2)
    (row,) = packed_rows(rewarded, encoder)
    with packed(row.segment_T):
        hidden_TH = encoder.family.hidden(policy.model, row)
    logits_NV = encoder.family.head(policy.model)(hidden_TH[row.trained_T.roll(-1)])
    found = by_advantage(row, logits_NV)
    for one in alone(rewarded, encoder):
        torch.testing.assert_close(found[one.advantage], logits_alone(policy.model, one), atol=3e-5, rtol=0)


@pytest.mark.parametrize("change", ["prompt", "picture", "response"])
def test_a_sequence_never_moves_its_neighbours_in_the_row(policy, store, encoder, change):
    """To the bit where there are no experts. Where there are, a matrix product takes all tokens of an expert at once,
    and how many those are is the changed sequence's matter too: rounding, 1e-6 of log-probs of about 6."""

    def rewarded_with(question, seed, response):
        changed = task(f"a{question}{seed}", store, question, picture(seed, 32, 16))
        fixed = [task("b", store, "sum of digits ?", picture(7, 16, 16)), task("c", store, "what is left ?")]
        groups = [group(changed, encoder, response), *(group(t, encoder, (300, 301, 302)) for t in fixed)]
        return reward(groups, iter([0.5, 1.5, 2.5]))

    changes = {"prompt": ("what of digits ?", 1, (310,) * 5), "picture": ("sum of digits ?", 2, (310,) * 5)}
    other = changes.get(change, ("sum of digits ?", 1, (311, 312, 313, 314, 310)))
    found = []
    for arguments in (("sum of digits ?", 1, (310,) * 5), other):
        (row,) = packed_rows(rewarded_with(*arguments), encoder)
        assert float(row.advantage_S[0]) == 0.5  # the changed one comes first: causality alone would not keep it out
        with torch.no_grad():
            found.append(by_advantage(row, policy.rows(row)[0]))
    before, after = found
    assert float((before[0.5] - after[0.5]).abs().max()) > 1e-2
    for neighbour in (1.5, 2.5):
        atol = 2e-6 if encoder.family.router else 0.0
        torch.testing.assert_close(after[neighbour], before[neighbour], atol=atol, rtol=0)


# --- ranks without pictures, ranks without work ----------------------------------------------------------------------


def test_a_rank_without_pictures_has_a_blank_one_after_its_text_that_moves_nothing(policy, store, encoder):
    rewarded = mixed(encoder, store, seed=3, kinds=(TEXT, ONE))
    (minibatch,) = pack(rewarded, encoder, packing_recipe(ranks=5, row_tokens=1), seed=0).minibatches
    rows = [row for rank in minibatch.rows for row in rank]
    assert [len(rank) for rank in minibatch.rows] == [1] * 5
    dummies = [row for row in rows if int(row.segment_T.max()) == row.advantage_S.numel()]
    assert len(dummies) == 2 and all(row.images for row in rows)
    for row in dummies:
        assert row.trained_T[row.segment_T == 1].tolist() == [False] * len(encoder.blank().input_ids)
    logp = {}
    for row in rows:
        logp |= by_advantage(row, policy.rows(row)[0])
    one_by_one = {one.advantage: logp_alone(policy.model, one) for one in alone(rewarded, encoder)}
    assert logp.keys() == one_by_one.keys()
    for advantage, expected in one_by_one.items():
        torch.testing.assert_close(logp[advantage], expected, atol=2e-5, rtol=0)
    found = _gradients(policy.model, sum(a * logp_T.sum() for a, logp_T in logp.items()))
    expected = _gradients(policy.model, sum(a * logp_T.sum() for a, logp_T in one_by_one.items()))
    _assert_same_gradients(found, expected)
    # The tower takes part in backward where the row's own text has nothing for it: its collectives are met.
    vision = _gradients(policy.model, policy.rows(dummies[0])[0].sum())
    assert any(encoder.family.group_of(name) == "vision" for name in vision)


@pytest.mark.parametrize(
    ("learner", "kinds", "everywhere"),
    [
        ({}, (TEXT, ONE), False),
        ({"zero_stage": 2}, (TEXT, ONE), False),
        ({"ranks": 2}, (TEXT, TEXT), False),
        ({"ranks": 2}, (TEXT, ONE), True),
        ({"zero_stage": 3}, (TEXT, TEXT), True),
        ({"offload": "optimizer"}, (TEXT, TEXT), True),
    ],
)
def test_every_row_has_pictures_where_a_pass_without_would_leave_a_gradient_wrong(
    policy, store, encoder, learner, kinds, everywhere
):
    rewarded = mixed(encoder, store, seed=6, kinds=kinds)
    (minibatch,) = pack(rewarded, encoder, packing_recipe(row_tokens=1, **learner), seed=0).minibatches
    rows = [row for rank in minibatch.rows for row in rank]
    own = 3 if ONE in kinds else 0
    assert sum(bool(row.images) for row in rows) == (len(rows) if everywhere else own)


@pytest.mark.parametrize("kinds", [(TEXT,), (ONE,)], ids=["text only", "one picture"])
def test_a_rank_without_work_goes_through_the_model_and_adds_nothing(policy, store, encoder, kinds):
    rewarded = mixed(encoder, store, seed=4, kinds=kinds)  # two responses
    (minibatch,) = pack(rewarded, encoder, packing_recipe(ranks=3), seed=0).minibatches
    (idle,) = (row for (row,) in minibatch.rows if row.advantage_S.numel() == 0)
    assert bool(idle.images) == (kinds == (ONE,))
    assert not idle.trained_T.any()
    logp_N, entropy_N = policy.rows(idle)
    assert logp_N.shape == entropy_N.shape == (0,)
    gradients = _gradients(policy.model, logp_N.sum())
    assert all(float(gradient.abs().max()) == 0 for gradient in gradients.values())
    reached = {encoder.family.group_of(name) for name in gradients}
    assert {"language", "vision"} <= reached if kinds == (ONE,) else "language" in reached
    assert minibatch.sequences == 2 and minibatch.prompts == 1


# --- what goes into which row ----------------------------------------------------------------------------------------


class _Encoder:
    """Prompts of known lengths, without pictures."""

    family = Family()
    config = build()[0].config

    def __init__(self, lengths: dict[str, int]) -> None:
        self._lengths = lengths

    def prompt(self, of: Task) -> Prompt:
        return self._of(self._lengths[of.id])

    def blank(self) -> Prompt:
        return self._of(9)

    def _of(self, length: int) -> Prompt:
        return Prompt((5,) * length, (5,) * length, torch.arange(length)[None], {})


def _plain_group(name: str, prompt_length: int, lengths: list[int], routed: bool = False) -> Group:
    """Token ids of response j: a running number, so that every token of the batch can be told apart. Its experts, if
    routed: the token's position, in 2 layers of 3."""
    of = Task(name, (), (), "7", "exact", 1, "s")
    trajectories = []
    for j, length in enumerate(lengths):
        ids = tuple(10_000 * int(name) + 100 * j + i for i in range(1, length + 1))
        segment = Segment(ids, tuple(-i / 1e4 for i in ids), True, 0)
        read = np.arange(prompt_length + length - 1, dtype=np.int16)
        routing = np.broadcast_to(read[:, None, None], (len(read), 2, 3)).copy() if routed else None
        one = Trajectory(name, j, (5,) * prompt_length, (segment,), StopReason.END, "", routing)
        trajectories.append(one)
    return Group(of, tuple(trajectories))


_GROUP = st.tuples(st.integers(1, 40), st.lists(st.tuples(st.integers(1, 60), st.booleans()), min_size=1, max_size=5))


@settings(max_examples=60)
@given(
    st.lists(_GROUP, min_size=1, max_size=8), st.integers(1, 4), st.integers(20, 150), st.integers(1, 4), st.booleans()
)
def test_every_scored_response_is_in_exactly_one_row_and_nothing_else_is(drawn, minibatches, row_tokens, ranks, routed):
    groups = [
        _plain_group(str(g), prompt, [n for n, _ in responses], routed) for g, (prompt, responses) in enumerate(drawn)
    ]
    failed = tuple((g, j) for g, (_, responses) in enumerate(drawn) for j, (_, ok) in enumerate(responses) if not ok)
    rewarded = reward(groups, iter(float(i) for i in range(99)), failed)
    lengths = {str(g): prompt for g, (prompt, _) in enumerate(drawn)}
    batch = pack(rewarded, _Encoder(lengths), packing_recipe(minibatches, row_tokens, ranks), seed=ranks)

    expected = {
        t.response_ids: (int(one.group.task.id), a, sum(x is not None for x in one.advantage_K))
        for one in rewarded
        for t, a in zip(one.group.trajectories, one.advantage_K, strict=True)
        if a is not None
    }
    seen, minibatch_of = [], {}
    for m, minibatch in enumerate(batch.minibatches):
        assert len(minibatch.rows) == ranks and len({len(rows) for rows in minibatch.rows}) == 1
        here = 0
        for row in (row for rows in minibatch.rows for row in rows):
            sequences = row.advantage_S.numel()
            here += sequences
            if not sequences:
                assert row.input_ids_T.tolist() == [5] and not row.trained_T.any()
                continue
            assert row.input_ids_T.numel() <= row_tokens or sequences == 1
            assert row.segment_T.unique_consecutive().tolist() == list(range(sequences))
            for s in range(sequences):
                of_s = row.segment_T == s
                ids, trained = row.input_ids_T[of_s], row.trained_T[of_s]
                response = tuple(ids[trained].tolist())
                g, advantage, size = expected[response]
                assert ids.tolist() == [5] * lengths[str(g)] + list(response)
                assert trained.tolist() == [False] * lengths[str(g)] + [True] * len(response)
                assert row.position_ids[0, of_s].tolist() == list(range(ids.numel()))
                assert (float(row.advantage_S[s]), int(row.group_size_S[s])) == (advantage, size)
                torch.testing.assert_close(row.engine_logp_T[of_s], torch.where(trained, -ids / 1e4, 0.0))
                if routed:
                    assert row.routing_TLK[of_s][:, 1, 2].tolist() == [*range(ids.numel() - 1), -1]
                else:
                    assert row.routing_TLK is None
                assert minibatch_of.setdefault(g, m) == m  # the samples of a prompt stay together
                seen.append(response)
        assert minibatch.sequences == here
        idle = sum(row.advantage_S.numel() == 0 for rows in minibatch.rows for row in rows)
        assert idle == max(0, ranks * len(minibatch.rows[0]) - here)
    assert sorted(seen) == sorted(expected)
    scored = {g for g, _, _ in expected.values()}
    assert len(scored) <= sum(minibatch.prompts for minibatch in batch.minibatches) <= len(groups)
    assert batch.share(ranks - 1).minibatches == tuple(
        dataclasses.replace(minibatch, rows=(minibatch.rows[ranks - 1],)) for minibatch in batch.minibatches
    )


def _one_each(lengths: list[int], ranks: int, row_tokens: int):
    """Rows by rank of a batch of single responses, prompts of 4."""
    groups = [_plain_group(str(g), 4, [n]) for g, n in enumerate(lengths)]
    rewarded = reward(groups, iter(float(g) for g in range(len(groups))))
    encoder = _Encoder({str(g): 4 for g in range(len(groups))})
    batch = pack(rewarded, encoder, packing_recipe(1, row_tokens, ranks), seed=0)
    return batch, batch.minibatches[0].rows


def _costs(row, cost: SequenceCost) -> list[float]:
    lengths = [int((row.segment_T == s).sum()) for s in range(row.advantage_S.numel())]
    return [cost.token * n + cost.pair * n * n for n in lengths]


_LENGTHS = st.lists(st.one_of(st.integers(1, 60), st.integers(60, 500)), min_size=1, max_size=60)


@settings(max_examples=60)
@given(_LENGTHS, st.integers(1, 8))
def test_rows_cost_about_the_same(lengths, ranks):
    """One row a rank: the dearest keeps the bound of any list scheduling, (sum - last) / m + last, where `last` is the
    sequence that came to it last (Graham 1966)."""
    _, rows = _one_each(lengths, ranks, row_tokens=100_000)
    cost = SequenceCost.of(_Encoder.config)
    costs = [_costs(row, cost) for (row,) in rows]
    dearest = max(costs, key=sum)
    assert sum(dearest) <= (sum(map(sum, costs)) - min(dearest)) / ranks + min(dearest) + 1e-6 * sum(dearest)


@settings(max_examples=60)
@given(_LENGTHS, st.integers(1, 4), st.integers(64, 300))
def test_no_more_than_twice_the_rows_that_there_have_to_be(lengths, ranks, row_tokens):
    """Had there been a turn less, all rows of it would be more than half full."""
    _, rows = _one_each(lengths, ranks, row_tokens)
    tokens = [n + 4 for n in lengths]
    long = sum(n > row_tokens for n in tokens)
    fewest = long + 2 * sum(n for n in tokens if n <= row_tokens) / row_tokens
    assert len(rows[0]) - 1 <= fewest / ranks


def test_a_long_tail_leaves_no_rank_waiting():
    """512 responses, log-normal, and no token computed for nothing."""
    g = torch.Generator().manual_seed(0)
    lengths = torch.empty(512).log_normal_(4.0, 0.8, generator=g).clamp(2, 900).int().tolist()
    batch, rows = _one_each(lengths, ranks=4, row_tokens=1024)
    assert sum(row.input_ids_T.numel() for rank in rows for row in rank) == sum(lengths) + 4 * 512
    assert 0.95 <= balance(batch, _Encoder({})) <= 1


def test_balance_by_hand():
    """Sequences of 10 and 30 tokens on 3 ranks, where the third idles with a token of its own."""
    batch, _ = _one_each([6, 26], ranks=3, row_tokens=100)
    cost = SequenceCost.of(_Encoder.config)
    of = {n: n * cost.token + n * n * cost.pair for n in (1, 10, 30)}
    assert balance(batch, _Encoder({})) == pytest.approx(sum(of.values()) / (3 * of[30]))


def test_the_cost_of_a_sequence_by_hand():
    """The tiny Kimi's layers, matrix by matrix: attention is taken for four of hidden x hidden."""
    config = _Encoder.config
    text, vision = config.text_config, config.vision_config
    hidden, width = text.hidden_size, text.moe_intermediate_size * (text.num_experts_per_tok + 1)
    token = 2 * (4 * hidden * hidden + 3 * hidden * width) + hidden * text.vocab_size
    cost = SequenceCost.of(config)
    assert cost([7, 2], []) == 9 * token + (49 + 4) * 2 * 4 * 32
    h, f = vision.hidden_size, vision.intermediate_size
    assert cost([], [5]) == 5 * (4 * h * h + 2 * h * f) + 25 * 2 * h


def test_pictures_weigh_as_their_patches(policy, store, encoder):
    """Of two prompts of one length the one with the picture costs more, by its 2 x 4 patches."""
    cost = SequenceCost.of(policy.model.config)
    rewarded = mixed(encoder, store, seed=5, kinds=(ONE,))
    batch = pack(rewarded, encoder, packing_recipe(ranks=2), seed=0)
    rows = [row for (row,) in batch.minibatches[0].rows]
    costs = [cost([row.input_ids_T.numel()], [2 * 4]) for row in rows]
    assert balance(batch, encoder) == pytest.approx(sum(costs) / (2 * max(costs)))


def test_the_deal_into_minibatches_is_the_seeds():
    groups = [_plain_group(str(g), 3, [4]) for g in range(12)]
    rewarded = reward(groups, iter(float(i) for i in range(12)))

    def deal(seed):
        batch = pack(rewarded, _Encoder({str(g): 3 for g in range(12)}), packing_recipe(3, 100), seed)
        return [sorted(a for row in part.rows[0] for a in row.advantage_S.tolist()) for part in batch.minibatches]

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
    (row,) = packed_rows(reward([one], iter([1.0])), _Encoder({"0": 2}))
    assert row.input_ids_T.tolist() == [5, 5, *ids]
    assert row.trained_T.tolist() == [False, False, True, True, False, False, False, True]


def test_a_minibatch_in_which_nothing_was_scored_is_not_there():
    groups = [_plain_group(str(g), 3, [4, 4]) for g in range(2)]
    rewarded = reward(groups, iter([1.0, 2.0]), failed=((0, 0), (0, 1)))
    (minibatch,) = pack(rewarded, _Encoder({"0": 3, "1": 3}), packing_recipe(2, 100), seed=0).minibatches
    assert (minibatch.prompts, minibatch.sequences) == (1, 2)


def test_experts_that_were_recorded_for_some_are_free_for_the_others():
    groups = [_plain_group("0", 2, [3], routed=True), _plain_group("1", 2, [2])]
    (row,) = packed_rows(reward(groups, iter([1.0, 2.0])), _Encoder({"0": 2, "1": 2}))
    assert row.routing_TLK.dtype == torch.int16
    assert row.routing_TLK[:, 0, 0].tolist() == [0, 1, 2, 3, -1, -1, -1, -1, -1]
