"""Watches the experts' load and keeps it even without an auxiliary loss (DeepSeek-V3, arXiv 2412.19437, section 2.1.2).

transformers has the router's selection bias (`e_score_correction_bias`) as a buffer and never updates it; this does:
after every optimizer step, by a constant in the direction of sign(mean load - load).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


class LoadBalance:
    """Counts the tokens that each expert of each MoE layer was given.

    step: size of the bias update; 0 only watches. Models without a selection bias are watched, models without experts
    give empty figures.
    """

    def __init__(self, model: nn.Module, step: float) -> None:
        self._step = step
        self._routers = [module for module in model.modules() if hasattr(module, "e_score_correction_bias")]
        self._loads = [torch.zeros(_bias(router).numel()) for router in self._routers]
        self._totals = [torch.zeros_like(load) for load in self._loads]
        self._counting = True
        for layer, router in enumerate(self._routers):
            router.register_forward_hook(self._hook(layer))

    def _hook(self, layer: int) -> Any:
        def count(module: nn.Module, args: Any, output: Any) -> None:
            if self._counting:
                chosen = output[2].detach().flatten().cpu()
                self._loads[layer] += torch.bincount(chosen, minlength=self._loads[layer].numel())

        return count

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Forward passes in this block (recomputed reference, gate) are not counted twice."""
        self._counting = False
        try:
            yield
        finally:
            self._counting = True

    def update(self) -> None:
        """One bias update from the loads since the last; loads are summed over ranks first."""
        for router, load, total in zip(self._routers, self._loads, self._totals, strict=True):
            if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
                shared = load.to(_bias(router).device)
                torch.distributed.all_reduce(shared)
                load = shared.cpu()
            if self._step and load.sum() > 0:
                bias = _bias(router)
                bias += self._step * torch.sign(load.mean() - load).to(bias)
            total += load
        for load in self._loads:
            load.zero_()

    def pop_metrics(self) -> dict[str, float]:
        """`load/entropy`: of the experts' shares, 1 = even, worst layer. `load/max_mean`: busiest expert over the mean,
        worst layer. Over everything since the last call."""
        layers = [total for total in self._totals if total.sum() > 0]
        metrics = (
            {
                "load/entropy": min(map(_entropy, layers)),
                "load/max_mean": max(float(t.max() / t.mean()) for t in layers),
            }
            if layers
            else {}
        )
        for total in self._totals:
            total.zero_()
        return metrics


def _bias(router: nn.Module) -> torch.Tensor:
    bias = router.e_score_correction_bias
    assert isinstance(bias, torch.Tensor)
    return bias


def _entropy(load: torch.Tensor) -> float:
    """Entropy of the shares, divided by its maximum log(experts)."""
    share = load / load.sum()
    return float(-(share * share.clamp_min(1e-12).log()).sum() / math.log(load.numel()))
