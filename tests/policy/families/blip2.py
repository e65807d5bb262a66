"""A tiny random BLIP-2: a ViT that cuts 32 x 32 pixels into 16 patches, a Q-Former of 4 queries, an OPT.

Its tokenizer puts a beginning of sequence in front of a text, as OPT's does: `</s>`, which ends a sequence too.
"""

from __future__ import annotations

from pathlib import Path

from torch import nn
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    BlipImageProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from policy.families import llava
from policy.families.qwen2_vl import HIDDEN, spread
from rlvlm.policy.checkpoint import save_policy

LIMITS = {
    "many images": "its text has no placeholder for pictures: the one that a prompt may hold stands in front of it"
}
SIDE, PATCH, QUERIES = 32, 8, 4
VISION = dict(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    image_size=SIDE,
    patch_size=PATCH,
)
QFORMER = dict(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    vocab_size=64,
    max_position_embeddings=128,
)


def image_processor() -> BlipImageProcessor:
    return BlipImageProcessor(size={"height": SIDE, "width": SIDE})


def tokenizer(texts: tuple[str, ...]) -> PreTrainedTokenizerFast:
    """Without a name for the placeholder: the processor has its own."""
    return llava.tokenizer((*texts, "Question: Answer:"), start="</s>", named=())


def blip_spread(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """`spread`, with the Q-Former's norms as they were."""
    spread(model, seed)
    for module in model.qformer.modules():
        if isinstance(module, nn.LayerNorm):
            module.reset_parameters()
    return model


def build(folder: Path, seed: int, texts: tuple[str, ...] = ()) -> None:
    words = tokenizer(texts)
    config = Blip2Config(
        vision_config=VISION,
        qformer_config=QFORMER,
        text_config={"model_type": "opt", "ffn_dim": 2 * HIDDEN, **llava.text_config(words)},
        num_query_tokens=QUERIES,
        image_token_index=words.convert_tokens_to_ids(llava.IMAGE),
    )
    model = blip_spread(Blip2ForConditionalGeneration(config), seed)
    processor = Blip2Processor(image_processor=image_processor(), tokenizer=words, num_query_tokens=QUERIES)
    save_policy(model, processor, folder)
