"""What keys a recipe may have, in words: for messages, and for finding the key that was meant. Reads pydantic's JSON
schema of `Recipe`, so it cannot fall behind it."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

from rlvlm.recipe.schema import Recipe

Path = Sequence[str | int]
ANY_NAME = "NAME"  # stands for the names that a recipe gives itself, as in rewards.named.NAME.parts
_CLOSE = 0.8  # of difflib's ratio: one letter wrong in five
_SIMILAR = 0.6
_MOST_SUGGESTIONS = 3
_MOST_NAMES = 4  # of a section's keys, where they are only a reminder
_TYPES: dict[str, tuple[type, ...]] = {
    "boolean": (bool,),
    "integer": (int,),
    "number": (int, float),
    "string": (str,),
    "array": (list,),
    "object": (dict,),
}
_NAME_RULE = "letters, digits, `.`, `_` and `-`, starting with a letter or a digit"


def dotted(path: Path) -> str:
    """("tasks", "train", 0, "weight") -> "tasks.train[0].weight"."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


@cache
def _document() -> dict[str, Any]:
    return Recipe.model_json_schema()


def _resolved(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema itself where it is a reference, and its other branch where it may be null."""
    for branch in schema.get("anyOf", ()):
        if branch.get("type") != "null":
            return _resolved(branch)
    if "$ref" in schema:
        return _document()["$defs"][schema["$ref"].rsplit("/", 1)[1]]
    return schema


def _child(schema: dict[str, Any], part: str | int) -> dict[str, Any] | None:
    schema = _resolved(schema)
    if isinstance(part, int):
        prefix = schema.get("prefixItems", ())
        return prefix[part] if part < len(prefix) else schema.get("items")
    others = schema.get("additionalProperties") or None
    return schema.get("properties", {}).get(part, {} if others is True else others)


def schema_at(path: Path) -> dict[str, Any] | None:
    """The JSON schema of the value at `path`; None if no recipe can have such a key."""
    schema: dict[str, Any] | None = _document()
    for part in path:
        schema = None if schema is None else _child(schema, part)
    return schema


def names(path: Path) -> list[str]:
    """The keys of the section at `path`, in the schema's order; empty if it is no section."""
    schema = schema_at(path)
    return [] if schema is None else list(_resolved(schema).get("properties", {}))


def all_keys() -> list[str]:
    """Every key, dotted, sections before what they hold, elements of a list of sections as index 0, and of a
    section of sections as NAME."""
    return [dotted(path) for path in _walk((), _document()) if path]


def _walk(path: tuple[str | int, ...], schema: dict[str, Any]) -> Iterator[tuple[str | int, ...]]:
    yield path
    resolved = _resolved(schema)
    for name, child in resolved.get("properties", {}).items():
        yield from _walk((*path, name), child)
    for part, held in ((0, resolved.get("items")), (ANY_NAME, resolved.get("additionalProperties"))):
        if isinstance(held, dict) and "properties" in _resolved(held):
            yield from _walk((*path, part), held)


def expected(schema: dict[str, Any]) -> str:
    """What the value has to be, in words: "a whole number, at least 1"."""
    words = _expected(_resolved(schema))
    return f"{words}, or null" if any(branch.get("type") == "null" for branch in schema.get("anyOf", ())) else words


def _expected(schema: dict[str, Any]) -> str:
    if "enum" in schema:
        return one_of(schema["enum"])
    match schema.get("type"):
        case "boolean":
            return "true or false"
        case "integer":
            return "a whole number" + _bounds(schema)
        case "number":
            return "a number" + _bounds(schema)
        case "string":
            return _NAME_RULE if "pattern" in schema else "text"
        case "array":
            return _list(schema)
        case "object" if "properties" in schema:
            return f"a section ({_some(list(schema['properties']))})"
        case "object" if schema["additionalProperties"] is True:
            return "a section of names and values"
        case "object":
            return f"a section of names and values, each {expected(schema['additionalProperties'])}"
        case _:
            return "any value"


def one_of(choices: Sequence[Any]) -> str:
    """[1, 2, 3] -> "1, 2 or 3"."""
    *first, last = map(str, choices)
    return f"{', '.join(first)} or {last}" if first else last


def _some(section: Sequence[str]) -> str:
    more = ", ..." if len(section) > _MOST_NAMES else ""
    return f"{', '.join(section[:_MOST_NAMES])}{more}"


def _list(schema: dict[str, Any]) -> str:
    if "prefixItems" in schema:
        return f"a list of {len(schema['prefixItems'])}, each {expected(schema['prefixItems'][0])}"
    return f"a list{' of at least one' if schema.get('minItems') else ''}, each {expected(schema['items'])}"


def _bounds(schema: dict[str, Any]) -> str:
    low, high = schema.get("minimum"), schema.get("maximum")
    above, below = schema.get("exclusiveMinimum"), schema.get("exclusiveMaximum")
    if low is not None and high is not None:
        return f" from {_number(low)} to {_number(high)}"
    bounds = ((low, "of at least"), (above, "above"), (high, "at most"), (below, "below"))
    words = [f"{word} {_number(bound)}" for bound, word in bounds if bound is not None]
    return f" {' and '.join(words)}" if words else ""


def _number(bound: float) -> str:
    return str(int(bound)) if bound == int(bound) else str(bound)


def kind(value: object) -> str:
    """The type of plain data, in words."""
    match value:
        case None:
            return "null"
        case bool():
            return "true or false"
        case int():
            return "a whole number"
        case float():
            return "a number"
        case str():
            return "text"
        case dict():
            return "a section"
        case _:
            return "a list"


def fits(value: object, schema: dict[str, Any]) -> bool:
    """Whether the value has the schema's type (its bounds aside)."""
    wanted = _resolved(schema).get("type")
    if wanted is None:  # an option of a reward: the reward knows
        return True
    return isinstance(value, _TYPES[wanted]) and isinstance(value, bool) == (wanted == "boolean")


def meant(path: Path) -> list[str]:
    """The keys, dotted, that one may have meant by the unknown key at `path`; empty if none is near."""
    *section, name = path
    here = {dotted([*section, sibling]): sibling for sibling in names(section)}
    everywhere = {key: key.rsplit(".", 1)[-1] for key in all_keys() if not key.endswith("]")}
    searches = ((here, _CLOSE), (everywhere, 1.0), (here, _SIMILAR), (everywhere, _CLOSE))
    for candidates, cutoff in searches:
        close = difflib.get_close_matches(str(name).lower(), set(candidates.values()), _MOST_SUGGESTIONS, cutoff)
        # Within a section the best is enough; the same name elsewhere may stand in several sections, all as likely.
        near = [key for best in close[:1] for key, candidate in candidates.items() if candidate == best]
        if near:
            return near[:_MOST_SUGGESTIONS]
    return []
