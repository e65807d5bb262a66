"""A router whose choices can be told by hand. Ranks import this file alone, so it imports little."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn

from rlvlm.learner.balance import LoadBalance
from rlvlm.recipe.schema import Balance


class PlainRouter(nn.Module):
    """Sends a token of 4 entries to the two experts at which entry + bias is largest. Gives what transformers' routers
    give: (logits, weights, indices)."""

    def __init__(self, weight: tuple[float, ...] = (1.0,) * 4) -> None:
        super().__init__()
        self.weight = torch.tensor(weight)
        self.register_buffer("e_score_correction_bias", torch.zeros(4))

    def forward(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        logits = tokens * self.weight
        chosen = (logits + self.e_score_correction_bias).topk(2, dim=-1).indices
        return logits, logits.gather(-1, chosen), chosen


def _weights(router: nn.Module, logits_TE: torch.Tensor, indices_TK: torch.Tensor) -> torch.Tensor:
    return logits_TE.gather(-1, indices_TK)


class Plain:
    """What matters here of a `Family`, whose module imports transformers: that of models made of PlainRouters."""

    name = "plain"
    router = SimpleNamespace(
        class_name="PlainRouter", weights=_weights, balance="bias", scores=partial(torch.softmax, dim=-1)
    )


class Dense:
    name = "dense"
    router = None


def run(router: nn.Module, balance: LoadBalance, *pairs: tuple[int, int]) -> None:
    """A training forward of one token for each pair."""
    router(tokens_to(*pairs))
    balance.count(torch.ones(len(pairs)))


def tokens_to(*pairs: tuple[int, int]) -> torch.Tensor:
    """Tokens that go to the given pairs of experts, whatever the biases of the tests below are."""
    tokens = torch.zeros(len(pairs), 4)
    for token, (first, second) in zip(tokens, pairs, strict=True):
        token[first], token[second] = 9.0, 8.0
    return tokens


def balance_on_one_of_two(rank: int, port: int, folder: Path) -> None:
    """One bias update on tokens of this rank's own; bias and figures go to `<folder>/<rank>.json`."""
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    router = PlainRouter()
    balance = LoadBalance(router, Plain(), Balance(step=0.25))
    # Expert 1 is at its mean on rank 0, expert 2 above it on rank 1: alone each rank would move them otherwise.
    run(router, balance, *[[(0, 1), (0, 1), (0, 3), (0, 3)], [(0, 2), (0, 2), (1, 2)]][rank])
    balance.update()
    result = {"bias": router.e_score_correction_bias.tolist(), **balance.pop_metrics()}
    (folder / f"{rank}.json").write_text(json.dumps(result))
    torch.distributed.destroy_process_group()
