"""A reward's options: the fields of a reward class, the keyword parameters of a reward function."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, Literal, Union, get_args, get_origin

from rlvlm_rewards.plugins import PluginBroken, nearest

_SAMPLE = ("sample", "prompts", "completions")
_KINDS: Mapping[type, str] = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}


class InvalidOption(ValueError):
    """An option that a reward does not take. option: its name. problem: what is wrong. mend: what to do about it."""

    def __init__(self, option: str, problem: str, mend: str) -> None:
        super().__init__(option, problem, mend)
        self.option, self.problem, self.mend = option, problem, mend

    def __str__(self) -> str:
        return f"{self.problem}; {self.mend}"


def with_options(reward: Callable[..., Any], options: Mapping[str, Any]) -> Callable[..., Any]:
    """The reward with its options: an instance of a dataclass, or a function with keyword arguments bound.

    Raises InvalidOption, TypeError for what takes no options at all, or PluginBroken whatever the class itself raises.
    """
    if inspect.isclass(reward):
        return _instance(reward, options)
    if not options:
        return reward
    if not callable(reward):
        raise TypeError(f"{reward!r:.100} is not a function; name a function or a class of rewards")
    parameters = list(inspect.signature(reward).parameters.values())
    variadic = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    first = {parameters[0].name} if parameters else set()
    known = [p.name for p in parameters if p.kind not in variadic and p.name not in {*_SAMPLE, *first}]
    _refuse_unknown(options, known)
    return functools.partial(reward, **options)


def _instance(cls: type[Any], options: Mapping[str, Any]) -> Callable[..., Any]:
    if not dataclasses.is_dataclass(cls) or "__call__" not in dir(cls):
        raise TypeError(
            f"{cls.__qualname__} is a class and not a function; name a function, a static method, a callable instance, "
            "or make it a dataclass whose fields are options and whose __call__(self, sample) scores"
        )
    fields = [one for one in dataclasses.fields(cls) if one.init]
    _refuse_unknown(options, [one.name for one in fields])
    hints = _hints(cls)
    for one in fields:
        if one.name in options:
            _check_kind(one.name, options[one.name], hints.get(one.name))
        elif one.default is dataclasses.MISSING and one.default_factory is dataclasses.MISSING:
            raise InvalidOption(one.name, f"option {one.name!r} is missing", f"give {_wanted(hints.get(one.name))}")
    return _made(cls, options, [one.name for one in fields])


def _made(cls: type[Any], options: Mapping[str, Any], names: list[str]) -> Callable[..., Any]:
    try:
        return typing.cast(Callable[..., Any], cls(**options))
    except ValueError as error:
        problem, _, mend = str(error).partition("; ")
        named = problem.partition(" ")[0]
        option = named if named in names else next(iter(options), "")
        raise InvalidOption(option, problem, mend or "give another value") from error
    except Exception as error:  # foreign code may raise anything; it ends the loading either way
        raise PluginBroken.by(error, f"{cls.__qualname__}(...)") from error


def _hints(cls: type[Any]) -> dict[str, Any]:
    try:
        return typing.get_type_hints(cls)
    except NameError:  # a name that is imported for type checkers only
        return {}


def _refuse_unknown(options: Mapping[str, Any], known: list[str]) -> None:
    for option in options:
        if option not in known:
            there = f"it has {', '.join(known)}" if known else "it has none"
            raise InvalidOption(option, f"has no option {option!r}{nearest(option, known)}", there)


def _check_kind(option: str, value: Any, hint: Any) -> None:
    """Refuses what is plainly of another kind; what the value means is for the class itself to check."""
    if not _fits(value, hint):
        raise InvalidOption(option, f"{option} is {value!r:.100}", f"give {_wanted(hint)}")


def _fits(value: Any, hint: Any) -> bool:
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, one) for one in get_args(hint))
    if origin is Literal:
        return any(value == one and type(value) is type(one) for one in get_args(hint))
    if hint is type(None):
        return value is None
    if hint in (int, float):
        return isinstance(value, int | hint) and not isinstance(value, bool)
    return isinstance(value, hint) if hint in _KINDS else True


def _wanted(hint: Any) -> str:
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(_wanted(one) for one in get_args(hint)))
    if origin is Literal:
        return " or ".join(map(repr, get_args(hint)))
    if hint is type(None):
        return "null"
    return _KINDS.get(hint, "a value that its documentation names")
