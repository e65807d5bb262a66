"""Counted operations against torch's own counter on the real forward and backward pass."""

from __future__ import annotations

import pytest
import torch
from tiny_policy import build
from torch.utils.flop_counter import FlopCounterMode

from learner.mixed import alone, mixed
from rlvlm.learner.flops import Flops
from rlvlm.learner.logprobs import RowLogProbs
from rlvlm.policy.family import family_of
from rlvlm.policy.prompts import PromptEncoder
from rlvlm.records import Row
from rlvlm.tasks.images import ImageStore


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    model, processor = build()
    # torch counts matrix products, which eager experts are made of.
    model.model.language_model.set_experts_implementation("eager")
    model.set_attn_implementation("eager")
    store = ImageStore(tmp_path_factory.mktemp("images"))
    encoder = PromptEncoder(processor, store, model.config)
    return model, encoder, alone(mixed(encoder, store, seed=1), encoder)


def _row(encoder, one) -> Row:
    """A row of one sequence, of which the response is trained on."""
    ids = torch.tensor(one.prompt.input_ids + one.response)
    trained_T = torch.arange(len(ids)) >= len(one.prompt.input_ids)
    return Row(
        input_ids_T=ids,
        segment_T=torch.zeros_like(ids),
        position_ids=torch.arange(len(ids))[None],
        trained_T=trained_T,
        advantage_S=torch.ones(1),
        group_size_S=torch.ones(1, dtype=torch.long),
        engine_logp_T=torch.zeros(len(ids)),
        images=one.prompt.images,
    )


def _counted(model, row, backward: bool) -> float:
    module = RowLogProbs(model, 1.0, (), chunk=10_000)
    with FlopCounterMode(display=False) as counter:
        logp_N, _ = module(row)
        if backward:
            logp_N.sum().backward()
    return counter.get_total_flops()


def _causal_attention(model, one) -> float:
    """torch does not count attention on a CPU: a query of 32 numbers with a key, a weight with a value of 32 numbers,
    a multiplication and an addition each, for 4 heads in 2 layers and every pair that the causal mask leaves."""
    pairs = sum(range(1, one.length + 1))
    return 2 * 4 * pairs * (2 * 32 + 2 * 32)


@pytest.mark.parametrize("which", [0, 3, 7])  # text only, one picture, two pictures
def test_a_forward_pass(setting, which):
    model, encoder, sequences = setting
    one = sequences[which]
    flops = Flops(model, family_of(model.config, "tiny"))
    with torch.no_grad():
        counted = _counted(model, _row(encoder, one), backward=False)
    ours = flops.forward(_row(encoder, one)).total
    assert ours == pytest.approx(counted + _causal_attention(model, one), rel=0.01)


def test_a_backward_pass_is_two_forward_passes_more_and_frozen_parts_cost_less(setting):
    model, encoder, sequences = setting
    row = _row(encoder, sequences[7])
    family = family_of(model.config, "tiny")
    forward = Flops(model, family).forward(row)
    trained = Flops(model, family).training(row)
    assert trained.total == 3 * forward.total
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(family.group_of(name) == "projector")
    try:
        passes = Flops(model, family).training(row)
        assert (passes.vision, passes.projector, passes.language) == (
            forward.vision,  # no gradient comes down to it
            3 * forward.projector,
            2 * forward.language,  # it passes gradients on to the projector
        )
    finally:
        model.requires_grad_(True)


def test_a_packed_row_costs_the_sum_of_its_sequences(setting):
    model, encoder, sequences = setting
    flops = Flops(model, family_of(model.config, "tiny"))
    rows = [_row(encoder, one) for one in sequences[:2]]
    both = Row(
        input_ids_T=torch.cat([row.input_ids_T for row in rows]),
        segment_T=torch.cat([row.segment_T + i for i, row in enumerate(rows)]),
        position_ids=torch.cat([row.position_ids for row in rows], 1),
        trained_T=torch.cat([row.trained_T for row in rows]),
        advantage_S=torch.ones(2),
        group_size_S=torch.ones(2, dtype=torch.long),
        engine_logp_T=torch.cat([row.engine_logp_T for row in rows]),
        images={},
    )
    assert flops.forward(both).total == pytest.approx(sum(flops.forward(row).total for row in rows))
