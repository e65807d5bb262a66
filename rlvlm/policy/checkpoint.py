"""Plain Hugging Face checkpoints of a policy: written here, read by transformers' `from_pretrained` and by vLLM."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import save_file
from transformers import AutoConfig, AutoProcessor, PreTrainedModel, ProcessorMixin
from transformers.core_model_loading import revert_weight_conversion

from rlvlm.policy.family import family_of


def checkpoint_names(model: PreTrainedModel, state: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """(name in a published checkpoint, tensor) for every tensor of `state`, named as in `model.state_dict()`."""
    family = family_of(model.config, model.config.name_or_path)
    # A tied weight has two names for one tensor; a checkpoint has the first alone, and its readers tie again.
    once = {name: tensor for name, tensor in state.items() if name not in model.all_tied_weights_keys}
    for name, tensor in revert_weight_conversion(model, once).items():
        name, tensor = family.exported(name, tensor)
        yield name, _own(tensor)


def save_weights(model: PreTrainedModel, state: Mapping[str, torch.Tensor], path: Path) -> None:
    """The weights alone as one safetensors file, under their names in a published checkpoint."""
    save_file(dict(checkpoint_names(model, state)), path)


def _own(tensor: torch.Tensor) -> torch.Tensor:
    """Contiguous and with a storage of its own: experts come as slices of one tensor, which safetensors refuses."""
    whole = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
    return tensor if whole else tensor.clone(memory_format=torch.contiguous_format)


def save_policy(
    model: PreTrainedModel, processor: ProcessorMixin, folder: Path, state: Mapping[str, torch.Tensor] | None = None
) -> None:
    """Writes weights, config, tokenizer, processor, chat template. `state`: full weights if the model's are sharded."""
    folder.mkdir(parents=True, exist_ok=True)
    named = checkpoint_names(model, state if state is not None else model.state_dict())
    save_torch_state_dict(dict(named), folder, metadata={"format": "pt"})
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    processor.save_pretrained(folder)
    family = family_of(model.config, model.config.name_or_path)
    config = folder / "config.json"
    config.write_text(json.dumps(family.config_json(json.loads(config.read_text())), indent=2) + "\n")
    _copy_image_settings(folder)


def _copy_image_settings(folder: Path) -> None:
    """vLLM reads the image processor's settings from a file of their own."""
    settings = json.loads((folder / "processor_config.json").read_text()).get("image_processor")
    if settings and not (folder / "preprocessor_config.json").exists():
        (folder / "preprocessor_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def load_policy(folder: str, dtype: str) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Model (in `dtype`: "float32" or "bfloat16") and processor from a directory or a hub id."""
    family = family_of(AutoConfig.from_pretrained(folder), folder)
    return family.load(folder, getattr(torch, dtype)), load_processor(folder)


def load_processor(folder: str) -> ProcessorMixin:
    """The processor of a directory or a hub id. It has a chat template: some classes of processors lose the one that
    their checkpoint has, and some families' published checkpoints have none."""
    processor = AutoProcessor.from_pretrained(folder)
    if processor.chat_template is None:
        family = family_of(AutoConfig.from_pretrained(folder), folder)
        processor.chat_template = processor.tokenizer.chat_template or family.chat_template
    return processor


def parameter_count(parameters: Iterable[torch.nn.Parameter]) -> int:
    """Parameters in all, sharded ones (ZeRO-3) counted whole."""
    return sum(getattr(p, "ds_numel", p.numel()) for p in parameters)
