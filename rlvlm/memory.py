"""How much memory a recipe will need, estimated before anything loads. Imports no torch.

Mixed-precision training with AdamW takes, for each parameter (ZeRO, arXiv 1910.02054, section 3.1): the weight, its
gradient, and 12 bytes of fp32 (master weight and two moments); ZeRO shares the last, from stage 2 on the gradients, in
stage 3 the weights too.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from rlvlm.recipe.schema import Recipe

GIB = 1 << 30
_OPTIMIZER = 12
_DTYPE_BYTES = {"float32": 4, "bfloat16": 2}
# Of a process that has torch, transformers and DeepSpeed or vLLM loaded, before any weight.
_PROCESS = int(1.1 * GIB)
# Saved for backward, in multiples of tokens x hidden size x layers (arXiv 2205.05198, section 4.1, with attention that
# keeps no scores); with checkpointing the layer's input alone.
_SAVED, _SAVED_CHECKPOINTED = 17, 1
# A trained token's logits while a chunk is at work: in fp32, their softmax, and a gradient.
_LOGITS = 12
_ADAPTED = 0.02  # share of the parameters that adapters come to, on the high side


@dataclass(frozen=True, slots=True)
class Need:
    """Bytes by what they are for; all ranks of this machine together on a CPU, one device on GPUs."""

    learner: int
    activations: int
    engine: int
    processes: int

    @property
    def total(self) -> int:
        return self.learner + self.activations + self.engine + self.processes


def learner_bytes(recipe: Recipe, parameters: int) -> int:
    """Weights, gradients and optimizer of one rank of the RL learner."""
    ranks, stage = recipe.learner.ranks, recipe.learner.zero_stage
    width = _DTYPE_BYTES[recipe.policy.dtype]
    trained = parameters * (_ADAPTED if recipe.policy.lora else 1.0)
    weights = parameters * width / (ranks if stage == 3 else 1)
    gradients = trained * width / (ranks if stage >= 2 else 1)
    return int(weights + gradients + trained * _OPTIMIZER / ranks)


def activation_bytes(recipe: Recipe, config: dict[str, Any]) -> int:
    """Of one rank, for the longest row. config: the checkpoint's config.json; {} where it is not known."""
    text = config.get("text_config") or config
    hidden, layers = text.get("hidden_size") or 0, text.get("num_hidden_layers") or 0
    saved = _SAVED_CHECKPOINTED if recipe.learner.gradient_checkpointing else _SAVED
    width = _DTYPE_BYTES[recipe.policy.dtype]
    chunk = min(recipe.learner.logp_chunk, recipe.learner.row_tokens) * (text.get("vocab_size") or 0) * _LOGITS
    return recipe.learner.row_tokens * hidden * layers * saved * width + chunk


def need_on_cpu(recipe: Recipe, parameters: int, config: dict[str, Any]) -> Need:
    """Of everything that RL has in memory at a time, on a machine without a GPU."""
    ranks = recipe.learner.ranks
    engine = parameters * _DTYPE_BYTES[recipe.policy.dtype] + recipe.rollout.kv_cache_gib * GIB
    processes = (2 if ranks == 1 else 2 + ranks) * _PROCESS  # the trainer (a rank itself, if it is the only one), vLLM
    return Need(ranks * learner_bytes(recipe, parameters), ranks * activation_bytes(recipe, config), engine, processes)


def need_on_gpu(recipe: Recipe, parameters: int, config: dict[str, Any], device_bytes: int) -> Need:
    """Of the device that learner and engine share."""
    learner = learner_bytes(recipe, parameters)
    if recipe.learner.offload == "optimizer":
        learner -= int(parameters * (_ADAPTED if recipe.policy.lora else 1.0) * _OPTIMIZER / recipe.learner.ranks)
    engine = int(device_bytes * recipe.rollout.gpu_memory)
    return Need(learner, activation_bytes(recipe, config), engine, _PROCESS)


def free_on_cpu() -> int:
    """Memory that this machine can still give, in bytes."""
    return psutil.virtual_memory().available


def gpus() -> list[tuple[int, int]]:
    """(total, free) bytes of each GPU, as the driver tells; [] without one."""
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", "--query-gpu=memory.total,memory.free", "--format=csv,noheader,nounits"]
    answer = subprocess.run(query, capture_output=True, text=True, timeout=30, check=False)
    rows = [line.split(",") for line in answer.stdout.splitlines()] if answer.returncode == 0 else []
    return [(int(total) << 20, int(free) << 20) for total, free in rows]


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a checkpoint; {} if there is none here."""
    path = folder / "config.json"
    return json.loads(path.read_bytes()) if path.is_file() else {}
