"""The rollout engine's routing, for router replay R3 (arXiv 2510.11370): which experts each token of a response, and of
its prompt, was sent to when the engine computed it.

On a CPU a worker extension records it. On a GPU vLLM returns it itself (`enable_return_routed_experts`, which needs
Triton); that path is written after vLLM 0.32's source and has not been run.

The worker imports this file, which therefore imports little.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from rlvlm.recipe.errors import RecipeError

NOT_RECORDED = -1
_SUFFIX = len("-00000000")  # vLLM makes request ids unique by 8 random digits at their end


class EngineRouting:
    """The trainer's side: turns recording on, and fetches what was recorded after a round."""

    def __init__(self) -> None:
        self._native = torch.cuda.is_available()
        self._layers: list[int] = []
        self._recorded: dict[str, tuple[tuple[int, ...], bytes]] = {}

    def arguments(self) -> dict[str, Any]:
        """What the engine is started with."""
        native = {"enable_return_routed_experts": True} if self._native else {}
        return {"worker_extension_cls": f"{__name__}.{RoutingExtension.__name__}", **native}

    async def start(self, engine: Any) -> None:
        """Before the first request. Raises RecipeError if the policy has no mixture of experts."""
        self._layers = (await engine.collective_rpc("moe_layers"))[0]
        if not self._layers:
            problem = "the engine finds no mixture of experts in the policy, so no routing to record"
            raise RecipeError("rl.router_replay", "r3", problem, "leave it out")
        if not self._native:
            await engine.collective_rpc("record_routing")

    async def fetch(self, engine: Any, wanted: bool) -> None:
        """After every round: what was recorded in it comes here, or is thrown away if nobody wants it."""
        if not self._native:
            self._recorded = (await engine.collective_rpc("take_routing", args=(wanted,)))[0]

    def of(self, request_id: str, completion: Any, tokens: int) -> np.ndarray:
        """routing_TLK of one response (records.Trajectory), int16 [tokens - 1, L, K]: the engine does not compute a
        response's last token. tokens: of prompt and response."""
        if self._native:
            return completion.routed_experts[: tokens - 1, self._layers].astype(np.int16)
        sample = f"{completion.index}_{request_id}"  # vLLM's name for one of several samples
        shape, data = self._recorded[sample if sample in self._recorded else request_id]
        recorded_TLK = np.frombuffer(data, dtype=np.int16).reshape(shape)[: tokens - 1]
        routing_TLK = np.full((tokens - 1, *shape[1:]), NOT_RECORDED, dtype=np.int16)
        routing_TLK[: len(recorded_TLK)] = recorded_TLK
        return routing_TLK


class RoutingExtension:
    """Methods that vLLM adds to its worker (`worker_extension_cls`), called with `collective_rpc`."""

    model_runner: Any

    def moe_layers(self) -> list[int]:
        """Which of the model's layers are mixtures of experts, in order."""
        return [layer.layer_id for layer in _moe_layers(self.model_runner.get_model())]

    def record_routing(self) -> None:
        """From now on."""
        self._routing_recorder = Recorder(self.model_runner, _moe_layers(self.model_runner.get_model()))

    def take_routing(self, wanted: bool) -> dict[str, tuple[tuple[int, ...], bytes]]:
        """Request id -> shape and int16 data of its routing [T, L, K], for every request since the last call."""
        recorded = self._routing_recorder.take()
        if not wanted:
            return {}
        return {name[:-_SUFFIX]: (routing.shape, routing.tobytes()) for name, routing in recorded.items()}


def _moe_layers(model: torch.nn.Module) -> list[Any]:
    from vllm.model_executor.layers.fused_moe.layer import MoERunner

    return sorted((m for m in model.modules() if isinstance(m, MoERunner)), key=lambda layer: layer.layer_id)


class Recorder:
    """Wraps vLLM's model runner and its MoE layers: after each step the experts of the step's tokens are kept, by
    request and position.

    A token whose keys and values come out of the prefix cache is not computed, so nothing is recorded for it. Its
    routing is that of the token whose block it shares: a second table follows the slots of the KV cache.
    """

    def __init__(self, runner: Any, layers: Sequence[Any]) -> None:
        self._runner = runner
        self._execute = runner.execute_model
        self._step: dict[int, np.ndarray] = {}
        self._by_slot: np.ndarray | None = None
        self._chunks: dict[str, list[tuple[int, np.ndarray]]] = {}
        for index, layer in enumerate(layers):
            layer.router.set_capture_fn(partial(self._capture, index))
        runner.execute_model = self._execute_model

    def _capture(self, layer: int, chosen_TK: torch.Tensor) -> None:
        self._step[layer] = chosen_TK.to(torch.int16).numpy().copy()

    def _execute_model(self, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        self._step = {}
        result = self._execute(scheduler_output, *args, **kwargs)
        if self._step:
            step_TLK = np.stack([self._step[layer] for layer in sorted(self._step)], axis=1)
            self._keep(step_TLK, scheduler_output.num_scheduled_tokens)
        return result

    def _keep(self, step_TLK: np.ndarray, scheduled: Mapping[str, int]) -> None:
        """step_TLK: the step's tokens, request after request in the order of the batch."""
        taken, cached = 0, []
        for request in self._runner.input_batch.req_ids:
            count = scheduled.get(request, 0)
            first = self._runner.requests[request].num_computed_tokens
            if request not in self._chunks and first:
                cached.append((request, first))
            self._slots(step_TLK)[self._slots_of(request, first, first + count)] = step_TLK[taken : taken + count]
            self._chunks.setdefault(request, []).append((first, step_TLK[taken : taken + count]))
            taken += count
        for request, first in cached:  # after all, because a prompt may share blocks that were filled in this very step
            self._chunks[request].append((0, self._slots(step_TLK)[self._slots_of(request, 0, first)]))

    def _slots(self, step_TLK: np.ndarray) -> np.ndarray:
        if self._by_slot is None:
            config = self._runner.kv_cache_config
            slots = config.num_blocks * self._block_size()
            self._by_slot = np.full((slots, *step_TLK.shape[1:]), NOT_RECORDED, dtype=np.int16)
        return self._by_slot

    def _slots_of(self, request: str, first: int, end: int) -> np.ndarray:
        position = np.arange(first, end)
        blocks = np.asarray(self._runner.requests[request].block_ids[0])
        return blocks[position // self._block_size()] * self._block_size() + position % self._block_size()

    def _block_size(self) -> int:
        return int(self._runner.kv_cache_config.kv_cache_groups[0].kv_cache_spec.block_size)

    def take(self) -> dict[str, np.ndarray]:
        """Request -> routing [T, L, K], int16. A request that goes on afterwards gets its first tokens from the second
        table again."""
        chunks, self._chunks = self._chunks, {}
        return {request: _laid(parts) for request, parts in chunks.items()}


def _laid(chunks: list[tuple[int, np.ndarray]]) -> np.ndarray:
    """Chunks (position of the first token, [tokens, L, K]) in their places; later ones win."""
    end = max(first + len(chunk) for first, chunk in chunks)
    routing_TLK = np.full((end, *chunks[0][1].shape[1:]), NOT_RECORDED, dtype=np.int16)
    for first, chunk in chunks:
        routing_TLK[first : first + len(chunk)] = chunk
    return routing_TLK
