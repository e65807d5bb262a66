"""Scored groups of every kind that a minibatch can hold, and what the policy says of each response on its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from rlvlm_rewards import Failure, Score
from tiny_policy import group, picture, task
from transformers import PreTrainedModel

from rlvlm.learner.objective import Rewarded
from rlvlm.learner.packing import pack
from rlvlm.policy.family import family_of
from rlvlm.policy.prompts import Prompt, PromptEncoder
from rlvlm.recipe.load import recipe_from
from rlvlm.recipe.schema import Recipe
from rlvlm.records import Batch, Group, Row
from rlvlm.tasks.images import ImageStore

WORDS = range(290, 400)  # ids of words: no specials, no bytes
TEXT, ONE, TWO = (), ((32, 16),), ((16, 32), (32, 32))  # sizes of a prompt's pictures


@dataclass(frozen=True)
class Alone:
    """One response that is trained on. advantage: no two are equal, so it tells which response a row's sequence is."""

    prompt: Prompt
    response: tuple[int, ...]
    advantage: float
    group_size: int

    @property
    def length(self) -> int:
        return len(self.prompt.input_ids) + len(self.response)


def reward(
    groups: list[Group], advantages: Iterator[float], failed: tuple[tuple[int, int], ...] = ()
) -> list[Rewarded]:
    """failed: (group, response) pairs that could not be scored."""
    rewarded = []
    for g, one in enumerate(groups):
        values = [None if (g, j) in failed else next(advantages) for j in range(len(one.trajectories))]
        scores = [Score(failure=Failure.TIMEOUT, detail="slow") if v is None else Score(value=1.0) for v in values]
        scored = Group(one.task, one.trajectories, tuple(scores))
        rewarded.append(Rewarded(scored, tuple(values), tuple(values)))
    return rewarded


def mixed(
    encoder: PromptEncoder,
    store: ImageStore,
    seed: int,
    per_kind: int = 1,
    kinds: Sequence[tuple[tuple[int, int], ...]] = (TEXT, ONE, TWO),
) -> list[Rewarded]:
    """A group of each kind: 3 responses of 2 to 9 tokens; the first group's second one failed."""
    g = torch.Generator().manual_seed(seed)

    def response() -> tuple[int, ...]:
        length = int(torch.randint(2, 10, (), generator=g))
        return tuple(torch.randint(WORDS.start, WORDS.stop, (length,), generator=g).tolist())

    groups = []
    for n, sizes in enumerate(tuple(kinds) * per_kind):
        images = [picture(100 * seed + 10 * n + i, *size) for i, size in enumerate(sizes)]
        asked = task(f"t{seed}-{n}", store, ("sum of digits ?", "what is left ?")[n % 2], *images)
        groups.append(group(asked, encoder, *(response() for _ in range(3))))
    order = torch.randperm(3 * len(groups), generator=g).tolist()
    advantages = iter([(i - len(order) / 2 + 0.25) / 8 for i in order])
    return reward(groups, advantages, failed=((0, 1),))


@cache
def packing_recipe(minibatches: int = 1, row_tokens: int = 10_000, ranks: int = 1, **learner: object) -> Recipe:
    return recipe_from(
        {
            "name": "test",
            "tasks": {"train": [{"generator": "digits_sum"}]},
            "rl": {"prompts": minibatches, "minibatches": minibatches},
            "learner": {"row_tokens": row_tokens, "ranks": ranks, **learner},
        }
    )


def packed_rows(rewarded: list[Rewarded], encoder: PromptEncoder, row_tokens: int = 10_000) -> tuple[Row, ...]:
    """One minibatch for one rank."""
    batch: Batch = pack(rewarded, encoder, packing_recipe(row_tokens=row_tokens), seed=0)
    ((rows,),) = (minibatch.rows for minibatch in batch.minibatches)
    return rows


def alone(rewarded: list[Rewarded], encoder: PromptEncoder) -> list[Alone]:
    """The trained responses one by one."""
    return [
        Alone(encoder.prompt(one.group.task), t.response_ids, a, sum(x is not None for x in one.advantage_K))
        for one in rewarded
        for t, a in zip(one.group.trajectories, one.advantage_K, strict=True)
        if a is not None
    ]


def logits_alone(model: PreTrainedModel, one: Alone) -> torch.Tensor:
    """[response, vocabulary]: the plain forward of transformers on this sequence only, which works positions out
    itself."""
    ids = torch.tensor([one.prompt.input_ids + one.response])
    marks = family_of(model.config, "tiny").token_keywords(model.config, ids)
    logits_TV = model(
        input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **marks, **one.prompt.images
    ).logits[0]
    return logits_TV[len(one.prompt.input_ids) - 1 : -1]


def logp_alone(
    model: PreTrainedModel, one: Alone, temperature: float = 1.0, banned: tuple[int, ...] = ()
) -> torch.Tensor:
    """Log-probs of the response's tokens by a softmax over all that is not banned."""
    logits = logits_alone(model, one) / temperature
    allowed = torch.tensor([i for i in range(logits.shape[1]) if i not in banned])
    chosen = logits.gather(1, torch.tensor(one.response)[:, None])[:, 0]
    return chosen - logits[:, allowed].logsumexp(1)


def by_advantage(row: Row, values_N: torch.Tensor) -> dict[float, torch.Tensor]:
    """Values of the row's trained tokens, by the advantage of the response that they belong to."""
    segment_N = row.segment_T[row.trained_T]
    return {float(a): values_N[segment_N == s] for s, a in enumerate(row.advantage_S)}
