"""Where a response's answer stands."""

from __future__ import annotations

import re

_OPEN, _CLOSE = "<think>", "</think>"
_BRACE = re.compile(r"\\boxed\{|\\[{}]|[{}]")  # an escaped brace matches so that it is passed over


def final_answer(completion: str, thinking: bool = False) -> str | None:
    """What a response answers: the content of the last `\\boxed{}` after the last `</think>`, or else all after it.

    thinking: the prompt ended with `<think>`, so a response without `</think>` never came to an answer. With False such
    a response is taken whole, unless it opens `<think>` itself.
    Returns None where there is no answer: thinking that never ended, or nothing after it.
    """
    _, closed, answer = completion.rpartition(_CLOSE)
    if _OPEN in answer or (thinking and not closed):
        return None
    boxed = _last_box(answer)
    return (answer if boxed is None else boxed).strip() or None


def _last_box(text: str) -> str | None:
    """The content of the `\\boxed{...}` that starts last among those whose braces balance.

    One pass: rescanning for every box would take minutes on a response that is nothing but open boxes.
    """
    opened: list[int | None] = []  # for each open brace: where a box's content starts, None for any other brace
    last: tuple[int, int] | None = None
    for brace in _BRACE.finditer(text):
        if brace[0].startswith("\\boxed"):
            opened.append(brace.end())
        elif brace[0] == "{":
            opened.append(None)
        elif brace[0] == "}" and opened:
            start = opened.pop()
            if start is not None and (last is None or start > last[0]):
                last = (start, brace.start())
    return text[last[0] : last[1]] if last else None
