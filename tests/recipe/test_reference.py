"""The page of keys: complete, and the one that is in docs/."""

from __future__ import annotations

import re
from pathlib import Path

from rlvlm.recipe import keys
from rlvlm.recipe.reference import reference

PAGE = Path(__file__).parents[2] / "docs" / "recipe.md"


def test_the_page_in_docs_is_up_to_date() -> None:
    assert PAGE.read_text() == reference(), "write it anew: python -m rlvlm.recipe.reference > docs/recipe.md"


def test_every_key_has_its_row_or_its_heading() -> None:
    told: set[str] = set()
    section = ""
    for line in reference().splitlines():
        if heading := re.fullmatch(r"## (?:`(.*)`|The recipe itself)", line):
            section = heading[1] or ""
            told.add(section)
        elif row := re.match(r"\| `(\w+)` \|", line):
            told.add(f"{section}.{row[1]}".lstrip("."))
        elif same := re.fullmatch(r"As `(.*)`\.", line):
            told |= {section + key.removeprefix(same[1]) for key in told if key.startswith(f"{same[1]}.")}
    wanted = {key.replace("[0]", "[]") for key in keys.all_keys()}
    same_as_train = {key for key in wanted if key.startswith("tasks.evaluation[].")}
    assert same_as_train == {key.replace("train", "evaluation") for key in wanted if key.startswith("tasks.train[].")}
    assert told - {""} == wanted


def test_rows_by_hand() -> None:
    page = reference()
    assert "| `name` | letters, digits, `.`, `_` and `-`, starting with a letter or a digit | required |" in page
    assert "| `tau` | a number of at least 0 | `0.1` |" in page
    assert "| `gate` | a number from 0 to 1, or null | `0.5` |" in page
    assert "| `betas` | a list of 2, each a number of at least 0 and below 1 | `[0.9, 0.95]` |" in page
