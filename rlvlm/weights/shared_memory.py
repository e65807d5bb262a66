"""Learner -> engine weight transfer on one machine: a safetensors file in shared memory, announced over vLLM's own
weight-transfer API. The engine's side is registered as the backend `shared_memory` in every vLLM process.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import load_file
from vllm.distributed.weight_transfer import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

BACKEND = "shared_memory"


@dataclass
class Init(WeightTransferInitInfo):
    """Nothing to agree on beforehand."""


@dataclass
class Update(WeightTransferUpdateInfo):
    """path: a safetensors file with every parameter under its checkpoint name."""

    path: str = ""


class SharedMemoryEngine(WeightTransferEngine[Init, Update]):
    """The engine's side: loads the announced file as if it were a checkpoint, layer by layer."""

    init_info_cls = Init
    update_info_cls = Update

    def init_transfer_engine(self, init_info: Init) -> None:
        pass

    def start_weight_update(self) -> None:
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        # Not the base class's: it ends in torch.accelerator.synchronize(), which raises where there is no accelerator.
        self.receive_weights(self.parse_update_info(update_info))
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: Update) -> None:
        self.model.load_weights(load_file(update_info.path, device=str(self.device)).items())

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        pass


def register_engine() -> None:
    """Idempotent: vLLM may load plugins more than once in a process."""
    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, SharedMemoryEngine)
