"""A run folder as a real run leaves it, written in a second: real digits, chains with slips, the project's own writers.

Nothing is trained. What is drawn at random is only what a policy would have said; all else goes the way of a run.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from rlvlm_rewards.records import Failure, Score
from sklearn.datasets import load_digits

from rlvlm.evaluation.metrics import evaluate, gain, length_change, styles_of
from rlvlm.records import Group, Segment, StopReason, Task, Trajectory
from rlvlm.report.metrics import MetricsLog
from rlvlm.report.trajectories import evaluation_file, iteration_file, write_trajectories

ITERATIONS = 20
SKILL = {"short": 0.88, "medium": 0.985, "verbose": 0.95}  # chance that one digit is read right
RECIPE = {
    "name": "tiny_demo",
    "seed": 0,
    "stages": ["sft", "rl"],
    "policy": {"model": "tiny_kimi", "dtype": "float32"},
    "tasks": {"train": [{"generator": "digit_sum"}, {"generator": "largest_digit"}]},
    "sft": {"phases": [{"steps": 250}, {"steps": 150}], "batch": 48, "learning_rate": 3e-3},
    "rl": {"iterations": ITERATIONS, "prompts": 32, "samples": 8, "length": {"start_iteration": 6}},
    "parity": {"max": 1e-3},
    "report": {"trajectories": 12},
}


class Words:
    """Word <-> token id."""

    def __init__(self) -> None:
        self.ids: dict[str, int] = {}

    def encode(self, word: str) -> int:
        return self.ids.setdefault(word, 300 + len(self.ids))

    def decode(self, token: int) -> str:
        return next(word for word, i in self.ids.items() if i == token)


def tasks(folder: Path, count: int, rng: random.Random, prefix: str) -> list[tuple[Task, list[int]]]:
    """Tasks with the digits that their pictures show; the pictures are written to `folder`/images."""
    scans = load_digits()
    (folder / "images").mkdir(parents=True, exist_ok=True)
    made = []
    for i in range(count):
        level, source = 1 + i % 5, ("digit_sum", "largest_digit")[i % 2]
        chosen = [rng.randrange(len(scans.images)) for _ in range(level + 1)]
        digits = [int(scans.target[j]) for j in chosen]
        canvas = np.zeros((64, 64), dtype=np.uint8)
        for cell, j in zip(sorted(rng.sample(range(16), len(chosen))), chosen, strict=True):
            row, column = divmod(cell, 4)
            scan = np.kron(scans.images[j], np.ones((2, 2))) * 15.9
            canvas[16 * row : 16 * row + 16, 16 * column : 16 * column + 16] = scan.astype(np.uint8)
        key = f"{prefix}{i:03d}"
        Image.fromarray(255 - canvas).save(folder / "images" / f"{key}.png")
        asked = {"digit_sum": "What is the sum of the digits?", "largest_digit": "Which digit is the largest?"}[source]
        content = [{"type": "image"}, {"type": "text", "text": asked}]
        answer = str(sum(digits) if source == "digit_sum" else max(digits))
        task = Task(
            id=f"{source}/{key}",
            messages=({"role": "user", "content": content},),
            images=(key,),
            answer=answer,
            reward="exact",
            level=level,
            source=source,
        )
        made.append((task, digits))
    return made


def style_lengths(digits: list[int]) -> dict[str, int]:
    n, tail = len(digits), 4
    return {"short": 2 * n + tail, "medium": 3 * n + tail, "verbose": 6 * n + 1 + tail}


def respond(
    task: Task, digits: list[int], style: str, index: int, version: int, skill: float, rng: random.Random, words: Words
) -> Trajectory:
    """A chain in `style` with slips of the eye, its log-probs, and the answer that it leads to."""
    read = [d if rng.random() < SKILL[style] * skill else rng.randrange(10) for d in digits]
    running, chain = 0, []
    for k, digit in enumerate(read):
        running = running + digit if task.source == "digit_sum" else max(running, digit)
        chain.append(
            {"short": f" {running} ;", "medium": f" {digit} : {running}", "verbose": f" {digit} : {running}"}[style]
        )
        assert k < 16
    thought = "".join(chain)
    if style == "verbose":
        thought += " check" + thought
    pieces = ["<think>", *(f" {word}" for word in thought.split()), "</think>", f" {running}", "<|im_end|>"]
    ids = tuple(words.encode(piece) for piece in pieces)
    logp = tuple(-rng.expovariate(2.2) if any(c.isdigit() for c in p) else -rng.expovariate(60) for p in pieces)
    cut = len(ids) // 2 if version > 3 and rng.random() < 0.4 else len(ids)
    segments = [Segment(ids[:cut], logp[:cut], True, version if cut == len(ids) else version - 1)]
    if cut < len(ids):
        segments.append(Segment(ids[cut:], logp[cut:], True, version))
    text = "".join(pieces[:-1])
    return Trajectory(task.id, index, tuple(range(20)), tuple(segments), StopReason.END, text)


def score(task: Task, trajectory: Trajectory, rng: random.Random) -> Score:
    if rng.random() < 0.004:
        return Score(failure=Failure.TIMEOUT, detail="no answer within 10 s")
    right = float(trajectory.text.rpartition("</think>")[2].strip() == task.answer)
    return Score(value=right, parts={"exact": right, "format": 1.0})


def group(
    task: Task, digits: list[int], k: int, progress: float, version: int, rng: random.Random, words: Words
) -> Group:
    """progress: 0 is the SFT model with mixed styles, 1 one that has learned to prefer `medium` and reads better."""
    weights = [0.34 * (1 - progress), 0.33 + 0.6 * progress, 0.33 - 0.26 * progress]
    styles = rng.choices(["short", "medium", "verbose"], weights, k=k)
    skill = 0.92 + 0.04 * progress
    said = tuple(respond(task, digits, s, j, version, skill, rng, words) for j, s in enumerate(styles))
    return Group(task, said, tuple(score(task, t, rng) for t in said))


def write_metrics(folder: Path, iterations: int, rng: random.Random) -> None:
    log = MetricsLog(folder / "metrics.jsonl")
    for step in range(10, 401, 10):
        loss = 0.09 + 2.6 * math.exp(-step / 70) + (0.5 if step < 190 else 0.5 * math.exp(-(step - 190) / 25))
        log.write(
            {
                "stage": "sft",
                "step": step,
                "loss": loss * rng.uniform(0.95, 1.05),
                "mean_token_accuracy": min(0.985, 1 - 0.3 * loss + rng.uniform(-0.01, 0.01)),
                "grad_norm": 0.4 + loss * rng.uniform(0.5, 1.5),
                "learning_rate": 3e-3 * 0.5 * (1 + math.cos(math.pi * step / 400)),
                "seconds": 0.29 * step,
            }
        )
    for i in range(1, iterations + 1):
        p = 1 - math.exp(-i / 7)
        log.write(rl_record(i, p, rng))


def rl_record(i: int, p: float, rng: random.Random) -> dict[str, object]:
    seconds = {"rollout": 2.6, "reward": 0.05, "learner": 2.9, "transfer": 0.12, "evaluation": 0.0, "other": 0.14}
    timed = {f"seconds/{part}": mean * rng.uniform(0.9, 1.1) for part, mean in seconds.items()}
    accuracy = 0.52 + 0.24 * p + rng.uniform(-0.03, 0.03)
    length = 19.5 - 5 * p + rng.uniform(-0.6, 0.6)
    return {
        "stage": "rl",
        "iteration": i,
        "reward": accuracy - (0.03 if i >= 6 else 0),
        "reward_std": 0.36 - 0.08 * p,
        "accuracy": accuracy,
        "completions/mean_length": length,
        "completions/max_length": 41 + rng.randrange(6),
        "completions/clipped_ratio": 0.0,
        "kl": 0.002 + 0.004 * rng.random(),
        "entropy": 0.31 - 0.14 * p + rng.uniform(-0.008, 0.008),
        "loss": 0.09 - 0.03 * p + rng.uniform(-0.006, 0.006),
        "grad_norm": 2.4 - 0.9 * p + rng.uniform(-0.3, 0.5),
        "parity/max": 10 ** rng.uniform(-5.4, -4.7),
        "parity/mean": 10 ** rng.uniform(-7.1, -6.8),
        "load/entropy": 0.962 + rng.uniform(-0.006, 0.006),
        "load/max_mean": 1.6 + rng.uniform(-0.1, 0.15),
        "length_reward": int(i >= 6),
        "failures": int(rng.random() < 0.2),
        "mean_level": min(3.0, 1.2 + 0.18 * i),
        "tokens": int(256 * length),
        "tokens_per_s": 256 * length / 5.8,
        "reward/format": min(1.0, accuracy + 0.02),
        "reward/number": accuracy - 0.01,
        "success_rate/digit_sum": accuracy - 0.06,
        "success_rate/largest_digit": accuracy + 0.07,
        **timed,
        "seconds/iteration": sum(timed.values()),
    }


def write_summary(
    folder: Path, before: list[Group], after: list[Group], greedy: tuple[list[Group], list[Group]], lengths: dict
) -> dict:
    summary = {
        "name": "tiny_demo",
        "seed": 0,
        "wall_s": 287.4,
        "peak_rss_bytes": 5_310_000_000,
        "policy": {"architecture": "kimi_k25", "parameters": 622_752},
        "versions": {"torch": "2.13.0", "vllm": "0.32.0", "deepspeed": "0.19.8", "trl": "1.16.0"},
        "zero_stage": 1,
        "evaluation": {"sft": evaluate(before, greedy[0], lengths), "rl": evaluate(after, greedy[1], lengths)},
        "accuracy_gain": gain(before, after),
        "length_change": length_change(before, after),
        "parity": {"max": 1.94e-5, "mean": 1.2e-7, "tokens": 83_211},
        "seconds": {
            "sft": 117.0, "rollout": 52.3, "reward": 1.1, "learner": 58.4,
            "transfer": 2.4, "evaluation": 39.7, "other": 6.1,
        },
    }  # fmt: skip
    (folder / "summary.json").write_text(json.dumps(summary, indent=1))
    return summary


def write_run(folder: Path, *, iterations: int = ITERATIONS, finished: bool = True, held_out: int = 120) -> Path:
    """The whole folder. iterations: how many RL iterations there are so far."""
    rng, words = random.Random(7), Words()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE, sort_keys=False))
    write_metrics(folder, iterations, rng)
    pool, asked = tasks(folder, 12, rng, "train"), tasks(folder, held_out, rng, "held")
    lengths = {task.id: style_lengths(digits) for task, digits in [*pool, *asked]}
    for i in range(1, iterations + 1):
        groups = [group(t, d, 4, 1 - math.exp(-i / 7), i, rng, words) for t, d in rng.sample(pool, 6)]
        values = [[s.value for s in g.scores] for g in groups]
        advantages = [[None if v is None else v - 0.5 for v in row] for row in values]
        styles = styles_of(groups, lengths)
        path = iteration_file(folder, i)
        write_trajectories(
            path, groups, words.decode, iteration=i, rewards=values, advantages=advantages, styles=styles
        )
    evaluated, best = {}, {}
    for stage, progress, version in (("sft", 0.0, 0), ("rl", 1.0, iterations)):
        evaluated[stage] = [group(t, d, 4, progress, version, rng, words) for t, d in asked]
        best[stage] = [group(t, d, 1, 0.2 + 0.8 * progress, version, rng, words) for t, d in asked]
        if stage == "sft" or finished:
            path, styles = evaluation_file(folder, stage), styles_of(evaluated[stage], lengths)
            write_trajectories(path, evaluated[stage], words.decode, iteration=version, styles=styles)
    if finished:
        write_summary(folder, evaluated["sft"], evaluated["rl"], (best["sft"], best["rl"]), lengths)
    return folder


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run; read only, copy it before changing it."""
    return write_run(tmp_path_factory.mktemp("runs") / "tiny_demo")


@pytest.fixture(scope="session")
def make_run() -> Callable[..., Path]:
    return write_run
