"""Freeze groups and adapters: what trains, at which rate, and what engine and checkpoints are given."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from learner.mixed import TWO, alone, logits_alone, mixed, packed_rows
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from tiny_policy import build, picture, task
from transformers import AutoModelForImageTextToText

from policy import trained
from rlvlm.cluster.local import free_port, run_ranks
from rlvlm.learner.balance import LoadBalance
from rlvlm.learner.logprobs import RowLogProbs
from rlvlm.learner.packing import pack
from rlvlm.policy.checkpoint import load_policy, save_policy
from rlvlm.policy.family import family_of
from rlvlm.policy.prompts import PromptEncoder
from rlvlm.policy.trainable import Counts, Trainable, in_words, planned, prepare
from rlvlm.recipe.errors import RecipeError
from rlvlm.recipe.load import recipe_from
from rlvlm.recipe.schema import Balance, Recipe
from rlvlm.tasks.images import ImageStore

# What the tiny policy is made of: hidden 32, 2 layers, the second a mixture of 4 experts of width 16.
ROUTER = {"model.language_model.layers.1.mlp.gate.weight"}
PROJECTOR = {
    f"model.mm_projector.{part}"
    for one in ("pre_norm", "in_proj", "out_proj")
    for part in (f"{one}.weight", f"{one}.bias")
}
SIZES = {"vision": 6368, "language": 104608, "router": 4 * 32, "projector": 6272}
LATENT = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
ALL = {"rank": 4, "alpha": 12, "targets": ["all-linear"], "experts": True}


def _recipe(lora: dict[str, Any] | None = None, stages: tuple[str, ...] = ("rl",), **sections: Any) -> Recipe:
    policy = {"model": "given", **({"lora": lora} if lora is not None else {})}
    tasks = {"train": [{"generator": "digits_sum"}]}
    return recipe_from({"name": "x", "stages": list(stages), "tasks": tasks, "policy": policy, **sections})


def _rates(**rates: float) -> dict[str, Any]:
    return {"learning_rate": 1e-4, "learning_rates": rates}


@pytest.fixture
def policy():
    model, processor = build(spread=0.2)
    return model, processor


@pytest.fixture
def store(tmp_path):
    return ImageStore(tmp_path / "images")


def _stir(model: torch.nn.Module) -> None:
    """Adapters as after some training: new ones are 0."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(0, 0.2, generator=torch.Generator().manual_seed(parameter.numel()))


def _adapted(model, lora: dict[str, Any] = ALL, **rates: float) -> Trainable:
    trainable = prepare(model, _recipe(lora, rl=_rates(**rates)), "rl")
    _stir(model)
    return trainable


def _names(model, parameters) -> set[str]:
    wanted = {id(parameter) for parameter in parameters}
    return {name for name, parameter in model.named_parameters() if id(parameter) in wanted}


# --- groups ----------------------------------------------------------------------------------------------------------


def test_without_rates_everything_is_one_group(policy):
    model = policy[0]
    (group,) = prepare(model, _recipe(rl={"learning_rate": 0.5}), "rl").parameter_groups()
    assert group["lr"] == 0.5
    assert [id(p) for p in group["params"]] == [id(p) for p in model.parameters()]


def test_each_group_has_its_rate_and_a_frozen_one_no_gradient(policy):
    model = policy[0]
    trainable = prepare(model, _recipe(rl=_rates(projector=1e-3, router=2e-3, vision=0.0)), "rl")
    groups = {group["lr"]: _names(model, group["params"]) for group in trainable.parameter_groups()}
    every = {name for name, _ in model.named_parameters()}
    vision = {name for name in every if "vision_tower" in name}
    assert groups == {1e-3: PROJECTOR, 2e-3: ROUTER, 1e-4: every - PROJECTOR - ROUTER - vision}
    assert {name for name, p in model.named_parameters() if not p.requires_grad} == vision
    assert trainable.trains("language") and trainable.trains("router") and not trainable.trains("vision")


def test_each_stage_has_its_own_rates(policy):
    recipe = _recipe(stages=("sft", "rl"), sft=_rates(vision=0.0, language=0.0), rl=_rates(projector=0.0))
    (group,) = prepare(policy[0], recipe, "sft").parameter_groups(undecayed=())[:1]
    assert _names(policy[0], group["params"]) == PROJECTOR | ROUTER
    assert planned(policy[0].config, recipe) == {
        "sft": {g: Counts(0 if g in ("vision", "language") else n, n) for g, n in SIZES.items()},
        "rl": {g: Counts(0 if g == "projector" else n, n) for g, n in SIZES.items()},
    }


def test_groups_split_by_weight_decay(policy):
    model = policy[0]
    spared = {"model.mm_projector.in_proj.bias", "lm_head.weight"}
    trainable = prepare(model, _recipe(rl=_rates(projector=1e-3, vision=0.0)), "rl")
    groups = {(g["lr"], g.get("weight_decay")): _names(model, g["params"]) for g in trainable.parameter_groups(spared)}
    assert groups[1e-3, 0.0] == {"model.mm_projector.in_proj.bias"}
    assert groups[1e-4, 0.0] == {"lm_head.weight"}
    assert groups[1e-3, None] == PROJECTOR - spared
    assert len(groups) == 4


def test_what_is_said_of_it():
    counts = {"vision": Counts(0, 6368), "language": Counts(1200, 104608)}
    assert in_words(counts) == "vision frozen (6,368), language 1,200 of 104,608"


def test_a_frozen_model_is_refused(policy):
    nothing = dict.fromkeys(SIZES, 0.0)
    with pytest.raises(RecipeError, match=r"rl\.learning_rates = .*freezes the whole model; give a group a rate"):
        planned(policy[0].config, _recipe(rl=_rates(**nothing)))


def test_a_group_that_a_dense_model_lacks_is_refused_with_those_it_has(tmp_path):
    from policy.families import qwen2_vl

    qwen2_vl.build(tmp_path, seed=0)
    model, _ = load_policy(str(tmp_path), "float32")
    sizes = {
        group: sum(p.numel() for name, p in model.named_parameters() if re.search(pattern, name))
        for group, pattern in {
            "vision": r"visual\.(?!merger)",
            "projector": "merger",
            "language": "^(?!.*visual)",
        }.items()
    }
    with pytest.raises(RecipeError) as caught:
        prepare(model, _recipe(rl=_rates(router=0.0)), "rl")
    message = str(caught.value)
    assert message.startswith("rl.learning_rates.router = 0.0: Qwen2-VL has no parameters in this group; it has ")
    for group, size in sizes.items():
        assert f"{group} ({size:,} parameters)" in message


def test_the_selection_bias_of_a_frozen_router_stays(policy):
    model = policy[0]
    family = family_of(model.config, "tiny")
    assert LoadBalance(model, family, Balance()).kind == "bias"
    assert LoadBalance(model, family, Balance(), frozen=True).kind == "off"
    assert LoadBalance(model, family, Balance(kind="auxiliary"), frozen=True).kind == "auxiliary"
    with pytest.raises(RecipeError, match=r"learner\.balance\.kind = bias: the routers are frozen"):
        LoadBalance(model, family, Balance(kind="bias"), frozen=True)


FAMILIES = ["kimi_k25", "qwen3_vl_moe", "glm4v_moe", "qwen2_5_vl", "qwen2_vl", "qwen2_5_omni", "llava", "blip2"]


def _reached(model, encoder: PromptEncoder, asked) -> set[str]:
    """Parameters that a forward of a prompt gives a gradient to."""
    model.zero_grad(set_to_none=True)
    prompt = encoder.prompt(asked)
    ids = torch.tensor([prompt.input_ids])
    model(
        input_ids=ids, use_cache=False, **encoder.token_keywords(ids), **prompt.images
    ).logits.square().mean().backward()
    return {name for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("name", FAMILIES)
def test_the_groups_of_each_family(name, tmp_path, store):
    """Text alone reaches language and router, and never vision or projector; a picture reaches all. The projector ends
    in the decoder's width; the tower begins with its patches; routers are told by their class."""
    build_family = importlib.import_module(f"policy.families.{name}")
    build_family.build(tmp_path / name, seed=0)
    model, processor = load_policy(str(tmp_path / name), "float32")
    encoder = PromptEncoder(processor, store, model.config)
    family = encoder.family
    groups: dict[str, set[str]] = {}
    for parameter, _ in model.named_parameters():
        groups.setdefault(family.group_of(parameter), set()).add(parameter)
    router = family.router.class_name if family.router else None
    routers = {
        f"{where}.{own}"
        for where, module in model.named_modules()
        if type(module).__name__ == router
        for own, _ in module.named_parameters()
    }
    assert groups.pop("router", set()) == routers
    assert groups.keys() == {"vision", "projector", "language"}

    seeing = groups["vision"] | groups["projector"]
    if getattr(build_family, "TEXT_ALONE", True):
        alone_ = _reached(model, encoder, task("a", store, "sum of digits ?"))
        assert alone_ and alone_ <= groups["language"] | routers
    reached = _reached(model, encoder, task("b", store, "sum of digits ?", picture(0, 56, 56)))
    assert reached & groups["vision"] and groups["projector"] <= reached and groups["language"] | routers <= reached
    weights = dict(model.named_parameters())
    assert seeing - reached <= {name for name, weight in weights.items() if not weight.requires_grad}
    width = model.config.get_text_config().hidden_size
    assert any(weights[one].shape[:1] == (width,) for one in groups["projector"])
    assert any("patch_embed" in one and weights[one].dim() >= 4 for one in groups["vision"])


# --- adapters --------------------------------------------------------------------------------------------------------


def _wrapped(model) -> set[str]:
    """Layers with an adapter; for experts, the parameter that has it."""
    found = set()
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            parameter = getattr(module, "parameter_name", None)
            name = name.replace(".base_layer", "")
            found.add(f"{name}.{parameter}" if parameter else name)
    return found


_DECODER = "model.language_model.layers"
_TOWER = "model.vision_tower.layers.0"
_LATENTS = {f"{_DECODER}.{layer}.self_attn.{name}" for layer in (0, 1) for name in LATENT}
_TOWER_ATTENTION = {f"{_TOWER}.attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "proj")}
_EXPERTS = {f"{_DECODER}.1.mlp.experts.{name}" for name in ("gate_up_proj", "down_proj")}
_MLPS = {
    f"{_DECODER}.{mlp}.{name}_proj" for mlp in ("0.mlp", "1.mlp.shared_experts") for name in ("gate", "up", "down")
}
_OTHERS = {f"{_TOWER}.mlp.fc1", f"{_TOWER}.mlp.fc2", "model.mm_projector.in_proj", "model.mm_projector.out_proj"}


@pytest.mark.parametrize(
    ("lora", "rates", "wanted"),
    [
        ({}, {}, _LATENTS | _TOWER_ATTENTION),
        ({}, {"vision": 0.0}, _LATENTS),
        ({"targets": ["all-linear"]}, {}, _LATENTS | _TOWER_ATTENTION | _MLPS | _OTHERS),
        (
            {"targets": ["q_b_proj", "fc1"]},
            {},
            {f"{_DECODER}.{n}.self_attn.q_b_proj" for n in (0, 1)} | {f"{_TOWER}.mlp.fc1"},
        ),
        ({"targets": [r".*\.0\.mlp\.(up|down)_proj"]}, {}, {f"{_DECODER}.0.mlp.{n}_proj" for n in ("up", "down")}),
        ({"targets": ["o_proj"], "experts": True}, {}, {f"{_DECODER}.{n}.self_attn.o_proj" for n in (0, 1)} | _EXPERTS),
    ],
)
def test_which_layers_get_adapters(policy, lora, rates, wanted):
    model = policy[0]
    trainable = prepare(model, _recipe(lora, rl=_rates(**rates)), "rl")
    assert _wrapped(model) == wanted
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if ".lora_" in name}
    assert trainable.adapters and not trainable.trains("language")


def test_adapters_have_the_rates_of_their_groups(policy):
    """Rank 4 on a layer of 32 x 32 or 64 makes 4 x (in + out) parameters."""
    model = policy[0]
    trainable = _adapted(model, projector=1e-2, vision=0.0)
    rates = {g["lr"]: sum(p.numel() for p in g["params"]) for g in trainable.parameter_groups()}
    projector = 4 * (64 + 64) + 4 * (64 + 32)
    assert rates[1e-2] == projector == trainable.counts()["projector"].trained
    # in + out of every adapted layer of the decoder; an expert's two matrices are 32 x 32 and 16 x 32
    weights = dict(model.named_parameters())
    plain = sum(sum(weights[f"{name}.base_layer.weight"].shape) for name in _LATENTS | _MLPS)
    assert rates[1e-4] == 4 * (plain + 4 * (32 + 32) + 4 * (16 + 32)) == trainable.counts()["language"].trained
    assert {group: count.all for group, count in trainable.counts().items()} == SIZES


def test_merged_weights_by_the_formula(policy):
    """W + alpha / rank B A, and for experts the same for each: rank 4, alpha 12."""
    model = policy[0]
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainable = _adapted(model)
    merged = dict(trainable.state())
    assert merged.keys() == start.keys()
    weights = dict(model.named_parameters())
    name = f"{_DECODER}.1.self_attn.o_proj"
    a, b = (weights[f"{name}.lora_{part}.default.weight"] for part in "AB")
    assert torch.allclose(merged[f"{name}.weight"], start[f"{name}.weight"] + 12 / 4 * b @ a, atol=1e-6)
    touched = {one if one in _EXPERTS else f"{one}.weight" for one in _wrapped(model)}
    assert {name for name in start if not torch.equal(merged[name], start[name])} == touched
    for name, tensor in trainable.state():  # nothing was changed by merging
        assert torch.equal(tensor, merged[name])


def _plain(folder: Path, merged) -> torch.nn.Module:
    """A model without adapters that has the given weights."""
    model, _ = build(spread=0.2)
    model.load_state_dict(merged)
    return model


def test_the_adapted_policy_is_the_merged_one(policy, store, tmp_path):
    """Of packed rows with pictures, as the learner sees it; and another one than before."""
    model, processor = policy
    encoder = PromptEncoder(processor, store, model.config)
    rewarded = mixed(encoder, store, seed=1)
    (row,) = packed_rows(rewarded, encoder)
    before, _ = RowLogProbs(model, 1.0, (), 16)(row)
    trainable = _adapted(model)
    adapted, _ = RowLogProbs(model, 1.0, (), 16)(row)
    merged, _ = RowLogProbs(_plain(tmp_path, dict(trainable.state())), 1.0, (), 16)(row)
    assert (adapted - merged).abs().max() < 2e-5
    assert (adapted - before).abs().max() > 0.1


def test_bfloat16_rounds_the_sum_once():
    model, _ = build(spread=0.2)
    model = model.to(torch.bfloat16)
    trainable = _adapted(model)
    merged = dict(trainable.state())
    name = f"{_DECODER}.0.self_attn.o_proj"
    weights = dict(model.named_parameters())
    a, b = (weights[f"{name}.lora_{part}.default.weight"].double() for part in "AB")
    exact = weights[f"{name}.base_layer.weight"].double() + 3 * b @ a
    assert merged[f"{name}.weight"].dtype == torch.bfloat16
    assert ((merged[f"{name}.weight"].double() - exact).abs() <= exact.abs() * 2**-8 + 1e-7).all()  # half a last place


def test_a_saved_adapter_on_its_base_is_the_merged_checkpoint(policy, store, tmp_path):
    """Both read from disk: the adapter by PEFT, the checkpoint by transformers."""
    model, processor = policy
    save_policy(model, processor, tmp_path / "base")
    model, processor = load_policy(str(tmp_path / "base"), "float32")
    trainable = _adapted(model)
    trainable.save_adapter(tmp_path / "adapter")
    save_policy(model, processor, tmp_path / "hf", dict(trainable.state()))

    encoder = PromptEncoder(processor, store, model.config)
    one = next(a for a in alone(mixed(encoder, store, seed=2, kinds=(TWO,)), encoder))
    base = AutoModelForImageTextToText.from_pretrained(tmp_path / "base")
    merged = logits_alone(AutoModelForImageTextToText.from_pretrained(tmp_path / "hf").eval(), one)
    plain = logits_alone(base.eval(), one)
    adapted = logits_alone(PeftModel.from_pretrained(base, tmp_path / "adapter").eval(), one)
    assert (adapted - merged).abs().max() < 2e-5
    assert (adapted - plain).abs().max() > 0.1
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (4, 12)
    assert config["base_model_name_or_path"] == str(tmp_path / "base")
    # adapters only: 2 tensors for each
    assert len(load_file(tmp_path / "adapter" / "adapter_model.safetensors")) == 2 * len(_wrapped(model))


def test_dropout_is_for_sft_alone(policy):
    model = policy[0]
    recipe = _recipe({"dropout": 0.5}, stages=("sft", "rl"))
    prepare(model, recipe, "sft")
    rates = {m.p for n, m in model.named_modules() if n.endswith("lora_dropout.default")}
    assert rates == {0.5}
    other, _ = build()
    prepare(other, recipe, "rl")
    assert not any(isinstance(m, torch.nn.Dropout) and m.p > 0 for m in other.modules())


@pytest.mark.parametrize(
    ("lora", "rates", "message"),
    [
        (
            {"targets": ["nope"]},
            {},
            r"policy\.lora\.targets = \[nope\]: no linear layer .* that trains has such a name",
        ),
        ({"experts": True}, {"language": 0.0}, r"policy\.lora\.experts = true: there are no experts to adapt"),
        ({}, {"projector": 1e-3}, r"rl\.learning_rates\.projector = 0\.001: .*none into projector; .*\[all-linear\]"),
        ({}, {"router": 1e-3}, r"rl\.learning_rates\.router = 0\.001: .*none into router; leave it out$"),
    ],
)
def test_adapters_that_cannot_be(policy, lora, rates, message):
    with pytest.raises(RecipeError, match=message):
        planned(policy[0].config, _recipe(lora, rl=_rates(**rates)))


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"targets": ["q_proj", "("]}, r"policy\.lora\.targets\[1\] = \(: not a regular expression"),
        ({"targets": []}, r"policy\.lora\.targets = \[\]: empty"),
        ({"rank": 0}, r"policy\.lora\.rank = 0: out of range"),
        ({"experts": True, "dropout": 0.1}, r"policy\.lora\.dropout = 0\.1: .*policy\.lora\.experts=false"),
    ],
)
def test_what_the_recipe_cannot_say(lora, message):
    with pytest.raises(RecipeError, match=message):
        _recipe(lora)


def test_groups_have_names():
    with pytest.raises(RecipeError, match=r"rl\.learning_rates\.vison = 0: no such key; .*rl\.learning_rates\.vision"):
        _recipe(rl={"learning_rates": {"vison": 0}})


# --- under DeepSpeed, two ranks --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> Path:
    """The folder that two ranks have left their results in."""
    folder = tmp_path_factory.mktemp("ranks")
    model, processor = build(spread=0.2)
    store = ImageStore(folder / "images")
    encoder = PromptEncoder(processor, store, model.config)
    save_policy(model, processor, folder / "base")
    samples = [[_sample(encoder, store, 2 * n + r) for r in (0, 1)] for n in range(trained.STEPS)]
    torch.save(samples, folder / "samples.pt")
    packing = trained.recipe(None, rl={"prompts": 3, "minibatches": 1}, learner={"ranks": 2, "row_tokens": 120})
    torch.save(pack(mixed(encoder, store, seed=5), encoder, packing, seed=0), folder / "batch.pt")
    run_ranks(trained.train_on_one_of_two, trained.RANKS, free_port(), folder)
    return folder


def _sample(encoder: PromptEncoder, store: ImageStore, n: int) -> trained.Sample:
    prompt = encoder.prompt(task(f"s{n}", store, "what is the sum of digits ?", picture(n, 32, 16 + 16 * (n % 2))))
    return {"input_ids": torch.tensor([prompt.input_ids]), **prompt.images}


def _adamw(lora: dict[str, Any] | None, folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Weights before and after as plain AdamW has them on the mean over both ranks, its groups put together by hand."""
    trainable = trained.made(lora)
    start = {name: tensor.clone() for name, tensor in trainable.state()}
    parts: dict[float, list[torch.nn.Parameter]] = {1e-3: [], 1e-2: []}
    for name, parameter in trainable.model.named_parameters():
        in_tower, in_projector = "vision_tower" in name, "mm_projector" in name
        if not in_tower and (lora is None or ".lora_" in name) and (lora is not None or name not in ROUTER):
            parts[1e-2 if in_projector else 1e-3].append(parameter)
    groups = [{"params": parameters, "lr": rate} for rate, parameters in parts.items()]
    optimizer = torch.optim.AdamW(groups, **trained.ADAMW)
    for samples in torch.load(folder / "samples.pt", weights_only=False):
        optimizer.zero_grad()
        (sum(trained.loss_of(trainable.model, sample) for sample in samples) / len(samples)).backward()
        optimizer.step()
    return start, dict(trainable.state())


@pytest.mark.engine
@pytest.mark.parametrize(("kind", "stage"), trained.CASES)
def test_two_ranks_train_what_plain_adamw_does(ranks, kind, stage):
    """Frozen weights are the same bits; those that train agree with one process without DeepSpeed, LoRA's also with
    gradient checkpointing."""
    start, wanted = _adamw(None if kind == "groups" else trained.LORA, ranks)
    found = torch.load(ranks / f"{kind}-{stage}.pt")
    assert found.keys() == wanted.keys() == start.keys()
    moved = {name for name in wanted if not torch.equal(wanted[name], start[name])}
    assert {name for name in found if not torch.equal(found[name], start[name])} == moved
    assert moved >= PROJECTOR if kind == "groups" else "model.mm_projector.in_proj.weight" in moved
    assert not any("vision_tower" in name or name in ROUTER for name in moved)
    for name in moved:
        assert (found[name] - wanted[name]).norm() < 1e-3 * (wanted[name] - start[name]).norm(), name


@pytest.mark.engine
@pytest.mark.parametrize("stage", trained.RESUMED)
def test_a_learner_with_adapters_resumes_from_them_alone(ranks, stage):
    """The state leaves the frozen weights out, and goes on bit by bit."""
    saved = ranks / f"saved-{stage}"
    goes_on, resumed = torch.load(ranks / f"resumed-{stage}.pt")
    assert goes_on.keys() == resumed.keys()
    assert all(torch.equal(goes_on[name], resumed[name]) for name in goes_on)
    written = load_file(saved / "hf" / "model.safetensors")
    name = f"{_DECODER}.0.self_attn.o_proj.weight"
    assert not torch.equal(written[name.replace("model.language_model", "language_model.model")], goes_on[name])
    weights = sum(tensor.nbytes for tensor in written.values())
    assert sum(file.stat().st_size for file in (saved / "state").rglob("*") if file.is_file()) < weights


@pytest.mark.engine
def test_a_learners_adapter_is_its_checkpoint(ranks, tmp_path):
    """Of sharded adapters (ZeRO-3): PEFT on the base agrees with transformers on hf/."""
    ids = torch.arange(300, 330)[None]
    base = AutoModelForImageTextToText.from_pretrained(ranks / "base").eval()
    merged = AutoModelForImageTextToText.from_pretrained(ranks / "saved-3" / "hf").eval()(ids).logits
    plain = base(ids).logits
    adapted = PeftModel.from_pretrained(base, ranks / "saved-3" / "adapter").eval()(ids).logits
    assert (adapted - merged).abs().max() < 2e-5 < 1e-4 < (adapted - plain).abs().max()
