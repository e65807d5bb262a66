"""A tiny random LLaVA: a CLIP tower that cuts 32 x 32 pixels into 16 patches, a projector, a Llama.

Its tokenizer puts a beginning of sequence in front of a text, as Llama's does, and its chat template leaves that to it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers.processors import TemplateProcessing
from transformers import (
    CLIPImageProcessor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from policy.families.qwen2_vl import HIDDEN, spread
from rlvlm.policy.checkpoint import save_policy
from rlvlm.policy.tokenizer import build_tokenizer

SIDE, PATCH = 32, 8  # pixels
START, IMAGE = "<s>", "<image>"
TEMPLATE = """\
{%- for message in messages -%}{{ message.role | upper }}: \
{% if message.content is string -%}{{ message.content }}
{%- else -%}
{%- for part in message.content -%}
{%- if part.type == 'image' -%}<image>
{% elif part.type == 'text' -%}{{ part.text }}
{%- endif -%}
{%- endfor -%}
{%- endif %} {% endfor -%}
{%- if add_generation_prompt -%}ASSISTANT: <think>{%- endif -%}"""


def tokenizer(
    texts: tuple[str, ...], start: str = START, named: tuple[str, ...] = ("image_token",)
) -> PreTrainedTokenizerFast:
    """rlvlm's word tokenizer with a beginning of sequence and a picture's placeholder, which may have a name."""
    words = build_tokenizer((*texts, "what is the sum of digits left ? USER: ASSISTANT:"))
    words.add_special_tokens({"extra_special_tokens": [start, IMAGE]})
    core = words.backend_tokenizer
    core.post_processor = TemplateProcessing(
        single=f"{start} $A", special_tokens=[(start, words.convert_tokens_to_ids(start))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=start,
        pad_token="<|pad|>",
        eos_token="<|im_end|>",
        clean_up_tokenization_spaces=False,
        extra_special_tokens=dict.fromkeys(named, IMAGE),
    )


def text_config(words: PreTrainedTokenizerFast) -> dict[str, Any]:
    return dict(
        vocab_size=len(words),
        hidden_size=HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=2048,
        pad_token_id=words.pad_token_id,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
    )


def image_processor() -> CLIPImageProcessor:
    return CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})


def build(
    folder: Path, seed: int, texts: tuple[str, ...] = (), language: str = "llama", feature_layer: int | list[int] = -2
) -> None:
    """language: model type of the decoder, llama or mistral. feature_layer: of the tower's three, what is read."""
    words = tokenizer(texts)
    config = LlavaConfig(
        text_config={
            "model_type": language,
            "architectures": [f"{language.capitalize()}ForCausalLM"],
            "intermediate_size": 2 * HIDDEN,
            "num_key_value_heads": 1,
            "tie_word_embeddings": False,
            **text_config(words),
        },
        vision_config=dict(
            model_type="clip_vision_model",
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=2,
            image_size=SIDE,
            patch_size=PATCH,
        ),
        image_token_index=words.image_token_id,
        vision_feature_layer=feature_layer,
        image_seq_length=(SIDE // PATCH) ** 2,
    )
    model = spread(LlavaForConditionalGeneration(config), seed)
    processor = LlavaProcessor(
        image_processor=image_processor(),
        tokenizer=words,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )
    save_policy(model, processor, folder)
