"""A tiny random Qwen2-VL, and what its relatives share: tokenizer, chat template, processor, text settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)

from rlvlm.policy.checkpoint import save_policy
from rlvlm.policy.tokenizer import build_tokenizer

HIDDEN, HEADS, LAYERS = 64, 2, 2  # heads of 32: the least that vLLM's CPU attention takes
MARKS = {
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "vision_bos_token": "<|vision_start|>",
    "vision_eos_token": "<|vision_end|>",
}
_TEMPLATE = """\
{%- for message in messages -%}<|im_start|>{{ message.role }}
{% if message.content is string -%}{{ message.content }}
{%- else -%}
{%- for part in message.content -%}
{%- if part.type == 'image' -%}IMAGE
{%- elif part.type == 'text' -%}{{ part.text }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}<|im_start|>assistant
<think>{%- endif -%}"""


def template(marks: dict[str, str] = MARKS) -> str:
    picture = marks["vision_bos_token"] + marks["image_token"] + marks["vision_eos_token"]
    return _TEMPLATE.replace("IMAGE", picture)


def tokenizer(texts: tuple[str, ...], marks: dict[str, str] = MARKS) -> PreTrainedTokenizerFast:
    """rlvlm's word tokenizer with Qwen's marks."""
    words = build_tokenizer((*texts, "what is the sum of digits left ?"))
    words.add_special_tokens({"extra_special_tokens": ["<|im_start|>", *marks.values()]})
    return PreTrainedTokenizerFast(
        tokenizer_object=words.backend_tokenizer,
        pad_token="<|pad|>",
        eos_token="<|im_end|>",
        clean_up_tokenization_spaces=False,
        extra_special_tokens=marks,
        chat_template=template(marks),
    )


def ids(words: PreTrainedTokenizerFast) -> dict[str, int]:
    """The ids that a Qwen config names."""
    return {
        "image_token_id": words.image_token_id,
        "video_token_id": words.video_token_id,
        "vision_start_token_id": words.convert_tokens_to_ids(words.vision_bos_token),
        "vision_end_token_id": words.convert_tokens_to_ids(words.vision_eos_token),
    }


def text_config(words: PreTrainedTokenizerFast) -> dict[str, Any]:
    return dict(
        vocab_size=len(words),
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=1,
        max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [8, 4, 4]},
        pad_token_id=words.pad_token_id,
        eos_token_id=words.eos_token_id,
        bos_token_id=None,
    )


def image_processor() -> Qwen2VLImageProcessor:
    """Patches of 8 pixels, pictures of at most 64 x 64."""
    return Qwen2VLImageProcessor(patch_size=8, merge_size=2, size={"shortest_edge": 16 * 16, "longest_edge": 64 * 64})


def spread(model: PreTrainedModel, seed: int, deviation: float = 0.1) -> PreTrainedModel:
    """Matrices and biases so large that what a model says depends on what it sees."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name and "ln_q" not in name:
                parameter.normal_(0, deviation, generator=generator)
    model.config.architectures = [type(model).__name__]  # `from_pretrained` would have found it in config.json
    model.generation_config.eos_token_id = model.config.get_text_config().eos_token_id
    model.generation_config.pad_token_id = model.config.get_text_config().pad_token_id
    return model.eval()


def build(folder: Path, seed: int, texts: tuple[str, ...] = ()) -> None:
    """With tied embeddings, as the smallest of the published ones has them."""
    words = tokenizer(texts)
    config = Qwen2VLConfig(
        text_config=text_config(words),
        vision_config=dict(depth=2, embed_dim=32, hidden_size=HIDDEN, num_heads=2, mlp_ratio=2, patch_size=8),
        tie_word_embeddings=True,
        **ids(words),
    )
    model = spread(Qwen2VLForConditionalGeneration(config), seed)
    processor = Qwen2VLProcessor(
        image_processor=image_processor(),
        tokenizer=words,
        video_processor=Qwen2VLVideoProcessor(patch_size=8),
        chat_template=words.chat_template,
    )
    save_policy(model, processor, folder)
