"""A step whose loss or gradient is not finite is refused: the weights stay as they were, and the minibatch is written
down with them, so that it can be looked at again (`rlvlm replay-batch`).

    refused/N/hf          the weights that refused
    refused/N/recipe.yaml
    refused/N/rank-R.pt   the rank's rows, the reference's log-probs, and the denominators of the loss
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from rlvlm.learner.logprobs import RowLogProbs
from rlvlm.learner.objective import Totals, correction, row_loss
from rlvlm.learner.replay import RouterReplay
from rlvlm.policy.checkpoint import load_policy
from rlvlm.policy.family import family_of
from rlvlm.recipe.errors import RecipeError, RunError
from rlvlm.recipe.load import load_recipe
from rlvlm.recipe.schema import Recipe
from rlvlm.records import Row
from rlvlm.run import RunFolder

REFUSED = "refused"  # in the run folder
DONE = ".done"


class NotFinite(RunError):
    """Step after step had a loss or a gradient that is not finite."""


class Refusals:
    """Counts refused steps, and says where the next one is written to (the same on every rank)."""

    def __init__(self, recipe: Recipe) -> None:
        self._root = RunFolder.of(recipe).root / REFUSED
        self._most = recipe.learner.max_refused
        self._running = 0

    def folder(self) -> Path:
        """`refused`/N, N the first number that is free. A folder is free until every rank has passed the barrier."""
        taken = [int(path.name) for path in self._root.glob("*") if (path / DONE).exists()]
        return self._root / str(max(taken, default=0) + 1)

    def step_taken(self) -> None:
        self._running = 0

    def step_refused(self, folder: Path) -> None:
        """After all ranks have written. Raises NotFinite at the `learner.max_refused`-th refusal in a row."""
        (folder / DONE).touch()
        self._running += 1
        if self._running >= self._most:
            raise NotFinite(
                f"loss or gradient were not finite in {self._running} steps one after another "
                f"(learner.max_refused = {self._most}), so none of them was taken",
                mend=f"`rlvlm replay-batch {folder}` shows where it begins; a smaller rl.learning_rate, "
                "rl.grad_clip or, with bfloat16, policy.dtype=float32 are the usual ways out, and then --resume",
            )


def refusal_note(figures: Mapping[str, float], run: Path) -> str | None:
    """What a person should be told of an iteration's figures."""
    steps = int(figures["refused_steps"])
    if not steps:
        return None
    return f"{steps} steps refused: loss or gradient not finite (`rlvlm replay-batch` on a folder in {run / REFUSED})"


@dataclass(frozen=True, slots=True)
class Finding:
    """What replaying a row shows. inputs: names of the row's own tensors that are not finite. module: the first whose
    output is not finite though its inputs are, "" if there is none. gradients: parameters whose gradient is not finite,
    with that of the rows before it."""

    rank: int
    row: int
    tokens: int
    inputs: tuple[str, ...]
    module: str
    loss: float
    gradients: tuple[str, ...]

    @property
    def where(self) -> str:
        """In words, the earliest cause first."""
        if self.inputs:
            return f"the batch itself: {', '.join(self.inputs)}"
        if self.module:
            return f"the output of {self.module}"
        if not math.isfinite(self.loss):
            return "the objective"
        if self.gradients:
            more = f" and {len(self.gradients) - 1} more" if self.gradients[1:] else ""
            return f"the gradient of {self.gradients[0]}{more}"
        return "nowhere"


def write_rank(
    folder: Path,
    rank: int,
    rows: Sequence[Row],
    reference: Sequence[torch.Tensor],
    banned: Sequence[int],
    totals: Totals,
) -> None:
    """One rank's share of a refused minibatch. reference: pi_i's log-probs [N] of each row."""
    content = {
        "rows": [_plain(row) for row in rows],
        "reference": [logp_N.detach().cpu() for logp_N in reference],
        "banned": list(banned),
        "totals": {field.name: getattr(totals, field.name) for field in fields(totals)},
    }
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(content, folder / f"rank-{rank}.pt")


def _plain(row: Row) -> dict[str, Any]:
    values = {name: getattr(row, name) for name in Row.__slots__}
    images = {name: tensor.cpu() for name, tensor in row.images.items()}
    return {**{name: v.cpu() if torch.is_tensor(v) else v for name, v in values.items()}, "images": images}


def replay(folder: Path) -> Iterator[Finding]:
    """Computes a refused minibatch once more, in this process, row by row. Raises RecipeError if `folder` has none."""
    parts = sorted(folder.glob("rank-*.pt"))
    if not parts or not (folder / "hf" / "config.json").is_file():
        mend = "give a folder that a run has written, like runs/NAME/refused/1"
        raise RecipeError("folder", str(folder), "holds no refused minibatch", mend)
    recipe = load_recipe(folder / "recipe.yaml", [])
    policy, _ = load_policy(str(folder / "hf"), recipe.policy.dtype)
    objective = recipe.rl.objective
    routers = RouterReplay(policy, family_of(policy.config, str(folder)), recipe.rl.router_replay)
    for part in parts:
        content = torch.load(part, weights_only=True)
        module = RowLogProbs(policy, recipe.rl.temperature, content["banned"], recipe.learner.logp_chunk)
        policy.zero_grad()
        for number, (plain, reference_N) in enumerate(zip(content["rows"], content["reference"], strict=True)):
            row = Row(**plain)
            with routers.replay(row.routing_TLK), _first_bad(policy) as bad:
                logp_N, _ = module(row)
            weight_N = correction(objective, reference_N, row.engine_logp_T[row.trained_T])
            loss = row_loss(objective, logp_N, reference_N, weight_N, row, Totals(**content["totals"])).loss
            loss.backward()
            gradients = tuple(
                name for name, p in policy.named_parameters() if p.grad is not None and not _finite(p.grad)
            )
            tensors = {"reference_logp": reference_N, **{k: v for k, v in plain.items() if torch.is_tensor(v)}}
            inputs = tuple(name for name, value in {**tensors, **row.images}.items() if not _finite(value))
            rank = int(part.stem.removeprefix("rank-"))
            tokens = row.input_ids_T.numel()
            yield Finding(rank, number, tokens, inputs, next(iter(bad), ""), float(loss.detach()), gradients)


@contextmanager
def _first_bad(policy: PreTrainedModel) -> Iterator[list[str]]:
    """Collects the names of modules whose output is the first that is not finite."""
    found: list[str] = []

    def look(name: str) -> Any:
        def hook(module: nn.Module, arguments: Any, output: Any) -> None:
            if all(map(_finite, _tensors(arguments))) and not all(map(_finite, _tensors(output))):
                found.append(name)

        return hook

    leaves = [(name, module) for name, module in policy.named_modules() if not list(module.children())]
    handles = [module.register_forward_hook(look(name)) for name, module in leaves]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if torch.is_tensor(value):
        yield value
    elif isinstance(value, (tuple, list)):
        for one in value:
            yield from _tensors(one)


def _finite(tensor: torch.Tensor) -> bool:
    return bool(torch.isfinite(tensor.detach()).all()) if tensor.is_floating_point() else True
