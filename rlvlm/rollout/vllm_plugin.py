"""What vLLM loads in every process that it starts (entry point `vllm.general_plugins`)."""

from __future__ import annotations

import ctypes
import os
import signal

from rlvlm.mends import vllm_cpu

PARENT = "RLVLM_ENGINE_PARENT"  # set by rlvlm.rollout.engine alone, so that a user's own `vllm serve` is left as it is
_PR_SET_PDEATHSIG = 1


def register() -> None:
    """Mends the CPU build, registers the shared-memory weight transfer, and ties engine processes to the trainer's
    life."""
    vllm_cpu.apply()
    from rlvlm.weights.shared_memory import register_engine

    register_engine()
    if PARENT in os.environ and os.getpid() != int(os.environ[PARENT]):
        _die_with_parent()
        # Inherited from the trainer, which starts engines with SIGINT blocked; what vLLM imports may have undone it.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})


def _die_with_parent() -> None:
    """A trainer killed by SIGKILL must not leave an engine behind that holds memory and ports."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() == 1:  # the parent was gone before prctl took effect
        os.kill(os.getpid(), signal.SIGKILL)
