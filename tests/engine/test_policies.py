"""Every policy family goes the whole way, and docs/policies.md says what came of it.

All of them take ten minutes, so a run of the tests takes `--policies`: names, or `all`; by default the family that
differs most from the demo's, with M-RoPE, deepstack and turned experts.
"""

import pytest

from rlvlm.policy.family import families
from tests.engine.policies import FAMILIES, PAGE, PARITY, STAGES, WORKS, page, recorded, run


def pytest_generate_tests(metafunc) -> None:
    if "family" in metafunc.fixturenames:
        chosen = metafunc.config.getoption("--policies")
        metafunc.parametrize("family", FAMILIES if chosen == "all" else chosen.split(","))


def test_the_page_says_what_was_recorded():
    assert PAGE.read_text() == page(recorded()), "write it: .venv/bin/python -m tests.engine.policies FAMILY"


def test_every_family_is_on_the_page():
    told = {kind for outcome in recorded()["families"].values() for kind in outcome["model_types"]}
    assert told == families().keys()
    assert set(recorded()["families"]) == set(FAMILIES)


def test_what_does_not_work_is_what_its_builder_gives_a_reason_for():
    for outcome in recorded()["families"].values():
        assert {stage for stage, said in outcome["said"].items() if said != WORKS} == outcome["cannot"].keys()


def test_what_was_recorded_as_working_has_its_figures():
    for outcome in recorded()["families"].values():
        if set(outcome["said"].values()) == {WORKS}:
            assert list(outcome["said"]) == list(STAGES)
            gaps = {name: gap for name, gap in outcome["figures"].items() if name.startswith(("text", "one", "many"))}
            assert len(gaps) == 2 * (3 - len(outcome["limits"]))
            assert all(0 <= gap < PARITY for gap in gaps.values())


@pytest.mark.engine
def test_goes_the_way_that_the_page_says(family):
    outcome, page_says = run(family), recorded()["families"][family]
    works = {stage: said == WORKS for stage, said in outcome.said.items()}
    assert works == {stage: said == WORKS for stage, said in page_says["said"].items()}, outcome.said
    for name, gap in page_says["figures"].items():
        if name.startswith(("text", "one", "many", "reloaded")):
            assert outcome.figures[name] < PARITY and gap < PARITY
