"""Experimental: the ranks share the experts of a mixture out, and tokens travel to them, by DeepSpeed's AutoEP.

AutoEP puts a block of its own in place of each mixture-of-experts block, in which a rank holds some experts whole, as
w1, w2 and w3. What the engine and checkpoints get has the model's own names, with all experts.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from transformers import PreTrainedModel

from rlvlm.learner.replay import routers_of
from rlvlm.policy.family import Family
from rlvlm.recipe.errors import RecipeError
from rlvlm.recipe.schema import Recipe

_KEY = "learner.expert_parallel"
_EXPERTS = re.compile(r"^(?P<block>.+)\.experts\.w(?P<part>[123])$")
_ROUTER = re.compile(r"^(?P<block>.+)\.router\.(gate\.)?(?P<what>weight|e_score_correction_bias)$")


class ExpertParallel:
    """`learner.expert_parallel` ranks share the experts. Make it before DeepSpeed takes the policy over, and give
    `config` to it. Raises RecipeError for a model without experts, or whose experts cannot be shared out evenly."""

    def __init__(self, policy: PreTrainedModel, family: Family, recipe: Recipe) -> None:
        self._size = recipe.learner.expert_parallel
        routers = routers_of(policy, family)
        if not routers:
            problem = f"{family.name} has no mixture of experts"
            raise RecipeError(_KEY, self._size, problem, "leave it out")
        self._router = routers[0]
        experts: int = self._router.num_experts  # type: ignore[assignment]
        if experts % self._size:
            problem = f"does not divide the {experts} experts of {recipe.policy.model}"
            raise RecipeError(_KEY, self._size, problem, f"give a divisor of {experts}")
        blocks = {id(router) for router in routers}
        self._blocks = [
            name for name, module in policy.named_modules() if any(id(child) in blocks for child in module.children())
        ]

    def config(self) -> dict[str, Any]:
        """DeepSpeed's section `expert_parallel`."""
        sigmoid = hasattr(self._router, "e_score_correction_bias")
        names = "|".join(re.escape(name) for name in self._blocks)
        scale = getattr(self._router, "routed_scaling_factor", 1.0)
        return {
            "enabled": True,
            "autoep_size": self._size,
            "preset_model": "deepseek_v3" if sigmoid else "qwen3_moe",
            "moe_layer_pattern": rf"policy\.({names})",
            "score_func": "sigmoid" if sigmoid else "softmax",
            "top_k": self._router.top_k,
            "route_norm": bool(getattr(self._router, "norm_topk_prob", True)),
            "routed_scaling_factor": float(scale),
            "num_expert_groups": getattr(self._router, "num_group", None),
            "num_limited_groups": getattr(self._router, "topk_group", None),
        }

    def restored(self, state: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """The state of the policy as DeepSpeed has it -> under the model's own names, with all experts. Collective."""
        held: dict[str, dict[str, torch.Tensor]] = {}
        for name, tensor in state:
            block = name.split(".experts.")[0].split(".router.")[0].split(".gate.")[0]
            if block not in self._blocks:
                yield name, tensor
            elif (match := _EXPERTS.match(name)) is not None:
                parts = held.setdefault(block, {})
                parts[match["part"]] = self._all(tensor)
                if len(parts) == 3:
                    yield f"{block}.experts.gate_up_proj", torch.cat([parts["1"], parts["3"]], dim=1)
                    yield f"{block}.experts.down_proj", parts["2"]
                    del held[block]
            elif (match := _ROUTER.match(name)) is not None:
                yield f"{block}.gate.{match['what']}", tensor
            elif ".gate." not in name:  # AutoEP has the router under this name once more
                yield name, tensor

    def _all(self, tensor: torch.Tensor) -> torch.Tensor:
        """All ranks' experts, in order."""
        from deepspeed.utils import groups

        group = groups._get_expert_parallel_group(f"ep_size_{self._size}")
        own = tensor.detach().contiguous()
        gathered = [torch.empty_like(own) for _ in range(self._size)]
        torch.distributed.all_gather(gathered, own, group=group)
        return torch.cat(gathered)
