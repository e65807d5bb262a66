"""SFT with freeze groups, and with adapters: real runs of TRL's trainer on the tiny policy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tiny_policy import build
from transformers import AutoModelForImageTextToText

from rlvlm.policy.checkpoint import save_policy
from rlvlm.recipe.load import recipe_from
from rlvlm.sft import train_sft

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sft")
    save_policy(*build(spread=0.2), folder / "hf")
    return folder


def _run(start: Path, target: Path, steps: int, stage: int, policy: dict[str, Any], **sft: Any) -> None:
    recipe = recipe_from(
        {
            "name": "x",
            "stages": ["sft"],
            "policy": {"model": str(start / "hf"), **policy},
            "tasks": {"train": [{"generator": "digits_sum"}]},
            "sft": {
                **{"examples": 8, "batch": 2, "phases": [{"steps": steps}], "gate": {"tasks": 2}},
                **{"warmup_steps": 0, "weight_decay": 0.0, "grad_clip": 1e4, **sft},
            },
            "learner": {"zero_stage": stage},
        }
    )
    train_sft(recipe, start / "hf", target / "hf", target / "images", target / "metrics.jsonl")


def test_each_group_goes_by_its_own_rate(start, tmp_path):
    """Adam's first step is the learning rate, whatever the gradient: every group can be held against its own."""
    rates = {"vision": 0.0, "router": 0.0, "projector": 1e-2}
    _run(start, tmp_path, steps=1, stage=1, policy={}, learning_rate=1e-3, learning_rates=rates)
    before, after = (load_file(folder / "hf" / "model.safetensors") for folder in (start, tmp_path))
    for name, tensor in before.items():
        moved = (after[name] - tensor).abs().max()
        if "vision_tower" in name or ".mlp.gate." in name:  # the router's selection bias too
            assert moved == 0, name
        else:
            rate = 1e-2 if "mm_projector" in name else 1e-3
            assert moved <= rate * 1.001, name
            if name.endswith("weight") and "experts" not in name:  # not every expert sees a token
                assert moved > 0.9 * rate, name
    assert not (tmp_path / "adapter").exists()


def test_adapters_are_saved_merged_and_alone(start, tmp_path):
    """Under ZeRO-3, with experts."""
    lora = {"rank": 4, "targets": ["all-linear"], "experts": True}
    _run(start, tmp_path, 3, 3, {"lora": lora}, learning_rate=1e-2, learning_rates={"vision": 0.0})
    before, after = (load_file(folder / "hf" / "model.safetensors") for folder in (start, tmp_path))
    same = {name for name, tensor in before.items() if torch.equal(tensor, after[name])}
    frozen = ("norm", "embed", "lm_head", "vision_tower", "bias", ".mlp.gate.")
    unseen = {name for name in before if ".experts." in name and "shared" not in name}  # by any token, perhaps
    assert same - unseen == {name for name in before if any(part in name for part in frozen)}
    assert unseen - same

    ids = torch.arange(300, 330)[None]
    base = AutoModelForImageTextToText.from_pretrained(start / "hf").eval()
    plain = base(ids).logits
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "hf").eval()(ids).logits
    adapted = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()(ids).logits
    assert (adapted - merged).abs().max() < 5e-5 < 1e-2 < (adapted - plain).abs().max()
