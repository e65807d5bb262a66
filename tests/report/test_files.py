from __future__ import annotations

from pathlib import Path

import pytest

from rlvlm.report.files import replace_file


def test_a_reader_keeps_the_old_file_while_a_new_one_takes_its_place(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    path.write_text("old")
    with open(path) as reader:
        replace_file(path, lambda temporary: temporary.write_text("the new one"))
        assert reader.read() == "old"
    assert path.read_text() == "the new one"


def test_a_write_that_fails_changes_nothing_and_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    path.write_text("old")

    def fail(temporary: Path) -> None:
        temporary.write_text("half")
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space"):
        replace_file(path, fail)
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("summary.json", "old")]
