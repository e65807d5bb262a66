"""What the families with multimodal rotary positions (M-RoPE, arXiv 2409.12191, section 2.1) have in common.

Every token has three positions, time, height and width, which differ inside pictures only. transformers takes packed
sequences apart by a fourth row, plain text positions, that stands before them; without it they leak into each other.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from rlvlm.policy.family import Family

_IMAGE, _VIDEO = 1, 2  # the kinds of token in transformers' `mm_token_type_ids`


class Mrope(Family):
    """Position rows are text, time, height, width."""

    def __init__(self) -> None:
        self._known: tuple[PretrainedConfig | None, Any] = None, None

    def positions(
        self, config: PretrainedConfig, input_ids_T: torch.Tensor, images: Mapping[str, torch.Tensor]
    ) -> torch.Tensor:
        """Positions [4, T] of one prompt on its own; the last three are those of transformers' `get_rope_index`."""
        text_T = torch.arange(input_ids_T.numel())
        if "image_grid_thw" not in images:
            return text_T.expand(4, -1)
        rope_3T, _ = self._indexer(config).get_rope_index(
            input_ids_T[None],
            image_grid_thw=images["image_grid_thw"],
            attention_mask=torch.ones_like(input_ids_T)[None],
            **{key: value[None] for key, value in self.token_keywords(config, input_ids_T).items()},
        )
        return torch.cat([text_T[None], rope_3T[:, 0]])

    def continued(self, position_ids_PT: torch.Tensor, length: int) -> torch.Tensor:
        """Positions [4, length]: the text row goes on counting, the others from the highest of all three."""
        first_P = torch.stack([position_ids_PT[0].max(), *[position_ids_PT[1:].max()] * 3]) + 1
        return first_P[:, None] + torch.arange(length)

    def token_keywords(self, config: PretrainedConfig, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """Where the pictures are: transformers works positions out from this when it is given none, as in SFT."""
        kinds = torch.zeros_like(input_ids, dtype=torch.int)
        kinds[input_ids == config.image_token_id] = _IMAGE
        kinds[input_ids == config.video_token_id] = _VIDEO
        return {"mm_token_type_ids": kinds}

    def indexed(self, model: PreTrainedModel) -> Any:
        """The module of `model` that has `get_rope_index`."""
        return model.model

    def _indexer(self, config: PretrainedConfig) -> Any:
        """That module without memory: `get_rope_index` is a method, but reads the config alone."""
        known, indexer = self._known
        if known is not config:
            indexer = self.indexed(self.skeleton(config))
            self._known = config, indexer
        return indexer
