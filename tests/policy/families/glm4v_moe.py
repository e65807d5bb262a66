"""A tiny random GLM-4.5V: a dense layer, then one with experts and a shared expert."""

from __future__ import annotations

from pathlib import Path

from transformers import (
    Glm4vMoeConfig,
    Glm4vMoeForConditionalGeneration,
    Glm46VImageProcessor,
    Glm46VProcessor,
    Glm46VVideoProcessor,
)

from policy.families.kimi_k25 import lean
from policy.families.qwen2_vl import HIDDEN, spread, text_config, tokenizer
from rlvlm.policy.checkpoint import save_policy

MARKS = {
    "image_token": "<|image|>",
    "video_token": "<|video|>",
    "vision_bos_token": "<|begin_of_image|>",
    "vision_eos_token": "<|end_of_image|>",
    "video_bos_token": "<|begin_of_video|>",
    "video_eos_token": "<|end_of_video|>",
}


def build(folder: Path, seed: int, texts: tuple[str, ...] = ()) -> None:
    words = tokenizer(texts, MARKS)
    text = text_config(words) | dict(
        head_dim=32,
        moe_intermediate_size=32,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_shared_experts=1,
        first_k_dense_replace=1,
        n_group=1,
        topk_group=1,
        norm_topk_prob=True,
        routed_scaling_factor=1.0,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 1e4,
            "mrope_section": [4, 2, 2],
            "partial_rotary_factor": 0.5,
        },
        tie_word_embeddings=False,
    )
    vision = dict(
        depth=2,
        hidden_size=32,
        intermediate_size=64,
        num_heads=2,
        image_size=64,
        patch_size=8,
        out_hidden_size=HIDDEN,
    )
    config = Glm4vMoeConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=words.image_token_id,
        video_token_id=words.video_token_id,
        image_start_token_id=words.convert_tokens_to_ids(words.vision_bos_token),
        image_end_token_id=words.convert_tokens_to_ids(words.vision_eos_token),
        video_start_token_id=words.convert_tokens_to_ids(words.video_bos_token),
        video_end_token_id=words.convert_tokens_to_ids(words.video_eos_token),
        tie_word_embeddings=False,
    )
    processor = Glm46VProcessor(
        image_processor=Glm46VImageProcessor(
            patch_size=8, merge_size=2, size={"shortest_edge": 2 * 16 * 16, "longest_edge": 2 * 64 * 64}
        ),
        tokenizer=words,
        video_processor=Glm46VVideoProcessor(patch_size=8),
        chat_template=words.chat_template,
    )
    model = lean(spread(Glm4vMoeForConditionalGeneration(config), seed), seed)
    save_policy(model, processor, folder)
