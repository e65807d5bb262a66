"""GLM-4.5V (arXiv 2507.01006): M-RoPE on half of each head, a sigmoid-scored mixture with a selection bias."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from transformers import PretrainedConfig

from rlvlm.policy.families.kimi_k25 import sigmoid_shares, sigmoid_weights
from rlvlm.policy.families.mrope import Mrope
from rlvlm.policy.family import Router


class Glm4vMoe(Mrope):
    name = "GLM-4.5V"
    model_types = ("glm4v_moe",)
    groups: ClassVar[Mapping[str, str]] = {
        "projector": r"\bvisual\.(merger|downsample)\.",
        "vision": r"\bvisual\.",
        "router": r"\.mlp\.gate\.",
    }
    # The published config has it; transformers' model never norms queries and keys, and drops the key.
    engine_config: ClassVar[Mapping[str, Any]] = {"text_config": {"use_qk_norm": False}}
    router = Router("Glm4vMoeTextTopkRouter", sigmoid_weights, balance="bias", scores=sigmoid_shares)

    def placeholder_ids(self, config: PretrainedConfig) -> tuple[int, ...]:
        names = (f"{kind}_{end}_token_id" for kind in ("image", "video") for end in ("start", "end"))
        vocabulary = config.get_text_config().vocab_size
        marks = {i for i in (getattr(config, name) for name in names) if i < vocabulary}
        return tuple(sorted({*super().placeholder_ids(config), *marks}))
