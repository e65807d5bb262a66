"""From a response to the program in it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

_OPEN, _CLOSE = "<think>", "</think>"
_FENCE = re.compile(r"([ \t]*)(`{3,}|~{3,})(.*)")
_VERSION = re.compile(r"[0-9.]+$")  # python3, c++17
_CLOSING_INDENT = 3  # CommonMark: a fence that stands further right is the block's own text (an example in a docstring)

# What a fence's tag may call each language that the sandbox runs, in small letters and without a version.
LANGUAGES: Mapping[str, frozenset[str]] = MappingProxyType(
    {
        "python": frozenset({"python", "py", "pypy"}),
        "cpp": frozenset({"cpp", "c++", "cc", "cxx"}),
        "javascript": frozenset({"javascript", "js", "node"}),
        "bash": frozenset({"bash", "sh", "shell"}),
    }
)


@dataclass(frozen=True, slots=True)
class Program:
    """What a response gives as its program. fenced: it stood in a fenced block; else it is all of the answer, which
    may just as well be prose."""

    source: str
    fenced: bool


def extract(completion: str, thinking: bool = False, language: str = "python") -> Program | None:
    """The program of a response: the last fenced block of the language after the last `</think>`; where no block names
    the language, the last one that names none; where there is no fence at all, all of the answer.

    A block that is not closed ends with the response, as in CommonMark; blank blocks are passed over. `\\boxed{}` means
    nothing here: programs may print it. thinking: the prompt opened `<think>` itself.
    Returns None where there is none: thinking that never ended, no answer, only blocks of other languages.
    """
    _, closed, answer = completion.rpartition(_CLOSE)
    prose = answer.partition("```")[0]  # a program may have the tag in its text
    if (thinking and not closed) or _OPEN in prose or not answer.strip():
        return None
    blocks = list(_blocks(answer))
    if not blocks:
        return Program(answer, fenced=False)
    for wanted in (LANGUAGES[language], {""}):
        sources = [source for tag, source in blocks if tag in wanted and source.strip()]
        if sources:
            return Program(sources[-1], fenced=True)
    return None


def _blocks(text: str) -> Iterator[tuple[str, str]]:
    """Each fenced block: (tag, source). A block in a list is indented; so much is taken off its lines."""
    fence: re.Match[str] | None = None
    lines: list[str] = []
    for line in text.replace("\r\n", "\n").split("\n"):
        match = _FENCE.fullmatch(line)
        if fence is None:
            fence = match if match and not (match[2][0] == "`" and "`" in match[3]) else None
        elif match and _closes(match, fence):
            yield _tag(fence), "\n".join(lines)
            fence, lines = None, []
        else:
            lines.append(_dedented(line, len(fence[1])))
    if fence is not None:
        yield _tag(fence), "\n".join(lines)


def _closes(match: re.Match[str], fence: re.Match[str]) -> bool:
    return (
        match[2].startswith(fence[2])
        and not match[3].strip()
        and len(match[1].expandtabs(4)) <= len(fence[1].expandtabs(4)) + _CLOSING_INDENT
    )


def _tag(fence: re.Match[str]) -> str:
    words = fence[3].split()
    return _VERSION.sub("", words[0].lower()) if words else ""


def _dedented(line: str, indent: int) -> str:
    blanks = len(line) - len(line.lstrip(" \t"))
    return line[min(blanks, indent) :]
