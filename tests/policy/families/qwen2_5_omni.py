"""A tiny random thinker of Qwen2.5-Omni, in a checkpoint like those that are published."""

from __future__ import annotations

from pathlib import Path

from transformers import (
    Qwen2_5OmniProcessor,
    Qwen2_5OmniThinkerConfig,
    Qwen2_5OmniThinkerForConditionalGeneration,
    Qwen2VLVideoProcessor,
    WhisperFeatureExtractor,
)

from policy.families.qwen2_5_vl import VISION
from policy.families.qwen2_vl import HIDDEN, ids, image_processor, spread, text_config, tokenizer
from rlvlm.policy.checkpoint import save_policy

MARKS = {
    "image_token": "<|IMAGE|>",
    "video_token": "<|VIDEO|>",
    "audio_token": "<|AUDIO|>",
    "vision_bos_token": "<|vision_bos|>",
    "vision_eos_token": "<|vision_eos|>",
    "audio_bos_token": "<|audio_bos|>",
    "audio_eos_token": "<|audio_eos|>",
}


def build(folder: Path, seed: int, texts: tuple[str, ...] = ()) -> None:
    words = tokenizer(texts, MARKS)
    named = ids(words)
    config = Qwen2_5OmniThinkerConfig(
        text_config={**text_config(words), "tie_word_embeddings": False},
        vision_config=VISION,
        audio_config=dict(
            num_mel_bins=8,
            encoder_layers=1,
            encoder_attention_heads=2,
            encoder_ffn_dim=32,
            d_model=32,
            max_source_positions=20,
            n_window=5,
            output_dim=HIDDEN,
        ),
        audio_token_index=words.audio_token_id,
        image_token_index=named.pop("image_token_id"),
        video_token_index=named.pop("video_token_id"),
        audio_start_token_id=words.convert_tokens_to_ids(words.audio_bos_token),
        audio_end_token_id=words.convert_tokens_to_ids(words.audio_eos_token),
        **named,
    )
    model = spread(Qwen2_5OmniThinkerForConditionalGeneration(config), seed)
    processor = Qwen2_5OmniProcessor(
        image_processor=image_processor(),
        video_processor=Qwen2VLVideoProcessor(patch_size=8),
        feature_extractor=WhisperFeatureExtractor(feature_size=8),
        tokenizer=words,
        chat_template=words.chat_template,
    )
    save_policy(model, processor, folder)
