"""From a reward's name to the reward: built-in, entry point, `package.module:attr` or `path/to/file.py:attr`."""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import Any

from rlvlm_rewards.builtin import BUILT_IN, KEEP_TIME
from rlvlm_rewards.options import InvalidOption, with_options
from rlvlm_rewards.plugins import PluginBroken, PluginNotFound, import_plugin, nearest
from rlvlm_rewards.reward import Reward, keeps_time, wrap

GROUP = "rlvlm.rewards"


class RewardNotFound(LookupError):
    """No reward stands under this name."""


class InvalidReward(TypeError):
    """Something stands under this name, but it cannot be imported, is no reward, or does not take these options.

    option: the option that is wrong, where it is one.
    """

    def __init__(self, message: str, option: str | None = None) -> None:
        super().__init__(message)
        self.option = option


def load_reward(name: str, **options: Any) -> Reward:
    """The reward that `name` names, with its options.

    name: a built-in (`exact`, `number`, `math`, ...), an entry point of the group `rlvlm.rewards`,
    `package.module:attr` or `path/to/file.py:attr` (relative to the working directory). `attr` may be dotted:
    `Class.method`. options: fields of a reward class, or keyword arguments of a reward function.
    Raises RewardNotFound (with the nearest name) or InvalidReward (with what is wrong and the mend).
    """
    place, colon, attribute = name.rpartition(":")
    try:
        found = _attribute(name, import_plugin(place), attribute) if colon else _named(name)
        return wrap(name, with_options(found, options))
    except PluginNotFound as error:
        raise RewardNotFound(f"reward {name!r}: {error}") from error
    except InvalidOption as error:
        raise InvalidReward(f"reward {name!r}: {error}", error.option) from error
    except (PluginBroken, TypeError) as error:
        raise InvalidReward(f"reward {name!r}: {error}") from error


def known_names() -> set[str]:
    """The rewards that have a name: built-in ones and entry points."""
    return {*BUILT_IN, *entry_points(group=GROUP).names}


def _named(name: str) -> Any:
    if name in BUILT_IN:
        place, _, attribute = BUILT_IN[name].partition(":")
        found = getattr(import_plugin(place), attribute)
        return keeps_time(found) if name in KEEP_TIME else found
    plugins = entry_points(group=GROUP)
    if name not in plugins.names:
        names = known_names()
        mend = f"name one of {sorted(names)}, `package.module:attr` or `path/to/file.py:attr`"
        raise RewardNotFound(f"reward {name!r} is not known{nearest(name, names)}; {mend}")
    try:
        return plugins[name].load()
    except (Exception, SystemExit) as error:  # foreign code may raise anything; it ends the loading either way
        raise PluginBroken.by(error, f"entry point {plugins[name].value!r}") from error


def _attribute(name: str, module: Any, dotted: str) -> Any:
    found: Any = module
    for part in dotted.split("."):
        if not hasattr(found, part):
            names = [other for other in dir(found) if not other.startswith("_")]
            where = getattr(found, "__qualname__", None) or getattr(found, "__file__", None) or found
            raise RewardNotFound(
                f"reward {name!r}: {where} has no {part!r}{nearest(part, names)}; mend what follows the colon"
            )
        found = getattr(found, part)
    return found
