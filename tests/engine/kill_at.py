"""Runs the command line and kills its own process, without any warning, at a chosen point of RL (for test_resume.py).

Usage: python kill_at.py rollout|learner|checkpoint train recipe.yaml ...
"""

import asyncio
import os
import signal
import sys

from rlvlm import cli
from rlvlm.learner.learner import Learner
from rlvlm.rollout.engine import RolloutEngine

ITERATION = 4  # with a checkpoint every 2 iterations: 2 is whole, 4 is at hand


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def in_rollout() -> None:
    generate = RolloutEngine.generate

    async def doomed(self, tasks, sampling):
        if sampling.round == f"rl-{ITERATION}":
            asyncio.get_running_loop().call_later(0.15, die)  # the engine is at work by then
        return await generate(self, tasks, sampling)

    RolloutEngine.generate = doomed


def in_learner_step() -> None:
    accumulate, calls = Learner._accumulate, []
    step = Learner.step

    def counted_step(self, batch, reference):
        calls.append(0)
        return step(self, batch, reference)

    def doomed(self, *args, **kwargs):
        result = accumulate(self, *args, **kwargs)
        if len(calls) == ITERATION:
            die()  # after the first of several backward passes
        return result

    Learner.step, Learner._accumulate = counted_step, doomed


def in_checkpoint_write() -> None:
    save, calls = Learner.save, []

    def doomed(self, folder):
        calls.append(0)
        if len(calls) == ITERATION // 2:
            (folder / "state").mkdir()
            (folder / "state" / "half").write_bytes(b"0" * 1000)
            die()
        return save(self, folder)

    Learner.save = doomed


if __name__ == "__main__":
    {"rollout": in_rollout, "learner": in_learner_step, "checkpoint": in_checkpoint_write}[sys.argv[1]]()
    sys.exit(cli.main(sys.argv[2:]))
