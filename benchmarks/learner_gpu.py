"""The learner's step on one GPU: a mixture-of-experts VLM with the layers of Qwen3-VL-30B-A3B, fewer of them, random
weights, packed rows of 16k and 64k tokens with pictures. Against the unpacked path (padded, dense logits) on the same
model in the same run. Loads nothing from anywhere; under 8 minutes.

    .venv/bin/python benchmarks/learner_gpu.py              # one GPU with 120 GiB or more; --layers 3 for 80 GiB
    .venv/bin/python benchmarks/learner_gpu.py --tiny       # any machine: shows that it runs, its figures mean nothing

Both paths: the same sequences, forward and backward of the same loss under gradient checkpointing, then DeepSpeed's
optimizer step (bf16, ZeRO-1). MFU counts the operations that the sequences need, the vision tower's with them
(rlvlm/learner/flops.py); padding and recomputation count as nothing done.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

from rlvlm.cluster.local import become_rank, free_port
from rlvlm.learner.flops import Flops, peak_flops
from rlvlm.learner.logprobs import RowLogProbs
from rlvlm.policy.family import Family, family_of
from rlvlm.records import Row

IMAGE, VIDEO, START, END = 3, 4, 5, 6
PROMPT, LONGEST = 64, 8192
MICRO_BATCH = 4  # sequences at a time on the unpacked path


def qwen3_vl_30b_a3b(layers: int) -> Qwen3VLMoeConfig:
    """The published sizes, except for the number of layers."""
    text = dict(
        vocab_size=151936, hidden_size=2048, intermediate_size=6144, num_hidden_layers=layers, num_attention_heads=32,
        num_key_value_heads=4, head_dim=128, moe_intermediate_size=768, num_experts=128, num_experts_per_tok=8,
        decoder_sparse_step=1, norm_topk_prob=True, mlp_only_layers=[], max_position_embeddings=262144,
        rope_parameters={"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20],
                         "mrope_interleaved": True},
    )  # fmt: skip
    vision = dict(
        depth=27, hidden_size=1152, intermediate_size=4304, num_heads=16, patch_size=16, spatial_merge_size=2,
        temporal_patch_size=2, out_hidden_size=2048, num_position_embeddings=2304,
        deepstack_visual_indexes=[i for i in (8, 16, 24) if layers > 3],
    )  # fmt: skip
    return _config(text, vision)


def tiny() -> Qwen3VLMoeConfig:
    text = dict(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, moe_intermediate_size=48, num_experts=8, num_experts_per_tok=2,
        decoder_sparse_step=1, norm_topk_prob=True, mlp_only_layers=[], max_position_embeddings=16384,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [6, 5, 5],
                         "mrope_interleaved": True},
    )  # fmt: skip
    vision = dict(
        depth=2, hidden_size=32, intermediate_size=64, num_heads=2, patch_size=16, spatial_merge_size=2,
        temporal_patch_size=2, out_hidden_size=64, num_position_embeddings=2304, deepstack_visual_indexes=[0],
    )  # fmt: skip
    return _config(text, vision)


def _config(text: dict[str, Any], vision: dict[str, Any]) -> Qwen3VLMoeConfig:
    return Qwen3VLMoeConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=START,
        vision_end_token_id=END,
        tie_word_embeddings=False,
    )


@dataclass(frozen=True)
class Sample:
    """One response with its prompt: a picture, a question, a chain. position_ids [4, T]."""

    ids_T: torch.Tensor
    position_ids: torch.Tensor
    trained_T: torch.Tensor
    images: dict[str, torch.Tensor]


def samples(config: Qwen3VLMoeConfig, family: Family, tokens: int, side: int, seed: int) -> list[Sample]:
    """Long-tailed lengths that fill `tokens` to the last one. side: of the pictures, in patches."""
    rng, torch_rng = random.Random(seed), torch.Generator().manual_seed(seed)
    picture, shortest = (side // 2) ** 2, (side // 2) ** 2 + 2 + PROMPT + 16
    lengths: list[int] = []
    while (left := tokens - sum(lengths)) > 0:
        length = min(max(shortest, int(rng.lognormvariate(7.2, 0.8))), LONGEST)
        lengths.append(length if left - length >= shortest else left)
    out = []
    for length in lengths:
        ids_T = torch.randint(16, config.text_config.vocab_size, (length,), generator=torch_rng)
        ids_T[0], ids_T[1 : 1 + picture], ids_T[1 + picture] = START, IMAGE, END
        patch = 3 * config.vision_config.temporal_patch_size * config.vision_config.patch_size**2
        images = {
            "pixel_values": torch.randn(side * side, patch, generator=torch_rng),
            "image_grid_thw": torch.tensor([[1, side, side]]),
        }
        trained_T = torch.arange(length) >= picture + 2 + PROMPT
        out.append(Sample(ids_T, family.positions(config, ids_T, images), trained_T, images))
    return out


def packed_row(batch: Sequence[Sample], device: torch.device, dtype: torch.dtype) -> Row:
    """All samples end to end, as rlvlm/learner/packing.py lays them."""
    lengths = torch.tensor([len(one.ids_T) for one in batch])
    pixels = torch.cat([one.images["pixel_values"] for one in batch])
    return Row(
        input_ids_T=torch.cat([one.ids_T for one in batch]).to(device),
        segment_T=torch.repeat_interleave(torch.arange(len(batch)), lengths).to(device),
        position_ids=torch.cat([one.position_ids for one in batch], dim=1).to(device),
        trained_T=torch.cat([one.trained_T for one in batch]).to(device),
        advantage_S=torch.ones(len(batch), device=device),
        group_size_S=torch.ones(len(batch), dtype=torch.long, device=device),
        engine_logp_T=torch.zeros(int(lengths.sum()), device=device),
        images={
            "pixel_values": pixels.to(device, dtype),
            "image_grid_thw": torch.cat([one.images["image_grid_thw"] for one in batch]).to(device),
        },
    )


class Paths(nn.Module):
    """Both ways to the sum of the trained tokens' log-probs, over one policy."""

    def __init__(self, policy: PreTrainedModel) -> None:
        super().__init__()
        self.rows = RowLogProbs(policy, temperature=1.0, banned=(), chunk=1024)

    def forward(self, row: Row | None, batch: Sequence[Sample]) -> torch.Tensor:
        return self.rows(row)[0].sum() if row is not None else self._unpacked(batch)

    def _unpacked(self, batch: Sequence[Sample]) -> torch.Tensor:
        """Right-padded, an attention mask, the logits of every position: what trainers without packing do."""
        policy = self.rows.policy
        device, longest = policy.device, max(len(one.ids_T) for one in batch)
        ids = torch.zeros(len(batch), longest, dtype=torch.long)
        mask, positions = torch.zeros_like(ids), torch.zeros(3, len(batch), longest, dtype=torch.long)
        for i, one in enumerate(batch):
            length = len(one.ids_T)
            ids[i, :length], mask[i, :length] = one.ids_T, 1
            positions[:, i, :length] = one.position_ids[1:]
        images = {key: torch.cat([one.images[key] for one in batch]).to(device) for key in batch[0].images}
        images["pixel_values"] = images["pixel_values"].to(policy.dtype)
        kinds = (ids == IMAGE).int().to(device)
        ids, mask = ids.to(device), mask.to(device)
        logits = policy(
            input_ids=ids, attention_mask=mask, position_ids=positions.to(device), use_cache=False,
            mm_token_type_ids=kinds, **images,
        ).logits  # fmt: skip
        total = logits.new_zeros((), dtype=torch.float32)
        for i, one in enumerate(batch):  # one sequence's softmax at a time, as TRL's selective_log_softmax
            at = one.trained_T.nonzero()[:, 0].to(device)
            logp = logits[i, at - 1].log_softmax(-1).gather(1, ids[i, at][:, None])
            total = total + logp.float().sum()
        return total


def engine(config: Qwen3VLMoeConfig, device: torch.device, dtype: torch.dtype) -> Any:
    import deepspeed

    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    with torch.device(device):
        policy = Qwen3VLMoeForConditionalGeneration(config)
    torch.set_default_dtype(default)
    policy.gradient_checkpointing_enable({"use_reentrant": False})
    policy.train()
    paths = Paths(policy)
    keys = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "zero_optimization": {"stage": 1},
        "gradient_clipping": 1.0,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-6, "torch_adam": True, "foreach": False}},
    }
    return deepspeed.initialize(model=paths, model_parameters=list(paths.parameters()), config=keys)[0]


def step(learner: Any, calls: Sequence[tuple[Row | None, Sequence[Sample]]], tokens: int) -> None:
    """Forward and backward of each call, then one optimizer step."""
    for number, (row, batch) in enumerate(calls, start=1):
        learner.set_gradient_accumulation_boundary(number == len(calls))
        learner.backward(-learner(row, batch) / tokens)
        learner.step()


def timed(run: Callable[[], None], device: torch.device) -> tuple[float, float]:
    """(seconds, peak bytes) of a step."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    return time.perf_counter() - start, float(peak)


def measure(learner: Any, config: Qwen3VLMoeConfig, tokens: int, side: int, repeats: int) -> dict[str, Any]:
    """Both paths on the same samples, taking turns."""
    policy = learner.module.rows.policy
    family = family_of(config, "qwen3_vl_moe")
    batch = samples(config, family, tokens, side, seed=tokens)
    row = packed_row(batch, policy.device, policy.dtype)
    micro = [batch[i : i + MICRO_BATCH] for i in range(0, len(batch), MICRO_BATCH)]
    paths: dict[str, list[tuple[Row | None, Sequence[Sample]]]] = {
        "packed": [(row, ())],
        "unpacked": [(None, part) for part in micro],
    }
    useful, peak = Flops(policy, family).training(row), peak_flops(policy.device)
    found: dict[str, Any] = {
        "tokens": tokens,
        "sequences": len(batch),
        "vision share of FLOPs": useful.vision / useful.total,
    }
    runs: dict[str, list[tuple[float, float]]] = {name: [] for name in paths}
    for turn in range(repeats + 1):  # the first only warms up
        for name, calls in paths.items():
            try:
                spent = timed(partial(step, learner, calls, tokens), policy.device)
            except torch.OutOfMemoryError:
                learner.zero_grad()
                torch.cuda.empty_cache()
                found[name] = "out of memory"
                continue
            if turn:
                runs[name].append(spent)
    for name, spent_list in runs.items():
        if spent_list and name not in found:
            seconds = sorted(s for s, _ in spent_list)[len(spent_list) // 2]
            found[name] = {
                "tokens/s": tokens / seconds,
                "MFU": useful.total / (seconds * peak) if peak else None,
                "peak GiB": max(b for _, b in spent_list) / 2**30,
            }
    return found


def table(found: Sequence[dict[str, Any]]) -> str:
    lines = ["| tokens | path | tokens/s | MFU | peak GiB |", "|---|---|---|---|---|"]
    for one in found:
        for name in ("packed", "unpacked"):
            got = one[name]
            if isinstance(got, str):
                lines.append(f"| {one['tokens']:,} | {name} | {got} | | |")
                continue
            mfu = "not known" if got["MFU"] is None else f"{got['MFU']:.1%}"
            lines.append(f"| {one['tokens']:,} | {name} | {got['tokens/s']:,.0f} | {mfu} | {got['peak GiB']:.1f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--layers", type=int, default=6, help="of the language model; 48 in the published one")
    parser.add_argument("--tokens", type=int, nargs="+", default=None, help="of a packed row; 16384 65536 by default")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to see that everything runs")
    arguments = parser.parse_args()
    cuda = torch.cuda.is_available()
    if not (cuda or arguments.tiny):
        raise SystemExit("no GPU here: give --tiny, which shows that it runs and measures nothing")
    become_rank(0, 1, free_port(), 1)
    import deepspeed

    deepspeed.init_distributed("nccl" if cuda else "gloo", verbose=False)
    device = torch.device("cuda", 0) if cuda else torch.device("cpu")
    config = tiny() if arguments.tiny else qwen3_vl_30b_a3b(arguments.layers)
    learner = engine(config, device, torch.bfloat16 if cuda else torch.float32)
    tokens = arguments.tokens or ([2048] if arguments.tiny else [16384, 65536])
    side = 4 if arguments.tiny else 28
    found = [measure(learner, config, count, side, arguments.repeats) for count in tokens]
    parameters = sum(p.numel() for p in learner.module.parameters())
    print(f"{torch.cuda.get_device_name(device) if cuda else 'CPU'}, {parameters / 1e9:.2f} B parameters")
    print(table(found))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
