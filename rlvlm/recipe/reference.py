"""Every key of a recipe as a page, from the schema: `python -m rlvlm.recipe.reference > docs/recipe.md`."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import get_args

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
    parts, told = [_HEAD], dict[type[Section], str]()
    for path, section in _sections((), Recipe):
        title = keys.dotted(path).replace("[0]", "[]")
        same = told.setdefault(section, title)
        if same == title:
            parts.append(_part(path, section, title))
        elif title.endswith("[]"):  # what it holds is the same too
            parts.append(f"## `{title}`\n\nAs `{same}`.\n")
    return "\n".join(parts)


def _sections(path: Path, section: type[Section]) -> Iterator[tuple[Path, type[Section]]]:
    """(path, class) of every section, each before what it holds; elements of a list of sections as index 0."""
    yield path, section
    for name, field in section.model_fields.items():
        inner, is_list = _inner(field)
        if inner is not None:
            yield from _sections((*path, name, 0) if is_list else (*path, name), inner)


def _inner(field: FieldInfo) -> tuple[type[Section] | None, bool]:
    """The section that a key holds, if any, and whether it holds a list of them."""
    kinds = [field.annotation, *get_args(field.annotation)]
    inner = next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Section)), None)
    return inner, inner is not field.annotation


def _part(path: Path, section: type[Section], title: str) -> str:
    plain = {name: field for name, field in section.model_fields.items() if _inner(field)[1]}
    rows = [_row(path, name, field) for name, field in plain.items()]
    heading = f"## `{title}`" if title else "## The recipe itself"
    return "\n".join(
        [heading, "", inspect.getdoc(section) or "", "", "| key | value | default |", "|---|---|---|", *rows, ""]
    )


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
