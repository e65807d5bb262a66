"""What can go wrong is found here, before anything heavy loads: the sources, the rewards, the model, the machine.

Imports no torch. Each check raises RecipeError with the key, the value and the mend.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil

from rlvlm import memory
from rlvlm.recipe.errors import ABSENT, RecipeError
from rlvlm.recipe.schema import Recipe, Source
from rlvlm.run import RunFolder

_MIB = 1 << 20
# Weights go to the engine as a file in shared memory; beyond them the processes of a run need little.
SHARED_MEMORY_BYTES = 32 * _MIB
_SHARED_MEMORY = Path("/dev/shm")
# Metrics, trajectories, pictures and the checkpoints of a tiny policy.
DISK_BYTES = 512 * _MIB
_TINY_WEIGHTS_BYTES = 16 * _MIB
# AdamW in a checkpoint's state/: the fp32 master weights and two moments.
_OPTIMIZER_BYTES = 12
_DTYPE_BYTES = {"float32": 4, "bfloat16": 2}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def preflight(recipe: Recipe) -> None:
    """Raises RecipeError with everything that would stop the run later."""
    errors = []
    checks = (
        check_rewards,
        check_task_sources,
        check_model,
        check_memory,
        check_compiler,
        check_ray,
        check_shared_memory,
        check_port,
        check_output,
    )
    for check in checks:
        try:
            check(recipe)
        except RecipeError as error:
            errors.append(error)
    if errors:
        raise RecipeError.of(errors)


def check_ray(recipe: Recipe) -> None:
    """Several ranks of the learner are Ray actors."""
    if recipe.learner.ranks > 1 and find_spec("ray") is None:
        raise RecipeError(
            "learner.ranks",
            recipe.learner.ranks,
            "several ranks need Ray, which is not installed",
            "install rlvlm[ray], or give learner.ranks=1",
        )


def check_task_sources(recipe: Recipe) -> None:
    from rlvlm.tasks.mix import check_sources

    check_sources(recipe.tasks)


def _rewards(recipe: Recipe) -> Iterator[tuple[str, str]]:
    places: tuple[tuple[str, tuple[Source, ...]], ...] = (
        ("train", recipe.tasks.train),
        ("evaluation", recipe.tasks.evaluation),
    )
    for place, sources in places:
        for index, source in enumerate(sources):
            if source.reward is not None:
                yield f"tasks.{place}[{index}].reward", source.reward


def check_rewards(recipe: Recipe) -> None:
    """Each can be imported and takes its options."""
    from rlvlm.scoring import own_reward, reward_named

    errors = []
    for own, named in recipe.rewards.named.items():
        try:
            own_reward(own, named)
        except RecipeError as error:
            errors.append(error)
    for key, name in _rewards(recipe):
        try:
            if name not in recipe.rewards.named:
                reward_named(name, recipe.rewards, key)
        except RecipeError as error:
            errors.append(error)
    if errors:
        raise RecipeError.of(errors)


def check_model(recipe: Recipe) -> None:
    """The policy's directory has what transformers and vLLM read. A hub id is not looked up: that takes a network."""
    model = recipe.policy.model
    if model == "tiny_kimi":
        return
    folder = Path(model).expanduser()
    if not folder.is_dir():
        if folder.is_file():
            raise RecipeError("policy.model", model, "this is a file", "give the directory that holds the checkpoint")
        if not _HUB_ID.fullmatch(model):
            mend = "give tiny_kimi, a directory with a checkpoint, or a hub id (organisation/name)"
            raise RecipeError("policy.model", model, "no such directory", mend)
        return
    needed = (
        ("config", ("config.json",)),
        ("weights", ("*.safetensors", "*.bin")),
        ("processor", ("preprocessor_config.json", "processor_config.json")),
        ("tokenizer", ("tokenizer.json", "tokenizer_config.json")),
    )
    for what, patterns in needed:
        if not any(next(folder.glob(pattern), None) for pattern in patterns):
            mend = "copy it from the model that this checkpoint was made from"
            raise RecipeError("policy.model", model, f"the directory has no {what} ({' or '.join(patterns)})", mend)
    _file_dtype_bytes(folder, model)


def _file_dtype_bytes(folder: Path, model: str) -> int:
    """Bytes a parameter takes in the checkpoint's files."""
    try:
        config: dict[str, Any] = json.loads((folder / "config.json").read_bytes())
    except ValueError as error:
        raise RecipeError("policy.model", model, f"config.json is not JSON: {error}", "copy the file anew") from None
    text = config.get("text_config") or {}
    dtypes = [part.get(key) for part in (config, text) for key in ("dtype", "torch_dtype")]
    return 4 if "float32" in dtypes else 2


def _parameters(recipe: Recipe) -> int:
    """Of the policy, by the size of its weight files; 0 where they are not on this machine."""
    folder = Path(recipe.policy.model).expanduser()
    if recipe.policy.model == "tiny_kimi":
        return _TINY_WEIGHTS_BYTES // _DTYPE_BYTES["float32"]
    if not (folder / "config.json").is_file():
        return 0
    files = list(folder.glob("*.safetensors")) or list(folder.glob("*.bin"))
    return sum(file.stat().st_size for file in files) // _file_dtype_bytes(folder, recipe.policy.model)


def check_memory(recipe: Recipe) -> None:
    """What RL needs at a time fits into what is free; by estimate, so a run may still fail near the edge."""
    if "rl" not in recipe.stages:
        return
    parameters, config = _parameters(recipe), memory.read_config(Path(recipe.policy.model).expanduser())
    devices = memory.gpus()
    if devices:
        total, free = min(devices)
        need, place = memory.need_on_gpu(recipe, parameters, config, total), "a GPU here"
    else:
        free = memory.free_on_cpu()
        need, place = memory.need_on_cpu(recipe, parameters, config), "this machine"
    if need.total > free:
        problem = (
            f"needs about {_size(need.total)} of memory (learner {_size(need.learner)}, activations "
            f"{_size(need.activations)}, engine {_size(need.engine)}, processes {_size(need.processes)}), and {place} "
            f"has {_size(free)} free"
        )
        raise RecipeError("policy.model", recipe.policy.model, problem, _less_memory(recipe, need))


def _less_memory(recipe: Recipe, need: memory.Need) -> str:
    """What would help most, for the largest part of the need."""
    largest = max(("learner", "activations", "engine"), key=lambda part: getattr(need, part))
    if largest == "engine":
        return "lower rollout.gpu_memory or rollout.kv_cache_gib, or take a smaller model"
    if largest == "activations":
        return "give learner.gradient_checkpointing=true, or a smaller learner.row_tokens or learner.logp_chunk"
    return (
        "give policy.lora, learner.zero_stage=3 with more learner.ranks, learner.offload=optimizer, or a smaller model"
    )


def check_compiler(recipe: Recipe) -> None:
    """On GPUs vLLM compiles kernels when it starts: that takes a compiler, and no lock left by one that was killed."""
    if memory.gpus():
        check_compilers_there()
        check_compile_locks(Path(os.environ.get("TORCH_EXTENSIONS_DIR", "~/.cache/torch_extensions")).expanduser())


def check_compilers_there() -> None:
    if not any(map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang"))):
        problem = "no C compiler is on the PATH, and vLLM's kernels are compiled when it starts"
        raise RecipeError("CC", os.environ.get("CC", ABSENT), problem, "install one (Debian: gcc), or set CC")


def check_compile_locks(folder: Path) -> None:
    """torch's lock of an extension that is being compiled stays when the compile is killed, and every later start waits
    for it without a word. It is stale when nobody compiles any more."""
    compilers = {"ninja", "nvcc", "g++", "gcc", "cc1plus", "c++", "cicc"}
    if any(process.name() in compilers for process in psutil.process_iter(["name"])):
        return
    for lock in sorted(folder.glob("**/lock")):
        problem = "the lock of a compile that was killed: whatever compiles there next would wait for ever"
        raise RecipeError(str(lock), ABSENT, problem, f"if no other machine shares this folder: rm {lock}")


def check_shared_memory(recipe: Recipe) -> None:
    if not _SHARED_MEMORY.is_dir():  # not a Linux machine
        return
    needed = SHARED_MEMORY_BYTES + _parameters(recipe) * _DTYPE_BYTES[recipe.policy.dtype]
    free = shutil.disk_usage(_SHARED_MEMORY).free
    if free < needed:
        problem = f"weights pass through {_SHARED_MEMORY}, which has {_size(free)} free of the {_size(needed)} needed"
        mend = f"with Docker: --shm-size={_gib(needed)}g; else: mount -o remount,size={_gib(needed)}G {_SHARED_MEMORY}"
        raise RecipeError("policy.model", recipe.policy.model, problem, mend)


def check_port(recipe: Recipe) -> None:
    port = recipe.learner.port
    if port == 0:
        return
    with socket.socket() as server:
        # As the learner's server does: a port whose last connection is only being wound up is free.
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            server.bind(("", port))
        except OSError as error:
            problem = (error.strerror or str(error)).lower()
            raise RecipeError("learner.port", port, problem, "give another port, or 0 for one that is free") from None


def check_output(recipe: Recipe) -> None:
    """The run folder can be written and the disk has room for its checkpoints."""
    root = RunFolder.of(recipe).root
    there = next(folder for folder in (root, *root.absolute().parents) if folder.exists())
    if not there.is_dir():
        raise RecipeError("output", recipe.output, f"{there} is a file", "give a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise RecipeError("output", recipe.output, f"{there} is not writable for this user", "give another folder")
    checkpoint = _parameters(recipe) * (_DTYPE_BYTES[recipe.policy.dtype] + _OPTIMIZER_BYTES)
    # One more than stay: the oldest goes only once the newest is whole.
    needed = DISK_BYTES + (recipe.checkpoint.keep + 1) * checkpoint
    free = shutil.disk_usage(there).free
    if free < needed:
        problem = f"its disk has {_size(free)} free of the {_size(needed)} needed"
        mend = f"make room, give another folder, or lower checkpoint.keep, which is {recipe.checkpoint.keep}"
        raise RecipeError("output", recipe.output, problem, mend)


def _size(count: int) -> str:
    return f"{count / (1 << 30):.1f} GiB" if count >= 1 << 30 else f"{count / _MIB:.0f} MiB"


def _gib(count: int) -> int:
    return -(-count // (1 << 30))
