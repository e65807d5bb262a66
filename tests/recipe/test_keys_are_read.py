"""A key that no code reads is a promise that nobody keeps.

Read means: somewhere in rlvlm/, outside the recipe itself and the preflight (which only checks), the key is taken off
its section by name, as in `recipe.rl.temperature`, `rl.temperature` after `rl = recipe.rl`, or `options.temperature`
with `options: RL`; or off the saved copy, as in `saved["rl"]["temperature"]` or `setting("rl", "temperature")`.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import get_args

import pytest

import rlvlm
from rlvlm.recipe.schema import Recipe, Section

PACKAGE = Path(rlvlm.__file__).parent
ONLY_CHECKS = ("recipe", "preflight.py")
# Calls that hand on the sections they are given.
_HAND_ON = {"enumerate", "zip", "sorted", "reversed", "list", "tuple", "iter", "next", "chain", "replace"}

Key = tuple[type[Section], str]


def _sections_in(annotation: object) -> Iterator[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation
    for argument in get_args(annotation):
        yield from _sections_in(argument)


def leaves(section: type[Section], prefix: str = "") -> dict[str, Key]:
    """Dotted key -> (the section that has it, its name), for every key that holds a value."""
    found: dict[str, Key] = {}
    for name, field in section.model_fields.items():
        inner = list(_sections_in(field.annotation))
        for part in inner:
            found |= leaves(part, f"{prefix}{name}.")
        if not inner:
            found[f"{prefix}{name}"] = (section, name)
    return found


@cache
def _usual_names() -> dict[str, set[type[Section]]]:
    """What a section is called in code without further notice: its key, and its class in snake case."""
    usual: dict[str, set[type[Section]]] = {"recipe": {Recipe}}
    queue: list[type[Section]] = [Recipe]
    while queue:
        for name, field in queue.pop().model_fields.items():
            for section in _sections_in(field.annotation):
                snake = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", section.__name__).lower()
                for word in (name, snake):
                    usual.setdefault(word, set()).add(section)
                queue.append(section)
    return usual


class _Reader(ast.NodeVisitor):
    """Collects the keys that a module reads. Names are taken module-wide: a key is seldom missed, and a name that
    stands for two things counts for both."""

    def __init__(self) -> None:
        self.stands_for: dict[str, set[type[Section]]] = {}
        self.read: set[Key] = set()

    def sections(self, node: ast.expr) -> set[type[Section]]:
        match node:
            case ast.Name(id=name) | ast.Attribute(attr=name):
                return self.stands_for.get(name, set()) | _usual_names().get(name.lstrip("_"), set())
            case ast.Subscript(value=value) | ast.Starred(value=value) | ast.NamedExpr(value=value):
                return self.sections(value)
            case ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name), args=args) if name in _HAND_ON:
                return set().union(*map(self.sections, args))
            case ast.BoolOp(values=parts) | ast.Tuple(elts=parts) | ast.List(elts=parts):
                return set().union(*map(self.sections, parts))
            case ast.IfExp(body=body, orelse=other):
                return self.sections(body) | self.sections(other)
            case ast.BinOp(left=left, right=right):
                return self.sections(left) | self.sections(right)
        return set()

    def bind(self, target: ast.expr, value: ast.expr) -> None:
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple) and len(target.elts) == len(value.elts):
            for one, its in zip(target.elts, value.elts, strict=True):
                self.bind(one, its)
            return
        for part in ast.walk(target):
            self._stand(part, self.sections(value))

    def _stand(self, target: ast.AST, sections: set[type[Section]]) -> None:
        match target:
            case ast.Name(id=name) | ast.Attribute(attr=name) | ast.arg(arg=name) if sections:
                self.stands_for.setdefault(name, set()).update(sections)

    def _annotated(self, target: ast.AST, annotation: ast.expr | None) -> None:
        words = set(re.findall(r"\w+", ast.unparse(annotation))) if annotation else set()
        every = set().union(*_usual_names().values())
        self._stand(target, {section for section in every if section.__name__ in words})

    def visit_arg(self, node: ast.arg) -> None:
        self._annotated(node, node.annotation)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        self._annotated(node.target, node.annotation)
        self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> None:
        for target in node.targets:
            self.bind(target, node.value)
        self.generic_visit(node)

    def visit_For(self, node: ast.For) -> None:
        self.bind(node.target, node.iter)
        self.generic_visit(node)

    def visit_comprehension(self, node: ast.comprehension) -> None:
        self.bind(node.target, node.iter)
        self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if isinstance(node.ctx, ast.Load):
            sections = self.sections(node.value)
            self.read |= {(section, node.attr) for section in sections if node.attr in section.model_fields}
        self.generic_visit(node)

    def _by_path(self, path: list[str]) -> None:
        where = leaves(Recipe).get(".".join(path))
        self.read |= {where} if where else set()

    def visit_Subscript(self, node: ast.Subscript) -> None:
        path: list[str] = []
        part: ast.expr = node
        while isinstance(part, ast.Subscript) and isinstance(part.slice, ast.Constant):
            path.insert(0, str(part.slice.value))
            part = part.value
        if isinstance(node.ctx, ast.Load) and len(path) > 1:
            self._by_path(path)
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        if len(node.args) > 1:
            self._by_path([str(part.value) for part in node.args if isinstance(part, ast.Constant)])
        self.generic_visit(node)


def keys_read(source: str) -> set[Key]:
    reader, tree = _Reader(), ast.parse(source)
    for _ in range(2):  # a name may be used above the line that says what it stands for
        reader.visit(tree)
    return reader.read


def test_every_key_of_the_recipe_is_read() -> None:
    read: set[Key] = set()
    for path in PACKAGE.rglob("*.py"):
        if path.relative_to(PACKAGE).parts[0] not in ONLY_CHECKS:
            read |= keys_read(path.read_text(encoding="utf-8"))
    unread = [key for key, where in leaves(Recipe).items() if where not in read]
    assert not unread, (
        f"{len(unread)} keys of the recipe are read by no code in rlvlm/: {', '.join(unread)}. "
        "Use each where it belongs, or take it out of rlvlm/recipe/schema.py."
    )


@pytest.mark.parametrize(
    ("source", "key"),
    [
        ("recipe.rl.temperature", "rl.temperature"),
        ("self._recipe.rl.temperature", "rl.temperature"),
        ("def f(rl):\n return rl.temperature", "rl.temperature"),
        ("def f(options: RL | None):\n return options.temperature", "rl.temperature"),
        ("class A:\n options: schema.RL\n def f(self): return self.options.temperature", "rl.temperature"),
        ("options = recipe.rl\nprint(options.temperature)", "rl.temperature"),
        ("s, r = recipe.sft, recipe.rl\nr.temperature", "rl.temperature"),
        ("recipe.rl.length.gate", "rl.length.gate"),
        ("gate.tasks", "sft.gate.tasks"),
        ("recipe.tasks.train[0].weight", "tasks.train.weight"),
        ("for i, source in enumerate(recipe.tasks.train): source.weight", "tasks.train.weight"),
        ("[s.weight for s in (*tasks.train, *tasks.evaluation)]", "tasks.train.weight"),
        ("def f(columns): return columns.answer", "tasks.train.columns.answer"),
        ("policy.tiny.hidden", "policy.tiny.hidden"),
        ("def f(tiny: TinyPolicy): tiny.hidden", "policy.tiny.hidden"),
        ("recipe.seed", "seed"),
        ('saved["rl"]["temperature"]', "rl.temperature"),
        ('run.setting("rl", "temperature", default=1)', "rl.temperature"),
    ],
)
def test_ways_to_read_a_key(source: str, key: str) -> None:
    assert leaves(Recipe)[key] in keys_read(source)


@pytest.mark.parametrize(
    "source",
    [
        "# recipe.rl.temperature",
        "'recipe.rl.temperature'",
        "temperature",
        "recipe.temperature",
        "recipe.sft.temperature",
        "x.temperature",
        "recipe.rl",
        "recipe.rl.temperature = 1",
        "x['temperature']",
        "f('temperature')",
        "x['sft']['temperature']",
    ],
)
def test_what_does_not_read_it(source: str) -> None:
    assert leaves(Recipe)["rl.temperature"] not in keys_read(source)


def test_the_leaves_are_the_keys_that_hold_values() -> None:
    found = leaves(Recipe)
    assert {"name", "policy.tiny.hidden", "sft.phases.styles", "rl.betas", "tasks.train.columns.image"} <= set(found)
    assert not {"policy", "policy.tiny", "tasks.train", "rl.length", "sft.gate"} & set(found)
