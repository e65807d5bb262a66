"""The YAML of recipes: plain data only, with the scalars of YAML 1.2's core schema.

PyYAML alone follows YAML 1.1, where `off` is false and `1e-3` is text; here `off` is text and `1e-3` is a number. What
`dump` writes, `parse` reads back equal.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

# YAML 1.2.2, section 10.3.2.
_NULL = re.compile(r"~|null|Null|NULL|")
_BOOL = re.compile(r"true|True|TRUE|false|False|FALSE")
_INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
NUMBER = re.compile(
    r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
)
_TAG = "tag:yaml.org,2002:"
_SURROGATE = re.compile("[\ud800-\udfff]")
_MAX_DIGITS = 300


class YamlError(ValueError):
    """The text is not the YAML that recipes are written in. `line` and `column` count from 1; 0 where not known."""

    def __init__(self, problem: str, mend: str, line: int = 0, column: int = 0) -> None:
        super().__init__(problem)
        self.problem, self.mend, self.line, self.column = problem, mend, line, column


class _Core:
    """Mixed into loader and dumper: the dumper quotes exactly those texts that the loader takes for something else."""

    def resolve(self, kind: type[yaml.Node], value: str | None, implicit: tuple[bool, bool]) -> str:
        if kind is yaml.ScalarNode and implicit[0] and value is not None:
            for name, pattern in (("null", _NULL), ("bool", _BOOL), ("int", _INT), ("float", NUMBER)):
                if pattern.fullmatch(value):
                    return _TAG + name
        return _TAG + {yaml.ScalarNode: "str", yaml.SequenceNode: "seq", yaml.MappingNode: "map"}[kind]


class _Loader(_Core, yaml.SafeLoader):
    pass


class _Dumper(_Core, yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_list(dumper: yaml.SafeDumper, items: list[Any]) -> yaml.Node:
    flow = not any(isinstance(item, list | dict) for item in items)
    return dumper.represent_sequence(_TAG + "seq", items, flow_style=flow)


def _represent_str(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    # PyYAML loses line breaks of Unicode's own (U+0085) in every other style.
    return dumper.represent_scalar(_TAG + "str", text, style=None if text.isprintable() else '"')


def _represent_other(dumper: yaml.SafeDumper, value: object) -> yaml.Node:
    return dumper.represent_str(str(value))


class _Saver(_Dumper):
    """Quotes also what only YAML 1.1 takes for something else, like `off`: any parser reads a saved recipe right."""

    def resolve(self, kind: type[yaml.Node], value: str | None, implicit: tuple[bool, bool]) -> str:
        core = super().resolve(kind, value, implicit)
        return yaml.SafeDumper.resolve(self, kind, value, implicit) if core == _TAG + "str" else core


class _Shower(_Dumper):
    """For messages: one line, and what is not plain data (a path, say) as its text."""


_Dumper.add_representer(str, _represent_str)
_Saver.add_representer(list, _represent_list)
_Shower.add_representer(tuple, yaml.SafeDumper.represent_list)
_Shower.add_multi_representer(object, _represent_other)


def dump(data: Any) -> str:
    """Block-style YAML of plain data (dict, list, str, int, float, bool, None), keys in their order."""
    return yaml.dump(data, Dumper=_Saver, sort_keys=False, default_flow_style=False, allow_unicode=True, width=120)


def show(value: Any, limit: int = 100) -> str:
    """One short line that shows the value as one would write it in a recipe."""
    text = yaml.dump(value, Dumper=_Shower, sort_keys=False, default_flow_style=True, allow_unicode=True, width=1 << 20)
    line = " ".join(text.removesuffix("...\n").split())
    return line if len(line) <= limit else line[: limit - 3] + "..."


def parse(text: str | bytes) -> Any:
    """Plain data from one YAML document; an empty one is None.

    Raises YamlError for a syntax error, a key given twice or that is not text, a tag, a value that contains itself.
    """
    try:
        node = _Loader(text).get_single_node()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problem = str(error.problem or error.context).replace("but found", "found")
        where = (mark.line + 1, mark.column + 1) if mark else ()
        raise YamlError(problem, "check indentation, quotes and brackets there", *where) from error
    except yaml.reader.ReaderError as error:
        raise YamlError(str(error).splitlines()[0], f"it is character {error.position + 1}; save as UTF-8") from error
    return None if node is None else _plain(node, ())


def _plain(node: yaml.Node, inside: tuple[yaml.Node, ...]) -> Any:
    if node in inside:
        raise _error(node, "a value that contains itself", "leave out the alias")
    if isinstance(node, yaml.MappingNode) and node.tag == _TAG + "map":
        return _mapping(node, (*inside, node))
    if isinstance(node, yaml.SequenceNode) and node.tag == _TAG + "seq":
        return [_plain(item, (*inside, node)) for item in node.value]
    if isinstance(node, yaml.ScalarNode):
        return _scalar(node)
    raise _unknown_tag(node)


def _mapping(node: yaml.MappingNode, inside: tuple[yaml.Node, ...]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key_node, value_node in node.value:
        key = _scalar(key_node) if isinstance(key_node, yaml.ScalarNode) else None
        if not isinstance(key, str):
            raise _error(key_node, "a key that is not text", "put it in quotes")
        if key in result:
            raise _error(key_node, f"the key `{key}` is given twice", "keep one of the two")
        result[key] = _plain(value_node, inside)
    return result


def _scalar(node: yaml.ScalarNode) -> Any:
    value: str = node.value
    match node.tag.removeprefix(_TAG):
        case "null" if _NULL.fullmatch(value):
            return None
        case "bool" if _BOOL.fullmatch(value):
            return value.lower() == "true"
        case "int" if _INT.fullmatch(value):
            return _int(node, value)
        case "float" if NUMBER.fullmatch(value):
            return _float(value)
        case "str" if not _SURROGATE.search(value):
            return value
        case "str":
            raise _error(node, "half of a surrogate pair is not a character", "write the character itself")
    raise _unknown_tag(node)


def _unknown_tag(node: yaml.Node) -> YamlError:
    return _error(node, f"the tag {node.tag.replace(_TAG, '!!')} does not belong here", "leave it out")


def _int(node: yaml.ScalarNode, value: str) -> int:
    if len(value) > _MAX_DIGITS:  # Python itself refuses from 4,300 digits on
        raise _error(node, f"a number of {len(value)} digits", "if it is text, quote it")
    base = {"0o": 8, "0x": 16}.get(value[:2], 10)
    return int(value[2:] if base != 10 else value, base)


def _float(value: str) -> float:
    return float(value.lower().replace(".inf", "inf").replace(".nan", "nan"))


def _error(node: yaml.Node, problem: str, mend: str) -> YamlError:
    return YamlError(problem, mend, node.start_mark.line + 1, node.start_mark.column + 1)
