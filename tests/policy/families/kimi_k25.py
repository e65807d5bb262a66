"""A tiny random kimi_k25, smaller than the default policy and with weights that matter."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedModel

from policy.families.qwen2_vl import spread
from rlvlm.policy.checkpoint import save_policy
from rlvlm.policy.tiny import build_tiny_kimi
from rlvlm.recipe.schema import TinyPolicy

SIZES = TinyPolicy(
    hidden=64, layers=2, experts=4, experts_per_token=2, expert_width=32, vision_hidden=32, vision_layers=1, patch=8
)


def lean(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """Gives the routers selection biases that change which experts are chosen."""
    generator = torch.Generator().manual_seed(seed)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.normal_(0, 0.2, generator=generator)
    return model


def build(folder: Path, seed: int, texts: tuple[str, ...] = ()) -> None:
    model, processor = build_tiny_kimi(SIZES, (*texts, "what is the sum of digits left ?"), seed)
    save_policy(lean(spread(model, seed), seed), processor, folder)
