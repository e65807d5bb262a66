"""LLaVA (arXiv 2304.08485, 2310.03744): a CLIP tower, a projector of two layers, a Llama or Mistral decoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from transformers import PretrainedConfig, PreTrainedModel

from rlvlm.policy.family import Family


class Llava(Family):
    name = "LLaVA"
    model_types = ("llava",)
    groups: ClassVar[Mapping[str, str]] = {"vision": r"\bvision_tower\.", "projector": r"\bmulti_modal_projector\."}
    # transformers 5 lost a level of CLIP's names, which published checkpoints have; it reads both.
    renames = (
        (r"^vision_tower\.(?=(embeddings|pre_layrnorm|encoder|post_layernorm)\.)", "vision_tower.vision_model."),
    )

    def load(self, folder: str, dtype: torch.dtype) -> PreTrainedModel:
        """A CLIP tower's layers above the one that the projector reads are frozen: no gradient reaches them, and vLLM
        does not even load them."""
        model = super().load(folder, dtype)
        if model.config.vision_config.model_type == "clip_vision_model":
            tower = model.model.vision_tower
            for unread in (*tower.encoder.layers[_layers_read(model.config) :], tower.post_layernorm):
                unread.requires_grad_(False)
        return model


def _layers_read(config: PretrainedConfig) -> int:
    """How many of the tower's layers there are up to the deepest one read. State 0 is what goes into the first layer;
    -1 is what comes out of the last."""
    states = config.vision_config.num_hidden_layers + 1
    chosen = config.vision_feature_layer
    return max(layer % states for layer in ([chosen] if isinstance(chosen, int) else chosen))
