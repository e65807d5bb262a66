"""Watches how a mixture of experts loads its experts, and keeps the load even, by what the family was made for:

    bias       after every optimizer step the router's selection bias moves by a constant in the direction of
               sign(mean load - load); no gradient, no loss (DeepSeek-V3, arXiv 2412.19437, section 2.1.2).
               transformers has the bias (`e_score_correction_bias`) as a buffer and never updates it.
    auxiliary  E sum_e f_e P_e joins the loss: f_e the tokens that expert e is given, P_e the mean of its scores, as
               shares of the tokens (Switch Transformers, arXiv 2101.03961, equations 4 to 6), averaged over layers.
               transformers' load_balancing_loss_func sums f and P over all layers first, so that two layers which lean
               to different experts look even; of one layer it is the same.

What counts is the ROUTER'S OWN choice, also where a replay forces another (learner/replay.py): a forced choice does not
answer to the bias, which would then run away within an iteration.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from rlvlm.learner.replay import in_backward, routers_of
from rlvlm.recipe.errors import RecipeError
from rlvlm.recipe.schema import Balance

if TYPE_CHECKING:
    from rlvlm.policy.family import Family

_ENOUGH = 16  # tokens per expert, on average, below which a layer's load says nothing about collapse


class LoadBalance:
    """After each training forward `count`, after each optimizer step `update`. Dense models give empty figures.

    frozen: whether the routers' weights do not train; their selection bias then does not move either. Raises
    RecipeError if the recipe wants it moved for all that, or if the routers of the model have none.
    """

    def __init__(self, model: nn.Module, family: Family, balance: Balance, frozen: bool = False) -> None:
        self._balance = balance
        self._frozen = frozen
        self._family = family
        self._routers = routers_of(model, family)
        self._seen: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # layer -> logits [T, E], chosen [T, K]
        self._load_LE: torch.Tensor | None = None  # since the last update, of this rank
        self._total_LE: torch.Tensor | None = None  # since the last pop_metrics, of all ranks
        self._chosen = 0  # experts per token
        self.kind = self._kind()
        for layer, router in enumerate(self._routers):
            # Before RouterReplay's hook, which puts a forced choice in the place of the router's own.
            router.register_forward_hook(self._hook(layer), prepend=True)

    def _kind(self) -> str:
        """bias, auxiliary or off."""
        if not self._routers or self._family.router is None:
            return "off"
        kind = self._family.router.balance if self._balance.kind == "auto" else self._balance.kind
        if kind == "bias" and not all(hasattr(router, "e_score_correction_bias") for router in self._routers):
            problem = f"the routers of {self._family.name} have no selection bias"
            raise RecipeError("learner.balance.kind", kind, problem, "give auxiliary, or leave it out (auto)")
        if kind == "bias" and self._frozen:
            if self._balance.kind == "bias":
                problem = "the routers are frozen, by a learning rate of 0 or because adapters train (policy.lora)"
                raise RecipeError("learner.balance.kind", kind, problem, "give auxiliary, or leave it out (auto)")
            return "off"
        return kind

    def _hook(self, layer: int) -> Any:
        def see(module: nn.Module, args: Any, output: Any) -> None:
            # Without gradients it is not training (pi_i, evaluation); under a backward it has been seen.
            if torch.is_grad_enabled() and not in_backward():
                self._seen[layer] = output[0], output[2].detach()

        return see

    def count(self, real_T: torch.Tensor) -> torch.Tensor:
        """Counts the forward just made; gives its part of the loss, a scalar: 0 unless the kind is auxiliary.

        real_T: True on the tokens that count, of the forward's shape; padding and blank pictures have no say.
        """
        real_T = real_T.flatten().bool()
        loss = torch.zeros((), device=real_T.device)
        if not self._seen:
            return loss
        scores = self._family.router.scores if self._family.router else None
        loads = []
        for layer in range(len(self._routers)):
            logits_TE, chosen_TK = self._seen[layer]
            load_E = expert_load(chosen_TK, real_T, logits_TE.shape[-1])
            loads.append(load_E)
            if self.kind == "auxiliary" and scores is not None:
                part = load_loss(scores(logits_TE.float()), load_E, real_T)
                loss = loss + self._balance.coefficient / len(self._routers) * part
        self._chosen = chosen_TK.shape[-1]
        self._seen = {}
        load_LE = torch.stack(loads)
        self._load_LE = load_LE if self._load_LE is None else self._load_LE + load_LE
        return loss

    def update(self) -> None:
        """After an optimizer step: the loads of all ranks are summed, and the biases move. Collective, if there are
        several ranks; every rank moves its biases by the same sums."""
        if self._load_LE is None:
            return
        load_LE, self._load_LE = self._load_LE, None
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            torch.distributed.all_reduce(load_LE)
        if self.kind == "bias":
            for router, load_E in zip(self._routers, load_LE, strict=True):
                bias = _bias(router)
                bias += self._balance.step * torch.sign(load_E.mean() - load_E).to(bias)
        self._total_LE = load_LE if self._total_LE is None else self._total_LE + load_LE

    def discard(self) -> None:
        """Instead of `update`, after a step that was refused."""
        self._load_LE = None

    def pop_metrics(self) -> dict[str, float]:
        """Since the last call, of the worst layer: `load/entropy` of the experts' shares (1 = even), `load/max_mean`,
        the busiest expert over the mean. Of all layers: `load/unused`, experts without a token, and `load/collapsed`,
        layers that are (`is_collapsed`)."""
        if self._total_LE is None:
            return {}
        layers, self._total_LE = list(self._total_LE.cpu()), None
        return {
            "load/entropy": min(_entropy(load_E) / math.log(load_E.numel()) for load_E in layers),
            "load/max_mean": max(float(load_E.max() / load_E.mean()) for load_E in layers),
            "load/unused": float(sum(int((load_E == 0).sum()) for load_E in layers)),
            "load/collapsed": float(
                sum(is_collapsed(load_E, self._chosen, self._balance.collapse) for load_E in layers)
            ),
        }

    def _has_collapsed(self, load_E: torch.Tensor) -> bool:
        return is_collapsed(load_E, self._chosen, self._balance.collapse)


def expert_load(chosen_TK: torch.Tensor, real_T: torch.Tensor, experts: int) -> torch.Tensor:
    """How many of the real tokens each expert was given, [E], float64."""
    load_E = torch.zeros(experts, dtype=torch.float64, device=chosen_TK.device)
    weight_TK = real_T.to(load_E)[:, None].expand(chosen_TK.shape)
    return load_E.index_add_(0, chosen_TK.flatten(), weight_TK.flatten())


def load_loss(scores_TE: torch.Tensor, load_E: torch.Tensor, real_T: torch.Tensor) -> torch.Tensor:
    """E sum_e f_e P_e of one layer. Even load gives K, the number of experts per token; its gradient goes through the
    scores alone."""
    tokens = real_T.sum().clamp_min(1)
    mean_score_E = (scores_TE * real_T.to(scores_TE)[:, None]).sum(0) / tokens
    return load_E.numel() * ((load_E / tokens).to(mean_score_E) * mean_score_E).sum()


def is_collapsed(load_E: torch.Tensor, chosen: int, threshold: float) -> bool:
    """Whether a layer uses hardly more experts than one token takes (`chosen`), however many it has: the effective
    number of experts, exp(entropy of their shares), is closer to `chosen` than `threshold` of the way to all."""
    experts = load_E.numel()
    if chosen >= experts or load_E.sum() < _ENOUGH * experts:
        return False
    return (math.exp(_entropy(load_E)) - chosen) / (experts - chosen) < threshold


class CollapseWatch:
    """Says once that experts collapsed, and what to do."""

    def __init__(self) -> None:
        self._said = False

    def note(self, figures: dict[str, float]) -> str | None:
        """figures: what `pop_metrics` gave."""
        layers = int(figures.get("load/collapsed", 0.0))
        if not layers or self._said:
            return None
        self._said = True
        return (
            f"experts collapse: in {layers} MoE layer{'s' if layers > 1 else ''} nearly all tokens go to the same few "
            f"(load/entropy {figures['load/entropy']:.2f}, {figures['load/unused']:.0f} experts unused); raise "
            "learner.balance.step (bias) or learner.balance.coefficient (auxiliary), or lower the learning rate"
        )


def _bias(router: nn.Module) -> torch.Tensor:
    bias = router.e_score_correction_bias
    assert isinstance(bias, torch.Tensor)
    return bias


def _entropy(load_E: torch.Tensor) -> float:
    """Entropy of the shares, in nats."""
    share_E = load_E / load_E.sum().clamp_min(1)
    return float(-(share_E * share_E.clamp_min(1e-12).log()).sum())
