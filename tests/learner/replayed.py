"""Router replay and the auxiliary loss in a learner of two ranks under ZeRO-3: what a rank does. Ranks import this file
in processes of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from rlvlm.cluster.local import become_rank
from rlvlm.recipe.load import recipe_from
from rlvlm.recipe.schema import Recipe
from rlvlm.records import Batch


def recipe(kind: str, **learner: Any) -> Recipe:
    """Two ranks, ZeRO-3, activation checkpointing, large steps."""
    return recipe_from(
        {
            "name": "replayed",
            "tasks": {"train": [{"generator": "digits_sum"}]},
            "policy": {"model": "given"},
            "rl": {
                "prompts": 3,
                "minibatches": 1,
                "learning_rate": 0.05,
                "grad_clip": 1e4,
                "router_replay": kind,
                "objective": {"optimizer_reset": False},
            },
            "learner": {
                "ranks": 2,
                "zero_stage": 3,
                "gradient_checkpointing": True,
                "row_tokens": 120,
                "logp_chunk": 16,
                **learner,
            },
        }
    )


def learn_on_one_of_two(rank: int, port: int, folder: Path) -> None:
    """Reference and two steps for each case of `folder`/cases.pt; what came out goes to `folder`/found-RANK.pt."""
    become_rank(rank, 2, port, 1)
    from rlvlm.learner.learner import Learner

    found: dict[str, Any] = {}
    cases: dict[str, tuple[Recipe, Batch]] = torch.load(folder / "cases.pt", weights_only=False)
    for name, (given, batch) in cases.items():
        learner = Learner(given, folder / "hf", ())
        share = batch.share(rank)
        reference = learner.reference(share)
        found[name] = {
            "logp": [list(logp) for logp in reference.logp],
            "mismatch": reference.mismatch,
            "first": learner.step(share, reference),
            "second": learner.step(share, reference),
        }
    torch.save(found, folder / f"found-{rank}.pt")
    torch.distributed.destroy_process_group()
