"""From a task to what models read: token ids and picture tensors, worked out once per task and shared by SFT, engine
and learner, so that text is never tokenised twice in two places."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch.nn.functional import pad
from transformers import PretrainedConfig, ProcessorMixin

from rlvlm.policy.family import family_of
from rlvlm.records import Chain, Task

if TYPE_CHECKING:
    from rlvlm.tasks.images import ImageStore

_BLANK_SIDE = 56  # pixels; a multiple of what two patches of any family take, or resized by its processor
_TEXT_KEYS = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")


@dataclass(frozen=True, slots=True)
class Prompt:
    """text_ids: one placeholder a picture, what the engine takes. input_ids: placeholders expanded, what the models
    see. position_ids: of input_ids, [P, T] as the family wants them. images: the forward's keyword tensors for the
    pictures (for Kimi pixel_values [patches, 3, p, p], image_grid_thw [n, 3])."""

    text_ids: tuple[int, ...]
    input_ids: tuple[int, ...]
    position_ids: torch.Tensor
    images: Mapping[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Response:
    """A response to imitate. seen_T: True on the tokens that state what was read off the picture."""

    token_ids: tuple[int, ...]
    seen_T: tuple[bool, ...]


def stack_images(images: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The pictures of several prompts as one forward takes them: tensors concatenated along their first dimension. Text
    that is read with a picture (InstructBLIP's), ids and their mask [1, length], is filled with zeros on the right."""
    keys = dict.fromkeys(key for one in images for key in one)
    found = {key: [one[key] for one in images if key in one] for key in keys}
    return {key: torch.cat(_as_wide(parts) if parts[0].dim() == 2 else parts) for key, parts in found.items()}


def _as_wide(matrices: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    width = max(matrix.shape[1] for matrix in matrices)
    return [pad(matrix, (0, width - matrix.shape[1])) for matrix in matrices]


class PromptEncoder:
    """Encodes tasks with the policy's own processor and chat template. config: the policy's."""

    def __init__(self, processor: ProcessorMixin, store: ImageStore, config: PretrainedConfig) -> None:
        self._processor = processor
        self._store = store
        self.config = config
        self.family = family_of(config, config.name_or_path)
        self._prompts: dict[str, Prompt] = {}

    def prompt(self, task: Task) -> Prompt:
        """Encoded once per task id and kept: all k samples and all later iterations share it."""
        if task.id not in self._prompts:
            self._prompts[task.id] = self._encode(task)
        return self._prompts[task.id]

    def blank(self) -> Prompt:
        """A question with one small white picture, for a rank that has none while others do: the vision tower's
        collectives need every rank."""
        messages = [{"role": "user", "content": [{"type": "image"}]}]
        return self._encoded(messages, [Image.new("RGB", (_BLANK_SIDE, _BLANK_SIDE), "white")])

    def _encode(self, task: Task) -> Prompt:
        return self._encoded(list(task.messages), self.images(task))

    def _encoded(self, messages: list[Any], pictures: list[Image.Image]) -> Prompt:
        text = self._processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        # As transformers does it: the tokenizer's own start of sequence, unless the template has written it already.
        tokenizer = self._processor.tokenizer
        start = not (tokenizer.bos_token and text.startswith(tokenizer.bos_token))
        text_ids = tokenizer(text, add_special_tokens=start)["input_ids"]
        input_ids, images = torch.tensor(text_ids), {}
        if pictures:
            encoded = self._processor(text=[text], images=pictures, add_special_tokens=start, return_tensors="pt")
            input_ids = encoded["input_ids"][0]
            images = {key: value for key, value in encoded.items() if key not in _TEXT_KEYS}
        positions = self.family.positions(self.config, input_ids, images)
        return Prompt(tuple(text_ids), tuple(input_ids.tolist()), positions, images)

    def images(self, task: Task) -> list[Image.Image]:
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

    def token_keywords(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """The forward's keyword tensors that go by token, of the shape of `input_ids`."""
        return self.family.token_keywords(self.config, input_ids)

    def decode(self, token_ids: Sequence[int]) -> str:
        """The response as text, without the end-of-turn token and padding, with `</think>` kept."""
        tokenizer = self._processor.tokenizer
        kept = [t for t in token_ids if t not in (tokenizer.eos_token_id, tokenizer.pad_token_id)]
        return tokenizer.decode(kept, skip_special_tokens=False)

    def piece(self, token_id: int) -> str:
        """One token as text, for reports."""
        return self._processor.tokenizer.decode([token_id], skip_special_tokens=False)
