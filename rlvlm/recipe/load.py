"""From a recipe file and overrides to a checked `Recipe`, and back to a file."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from rlvlm.recipe import keys, yaml12
from rlvlm.recipe.errors import ABSENT, RecipeError
from rlvlm.recipe.schema import Recipe

_KEY = re.compile(r"[^.\[\]\s=]+(?:\.[^.\[\]\s=]+|\[[0-9]+\])*")
_PART = re.compile(r"[^.\[\]]+")


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in the YAML file `path` with overrides laid over it: `a.b.c=value`, the value in YAML, later ones win.

    Raises RecipeError with everything that is wrong with it.
    """
    data = _read(Path(path))
    for override in overrides:
        _lay_over(data, override)
    return recipe_from(data)


def recipe_from(data: Mapping[str, Any]) -> Recipe:
    """The recipe in plain data (dict, list, str, int, float, bool, None). Raises RecipeError."""
    try:
        # JSON mode is strict about types and yet takes lists for tuples.
        return Recipe.model_validate_json(json.dumps(data), strict=True)
    except ValidationError as error:
        raise RecipeError.of([_translated(data, detail) for detail in _causes(error.errors())]) from None


def save_recipe(recipe: Recipe, path: Path) -> None:
    """Writes every key, defaults included, as YAML that `load_recipe` reads back equal."""
    path.write_text(yaml12.dump(recipe.model_dump(mode="json")), encoding="utf-8")


def _read(path: Path) -> dict[str, Any]:
    try:
        data = yaml12.parse(path.read_bytes())
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise RecipeError("recipe", path, reason, "give the path of a recipe, a .yaml file") from None
    except yaml12.YamlError as error:
        where = f"line {error.line}, column {error.column}: " if error.line else ""
        raise RecipeError("recipe", path, f"{where}{error.problem}", error.mend) from None
    if not isinstance(data, dict):
        what = "is empty" if data is None else f"holds {keys.kind(data)}"
        raise RecipeError("recipe", path, what, "write lines `key: value`, or start from recipes/tiny_demo.yaml")
    return data


def _lay_over(data: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    key = key.strip()
    if not equals or not _KEY.fullmatch(key):
        raise RecipeError("override", override, "not of the form key=value", "write for example rl.prompts=16")
    try:
        value = yaml12.parse(text)
    except yaml12.YamlError as error:
        raise RecipeError(key, text, error.problem, f"if it is text, quote it: '{key}=\"{text}\"'") from None
    *sections, last = _PART.findall(key)
    node: Any = data
    path: list[str | int] = []
    for name in sections:
        part = _part(node, path, name, key, value)
        path.append(part)
        if isinstance(node, dict) and part not in node:
            # What is not in the file has its default, and the override changes one element of that. A section fills
            # in its own defaults, which may depend on what is given (rl.objective.preset).
            default = {} if keys.names(path) else (keys.schema_at(path) or {}).get("default", {})
            node[part] = copy.deepcopy(default)
        node = node[part]
    node[_part(node, path, last, key, value)] = value


def _part(node: Any, path: Sequence[str | int], name: str, key: str, value: Any) -> str | int:
    """`name` as a key of the section, or an index of the list, `node`, which stands at `path`."""
    here = keys.dotted(path)
    if isinstance(node, dict):
        return name
    if not isinstance(node, list):
        raise RecipeError(key, value, f"{here} is {yaml12.show(node)}, which has no parts", f"give {here} as a whole")
    if not name.isdecimal():
        raise RecipeError(key, value, f"{here} is a list", f"say which element: {here}[0].{name}")
    if int(name) >= len(node):
        count = "1 element" if len(node) == 1 else f"{len(node)} elements"
        raise RecipeError(key, value, f"{here} has {count}, counted from 0", f"give {here} as a whole to add one")
    return int(name)


def _causes(details: Sequence[Any]) -> list[Any]:
    """Without those that only follow from others: a list whose elements are wrong also counts as too short."""
    places = [detail["loc"] for detail in details]
    return [
        detail
        for detail in details
        if not any(len(place) > len(detail["loc"]) and place[: len(detail["loc"])] == detail["loc"] for place in places)
    ]


def _translated(data: Mapping[str, Any], detail: Any) -> RecipeError:
    """pydantic's error in words that name the key, the value and the mend."""
    path = [part for part in detail["loc"] if part != "[key]"]
    value = _value_at(data, path)
    if detail["type"] == "extra_forbidden":
        return _unknown_key(path, value)
    if value is ABSENT and isinstance(path[-1], int):  # too few elements in a list of fixed length
        path = path[:-1]
        value = _value_at(data, path)
    schema = keys.schema_at(path) or {}
    key, wanted = keys.dotted(path), keys.expected(schema)
    if value is ABSENT:
        return RecipeError(key, ABSENT, "missing", f"give {wanted}")
    if "enum" in schema:
        return RecipeError(key, value, "not one of the choices", f"give {wanted}")
    if not keys.fits(value, schema):
        return RecipeError(key, value, *_wrong_type(value, wanted, key, optional="default" in schema))
    return RecipeError(key, value, *_wrong_value(value, wanted))


def _value_at(data: Any, path: Sequence[str | int]) -> Any:
    for part in path:
        there = part in range(len(data)) if isinstance(data, list) else isinstance(data, dict) and part in data
        if not there:
            return ABSENT
        data = data[part]
    return data


def _unknown_key(path: Sequence[str | int], value: Any) -> RecipeError:
    near = keys.meant(path)
    section = keys.dotted(path[:-1])
    if near:
        mend = f"did you mean {' or '.join(near)}?"
    else:
        mend = f"{section or 'a recipe'} has the keys {', '.join(keys.names(path[:-1]))}"
    return RecipeError(keys.dotted(path), value, "no such key", mend)


def _wrong_type(value: Any, wanted: str, key: str, optional: bool) -> tuple[str, str]:
    if value is None and wanted.startswith("a section"):
        return "the section is empty", (f"leave out `{key}`, or give " if optional else "give ") + wanted
    if isinstance(value, str) and "number" in wanted and yaml12.NUMBER.fullmatch(re.sub("[_,]", "", value)):
        marks = "the quotes" if yaml12.NUMBER.fullmatch(value) else "the separators"
        return f"with {marks} this is text", f"give {wanted}, without {marks}"
    if isinstance(value, float) and value.is_integer() and wanted.startswith("a whole number"):
        return "this is a number with a fraction", f"give {int(value)}"
    return f"this is {keys.kind(value)}", f"give {wanted}"


def _wrong_value(value: Any, wanted: str) -> tuple[str, str]:
    match value:
        case [] | {} | "":
            return "empty", f"give {wanted}"
        case list():
            return f"this has {len(value)} element{'' if len(value) == 1 else 's'}", f"give {wanted}"
        case str():
            return "not a valid name", f"give {wanted}"
        case _:
            return "out of range", f"give {wanted}"
