"""Every form of a plugin, from every place where one may stand."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

import pytest
from rlvlm_rewards import Failure, InvalidReward, RewardNotFound, Sample, Score, load_reward
from rlvlm_rewards.reward import Kind

SAMPLE = Sample(completion="abcd", answer="ab", task="row-7")

PLUGIN = """
import asyncio
from dataclasses import dataclass
from typing import Literal
from rlvlm_rewards import Sample, Score, inline

LOADS = []
LOADS.append(1)

def plain(sample):
    return len(sample.answer) / len(sample.completion)

async def waits(sample):
    await asyncio.sleep(0.001)
    return Score(value=0.25, parts={"form": 0.25})

def batch(prompts, completions, answer, **columns):
    assert prompts == [""] and columns["task"] == ["row-7"] and "images" not in columns
    return [len(c) / 8 for c in completions]

async def async_batch(completions, solution):
    return [float(c.startswith(s)) for c, s in zip(completions, solution)]

def chat_batch(prompts, completions, **columns):
    assert prompts == [[{"role": "user", "content": "q"}]]
    return [float(completion[0]["content"] == "abcd") for completion in completions]

def pictures(prompts, completions, images):
    return [images[0][0]]

def none_batch(prompts, completions):
    return [None]

def two_batch(prompts, completions):
    return [1.0, 1.0]

def scaled(sample, factor, offset=0.0):
    return factor * len(sample.answer) + offset

async def async_scaled(sample, factor=0.0):
    return factor

def batch_scaled(prompts, completions, answer, factor=0.5, **columns):
    return [factor for c in completions]

@inline
def inline_scaled(sample, factor):
    return factor

def with_columns(prompts, completions, shade, **columns):
    return [float(s == 3 and columns["hue"] == [4]) for s in shade]

@dataclass(frozen=True)
class Close:
    factor: float
    mode: Literal["linear", "square"] = "linear"
    limit: int | None = None
    table: tuple = ()

    def __post_init__(self):
        if self.factor > 1:
            raise ValueError(f"factor is {self.factor}; give at most 1")

    def __call__(self, sample):
        return self.factor if self.mode == "linear" else self.factor**2

@inline
@dataclass(frozen=True)
class Cheap:
    def __call__(self, sample):
        return 0.5

@dataclass
class NoReward:
    factor: float = 0.5

class Family:
    class Inner:
        @staticmethod
        def verify(sample):
            return 0.75

    async def __call__(self, sample):
        return 0.125

instance = Family()

def raises(sample):
    raise KeyError("the cause")  # raised here

def exits(sample):
    raise SystemExit(3)

def stops(sample):
    return next(iter(()))

def two(sample, other):
    return 1.0

def true(sample): return True
def one(sample): return 1
def big(sample): return 1.5
def negative(sample): return -0.001
def nan(sample): return float("nan")
def text(sample): return "1.0"
def none(sample): return None
def bad_score(sample): return Score(value=2.0)
"""


@pytest.fixture
def plugin(tmp_path: Path) -> Path:
    path = tmp_path / "plugin.py"
    path.write_text(PLUGIN)
    return path


def judge(name: str, sample: Sample = SAMPLE) -> Score:
    return asyncio.run(load_reward(name)(sample))


@pytest.mark.parametrize(
    ("attr", "value"),
    [
        ("plain", 0.5),
        ("waits", 0.25),
        ("batch", 0.5),
        ("async_batch", 1.0),
        ("Family.Inner.verify", 0.75),
        ("instance", 0.125),
        ("true", 1.0),
        ("one", 1.0),
    ],
)
def test_forms_in_a_file(plugin: Path, attr: str, value: float) -> None:
    assert judge(f"{plugin}:{attr}").value == value


@pytest.mark.parametrize(
    ("attr", "options", "value"),
    [
        ("scaled", {"factor": 0.25}, 0.5),
        ("scaled", {"factor": 0.25, "offset": 0.125}, 0.625),
        ("async_scaled", {"factor": 0.75}, 0.75),
        ("batch_scaled", {}, 0.5),
        ("batch_scaled", {"factor": 0.25}, 0.25),
        ("inline_scaled", {"factor": 0.25}, 0.25),
        ("Close", {"factor": 0.5}, 0.5),
        ("Close", {"factor": 1}, 1.0),  # a whole number where any number may stand
        ("Close", {"factor": 0.5, "mode": "square", "limit": 3}, 0.25),
        ("Cheap", {}, 0.5),
    ],
)
def test_options(plugin: Path, attr: str, options: dict[str, Any], value: float) -> None:
    assert asyncio.run(load_reward(f"{plugin}:{attr}", **options)(SAMPLE)).value == value


def test_where_a_reward_with_options_runs(plugin: Path) -> None:
    kinds = {
        attr: load_reward(f"{plugin}:{attr}", **options).kind
        for attr, options in (
            ("Cheap", {}),
            ("Close", {"factor": 0.5}),
            ("scaled", {"factor": 0.25}),
            ("inline_scaled", {"factor": 0.25}),
            ("async_scaled", {"factor": 0.25}),
        )
    }
    assert kinds == {
        "Cheap": Kind.INLINE,
        "Close": Kind.THREAD,
        "scaled": Kind.THREAD,
        "inline_scaled": Kind.INLINE,
        "async_scaled": Kind.ASYNC,
    }


@pytest.mark.parametrize(
    ("attr", "options", "option", "said"),
    [
        ("scaled", {"fctor": 0.25}, "fctor", "has no option 'fctor'; did you mean 'factor'?; it has factor, offset"),
        ("scaled", {"sample": 1}, "sample", "has no option 'sample'"),
        ("batch", {"answer": []}, "", ""),  # a column may be given once and for all
        ("plain", {"factor": 1}, "factor", "has no option 'factor'; it has none"),
        ("Close", {}, "factor", "option 'factor' is missing; give a number"),
        ("Close", {"factor": "0.5"}, "factor", "factor is '0.5'; give a number"),
        ("Close", {"factor": True}, "factor", "factor is True; give a number"),
        ("Close", {"factor": 2.0}, "factor", "factor is 2.0; give at most 1"),
        ("Close", {"factor": 0.5, "mode": "cubic"}, "mode", "mode is 'cubic'; give 'linear' or 'square'"),
        ("Close", {"factor": 0.5, "limit": 1.5}, "limit", "limit is 1.5; give a whole number or null"),
        ("Close", {"factor": 0.5, "limt": 1}, "limt", "did you mean 'limit'"),
        ("NoReward", {}, None, "make it a dataclass whose fields are options and whose __call__(self, sample) scores"),
        ("LOADS", {"factor": 1}, None, "is not a function"),
        ("scaled", {}, None, "(sample, factor, offset=0.0)"),
    ],
)
def test_options_that_do_not_fit(
    plugin: Path, attr: str, options: dict[str, Any], option: str | None, said: str
) -> None:
    if not said:
        load_reward(f"{plugin}:{attr}", **options)
        return
    with pytest.raises(InvalidReward) as caught:
        load_reward(f"{plugin}:{attr}", **options)
    assert said in str(caught.value) and f"{plugin}:{attr}" in str(caught.value)
    assert caught.value.option == option


def test_a_batch_function_gets_the_row_s_columns(plugin: Path) -> None:
    sample = Sample(completion="a", answer="b", columns={"shade": 3, "hue": 4})
    assert judge(f"{plugin}:with_columns", sample).value == 1.0


def test_parts_of_a_score_are_kept(plugin: Path) -> None:
    assert judge(f"{plugin}:waits").parts == {"form": 0.25}


def test_a_batch_function_gets_chat_messages_when_the_prompt_is_a_chat(plugin: Path) -> None:
    sample = Sample(completion="abcd", answer="", messages=({"role": "user", "content": "q"},))
    assert judge(f"{plugin}:chat_batch", sample).value == 1.0


def test_a_batch_function_gets_pictures_only_when_it_names_them(plugin: Path) -> None:
    loaded: list[str] = []

    def load() -> list[float]:
        loaded.append("now")
        return [0.5]

    sample = Sample(completion="abcd", answer="ab", task="row-7", load_images=load)
    assert judge(f"{plugin}:batch", sample).value == 0.5 and loaded == []
    assert judge(f"{plugin}:pictures", sample).value == 0.5 and loaded == ["now"]


@pytest.mark.parametrize(
    ("attr", "said"),
    [
        ("big", "1.5; scale it"),
        ("negative", "-0.001"),
        ("nan", "nan"),
        ("text", "'1.0' (str)"),
        ("none", "None"),
        ("none_batch", "None"),
        ("two_batch", "one value per completion"),
        ("bad_score", "lies in [0, 1]"),
        ("exits", "SystemExit: 3"),
        ("stops", "StopIteration"),
    ],
)
def test_what_is_no_score_is_a_failure_and_never_a_zero(plugin: Path, attr: str, said: str) -> None:
    result = judge(f"{plugin}:{attr}")
    assert result.failure is Failure.INFRASTRUCTURE and result.value is None
    assert said in result.detail and f"{plugin}:{attr}" in result.detail


def test_a_raising_reward_says_what_and_where(plugin: Path) -> None:
    line = next(number for number, text in enumerate(PLUGIN.splitlines(), 1) if "# raised here" in text)
    result = judge(f"{plugin}:raises")
    assert result.failure is Failure.INFRASTRUCTURE
    assert "KeyError: 'the cause'" in result.detail and f"{plugin}:{line}" in result.detail


def test_a_file_runs_once_and_equal_stems_do_not_collide(tmp_path: Path) -> None:
    for folder, value in (("a", 0.25), ("b", 0.75)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "same.py").write_text(
            f"from pathlib import Path\nwith open({str(tmp_path / 'runs')!r}, 'a') as f: f.write('{folder}')\n"
            f"def reward(sample): return {value}\ndef other(sample): return 1.0\n"
        )
    first, second = tmp_path / "a" / "same.py", tmp_path / "b" / "same.py"
    assert [judge(f"{path}:reward").value for path in (first, second, first)] == [0.25, 0.75, 0.25]
    assert judge(f"{first}:other").value == 1.0
    assert (tmp_path / "runs").read_text() == "ab"
    modules = {load_reward(f"{path}:reward").function.__module__ for path in (first, second)}
    assert len(modules) == 2 and modules <= set(sys.modules) and "same" not in sys.modules


def test_a_path_may_be_relative(plugin: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(plugin.parent)
    assert judge("plugin.py:plain").value == 0.5


def test_modules_and_entry_points(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "their_package"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "rewards.py").write_text("class Digits:\n    @staticmethod\n    def verify(sample): return 0.5\n")
    info = tmp_path / "their_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their-package\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[rlvlm.rewards]\ntheirs = their_package.rewards:Digits.verify\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert judge("their_package.rewards:Digits.verify").value == 0.5
    assert judge("theirs").value == 0.5
    with pytest.raises(RewardNotFound, match="did you mean 'theirs'"):
        load_reward("their")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("numbr", "did you mean 'number'"),
        ("{plugin}:plian", "did you mean 'plain'"),
        ("{folder}/plugn.py:plain", "'plugin.py'"),
        ("{plugin}:Family.Iner.verify", "did you mean 'Inner'"),
        ("no_such_package.x:f", "no module 'no_such_package'"),
        ("json.nothing:f", "no module 'json.nothing'"),
    ],
)
def test_an_unknown_name_gets_the_nearest_one_and_a_mend(plugin: Path, name: str, said: str) -> None:
    with pytest.raises(RewardNotFound) as caught:
        load_reward(name.format(plugin=plugin, folder=plugin.parent))
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("attr", "said"), [("two", "(sample, other)"), ("LOADS", "not a function"), ("Family", "not a function")]
)
def test_what_is_no_reward_is_refused_when_it_is_loaded(plugin: Path, attr: str, said: str) -> None:
    with pytest.raises(InvalidReward) as caught:
        load_reward(f"{plugin}:{attr}")
    assert said in str(caught.value) and f"{plugin}:{attr}" in str(caught.value)


def test_a_file_that_cannot_be_imported_says_why_and_leaves_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "broken_plugin.py"
    path.write_text("import no_such_thing_at_all\n")
    for _ in range(2):
        with pytest.raises(InvalidReward, match="ModuleNotFoundError: No module named 'no_such_thing_at_all'"):
            load_reward(f"{path}:reward")
    assert not [name for name in sys.modules if "broken_plugin" in name]


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import json\n\nundefined\n", "NameError: name 'undefined' is not defined ({path}:3)"),
        ("import json\n\njson.loads('{')\n", "JSONDecodeError: Expecting property name enclosed in double quotes: "),
        ("def reward(sample)\n", "SyntaxError: expected ':' ({path}:1)"),
        ("raise SystemExit(2)\n", "SystemExit: 2 ({path}:1)"),
    ],
)
def test_whatever_a_file_raises_names_the_exception_and_the_line(tmp_path: Path, code: str, said: str) -> None:
    path = tmp_path / "raises.py"
    path.write_text(code)
    with pytest.raises(InvalidReward) as caught:
        load_reward(f"{path}:reward")
    assert said.format(path=path) in str(caught.value)
    assert f"({path}:{len(code.splitlines())}); mend it there" in str(caught.value)  # its own line, not one of json's


def test_a_module_that_raises_names_its_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "raising_module.py").write_text("x = 1\nimport no_such_thing_at_all\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(InvalidReward, match=r"ModuleNotFoundError: .* \(.*/raising_module\.py:2\); mend it there"):
        load_reward("raising_module:reward")


def test_a_plugin_may_load_another_one(tmp_path: Path) -> None:
    (tmp_path / "inner.py").write_text("def reward(sample): return 0.25\n")
    outer = tmp_path / "outer.py"
    outer.write_text(
        f"from rlvlm_rewards import load_reward\nreward = load_reward({str(tmp_path / 'inner.py:reward')!r}).function\n"
    )
    assert judge(f"{outer}:reward").value == 0.25
