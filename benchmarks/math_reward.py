"""The price of killable processes: the reward `math` against Math-Verify in the calling process.

    .venv/bin/python benchmarks/math_reward.py [--rounds 7] [--questions 100] [--judge]

Paired: each round takes questions nobody has seen (so nothing is remembered, which a group of samples would profit
from), and every way answers the same ones. `bare` is parse and verify in this process, with Math-Verify's own time
limits (SIGALRM: they work in the main thread only); `one` is the reward, one question at a time; `many` is the reward,
all questions at once, on as many processes as the machine has cores; `pool per call` is the usual way to a time limit
that holds in any thread, a new ProcessPoolExecutor for each question. Last, what bombs cost the reward, and bare verify
with the same limit of a second. `--judge` exits with 1 unless the claims at the end hold.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

from math_verify import parse, verify
from rlvlm_rewards import Sample
from rlvlm_rewards.math import Math

BOMB = r"9^{9^{9^{9}}}"
_PER_CALL = 2  # questions a round; each takes a second or so


def questions(count: int, rng: random.Random) -> list[tuple[str, str, bool]]:
    """Reference, answer, whether it is right: fractions, roots, polynomials, sets, intervals; every third is wrong."""
    made = []
    for index in range(count):
        a, b, c = (rng.randrange(2, 10**6) for _ in range(3))
        wrong = int(index % 3 == 0)
        reference, answer = [
            (f"{a}/{b}", rf"\frac{{{a * c + wrong}}}{{{b * c}}}"),
            (rf"{a}\sqrt{{{b}}}", rf"\sqrt{{{b}}} \cdot {a + wrong}"),
            (f"x^2 + {a}x + {b}", f"{b} + x(x + {a + wrong})"),
            (rf"\{{{a}, {b}, {c}\}}", f"{c}, {a + wrong}, {b}"),
            (f"[{a}, {a + b})", f"[{a}, {a + b + wrong})"),
        ][index % 5]
        made.append((reference, answer, not wrong))
    return made


def bare(asked: Sequence[tuple[str, str, bool]]) -> list[bool]:
    return [verify(parse(f"${reference}$"), parse(rf"\boxed{{{answer}}}")) for reference, answer, _ in asked]


async def one(math: Math, asked: Sequence[tuple[str, str, bool]]) -> list[bool]:
    return [(await math(Sample(rf"\boxed{{{answer}}}", reference))).value == 1.0 for reference, answer, _ in asked]


async def many(math: Math, asked: Sequence[tuple[str, str, bool]]) -> list[bool]:
    scores = await asyncio.gather(*(math(Sample(rf"\boxed{{{answer}}}", reference)) for reference, answer, _ in asked))
    return [score.value == 1.0 for score in scores]


def pool_per_call(asked: Sequence[tuple[str, str, bool]]) -> list[bool]:
    values = []
    for question in asked:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            values += pool.submit(bare, [question]).result(timeout=60)
    return values


def seconds_each(
    way: Callable[[Sequence[tuple[str, str, bool]]], list[bool]], asked: list[tuple[str, str, bool]]
) -> float:
    began = time.perf_counter()
    values = way(asked)
    took = time.perf_counter() - began
    assert values == [right for *_, right in asked], "a verdict is wrong"
    return took / len(asked)


def measure(rounds: int, count: int) -> dict[str, list[float]]:
    rng = random.Random(0)
    single, all_cores = Math(workers=1), Math(workers=os.cpu_count() or 1)
    ways = {
        "bare": bare,
        "one": lambda asked: asyncio.run(one(single, asked)),
        "many": lambda asked: asyncio.run(many(all_cores, asked)),
        "pool per call": lambda asked: pool_per_call(asked[:_PER_CALL]),
    }
    took: dict[str, list[float]] = {name: [] for name in ways}
    for round_ in range(-1, rounds):
        asked = questions(count, rng)
        for name, way in sorted(ways.items(), key=lambda _: rng.random()):
            mine = asked[:_PER_CALL] if name == "pool per call" else asked
            seconds = seconds_each(way, mine)
            if round_ >= 0:  # the first warms everything up
                took[name].append(seconds)
    return took


def bomb_s() -> list[float]:
    """Seconds that each of five different bombs costs the reward."""

    async def once(base: int) -> float:
        began = time.perf_counter()
        score = await math(Sample(rf"\boxed{{{base}^{{{BOMB}}}}}", "7"))
        assert score.value == 0.0
        return time.perf_counter() - began

    math = Math(workers=1)
    return [asyncio.run(once(base)) for base in range(2, 7)]


def bare_bomb_s(base: int) -> float:
    answer = parse(f"${base}^{{{BOMB}}}$")
    began = time.perf_counter()
    assert not verify(parse("$7$"), answer, timeout_seconds=1)
    return time.perf_counter() - began


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--questions", type=int, default=100)
    parser.add_argument("--judge", action="store_true")
    arguments = parser.parse_args()
    took = measure(arguments.rounds, arguments.questions)
    ratios = {
        name: statistics.median(own / base for own, base in zip(times, took["bare"], strict=True))
        for name, times in took.items()
    }
    print(f"{'way':15} {'ms each':>9} {'each second':>12} {'time over bare':>15}")
    for name, times in took.items():
        middle = statistics.median(times)
        print(f"{name:15} {middle * 1e3:9.2f} {1 / middle:12.0f} {ratios[name]:15.2f}")
    bombs, bare_bombs = bomb_s(), [bare_bomb_s(base) for base in range(2, 7)]
    print(f"seconds for a bomb: {statistics.median(bombs):.2f} (most {max(bombs):.2f})", end="")
    print(f", bare {statistics.median(bare_bombs):.2f} (most {max(bare_bombs):.2f})")
    claims = {
        "one <= 2 x bare": ratios["one"] <= 2,
        "many <= 1.5 x bare": ratios["many"] <= 1.5,
        "pool per call >= 10 x one": ratios["pool per call"] >= 10 * ratios["one"],
        "a bomb <= 2 s": statistics.median(bombs) <= 2,
    }
    for claim, holds in claims.items():
        print(f"{'holds' if holds else 'FAILS'}: {claim}")
    return int(arguments.judge and not all(claims.values()))


if __name__ == "__main__":
    sys.exit(main())
