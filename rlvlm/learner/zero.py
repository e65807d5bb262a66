"""What DeepSpeed is told: ZeRO's stages, where the optimizer lives, what is gathered as a whole, what backward computes
again."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from rlvlm.learner.replay import routers_of
from rlvlm.policy.family import Family
from rlvlm.recipe.schema import Recipe


def deepspeed_config(recipe: Recipe) -> dict[str, Any]:
    """For RL. Rows of a minibatch vary in number, so the end of an accumulation is set by hand."""
    rl = recipe.rl
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "bf16": {"enabled": recipe.policy.dtype == "bfloat16"},
        "zero_optimization": zero_optimization(recipe),
        "gradient_clipping": rl.grad_clip,
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": rl.learning_rate,
                "betas": list(rl.betas),
                "weight_decay": rl.weight_decay,
                # The C++ Adams multiply beta^t up step by step and use pow() after a load: not bit-exact over a resume.
                "torch_adam": True,
            },
        },
    }


def zero_optimization(recipe: Recipe) -> dict[str, Any]:
    """The section of this name, for SFT too."""
    section: dict[str, Any] = {"stage": recipe.learner.zero_stage}
    if recipe.learner.offload == "optimizer":
        section["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return section


def gather_blocks_whole(policy: PreTrainedModel, family: Family) -> None:
    """Has ZeRO-3 gather each mixture-of-experts block at once. The order in which a block calls what is in it depends
    on its tokens, and ranks with different orders would wait for each other for ever."""
    from deepspeed.utils import set_z3_leaf_module

    routers = set(routers_of(policy, family))
    for module in policy.modules():
        if routers.intersection(module.children()):
            set_z3_leaf_module(module, True)


def checkpoint_activations(policy: PreTrainedModel) -> None:
    """Keeps only what goes into each layer, and has backward compute the rest again.

    transformers does so for layers in training mode only. The model as a whole stays in evaluation mode, because pi_i
    and pi are to be the same function: of a layer, all that the mode would change is dropout, so that goes.
    """
    policy.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for layer in policy.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.training = True
            for name in [name for name in vars(layer) if "dropout" in name and isinstance(vars(layer)[name], float)]:
                setattr(layer, name, 0.0)


def reset_optimizer(engine: Any) -> None:
    """Moments and step counts start again, in place, as a fresh engine has them."""
    for state in engine.optimizer.optimizer.state.values():
        for name, value in state.items():
            state[name] = value.zero_() if torch.is_tensor(value) else type(value)(0)
