"""How much of a gain is skill, and how much is only the choice of a chain style that was better already.

With share q_s and accuracy a_s of style s, before (') and after (''), accuracy = sum_s q_s a_s, and exactly

    gain = sum_s (q''_s - q'_s) a'_s     choice: what the new shares would have given with the old accuracies
         + sum_s (a''_s - a'_s) q''_s    skill: the same style used more accurately, as often as it is used now

A style that RL has all but given up has few samples after it, so its accuracy there is noise: here it weighs next to
nothing, while splitting the shares evenly, (q' + q'') / 2, would let it decide. A style that one side never used has no
accuracy there; the other side's is taken, so that it counts as choice.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

StyleRates = Mapping[str, Mapping[str, Any]]
"""style -> {share, accuracy, samples}: `by_style` of an evaluation."""


class Decomposition(NamedTuple):
    """Percentage points; they add up to the gain."""

    choice: float
    skill: float

    @property
    def gain(self) -> float:
        return self.choice + self.skill


def decompose(before: StyleRates, after: StyleRates) -> Decomposition | None:
    """Of `by_style` before and after. None where the styles were not measured."""
    if not before or not after:
        return None
    choice = skill = 0.0
    for style in before.keys() | after.keys():
        (share_before, right_before), (share_after, right_after) = _rate(before, style), _rate(after, style)
        first = right_before if right_before is not None else right_after
        second = right_after if right_after is not None else right_before
        if first is not None and second is not None:
            choice += (share_after - share_before) * first
            skill += (second - first) * share_after
    return Decomposition(100 * choice, 100 * skill)


def in_words(parts: Decomposition) -> str:
    """One sentence for people: where the gain comes from."""
    told = (
        f"Of {parts.gain:+.1f} points, {parts.choice:+.1f} come from choosing other chain styles"
        f" and {parts.skill:+.1f} from being right more often within a style."
    )
    return f"{told} {_verdict(parts)}"


def _rate(rates: StyleRates, style: str) -> tuple[float, float | None]:
    rate = rates.get(style)
    return (rate["share"], rate["accuracy"]) if rate else (0.0, None)


def _verdict(parts: Decomposition) -> str:
    if parts.gain <= 0:
        return "There is no gain to explain."
    if parts.choice >= 2 / 3 * parts.gain:
        return "So most of this gain is a better choice of style, not new skill."
    if parts.skill >= 2 / 3 * parts.gain:
        return "So most of this gain is skill, not a change of style."
    return "So both have a part in it."
