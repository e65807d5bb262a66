"""A reward as TRL calls one, `f(prompts, completions, **columns) -> list[float | None]`, in a thread without a loop."""

from __future__ import annotations

import asyncio
import logging
import os
import statistics
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

from rlvlm_rewards.records import Sample, Score

if TYPE_CHECKING:
    from rlvlm_rewards.reward import Reward

_log = logging.getLogger(__name__)
_REFERENCE = ("answer", "solution")
# What TRL's trainers hand over beside the columns of the data set.
_NO_COLUMNS = {"completion_ids", "trainer_state", "log_extra", "log_metric", "environments"}
_starting = threading.Lock()


def score_batch(
    reward: Reward, prompts: Sequence[Any], completions: Sequence[Any], columns: Mapping[str, Any]
) -> list[float | None]:
    """The values of a batch; None (which TRL masks) for a failure, which is logged as a warning.

    prompts, completions: texts, or chat messages. The reference is the column `answer` or `solution`, pictures are
    `images` or `image`. Where TRL gives `log_metric`, the mean of each part goes there as `<reward>/<part>`.
    Raises ValueError if prompts and completions differ in number.
    """
    from rlvlm_rewards.scoring import score_all

    if len(prompts) != len(completions):
        raise ValueError(f"{len(prompts)} prompts for {len(completions)} completions; give one prompt a completion")
    samples = [_sample(index, prompts[index], completions[index], columns) for index in range(len(completions))]
    pairs = [(reward, sample) for sample in samples]
    with _starting:
        loop = _loop(os.getpid())
    scores = asyncio.run_coroutine_threadsafe(score_all(pairs), loop).result()
    _tell(reward, scores, columns)
    return [score.value for score in scores]


@lru_cache(maxsize=1)
def _loop(process: int) -> asyncio.AbstractEventLoop:
    """The loop on which batches are scored, in a thread of its own: what a reward opens stays open between batches.

    process: a fork does not inherit the thread, so it needs a loop anew.
    """
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="rlvlm-reward-loop", daemon=True).start()
    return loop


def _sample(index: int, prompt: Any, completion: Any, columns: Mapping[str, Any]) -> Sample:
    row = {
        name: column[index]
        for name, column in columns.items()
        if name not in _NO_COLUMNS and isinstance(column, Sequence) and len(column) > index
    }
    reference = next((row[name] for name in _REFERENCE if row.get(name) is not None), "")
    pictures = row.get("images") or ([row["image"]] if row.get("image") is not None else [])
    chat = not isinstance(prompt, str)
    return Sample(
        completion=_text(completion),
        answer=str(reference),
        task=str(row.get("task") or row.get("id") or f"{index} of the batch"),
        messages=prompt if chat else ({"role": "user", "content": prompt},),
        load_images=partial(list, pictures),
        thinking=not chat and prompt.rstrip().endswith("<think>"),
        progress=_progress(columns.get("trainer_state")),
        columns=row,
    )


def _text(completion: Any) -> str:
    """The words of a completion; of a chat, those of all the assistant's turns."""
    if isinstance(completion, str):
        return completion
    contents = [turn.get("content") or "" for turn in completion if turn.get("role") == "assistant"]
    parts = [[content] if isinstance(content, str) else [p.get("text", "") for p in content] for content in contents]
    return "\n".join("".join(words) for words in parts)


def _progress(state: Any) -> float:
    if state is None or not state.max_steps > 0:
        return 1.0
    return float(min(1.0, state.global_step / state.max_steps))


def _tell(reward: Reward, scores: Sequence[Score], columns: Mapping[str, Any]) -> None:
    failures = Counter(f"{score.failure}: {score.detail}" for score in scores if score.failure is not None)
    if failures:
        (commonest, count), *_ = failures.most_common(1)
        _log.warning("%d of %d completions have no score; %d: %s", failures.total(), len(scores), count, commonest)
    log_metric = columns.get("log_metric")
    if log_metric is not None:
        for part in dict.fromkeys(part for score in scores for part in score.parts):
            values = [score.parts[part] for score in scores if part in score.parts]
            log_metric(f"{reward.name}/{part}", statistics.fmean(values))
