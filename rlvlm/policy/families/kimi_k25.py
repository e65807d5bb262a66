"""Kimi-VL's lineage: MoonViT, MLP projector, DeepSeek-V3 decoder with MLA and a sigmoid-scored mixture of experts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from rlvlm.policy.family import Family, Router

if TYPE_CHECKING:
    from PIL.Image import Image


def sigmoid_weights(router: Any, logits_TE: torch.Tensor, indices_TK: torch.Tensor) -> torch.Tensor:
    """DeepSeek-V3 (arXiv 2412.19437, equations 13 and 14): sigmoid scores of the chosen, normalised, scaled."""
    weights_TK = logits_TE.sigmoid().gather(1, indices_TK)
    if router.norm_topk_prob:
        weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + 1e-20)
    return weights_TK * router.routed_scaling_factor


def sigmoid_shares(logits_TE: torch.Tensor) -> torch.Tensor:
    """DeepSeek-V3, equation 19: sigmoid scores, normalised over all experts."""
    scores_TE = logits_TE.sigmoid()
    return scores_TE / scores_TE.sum(-1, keepdim=True)


class KimiK25(Family):
    name = "Kimi-VL, Kimi-K2.5"
    model_types = ("kimi_k25",)
    modality = "vision_chunk"
    groups: ClassVar[Mapping[str, str]] = {
        "vision": r"\bvision_tower\.",
        "projector": r"\bmm_projector\.|\bmulti_modal_projector\.",
        "router": r"\.mlp\.gate\.",
    }
    # transformers 5.19 maps the names back with patterns that are not anchored, so the language model's `layers` come
    # out as the vision tower's `blocks`. These restore the names of the published checkpoints, which vLLM knows.
    renames = (
        (r"^language_model\.model\.blocks\.", "language_model.model.layers."),
        (r"^model\.mm_projector", "mm_projector"),
        (r"^vision_tower\.encoder\.patch_embed", "vision_tower.patch_embed"),
    )
    engine_config: ClassVar[Mapping[str, Any]] = {
        "architectures": ["KimiK25ForConditionalGeneration"],
        "text_config": {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "moe_layer_freq": 1},
    }
    router = Router("DeepseekV3TopkRouter", sigmoid_weights, balance="bias", scores=sigmoid_shares)

    def engine_images(self, images: Sequence[Image], keys: Sequence[str]) -> dict[str, Any]:
        chunks = [{"type": "image", "image": image, "uuid": key} for image, key in zip(images, keys, strict=True)]
        return {"multi_modal_data": {"vision_chunk": chunks}} if chunks else {}
