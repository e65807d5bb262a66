"""Freeze groups and adapters under DeepSpeed on two ranks: what a rank does. Ranks import this file in processes of
their own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from tiny_policy import build
from torch import nn

from rlvlm.cluster.local import become_rank
from rlvlm.policy.trainable import Trainable, prepare
from rlvlm.recipe.load import recipe_from
from rlvlm.recipe.schema import Recipe

STEPS, RANKS = 3, 2
CASES = (("groups", 1), ("groups", 2), ("groups", 3), ("lora", 2), ("lora", 3))  # what trains, ZeRO stage
RESUMED = (2, 3)  # ZeRO stages; the state of 1 has the form of 2's
# With a smaller eps Adam makes whole steps of gradients that are rounding alone.
ADAMW: dict[str, Any] = {"betas": (0.8, 0.9), "weight_decay": 0.1, "eps": 1e-3}
Sample = dict[str, torch.Tensor]  # keywords of the forward

RATES = {"vision": 0.0, "router": 0.0, "projector": 1e-2}
LORA = {"rank": 4, "alpha": 12, "targets": ["all-linear"], "experts": True}


def recipe(lora: Mapping[str, Any] | None, **sections: Any) -> Recipe:
    """What freezes two groups where there is no LoRA, and adapts the decoder alone where there is."""
    rates = RATES if lora is None else {"vision": 0.0, "projector": 1e-2}
    rl = {"learning_rate": 1e-3, "learning_rates": rates, "grad_clip": 1e4, **sections.pop("rl", {})}
    policy = {"model": "given", **({} if lora is None else {"lora": lora})}
    tasks = {"train": [{"generator": "digits_sum"}]}
    return recipe_from({"name": "x", "stages": ["rl"], "tasks": tasks, "policy": policy, "rl": rl, **sections})


def stir(model: nn.Module) -> None:
    """Adapters as after some training: new ones add nothing."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.normal_(0, 0.2, generator=generator)


def made(lora: Mapping[str, Any] | None) -> Trainable:
    model, _ = build(spread=0.2)
    trainable = prepare(model, recipe(lora), "rl")
    stir(model)
    return trainable


def loss_of(model: Callable[..., Any], sample: Sample) -> torch.Tensor:
    """Mean negative log-prob of the tokens after the first."""
    logits_TV = model(use_cache=False, **sample).logits[0, :-1]
    return -logits_TV.log_softmax(-1).gather(1, sample["input_ids"][0, 1:, None]).mean()


def train_on_one_of_two(rank: int, port: int, folder: Path) -> None:
    """Every case on `folder`/samples.pt, a sample a rank and step; rank 0 writes the weights at the end to
    `folder`/CASE.pt. Then the learner."""
    become_rank(rank, RANKS, port, 1)
    samples = torch.load(folder / "samples.pt", weights_only=False)
    for kind, stage in CASES:
        found = _trained(stage, LORA if kind == "lora" else None, [both[rank] for both in samples])
        if rank == 0:
            torch.save(found, folder / f"{kind}-{stage}.pt")
    for stage in RESUMED:
        _learner(rank, stage, folder)
    torch.distributed.destroy_process_group()


def _trained(stage: int, lora: Mapping[str, Any] | None, samples: list[Sample]) -> dict[str, torch.Tensor]:
    import deepspeed
    from deepspeed.utils import set_z3_leaf_modules
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

    trainable = made(lora)
    model = trainable.model.train()
    if lora is not None:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if stage == 3:
        set_z3_leaf_modules(model, [DeepseekV3MoE])
    options = {"lr": 1.0, "torch_adam": True, **ADAMW}
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=trainable.parameter_groups(),
        config={
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {"stage": stage},
            "gradient_clipping": 1e4,  # DeepSpeed clips to 1 where nothing is said
            "optimizer": {"type": "AdamW", "params": options},
        },
    )
    for sample in samples:
        engine.backward(loss_of(engine, sample))
        engine.step()
    return {name: tensor.clone() for name, tensor in trainable.state()}


def _learner(rank: int, stage: int, folder: Path) -> None:
    """A step, a checkpoint, another step; and that step by a second learner from the checkpoint."""
    from rlvlm.learner.learner import Learner

    given = recipe({**LORA, "rank": 1}, learner={"ranks": RANKS, "zero_stage": stage, "logp_chunk": 16})
    share = torch.load(folder / "batch.pt", weights_only=False).share(rank)
    first, saved = Learner(given, folder / "base", ()), folder / f"saved-{stage}"
    first.step(share, first.reference(share))
    first.save(saved)
    second = Learner(given, folder / "base", ())
    torch.distributed.barrier()
    second.load(saved)
    states = []
    for learner in (first, second):
        learner.step(share, learner.reference(share))
        states.append(learner.full_state())
    if rank == 0:
        torch.save(states, folder / f"resumed-{stage}.pt")
