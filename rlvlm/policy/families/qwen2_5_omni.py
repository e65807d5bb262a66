"""Qwen2.5-Omni (arXiv 2503.20215), its thinker: pictures and text in, text out.

The talker and the audio decoder, which turn the thinker's states into speech, are no part of the policy: they are not
loaded, not trained and not in the checkpoints written here. Those are of a Qwen2.5-Omni with speech switched off, as
vLLM wants them; in transformers `Qwen2_5OmniThinkerForConditionalGeneration` reads them (the class for the whole model
also asks for the file of voices, spk_dict.pt, whether it is to speak or not).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from transformers import PretrainedConfig, PreTrainedModel, Qwen2_5OmniThinkerForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutputWithPast

from rlvlm.policy.families.mrope import Mrope


class Qwen25Omni(Mrope):
    name = "Qwen2.5-Omni (thinker)"
    model_types = ("qwen2_5_omni", "qwen2_5_omni_thinker")
    groups: ClassVar[Mapping[str, str]] = {"projector": r"\bvisual\.merger\.", "vision": r"\b(visual|audio_tower)\."}
    renames = ((r"^(?!thinker\.)", "thinker."),)

    def load(self, folder: str, dtype: torch.dtype) -> PreTrainedModel:
        model = Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(folder, dtype=dtype)
        model.audio_tower.requires_grad_(False)  # nothing that a task can hold gives it a gradient
        model.thinker = Body(model)  # `model.base_model` looks for it here; TRL's loss goes through that
        return model

    def skeleton(self, config: PretrainedConfig) -> PreTrainedModel:
        with torch.device("meta"):
            return Qwen2_5OmniThinkerForConditionalGeneration(_thinker(config))

    def config_json(self, saved: Mapping[str, Any]) -> dict[str, Any]:
        """The thinker's own config -> that of a whole model without speech."""
        return {
            "architectures": ["Qwen2_5OmniForConditionalGeneration"],
            "model_type": "qwen2_5_omni",
            "enable_audio_output": False,
            "thinker_config": dict(saved),
        }

    def placeholder_ids(self, config: PretrainedConfig) -> tuple[int, ...]:
        thinker = _thinker(config)
        sounds = {thinker.audio_token_id, thinker.audio_start_token_id, thinker.audio_end_token_id}
        vocabulary = thinker.text_config.vocab_size
        return tuple(sorted({*super().placeholder_ids(thinker), *(i for i in sounds if i < vocabulary)}))

    def positions(
        self, config: PretrainedConfig, input_ids_T: torch.Tensor, images: Mapping[str, torch.Tensor]
    ) -> torch.Tensor:
        return super().positions(_thinker(config), input_ids_T, images)

    def token_keywords(self, config: PretrainedConfig, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """None: the thinker finds its pictures by their placeholders."""
        return {}

    def indexed(self, model: PreTrainedModel) -> Any:
        return model

    def body(self, model: PreTrainedModel) -> Body:
        return Body(model)


class Body:
    """The thinker without its head, for which transformers has no module: pictures in their places, then the decoder.

    Takes the thinker's keywords and gives `last_hidden_state`.
    """

    def __init__(self, thinker: PreTrainedModel) -> None:
        self._thinker = thinker

    def __call__(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_grid_thw: torch.Tensor | None = None,
        use_cache: bool = False,
    ) -> BaseModelOutputWithPast:
        thinker = self._thinker
        embedded = thinker.get_input_embeddings()(input_ids)
        if pixel_values is not None:
            pictures = thinker.get_image_features(pixel_values, image_grid_thw, return_dict=True)
            features = torch.cat(pictures.pooler_output).to(embedded.device, embedded.dtype)
            here, *_ = thinker.get_placeholder_mask(input_ids, embedded, image_features=features)
            embedded = embedded.masked_scatter(here, features)
        if position_ids is None:
            position_ids = thinker.compute_3d_position_ids(
                input_ids, image_grid_thw, None, embedded, attention_mask, past_key_values=None
            )
        return thinker.model(
            inputs_embeds=embedded, attention_mask=attention_mask, position_ids=position_ids, use_cache=use_cache
        )


def _thinker(config: PretrainedConfig) -> Any:
    """The thinker's config, given that or the whole model's."""
    return getattr(config, "thinker_config", config)
