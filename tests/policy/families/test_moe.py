"""Qwen3-VL and GLM-4.5V, with experts. What M-RoPE asks of a family holds here too: the tests imported below run over
these two."""

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import silu
from transformers import AutoConfig

from policy.families import glm4v_moe, kimi_k25, qwen3_vl_moe
from policy.families.test_mrope import (  # noqa: F401
    Policy,
    test_a_picture_counts_as_many_positions_as_its_longer_side,
    test_a_sequence_never_moves_its_neighbours,
    test_gradients_through_a_row_are_those_of_the_sequences_alone,
    test_logits_in_a_row_are_those_of_the_sequence_alone,
    test_text_has_the_same_positions_in_all_four_rows,
    test_the_marks_of_pictures_are_those_of_the_processor,
)
from rlvlm.learner.replay import routers_of
from rlvlm.policy.checkpoint import load_policy, save_weights
from rlvlm.policy.family import families, family_of
from rlvlm.recipe.errors import RecipeError

BUILDERS = {"qwen3_vl_moe": qwen3_vl_moe, "glm4v_moe": glm4v_moe}


@pytest.fixture(scope="module", params=list(BUILDERS))
def policy(request, tmp_path_factory) -> Policy:
    return Policy(BUILDERS[request.param], tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def qwen(tmp_path_factory) -> Policy:
    return Policy(qwen3_vl_moe, tmp_path_factory.mktemp("qwen"))


def test_published_experts_of_qwen_multiply_from_the_right(qwen):
    """The published layout is [E, in, out]: x W, where transformers in memory has W x."""
    written = load_file(qwen.folder / "model.safetensors")
    experts = qwen.model.model.language_model.layers[1].mlp.experts
    tokens_TH = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    for expert in range(4):
        gate_up = written["model.language_model.layers.1.mlp.experts.gate_up_proj"][expert]
        down = written["model.language_model.layers.1.mlp.experts.down_proj"][expert]
        assert gate_up.shape == (64, 2 * 48) and down.shape == (48, 64)
        gate, up = (tokens_TH @ gate_up).chunk(2, dim=-1)
        expected = (silu(gate) * up) @ down
        with torch.no_grad():
            found = experts(tokens_TH, torch.full((5, 1), expert), torch.ones(5, 1))
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_square_experts_of_qwen_are_refused(tmp_path):
    """hidden 64, experts of 32: gate_up_proj is 64 x 64, and nothing tells which way round a file has it."""
    qwen3_vl_moe.build(tmp_path, seed=0)
    config = AutoConfig.from_pretrained(tmp_path)
    config.text_config.moe_intermediate_size = 32
    config.save_pretrained(tmp_path)
    with pytest.raises(RecipeError, match="square"):
        load_policy(str(tmp_path), "float32")


PUBLISHED = {
    "qwen3_vl_moe": {
        "lm_head.weight",
        "model.language_model.layers.1.mlp.gate.weight",
        "model.visual.deepstack_merger_list.0.linear_fc1.weight",
    },
    "glm4v_moe": {
        "lm_head.weight",
        "model.language_model.layers.1.mlp.gate.e_score_correction_bias",
        "model.language_model.layers.1.mlp.experts.3.gate_proj.weight",
        "model.language_model.layers.1.mlp.shared_experts.up_proj.weight",
        "model.visual.downsample.weight",
    },
}


def test_weights_have_the_names_of_published_checkpoints_and_come_back(policy, tmp_path):
    written = load_file(policy.folder / "model.safetensors")
    assert PUBLISHED[policy.model.config.model_type] <= written.keys()
    save_weights(policy.model, policy.model.state_dict(), tmp_path / "push.safetensors")
    pushed = load_file(tmp_path / "push.safetensors")
    assert pushed.keys() == written.keys()
    assert all(torch.equal(pushed[name], tensor) for name, tensor in written.items())
    # `spread` left no matrix as a fresh model has it, so what was not found in the file would show
    assert all(0.05 < float(p.detach().std()) < 0.2 for _, p in policy.model.named_parameters() if p.dim() > 1)


def test_selection_biases_come_back(policy):
    for router in routers_of(policy.model, policy.family):
        if policy.family.router.balance == "bias":
            assert 0.03 < float(router.e_score_correction_bias.std()) < 0.5


def test_every_layer_with_experts_has_a_router_that_is_found(policy):
    with_experts = {"qwen3_vl_moe": 2, "glm4v_moe": 1}[policy.model.config.model_type]
    assert len(routers_of(policy.model, policy.family)) == with_experts


@pytest.mark.parametrize("builder", [kimi_k25, qwen3_vl_moe, glm4v_moe])
def test_weights_of_a_choice_are_the_routers_own(builder, tmp_path):
    """For the choice that the router itself makes, and the gradient through them is the same."""
    builder.build(tmp_path, seed=5)
    model, _ = load_policy(str(tmp_path), "float32")
    family = family_of(model.config, "tiny")
    (router, *_) = routers_of(model, family)
    tokens_TH = torch.randn(7, 64, generator=torch.Generator().manual_seed(1))
    up_TK = torch.randn(7, 2, generator=torch.Generator().manual_seed(2))
    gradients = []
    for of in (lambda out: out[1], lambda out: family.router.weights(router, out[0], out[2])):
        router.zero_grad()
        weights_TK = of(router(tokens_TH))
        (weights_TK * up_TK).sum().backward()
        gradients.append((weights_TK.detach(), router.weight.grad.clone()))
    (own, own_gradient), (ours, our_gradient) = gradients
    torch.testing.assert_close(ours, own, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(our_gradient, own_gradient, atol=1e-6, rtol=1e-4)
    assert float(own_gradient.abs().max()) > 1e-3


def test_parameters_are_in_the_groups_that_their_modules_say(policy):
    groups: dict[str, set[str]] = {}
    for name, _ in policy.model.named_parameters():
        groups.setdefault(policy.family.group_of(name), set()).add(name)
    assert groups.keys() == {"vision", "projector", "router", "language"}
    mergers = ("model.visual.merger.", "model.visual.deepstack_merger_list.", "model.visual.downsample.")
    assert all(name.startswith(mergers) for name in groups["projector"])
    assert all(name.startswith("model.visual.") for name in groups["vision"])
    assert not any(name.startswith(mergers) for name in groups["vision"])
    routers = routers_of(policy.model, policy.family)
    assert len(groups["router"]) == len(routers)
    assert all(name.endswith(".mlp.gate.weight") for name in groups["router"])
    assert not any("visual" in name for name in groups["language"])


def test_no_mark_of_a_picture_can_be_sampled(policy):
    banned = policy.processor.tokenizer.convert_ids_to_tokens(policy.family.placeholder_ids(policy.model.config))
    marks = BUILDERS[policy.model.config.model_type].MARKS
    assert set(banned) == set(marks.values())


def test_every_family_has_all_that_docs_and_messages_name():
    for family in families().values():
        assert family.name and set(family.groups) <= {"vision", "projector", "router"}
        assert ("router" in family.groups) == (family.router is not None)
