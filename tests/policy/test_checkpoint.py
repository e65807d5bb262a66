"""What is written is a plain Hugging Face checkpoint under published names, and reads back as the same policy."""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from tiny_policy import TINY, build, picture, task

from rlvlm.policy.checkpoint import checkpoint_names, load_policy, parameter_count, save_policy
from rlvlm.policy.prompts import PromptEncoder
from rlvlm.tasks.images import ImageStore

_ATTENTION = ["q_a_proj", "q_a_layernorm", "q_b_proj", "kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj", "o_proj"]
_MLP = ["gate_proj", "up_proj", "down_proj"]


def _published_names() -> set[str]:
    """Of Kimi-K2.5's layout, for one dense and one MoE layer, 4 experts, one vision block."""
    names = {
        "language_model.lm_head.weight",
        "language_model.model.embed_tokens.weight",
        "language_model.model.norm.weight",
    }
    for layer in ("language_model.model.layers.0", "language_model.model.layers.1"):
        names |= {f"{layer}.self_attn.{part}.weight" for part in _ATTENTION}
        names |= {f"{layer}.{norm}.weight" for norm in ("input_layernorm", "post_attention_layernorm")}
    names |= {f"language_model.model.layers.0.mlp.{part}.weight" for part in _MLP}
    moe = "language_model.model.layers.1.mlp"
    names |= {f"{moe}.experts.{i}.{part}.weight" for i in range(4) for part in _MLP}
    names |= {f"{moe}.shared_experts.{part}.weight" for part in _MLP}
    names |= {f"{moe}.gate.weight", f"{moe}.gate.e_score_correction_bias"}
    names |= {f"mm_projector.{part}.{kind}" for part in ("pre_norm", "proj.0", "proj.2") for kind in ("weight", "bias")}
    names |= {"vision_tower.patch_embed.pos_emb.weight"}
    block = "vision_tower.encoder.blocks.0"
    parts = [f"{block}.{part}" for part in ("wqkv", "wo", "norm0", "norm1", "mlp.fc0", "mlp.fc1")]
    parts += ["vision_tower.patch_embed.proj", "vision_tower.encoder.final_layernorm"]
    return names | {f"{part}.{kind}" for part in parts for kind in ("weight", "bias")}


@pytest.fixture(scope="module")
def policy():
    model, processor = build(seed=0, spread=0.2)
    router = model.model.language_model.layers[1].mlp.gate
    router.e_score_correction_bias += torch.tensor([0.3, -0.2, 0.1, 0.0])  # training moves it: it must survive
    return model, processor


@pytest.fixture(scope="module")
def saved(policy, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint") / "hf"
    save_policy(*policy, folder)
    return folder


def _logits(model, processor, store):
    prompt = PromptEncoder(processor, store, model.config).prompt(
        task("t", store, "sum of digits ?", picture(3, 48, 32))
    )
    with torch.no_grad():
        return prompt, model(input_ids=torch.tensor([prompt.input_ids]), **prompt.images).logits


def test_read_back_it_gives_the_same_logits_and_pixels(policy, saved, tmp_path):
    store = ImageStore(tmp_path)
    prompt, logits = _logits(*policy, store)
    loaded_prompt, loaded_logits = _logits(*load_policy(str(saved), "float32"), store)
    assert loaded_prompt.input_ids == prompt.input_ids
    assert torch.equal(loaded_prompt.images["pixel_values"], prompt.images["pixel_values"])
    assert torch.equal(loaded_logits, logits)
    assert float(logits.std()) > 0.5  # else equality would say little


def test_the_dtype_is_the_recipes(saved):
    assert load_policy(str(saved), "bfloat16")[0].dtype == torch.bfloat16


def test_names_are_those_of_published_checkpoints(saved):
    assert set(load_file(saved / "model.safetensors")) == _published_names()


def test_fused_tensors_are_taken_apart_in_order(policy, saved):
    weights = load_file(saved / "model.safetensors")
    experts = policy[0].model.language_model.layers[1].mlp.experts
    prefix = "language_model.model.layers.1.mlp.experts"
    for i in range(4):
        assert torch.equal(weights[f"{prefix}.{i}.gate_proj.weight"], experts.gate_up_proj[i, :16])
        assert torch.equal(weights[f"{prefix}.{i}.up_proj.weight"], experts.gate_up_proj[i, 16:])
        assert torch.equal(weights[f"{prefix}.{i}.down_proj.weight"], experts.down_proj[i])


def test_the_vision_towers_queries_and_keys_are_written_for_interleaved_rotation(policy, saved):
    """Published checkpoints rotate neighbouring dimensions (0 with 1, 2 with 3), transformers the halves of a head of 4
    (0 with 2, 1 with 3): row order 0, 2, 1, 3 in each of the 4 heads."""
    wqkv = load_file(saved / "model.safetensors")["vision_tower.encoder.blocks.0.wqkv.weight"]
    attention = policy[0].model.vision_tower.layers[0].attn
    order = [4 * head + i for head in range(4) for i in (0, 2, 1, 3)]
    assert torch.equal(wqkv[:16], attention.q_proj.weight[order])
    assert torch.equal(wqkv[16:32], attention.k_proj.weight[order])
    assert torch.equal(wqkv[32:], attention.v_proj.weight)


def test_the_config_has_what_the_engine_needs(saved):
    config = json.loads((saved / "config.json").read_text())
    assert config["architectures"] == ["KimiK25ForConditionalGeneration"]
    text = config["text_config"]
    assert (text["topk_method"], text["scoring_func"], text["moe_layer_freq"]) == ("noaux_tc", "sigmoid", 1)
    assert text["hidden_size"] == TINY.hidden  # additions complete the section, they do not replace it
    generation = json.loads((saved / "generation_config.json").read_text())
    assert generation["eos_token_id"] == 1


def test_image_settings_lie_where_the_engine_looks_and_agree(saved):
    settings = json.loads((saved / "preprocessor_config.json").read_text())
    theirs = settings["media_proc_cfg"]
    assert (settings["image_mean"], settings["image_std"]) == ([1.0] * 3, [-0.5] * 3)
    assert (theirs["image_mean"], theirs["image_std"]) == ([1.0] * 3, [-0.5] * 3)
    assert settings["patch_size"] == theirs["patch_size"] == 8
    assert settings["merge_size"] == theirs["merge_kernel_size"] == 2
    assert settings["max_patches"] == theirs["in_patch_limit"] == 32 * 32
    # transformers multiplies max_height by the patch size, so both count patches
    assert theirs["patch_limit_on_one_side"] == settings["size"]["max_height"] == settings["size"]["max_width"] == 32


def test_given_weights_are_written_instead_of_the_models_own(policy, tmp_path):
    model, processor = policy
    state = {name: torch.full_like(tensor, 0.25) for name, tensor in model.state_dict().items()}
    save_policy(model, processor, tmp_path, state)
    assert all((tensor == 0.25).all() for tensor in load_file(tmp_path / "model.safetensors").values())


def test_only_what_shares_storage_is_copied(policy):
    model = policy[0]
    state = model.state_dict()
    named = dict(checkpoint_names(model, state))
    assert named["language_model.lm_head.weight"].data_ptr() == state["lm_head.weight"].data_ptr()
    assert named["mm_projector.proj.0.weight"].data_ptr() == state["model.mm_projector.in_proj.weight"].data_ptr()
    fused = state["model.language_model.layers.1.mlp.experts.down_proj"]
    one = named["language_model.model.layers.1.mlp.experts.0.down_proj.weight"]
    assert one.untyped_storage().data_ptr() != fused.untyped_storage().data_ptr()
    assert all(tensor.is_contiguous() for tensor in named.values())
    pointers = [tensor.untyped_storage().data_ptr() for tensor in named.values()]
    assert len(set(pointers)) == len(pointers)


def test_sharded_parameters_count_whole():
    whole, shard = torch.nn.Parameter(torch.zeros(3, 5)), SimpleNamespace(ds_numel=1000, numel=lambda: 0)
    assert parameter_count([whole, shard]) == 1015
