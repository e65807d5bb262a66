"""What a row costs: floating-point operations of the policy's parts, and the share of the device's peak they come to.

Counted as the literature does (PaLM, arXiv 2204.02311, appendix B): two for each weight that a token meets, causal
attention as the half that is needed, recomputation under gradient checkpointing not at all. The vision tower counts
with its own patches, experts only as far as they are chosen, the head on trained tokens only.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from rlvlm.policy.family import LANGUAGE, Family
from rlvlm.policy.trainable import is_adapter, plain_name
from rlvlm.records import Row

# Dense bf16 operations a second by the name that CUDA gives the device, most specific first (vendors' data sheets).
_PEAK_FLOPS = (
    ("H200", 989e12),
    ("H100 PCIe", 756e12),
    ("H100", 989e12),
    ("GH200", 989e12),
    ("B200", 2250e12),
    ("A100", 312e12),
    ("L40S", 362e12),
    ("A10", 125e12),
    ("RTX 4090", 165e12),
)
_FORWARD_BACKWARD = (
    3  # a backward pass multiplies with every weight twice: for the input's gradient and the weight's own
)


def peak_flops(device: torch.device) -> float | None:
    """Of the device, in bf16; None where we do not know it (a CPU, a GPU that is not in the table)."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((flops for part, flops in _PEAK_FLOPS if part in name), None)


@dataclass(frozen=True, slots=True)
class Parts:
    """Operations by the part of the policy that does them."""

    vision: float
    projector: float
    language: float

    def __add__(self, other: Parts) -> Parts:
        return Parts(self.vision + other.vision, self.projector + other.projector, self.language + other.language)

    @property
    def total(self) -> float:
        return self.vision + self.projector + self.language


class Flops:
    """Counts rows of one policy. The parameters may be sharded; what is frozen when this is made counts as frozen."""

    def __init__(self, policy: PreTrainedModel, family: Family) -> None:
        self._family, self._config = family, policy.config
        head = family.head(policy)
        weights: dict[str, float] = {"vision": 0.0, "projector": 0.0, LANGUAGE: 0.0}
        for name, module in policy.named_modules():
            if module is not head:
                group = family.group_of(f"{name}.")
                weights[LANGUAGE if group == "router" else group] += _met_by_a_token(name, module, policy.config)
        self._weights = weights
        self._head = float(_numel(head.weight)) if isinstance(head.weight, torch.Tensor) else 0.0
        self._pair = _attention(policy.config.get_text_config())
        self._vision_pair = _vision_attention(policy.config)
        self._passes = _passes(policy, family)

    def forward(self, row: Row) -> Parts:
        """Of one forward pass over the row."""
        lengths = torch.bincount(row.segment_T).double()
        patches = torch.tensor(self._family.patches(self._config, row.images), dtype=torch.float64)
        placeholders = int((row.input_ids_T == self._config.image_token_id).sum())
        full, windowed, window = self._vision_pair
        pairs = full * patches.square() + windowed * patches * patches.clamp(max=window)
        return Parts(
            vision=2 * self._weights["vision"] * float(patches.sum()) + float(pairs.sum()),
            projector=2 * self._weights["projector"] * placeholders,
            language=2 * self._weights[LANGUAGE] * row.input_ids_T.numel()
            + 2 * self._head * int(row.trained_T.sum())
            + self._pair * float((lengths * (lengths + 1) / 2).sum()),
        )

    def training(self, row: Row) -> Parts:
        """Of a forward and a backward pass: frozen parts only pass gradients on, or see none at all."""
        forward = self.forward(row)
        passes = self._passes
        return Parts(
            forward.vision * passes.vision, forward.projector * passes.projector, forward.language * passes.language
        )


def _met_by_a_token(name: str, module: nn.Module, config: PretrainedConfig) -> float:
    """Weights of the module itself that each token is multiplied with."""
    if isinstance(module, (nn.Linear, nn.Conv2d, nn.Conv3d)):
        return float(_numel(module.weight))
    own = {key: value for key, value in module.named_parameters(recurse=False)}
    if own and plain_name(f"{name}.").endswith(".experts."):
        text = config.get_text_config()
        experts = next(_shape(value)[0] for value in own.values() if len(_shape(value)) == 3)
        return sum(_numel(value) for value in own.values() if len(_shape(value)) == 3) * (
            text.num_experts_per_tok / experts
        )
    if name.endswith(".gate") and len(_shape(own.get("weight"))) == 2:  # routers hold their matrix themselves
        return float(_numel(own["weight"]))
    return 0.0


def _shape(parameter: torch.Tensor | None) -> torch.Size:
    return torch.Size() if parameter is None else getattr(parameter, "ds_shape", parameter.shape)


def _numel(parameter: torch.Tensor) -> int:
    return _shape(parameter).numel()


def _attention(text: PretrainedConfig) -> float:
    """Operations for a pair of a query and a key, over all layers: query with key, weight with value."""
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    query, value = getattr(text, "qk_head_dim", None) or head, getattr(text, "v_head_dim", None) or head
    return 2.0 * text.num_hidden_layers * text.num_attention_heads * (query + value)


def _vision_attention(config: PretrainedConfig) -> tuple[float, float, float]:
    """(operations a pair in layers that see the whole picture, in layers with windows, patches in a window)."""
    vision = config.vision_config
    layers = getattr(vision, "num_hidden_layers", None) or vision.depth
    hidden = getattr(vision, "embed_dim", None) or vision.hidden_size
    windowed = layers - len(vision.fullatt_block_indexes) if hasattr(vision, "fullatt_block_indexes") else 0
    window = (vision.window_size // vision.patch_size) ** 2 if windowed else 0
    return 4.0 * hidden * (layers - windowed), 4.0 * hidden * windowed, float(window)


def _passes(policy: PreTrainedModel, family: Family) -> Parts:
    """What training costs each part, in forward passes: gradients have to come down to it if it learns, or anything
    before it does. Where adapters learn for it, its own weights only pass gradients on."""
    trained = [name for name, parameter in policy.named_parameters() if parameter.requires_grad]
    learns = {family.group_of(name) for name in trained if not is_adapter(name)}
    gets = learns | {family.group_of(name) for name in trained}

    def passes(own: set[str], before: set[str]) -> float:
        return float(_FORWARD_BACKWARD if learns & own else 2 if gets & (own | before) else 1)

    return Parts(
        vision=passes({"vision"}, set()),
        projector=passes({"projector"}, {"vision"}),
        language=passes({"router", LANGUAGE}, {"vision", "projector"}),
    )
