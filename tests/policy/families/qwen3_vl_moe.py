"""A tiny random Qwen3-VL with experts in both of its layers, the first of which deepstack joins."""

from __future__ import annotations

from pathlib import Path

from transformers import (
    Qwen2VLImageProcessor,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from policy.families.qwen2_vl import HIDDEN, MARKS, ids, spread, text_config, tokenizer
from rlvlm.policy.checkpoint import save_policy


def build(folder: Path, seed: int, texts: tuple[str, ...] = ()) -> None:
    words = tokenizer(texts, MARKS)
    text = text_config(words) | dict(
        head_dim=32,
        moe_intermediate_size=48,  # neither HIDDEN nor half of it: square experts cannot be told from turned ones
        num_experts=4,
        num_experts_per_tok=2,
        decoder_sparse_step=1,
        norm_topk_prob=True,
        mlp_only_layers=[],
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 1e4,
            "mrope_section": [6, 5, 5],
            "mrope_interleaved": True,
        },
        tie_word_embeddings=False,
    )
    vision = dict(
        depth=2,
        hidden_size=32,
        intermediate_size=64,
        num_heads=2,
        patch_size=8,
        out_hidden_size=HIDDEN,
        num_position_embeddings=64,
        deepstack_visual_indexes=[0],
    )
    config = Qwen3VLMoeConfig(text_config=text, vision_config=vision, tie_word_embeddings=False, **ids(words))
    processor = Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(
            patch_size=8, merge_size=2, size={"shortest_edge": 16 * 16, "longest_edge": 64 * 64}
        ),
        tokenizer=words,
        video_processor=Qwen3VLVideoProcessor(patch_size=8),
        chat_template=words.chat_template,
    )
    save_policy(spread(Qwen3VLMoeForConditionalGeneration(config), seed), processor, folder)
