"""Where a response's program is. Fences are checked against markdown-it, a CommonMark parser."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from rlvlm_rewards.code.extract import Program, extract

TWO = "```python\nprint(1)\n```\nand then\n```python\nprint(2)\n```"


@pytest.mark.parametrize(
    ("completion", "source"),
    [
        ("```python\nprint(1)\n```", "print(1)"),
        ("```py\nprint(1)\n```", "print(1)"),
        ("```Python3\nprint(1)\n```", "print(1)"),
        ('``` python title="a b"\nprint(1)\n```', "print(1)"),
        ("~~~~python\nprint(1)\n~~~~", "print(1)"),
        ("```\nprint(1)\n```", "print(1)"),
        ("So:\r\n```python\r\nif 1:\r\n  print(1)\r\n```\r\n", "if 1:\n  print(1)"),
        (TWO, "print(2)"),
        ("```python\nprint(1)\n```\nIt prints\n```\n1\n```", "print(1)"),
        ("```python\nprint(1)\n```\n```text\n1\n```", "print(1)"),
        ("```\nprint(1)\n```\n```\nprint(2)\n```", "print(2)"),
        ("```python\nprint(1)\n```\n```python\n\n```", "print(1)"),
        ("```python\nprint(1)\n```\n```", "print(1)"),
        ("```python\nprint(1)", "print(1)"),
        ("1. First\n   ```python\n   if 1:\n       print(1)\n   ```", "if 1:\n    print(1)"),
        ("````python\n'''\n```\n'''\nprint(1)\n````", "'''\n```\n'''\nprint(1)"),
        (
            'A\n```python\ndef f():\n    """\n    ```\n    f()\n    ```\n    """\n```',
            'def f():\n    """\n    ```\n    f()\n    ```\n    """',
        ),
        ("<think>```python\nprint(1)\n```</think>```python\nprint(2)\n```", "print(2)"),
        ("```python\nprint(r'\\boxed{2}')\n```", "print(r'\\boxed{2}')"),
        ("```python\nprint('<think>')\n```", "print('<think>')"),
    ],
)
def test_the_last_block_is_the_program(completion: str, source: str) -> None:
    assert extract(completion) == Program(source, fenced=True)


@pytest.mark.parametrize(
    "completion",
    [
        "",
        " \n\t",
        "```cpp\nint main() {}\n```",
        "```python\n```",
        "```python\nprint(1)\n```</think>",
        "<think>```python\nprint(1)\n```",
        "```python\nprint(1)\n```</think> <think> not done",
    ],
)
def test_no_program(completion: str) -> None:
    assert extract(completion) is None


def test_without_a_fence_all_of_the_answer_is_the_program() -> None:
    assert extract("<think>x</think>print(1)\n") == Program("print(1)\n", fenced=False)


def test_a_prompt_that_opened_the_thinking() -> None:
    assert extract(TWO, thinking=True) is None
    assert extract(f"</think>{TWO}", thinking=True) == Program("print(2)", fenced=True)


@pytest.mark.parametrize(
    ("language", "tag"), [("cpp", "C++17"), ("javascript", "js"), ("bash", "sh"), ("cpp", "cpp"), ("bash", "")]
)
def test_other_languages_go_by_their_tags(language: str, tag: str) -> None:
    completion = f"```{tag}\nx\n```\n```python\ny\n```"
    assert extract(completion, language=language) == Program("x", fenced=True)


LINES = st.sampled_from(
    [
        "```",
        "```python",
        "````",
        "~~~",
        "~~~~ py",
        "```a`b",
        " ```",
        "   ~~~",
        "       ```",
        "x",
        "",
        "  y",
        "```  ",
        "~~",
    ]
)


@given(st.lists(LINES, max_size=12))
def test_fences_are_those_of_commonmark(lines: list[str]) -> None:
    text = "\n".join(lines)
    blocks = [token for token in MarkdownIt("commonmark").parse(text) if token.type == "fence"]
    if any(line.startswith("    ") and not _inside(blocks, number) for number, line in enumerate(lines)):
        return  # ours takes an indented fence for one in a list
    tags = [(token.info.split() or [""])[0] for token in blocks]
    for wanted in (("python", "py"), ("",)):
        sources = [t.content for t, tag in zip(blocks, tags, strict=True) if tag in wanted and t.content.strip()]
        if sources:
            found = extract(text)
            assert found is not None and found.fenced
            assert found.source.rstrip("\n") == sources[-1].rstrip("\n")
            return
    found = extract(text)
    assert found is None if blocks else found is None or not found.fenced


def _inside(blocks: list, number: int) -> bool:
    return any(block.map[0] < number < block.map[1] for block in blocks)


@given(st.text(alphabet="`~ \n\tpython<>/think\\boxed{}\r\x00\ud800é", max_size=200), st.booleans())
def test_whatever_is_extracted_stands_in_the_answer(text: str, thinking: bool) -> None:
    found = extract(text, thinking)
    if found is not None:
        words = found.source.split()
        assert words
        assert "".join(words) in "".join(text.rpartition("</think>")[2].split())


@pytest.mark.parametrize("part", ["```python\n", "```\n", "`", " ", "~~~ `\n", "<think>", "    ```x\n", "\t"])
def test_two_megabytes_take_no_time(part: str) -> None:
    start = time.perf_counter()
    extract(part * (2_000_000 // len(part)))
    assert time.perf_counter() - start < 2
