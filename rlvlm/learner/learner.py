"""The learner: DeepSpeed under the objective. One iteration = reference log-probs, minibatches, bias update, optimizer
reset."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from rlvlm.learner.balance import LoadBalance
from rlvlm.learner.logprobs import RowLogProbs, sum_by_segment
from rlvlm.learner.objective import surrogate
from rlvlm.policy.checkpoint import checkpoint_names
from rlvlm.recipe.errors import RunError
from rlvlm.recipe.schema import Recipe
from rlvlm.records import Batch, Row


@dataclass(frozen=True, slots=True)
class Parity:
    """|engine log-prob - learner's pi_i log-prob| over the sampled tokens of an iteration, in nats."""

    max: float
    mean: float
    tokens: int


@dataclass(frozen=True, slots=True)
class Reference:
    """pi_i on a batch: logp[m][r] is the log-probs [N] of row r of minibatch m; entropy: mean per trained token, in
    nats."""

    logp: tuple[tuple[torch.Tensor, ...], ...]
    parity: Parity
    entropy: float


class NothingToLearn(RunError):
    """A batch without a single scored response."""


class Learner:
    """Holds the policy in training. `reference`, then `step`, then `weights`, once per iteration."""

    def __init__(self, recipe: Recipe, policy: PreTrainedModel, banned: Sequence[int]) -> None:
        import deepspeed

        self._rl = recipe.rl
        self._policy = policy
        self._balance = LoadBalance(policy, recipe.learner.bias_update)
        module = RowLogProbs(policy, recipe.rl.temperature, banned, recipe.learner.logp_chunk)
        self._engine, *_ = deepspeed.initialize(
            model=module, model_parameters=list(module.parameters()), config=_deepspeed_config(recipe)
        )
        self._device = self._engine.device

    @torch.no_grad()
    def reference(self, batch: Batch) -> Reference:
        """Recomputes pi_i with the learner's own weights and holds the engine's log-probs against it.

        Raises NothingToLearn if no response of the iteration could be scored.
        """
        if not any(batch.minibatches):
            raise NothingToLearn(
                "not one response of this iteration could be scored",
                mend="mend the reward, then `--resume`; rewards.max_failures below 1 stops with the cause",
            )
        logp, gaps, entropies = [], [], []
        with self._balance.paused():
            for rows in batch.minibatches:
                outputs = [self._engine(_to(row, self._device)) for row in rows]
                logp.append(tuple(logp_N for logp_N, _ in outputs))
                entropies += [entropy_N for _, entropy_N in outputs]
                gaps += [
                    (row.engine_logp_T[row.trained_T] - logp_N.cpu()).abs()
                    for row, (logp_N, _) in zip(rows, outputs, strict=True)
                ]
        gap = torch.cat(gaps)
        parity = Parity(float(gap.max()), float(gap.mean()), gap.numel())
        return Reference(tuple(logp), parity, float(torch.cat(entropies).mean()))

    def step(self, batch: Batch, reference: Reference) -> dict[str, float]:
        """One optimizer step per minibatch, then the reset. Gives `loss`, `grad_norm`, `kl`, `load/...`, means over
        steps."""
        losses, norms, divergences = [], [], []
        for rows, prompts, reference_logp in zip(batch.minibatches, batch.prompts, reference.logp, strict=True):
            if not rows:  # nothing in it could be scored
                continue
            parts = [
                self._accumulate(_to(row, self._device), logp_N, prompts, last=row is rows[-1])
                for row, logp_N in zip(rows, reference_logp, strict=True)
            ]
            losses.append(sum(float(loss) for loss, _ in parts))
            divergences += [kl_N for _, kl_N in parts]
            norms.append(float(self._engine.get_global_grad_norm()))
            self._balance.update()
        if self._rl.optimizer_reset:
            self._reset_optimizer()
        steps = max(len(losses), 1)
        return {
            "loss": sum(losses) / steps,
            "grad_norm": sum(norms) / steps,
            "kl": float(torch.cat(divergences).mean()) if divergences else 0.0,
            **self._balance.pop_metrics(),
        }

    def _accumulate(
        self, row: Row, reference_N: torch.Tensor, prompts: int, last: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Backward of one row; the optimizer steps with the minibatch's last. Gives the loss and the per-token
        divergence from pi_i by the estimator exp(d) - 1 - d of d = log pi - log pi_i."""
        self._engine.set_gradient_accumulation_boundary(last)
        logp_N, _ = self._engine(row)
        loss = surrogate(
            sum_by_segment(logp_N, row),
            sum_by_segment(reference_N, row),
            row.advantage_S,
            row.group_size_S,
            prompts=prompts,
            tau=self._rl.tau,
            normalisation=self._rl.normalisation,
        )
        self._engine.backward(loss)
        self._engine.step()
        log_ratio_N = (logp_N - reference_N).detach()
        return loss.detach(), log_ratio_N.exp() - 1 - log_ratio_N

    def _reset_optimizer(self) -> None:
        """The reference has moved: moments and step counts start again (k1.5), in place, as a fresh engine has them."""
        for state in self._engine.optimizer.optimizer.state.values():
            for name, value in state.items():
                state[name] = value.zero_() if torch.is_tensor(value) else type(value)(0)

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every weight under its checkpoint name, sharded parameters gathered."""
        return checkpoint_names(self._policy, self.full_state())

    def full_state(self) -> dict[str, torch.Tensor]:
        """The policy's state dict with whole tensors; under ZeRO-3 they are gathered one by one."""
        from deepspeed import zero

        state = {}
        for name, tensor in self._policy.state_dict(keep_vars=True).items():
            if hasattr(tensor, "ds_id"):
                with zero.GatheredParameters([tensor]):
                    state[name] = tensor.detach().clone()
            else:
                state[name] = tensor.detach()
        return state

    def save(self, folder: Path) -> None:
        """Weights, optimizer and DeepSpeed's own state, for an exact resume."""
        self._engine.save_checkpoint(str(folder), tag="learner")

    def load(self, folder: Path) -> None:
        self._engine.load_checkpoint(str(folder), tag="learner")


def _deepspeed_config(recipe: Recipe) -> dict[str, Any]:
    rl = recipe.rl
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,  # rows of a minibatch vary in number: the boundary is set by hand
        "bf16": {"enabled": recipe.policy.dtype == "bfloat16"},
        "zero_optimization": {"stage": recipe.learner.zero_stage},
        "gradient_clipping": rl.grad_clip,
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": rl.learning_rate,
                "betas": list(rl.betas),
                "weight_decay": rl.weight_decay,
                # The C++ Adams multiply beta^t up step by step and use pow() after a load: not bit-exact over a resume.
                "torch_adam": True,
            },
        },
    }


def _to(row: Row, device: torch.device) -> Row:
    """The row on the learner's device."""
    if device.type == "cpu":
        return row
    fields = {name: getattr(row, name) for name in Row.__slots__}
    images = {key: value.to(device) for key, value in row.images.items()}
    tensors = {name: value.to(device) for name, value in fields.items() if torch.is_tensor(value)}
    return Row(**{**fields, **tensors, "images": images})
