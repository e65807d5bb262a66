"""The default policy: a tiny kimi_k25, built from a config on the spot.

Same lineage as Kimi-VL (arXiv 2504.07491): MoonViT, MLP projector, DeepSeek-V3 decoder with MLA and a sigmoid-scored
mixture of experts whose selection bias keeps the load even. Head sizes follow what vLLM's CPU attention accepts (32).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from transformers import (
    Kimi_K25Config,
    Kimi_K25ForConditionalGeneration,
    Kimi_K25ImageProcessor,
    Kimi_K25Processor,
    Kimi_K25VideoProcessor,
    PreTrainedTokenizerFast,
)

from rlvlm.policy.tokenizer import CHAT_TEMPLATE, build_tokenizer
from rlvlm.recipe.schema import TinyPolicy

_HEADS = 4
# Query and key have 16 + 16 dimensions, values 32: with MLA's latent expanded these are plain heads of 32 for vLLM.
_NOPE, _ROPE, _VALUE = 16, 16, 32
_INITIAL_STD = 0.08
_POSITION_STD = 0.15
_MAX_SIDE_PATCHES = 32


def _config(tiny: TinyPolicy, tokenizer: PreTrainedTokenizerFast) -> Kimi_K25Config:
    def token(mark: str) -> int:
        return int(tokenizer.convert_tokens_to_ids(mark))

    text = dict(
        model_type="deepseek_v3",
        vocab_size=len(tokenizer),
        hidden_size=tiny.hidden,
        intermediate_size=2 * tiny.hidden,
        moe_intermediate_size=tiny.expert_width,
        num_hidden_layers=tiny.layers,
        num_attention_heads=_HEADS,
        num_key_value_heads=_HEADS,
        n_shared_experts=1,
        n_routed_experts=tiny.experts,
        num_experts_per_tok=tiny.experts_per_token,
        first_k_dense_replace=1,
        n_group=1,
        topk_group=1,
        norm_topk_prob=True,
        routed_scaling_factor=1.0,
        kv_lora_rank=64,
        q_lora_rank=64,
        qk_nope_head_dim=_NOPE,
        qk_rope_head_dim=_ROPE,
        v_head_dim=_VALUE,
        max_position_embeddings=4096,
        initializer_range=_INITIAL_STD,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        tie_word_embeddings=False,
        num_nextn_predict_layers=0,
    )
    vision = dict(
        patch_size=tiny.patch,
        pos_emb_height=8,
        pos_emb_width=8,
        num_attention_heads=4,
        num_hidden_layers=tiny.vision_layers,
        hidden_size=tiny.vision_hidden,
        intermediate_size=2 * tiny.vision_hidden,
        initializer_range=_INITIAL_STD,
        rope_parameters={"rope_type": "axial", "rope_theta": 10000.0},  # vLLM's MoonViT knows no other
    )
    return Kimi_K25Config(
        text_config=text,
        vision_config=vision,
        projection_hidden_size=tiny.vision_hidden,
        image_token_id=token("<|media_pad|>"),
        video_token_id=token("<|kimi_k25_video_placeholder|>"),
        vision_start_token_id=token("<|media_begin|>"),
        vision_end_token_id=token("<|media_end|>"),
        tie_word_embeddings=False,
        initializer_range=_INITIAL_STD,
    )


def _processor(tiny: TinyPolicy, tokenizer: PreTrainedTokenizerFast) -> Kimi_K25Processor:
    # mean 1, std -0.5: white paper becomes 0 and ink 2, so that empty cells carry no signal.
    normalisation = dict(image_mean=[1.0] * 3, image_std=[-0.5] * 3)
    images = Kimi_K25ImageProcessor(
        patch_size=tiny.patch,
        merge_size=2,
        max_patches=_MAX_SIDE_PATCHES**2,
        size={"max_height": _MAX_SIDE_PATCHES, "max_width": _MAX_SIDE_PATCHES},  # in patches, whatever its name says
        **normalisation,
    )
    # vLLM's Kimi processor reads its own copy of the settings under this name.
    images.media_proc_cfg = dict(
        in_patch_limit=_MAX_SIDE_PATCHES**2,
        patch_size=tiny.patch,
        merge_kernel_size=2,
        fixed_output_tokens=None,
        patch_limit_on_one_side=_MAX_SIDE_PATCHES,
        in_patch_limit_each_frame=None,
        in_patch_limit_video=None,
        sample_fps=2.0,
        temporal_merge_kernel_size=4,
        timestamp_mode="hh:mm:ss.fff",
        max_num_frames_each_video=None,
        **normalisation,
    )
    return Kimi_K25Processor(
        image_processor=images,
        tokenizer=tokenizer,
        video_processor=Kimi_K25VideoProcessor(),
        chat_template=CHAT_TEMPLATE,
    )


def build_tiny_kimi(
    tiny: TinyPolicy, texts: Iterable[str], seed: int
) -> tuple[Kimi_K25ForConditionalGeneration, Kimi_K25Processor]:
    """A randomly initialised policy in float32 and its processor; the vocabulary covers the words of `texts`."""
    tokenizer = build_tokenizer(texts)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Kimi_K25ForConditionalGeneration(_config(tiny, tokenizer))
    # transformers draws the position table with std 1.0, which drowns the patches of a tiny model.
    with torch.no_grad():
        table = model.model.vision_tower.patch_embed.pos_emb.position_embeddings
        table.mul_(_POSITION_STD / table.std())
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model, _processor(tiny, tokenizer)
