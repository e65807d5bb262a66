"""The text of a prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def prompt_text(messages: Sequence[Mapping[str, Any]]) -> str:
    """The texts of all messages, a line each; pictures and what else is no text are left out."""
    texts: list[str] = []
    for message in messages:
        content = message.get("content")
        parts = [{"text": content}] if isinstance(content, str) else content or ()
        texts += (part["text"] for part in parts if isinstance(part, Mapping) and isinstance(part.get("text"), str))
    return "\n".join(texts)
