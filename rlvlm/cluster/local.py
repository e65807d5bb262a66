"""One machine: what a process needs before torch.distributed and DeepSpeed work in it, and a few ranks side by side."""

from __future__ import annotations

import os
import pickle
import socket
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from rlvlm.recipe.errors import RlvlmError


class Ranks(Protocol):
    """Processes that each hold one object and do the same things with it, one share of the work each."""

    size: int

    def call(self, method: str, *arguments: Sequence[Any]) -> list[Any]:
        """Calls the objects' `method` on all ranks at once. arguments: each a sequence with one value a rank. Gives
        the results by rank."""

    def close(self) -> None: ...


class LocalRank:
    """One rank: this process. `make` builds its object once the process is ready for DeepSpeed. port: where its
    process group meets, 0 for one that is free."""

    size = 1

    def __init__(self, make: Callable[[], Any], port: int, threads: int) -> None:
        become_rank(0, 1, port or free_port(), threads)
        self._object = make()

    def call(self, method: str, *arguments: Sequence[Any]) -> list[Any]:
        return [getattr(self._object, method)(*(values[0] for values in arguments))]

    def close(self) -> None:
        del self._object


def free_port() -> int:
    """A TCP port that is free on the loopback interface now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def become_rank(rank: int, ranks: int, port: int, threads: int) -> None:
    """Makes this process rank `rank` of `ranks` on this machine, before DeepSpeed is imported."""
    os.environ.update(rank_environment(rank, ranks, "127.0.0.1", port, rank, ranks))
    ready_for_deepspeed(threads)


def rank_environment(
    rank: int, ranks: int, address: str, port: int, local_rank: int, local_ranks: int
) -> dict[str, str]:
    """What torch.distributed and DeepSpeed read. address, port: where the process group meets. local_rank: among the
    ranks of the same machine, and the number of the GPU it takes."""
    values = {
        "RANK": rank,
        "LOCAL_RANK": local_rank,
        "WORLD_SIZE": ranks,
        "LOCAL_WORLD_SIZE": local_ranks,
        "MASTER_ADDR": address,
        "MASTER_PORT": port,
    }
    return {name: str(value) for name, value in values.items()}


def ready_for_deepspeed(threads: int) -> None:
    """Threads, quiet libraries, and a DeepSpeed that starts on a machine without GPU; before DeepSpeed is imported."""
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
