"""What is special about a family of models: one small file each in `families/`, everything else in rlvlm knows none.

`Family` is the plain case: one position per token, `model.model` under `model.lm_head`, pictures as vLLM's modality
`image`. docs/adding-a-policy.md says how a new one comes in.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import nn
from transformers import AutoModelForImageTextToText, PretrainedConfig, PreTrainedModel

from rlvlm.recipe.errors import RecipeError

if TYPE_CHECKING:
    from PIL.Image import Image

    from rlvlm.records import Row

LANGUAGE = "language"


def _softmax(logits_TE: torch.Tensor) -> torch.Tensor:
    return logits_TE.softmax(-1)


@dataclass(frozen=True, slots=True)
class Router:
    """How a family's mixture of experts chooses.

    class_name: of the router module in transformers, whose forward gives (logits, weights, indices).
    weights: (module, logits [T, E], indices [T, K]) -> weights [T, K], from the live logits, as the module itself
    computes them for its own choice. balance: what keeps the load even, a selection bias (`bias`) or an auxiliary loss.
    scores: logits [T, E] -> a token's scores as shares that sum to 1, for the auxiliary loss.
    """

    class_name: str
    weights: Callable[[nn.Module, torch.Tensor, torch.Tensor], torch.Tensor]
    balance: Literal["bias", "auxiliary"]
    scores: Callable[[torch.Tensor], torch.Tensor] = _softmax


class Family:
    """The defaults. A family overrides what is special about it.

    name: as docs and messages have it. model_types: `config.model_type` of its checkpoints. modality: its pictures'
    name in vLLM. groups: group -> regular expression over the names of parameters; what no expression finds is
    `language`. renames: (expression, replacement) on the names that transformers gives back for a checkpoint.
    engine_config: what vLLM needs in config.json and transformers does not write. chat_template: for checkpoints that
    have none.
    """

    name: ClassVar[str]
    model_types: ClassVar[tuple[str, ...]]
    modality: ClassVar[str] = "image"
    groups: ClassVar[Mapping[str, str]] = {}
    renames: ClassVar[Sequence[tuple[str, str]]] = ()
    engine_config: ClassVar[Mapping[str, Any]] = {}
    chat_template: ClassVar[str | None] = None
    router: ClassVar[Router | None] = None

    def load(self, folder: str, dtype: torch.dtype) -> PreTrainedModel:
        return AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype)

    def skeleton(self, config: PretrainedConfig) -> PreTrainedModel:
        """The model without weights: its modules and names on the meta device."""
        with torch.device("meta"):
            return AutoModelForImageTextToText.from_config(config)

    def placeholder_ids(self, config: PretrainedConfig) -> tuple[int, ...]:
        """Ids that stand for pictures and videos. A policy that could sample one would break the count of image
        features, so engine and learner both take them out of the distribution."""
        names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
        ids = {getattr(config, name, None) for name in names}
        vocabulary = config.get_text_config().vocab_size
        return tuple(sorted(i for i in ids if i is not None and i < vocabulary))

    def positions(
        self, config: PretrainedConfig, input_ids_T: torch.Tensor, images: Mapping[str, torch.Tensor]
    ) -> torch.Tensor:
        """Positions [P, T] of one prompt on its own."""
        return torch.arange(input_ids_T.numel())[None]

    def continued(self, position_ids_PT: torch.Tensor, length: int) -> torch.Tensor:
        """Positions [P, length] of the response to a prompt: each row goes on from its highest position."""
        return position_ids_PT.max(dim=1, keepdim=True).values + 1 + torch.arange(length)

    def token_keywords(self, config: PretrainedConfig, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """The forward's keyword tensors that go by token, of the shape of `input_ids`."""
        return {}

    def patches(self, config: PretrainedConfig, images: Mapping[str, torch.Tensor]) -> tuple[int, ...]:
        """How many patches the vision tower sees of each picture: its cost goes by them."""
        if "image_grid_thw" in images:
            return tuple(images["image_grid_thw"].prod(-1).tolist())
        if "pixel_values" not in images:
            return ()
        pictures, _, height, width = images["pixel_values"].shape
        side = config.vision_config.patch_size
        return ((height // side) * (width // side),) * pictures

    def body(self, model: PreTrainedModel) -> Callable[..., Any]:
        """The model without its head: takes the forward's keywords, gives `last_hidden_state`."""
        return model.model

    def hidden(self, model: PreTrainedModel, row: Row) -> torch.Tensor:
        """The last hidden states [T, H] of a packed row."""
        return self.body(model)(
            input_ids=row.input_ids_T[None],
            position_ids=row.position_ids if row.position_ids.shape[0] == 1 else row.position_ids[:, None],
            use_cache=False,
            **row.images,
            **{key: value[None] for key, value in self.token_keywords(model.config, row.input_ids_T).items()},
        ).last_hidden_state[0]

    def head(self, model: PreTrainedModel) -> nn.Module:
        """Hidden state -> logits."""
        return model.lm_head

    def engine_images(self, images: Sequence[Image], keys: Sequence[str]) -> dict[str, Any]:
        """A request's picture part, as vLLM's processor takes it; its cache goes by the keys."""
        if not images:
            return {}
        return {
            "multi_modal_data": {self.modality: list(images)},
            "multi_modal_uuids": {self.modality: list(keys)},
        }

    def exported(self, name: str, tensor: torch.Tensor) -> tuple[str, torch.Tensor]:
        """A weight under transformers' checkpoint name -> as published checkpoints (and vLLM) have it."""
        for pattern, replacement in self.renames:
            name = re.sub(pattern, replacement, name)
        return name, tensor

    def config_json(self, saved: Mapping[str, Any]) -> dict[str, Any]:
        """config.json as transformers writes it -> as published checkpoints (and vLLM) have it."""
        config = dict(saved)
        for key, value in self.engine_config.items():
            config[key] = {**config[key], **value} if isinstance(value, Mapping) else value
        return config

    def group_of(self, parameter: str) -> str:
        """The freeze group that a parameter belongs to."""
        return next((group for group, pattern in self.groups.items() if re.search(pattern, parameter)), LANGUAGE)


@cache
def families() -> dict[str, Family]:
    """model_type -> family, of every file in `families/`."""
    from rlvlm.policy import families as package

    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")
    return {kind: one() for one in _named(Family) for kind in one.model_types}


def _named(family: type[Family]) -> list[type[Family]]:
    found = [one for child in family.__subclasses__() for one in (child, *_named(child))]
    return [one for one in found if "model_types" in vars(one)]


def family_of(config: PretrainedConfig, model: str) -> Family:
    """The family of a checkpoint. model: `policy.model`, for the message of the RecipeError if there is none."""
    if config.model_type not in families():
        raise RecipeError(
            "policy.model",
            model,
            f"a model of type {config.model_type}, which rlvlm does not know",
            f"take one of {', '.join(sorted(families()))}, or add the family (docs/adding-a-policy.md)",
        )
    return families()[config.model_type]
