"""A tiny random InstructBLIP: BLIP-2's tower and Q-Former, which reads the prompt too, and a Llama.

Its Q-Former has a tokenizer of its own, with a mark at both ends as BERT's.
"""

from __future__ import annotations

from pathlib import Path

from tokenizers.processors import TemplateProcessing
from transformers import (
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    InstructBlipProcessor,
    PreTrainedTokenizerFast,
)

from policy.families import blip2, llava
from policy.families.qwen2_vl import HIDDEN
from rlvlm.policy.checkpoint import save_policy
from rlvlm.policy.tokenizer import build_tokenizer

LIMITS = blip2.LIMITS
CANNOT = {
    "rollout": "vLLM 0.32 has no InstructBLIP of its own, and the Transformers model that it takes instead asks the "
    "processor to count a picture's tokens, which InstructBlipProcessor cannot; also, the Q-Former reads the prompt "
    "along with the picture, while vLLM encodes and caches pictures by themselves",
}


def qformer_tokenizer(texts: tuple[str, ...]) -> PreTrainedTokenizerFast:
    words = build_tokenizer((*texts, "what is the sum of digits left ? Question: Answer:"))
    words.add_special_tokens({"extra_special_tokens": ["[CLS]", "[SEP]"]})
    core = words.backend_tokenizer
    marks = [(mark, words.convert_tokens_to_ids(mark)) for mark in ("[CLS]", "[SEP]")]
    core.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=marks)
    return PreTrainedTokenizerFast(
        tokenizer_object=core, cls_token="[CLS]", sep_token="[SEP]", pad_token="<|pad|>", eos_token="<|im_end|>"
    )


def build(folder: Path, seed: int, texts: tuple[str, ...] = ()) -> None:
    words, read = blip2.tokenizer(texts), qformer_tokenizer(texts)
    config = InstructBlipConfig(
        vision_config=blip2.VISION,
        qformer_config={**blip2.QFORMER, "vocab_size": len(read), "max_position_embeddings": 512},
        text_config={
            "model_type": "llama",
            "intermediate_size": 2 * HIDDEN,
            "num_key_value_heads": 1,
            "tie_word_embeddings": False,
            **llava.text_config(words),
        },
        num_query_tokens=blip2.QUERIES,
        image_token_index=words.convert_tokens_to_ids(llava.IMAGE),
    )
    model = blip2.blip_spread(InstructBlipForConditionalGeneration(config), seed)
    processor = InstructBlipProcessor(
        image_processor=blip2.image_processor(),
        tokenizer=words,
        qformer_tokenizer=read,
        num_query_tokens=blip2.QUERIES,
    )
    save_policy(model, processor, folder)
