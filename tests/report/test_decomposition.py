from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlvlm.report.decomposition import Decomposition, decompose, in_words


def rates(**styles: tuple[float, float | None]) -> dict[str, dict[str, float | None]]:
    return {name: {"share": share, "accuracy": accuracy} for name, (share, accuracy) in styles.items()}


def test_only_the_choice_changed() -> None:
    parts = decompose(rates(short=(0.7, 0.3), medium=(0.3, 0.8)), rates(short=(0.0, None), medium=(1.0, 0.8)))
    assert parts is not None
    assert parts.choice == pytest.approx(80 - (21 + 24))
    assert parts.skill == pytest.approx(0)


def test_only_the_skill_changed() -> None:
    parts = decompose(rates(short=(0.5, 0.3), medium=(0.5, 0.8)), rates(short=(0.5, 0.5), medium=(0.5, 0.9)))
    assert parts == pytest.approx((0.0, 15.0))


def test_both_by_hand() -> None:
    """choice: -0.4 * 0.4 + 0.4 * 0.6 = 0.08; skill: 0.1 * 0.4 + 0.2 * 0.6 = 0.16."""
    parts = decompose(rates(a=(0.8, 0.4), b=(0.2, 0.6)), rates(a=(0.4, 0.5), b=(0.6, 0.8)))
    assert parts == pytest.approx((8.0, 16.0))


def test_a_style_given_up_does_not_decide_by_its_last_few_samples() -> None:
    before = rates(medium=(0.6, 0.7), verbose=(0.4, 0.6))
    unlucky = decompose(before, rates(medium=(0.99, 0.8), verbose=(0.01, 0.0)))
    lucky = decompose(before, rates(medium=(0.99, 0.8), verbose=(0.01, 1.0)))
    assert abs(unlucky.skill - lucky.skill) == pytest.approx(1.0)  # one point for one response in a hundred
    assert unlucky.choice == lucky.choice


ACCURACY = st.floats(0, 1)


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20), ACCURACY, ACCURACY), min_size=1, max_size=5))
def test_the_parts_add_up_to_the_gain(styles: list[tuple[int, int, float, float]]) -> None:
    totals = [sum(s[k] for s in styles) for k in (0, 1)]
    if not all(totals):
        return
    sides = [
        rates(**{f"s{i}": (s[k] / totals[k], s[2 + k] if s[k] else None) for i, s in enumerate(styles)}) for k in (0, 1)
    ]
    accuracy = [sum(s[k] / totals[k] * s[2 + k] for s in styles) for k in (0, 1)]
    parts = decompose(*sides)
    assert parts is not None
    assert parts.gain == pytest.approx(100 * (accuracy[1] - accuracy[0]), abs=1e-9)


def test_no_styles_no_decomposition() -> None:
    assert decompose({}, rates(a=(1.0, 0.5))) is None


@pytest.mark.parametrize(
    ("parts", "verdict"),
    [
        (Decomposition(18.0, 1.5), "not new skill"),
        (Decomposition(1.0, 12.0), "is skill"),
        (Decomposition(6.0, 6.0), "Both|both"),
        (Decomposition(-3.0, 1.0), "no gain"),
    ],
)
def test_in_words(parts: Decomposition, verdict: str) -> None:
    sentence = in_words(parts)
    assert f"{parts.choice:+.1f}" in sentence
    assert f"{parts.skill:+.1f}" in sentence
    assert any(word in sentence for word in verdict.split("|"))
