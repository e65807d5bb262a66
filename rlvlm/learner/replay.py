"""Router replay: a mixture of experts takes the experts that were chosen before, on the same tokens.

A router's choice is the discrete part of the policy, and it flips on rounding: the rollout engine's differs from the
learner's, and the learner's own differs from pi_i's after the first optimizer step. Replay takes it out of the ratio:

    r2  pi is computed with the experts that the learner chose when it computed pi_i
    r3  pi_i and pi are both computed with the experts that the rollout engine chose (arXiv 2510.11370)

Only the choice is forced. The experts' weights are computed from the live logits, so the gradient reaches the router.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from rlvlm.recipe.errors import RecipeError

if TYPE_CHECKING:
    from rlvlm.policy.family import Family, Router

FREE = -1  # in a routing: this token goes where the router sends it


def in_backward() -> bool:
    """Whether autograd is running a backward now: a forward under it is activation checkpointing's second one, of
    tokens that have been seen already."""
    return torch._C._current_graph_task_id() != -1


def routers_of(model: nn.Module, family: Family) -> tuple[nn.Module, ...]:
    """The router modules, in the order of their layers; none in a dense model."""
    name = family.router.class_name if family.router else None
    return tuple(module for module in model.modules() if type(module).__name__ == name)


class RouterReplay:
    """Hooks on the routers of `model`, which do nothing outside of `record` and `replay`.

    They are plain forward hooks: ZeRO-3, activation checkpointing and packed rows need nothing of their own. A routing
    is an int16 tensor [T, L, K]: for each of the T tokens that the model is run on, in each MoE layer, K experts; a
    token with -1 is free. kind: `rl.router_replay`. Raises RecipeError if there is nothing to replay in the model.
    """

    def __init__(self, model: nn.Module, family: Family, kind: str) -> None:
        self._kind = kind
        self._routers = routers_of(model, family)
        self._recording = False
        self._recorded: dict[int, torch.Tensor] = {}
        self._forced_TLK: torch.Tensor | None = None
        self._differing: torch.Tensor | None = None
        self._compared: torch.Tensor | None = None
        if kind != "none" and not self._routers:
            problem = f"{family.name} has no mixture of experts, so no routers to replay"
            raise RecipeError("rl.router_replay", kind, problem, "leave it out")
        for layer, module in enumerate(self._routers):
            assert family.router is not None
            module.register_forward_hook(self._hook(layer, family.router))

    @property
    def layers(self) -> int:
        """MoE layers; 0 in a dense model."""
        return len(self._routers)

    @contextmanager
    def reference(self, routing_TLK: torch.Tensor | None) -> Iterator[None]:
        """The forward in this block gives pi_i: under r2 its choices are kept, under r3 it goes by the engine's."""
        if self._kind == "r2":
            with self.record():
                yield
        else:
            with self.replay(routing_TLK):
                yield

    @contextmanager
    def record(self) -> Iterator[None]:
        """Keeps the choices of the forward in this block, for `pop_recorded`."""
        self._recording = True
        try:
            yield
        finally:
            self._recording = False

    def pop_recorded(self) -> torch.Tensor | None:
        """The routing of the last forward in a `record` block, on the CPU; None if there was none, or no router."""
        recorded, self._recorded = self._recorded, {}
        return torch.stack([recorded[layer] for layer in range(self.layers)], dim=1).cpu() if recorded else None

    @contextmanager
    def replay(self, routing_TLK: torch.Tensor | None) -> Iterator[None]:
        """Forward AND backward in this block go by the routing (backward computes forwards again under activation
        checkpointing); None leaves the routers free."""
        self._forced_TLK = routing_TLK
        try:
            yield
        finally:
            self._forced_TLK = None

    def pop_mismatch(self) -> torch.Tensor:
        """(differing, compared), in float64, since the last call: in how many of the token-layers that were replayed
        the router itself would have taken another set of experts, given what the replay made of the layers below."""
        differing, compared = self._differing, self._compared
        self._differing = self._compared = None
        if differing is None or compared is None:
            return torch.zeros(2, dtype=torch.float64)
        return torch.stack([differing, compared]).double().cpu()

    def _hook(self, layer: int, router: Router) -> Any:
        def choose(module: nn.Module, args: Any, output: Any) -> Any:
            logits_TE, _, chosen_TK = output
            if self._forced_TLK is not None:
                chosen_TK = self._forced(layer, chosen_TK)
                output = logits_TE, router.weights(module, logits_TE, chosen_TK), chosen_TK
            if self._recording and not in_backward():
                self._recorded[layer] = chosen_TK.detach().to(torch.int16)
            return output

        return choose

    def _forced(self, layer: int, chosen_TK: torch.Tensor) -> torch.Tensor:
        assert self._forced_TLK is not None
        forced_TK = self._forced_TLK[:, layer].to(chosen_TK)
        if forced_TK.shape != chosen_TK.shape:
            raise ValueError(f"a routing of {tuple(forced_TK.shape)} for choices of {tuple(chosen_TK.shape)}")
        given_T = forced_TK[:, 0] != FREE
        if not in_backward():
            self._compare(chosen_TK.sort(-1).values != forced_TK.sort(-1).values, given_T)
        return torch.where(given_T[:, None], forced_TK, chosen_TK)

    def _compare(self, differs_TK: torch.Tensor, given_T: torch.Tensor) -> None:
        """Sums stay on the device: no step waits for them."""
        differing, compared = (differs_TK.any(-1) & given_T).sum(), given_T.sum()
        self._differing = differing if self._differing is None else self._differing + differing
        self._compared = compared if self._compared is None else self._compared + compared
