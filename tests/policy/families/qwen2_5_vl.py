"""A tiny random Qwen2.5-VL whose first vision layer looks through windows."""

from __future__ import annotations

from pathlib import Path

from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLVideoProcessor,
)

from policy.families.qwen2_vl import HIDDEN, ids, image_processor, spread, text_config, tokenizer
from rlvlm.policy.checkpoint import save_policy

# Windows of 32 pixels, 4 x 4 patches: pictures of up to 64 have several, and the second layer joins them.
VISION = dict(
    depth=2,
    hidden_size=32,
    intermediate_size=64,
    num_heads=2,
    patch_size=8,
    out_hidden_size=HIDDEN,
    window_size=32,
    fullatt_block_indexes=[1],
)


def build(folder: Path, seed: int, texts: tuple[str, ...] = ()) -> None:
    words = tokenizer(texts)
    config = Qwen2_5_VLConfig(text_config=text_config(words), vision_config=VISION, **ids(words))
    model = spread(Qwen2_5_VLForConditionalGeneration(config), seed)
    processor = Qwen2_5_VLProcessor(
        image_processor=image_processor(),
        tokenizer=words,
        video_processor=Qwen2VLVideoProcessor(patch_size=8),
        chat_template=words.chat_template,
    )
    save_policy(model, processor, folder)
