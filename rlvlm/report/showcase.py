"""The sampled responses that the report shows: which ones, and in what form the page wants them."""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

from PIL import Image

from rlvlm.report.trajectories import Sampled, evaluation_file, read_trajectories

MOST_TOKENS = 1500  # of one response: a chain of 32k tokens would make the page too heavy to open
MOST_PIXELS = 640  # a side of a picture; larger ones are scaled down
PIXEL_ART = 160  # pictures up to this side are enlarged with hard edges, to show what the policy sees
CONTROL = re.compile(r"\s*<[^<>\s]+>\s*")
SURPRISES = (0.9, 0.5, 0.1)  # probabilities below which a token is underlined, weaker to stronger


@dataclass(frozen=True, slots=True)
class Token:
    """surprise: 0 (expected) to 3 (its probability was below 10%). control: a marker such as <think>, not a word."""

    text: str
    id: int
    logp: float
    surprise: int
    control: bool


@dataclass(frozen=True, slots=True)
class TokenRun:
    """The tokens of one segment. colour: 0 to 5, the segment's turn."""

    weight_version: int
    trained: bool
    colour: int
    tokens: tuple[Token, ...]


@dataclass(frozen=True, slots=True)
class Picture:
    """As a data URL. pixelated: small enough to be enlarged with hard edges."""

    url: str
    width: int
    height: int
    pixelated: bool


@dataclass(frozen=True, slots=True)
class Shown:
    """One response for the page. when: "before RL", "iteration 7", "after RL". pictures: None for a missing file."""

    sample: Sampled
    when: str
    pictures: tuple[Picture | None, ...]
    runs: tuple[TokenRun, ...]
    hidden: int
    given: str

    @property
    def verdict(self) -> str:
        """right, wrong, partly (a value between 0 and 1), or unscored."""
        return {None: "unscored", 1.0: "right", 0.0: "wrong"}.get(self.sample.value, "partly")


def choose(run_folder: Path, count: int) -> list[Shown]:
    """About half of `count` from the evaluations, in pairs before and after of the same tasks, the rest from the RL
    iterations, first to last. Goes by position only, never by result, so that the choice flatters nobody.
    """
    pairs = _evaluation_pairs(run_folder, count // 2)
    training = _from_iterations(run_folder, count - len(pairs))
    if len(pairs) + len(training) < count:
        pairs = _evaluation_pairs(run_folder, count - len(training))
    return [_shown(run_folder, when, sample) for when, sample in [*pairs, *training]]


def _evaluation_pairs(run_folder: Path, count: int) -> list[tuple[str, Sampled]]:
    sides = {
        when: _first_responses(path)
        for when, stage in (("before RL", "sft"), ("after RL", "rl"))
        if (path := evaluation_file(run_folder, stage)).exists()
    }
    if not sides:
        return []
    everywhere = [s for s in next(iter(sides.values())).values() if all(s.task_id in side for side in sides.values())]
    tasks = _spread(everywhere, count // len(sides))
    return [(when, side[task.task_id]) for task in tasks for when, side in sides.items()]


def _first_responses(path: Path) -> dict[str, Sampled]:
    first: dict[str, Sampled] = {}
    for sample in read_trajectories(path):
        first.setdefault(sample.task_id, sample)
    return first


def _spread(samples: Sequence[Sampled], count: int) -> list[Sampled]:
    """`count` samples, taking sources and levels in turn so that no kind of task fills the page."""
    kinds: dict[str, dict[int, list[Sampled]]] = {}
    for sample in samples:
        kinds.setdefault(sample.source, {}).setdefault(sample.level, []).append(sample)
    sources = []
    for position, source in enumerate(sorted(kinds)):
        levels = [kinds[source][level] for level in sorted(kinds[source])]
        start = 2 * position % len(levels)  # sources begin at different levels, or the first picks would all be easy
        sources.append(_in_turn([*levels[start:], *levels[:start]]))
    return _in_turn(sources)[:count]


def _in_turn(lists: Sequence[Sequence[Sampled]]) -> list[Sampled]:
    return [sample for row in zip_longest(*lists) for sample in row if sample is not None]


def _from_iterations(run_folder: Path, count: int) -> list[tuple[str, Sampled]]:
    files = sorted((run_folder / "trajectories").glob("iteration-*.parquet"))
    chosen = []
    for position, path in enumerate(_evenly(files, count)):
        samples = read_trajectories(path)
        if samples:
            # A different place in each file, or the first task source of the mix would be all that is shown.
            sample = samples[position * len(samples) // count]
            chosen.append((f"iteration {sample.iteration}", sample))
    return chosen


def _evenly(files: Sequence[Path], count: int) -> list[Path]:
    """`count` of them from the first to the last; fewer files come several times."""
    if not files or count < 1:
        return []
    last = len(files) - 1
    return [files[round(i * last / max(count - 1, 1))] for i in range(count)]


def _shown(run_folder: Path, when: str, sample: Sampled) -> Shown:
    return Shown(
        sample=sample,
        when=when,
        pictures=tuple(_picture(run_folder / "images" / f"{key}.png") for key in sample.images),
        runs=_token_runs(sample),
        hidden=max(sample.length - MOST_TOKENS, 0),
        given=sample.text.rpartition("</think>")[2].strip() if "</think>" in sample.text else "",
    )


def _token_runs(sample: Sampled) -> tuple[TokenRun, ...]:
    tokens = [
        Token(text, token_id, logp, _surprise(logp), CONTROL.fullmatch(text) is not None)
        for text, token_id, logp in zip(sample.tokens, sample.token_ids, sample.engine_logp, strict=True)
    ][:MOST_TOKENS]
    return tuple(
        TokenRun(span.weight_version, span.trained, turn % 6, tuple(tokens[span.start : span.end]))
        for turn, span in enumerate(sample.segments)
        if span.start < len(tokens)
    )


def _surprise(logp: float) -> int:
    return sum(math.exp(logp) < bound for bound in SURPRISES)


def _picture(path: Path) -> Picture | None:
    if not path.exists():
        return None
    with Image.open(path) as image:
        width, height = image.size
        if max(width, height) <= MOST_PIXELS:
            encoded = path.read_bytes()
        else:
            image.thumbnail((MOST_PIXELS, MOST_PIXELS))
            buffer = io.BytesIO()
            image.save(buffer, format="PNG")
            encoded = buffer.getvalue()
    url = f"data:image/png;base64,{base64.b64encode(encoded).decode()}"
    return Picture(url, width, height, max(width, height) <= PIXEL_ART)


def parts_of(sample: Sampled) -> Mapping[str, float]:
    """What made the response's reward: the score's parts, its value, the reward with the length term, the advantage."""
    known = {"value": sample.value, "reward": sample.reward, "advantage": sample.advantage}
    return {**sample.parts, **{name: value for name, value in known.items() if value is not None}}
