"""Qwen3-VL with experts (arXiv 2511.21631): deepstack (features of the tower's earlier layers join the decoder's first
layers), M-RoPE with interleaved sections, a softmax-scored mixture of experts."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from rlvlm.policy.families.mrope import Mrope
from rlvlm.policy.family import Router
from rlvlm.recipe.errors import RecipeError

_EXPERTS = re.compile(r"\.mlp\.experts\.(gate_up|down)_proj$")


def softmax_weights(router: nn.Module, logits_TE: torch.Tensor, indices_TK: torch.Tensor) -> torch.Tensor:
    """Softmax over all experts, the chosen ones normalised to a sum of 1."""
    weights_TK = logits_TE.softmax(-1, dtype=torch.float).gather(1, indices_TK)
    return (weights_TK / weights_TK.sum(-1, keepdim=True)).to(logits_TE.dtype)


class Qwen3VLMoe(Mrope):
    name = "Qwen3-VL (MoE)"
    model_types = ("qwen3_vl_moe",)
    groups: ClassVar[Mapping[str, str]] = {
        "projector": r"\bvisual\.(merger|deepstack_merger_list)\.",
        "vision": r"\bvisual\.",
        "router": r"\.mlp\.gate\.",
    }
    router = Router("Qwen3VLMoeTextTopKRouter", softmax_weights, balance="auxiliary")

    def load(self, folder: str, dtype: torch.dtype) -> PreTrainedModel:
        """Raises RecipeError for experts as wide as the model: which way round a checkpoint has them is told by their
        shape alone, so transformers would take square ones the wrong way, without a word."""
        text = AutoConfig.from_pretrained(folder).text_config
        if text.hidden_size in (text.moe_intermediate_size, 2 * text.moe_intermediate_size):
            raise RecipeError(
                "policy.model",
                folder,
                f"experts of moe_intermediate_size {text.moe_intermediate_size} in a model of hidden_size "
                f"{text.hidden_size} are square, and transformers cannot tell which way round they are stored",
                "take other sizes",
            )
        return super().load(folder, dtype)

    def exported(self, name: str, tensor: torch.Tensor) -> tuple[str, torch.Tensor]:
        """Published checkpoints have experts as [E, in, out]. transformers 5.19 turns them to [E, out, in] when it
        loads, and leaves them so when it saves; vLLM reads the published layout only."""
        name, tensor = super().exported(name, tensor)
        return name, tensor.transpose(1, 2) if _EXPERTS.search(name) else tensor
