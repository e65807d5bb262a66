"""The tiny policy's tokenizer: every known word is one token, anything else falls back to bytes.

A byte-level BPE without merges, with `ignore_merges` (as Llama 3 has it): a pre-token that stands in the vocabulary is
taken whole, any other is spelled in bytes. Nothing is trained, so the vocabulary is a plain function of the words.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

# The marks of Kimi-VL's and Kimi-K2.5's chat format.
SPECIAL = (
    "<|pad|>",
    "<|im_end|>",
    "<|im_user|>",
    "<|im_assistant|>",
    "<|im_system|>",
    "<|im_middle|>",
    "<|media_begin|>",
    "<|media_content|>",
    "<|media_pad|>",
    "<|media_end|>",
    "<|kimi_k25_video_placeholder|>",
    "<think>",
    "</think>",
)

# The generation prompt ends in `<think>`, as in Kimi-K2.5's thinking mode: a response is
# "chain</think>answer<|im_end|>".
CHAT_TEMPLATE = """\
{%- for message in messages -%}
<|im_{{ message.role }}|>{{ message.role }}<|im_middle|>
{%- if message.content is string -%}{{ message.content }}
{%- else -%}
{%- for part in message.content -%}
{%- if part.type == 'image' -%}<|media_begin|>image<|media_content|><|media_pad|><|media_end|>
{%- elif part.type == 'text' -%}{{ part.text }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}<|im_end|>
{%- endfor -%}
{%- if add_generation_prompt -%}<|im_assistant|>assistant<|im_middle|><think>{%- endif -%}"""

_WORD = r" ?[^\s]+|\s+"


def words_of(texts: Iterable[str]) -> list[str]:
    """The distinct words of the texts, each with and without a leading blank, in a stable order."""
    words = {word.strip() for text in texts for word in re.findall(_WORD, text)} - {""}
    return sorted({form for word in words for form in (word, f" {word}")})


def build_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A tokenizer in which every word of `texts`, and every number up to 99, is a single token."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    spelled = [
        byte_level.pre_tokenize_str(word)[0][0]
        for word in words_of([*texts, *map(str, range(100)), "user assistant system image"])
    ]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = [*SPECIAL, *alphabet, *(word for word in spelled if len(word) > 1)]
    tokenizer = Tokenizer(
        models.BPE({token: i for i, token in enumerate(dict.fromkeys(vocabulary))}, merges=[], ignore_merges=True)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(_WORD), "isolated"), byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        eos_token="<|im_end|>",
        clean_up_tokenization_spaces=False,
        extra_special_tokens={"image_token": "<|media_pad|>", "video_token": "<|kimi_k25_video_placeholder|>"},
        chat_template=CHAT_TEMPLATE,
    )
