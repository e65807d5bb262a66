"""The YAML of recipes against two independent readers: JSON, which YAML 1.2 contains, and PyYAML's own YAML 1.1."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from rlvlm.recipe.yaml12 import YamlError, dump, parse, show

_SCALARS = st.none() | st.booleans() | st.integers(-(10**30), 10**30) | st.floats(allow_nan=False)
_FINITE = st.none() | st.booleans() | st.integers(-(10**30), 10**30) | st.floats(allow_nan=False, allow_infinity=False)
_WORDS = st.sampled_from(
    ["off", "on", "yes", "no", "1e3", "1_000", "0o17", "010", "~", "", "<<", "=", "2024-01-01", "1:30"]
)


def _plain(scalars: st.SearchStrategy[Any], texts: st.SearchStrategy[str]) -> st.SearchStrategy[Any]:
    return st.recursive(
        scalars | texts,
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
        max_leaves=12,
    )


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("off", "off"), ("on", "on"), ("yes", "yes"), ("no", "no"), ("Off", "Off"), ("y", "y"),
        ("true", True), ("True", True), ("FALSE", False), ("tRue", "tRue"),
        ("1e-3", 0.001), ("1E3", 1000.0), ("-2.5e+1", -25.0), (".5", 0.5), ("5.", 5.0), ("-.inf", -math.inf),
        ("12", 12), ("-3", -3), ("+3", 3), ("010", 10), (".e3", ".e3"),
        ("0o17", 15), ("0xFf", 255), ("-0x1", "-0x1"), ("1_000", "1_000"),
        ("null", None), ("~", None), ("", None), ("none", "none"), ("None", "None"),
        ("1:30", "1:30"), ("2024-01-01", "2024-01-01"), ("'12'", "12"), ('"true"', "true"), ("'off'", "off"),
        ("[1, off, 1e2, ~]", [1, "off", 100.0, None]), ("{<<: 1, =: 2}", {"<<": 1, "=": 2}),
        ("&a [1]", [1]), ("{a: &x [1], b: *x}", {"a": [1], "b": [1]}), ("!!str 12", "12"), ("!!float 1.5", 1.5),
    ],
)  # fmt: skip
def test_scalars_follow_the_core_schema(text: str, value: object) -> None:
    result = parse(text)
    assert result == value and type(result) is type(value)


def test_nan() -> None:
    assert math.isnan(parse(".nan")) and parse("nan") == "nan"


@pytest.mark.parametrize(
    ("text", "line", "column", "problem"),
    [
        ("a: 1\nb: 2\na: 3", 3, 1, "`a` is given twice"),
        ("x:\n  - {k: 1, k: 2}", 2, 12, "`k` is given twice"),
        ("1: x", 1, 1, "not text"),
        ("? [a]\n: 1", 1, 3, "not text"),
        ("a: !!set {b}", 1, 4, "!!set"),
        ("a: !!python/name:os.system x", 1, 4, "!!python/name:os.system"),
        ("a: !!int off", 1, 4, "!!int"),
        ("a: &x [*x]", 1, 4, "contains itself"),
        ('a: "\\ud800"', 1, 4, "surrogate"),
        ("a: 1\n b: 2", 2, 3, "not allowed here"),
        ("a: 1\n---\nb: 2", 2, 1, "another document"),
        ("a: " + "9" * 5000, 1, 4, "5000 digits"),
    ],
)
def test_errors_say_where(text: str, line: int, column: int, problem: str) -> None:
    with pytest.raises(YamlError, match=problem) as raised:
        parse(text)
    assert (raised.value.line, raised.value.column) == (line, column)


@pytest.mark.parametrize("data", [b"name: d\xe9mo", b"name: a\x01b"])
def test_characters_that_yaml_does_not_allow(data: bytes) -> None:
    with pytest.raises(YamlError, match="unacceptable character"):
        parse(data)


@settings(deadline=None)
@given(_plain(_FINITE, st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cf", "Zl", "Zp", "Cn", "Co"]))))
def test_json_is_yaml(data: Any) -> None:
    assert parse(json.dumps(data, ensure_ascii=False)) == data


@settings(deadline=None)
@given(_plain(_SCALARS, _WORDS | st.text(st.characters(codec="utf-8"))))
def test_what_is_dumped_is_read_back_here_and_by_yaml_1_1(data: Any) -> None:
    text = dump(data)
    assert parse(text) == data
    assert yaml.safe_load(text) == data


def test_dump_is_easy_to_read() -> None:
    data = {"name": "demo", "curriculum": "off", "betas": [0.9, 0.95], "train": [{"levels": [1, 2], "reward": None}]}
    assert dump(data) == (
        "name: demo\ncurriculum: 'off'\nbetas: [0.9, 0.95]\ntrain:\n- levels: [1, 2]\n  reward: null\n"
    )


def test_show_is_one_short_line() -> None:
    assert show("off") == "off" and show("12") == "'12'" and show(Path("a/b")) == "a/b" and show(None) == "null"
    assert show({"a": [1, {"b": "x"}]}) == "{a: [1, {b: x}]}" and show(("sft", "rl")) == "[sft, rl]"
    assert show("x" * 101) == "x" * 97 + "..." and show("x" * 100) == "x" * 100
