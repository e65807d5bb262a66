"""Loading: what is right comes through unchanged; what is wrong is named with its key, its value and the mend."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from rlvlm.recipe import keys, yaml12
from rlvlm.recipe.errors import ABSENT, RecipeError
from rlvlm.recipe.load import load_recipe, recipe_from, save_recipe
from rlvlm.recipe.schema import Recipe

from .conftest import MINIMAL


def _wrong(minimal: Path, *overrides: str) -> RecipeError:
    with pytest.raises(RecipeError) as raised:
        load_recipe(minimal, overrides)
    return raised.value


def test_defaults_fill_what_the_file_leaves_out(minimal: Path) -> None:
    recipe = load_recipe(minimal)
    assert recipe.name == "demo" and recipe.tasks.train[0].generator == "digits_sum"
    assert recipe.rl.betas == (0.9, 0.95) and recipe.sampling.curriculum == "linear"


def test_overrides_are_typed_and_any_key_can_be_one(minimal: Path) -> None:
    recipe = load_recipe(
        minimal,
        [
            "sampling.curriculum=off",
            "rl.learning_rate=1e-3",
            "rl.iterations=3",
            "rl.length.gate=null",
            "parity.max=~",
            "rl.betas=[0.8, 0.9]",
            "tasks.train[0].levels=[1,2]",
            "tasks.train.0.weight=2",
            "sampling.prioritised=false",
            "policy.tiny.layers=4",
            "sft.phases[0].styles.short=3",
            "rl.betas[1]=0.99",
            "seed=1",
            "seed=2",
            "stages=[sft]",
            "output=~/runs",
        ],
    )
    assert recipe.sampling.curriculum == "off" and recipe.sampling.prioritised is False
    assert recipe.rl.learning_rate == 0.001 and recipe.rl.iterations == 3 and recipe.rl.length.gate is None
    assert recipe.parity.max is None and recipe.rl.betas == (0.8, 0.99) and recipe.policy.tiny.layers == 4
    assert recipe.tasks.train[0].levels == (1, 2) and recipe.tasks.train[0].weight == 2.0
    # The other styles keep their defaults.
    assert recipe.sft.phases[0].styles == {"short": 3.0, "medium": 1.0, "verbose": 1.0}
    assert recipe.seed == 2 and recipe.stages == ("sft",) and recipe.output == "~/runs"


def test_off_in_the_file_is_the_word(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(MINIMAL + "sampling: {curriculum: off}\nrl: {temperature: 1e-3}\n")
    recipe = load_recipe(path)
    assert recipe.sampling.curriculum == "off" and recipe.rl.temperature == 0.001


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rl.promts=32", "rl.promts = 32: no such key; did you mean rl.prompts?"),
        ("prompts=4", "prompts = 4: no such key; did you mean rl.prompts?"),
        ("lenght.weight=1", "lenght = {weight: 1}: no such key; did you mean rl.length?"),
        (
            "learning_rate=1e-3",
            "learning_rate = 0.001: no such key; did you mean sft.learning_rate or rl.learning_rate?",
        ),
        ("parity.qqq=1", "parity.qqq = 1: no such key; parity has the keys max"),
        ("tasks.train[0].wieght=2", "tasks.train[0].wieght = 2: no such key; did you mean tasks.train[0].weight?"),
        ("rl.prompts=many", "rl.prompts = many: this is text; give a whole number of at least 1"),
        (
            "rl.prompts='32'",
            "rl.prompts = '32': with the quotes this is text; give a whole number of at least 1, without the quotes",
        ),
        (
            "sft.examples=4_000",
            "sft.examples = 4_000: with the separators this is text; "
            "give a whole number of at least 1, without the separators",
        ),
        ("rl.prompts=32.0", "rl.prompts = 32.0: this is a number with a fraction; give 32"),
        ("rl.prompts=true", "rl.prompts = true: this is true or false; give a whole number of at least 1"),
        ("rl.temperature=true", "rl.temperature = true: this is true or false; give a number above 0"),
        ("rl.prompts=0", "rl.prompts = 0: out of range; give a whole number of at least 1"),
        ("rl.learning_rate=.inf", "rl.learning_rate = .inf: out of range; give a number above 0"),
        ("rl.learning_rate=.nan", "rl.learning_rate = .nan: out of range; give a number above 0"),
        ("rl.length.gate=2", "rl.length.gate = 2: out of range; give a number from 0 to 1, or null"),
        ("seed=4294967296", "seed = 4294967296: out of range; give a whole number of at least 0 and below 4294967296"),
        ("sampling.prioritised=off", "sampling.prioritised = off: this is text; give true or false"),
        ("sampling.curriculum=liner", "sampling.curriculum = liner: not one of the choices; give linear or off"),
        ("learner.zero_stage=4", "learner.zero_stage = 4: out of range; give a whole number from 1 to 3"),
        ("stages=[rll]", "stages[0] = rll: not one of the choices; give sft or rl"),
        ("stages=[]", "stages = []: empty; give a list of at least one, each sft or rl"),
        ("sft=3", "sft = 3: this is a whole number; give a section (examples, phases, batch, ranks, ...)"),
        (
            "rl.length=",
            "rl.length = null: the section is empty; leave out `rl.length`, "
            "or give a section (weight, start_iteration, gate)",
        ),
        ("tasks=null", "tasks = null: the section is empty; give a section (train, evaluation)"),
        (
            "name=a/b",
            "name = a/b: not a valid name; give letters, digits, `.`, `_` and `-`, starting with a letter or a digit",
        ),
        (
            "rl.betas=[0.9]",
            "rl.betas = [0.9]: this has 1 element; give a list of 2, each a number of at least 0 and below 1",
        ),
        ("rl.betas[1]=1", "rl.betas[1] = 1: out of range; give a number of at least 0 and below 1"),
        ("sft.phases[0].styles.short=0", "sft.phases[0].styles.short = 0: out of range; give a number above 0"),
        (
            "sft.phases[0].styles={}",
            "sft.phases[0].styles = {}: empty; give a section of names and values, each a number above 0",
        ),
        (
            "tasks.train.weight=2",
            "tasks.train.weight = 2: tasks.train is a list; say which element: tasks.train[0].weight",
        ),
        (
            "tasks.train[1].weight=2",
            "tasks.train[1].weight = 2: tasks.train has 1 element, counted from 0; "
            "give tasks.train as a whole to add one",
        ),
        (
            "tasks.train[0].levels[0]=2",
            "tasks.train[0].levels[0] = 2: tasks.train[0].levels is null, which has no parts; "
            "give tasks.train[0].levels as a whole",
        ),
        ("rl", "override = rl: not of the form key=value; write for example rl.prompts=16"),
        ("rl.=2", "override = rl.=2: not of the form key=value; write for example rl.prompts=16"),
        (
            "name=a: {b",
            "name = 'a: {b': expected ',' or '}', but got '<stream end>'; if it is text, quote it: 'name=\"a: {b\"'",
        ),
    ],
)
def test_messages(minimal: Path, override: str, message: str) -> None:
    assert str(_wrong(minimal, override)) == message


def test_all_errors_are_told_one_a_line(minimal: Path) -> None:
    error = _wrong(minimal, "rl.prompts=x", "rl.smaples=3", "threads=0")
    assert {each.key: each.value for each in error.errors} == {"rl.prompts": "x", "rl.smaples": 3, "threads": 0}
    assert len(str(error).splitlines()) == 3
    assert (error.key, error.value) == (error.errors[0].key, error.errors[0].value)


@pytest.mark.parametrize(
    ("text", "key", "problem"),
    [
        ("", "recipe", "is empty"),
        ("hello", "recipe", "holds text"),
        ("name: a\nname: b", "recipe", "line 2, column 1: the key `name` is given twice"),
        ("name: a\n\ttasks: 1", "recipe", r"line 2, column 1: found character '\t' that cannot start any token"),
        ("tasks: {train: [{generator: x}]}", "name", "missing"),
        (MINIMAL + "sft:\n", "sft", "the section is empty"),
    ],
)
def test_files_that_are_no_recipe(tmp_path: Path, text: str, key: str, problem: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    error = _wrong(path)
    assert (error.key, error.problem) == (key, problem)
    assert error.value is ABSENT if problem == "missing" else error.value == (path if key == "recipe" else None)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    assert _wrong(tmp_path / "r.yaml").problem == "no such file or directory"
    assert _wrong(tmp_path).problem == "is a directory"


def test_a_recipe_cannot_be_changed_later(minimal: Path) -> None:
    with pytest.raises(ValidationError, match="frozen"):
        load_recipe(minimal).rl.prompts = 3  # type: ignore[misc]


# Properties -----------------------------------------------------------------------------------------------------------

_DATA = yaml12.parse(MINIMAL)
_NUMBERS = {"integer": int, "number": float, "boolean": bool, "string": str}


def _at(data: Any, key: str) -> Any:
    for part in key.replace("[", ".").replace("]", "").split("."):
        if data is None:  # a section that may be null
            break
        data = data[int(part)] if part.isdecimal() else data[part]
    return data


def _leaf_keys() -> list[str]:
    """Of what every recipe has: a reward of the recipe's own is none without its parts."""
    every = [key for key in keys.all_keys() if keys.ANY_NAME not in key]
    return [key for key in every if not any(other.startswith((f"{key}.", f"{key}[")) for other in every)]


def test_every_leaf_is_listed_once() -> None:
    leaves = _leaf_keys()
    assert len(leaves) == len(set(leaves)) and {"name", "rl.length.gate", "tasks.train[0].columns.image"} <= set(leaves)
    assert "rewards.named.NAME.parts[0].weight" in keys.all_keys()
    recipe = load_recipe_text(MINIMAL)
    given = recipe.model_dump(mode="json")
    assert all(_at(given, key) is not ABSENT for key in leaves if not key.startswith("tasks.evaluation"))


def load_recipe_text(text: str) -> Recipe:
    return recipe_from(yaml12.parse(text))


@settings(deadline=None)
@given(
    key=st.sampled_from([key for key in _leaf_keys() if not key.startswith("tasks.evaluation[")]),
    value=st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text("abof1.", max_size=6)
    | st.just([])
    | st.just({}),
)
def test_an_override_is_taken_as_it_is_or_refused_by_name(key: str, value: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "r.yaml"
        path.write_text(MINIMAL)
        try:
            recipe = load_recipe(path, [f"{key}={yaml12.show(value, limit=1000)}"])
        except RecipeError as error:
            # The key itself, an element of it, or what it stands in (a source with a generator and a data set).
            named = [each.key for each in error.errors]
            assert key in str(error) or any(other.startswith(key) or key.startswith(other) for other in named)
            return
    taken = _at(recipe.model_dump(mode="json"), key)
    assert taken == value
    # Nothing is coerced, but for a whole number where any number may stand.
    assert type(taken) is type(value) or (type(value) is int and type(taken) is float)


def _misspelt(name: str, kind: str, at: int) -> str:
    match kind:
        case "lost":
            return name[:at] + name[at + 1 :]
        case "doubled":
            return name[:at] + name[at] + name[at:]
        case _:
            return name[: at - 1] + name[at] + name[at - 1] + name[at + 1 :]


@settings(deadline=None)
@given(data=st.data(), kind=st.sampled_from(["lost", "doubled", "swapped"]))
def test_a_slip_of_the_finger_is_understood(data: st.DataObject, kind: str) -> None:
    key = data.draw(st.sampled_from([key for key in _leaf_keys() if "[" not in key and len(key.split(".")[-1]) >= 5]))
    *section, name = key.split(".")
    slip = _misspelt(name, kind, data.draw(st.integers(1, len(name) - 1)))
    assume(slip not in keys.names(section))
    with pytest.raises(RecipeError) as raised:
        recipe_from(_nested([*section, slip], 1))
    assert raised.value.key == ".".join([*section, slip])
    assert raised.value.mend == f"did you mean {key}?"


def _nested(path: list[str], value: Any) -> dict[str, Any]:
    data: dict[str, Any] = dict(_DATA)
    node = data
    for part in path[:-1]:
        node[part] = {}
        node = node[part]
    node[path[-1]] = value
    return data


_TEXT = st.text(st.characters(codec="utf-8"), min_size=1, max_size=20) | st.sampled_from(
    ["off", "1e3", "null", "~", "0x1", " ", "a: b"]
)
_COUNT = st.integers(1, 10**12)
_POSITIVE = st.floats(min_value=0, exclude_min=True, allow_infinity=False)
_SHARE = st.floats(0, 1)


@st.composite
def _sources(draw: st.DrawFn) -> dict[str, Any]:
    levels = st.none() | st.lists(_COUNT, min_size=1, max_size=3)
    if draw(st.booleans()):
        return {"generator": draw(_TEXT), "levels": draw(levels), "weight": draw(_POSITIVE)}
    columns = {"prompt": draw(_TEXT), "image": draw(st.none() | _TEXT)}
    return {"dataset": draw(_TEXT), "reward": draw(_TEXT), "split": draw(_TEXT), "columns": columns}


@st.composite
def _objectives(draw: st.DrawFn) -> dict[str, Any]:
    kind = draw(st.sampled_from(["none", "tis", "icepop"]))
    return {
        "preset": draw(st.sampled_from(["opmd", "grpo", "gspo", "rloo", "rest"])),
        "tau": draw(_POSITIVE),
        "optimizer_reset": draw(st.booleans()),
        "correction": {"kind": kind, "cap": draw(_POSITIVE) if kind == "tis" else None},
        **draw(st.sampled_from([{}, {"normalisation": "fixed", "divisor": 24}, {"level": "token"}])),
    }


@st.composite
def _recipes(draw: st.DrawFn) -> dict[str, Any]:
    minibatches = draw(st.integers(1, 99))
    prompts = minibatches * draw(st.integers(1, 99))
    return {
        "name": draw(st.from_regex(r"\A[A-Za-z0-9][A-Za-z0-9._-]{0,8}\Z")),
        "seed": draw(st.integers(0, 2**32 - 1)),
        "output": draw(_TEXT),
        "stages": draw(st.sampled_from([["sft"], ["sft", "rl"]])),
        "tasks": {
            "train": draw(st.lists(_sources(), min_size=1, max_size=3)),
            "evaluation": draw(st.lists(_sources(), max_size=2)),
        },
        "sft": {
            "phases": [{"styles": draw(st.dictionaries(_TEXT, _POSITIVE, min_size=1, max_size=3))}],
            "learning_rate": draw(_POSITIVE),
        },
        "rl": {
            "minibatches": minibatches,
            "prompts": prompts,
            "pool": prompts + draw(st.integers(0, 10**9)),
            "betas": [draw(st.floats(0, 1, exclude_max=True)), draw(st.floats(0, 1, exclude_max=True))],
            "length": {"gate": draw(st.none() | _SHARE)},
            "objective": draw(_objectives()),
        },
        "sampling": {"curriculum": draw(st.sampled_from(["linear", "off"])), "floor": draw(_SHARE)},
        "rollout": {"ban": draw(st.lists(st.integers(0, 10**6), max_size=3))},
        "parity": {"max": draw(st.none() | _POSITIVE)},
    }  # fmt: skip


@settings(max_examples=50, deadline=None)
@given(_recipes())
def test_a_saved_recipe_is_read_back_equal(data: dict[str, Any]) -> None:
    recipe = recipe_from(data)
    assert recipe.rl.prompts == data["rl"]["prompts"]
    assert recipe.sft.phases[0].styles == data["sft"]["phases"][0]["styles"]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.yaml"
        save_recipe(recipe, path)
        assert load_recipe(path) == recipe
        assert yaml.safe_load(path.read_bytes()) == recipe.model_dump(mode="json")  # as any YAML 1.1 reader sees it
        save_recipe(load_recipe(path), again := Path(folder) / "again.yaml")
        assert again.read_bytes() == path.read_bytes()


@settings(deadline=None)
@given(st.binary(max_size=40) | st.text(st.sampled_from("ab:{}[]-,?&*!|>'\"%@` \n\t#1.~"), max_size=40).map(str.encode))
def test_any_file_gives_a_recipe_error_and_nothing_else(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "r.yaml"
        path.write_bytes(content)
        with pytest.raises(RecipeError):
            load_recipe(path)
