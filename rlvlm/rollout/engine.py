"""The rollout worker: vLLM's AsyncLLM, its engine in a process of its own, tokens in and tokens out.

A round of requests is laid before a paused scheduler and then released at once, so what the engine computes does not
depend on when each request arrived: with per-request seeds and fp32 on one thread the same round gives the same bits.
That is what makes a resumed run equal to an uninterrupted one.
"""

from __future__ import annotations

import gc
import hashlib
import os
import signal
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from rlvlm.policy.prompts import PromptEncoder
from rlvlm.recipe.errors import RunError
from rlvlm.recipe.schema import Recipe
from rlvlm.records import Group, Segment, StopReason, Task, Trajectory
from rlvlm.rollout.routing import EngineRouting
from rlvlm.rollout.vllm_plugin import PARENT
from rlvlm.weights.parcel import Parcel

_PICTURES = 8  # at most, in a prompt
# Added to a banned token's logit. -100, the least that OpenAI's API allows, is not enough: a policy can outbid it.
_NEVER = -1e9

# vLLM 0.32 rewinds the generator of a seeded request whose prompt it prefills in chunks, which a CPU generator cannot
# do: the engine dies. With whole prefills nothing is rewound.
_WHOLE_PREFILL = {"enable_chunked_prefill": False, "max_num_batched_tokens": 16384}


class EngineDied(RunError):
    """The engine process ended while it was needed."""


class PromptMismatch(RunError):
    """The engine expanded a prompt's pictures to other tokens than the learner does: their log-probs could not
    agree."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a round samples. temperature 0 is greedy. `round` keys the seeds: the same round is the same samples.
    routing: the trajectories carry the engine's choice of experts, in an engine that records it (rl.router_replay r3).
    """

    samples: int
    temperature: float
    max_tokens: int
    round: str
    routing: bool = False


class RolloutEngine:
    """Use as an async context manager; `generate` and `update_weights` are the two things it does."""

    def __init__(self, recipe: Recipe, checkpoint: Path, encoder: PromptEncoder, banned: Sequence[int]) -> None:
        self._recipe = recipe
        self._checkpoint = checkpoint
        self._encoder = encoder
        self._banned = {token: _NEVER for token in banned}
        self._engine: Any = None
        self._routing = EngineRouting() if recipe.rl.router_replay == "r3" else None
        self.weight_version = 0

    async def __aenter__(self) -> RolloutEngine:
        _prepare_environment(self._recipe)
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        with _sigint_blocked():
            self._engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**self._arguments()))
        await self._engine.init_weight_transfer_engine(WeightTransferInitRequest({}))
        if self._routing:
            await self._routing.start(self._engine)
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._engine.shutdown()
        # AsyncLLM shuts down once more when it is collected; at interpreter exit it would find its modules gone.
        self._engine = None
        gc.collect()

    def _arguments(self) -> dict[str, Any]:
        from vllm.config import WeightTransferConfig

        from rlvlm.weights.shared_memory import BACKEND

        recipe = self._recipe
        return dict(
            model=str(self._checkpoint),
            dtype=recipe.policy.dtype,
            seed=recipe.seed,
            max_model_len=recipe.rollout.max_model_len,
            max_num_seqs=recipe.rollout.max_sequences,
            gpu_memory_utilization=recipe.rollout.gpu_memory,
            limit_mm_per_prompt={self._encoder.family.modality: _PICTURES},
            enable_prefix_caching=True,
            enforce_eager=not torch.cuda.is_available(),
            # The distribution that is sampled from: after temperature and the banned ids, as the learner computes it.
            logprobs_mode="processed_logprobs",
            weight_transfer_config=WeightTransferConfig(backend=BACKEND),
            disable_log_stats=True,
            use_tqdm_on_load=False,
            generation_config="vllm",
            **({} if torch.cuda.is_available() else _WHOLE_PREFILL),
            **(self._routing.arguments() if self._routing else {}),
        )

    async def generate(self, tasks: Sequence[Task], sampling: Sampling) -> list[Group]:
        """`sampling.samples` responses to each task, in the order of the tasks.

        Raises EngineDied if the engine process ends, PromptMismatch if its prompt differs from the learner's.
        """
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            await self._engine.pause_generation(mode="keep", clear_cache=True)
            queues = [await self._add(task, sampling) for task in tasks]
            await self._engine.resume_generation()
            outputs = [await queue.get() for queue in queues]
            if self._routing:
                await self._routing.fetch(self._engine, wanted=sampling.routing)
        except EngineDeadError as error:
            raise EngineDied(
                "the vLLM engine process ended during a rollout",
                mend="see its last lines above; then `--resume` goes on from the last checkpoint",
            ) from error
        return [self._group(task, output, sampling) for task, output in zip(tasks, outputs, strict=True)]

    async def _add(self, task: Task, sampling: Sampling) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        prompt = {
            "prompt_token_ids": list(self._encoder.prompt(task).text_ids),
            **self._encoder.family.engine_images(self._encoder.images(task), task.images),
        }
        parameters = SamplingParams(
            n=sampling.samples,
            temperature=sampling.temperature,
            max_tokens=sampling.max_tokens,
            seed=_seed(self._recipe.seed, sampling.round, task.id),
            logprobs=0,
            logit_bias=self._banned,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        return await self._engine.add_request(f"{sampling.round}/{task.id}", prompt, parameters)

    def _group(self, task: Task, output: Any, sampling: Sampling) -> Group:
        prompt_ids = self._encoder.prompt(task).input_ids
        if tuple(output.prompt_token_ids) != prompt_ids:
            raise PromptMismatch(
                f"task {task.id}: the engine sees {len(output.prompt_token_ids)} prompt tokens, "
                f"the learner {len(prompt_ids)}",
                mend="the checkpoint's processor settings for vLLM and for transformers disagree: "
                "see its preprocessor_config.json",
            )
        completions = sorted(output.outputs, key=lambda completion: completion.index)
        trajectories = [self._trajectory(task, prompt_ids, completion) for completion in completions]
        if self._routing and sampling.routing:
            trajectories = [
                replace(one, routing_TLK=self._routing.of(output.request_id, completion, len(prompt_ids) + one.length))
                for one, completion in zip(trajectories, completions, strict=True)
            ]
        return Group(task, tuple(trajectories))

    def _trajectory(self, task: Task, prompt_ids: tuple[int, ...], completion: Any) -> Trajectory:
        token_ids = tuple(completion.token_ids)
        logp_T = tuple(entry[token].logprob for entry, token in zip(completion.logprobs, token_ids, strict=True))
        return Trajectory(
            task_id=task.id,
            index=completion.index,
            prompt_ids=prompt_ids,
            segments=(Segment(token_ids, logp_T, trained=True, weight_version=self.weight_version),),
            stop=StopReason.LENGTH if completion.finish_reason == "length" else StopReason.END,
            text=self._encoder.decode(token_ids),
        )

    async def update_weights(self, parcel: Parcel, version: int) -> None:
        """Takes the learner's weights over vLLM's weight-transfer API; later tokens carry `version`."""
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        await self._engine.pause_generation(mode="keep", clear_cache=True)
        with parcel:
            await self._engine.start_weight_update()
            await self._engine.update_weights(WeightTransferUpdateRequest(dict(parcel.info)))
            await self._engine.finish_weight_update(str(version))
        # Keys and values, and picture features, of the old weights match nothing any more.
        await self._engine.reset_prefix_cache()
        await self._engine.reset_encoder_cache()
        await self._engine.resume_generation()
        self.weight_version = version


def _seed(*parts: object) -> int:
    """A seed that neither order nor number of other requests can change. Sample j of the request gets seed + j."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:6], "big")


def _prepare_environment(recipe: Recipe) -> None:
    """vLLM takes these settings from the environment alone; its processes inherit them."""
    os.environ.update(
        {
            "HF_HUB_OFFLINE": os.environ.get("HF_HUB_OFFLINE", "1"),
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_LOGGING_LEVEL": "ERROR",
            "VLLM_CPU_KVCACHE_SPACE": str(recipe.rollout.kv_cache_gib),
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_MLA_DISABLE": "0"
            if torch.cuda.is_available()
            else "1",  # plain heads: faster, and prefix caching works
            "OMP_NUM_THREADS": str(recipe.threads),
            PARENT: str(os.getpid()),
        }
    )


@contextmanager
def _sigint_blocked() -> Any:
    """Ctrl-C in a terminal reaches every process of the group. The engine is started with SIGINT blocked (inherited),
    so that it lives until the trainer has finished the write at hand and shuts it down itself."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
