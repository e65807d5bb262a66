"""The staged SFT recipes as they stand, for a few steps on tiny checkpoints: what is frozen stays, the rest moves."""

import json
from pathlib import Path
from types import ModuleType

import pytest
import torch

from policy.families import blip2, llava
from rlvlm.policy.checkpoint import load_policy
from rlvlm.policy.family import family_of
from rlvlm.recipe.load import load_recipe
from rlvlm.sft import train_sft
from rlvlm.tasks.pools import TaskPools

RECIPES = Path(__file__).parents[3] / "recipes"
SMALL = [
    "policy.dtype=float32",
    "sft.ranks=1",
    "sft.batch=8",
    "sft.examples=32",
    "sft.warmup_steps=0",
    "sft.phases=[{steps: 10}]",
    "sft.gate.tasks=4",
]


def _trained(name: str, start: Path, folder: Path) -> Path:
    """What the recipe makes of a checkpoint in ten steps."""
    recipe = load_recipe(RECIPES / f"{name}.yaml", [*SMALL, f"policy.model={start}"])
    target = folder / name / "hf"
    train_sft(recipe, start, target, folder / "images", folder / f"{name}.jsonl")
    (line,) = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
    assert 0 < line["loss"] < 10 and line["grad_norm"] > 0
    return target


def _moved(before: Path, after: Path) -> dict[str, set[str]]:
    """Group -> names of its parameters that are not what they were, bit for bit."""
    old, _ = load_policy(str(before), "float32")
    new, _ = load_policy(str(after), "float32")
    family = family_of(new.config, "tiny")
    moved: dict[str, set[str]] = {"vision": set(), "projector": set(), "language": set()}
    for (name, was), now in zip(old.named_parameters(), new.parameters(), strict=True):
        if not torch.equal(was, now):
            moved[family.group_of(name)].add(name)
    return moved


def _build(builder: ModuleType, name: str, folder: Path) -> Path:
    """With the words of the recipe's tasks."""
    recipe = load_recipe(RECIPES / f"{name}.yaml", SMALL)
    chains = {chain.text for task in TaskPools(recipe, folder / "images").sft() for chain in task.chains.values()}
    builder.build(folder / "start", seed=3, texts=tuple(sorted(chains)))
    return folder / "start"


@pytest.mark.engine
def test_llavas_two_stages(tmp_path):
    """First the projector alone, then projector and language model, from where the first stage ended."""
    start = _build(llava, "llava_stage1", tmp_path)
    first = _trained("llava_stage1", start, tmp_path)
    projector = {f"model.multi_modal_projector.linear_{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")}
    assert _moved(start, first) == {"vision": set(), "projector": projector, "language": set()}
    second = _trained("llava_stage2", first, tmp_path)
    moved = _moved(first, second)
    assert moved["vision"] == set() and moved["projector"] == projector
    assert {name.removeprefix("model.language_model.").split(".")[0] for name in moved["language"]} == {
        "embed_tokens",
        "layers",
        "norm",
        "lm_head",
    }


@pytest.mark.engine
def test_blip2s_connector(tmp_path):
    """Queries, every layer of the Q-Former and the projection; nothing else."""
    start = _build(blip2, "blip2_connector", tmp_path)
    moved = _moved(start, _trained("blip2_connector", start, tmp_path))
    assert moved["vision"] == moved["language"] == set()
    assert {name.split(".")[0] for name in moved["projector"]} == {"query_tokens", "qformer", "language_projection"}
    assert {name.split(".")[3] for name in moved["projector"] if "encoder.layer." in name} == {"0", "1"}
