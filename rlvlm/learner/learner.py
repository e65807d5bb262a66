"""One rank of the learner: DeepSpeed under the objective. One iteration = reference log-probs, an optimizer step per
minibatch with the experts' balance after it, optimizer reset.

Every method is collective: all ranks call it, each with its share of the batch, and get the same figures.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from rlvlm.learner.balance import LoadBalance
from rlvlm.learner.checkpoints import Facts
from rlvlm.learner.cost import Cost
from rlvlm.learner.experts import ExpertParallel
from rlvlm.learner.logprobs import RowLogProbs
from rlvlm.learner.objective import Totals, correction, row_loss
from rlvlm.learner.refused import Refusals, write_rank
from rlvlm.learner.replay import RouterReplay
from rlvlm.learner.reshard import SavedState, take_over
from rlvlm.learner.zero import checkpoint_activations, deepspeed_config, gather_blocks_whole, reset_optimizer
from rlvlm.policy.checkpoint import load_policy, parameter_count, save_policy, save_weights
from rlvlm.policy.family import family_of
from rlvlm.policy.trainable import prepare
from rlvlm.recipe.load import save_recipe
from rlvlm.recipe.schema import Recipe
from rlvlm.records import Batch, Minibatch, Row

_TAG = "learner"  # of DeepSpeed's files


@dataclass(frozen=True, slots=True)
class Parity:
    """|engine log-prob - learner's pi_i log-prob| over the sampled tokens of an iteration, in nats."""

    max: float
    mean: float
    tokens: int


@dataclass(frozen=True, slots=True)
class Reference:
    """pi_i on a rank's share: logp[m][r] is the log-probs [N] of row r of minibatch m. Over all ranks: parity, and
    entropy, the mean per trained token in nats; mismatch, the share of token-layers whose experts engine and learner
    choose differently (rl.router_replay r3). routing: the experts that pi_i chose, row by row (r2)."""

    logp: tuple[tuple[torch.Tensor, ...], ...]
    parity: Parity
    entropy: float
    routing: tuple[tuple[torch.Tensor | None, ...], ...]
    mismatch: float | None


class Learner:
    """Holds the policy in training. `reference`, then `step`, then `write_weights`, once per iteration."""

    def __init__(self, recipe: Recipe, checkpoint: Path, banned: Sequence[int]) -> None:
        import deepspeed

        self._recipe = recipe
        self._objective = recipe.rl.objective
        self._policy, self._processor = load_policy(str(checkpoint), recipe.policy.dtype)
        family = family_of(self._policy.config, recipe.policy.model)
        self._trainable = prepare(self._policy, recipe, "rl")
        self._balance = LoadBalance(
            self._policy, family, recipe.learner.balance, frozen=not self._trainable.trains("router")
        )
        self._replay = RouterReplay(self._policy, family, recipe.rl.router_replay)
        module = RowLogProbs(self._policy, recipe.rl.temperature, banned, recipe.learner.logp_chunk)
        gather_blocks_whole(self._policy, family)
        if recipe.learner.gradient_checkpointing:
            checkpoint_activations(self._policy)
        config = deepspeed_config(recipe)
        self._experts: ExpertParallel | None = None
        if recipe.learner.expert_parallel > 1:
            self._experts = ExpertParallel(self._policy, family, recipe)
            config["expert_parallel"] = self._experts.config()
        groups = [{"name": str(i), **group} for i, group in enumerate(self._trainable.parameter_groups())]
        self._engine, *_ = deepspeed.initialize(model=module, model_parameters=groups, config=config)
        self._device = self._engine.device
        self._rank, self._ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
        self._banned, self._refusals = banned, Refusals(recipe)
        self._cost = Cost(self._policy, family, self._device)

    @torch.no_grad()
    def reference(self, share: Batch) -> Reference:
        """Recomputes pi_i with the learner's own weights and holds the engine's log-probs against it."""
        logp: list[tuple[torch.Tensor, ...]] = []
        routing: list[tuple[torch.Tensor | None, ...]] = []
        sums, worst = torch.zeros(3, dtype=torch.float64), torch.zeros(1)  # gap, entropy, tokens
        for minibatch in share.minibatches:
            with self._cost.reference(minibatch.rows[0]):
                outputs = [self._frozen(_to(row, self._device)) for row in minibatch.rows[0]]
            logp.append(tuple(logp_N.cpu() for logp_N, _, _ in outputs))
            routing.append(tuple(routing_TLK for _, _, routing_TLK in outputs))
            for row, (logp_N, entropy_N, _) in zip(minibatch.rows[0], outputs, strict=True):
                gap_N = (row.engine_logp_T[row.trained_T] - logp_N.cpu()).abs()
                sums += torch.tensor([float(gap_N.sum()), float(entropy_N.sum()), gap_N.numel()])
                worst = torch.maximum(worst, gap_N.max()) if gap_N.numel() else worst
        gap, entropy, tokens = self._over_ranks(sums).tolist()
        parity = Parity(float(self._over_ranks(worst, largest=True)), gap / tokens, int(tokens))
        return Reference(tuple(logp), parity, entropy / tokens, tuple(routing), self._mismatch())

    def _frozen(self, row: Row) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """pi_i on a row: log-probs, entropies, and (r2) the routing."""
        with self._replay.reference(row.routing_TLK):
            logp_N, entropy_N = self._engine(row)
        return logp_N, entropy_N, self._replay.pop_recorded()

    def _mismatch(self) -> float | None:
        """Share of the replayed token-layers in which the routers would have chosen otherwise, over all ranks."""
        differing, compared = self._over_ranks(self._replay.pop_mismatch()).tolist()
        return differing / compared if compared else None

    def step(self, share: Batch, reference: Reference) -> dict[str, float]:
        """One optimizer step per minibatch, then the reset. Gives `loss`, `grad_norm`, `kl`, the objective's figures
        and `load/...`: means over steps or tokens."""
        steps: list[dict[str, float]] = []
        for minibatch, logp, routing in zip(share.minibatches, reference.logp, reference.routing, strict=True):
            with self._cost.training(minibatch.rows[0]):
                steps += self._minibatch(minibatch, logp, routing)
        if self._objective.optimizer_reset:  # the reference has moved (k1.5)
            reset_optimizer(self._engine)
        tokens = sum(step.pop("tokens") for step in steps)
        per_step = {name: [step.pop(name) for step in steps] for name in ("loss", "grad_norm")}
        routers = {"router/mismatch": reference.mismatch, "router/drift": self._mismatch()}
        return {
            **{name: sum(values) / len(values) if values else math.nan for name, values in per_step.items()},
            **{name: sum(step[name] for step in steps) / tokens for name in (steps[0] if steps else ())},
            "refused_steps": len(share.minibatches) - len(steps),
            **self._balance.pop_metrics(),
            **{name: share for name, share in routers.items() if share is not None},
            **self._cost.pop_figures(self._over_ranks),
        }

    def _minibatch(
        self, minibatch: Minibatch, logp: Sequence[torch.Tensor], routing: Sequence[torch.Tensor | None]
    ) -> list[dict[str, float]]:
        """Backward of every row, one optimizer step. Gives the loss, the norm of the gradient, and sums over tokens, of
        all ranks; nothing if the step was refused, because loss or gradient were not finite."""
        rows = [
            row if routing_TLK is None else replace(row, routing_TLK=routing_TLK)
            for row, routing_TLK in zip(minibatch.rows[0], routing, strict=True)
        ]
        weights = [
            correction(self._objective, reference_N, row.engine_logp_T[row.trained_T])
            for row, reference_N in zip(rows, logp, strict=True)
        ]
        kept = sum(int((weight_N > 0).sum()) for weight_N in weights)
        real = sum(int(_real(row).sum()) for row in rows)
        kept, real = self._over_ranks(torch.tensor([kept, real])).tolist()
        totals = Totals(minibatch.prompts, minibatch.sequences, kept)
        sums: dict[str, float] = {"loss": 0.0, "tokens": 0.0, "kl": 0.0}
        for row, reference_N, weight_N in zip(rows, logp, weights, strict=True):
            self._engine.set_gradient_accumulation_boundary(row is rows[-1])
            with self._replay.replay(row.routing_TLK):
                figures = self._accumulate(_to(row, self._device), reference_N, weight_N, totals, real)
            sums = {name: sums.get(name, 0.0) + figures.get(name, 0.0) for name in sums | figures}
        if self._engine.optimizer.overflow:  # of all ranks' gradients; DeepSpeed has not taken the step
            self._refuse(rows, logp, totals)
            return []
        self._refusals.step_taken()
        self._balance.update()
        total = self._over_ranks(torch.tensor(list(sums.values()), dtype=torch.float64)).tolist()
        return [{**dict(zip(sums, total, strict=True)), "grad_norm": float(self._engine.get_global_grad_norm())}]

    def _refuse(self, rows: Sequence[Row], logp: Sequence[torch.Tensor], totals: Totals) -> None:
        """Writes the minibatch down. Raises NotFinite when that has happened too often in a row."""
        self._balance.discard()
        folder, state = self._refusals.folder(), self.full_state()
        torch.distributed.barrier()  # every rank has chosen the same folder
        if self._rank == 0:
            save_policy(self._policy, self._processor, folder / "hf", state)
            save_recipe(self._recipe, folder / "recipe.yaml")
        write_rank(folder, self._rank, rows, logp, self._banned, totals)
        torch.distributed.barrier()
        self._refusals.step_refused(folder)

    def _accumulate(
        self, row: Row, reference_N: torch.Tensor, weight_N: torch.Tensor, totals: Totals, real: int
    ) -> dict[str, float]:
        """Backward of one row; the optimizer steps with the minibatch's last. Gives sums over the row's tokens, with
        `kl` by the estimator exp(d) - 1 - d of d = log pi - log pi_i. real: tokens of the minibatch that count for
        the experts' load."""
        logp_N, _ = self._engine(row)
        reference_N, weight_N = reference_N.to(logp_N.device), weight_N.to(logp_N.device)
        result = row_loss(self._objective, logp_N, reference_N, weight_N, row, totals)
        real_T = _real(row)
        loss = result.loss + self._balance.count(real_T) * real_T.sum() / real
        # DeepSpeed takes the mean of the ranks' gradients; the loss is a sum, its denominators those of all ranks. A
        # loss that is not finite makes every gradient so: DeepSpeed then refuses the step, on all ranks.
        self._engine.backward(loss * (self._ranks if bool(torch.isfinite(loss)) else math.nan))
        self._engine.step()
        log_ratio_N = (logp_N - reference_N).detach()
        kl = float((log_ratio_N.exp() - 1 - log_ratio_N).sum())
        return {"loss": float(result.loss.detach()), "tokens": float(logp_N.numel()), "kl": kl, **result.figures}

    def _over_ranks(self, tensor: torch.Tensor, largest: bool = False) -> torch.Tensor:
        """Sum (or maximum) over the ranks."""
        shared = tensor.to(self._device)
        operation = torch.distributed.ReduceOp.MAX if largest else torch.distributed.ReduceOp.SUM
        torch.distributed.all_reduce(shared, operation)
        return shared.cpu()

    def write_weights(self, path: Path) -> None:
        """Every weight under its checkpoint name as a safetensors file, by rank 0."""
        state = self.full_state()
        if self._rank == 0:
            save_weights(self._policy, state, path)

    def full_state(self) -> dict[str, torch.Tensor]:
        """The policy's state dict with whole tensors and adapters merged, on rank 0; nothing elsewhere."""
        state = self._trainable.state() if self._experts is None else self._experts.restored(self._trainable.state())
        return {name: tensor.cpu() for name, tensor in state if self._rank == 0}

    @property
    def parameters(self) -> int:
        return parameter_count(self._policy.parameters())

    def save(self, folder: Path) -> None:
        """hf/: a plain checkpoint. adapter/: with LoRA, the adapters alone. state/: the weights that train, optimizer
        and DeepSpeed's own state, for an exact resume."""
        state = self.full_state()
        if self._rank == 0:
            save_policy(self._policy, self._processor, folder / "hf", state)
        if self._trainable.adapters:
            self._trainable.save_adapter(folder / "adapter")
        self._engine.save_checkpoint(
            str(folder / "state"), tag=_TAG, exclude_frozen_parameters=self._trainable.adapters
        )
        if self._rank == 0:
            self._facts().write(folder)

    def load(self, folder: Path) -> None:
        """Goes on from what `save` wrote to `folder`: to the bit, if it had as many ranks and the same ZeRO stage, and
        cut anew for this learner otherwise. Raises CheckpointRefused if it is not the state of such a policy."""
        saved, own = Facts.read(folder), self._facts()
        saved.check(own, folder)
        state = folder / "state"
        if (saved.ranks, saved.zero_stage) == (own.ranks, own.zero_stage):
            self._engine.load_checkpoint(str(state), tag=_TAG, load_module_strict=not self._trainable.adapters)
        else:
            take_over(self._engine, SavedState(state / _TAG, saved.ranks, saved.zero_stage))

    def _facts(self) -> Facts:
        recipe, lora = self._recipe, self._recipe.policy.lora
        trained = {name: p for name, p in self._policy.named_parameters() if p.requires_grad}
        return Facts(
            ranks=self._ranks,
            zero_stage=recipe.learner.zero_stage,
            expert_parallel=recipe.learner.expert_parallel,
            model=self._policy.config.model_type,
            dtype=recipe.policy.dtype,
            lora=lora.model_dump(mode="json") if lora else None,
            trained={name: list(getattr(p, "ds_shape", p.shape)) for name, p in trained.items()},
        )


def _real(row: Row) -> torch.Tensor:
    """[T], True where a token belongs to a response that is trained on: not to a blank picture that a rank needs."""
    return row.segment_T < row.advantage_S.numel()


def _to(row: Row, device: torch.device) -> Row:
    """The row on the learner's device."""
    if device.type == "cpu":
        return row
    fields = {name: getattr(row, name) for name in Row.__slots__}
    images = {key: value.to(device) for key, value in row.images.items()}
    tensors = {name: value.to(device) for name, value in fields.items() if torch.is_tensor(value)}
    return Row(**{**fields, **tensors, "images": images})
