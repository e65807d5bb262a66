"""BLIP-2 (arXiv 2301.12597) and InstructBLIP (arXiv 2305.06500): a ViT, a Q-Former whose queries read the picture, a
projection, a decoder (OPT, Llama). Their variants on T5, encoder and decoder, are no policies: such a model's responses
are not the continuation of its prompts.

A prompt holds one picture at most, and its place is in front of the text, before the start of sequence: the text has no
placeholder for it, so a second one would have none. InstructBLIP's Q-Former reads the prompt with the picture.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import (
    AutoConfig,
    Blip2ForConditionalGeneration,
    InstructBlipForConditionalGeneration,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from rlvlm.policy.family import Family
from rlvlm.recipe.errors import RecipeError, RunError


class Body:
    """The model without its head, for which transformers has no module. Takes the forward's keywords, pictures or not,
    and gives `last_hidden_state`. qformer: what InstructBLIP's Q-Former reads with the pictures."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def __call__(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        use_cache: bool = False,
        **qformer: torch.Tensor,
    ) -> BaseModelOutputWithPast:
        model = self._model
        embedded = model.get_input_embeddings()(input_ids)
        if pixel_values is not None:
            features = model.get_image_features(pixel_values, return_dict=True, **qformer).pooler_output
            here = (input_ids == model.config.image_token_id)[..., None]
            embedded = embedded.masked_scatter(here, features.to(embedded.dtype))
        language = model.language_model.model
        output: BaseModelOutputWithPast = language(
            inputs_embeds=embedded, attention_mask=attention_mask, position_ids=position_ids, use_cache=use_cache
        )
        return output


class _PicturesOptional:
    """A forward for prompts with a picture and without, which transformers' own refuse."""

    language_model: Any

    def forward(self, input_ids: torch.Tensor, **keywords: Any) -> CausalLMOutputWithPast:
        hidden = Body(self)(input_ids, **keywords).last_hidden_state
        return CausalLMOutputWithPast(logits=self.language_model.lm_head(hidden))


class Blip2Model(_PicturesOptional, Blip2ForConditionalGeneration):
    pass


class InstructBlipModel(_PicturesOptional, InstructBlipForConditionalGeneration):
    pass


class Blip2(Family):
    name = "BLIP-2"
    model_types = ("blip-2",)
    groups: ClassVar[Mapping[str, str]] = {
        "vision": r"\bvision_model\.",
        "projector": r"\bquery_tokens\b|\bqformer\.|\blanguage_projection\.",
    }
    model_class: ClassVar[type[PreTrainedModel]] = Blip2Model
    # Published checkpoints have none; the words are the paper's, for questions (section 4.2).
    chat_template = """\
{%- for message in messages -%}
{%- set text = message.content if message.content is string
    else message.content | selectattr('type', 'equalto', 'text') | map(attribute='text') | join(' ') -%}
{%- set before = {'user': 'Question: ', 'assistant': 'Answer: '} -%}
{{ before.get(message.role, '') }}{{ text }} {% endfor -%}
{%- if add_generation_prompt -%}Answer: <think>{%- endif -%}"""

    def load(self, folder: str, dtype: torch.dtype) -> PreTrainedModel:
        config = AutoConfig.from_pretrained(folder)
        if not config.use_decoder_only_language_model:
            raise RecipeError(
                "policy.model",
                folder,
                f"its language model ({config.text_config.model_type}) is an encoder with a decoder",
                "take a checkpoint on a decoder: OPT, Llama",
            )
        model: Any = self.model_class.from_pretrained(folder, dtype=dtype)
        setattr(model, model.base_model_prefix, Body(model))  # `model.base_model`, through which TRL's loss goes
        return model

    def positions(
        self, config: PretrainedConfig, input_ids_T: torch.Tensor, images: Mapping[str, torch.Tensor]
    ) -> torch.Tensor:
        """As ever. Raises RunError for a prompt with more pictures than one."""
        pictures = len(images.get("pixel_values", ()))
        if pictures > 1:
            raise RunError(
                f"a task has {pictures} pictures, and {self.name} takes one a prompt",
                mend="keep tasks with one picture at most, or take another policy.model",
            )
        return super().positions(config, input_ids_T, images)

    def body(self, model: PreTrainedModel) -> Body:
        return Body(model)

    def head(self, model: PreTrainedModel) -> nn.Module:
        return model.language_model.lm_head


class InstructBlip(Blip2):
    name = "InstructBLIP"
    model_types = ("instructblip",)
    model_class = InstructBlipModel
