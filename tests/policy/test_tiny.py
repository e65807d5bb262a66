"""The default policy is what it says: kimi_k25 with MLA and a mixture of experts, the same for the same seed."""

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_policy import TEXTS, TINY

from rlvlm.policy.checkpoint import parameter_count
from rlvlm.policy.tiny import build_tiny_kimi
from rlvlm.recipe.schema import TinyPolicy


@pytest.fixture(scope="module")
def built():
    return build_tiny_kimi(TINY, TEXTS, 0)


def _by_hand(tiny: TinyPolicy, vocabulary: int) -> int:
    """Parameters counted from the papers: DeepSeek-V3's decoder with MLA, MoonViT, Kimi's projector."""
    h, w, v = tiny.hidden, tiny.expert_width, tiny.vision_hidden
    q = h * 64 + 64 + 64 * 4 * (16 + 16)  # down to rank 64, norm, up to 4 heads of 16 + 16
    kv = h * (64 + 16) + 64 + 64 * 4 * (16 + 32)  # down to rank 64 and a shared rotary 16, norm, up to keys and values
    attention = q + kv + 4 * 32 * h
    dense = 3 * h * 2 * h
    experts = tiny.experts * h + (tiny.experts + 1) * 3 * h * w  # router, routed experts and the shared one
    decoder = tiny.layers * (attention + 2 * h) + dense + (tiny.layers - 1) * experts + h
    block = 4 * v + 4 * (v * v + v) + (v * 2 * v + 2 * v) + (2 * v * v + v)
    vision = 3 * tiny.patch**2 * v + v + 8 * 8 * v + tiny.vision_layers * block + 2 * v
    projector = 2 * v + (4 * v * 4 * v + 4 * v) + (4 * v * h + h)
    return 2 * vocabulary * h + decoder + vision + projector


@pytest.mark.parametrize("tiny", [TINY, TinyPolicy()])
def test_parameters_as_counted_by_hand(tiny):
    model, processor = build_tiny_kimi(tiny, TEXTS, 0)
    assert parameter_count(model.parameters()) == _by_hand(tiny, len(processor.tokenizer))


def test_architecture(built):
    config = built[0].config
    assert (config.model_type, config.text_config.model_type) == ("kimi_k25", "deepseek_v3")
    assert (config.text_config.n_routed_experts, config.text_config.num_experts_per_tok) == (4, 2)
    assert (config.text_config.kv_lora_rank, config.text_config.q_lora_rank) == (64, 64)
    assert built[0].dtype == torch.float32


def test_first_layer_is_dense_and_all_others_are_mixtures():
    model, _ = build_tiny_kimi(TinyPolicy(layers=4), TEXTS, 0)
    assert [hasattr(layer.mlp, "gate") for layer in model.model.language_model.layers] == [False, True, True, True]


def test_heads_have_the_sizes_that_the_engine_takes_on_a_cpu(built):
    attention = built[0].model.language_model.layers[0].self_attn
    assert attention.q_b_proj.out_features == 4 * 32
    assert attention.o_proj.in_features == 4 * 32


def test_token_ids_in_the_config_are_the_tokenizers(built):
    model, processor = built
    ids = processor.tokenizer.convert_tokens_to_ids
    config = model.config
    assert config.image_token_id == ids("<|media_pad|>") == 8
    assert config.video_token_id == ids("<|kimi_k25_video_placeholder|>") == 10
    assert (config.vision_start_token_id, config.vision_end_token_id) == (6, 9)
    assert (model.generation_config.eos_token_id, model.generation_config.pad_token_id) == (1, 0)
    assert config.text_config.vocab_size == model.lm_head.out_features == len(processor.tokenizer)


def test_same_seed_same_weights_and_another_seed_others(built):
    state = built[0].state_dict()
    again = build_tiny_kimi(TINY, TEXTS, 0)[0].state_dict()
    other = build_tiny_kimi(TINY, TEXTS, 1)[0].state_dict()
    assert state.keys() == again.keys()
    assert all(torch.equal(state[name], again[name]) for name in state)
    assert not torch.equal(state["lm_head.weight"], other["lm_head.weight"])


def test_the_global_generator_is_left_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    build_tiny_kimi(TINY, TEXTS, 0)
    assert torch.equal(torch.rand(3), expected)


def test_initial_spread(built):
    """Matrices by the config; the position table must not drown the patches: transformers draws it with about 1."""
    spread = built[0].config.initializer_range
    assert float(built[0].lm_head.weight.detach().std()) == pytest.approx(spread, rel=0.02)
    table = built[0].model.vision_tower.patch_embed.pos_emb.position_embeddings
    assert spread / 2 < float(table.detach().std()) < 3 * spread


# --- the processor ---------------------------------------------------------------------------------------------------


def _pixels(built, image):
    encoded = built[1](text=["<|media_pad|>"], images=[image], return_tensors="pt")
    return encoded["pixel_values"], encoded["image_grid_thw"].tolist()


@pytest.mark.parametrize(("grey", "value"), [(255, 0.0), (0, 2.0), (102, 2 * (1 - 102 / 255))])
def test_white_paper_is_nothing_and_black_ink_is_two(built, grey, value):
    pixels, grid = _pixels(built, Image.new("RGB", (48, 32), (grey,) * 3))
    assert grid == [[1, 4, 6]]
    assert pixels.shape == (24, 3, 8, 8)
    torch.testing.assert_close(pixels, torch.full_like(pixels, value))


def test_patches_lie_row_by_row_with_their_pixels_in_place(built):
    canvas = np.full((32, 48, 3), 255, dtype=np.uint8)
    canvas[8 + 2, 16 + 5] = 0  # in patch row 1, patch column 2
    pixels, _ = _pixels(built, Image.fromarray(canvas))
    assert pixels.nonzero().tolist() == [[1 * 6 + 2, channel, 2, 5] for channel in range(3)]


def test_a_picture_that_is_too_large_is_shrunk_to_32_patches_a_side(built):
    pixels, grid = _pixels(built, Image.new("RGB", (512, 256), "white"))
    assert grid == [[1, 16, 32]]
    assert float(pixels.abs().max()) == 0.0
