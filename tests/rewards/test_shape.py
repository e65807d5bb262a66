"""The rewards of form: tags, language, repetition, tools."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rlvlm_rewards import Failure, InvalidReward, Sample, Score, load_reward


def score(name: str, completion: str, thinking: bool = False, **options: Any) -> Score:
    return asyncio.run(load_reward(name, **options)(Sample(completion, "", thinking=thinking)))


def value(name: str, completion: str, thinking: bool = False, **options: Any) -> float | None:
    return score(name, completion, thinking, **options).value


@pytest.mark.parametrize(
    ("completion", "thinking", "in_form"),
    [
        ("<think>7 + 5</think>12", False, 1.0),
        (" <think>7 + 5</think> it is 12", False, 1.0),
        ("7 + 5</think>12", True, 1.0),
        ("7 + 5</think>12", False, 0.0),  # never opened
        ("<think>7</think>12", True, 0.0),  # opened twice: by the prompt, and here
        ("7 + 5", True, 0.0),
        ("<think>7</think>", False, 0.0),  # no answer
        ("<think> </think>12", False, 0.0),  # no thought
        ("first <think>7</think>12", False, 0.0),
        ("<think>7</think>12</think>", False, 0.0),
        ("<think>7</think><think>8</think>12", False, 0.0),
        ("</think>7<think>12", False, 0.0),
        ("", False, 0.0),
        ("", True, 0.0),
    ],
)
def test_a_thought_and_an_answer(completion: str, thinking: bool, in_form: float) -> None:
    assert value("format", completion, thinking) == in_form


@pytest.mark.parametrize(
    ("completion", "in_form"),
    [
        ("<think>a</think><answer>12</answer>", 1.0),
        ("<think>a</think>\n<answer>12</answer>\n", 1.0),
        ("<think>a</think> so <answer>12</answer>", 0.0),
        ("<think>a</think><answer>12</answer> more", 0.0),
        ("<answer>12</answer><think>a</think>", 0.0),
        ("<think>a<answer>12</answer></think>", 0.0),
        ("<think>a</think><answer>12</answer><answer>13</answer>", 0.0),
        ("<think>a</think><answer></answer>", 0.0),
    ],
)
def test_tags_in_order(completion: str, in_form: float) -> None:
    assert value("format", completion, tags=["think", "answer"]) == in_form


def test_regular_expressions() -> None:
    assert value("format", "<think>a</think>12", answer=r"\d+") == 1.0
    assert value("format", "<think>a</think>\\boxed{12}", answer=r"\d+") == 1.0
    assert value("format", "<think>a</think>12 m", answer=r"\d+") == 0.0
    assert value("format", "<think>a\nb</think>\\boxed{1}", pattern=r"<think>.*</think>\\boxed\{.*\}") == 1.0
    assert value("format", "<think>a\nb</think>1", pattern=r"<think>.*</think>\\boxed\{.*\}") == 0.0


def test_an_expression_that_never_ends_is_a_failure_in_time() -> None:
    start = time.perf_counter()
    result = score("format", "<think>a</think>" + "a" * 5000 + "c", answer="(a|aa)+b")
    assert result.failure is Failure.TIMEOUT and "nested repetition" in result.detail
    assert time.perf_counter() - start < 2


@pytest.mark.parametrize(
    ("text", "scripts", "share"),
    [
        ("seven and five", ["Latin"], 1.0),
        ("семь", ["Latin"], 0.0),
        ("ab вг", ["Latin"], 0.5),
        ("ab вг", ["Latin", "Cyrillic"], 1.0),
        ("答案是 x", ["Han"], 0.75),
        ("これは答え", ["Han", "Hiragana"], 1.0),
        ("<think>答</think> \\boxed{12}", ["Han"], 1.0),  # markup is of no language
        ("12 + 5 = 17", ["Han"], 1.0),
        ("ﬁnd é", ["Latin"], 1.0),
        (" \n", ["Latin"], 0.0),
        ("", ["Latin"], 0.0),
    ],
)
def test_the_share_of_letters_in_a_script(text: str, scripts: list[str], share: float) -> None:
    assert value("language", text, scripts=scripts) == share


@pytest.mark.parametrize(
    ("text", "ngram", "expected"),
    [
        ("a b c d e", 3, 1.0),  # abc bcd cde
        ("a b a b a b", 3, 0.5),  # aba bab aba bab
        ("a a a a", 2, 1 / 3),
        ("A a", 1, 0.5),
        ("a b", 3, 1.0),  # no n-gram
        ("", 3, 1.0),
        ("ha" * 64, 1, 1 / 8),  # 128 letters: 8 pieces of 16, all alike
    ],
)
def test_the_share_of_different_n_grams(text: str, ngram: int, expected: float) -> None:
    assert value("repetition", text, ngram=ngram) == expected


@pytest.mark.parametrize(
    ("text", "called"),
    [
        ('<tool_call>{"name": "zoom", "arguments": {}}</tool_call>', 1.0),
        ('<tool_call>junk</tool_call> <tool_call>\n{"name": "zoom"}\n</tool_call>', 1.0),
        ('<|tool_call_begin|>functions.zoom:0<|tool_call_argument_begin|>{"x": 1}<|tool_call_end|>', 1.0),
        ("<|tool_call_begin|>functions.zoom:0<|tool_call_argument_begin|>no<|tool_call_end|>", 0.0),
        ('<tool_call>{"name": "zoom"}', 0.0),
        ('{"name": "zoom"}', 0.0),
        ("<tool_call></tool_call>" * 3, 0.0),
        ('<tool_call>{"name": ""}</tool_call>', 0.0),
        ('<tool_call>["name"]</tool_call>', 0.0),
        ("<tool_call>" + "[" * 100_000 + "</tool_call>", 0.0),
        ("", 0.0),
    ],
)
def test_a_well_formed_call(text: str, called: float) -> None:
    assert value("tool_bonus", text) == called
    assert value("tool_bonus", text, tools=["zoom", "crop"]) == called
    assert value("tool_bonus", text, tools=["crop"]) == 0.0


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("format", {"tags": []}, "tags is []; give a list"),
        ("format", {"tags": "think"}, "tags is 'think'; give a list"),
        ("format", {"tags": ["think", "think"]}, "different names"),
        ("format", {"tags": ["<think>"]}, "different names"),
        ("format", {"answer": "("}, "answer is '('; give a regular expression"),
        ("format", {"patern": "a"}, "has no option 'patern'; did you mean 'pattern'"),
        ("language", {}, "option 'scripts' is missing"),
        ("language", {"scripts": ["Latn", "Klingon"]}, "give names of Unicode scripts"),
        ("language", {"scripts": "Latin"}, "scripts is 'Latin'; give a list"),
        ("repetition", {"ngram": 0}, "ngram is 0; give 1 or more"),
        ("repetition", {"ngram": True}, "ngram is True; give a whole number"),
        ("tool_bonus", {"tools": "zoom"}, "tools is 'zoom'; give a list"),
    ],
)
def test_bad_options_are_refused_when_the_reward_is_loaded(name: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidReward) as caught:
        load_reward(name, **options)
    assert said in str(caught.value) and caught.value.option in {*options, "scripts"}


@given(text=st.text() | st.text(alphabet='<>/think answer{}[]"tool_call\\'), thinking=st.booleans())
def test_any_text_gets_a_score(text: str, thinking: bool) -> None:
    for name, options in (("format", {}), ("language", {"scripts": ["Latin"]}), ("repetition", {}), ("tool_bonus", {})):
        result = value(name, text, thinking, **options)
        assert result is not None and 0.0 <= result <= 1.0


@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=12), st.integers(1, 4))
def test_repetition_by_another_formula(words: list[str], ngram: int) -> None:
    grams = ["".join(words)[i : i + ngram] for i in range(len(words) - ngram + 1)]
    expected = len(set(grams)) / len(grams) if grams else 1.0
    assert value("repetition", " ".join(words), ngram=ngram) == expected
