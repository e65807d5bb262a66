"""The reward `math`: is the answer mathematically the reference? On Math-Verify, in processes that may be killed."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from rlvlm_rewards.answers import final_answer
from rlvlm_rewards.math import pool
from rlvlm_rewards.math.pool import Outcome, PoolBroken, Question
from rlvlm_rewards.prompt import prompt_text
from rlvlm_rewards.records import Failure, Sample, Score

_LONGEST = 2000  # characters; a longer box is no answer, and of a longer text without a box the end is read


@dataclass(frozen=True)
class Math:
    """1.0 if the final answer of the response equals the reference, else 0.0.

    Only the final answer counts (see `final_answer`), as one candidate: of a sentence without a box, its last
    expression. A list of candidates equals only a reference that is that list. Numbers agree to 1e-5 of their size or
    better. What is left standing as an integral, sum, product, limit or derivative is no answer, and neither is the
    expression to be worked out, copied from the prompt.

    The reference is text, LaTeX or a box: a number, an expression, an equation, a set, an interval, a tuple, a matrix,
    a choice's letter, words.

    timeout_s: seconds of processor time that reading the reference may take, and reading and comparing the answer.
    workers: processes, shared by all rewards of this process with equal options.

    An answer that cannot be read in time is 0.0; so is one whose comparison takes too long, if a quarter of the limit
    is not enough to compare it with plain numbers. A reference that cannot be read and compared with 0 in time is
    Failure.UNPARSABLE_REFERENCE. Where only the two together take too long, nobody knows: Failure.TIMEOUT.
    """

    workers: int = 2
    timeout_s: float = 1.0

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise ValueError(f"workers is {self.workers}; give the number of processes, 1 or more")
        if not 0.01 <= self.timeout_s <= 3600:
            raise ValueError(f"timeout_s is {self.timeout_s}; give seconds from 0.01 to 3600")

    async def __call__(self, sample: Sample) -> Score:
        reference = final_answer(sample.answer)
        if reference is None or len(reference) > _LONGEST:
            return _unparsable(sample)
        question = Question(reference, *_answer(sample))
        try:
            outcome = await asyncio.wrap_future(pool.ask(self.workers, self.timeout_s, question))
        except PoolBroken as error:
            detail = f"math: {error}; is math-verify installed?"
            return Score(failure=Failure.INFRASTRUCTURE, detail=detail)
        return _score(sample, outcome)

    async def aclose(self) -> None:
        """Ends the processes, of all rewards with equal options; one that is used again starts new ones."""
        await asyncio.to_thread(pool.close, self.workers, self.timeout_s)


def _answer(sample: Sample) -> tuple[str, bool, bool]:
    """The final answer, whether it stood in a box, and whether it stands in the prompt. No answer, or one that is too
    long, is an empty box: the reference is looked at all the same."""
    answer = final_answer(sample.completion, sample.thinking) or ""
    whole = sample.completion.rpartition("</think>")[2].strip()
    boxed = answer != whole
    if len(answer) > _LONGEST:
        answer = "" if boxed else answer[-_LONGEST:]
    squeezed = "".join(answer.split())
    return answer, boxed, bool(squeezed) and squeezed in "".join(prompt_text(sample.messages).split())


def _score(sample: Sample, outcome: Outcome) -> Score:
    if outcome is Outcome.NO_REFERENCE:
        return _unparsable(sample)
    if outcome in (Outcome.RIGHT, Outcome.WRONG):
        return Score(value=float(outcome is Outcome.RIGHT))
    failure = Failure.INFRASTRUCTURE if outcome is Outcome.CRASH else Failure.TIMEOUT
    detail = f"task {sample.task!r}: comparing with the reference {sample.answer!r:.200} ended in {outcome.value}"
    return Score(failure=failure, detail=detail)


def _unparsable(sample: Sample) -> Score:
    detail = (
        f"task {sample.task!r}: reference answer {sample.answer!r:.200} cannot be read as mathematics in time; "
        "mend the row or its reward"
    )
    return Score(failure=Failure.UNPARSABLE_REFERENCE, detail=detail)
