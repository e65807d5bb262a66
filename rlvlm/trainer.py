"""The loop of Kimi k1.5, as data flows:

    Task -- sampler --> prompts -- engine --> k responses each -- judge --> scores -- advantages --> packed batch --
    learner
      ^                                                                |                                             |
      +----------------------- success rates --------------------------+         weights, once per iteration --> engine

`train` runs a recipe's stages; `_iterate` is the picture above; everything else here brings the parts up and writes
down what they say. Randomness is a function of (seed, iteration), so a run that was killed goes on as if it had not
been.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Sequence
from contextlib import aclosing, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from rlvlm.cluster.local import quieten_libraries
from rlvlm.evaluation.evaluate import Evaluator, Measured
from rlvlm.learner.balance import CollapseWatch
from rlvlm.learner.checkpoints import Checkpoints
from rlvlm.learner.group import LearnerGroup
from rlvlm.learner.learner import Parity
from rlvlm.learner.objective import Rewarded, reward_group
from rlvlm.learner.packing import balance, pack
from rlvlm.learner.refused import refusal_note
from rlvlm.limits import LIMITS_FILE
from rlvlm.policy.checkpoint import load_processor
from rlvlm.policy.initial import initial_checkpoint
from rlvlm.policy.prompts import PromptEncoder
from rlvlm.policy.trainable import in_words, planned
from rlvlm.recipe.errors import RunError
from rlvlm.recipe.schema import Recipe
from rlvlm.records import Group
from rlvlm.report.clock import Clock, MemoryWatch
from rlvlm.report.console import Console
from rlvlm.report.iteration import evaluation_record, iteration_record
from rlvlm.report.metrics import MetricsLog
from rlvlm.report.summary import LOOP_PARTS, finish
from rlvlm.report.trajectories import iteration_file, write_trajectories
from rlvlm.rollout.engine import RolloutEngine
from rlvlm.rollout.engine import Sampling as Round
from rlvlm.run import RunFolder
from rlvlm.sampling.sampler import Sampler
from rlvlm.scoring import Judge, opens_thinking
from rlvlm.sft import check_gate, read_gate, train_sft
from rlvlm.tasks.pools import TaskPools


class ParityLost(RunError):
    """Engine and learner disagree about the log-prob of a sampled token."""


def train(recipe: Recipe, run: RunFolder, resume: bool) -> None:
    """Runs the recipe's stages in order, evaluates, and writes summary.json and report.html into the run folder.

    Raises RunError (gate, parity, failing rewards, a dead engine) with what to do about it.
    """
    quieten_libraries()
    with Console() as console, MemoryWatch() as memory:
        clock, log = Clock(), MetricsLog(run.metrics)
        pools = TaskPools(recipe, run.images)
        with clock.part("sft"):
            checkpoint = _fine_tuned(recipe, run, pools, console, log)
        policy = PolicyParts(recipe, run, pools, checkpoint)
        before, after, parity = asyncio.run(_improve(policy, console, log, clock))
        finish(run, recipe, policy.config, before, after, parity, clock, memory, console)


def _fine_tuned(recipe: Recipe, run: RunFolder, pools: TaskPools, console: Console, log: MetricsLog) -> Path:
    """The checkpoint that RL starts from: the recipe's policy, after SFT where the recipe asks for it."""
    target = run.checkpoints / "sft" / "hf"
    if target.is_dir():
        return target  # a resumed run; the folder gets its name only when it is complete
    console.stage("policy", recipe.policy.model)
    start = initial_checkpoint(recipe, run.checkpoints / "initial" / "hf", pools)
    for stage, counts in planned(AutoConfig.from_pretrained(start), recipe).items():
        console.note(f"{stage} trains {in_words(counts)}")
    if "sft" not in recipe.stages:
        return start
    console.stage("sft", f"{recipe.sft.steps} steps of {recipe.sft.batch}, {recipe.sft.ranks} ranks")
    log.path.unlink(missing_ok=True)  # lines of an SFT that was killed
    unfinished = run.checkpoints / "sft-unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    train_sft(recipe, start, unfinished / "hf", run.images, run.metrics)
    unfinished.rename(target.parent)
    return target


class PolicyParts:
    """What goes with the policy everywhere: its checkpoint, its encoder, its tasks, what it must not sample. The
    weights themselves are with the learner and the engine."""

    def __init__(self, recipe: Recipe, run: RunFolder, pools: TaskPools, checkpoint: Path) -> None:
        self.recipe, self.run, self.pools, self.checkpoint = recipe, run, pools, checkpoint
        self.config = AutoConfig.from_pretrained(checkpoint)
        self.processor = load_processor(str(checkpoint))
        self.encoder = PromptEncoder(self.processor, pools.store, self.config)
        self.banned = sorted({*self.encoder.family.placeholder_ids(self.config), *recipe.rollout.ban})

    def engine(self) -> RolloutEngine:
        return RolloutEngine(self.recipe, self.checkpoint, self.encoder, self.banned)

    def learner(self) -> LearnerGroup:
        return LearnerGroup(self.recipe, self.checkpoint, self.banned)


async def _improve(
    policy: PolicyParts, console: Console, log: MetricsLog, clock: Clock
) -> tuple[Measured, Measured | None, Parity | None]:
    """Passes the gate, brings the engine up, and improves the policy."""
    recipe, run = policy.recipe, policy.run
    if "rl" in recipe.stages and "sft" in recipe.stages:
        _pass_gate(policy, console)
    console.stage("engine", "vLLM starts")
    judge = Judge(
        recipe.rewards,
        policy.pools.store,
        thinking=opens_thinking(policy.processor),
        limits_file=run.root / LIMITS_FILE,
        tell=console.note,
    )
    async with aclosing(judge), policy.engine() as engine:
        return await improve(policy, engine, judge, console, log, clock)


async def improve(
    policy: PolicyParts, engine: RolloutEngine, judge: Judge, console: Console, log: MetricsLog, clock: Clock
) -> tuple[Measured, Measured | None, Parity | None]:
    """Evaluation, RL, evaluation, with an engine that has the policy's weights. Gives what was measured before and
    after, and the worst parity; None without RL."""
    recipe = policy.recipe
    evaluator = Evaluator(recipe, policy.run.root, policy.pools, engine, judge, policy.encoder)
    console.stage("evaluation", "on held-out pictures, before RL")
    with clock.part("evaluation"):
        before = await evaluator.measure("sft")
    if "rl" not in recipe.stages:
        return before, None, None
    parity = await _Loop(policy, engine, judge, evaluator, console, log, clock).run(before)
    console.stage("evaluation", "on the same pictures, after RL")
    with clock.part("evaluation"):
        after = await evaluator.measure("rl")
    _log_evaluation(recipe, log, recipe.rl.iterations, after)
    return before, after, parity


def _log_evaluation(recipe: Recipe, log: MetricsLog, iteration: int, measured: Measured) -> None:
    """A point of the curve that evaluation.every asks for, once: a resumed run may come by again."""
    known = any(line.get("stage") == "evaluation" and line["iteration"] == iteration for line in log.read())
    if recipe.evaluation.every and not known:
        log.write(evaluation_record(iteration, measured.result))


def _pass_gate(policy: PolicyParts, console: Console) -> None:
    accuracy = read_gate(policy.checkpoint)
    console.note(f"gate: reads {accuracy:.1%} of what held-out pictures show")
    check_gate(accuracy, policy.recipe)


@dataclass(slots=True)
class _Loop:
    """RL: the parts between which the data flows."""

    policy: PolicyParts
    engine: RolloutEngine
    judge: Judge
    evaluator: Evaluator
    console: Console
    log: MetricsLog
    clock: Clock
    collapse: CollapseWatch = field(default_factory=CollapseWatch)

    async def run(self, before: Measured) -> Parity | None:
        """All iterations that are still to be done. Gives the worst parity seen."""
        recipe, run = self.policy.recipe, self.policy.run
        self.console.stage(
            "rl",
            f"{recipe.rl.iterations} iterations of {recipe.rl.prompts} x {recipe.rl.samples} responses, "
            f"{recipe.rl.objective.preset}",
        )
        sampler = Sampler(self.policy.pools.rl(), recipe.sampling, recipe.seed)
        checkpoints = Checkpoints(run.checkpoints, recipe.checkpoint.keep)
        with closing(self.policy.learner()) as learner:
            done = await self._take_up(checkpoints, sampler, learner)
            _log_evaluation(recipe, self.log, 0, before)
            for iteration in range(done + 1, recipe.rl.iterations + 1):
                with self.clock.part("loop"):
                    await self._iterate(iteration, sampler, learner)
                await self._watch(iteration)
                if iteration % recipe.checkpoint.every == 0 or iteration == recipe.rl.iterations:
                    with self.clock.part("checkpoint"):
                        self._checkpoint(iteration, checkpoints, sampler, learner)
        return _worst_parity(self.log)

    async def _iterate(self, iteration: int, sampler: Sampler, learner: LearnerGroup) -> None:
        """One iteration of online policy mirror descent."""
        recipe, rl, timed = self.policy.recipe, self.policy.recipe.rl, Clock()
        with timed.part("rollout"):
            tasks = sampler.draw(iteration, rl.prompts)
            r3 = rl.router_replay == "r3"
            groups = await self.engine.generate(
                tasks, Round(rl.samples, rl.temperature, rl.max_tokens, f"rl-{iteration}", routing=r3)
            )
        with timed.part("reward"):
            groups = await self.judge.score(groups, progress=iteration / rl.iterations)
            rewarded = [reward_group(group, rl, iteration) for group in groups]
        with timed.part("learner"):
            batch = pack(rewarded, self.policy.encoder, recipe, recipe.seed + iteration)
            reference = learner.reference(batch)
            self._hold_parity(reference.parity)
            learned = learner.step(batch, reference) | {"learner/balance": balance(batch, self.policy.encoder)}
        with timed.part("transfer"):
            await self.engine.update_weights(learner.parcel(), version=iteration)
        sampler.update(groups)
        self._write_down(
            iteration, rewarded, groups, {**learned, "entropy": reference.entropy}, reference.parity, timed
        )

    async def _watch(self, iteration: int) -> None:
        """Evaluates on held-out tasks where evaluation.every says so; after the last iteration `_improve` does."""
        recipe = self.policy.recipe
        every = recipe.evaluation.every
        if not every or iteration % every or iteration == recipe.rl.iterations:
            return
        with self.clock.part("evaluation"):
            measured = await self.evaluator.watch(iteration)
        _log_evaluation(recipe, self.log, iteration, measured)
        result = measured.result
        self.console.note(f"held out: accuracy {result['accuracy']:.1%}, length {result['mean_length']:.1f}")

    def _hold_parity(self, parity: Parity) -> None:
        limit = self.policy.recipe.parity.max
        if limit is not None and parity.max > limit:
            raise ParityLost(
                f"engine and learner disagree by {parity.max:.2g} on the log-prob of a sampled token (mean "
                f"{parity.mean:.2g} over {parity.tokens} tokens), and parity.max = {limit:g}: the policy that samples "
                "is not the one that learns",
                mend="in bfloat16 set parity.max to what rounding gives (0.2 for kimi_k25); in float32 suspect the "
                "engine or the processor, and compare both on one prompt before going on",
            )

    def _write_down(
        self,
        iteration: int,
        rewarded: Sequence[Rewarded],
        groups: Sequence[Group],
        learned: dict[str, float],
        parity: Parity,
        timed: Clock,
    ) -> None:
        run = self.policy.run
        self.policy.pools.store.save_all(key for group in groups for key in group.task.images)
        write_trajectories(
            iteration_file(run.root, iteration),
            groups,
            self.policy.encoder.piece,
            iteration=iteration,
            rewards=[one.reward_K for one in rewarded],
            advantages=[one.advantage_K for one in rewarded],
        )
        record = iteration_record(
            iteration, rewarded, learned, parity, self.policy.recipe.rl.length, timed.seconds(*LOOP_PARTS)
        )
        self.log.write(record)
        for note in (self.collapse.note(record), refusal_note(record, run.root)):
            if note:
                self.console.note(note)
        self.console.iteration(record, self.policy.recipe.rl.iterations)

    def _checkpoint(self, iteration: int, checkpoints: Checkpoints, sampler: Sampler, learner: LearnerGroup) -> None:
        checkpoints.write(iteration, learner.save, {"iteration": iteration, "sampler": sampler.state_dict()})

    async def _take_up(self, checkpoints: Checkpoints, sampler: Sampler, learner: LearnerGroup) -> int:
        """Goes back to the last complete checkpoint. Gives the iteration that it was written after; 0 if there is
        none."""
        done = max(checkpoints.steps(), default=0)
        self.log.truncate_after(done)
        if done:
            self.console.note(f"resumes after iteration {done}")
            sampler.load_state_dict(checkpoints.state(done)["sampler"])
            learner.load(checkpoints.path(done))
            await self.engine.update_weights(learner.parcel(), version=done)
        return done


def _worst_parity(log: MetricsLog) -> Parity | None:
    lines: list[dict[str, Any]] = [line for line in log.read() if line.get("parity/max") is not None]
    if not lines:
        return None
    tokens = sum(line["parity/tokens"] for line in lines)
    mean = sum(line["parity/mean"] * line["parity/tokens"] for line in lines) / tokens
    return Parity(max(line["parity/max"] for line in lines), mean, tokens)
