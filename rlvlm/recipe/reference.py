"""Every key of a recipe as a page, from the schema: `python -m rlvlm.recipe.reference > docs/recipe.md`."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any, get_args, get_origin

from pydantic.fields import FieldInfo

from rlvlm.recipe import keys, yaml12
from rlvlm.recipe.schema import Recipe, Section

_HEAD = """\
# Recipe keys

Written by `python -m rlvlm.recipe.reference` from `rlvlm/recipe/schema.py`; change it there. `rlvlm check RECIPE`
prints a recipe with every key. On the command line a key is dotted, and elements of lists count from 0:
`tasks.train[0].weight=2`.
"""

Path = tuple[str | int, ...]


def reference() -> str:
    """The page, in Markdown."""
    parts, told, told_again = [_HEAD], dict[type[Section], str](), set[str]()
    for path, section in _sections((), Recipe):
        title = keys.dotted(path).replace("[0]", "[]")
        same = told.setdefault(section, title)
        if same == title:
            parts.append(_part(path, section, title))
        elif keys.dotted(path[:-1]).replace("[0]", "[]") not in told_again:  # else what holds it is the same too
            parts.append(f"## `{title}`\n\nAs `{same}`.\n")
            told_again.add(title)
    return "\n".join(parts)


def _sections(path: Path, section: type[Section]) -> Iterator[tuple[Path, type[Section]]]:
    """(path, class) of every section, each before what it holds; elements of a list of sections as index 0, and of a
    section of sections as NAME."""
    yield path, section
    for name, field in section.model_fields.items():
        inner, part = _inner(field)
        if inner is not None:
            yield from _sections((*path, name) if part is None else (*path, name, part), inner)


def _inner(field: FieldInfo) -> tuple[type[Section] | None, str | int | None]:
    """The section that a key holds, if any, and under which part of the key where it holds several."""
    kinds = [field.annotation, *get_args(field.annotation)]
    inner = next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Section)), None)
    several: dict[Any, str | int] = {dict: keys.ANY_NAME, tuple: 0}  # neither is a section that may be null
    return inner, several.get(get_origin(field.annotation))


def _part(path: Path, section: type[Section], title: str) -> str:
    plain = {name: field for name, field in section.model_fields.items() if _is_row(field)}
    rows = [_row(path, name, field) for name, field in plain.items()]
    heading = f"## `{title}`" if title else "## The recipe itself"
    return "\n".join(
        [heading, "", inspect.getdoc(section) or "", "", "| key | value | default |", "|---|---|---|", *rows, ""]
    )


def _is_row(field: FieldInfo) -> bool:
    """Whether the key has a value of its own, and not only keys below it."""
    inner, part = _inner(field)
    return inner is None or part is not None


def _row(path: Path, name: str, field: FieldInfo) -> str:
    return f"| `{name}` | {keys.expected(keys.schema_at([*path, name]) or {})} | {_default(field)} |"


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.default
    if isinstance(value, tuple):
        value = [item.model_dump() if isinstance(item, Section) else item for item in value]
    return f"`{yaml12.show(value)}`"


if __name__ == "__main__":
    print(reference(), end="")
