"""What of a policy trains, and how fast: freeze groups with a learning rate each, or low-rank adapters (LoRA, arXiv
2106.09685) in place of the weights themselves.

With LoRA nothing but the adapters trains; a group's learning rate is then that of the adapters in it, and a group with
rate 0 has none. The engine and every checkpoint get base and adapters merged, so that both load anywhere.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from safetensors.torch import save_file
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from rlvlm.policy.checkpoint import parameter_count
from rlvlm.policy.family import LANGUAGE, Family, family_of
from rlvlm.recipe.errors import RecipeError
from rlvlm.recipe.schema import LearningRates, Lora, Recipe

Stage = Literal["sft", "rl"]
_STAGES: tuple[Stage, ...] = get_args(Stage)

_ADAPTER = "default"  # PEFT's name for the only one
_PEFT_PREFIX = "base_model.model."
# How transformers calls what takes up attention, and the experts of a layer, all in one tensor.
_ATTENTION = re.compile(r"(^|\.)[^.]*(attn|attention)[^.]*\.")
_EXPERTS = re.compile(r"\.experts\.(gate_up_proj|down_proj)$")


@dataclass(frozen=True, slots=True)
class Counts:
    """Parameters of a freeze group: those that train, adapters included, and all there are without adapters."""

    trained: int
    all: int


class Trainable:
    """A policy made ready for training. Make it with `prepare`.

    model: the policy itself, with the adapters inside where there are any. rates: what each of the model's groups
    learns with, 0 where it is frozen.
    """

    def __init__(
        self, model: PreTrainedModel, family: Family, rates: Mapping[str, float], adapted: PeftModel | None
    ) -> None:
        self.model = model
        self.rates = rates
        self._family = family
        self._adapted = adapted
        layers = [layer for layer in model.modules() if isinstance(layer, LoraLayer)]
        self._layers = {id(_adapted_weight(layer)): layer for layer in layers}

    @property
    def adapters(self) -> bool:
        """Whether adapters train, and not the weights themselves."""
        return self._adapted is not None

    def trains(self, group: str) -> bool:
        """Whether the weights of a group, not adapters in it, train."""
        return not self.adapters and self.rates.get(group, 0.0) > 0.0

    def parameter_groups(self, undecayed: Collection[str] = ()) -> list[dict[str, Any]]:
        """The parameters that train, as optimizers take them: one group for each learning rate; two where some are
        `undecayed`, names whose weight decay is 0."""
        found: dict[tuple[float, bool], list[nn.Parameter]] = {}
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                key = self.rates[self._family.group_of(plain_name(name))], name in undecayed
                found.setdefault(key, []).append(parameter)
        return [
            {"params": parameters, "lr": rate, **({"weight_decay": 0.0} if spared else {})}
            for (rate, spared), parameters in found.items()
        ]

    def counts(self) -> dict[str, Counts]:
        """By group, in the order of the model's parameters."""
        trained: dict[str, list[nn.Parameter]] = {}
        present: dict[str, list[nn.Parameter]] = {}
        for name, parameter in self.model.named_parameters():
            group = self._family.group_of(plain_name(name))
            if not is_adapter(name):
                present.setdefault(group, []).append(parameter)
            if parameter.requires_grad:
                trained.setdefault(group, []).append(parameter)
        return {
            group: Counts(parameter_count(trained.get(group, [])), parameter_count(parameters))
            for group, parameters in present.items()
        }

    def state(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, tensor) as in the state dict of the model without adapters, which are merged into what they adapt.

        Collective: under ZeRO-3 each tensor is gathered when its turn comes, with its adapters. The tensors given are
        copies where they had to be gathered or merged; what trains stays as it is.
        """
        for name, tensor in self.model.state_dict(keep_vars=True).items():
            if is_adapter(name):
                continue
            layer = self._layers.get(id(tensor))
            adapters = _adapters_of(layer) if layer is not None else []
            with torch.no_grad(), _gathered([tensor, *adapters]):
                if layer is not None:
                    whole = (tensor.float() + _delta(layer)).to(tensor.dtype)  # in bfloat16 rounded once
                elif hasattr(tensor, "ds_id"):
                    whole = tensor.detach().clone()
                else:
                    whole = tensor.detach()
            yield plain_name(name), whole

    def save_adapter(self, folder: Path) -> None:
        """The adapters alone in PEFT's form; PEFT loads them onto the checkpoint that training started from.

        Collective; rank 0 writes. Only where there are adapters.
        """
        assert self._adapted is not None
        adapters = {name: tensor for name, tensor in self.model.named_parameters() if is_adapter(name)}
        with _gathered(adapters.values()):
            if torch.distributed.is_initialized() and torch.distributed.get_rank() != 0:
                return
            state = {_PEFT_PREFIX + name: tensor.detach().cpu().clone() for name, tensor in adapters.items()}
        folder.mkdir(parents=True, exist_ok=True)
        named = get_peft_model_state_dict(self._adapted, state, save_embedding_layers=False)
        save_file(named, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        self._adapted.peft_config[_ADAPTER].save_pretrained(str(folder))


def prepare(model: PreTrainedModel, recipe: Recipe, stage: Stage) -> Trainable:
    """Freezes what `sft.learning_rates` or `rl.learning_rates` freezes, and puts adapters in where `policy.lora` asks
    for them; both in place. To be called before DeepSpeed takes the parameters over.

    Raises RecipeError for a group that the model does not have or that cannot be adapted, and where nothing trains.
    """
    family = family_of(model.config, recipe.policy.model)
    key = f"{stage}.learning_rates"
    rates = _rates(model, family, recipe, stage)
    for name, parameter in model.named_parameters():
        if rates[family.group_of(name)] == 0.0:
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise RecipeError(key, _given(recipe, stage), "freezes the whole model", "give a group a rate above 0")
    adapted = None
    if recipe.policy.lora is not None:
        adapted = _adapt(model, family, recipe.policy.lora, stage)
        _check_adapted(model, family, _given(recipe, stage), key)
    return Trainable(model, family, rates, adapted)


def planned(config: PretrainedConfig, recipe: Recipe) -> dict[Stage, dict[str, Counts]]:
    """What `prepare` will make of a checkpoint in each of the recipe's stages, by its config alone: no weights are
    loaded. Raises what `prepare` raises."""
    family = family_of(config, recipe.policy.model)
    return {
        stage: prepare(family.skeleton(config), recipe, stage).counts() for stage in _STAGES if stage in recipe.stages
    }


def in_words(counts: Mapping[str, Counts]) -> str:
    """For people: `language 1,234 of 1,234, vision frozen (567)`."""
    parts = (
        f"{group} {count.trained:,} of {count.all:,}" if count.trained else f"{group} frozen ({count.all:,})"
        for group, count in counts.items()
    )
    return ", ".join(parts)


# --- groups ----------------------------------------------------------------------------------------------------------


def _given(recipe: Recipe, stage: Stage) -> dict[str, float]:
    """Group -> rate, of those that the recipe names."""
    rates: LearningRates = recipe.sft.learning_rates if stage == "sft" else recipe.rl.learning_rates
    named = {
        "vision": rates.vision,
        "projector": rates.projector,
        LANGUAGE: rates.language,
        "router": rates.router,
    }
    return {group: rate for group, rate in named.items() if rate is not None}


def _rates(model: PreTrainedModel, family: Family, recipe: Recipe, stage: Stage) -> dict[str, float]:
    """Group -> learning rate, for every group of the model."""
    given = _given(recipe, stage)
    usual = recipe.sft.learning_rate if stage == "sft" else recipe.rl.learning_rate
    present: dict[str, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        present.setdefault(family.group_of(name), []).append(parameter)
    for group, rate in given.items():
        if group not in present:
            sizes = ", ".join(f"{one} ({parameter_count(of):,} parameters)" for one, of in present.items())
            problem = f"{family.name} has no parameters in this group"
            raise RecipeError(f"{stage}.learning_rates.{group}", rate, problem, f"it has {sizes}; leave this one out")
    return {group: given.get(group, usual) for group in present}


# --- adapters --------------------------------------------------------------------------------------------------------


def _adapt(model: PreTrainedModel, family: Family, lora: Lora, stage: Stage) -> PeftModel:
    """Puts adapters on what `policy.lora` names, in the parts of the model that train."""
    modules = list(_targets(model, lora))
    experts = [
        name
        for name, parameter in model.named_parameters()
        if lora.experts and parameter.requires_grad and _EXPERTS.search(name)
    ]
    if lora.experts and not experts:
        mend = "leave it out: this model has no mixture of experts, or its language group is frozen"
        raise RecipeError("policy.lora.experts", True, f"there are no experts to adapt in {family.name}", mend)
    if not modules and not experts:
        problem = f"no linear layer of {family.name} that trains has such a name"
        raise RecipeError("policy.lora.targets", lora.targets, problem, "give attention or all-linear")
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        # In RL the policy that gives pi_i and the one that learns have to be the same function.
        lora_dropout=lora.dropout if stage == "sft" else 0.0,
        target_modules=modules,
        target_parameters=experts or None,
    )
    return get_peft_model(model, config, autocast_adapter_dtype=False)


def _targets(model: PreTrainedModel, lora: Lora) -> Iterator[str]:
    """Names of the linear layers to adapt. The output layer is none of them: packed log-probs take it apart."""
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or module is model.get_output_embeddings():
            continue
        if module.weight.requires_grad and _is_target(name, lora.targets):
            yield name


def _is_target(name: str, targets: Sequence[str]) -> bool:
    for target in targets:
        match target:
            case "all-linear":
                return True
            case "attention" if _ATTENTION.search(name):
                return True
            case _ if re.fullmatch(target, name) or name.endswith(f".{target}"):
                return True
    return False


def _check_adapted(model: PreTrainedModel, family: Family, given: Mapping[str, float], key: str) -> None:
    """Raises RecipeError for a group that is given a rate and has not got a single adapter."""
    adapted = {family.group_of(plain_name(name)) for name, _ in model.named_parameters() if is_adapter(name)}
    for group, rate in given.items():
        if rate > 0.0 and group not in adapted:
            problem = f"with policy.lora only adapters train, and policy.lora.targets puts none into {group}"
            mend = "leave it out" + (", or give policy.lora.targets=[all-linear]" if group != "router" else "")
            raise RecipeError(f"{key}.{group}", rate, problem, mend)


def _adapted_weight(layer: LoraLayer) -> nn.Parameter:
    """The parameter that a layer's adapters are for."""
    name = layer.parameter_name if isinstance(layer, ParamWrapper) else "weight"
    weight: nn.Parameter = getattr(layer.get_base_layer(), name)
    return weight


def _delta(layer: LoraLayer) -> torch.Tensor:
    """What a layer's adapters add to its weight, in float32: alpha / rank B A, for experts one by one."""
    if isinstance(layer, ParamWrapper):
        left, right, scale = layer.get_delta_factors(_ADAPTER)
    else:
        right, left = _adapters_of(layer)
        scale = layer.scaling[_ADAPTER]
    delta: torch.Tensor = scale * (left.float() @ right.float())
    return delta


def _adapters_of(layer: LoraLayer) -> list[nn.Parameter]:
    """A and B."""
    return [*layer.lora_A[_ADAPTER].parameters(), *layer.lora_B[_ADAPTER].parameters()]


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name is an adapter's."""
    return ".lora_A." in name or ".lora_B." in name


def plain_name(name: str) -> str:
    """A parameter's name in the model without adapters."""
    return re.sub(r"\.base_layer(?=\.)", "", name)


def _gathered(tensors: Iterable[torch.Tensor]) -> AbstractContextManager[Any]:
    """Makes tensors whole that ZeRO-3 has sharded, for as long as the block lasts."""
    sharded = [tensor for tensor in tensors if hasattr(tensor, "ds_id")]
    if not sharded:
        return nullcontext()
    from deepspeed import zero

    whole: AbstractContextManager[Any] = zero.GatheredParameters(sharded)
    return whole
