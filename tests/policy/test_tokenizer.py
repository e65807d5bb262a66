"""Words are tokens, everything else is bytes, and the chat format is the one of the published models."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from rlvlm.policy.tokenizer import SPECIAL, build_tokenizer, words_of

_TEXTS = ["What is the sum of digits ?", "a1 : 7 ; ünïcödé 数字 (x+1)", "it's\n\ttabbed  twice"]
_WORDS = [
    "What",
    "is",
    "the",
    "sum",
    "of",
    "digits",
    "?",
    "a1",
    ":",
    "7",
    ";",
    "ünïcödé",
    "数字",
    "(x+1)",
    "it's",
    "tabbed",
    "twice",
]
_MESSAGES = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "sum ?"}, {"type": "image"}]},
]


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(_TEXTS)


def _ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("word", [*_WORDS, *map(str, range(100)), "user", "assistant", "system", "image"])
def test_a_known_word_is_one_token_with_and_without_a_leading_blank(tokenizer, word):
    plain, spaced = _ids(tokenizer, word), _ids(tokenizer, f" {word}")
    assert (len(plain), len(spaced)) == (1, 1)
    assert plain != spaced
    assert tokenizer.decode(plain) == word and tokenizer.decode(spaced) == f" {word}"


# Letters, marks, numbers, punctuation and symbols of every script; Python and the tokenizer split at the same blanks.
_WORD = st.text(st.characters(exclude_categories=("C", "Z")), min_size=1, max_size=12).filter(
    lambda word: not any(mark in word for mark in SPECIAL)
)


@settings(max_examples=40, deadline=None)
@given(st.lists(_WORD, min_size=1, max_size=8))
def test_whatever_the_words_are_each_is_one_token(words):
    tokenizer = build_tokenizer([" ".join(words)])
    text = " ".join(words)
    assert len(_ids(tokenizer, text)) == len(words)
    assert tokenizer.decode(_ids(tokenizer, text)) == text


def test_an_unknown_word_is_spelled_in_utf8_bytes(tokenizer):
    assert len(_ids(tokenizer, "zq")) == 2
    assert len(_ids(tokenizer, " zq")) == 3
    assert len(_ids(tokenizer, "é€")) == 2 + 3
    assert len(_ids(tokenizer, "100")) == 3  # numbers up to 99 are words


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.characters(exclude_categories=("Cs",)), max_size=60))
def test_any_text_comes_back_as_it_went_in(tokenizer, text):
    assert tokenizer.decode(_ids(tokenizer, text)) == text


def test_the_vocabulary_is_a_function_of_the_words_alone():
    texts = list(_TEXTS)
    random.Random(3).shuffle(texts)
    again = build_tokenizer([*texts, *texts])
    assert again.get_vocab() == build_tokenizer(_TEXTS).get_vocab()
    # specials, bytes, each word and number twice; of one-character words only the form with a blank is not a byte
    words = {*_WORDS, *map(str, range(100)), "user", "assistant", "system", "image"}
    short = {word for word in words if len(word.encode()) == 1}
    assert len(again) == 13 + 256 + 2 * len(words) - len(short)


def test_words_are_split_at_blanks_of_any_kind():
    assert words_of(["b a", "a\n\tc  "]) == [" a", " b", " c", "a", "b", "c"]


@pytest.mark.parametrize("mark", SPECIAL)
def test_a_special_is_one_token_wherever_it_stands(tokenizer, mark):
    (mark_id,) = _ids(tokenizer, mark)
    assert mark_id == SPECIAL.index(mark)
    assert _ids(tokenizer, f"sum{mark}sum") == [*_ids(tokenizer, "sum"), mark_id, *_ids(tokenizer, "sum")]


def test_end_of_turn_and_padding(tokenizer):
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 1)
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<|pad|>", "<|im_end|>")


def test_chat_template_letter_by_letter(tokenizer):
    picture = "<|media_begin|>image<|media_content|><|media_pad|><|media_end|>"
    turns = (
        "<|im_system|>system<|im_middle|>be brief<|im_end|>"
        f"<|im_user|>user<|im_middle|>{picture}sum ?{picture}<|im_end|>"
    )
    assert tokenizer.apply_chat_template(_MESSAGES, tokenize=False) == turns
    prompted = tokenizer.apply_chat_template(_MESSAGES, tokenize=False, add_generation_prompt=True)
    assert prompted == f"{turns}<|im_assistant|>assistant<|im_middle|><think>"


def test_a_past_answer_is_rendered_as_a_turn(tokenizer):
    messages = [{"role": "user", "content": "sum ?"}, {"role": "assistant", "content": "7"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == (
        "<|im_user|>user<|im_middle|>sum ?<|im_end|><|im_assistant|>assistant<|im_middle|>7<|im_end|>"
    )


def test_a_saved_tokenizer_gives_the_same_ids(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = tokenizer.apply_chat_template(_MESSAGES, tokenize=False, add_generation_prompt=True) + " 7 ; zq é</think>7"
    assert _ids(loaded, text) == _ids(tokenizer, text)
    assert loaded.apply_chat_template(_MESSAGES, tokenize=False) == tokenizer.apply_chat_template(
        _MESSAGES, tokenize=False
    )
    assert (loaded.pad_token_id, loaded.eos_token_id, loaded.image_token) == (0, 1, "<|media_pad|>")
