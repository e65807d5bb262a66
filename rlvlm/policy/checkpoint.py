"""Plain Hugging Face checkpoints of a policy: written here, read by transformers' `from_pretrained` and by vLLM."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel, ProcessorMixin
from transformers.core_model_loading import revert_weight_conversion

# transformers 5.19 maps kimi_k25's names back with patterns that are not anchored, so the language model's `layers`
# come out as the vision tower's `blocks`. These restore the names of the published checkpoints, which vLLM knows.
_RENAMES: dict[str, tuple[tuple[str, str], ...]] = {
    "kimi_k25": (
        (r"^language_model\.model\.blocks\.", "language_model.model.layers."),
        (r"^model\.mm_projector", "mm_projector"),
        (r"^vision_tower\.encoder\.patch_embed", "vision_tower.patch_embed"),
    )
}
# What vLLM needs in config.json and transformers does not write.
_CONFIG: dict[str, dict[str, object]] = {
    "kimi_k25": {
        "architectures": ["KimiK25ForConditionalGeneration"],
        "text_config": {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "moe_layer_freq": 1},
    }
}


def checkpoint_names(model: PreTrainedModel, state: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """(name in a published checkpoint, tensor) for every tensor of `state`, named as in `model.state_dict()`."""
    renames = _RENAMES.get(model.config.model_type, ())
    for name, tensor in revert_weight_conversion(model, dict(state)).items():
        for pattern, replacement in renames:
            name = re.sub(pattern, replacement, name)
        yield name, _own(tensor)


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
    _complete_config(folder / "config.json", _CONFIG.get(model.config.model_type, {}))
    _copy_image_settings(folder)


def _complete_config(path: Path, additions: Mapping[str, object]) -> None:
    config = json.loads(path.read_text())
    for key, value in additions.items():
        if isinstance(value, dict):
            config[key].update(value)
        else:
            config[key] = value
    path.write_text(json.dumps(config, indent=2) + "\n")


def _copy_image_settings(folder: Path) -> None:
    """vLLM reads the image processor's settings from a file of their own."""
    settings = json.loads((folder / "processor_config.json").read_text()).get("image_processor")
    if settings and not (folder / "preprocessor_config.json").exists():
        (folder / "preprocessor_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def load_policy(folder: str, dtype: str) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Model (in `dtype`: "float32" or "bfloat16") and processor from a directory or a hub id."""
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=getattr(torch, dtype))
    return model, AutoProcessor.from_pretrained(folder)


def parameter_count(parameters: Iterable[torch.nn.Parameter]) -> int:
    """Parameters in all, sharded ones (ZeRO-3) counted whole."""
    return sum(getattr(p, "ds_numel", p.numel()) for p in parameters)
