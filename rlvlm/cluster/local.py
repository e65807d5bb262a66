"""One machine: what a process needs before torch.distributed and DeepSpeed work in it, and a few ranks side by side."""

from __future__ import annotations

import os
import pickle
import socket
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from rlvlm.recipe.errors import RlvlmError


def free_port() -> int:
    """A TCP port that is free on the loopback interface now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def become_rank(rank: int, ranks: int, port: int, threads: int) -> None:
    """Makes this process rank `rank` of `ranks` on this machine, before DeepSpeed is imported."""
    os.environ.update(
        {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(ranks),
            "LOCAL_WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
    )
    os.environ["OMP_NUM_THREADS"] = str(threads)
    torch.set_num_threads(threads)
    quieten_libraries()
    if not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"
        _skip_shared_memory_extension()


def quieten_libraries() -> None:
    """A person watches this terminal: no progress bars of libraries beside our own lines, no notices of deprecation
    that are meant for the libraries' authors. Errors and warnings that concern the run stay."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    for category in (FutureWarning, DeprecationWarning):
        warnings.filterwarnings("ignore", category=category)
    os.environ["PYTHONWARNINGS"] = "ignore::FutureWarning,ignore::DeprecationWarning"  # for the processes that we start
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


def _skip_shared_memory_extension() -> None:
    """On a CPU DeepSpeed compiles an extension for collectives in shared memory when it starts (20-80 s, and a killed
    compile leaves a lock that hangs every later start). gloo does the same work."""
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def run_ranks(function: Callable[..., None], ranks: int, *args: Any) -> None:
    """Runs `function(rank, *args)` in `ranks` fresh processes and waits; they end with this process, however it ends.

    Raises the RlvlmError that a rank raised. Anything else that ends a rank is a bug and comes as torch's
    ProcessRaisedException (with the rank's traceback) or ProcessExitedException.
    """
    with tempfile.TemporaryDirectory() as folder:
        try:
            torch.multiprocessing.spawn(_rank, args=(function, folder, args), nprocs=ranks, join=True)
        except torch.multiprocessing.ProcessExitedException:
            for told in sorted(Path(folder).iterdir()):
                raise pickle.loads(told.read_bytes()) from None
            raise


def _rank(rank: int, function: Callable[..., None], folder: str, args: tuple[Any, ...]) -> None:
    try:
        function(rank, *args)
    except RlvlmError as error:  # an exception object does not cross processes by itself
        (Path(folder) / str(rank)).write_bytes(pickle.dumps(error))
        sys.exit(error.exit_code)
