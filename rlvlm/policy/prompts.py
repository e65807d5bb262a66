"""From a task to what models read: token ids and picture tensors, worked out once per task and shared by SFT, engine
and learner, so that text is never tokenised twice in two places."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel, ProcessorMixin

from rlvlm.records import Chain, Task

if TYPE_CHECKING:
    from PIL.Image import Image

    from rlvlm.tasks.images import ImageStore

_TEXT_KEYS = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")


@dataclass(frozen=True, slots=True)
class Prompt:
    """text_ids: one placeholder a picture, what the engine takes. input_ids: placeholders expanded, what the models
    see. images: the forward's keyword tensors for the pictures (for Kimi pixel_values [patches, 3, p, p],
    image_grid_thw [n, 3])."""

    text_ids: tuple[int, ...]
    input_ids: tuple[int, ...]
    images: Mapping[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Response:
    """A response to imitate. seen_T: True on the tokens that state what was read off the picture."""

    token_ids: tuple[int, ...]
    seen_T: tuple[bool, ...]


def stack_images(images: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The pictures of several prompts as one forward takes them: tensors concatenated along their first dimension."""
    keys = dict.fromkeys(key for one in images for key in one)
    return {key: torch.cat([one[key] for one in images if key in one]) for key in keys}


class PromptEncoder:
    """Encodes tasks with the policy's own processor and chat template."""

    def __init__(self, processor: ProcessorMixin, store: ImageStore) -> None:
        self._processor = processor
        self._store = store
        self._prompts: dict[str, Prompt] = {}

    def prompt(self, task: Task) -> Prompt:
        """Encoded once per task id and kept: all k samples and all later iterations share it."""
        if task.id not in self._prompts:
            self._prompts[task.id] = self._encode(task)
        return self._prompts[task.id]

    def _encode(self, task: Task) -> Prompt:
        text = self._processor.apply_chat_template(list(task.messages), add_generation_prompt=True, tokenize=False)
        text_ids = self._processor.tokenizer(text, add_special_tokens=False)["input_ids"]
        if not task.images:
            return Prompt(tuple(text_ids), tuple(text_ids), {})
        encoded = self._processor(text=[text], images=self.images(task), return_tensors="pt")
        images = {key: value for key, value in encoded.items() if key not in _TEXT_KEYS}
        return Prompt(tuple(text_ids), tuple(encoded["input_ids"][0].tolist()), images)

    def images(self, task: Task) -> list[Image]:
        return [self._store.image(key) for key in task.images]

    def response(self, chain: Chain, answer: str) -> Response:
        """Chain, end of thought, answer, end of turn."""
        tokenizer = self._processor.tokenizer
        encoded = tokenizer(
            f"{chain.text}</think>{answer}{tokenizer.eos_token}", add_special_tokens=False, return_offsets_mapping=True
        )
        seen = [
            any(start < span_end and end > span_start for span_start, span_end in chain.seen)
            for start, end in encoded["offset_mapping"]
        ]
        return Response(tuple(encoded["input_ids"]), tuple(seen))

    def decode(self, token_ids: Sequence[int]) -> str:
        """The response as text, without the end-of-turn token and padding, with `</think>` kept."""
        tokenizer = self._processor.tokenizer
        kept = [t for t in token_ids if t not in (tokenizer.eos_token_id, tokenizer.pad_token_id)]
        return tokenizer.decode(kept, skip_special_tokens=False)

    def piece(self, token_id: int) -> str:
        """One token as text, for reports."""
        return self._processor.tokenizer.decode([token_id], skip_special_tokens=False)


def placeholder_ids(model: PreTrainedModel) -> tuple[int, ...]:
    """Ids that stand for pictures and videos. A policy that could sample one would break the count of image features,
    so engine and learner both take them out of the distribution."""
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    ids = {getattr(model.config, name, None) for name in names}
    vocabulary = model.config.get_text_config().vocab_size
    return tuple(sorted(i for i in ids if i is not None and i < vocabulary))


def engine_images(model_type: str, images: Sequence[Image], keys: Sequence[str]) -> dict[str, Any]:
    """A request's picture part, as vLLM's processor of this model family takes it; its cache goes by the keys."""
    if not images:
        return {}
    if model_type == "kimi_k25":
        chunks = [{"type": "image", "image": image, "uuid": key} for image, key in zip(images, keys, strict=True)]
        return {"multi_modal_data": {"vision_chunk": chunks}}
    return {"multi_modal_data": {"image": list(images)}, "multi_modal_uuids": {"image": list(keys)}}
