"""What an iteration costs the learner: tokens a second, share of the hardware's peak, memory, tokens of no use."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel

from rlvlm.learner.flops import Flops, peak_flops
from rlvlm.policy.family import Family
from rlvlm.records import Row

_KIB = 1 << 10


class Cost:
    """Measures one rank's passes; `pop_figures` puts the ranks together."""

    def __init__(self, policy: PreTrainedModel, family: Family, device: torch.device) -> None:
        self._flops = Flops(policy, family)
        self._device, self._peak = device, peak_flops(device)
        self._seconds = self._done = self._tokens = self._idle = 0.0

    @contextmanager
    def reference(self, rows: Sequence[Row]) -> Iterator[None]:
        """Around the pass over these rows that recomputes pi_i."""
        with self._timed():
            yield
        self._done += sum(self._flops.forward(row).total for row in rows)

    @contextmanager
    def training(self, rows: Sequence[Row]) -> Iterator[None]:
        """Around the optimizer step on these rows."""
        with self._timed():
            yield
        for row in rows:
            self._done += self._flops.training(row).total
            self._tokens += row.input_ids_T.numel()
            self._idle += int((row.segment_T >= row.advantage_S.numel()).sum())

    @contextmanager
    def _timed(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self._seconds += time.perf_counter() - start

    def pop_figures(self, over_ranks: Callable[..., torch.Tensor]) -> dict[str, float]:
        """Over everything since the last call. learner/tokens_per_s: tokens of responses and their prompts, each once,
        over the seconds of both passes. learner/padding: share of computed tokens that belong to no response.
        learner/mfu: operations of both passes over the devices' peak; not there where the peak is not known.
        learner/peak_memory_bytes: of the rank that needs most (of its process on a CPU).

        over_ranks: sums a tensor over the ranks, or takes the maximum with `largest=True`.
        """
        sums = torch.tensor([self._done, self._tokens, self._idle, 1.0], dtype=torch.float64)
        done, tokens, idle, ranks = over_ranks(sums).tolist()
        largest = torch.tensor([self._seconds, float(self._memory())], dtype=torch.float64)
        seconds, memory = over_ranks(largest, largest=True).tolist()
        self._seconds = self._done = self._tokens = self._idle = 0.0
        return {
            "learner/tokens_per_s": (tokens - idle) / seconds,
            "learner/padding": idle / tokens,
            **({} if self._peak is None else {"learner/mfu": done / (seconds * ranks * self._peak)}),
            "learner/peak_memory_bytes": memory,
        }

    def _memory(self) -> int:
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _KIB
