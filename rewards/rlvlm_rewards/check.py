"""The contract test of a reward: `python -m rlvlm_rewards.check PLUGIN`, or `rlvlm reward check PLUGIN`.

A reward is the ground truth of a training run. It gives the same score for the same response, in [0, 1] or a failure;
it withstands whatever a policy may write; and it gives nothing for known ways to look right without an answer. The
checks run in a process of their own: a reward that hangs or crashes fails its check and no more.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rlvlm_rewards.hacks import hacks, hostile
from rlvlm_rewards.loading import InvalidReward, RewardNotFound, load_reward
from rlvlm_rewards.records import Failure, Sample, Score
from rlvlm_rewards.reward import Reward
from rlvlm_rewards.scoring import score

NO_CREDIT = 0.25  # a measure of likeness gives a little for anything; a hack that gets more than this is paid
_FULL = 1e-6
_SILENCE_S = 40.0  # without a word from the process that checks; one attempt may take 10 s
_EXAMPLES: Mapping[str, tuple[str, str]] = {  # reference, right answer
    "exact": ("the grey cat", "The  grey cat"),
    "choice": ("C", "(C)"),
    "number": ("12", "12.0"),
    "count": ("12", "12"),
    "grounding": ("[[10, 20, 110, 220], [300, 40, 380, 90]]", "[[300, 40, 380, 90], [10, 20, 110, 220]]"),
    "points": ("[[10, 20], [300, 40]]", "[[300, 40], [10, 20]]"),
    "polygon": ("[[10, 10], [90, 10], [90, 90], [10, 90]]", "[[90, 90], [10, 90], [10, 10], [90, 10]]"),
    "ocr": ("the quick brown fox jumps over the lazy dog", "the quick brown fox jumps over the lazy dog"),
    "ordering": ("[3, 1, 4, 2]", "[3, 1, 4, 2]"),
    "permutation": ("[3, 1, 4, 2]", "[3, 1, 4, 2]"),
    "grid_path": ('{"grid": ["..#", "#..", "##."], "start": [0, 0], "goal": [2, 2]}', "RDRD"),
    "chart_table": (
        "| year | rain | sun |\n|---|---|---|\n| 2019 | 640 | 1500 |\n| 2020 | 710 | 1390 |",
        "year,rain,sun\n2019,640,1500\n2020,710,1390",
    ),
    "math": ("1/2", "\\boxed{0.5}"),
    "code": (
        '{"calls": [[[3], 9], [[-4], 16]], "entry_point": "square"}',
        "```python\ndef square(x):\n    return x * x\n```",
    ),
    "judge": ("12", "12"),
}


class BadUsage(Exception):
    """The reward cannot be loaded, or the samples cannot be read; says which and what to do."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the table. passed: None where the check does not apply; detail says why, or what is wrong."""

    check: str
    passed: bool | None
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Known:
    """A sample with the value that its reward has to give; None where it is not known."""

    sample: Sample
    expected: float | None


def check_reward(name: str, options: Mapping[str, Any], samples: Path | None = None) -> Iterator[Finding]:
    """The findings, as they come, of the checks in a process of its own; see the module. Raises BadUsage."""
    reader, writer = os.pipe()
    command = [sys.executable, "-m", "rlvlm_rewards.check", name, "--findings-to", str(writer)]
    command += ["--samples", str(samples)] if samples else []
    command += ["--options", *(f"{key}={json.dumps(value)}" for key, value in options.items())] if options else []
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, pass_fds=(writer,)) as child:
        os.close(writer)
        try:
            yield from _told_by(child, reader)
        finally:
            child.kill()


def _told_by(child: subprocess.Popen[bytes], reader: int) -> Iterator[Finding]:
    lines: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        with open(reader, encoding="utf-8") as file:
            for line in file:
                lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    doing = "loads"
    while True:
        try:
            line = lines.get(timeout=_SILENCE_S)
        except queue.Empty:
            yield Finding(doing, False, f"no answer for {_SILENCE_S:g} s; a reward that may hang runs in a process")
            return
        told: dict[str, Any] = json.loads(line) if line is not None else {"ended": child.wait()}
        match told:
            case {"doing": what}:
                doing = what
            case {"error": message}:
                raise BadUsage(message)
            case {"ended": code}:
                if code:
                    yield Finding(doing, False, f"the process ended with {code}; a reward must leave it alone")
                return
            case _:
                yield Finding(told["check"], told["passed"], _one_line(told["detail"]))


async def findings(reward: Reward, known: Sequence[Known], doing: Callable[[str], None]) -> AsyncIterator[Finding]:
    """All checks in this process. doing: is told what comes next, with the kind of the check before a colon."""
    judged = [await _scored(reward, one.sample, doing, "right answers") for one in known]
    yield _right(known, judged)
    tried = {
        hack: [dataclasses.replace(one.sample, completion=text) for one in known for text in hacks(one.sample)[hack]]
        for hack in hacks(known[0].sample)
    }
    seen = [*zip((one.sample for one in known), judged, strict=True)]
    for hack, samples in tried.items():
        scores = [await _scored(reward, sample, doing, hack) for sample in samples]
        seen += zip(samples, scores, strict=True)
        yield _no_credit(reward, hack, samples, scores)
    for kind, completions in hostile().items():
        texts = {what: dataclasses.replace(known[0].sample, completion=text) for what, text in completions.items()}
        results = {what: await _scored(reward, sample, doing, f"{kind}: {what}") for what, sample in texts.items()}
        seen += [(texts[what], result) for what, result in results.items() if kind != "huge completions (1 MB)"]
        yield _safe(kind, results)
    yield _bounded([result for _, result in seen])
    again = [(sample, first, await _scored(reward, sample, doing, "deterministic")) for sample, first in reversed(seen)]
    yield _deterministic(again)


async def _scored(reward: Reward, sample: Sample, doing: Callable[[str], None], what: str) -> Score:
    doing(what)
    return await score(reward, sample, retries=0)


def _right(known: Sequence[Known], scores: Sequence[Score]) -> Finding:
    check = "right answers get their credit"
    broken = next((result for result in scores if result.failure is not None), None)
    if broken is not None and all(one.expected is None for one in known):
        return Finding(check, False, f"{broken.failure}: {broken.detail}; give examples that fit with --samples")
    wrong = [
        f"{_short(one.sample.completion)} with the reference {_short(one.sample.answer)} gets "
        f"{_said(result)} instead of {one.expected:g}"
        for one, result in zip(known, scores, strict=True)
        if one.expected is not None and (result.value is None or abs(result.value - one.expected) > _FULL)
    ]
    if wrong:
        return Finding(check, False, f"{len(wrong)} of {len(known)}: {wrong[0]}")
    told = sum(one.expected is not None for one in known)
    return Finding(check, True if told else None, f"{told} samples" if told else "no right answer is known: --samples")


def _no_credit(reward: Reward, hack: str, samples: Sequence[Sample], scores: Sequence[Score]) -> Finding:
    check = f"no credit: {hack}"
    if reward.is_form:
        return Finding(check, None, "judges form only; put it beside a reward that judges the answer")
    result, sample = max(zip(scores, samples, strict=True), key=lambda pair: pair[0].value or 0.0)
    best = result.value or 0.0
    if best > NO_CREDIT:
        return Finding(check, False, f"{_short(sample.completion)} gets {best:g}")
    return Finding(check, True, "" if best == 0.0 else f"at most {best:.2g}")


def _safe(kind: str, results: Mapping[str, Score]) -> Finding:
    failed = {
        what: result for what, result in results.items() if result.failure in (Failure.TIMEOUT, Failure.INFRASTRUCTURE)
    }
    first = next(iter(failed.items()), None)
    detail = f"{first[0]}: {_said(first[1])}" if first else f"{len(results)} of them"
    return Finding(f"safe on {kind}", not failed, detail)


def _bounded(scores: Sequence[Score]) -> Finding:
    outside = [result.detail for result in scores if result.failure and "[0, 1]" in result.detail]
    return Finding("bounded", not outside, outside[0] if outside else f"{len(scores)} scores in [0, 1]")


def _deterministic(again: Sequence[tuple[Sample, Score, Score]]) -> Finding:
    differing = [
        f"{_short(sample.completion)} gets {_said(first)}, then {_said(second)}"
        for sample, first, second in again
        if (first.value, first.failure) != (second.value, second.failure)
    ]
    return Finding("deterministic", not differing, differing[0] if differing else f"{len(again)} scored twice")


def _said(result: Score) -> str:
    return f"{result.value:g}" if result.value is not None else f"{result.failure} ({result.detail})"


def _one_line(text: str) -> str:
    line = " ".join(text.encode("utf-8", "backslashreplace").decode().split())
    return line if len(line) <= 300 else f"{line[:297]}..."


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:40]}...{text[-15:]}")


def known_samples(name: str, file: Path | None) -> list[Known]:
    """The samples of a file, or an example for a built-in reward. Raises BadUsage.

    file: JSON lines with completion, answer and expected; optionally task, messages or prompt, thinking, and images
    (paths); any other column goes to the reward.
    """
    if file is None:
        answer, completion = _EXAMPLES.get(name, ("12", "12"))
        expected = 1.0 if name in _EXAMPLES else None
        return [Known(Sample(f"so it is</think>{completion}", answer, task="example"), expected)]
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BadUsage(f"samples is {str(file)!r}: {error}; give a file of JSON lines") from error
    known = [_known(f"{file}, line {number}", line) for number, line in enumerate(lines, 1) if line.strip()]
    if not known:
        raise BadUsage(f"samples is {str(file)!r}: it has no line; give at least one sample")
    return known


def _known(where: str, line: str) -> Known:
    try:
        row = json.loads(line)
        completion, answer, expected = row.pop("completion"), row.pop("answer"), float(row.pop("expected"))
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        mend = 'write {"completion": "...", "answer": "...", "expected": 1.0}'
        raise BadUsage(f"{where}: {type(error).__name__}: {error}; {mend}") from error
    prompt, images = row.pop("prompt", None), row.pop("images", ())
    messages = row.pop("messages", None) or ([{"role": "user", "content": prompt}] if prompt else [])
    sample = Sample(
        str(completion),
        answer if isinstance(answer, str) else json.dumps(answer),
        str(row.pop("task", where)),
        messages,
        partial(_open, images),
        bool(row.pop("thinking", False)),
        columns=row,
    )
    return Known(sample, expected)


def _open(images: Sequence[str]) -> list[Any]:
    from PIL import Image  # only samples with pictures need it

    return [Image.open(path) for path in images]


def parse_options(given: Sequence[str]) -> dict[str, Any]:
    """`key=value`: the value as JSON, or as text where it is none. Raises BadUsage."""
    options: dict[str, Any] = {}
    for text in given:
        key, equals, value = text.partition("=")
        if not equals or not key.isidentifier():
            raise BadUsage(f"option is {text!r}; write key=value, like coordinates=pixels")
        try:
            options[key] = json.loads(value)
        except ValueError:
            options[key] = value
    return options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of both command lines."""
    parser.add_argument("plugin", help="a built-in reward, package.module:attr, path/to/file.py:attr or an entry point")
    parser.add_argument("--options", nargs="+", default=[], metavar="key=value", help="the reward's options")
    parser.add_argument("--samples", type=Path, metavar="FILE.jsonl", help="lines with completion, answer, expected")


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 all checks passed, 1 one failed, 2 bad usage."""
    parser = argparse.ArgumentParser("python -m rlvlm_rewards.check", description="Check that a reward can be trusted.")
    add_arguments(parser)
    parser.add_argument("--findings-to", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.findings_to is not None:
        return asyncio.run(_check_here(arguments, arguments.findings_to))
    failed = False
    try:
        for found in check_reward(arguments.plugin, parse_options(arguments.options), arguments.samples):
            failed |= found.passed is False
            print(f"{verdict(found):<8}{found.check:<44}{found.detail}", flush=True)
    except BadUsage as error:
        print(f"rlvlm_rewards.check: {error}", file=sys.stderr)
        return 2
    return int(failed)


def verdict(found: Finding) -> str:
    return "-" if found.passed is None else "pass" if found.passed else "FAIL"


async def _check_here(arguments: argparse.Namespace, descriptor: int) -> int:
    with open(descriptor, "w", encoding="utf-8") as out:

        def tell(what: Mapping[str, Any]) -> None:
            print(json.dumps(what), file=out, flush=True)

        try:
            reward = load_reward(arguments.plugin, **parse_options(arguments.options))
            known = known_samples(arguments.plugin, arguments.samples)
        except (RewardNotFound, InvalidReward, BadUsage) as error:
            tell({"error": str(error)})
            return 0
        async for found in findings(reward, known, lambda what: tell({"doing": what})):
            tell(dataclasses.asdict(found))
        await reward.aclose()
    return 0


if __name__ == "__main__":
    sys.exit(main())
