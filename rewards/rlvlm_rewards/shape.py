"""Rewards of form: tags, language, repetition, use of tools. None says whether the answer is right, so each belongs
beside one that does."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import regex

from rlvlm_rewards.answers import final_answer
from rlvlm_rewards.records import Failure, Sample, Score
from rlvlm_rewards.reward import bonus, form, inline

_PATTERN_S = 0.1
_MARKUP = regex.compile(r"</?[A-Za-z_]+>|\\[A-Za-z]+")  # tags and TeX commands are of no language
_LONGEST_WORD = 16
_CALLS = (("<tool_call>", "</tool_call>"), ("<|tool_call_begin|>", "<|tool_call_end|>"))
_KIMI_ARGUMENTS = "<|tool_call_argument_begin|>"


@form
@inline
@dataclass(frozen=True, slots=True)
class Format:
    """1 for a response in form, else 0: each tag is opened and closed exactly once, in order, none within another, none
    empty, and nothing but white space lies between them.

    tags: after a last tag `think` follows the answer, which is not empty; after any other nothing follows. A `<think>`
    that the prompt opened counts. pattern, answer: regular expressions that the whole response (from `<think>` on) and
    the final answer match from end to end, in 0.1 s at most: an expression that takes longer is a failure (timeout).
    Raises ValueError for no tag or a doubled one, and for what is no regular expression.
    """

    tags: Sequence[str] = ("think",)
    pattern: str | None = None
    answer: str | None = None

    def __post_init__(self) -> None:
        names_are_words = all(isinstance(tag, str) and regex.fullmatch(r"[A-Za-z_]\w*", tag) for tag in self.tags)
        if isinstance(self.tags, str) or not self.tags or not names_are_words or len(set(self.tags)) < len(self.tags):
            raise ValueError(f"tags is {self.tags!r}; give a list of different names, like [think, answer]")
        for name in ("pattern", "answer"):
            try:
                regex.compile(getattr(self, name) or "")
            except regex.error as error:
                raise ValueError(f"{name} is {getattr(self, name)!r}; give a regular expression ({error})") from error

    def __call__(self, sample: Sample) -> Score:
        opened = sample.thinking and self.tags[0] == "think"
        response = f"<think>{sample.completion}" if opened else sample.completion
        answer = final_answer(sample.completion, sample.thinking) or ""
        try:
            matches = _matches(self.pattern, response) and _matches(self.answer, answer)
        except TimeoutError:
            detail = f"an expression of this format took longer than {_PATTERN_S} s; write it without nested repetition"
            return Score(failure=Failure.TIMEOUT, detail=detail)
        return Score(value=float(matches and self._tags_in_order(response)))

    def _tags_in_order(self, response: str) -> bool:
        rest = response
        for tag in self.tags:
            if response.count(f"<{tag}>") != 1 or response.count(f"</{tag}>") != 1:
                return False
            before, opened, inside = rest.partition(f"<{tag}>")
            inside, closed, rest = inside.partition(f"</{tag}>")
            if before.strip() or not opened or not closed or not inside.strip():
                return False
        return bool(rest.strip()) == (self.tags[-1] == "think")


def _matches(pattern: str | None, text: str) -> bool:
    return pattern is None or regex.fullmatch(pattern, text, flags=regex.DOTALL, timeout=_PATTERN_S) is not None


@form
@inline
@dataclass(frozen=True, slots=True)
class Language:
    """The share of the response's letters that are in the wanted scripts; 1 where it has no letters, 0 where it is
    empty. Tags, TeX commands and letters of no script (mathematical ones) do not count.

    scripts: Unicode's names, like Latin, Han, Cyrillic. Raises ValueError for none, or one that is not known.
    """

    scripts: Sequence[str]

    def __post_init__(self) -> None:
        if isinstance(self.scripts, str) or not self.scripts:
            raise ValueError(f"scripts is {self.scripts!r}; give a list of Unicode scripts, like [Latin]")
        for script in self.scripts:
            try:
                _of_script("a", script)
            except regex.error:
                raise ValueError(f"scripts is {self.scripts!r}; give names of Unicode scripts, like Latin") from None

    def __call__(self, sample: Sample) -> float:
        if not sample.completion.strip():
            return 0.0
        letters = Counter(_MARKUP.sub("", sample.completion))
        wanted = counted = 0
        for letter, count in letters.items():
            if letter.isalpha() and not _of_script(letter, "Common"):
                counted += count
                wanted += count * any(_of_script(letter, script) for script in self.scripts)
        return wanted / counted if counted else 1.0


@cache
def _of_script(letter: str, script: str) -> bool:
    return regex.match(rf"\p{{Script={script}}}", letter) is not None


@form
@inline
@dataclass(frozen=True, slots=True)
class Repetition:
    """The share of different n-grams among all n-grams of words: 1 where nothing comes again; the repetition penalty of
    Yeo et al. (arXiv 2502.03373) as Open-R1 computes it, plus 1.

    Words are what white space separates, in lower case; longer than 16 characters (a script without blanks, or noise)
    they are cut. ngram: words. Raises ValueError for less than 1.
    """

    ngram: int = 3

    def __post_init__(self) -> None:
        if self.ngram < 1:
            raise ValueError(f"ngram is {self.ngram}; give 1 or more words")

    def __call__(self, sample: Sample) -> float:
        words = [
            word[start : start + _LONGEST_WORD]
            for word in sample.completion.lower().split()
            for start in range(0, len(word), _LONGEST_WORD)
        ]
        total = len(words) - self.ngram + 1
        different = len(set(zip(*(words[shift:] for shift in range(self.ngram)), strict=False)))
        return different / total if total > 0 else 1.0


@bonus
@form
@inline
@dataclass(frozen=True, slots=True)
class ToolBonus:
    """1 if the response calls a tool, else 0. In a composition it is paid only when the rest is right: an unconditional
    bonus breeds calls for their own sake, and none lets the use of tools die out (DeepEyes, arXiv 2505.14362).

    A call is JSON with a `name` between `<tool_call>` and `</tool_call>`, or Kimi's `<|tool_call_begin|>
    functions.NAME:0<|tool_call_argument_begin|>{...}<|tool_call_end|>`. tools: the names that count; none for all.
    Raises ValueError for names that are no texts.
    """

    tools: Sequence[str] = field(default=())

    def __post_init__(self) -> None:
        if isinstance(self.tools, str) or not all(isinstance(tool, str) for tool in self.tools):
            raise ValueError(f"tools is {self.tools!r}; give a list of names")

    def __call__(self, sample: Sample) -> float:
        called = (name for name in _called(sample.completion) if name is not None)
        return float(any(not self.tools or name in self.tools for name in called))


def _called(text: str) -> Iterator[str | None]:
    for opened, closed in _CALLS:
        start = text.find(opened)
        while start >= 0:
            end = text.find(closed, start)
            if end < 0:
                break
            yield _tool(text[start + len(opened) : end])
            start = text.find(opened, end)


def _tool(call: str) -> str | None:
    """The name of the tool that a well-formed call asks for."""
    head, kimi, arguments = call.partition(_KIMI_ARGUMENTS)
    try:
        read: Any = json.loads(arguments if kimi else head)
    except (ValueError, RecursionError):
        return None
    if not isinstance(read, dict):
        return None
    name = head.strip().removeprefix("functions.").partition(":")[0] if kimi else read.get("name")
    return name if isinstance(name, str) and name else None
