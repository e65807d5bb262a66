"""A reward function of any accepted form behind one face: `await reward(sample) -> Score`, which never raises."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import functools
import inspect
import math
import threading
import traceback
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from numbers import Real
from typing import Any, TypeVar, overload

from rlvlm_rewards.records import Failure, Sample, Score

Function = TypeVar("Function", bound=Callable[..., Any])  # a function or a class of callable instances
_INLINE, _FORM, _BONUS, _KEEPS_TIME = "_rlvlm_inline", "_rlvlm_form", "_rlvlm_bonus", "_rlvlm_keeps_time"


def inline(function: Function) -> Function:
    """Marks a synchronous reward, a function or a class of them, as cheap (microseconds) and never blocking: it runs in
    the event loop, with neither a thread nor a time limit."""
    setattr(function, _INLINE, True)
    return function


def form(function: Function) -> Function:
    """Marks a reward of form: it does not say whether the answer is right, so a wrong answer may well get all of it."""
    setattr(function, _FORM, True)
    return function


def bonus(function: Function) -> Function:
    """Marks a reward that a composition pays only when the rest of it is right."""
    setattr(function, _BONUS, True)
    return function


def keeps_time(function: Function) -> Function:
    """Marks a reward that ends on its own, whatever the response: a limit from outside would make a failure of a slow
    answer, which is wrong and has to count as wrong."""
    setattr(function, _KEEPS_TIME, True)
    return function


class Kind(Enum):
    """Where a reward runs."""

    INLINE = "inline"
    THREAD = "thread"
    ASYNC = "async"


@dataclass(frozen=True, slots=True)
class Reward:
    """A loaded reward. `await reward(sample)` gives a Score; what the function raises or returns wrongly becomes a
    Failure.INFRASTRUCTURE whose detail names the reward and the place. `reward(prompts, completions, **columns)` gives
    a list of values, None for a failure: a reward is a reward function of TRL as it is (see `trl.score_batch`).

    arguments: makes the call's positional and keyword arguments of a sample.
    unwrap: takes the value out of what came back.
    """

    name: str
    function: Callable[..., Any]
    kind: Kind
    arguments: Callable[[Sample], tuple[tuple[Any, ...], Mapping[str, Any]]]
    unwrap: Callable[[Any], Any]

    @property
    def __name__(self) -> str:
        return self.name

    @overload
    def __call__(self, sample: Sample) -> Coroutine[Any, Any, Score]: ...

    @overload
    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any
    ) -> list[float | None]: ...  # TRL's

    def __call__(self, *args: Any, **columns: Any) -> Any:
        if len(args) == 1 and not columns:
            return self.score(args[0])
        if not args and set(columns) == {"sample"}:
            return self.score(columns["sample"])
        return self._batch(*args, **columns)

    def _batch(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float | None]:
        from rlvlm_rewards.trl import score_batch  # it scores with this module's rewards

        return score_batch(self, prompts, completions, columns)

    @property
    def is_form(self) -> bool:
        return bool(getattr(self.function, _FORM, False))

    @property
    def is_bonus(self) -> bool:
        return bool(getattr(self.function, _BONUS, False))

    @property
    def keeps_time(self) -> bool:
        return bool(getattr(self.function, _KEEPS_TIME, False))

    async def aclose(self) -> None:
        """Gives back what the reward holds open, if anything; the next sample opens it anew."""
        close = getattr(self.function, "aclose", None)
        if close is not None:
            await close()

    async def score(self, sample: Sample) -> Score:
        """Scores one response, without limits of time."""
        if self.kind is Kind.INLINE:
            return self.now(sample)
        if self.kind is Kind.THREAD:
            return await _in_thread(self.now, sample)
        # A plugin may raise anything; at this border it becomes a counted failure. Cancellation goes through.
        try:
            args, kwargs = self.arguments(sample)
            return self._judge(await self.function(*args, **kwargs))
        except (Exception, SystemExit) as error:  # noqa: BLE001
            return self._raised(error)

    def now(self, sample: Sample) -> Score:
        """Scores in the calling thread; for synchronous rewards only."""
        try:
            args, kwargs = self.arguments(sample)
            return self._judge(self.function(*args, **kwargs))
        except (Exception, SystemExit) as error:  # noqa: BLE001 (the same border)
            return self._raised(error)

    def failed(self, detail: str, failure: Failure = Failure.INFRASTRUCTURE) -> Score:
        """A failure whose detail starts with the reward's name."""
        return Score(failure=failure, detail=f"reward {self.name!r} {detail}")

    def _judge(self, returned: Any) -> Score:
        value = self.unwrap(returned)
        if isinstance(value, Score):
            return value
        if value is None:
            return self.failed("returned None: no score for this sample")
        if not isinstance(value, Real):
            return self.failed(f"returned {value!r:.200} ({type(value).__name__}); return a float in [0, 1] or a Score")
        number = float(value)
        if math.isnan(number) or not 0.0 <= number <= 1.0:
            return self.failed(f"returned {number!r}; scale it into [0, 1]")
        return Score(value=number)

    def _raised(self, error: BaseException) -> Score:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        return self.failed(f"raised {type(error).__name__}: {error} ({frame.filename}:{frame.lineno})")


def wrap(name: str, function: Callable[..., Any]) -> Reward:
    """Recognises the form of a reward function. Raises TypeError, with the mend, for what is none."""
    if inspect.isclass(function) or not callable(function):
        raise TypeError(f"{function!r:.100} is not a function; name a function, a static method or a callable instance")
    plain = function.func if isinstance(function, functools.partial) else function
    bound = function.keywords if isinstance(function, functools.partial) else {}
    parameters = {one: kind for one, kind in inspect.signature(function).parameters.items() if one not in bound}
    is_async = inspect.iscoroutinefunction(plain) or inspect.iscoroutinefunction(type(plain).__call__)
    is_inline = getattr(plain, _INLINE, False) and not is_async
    kind = Kind.ASYNC if is_async else Kind.INLINE if is_inline else Kind.THREAD
    if "completions" in list(parameters)[:2]:

        def columns(sample: Sample) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
            return (), {key: column for key, column in _columns(sample, parameters).items() if key not in bound}

        return Reward(name, function, kind, columns, _only_one)
    try:
        inspect.signature(function).bind(object())
    except TypeError as error:
        raise TypeError(
            f"its signature is {inspect.signature(function)} ({error}); write `f(sample)`, or "
            "`f(prompts, completions, **columns)` for a batch"
        ) from error
    return Reward(name, function, kind, lambda sample: ((sample,), {}), lambda returned: returned)


def _columns(sample: Sample, parameters: Mapping[str, inspect.Parameter]) -> dict[str, Any]:
    """TRL's keyword arguments for a batch of one. TRL gives chat messages when the prompt is a chat, else strings."""
    chat = bool(sample.messages)
    columns: dict[str, Any] = {
        **{name: [value] for name, value in sample.columns.items()},
        "prompts": [list(sample.messages) if chat else ""],
        "completions": [[{"role": "assistant", "content": sample.completion}] if chat else sample.completion],
        "answer": [sample.answer],
        "solution": [sample.answer],
        "task": [sample.task],
        "messages": [list(sample.messages)],
    }
    if "images" in parameters:  # decoding pictures costs: only for those who ask by name
        columns["images"] = [sample.images]
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        return columns
    return {name: column for name, column in columns.items() if name in parameters}


def _only_one(values: Any) -> Any:
    if not isinstance(values, Sequence) or isinstance(values, str) or len(values) != 1:
        raise TypeError(f"a batch reward returns a list with one value per completion, not {values!r:.200} for one")
    return values[0]


async def _in_thread(function: Callable[[Sample], Score], sample: Sample) -> Score:
    """A thread of its own, and a daemon: in a pool, rewards that never return would take every place."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Score] = loop.create_future()
    context = contextvars.copy_context()

    def deliver(result: Score) -> None:
        if not future.done():
            future.set_result(result)

    def work() -> None:
        result = context.run(function, sample)
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits for a score that was given up on
            loop.call_soon_threadsafe(deliver, result)

    threading.Thread(target=work, name="rlvlm-reward", daemon=True).start()
    return await future
