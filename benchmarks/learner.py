"""A learner step on a batch as RL has it, mixed lengths and pictures: rlvlm against TRL's GRPOTrainer, in one process.

    .venv/bin/python benchmarks/learner.py [--rounds 7] [--threads 1] [--micro-batch 16] [--json FILE]
    .venv/bin/python benchmarks/learner.py --quick     # a smaller batch, one round: shows that it runs

Both train the same kimi_k25 (MoonViT, MoE, MLA) in float32 on the same responses, k to a prompt, with lengths of a long
tail and none, one or two pictures. TRL: `GRPOTrainer.compute_loss` on its own padded batch (prompts left, completions
right, to the longest of the batch), dealt into micro-batches, backward, clipping, torch's AdamW. Ours: `Learner.step`
on packed rows, DeepSpeed and all. Steps are interleaved, the order turns round each time, and the ratio is the median
of the rounds'. A token counts once, padding never.

With an equal objective (advantage times log-prob, summed over a response) the gradients must agree: the largest
difference over the largest element, of each parameter. Exits with 1 if a claim does not hold.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rlvlm_rewards import Score
from transformers import PreTrainedModel, ProcessorMixin

from rlvlm.cluster.local import become_rank, free_port
from rlvlm.learner.learner import Learner
from rlvlm.learner.logprobs import RowLogProbs
from rlvlm.learner.objective import Rewarded, Totals, row_loss
from rlvlm.learner.packing import pack
from rlvlm.policy.checkpoint import save_policy
from rlvlm.policy.prompts import PromptEncoder
from rlvlm.policy.tiny import build_tiny_kimi
from rlvlm.recipe.load import recipe_from
from rlvlm.recipe.schema import Recipe, TinyPolicy
from rlvlm.records import Batch, Group, Segment, StopReason, Task, Trajectory
from rlvlm.tasks.images import ImageStore

SPEEDUP, PADDING, AGREEMENT = 2.0, 0.03, 1e-4  # what is claimed
WORDS = [f"w{i}" for i in range(400)]
LEARNING_RATE = 1e-6


@dataclass(frozen=True)
class Size:
    policy: TinyPolicy
    prompts: int
    samples: int
    longest: int  # tokens of a response
    row_tokens: int


FULL = Size(TinyPolicy(hidden=128, expert_width=96, vision_hidden=96), 8, 8, 512, 2048)
QUICK = Size(TinyPolicy(), 4, 4, 96, 512)


# --- the batch -------------------------------------------------------------------------------------------------------


def batch_of(size: Size, encoder: PromptEncoder, store: ImageStore, first_word: int) -> list[Rewarded]:
    """Responses of log-normal length (median 1/6 of the longest, sigma 0.8), pictures of 32 to 96 pixels a side."""
    rng = np.random.default_rng(0)
    groups = []
    for p in range(size.prompts):
        sides = 8 * rng.integers(4, 13, ((0, 1, 1, 2)[p % 4], 2))
        pictures = [Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for h, w in sides]
        question = " ".join(rng.choice(WORDS, int(rng.integers(5, 40))))
        content = [*({"type": "image"} for _ in pictures), {"type": "text", "text": question}]
        keys = tuple(map(store.add, pictures))
        task = Task(str(p), ({"role": "user", "content": content},), keys, "", "exact", 1, "benchmark")
        rewards = rng.integers(0, 2, size.samples).astype(float)
        advantages = tuple((rewards - rewards.mean() + rng.normal(0, 0.1, size.samples)).tolist())
        lengths = rng.lognormal(np.log(size.longest / 6), 0.8, size.samples).clip(2, size.longest).astype(int)
        answers = [tuple((first_word + rng.integers(0, len(WORDS), n)).tolist()) for n in lengths]
        trajectories = tuple(
            Trajectory(str(p), j, encoder.prompt(task).input_ids, (Segment(a, (0.0,) * len(a), True, 0),),
                       StopReason.END, "")
            for j, a in enumerate(answers)
        )  # fmt: skip
        scores = tuple(Score(value=reward) for reward in rewards)
        groups.append(Rewarded(Group(task, trajectories, scores), tuple(rewards), advantages))
    return groups


def recipe_of(size: Size, folder: Path, threads: int) -> Recipe:
    return recipe_from(
        {
            "name": "benchmark",
            "output": str(folder),
            "threads": threads,
            "tasks": {"train": [{"generator": "digits_sum"}]},
            "policy": {"tiny": size.policy.model_dump()},
            "rl": {
                "prompts": size.prompts,
                "samples": size.samples,
                "minibatches": 1,
                "learning_rate": LEARNING_RATE,
                "objective": {"tau": 0.0},
            },
            "learner": {"row_tokens": size.row_tokens, "balance": {"kind": "off"}},
        }
    )


# --- TRL -------------------------------------------------------------------------------------------------------------


class Theirs:
    """GRPOTrainer's loss step on the batch that its `_generate_and_score_completions` would have made of it."""

    def __init__(self, model: PreTrainedModel, processor: ProcessorMixin, folder: Path, micro_batch: int) -> None:
        from datasets import Dataset
        from trl import GRPOConfig, GRPOTrainer

        config = GRPOConfig(
            output_dir=str(folder), per_device_train_batch_size=micro_batch, num_generations=2, use_cpu=True,
            bf16=False, gradient_checkpointing=False, beta=0.0, loss_type="luspo", report_to=[],
        )  # fmt: skip
        prompts = Dataset.from_list([{"prompt": [{"role": "user", "content": "w1"}]}] * micro_batch)
        self._trainer = GRPOTrainer(model, _no_reward, config, prompts, processing_class=processor)
        self._micro_batch, self._model = micro_batch, model.train()
        self._pad = processor.tokenizer.pad_token_id
        self._optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, (0.9, 0.95), weight_decay=0.0)

    def prepare(self, rewarded: list[Rewarded], encoder: PromptEncoder) -> float:
        """Pads and deals as TRL does; gives the share of its tokens that are padding."""
        from trl.trainer.utils import (
            pad,
            shuffle_sequence_dict,
            split_pixel_values_by_grid,
            split_tensor_dict,
            unsplit_pixel_values_by_grid,
        )

        prompts = [encoder.prompt(one.group.task) for one in rewarded for _ in one.group.trajectories]
        prompt_ids = [torch.tensor(prompt.input_ids) for prompt in prompts]
        answers = [torch.tensor(t.response_ids) for one in rewarded for t in one.group.trajectories]
        images = {
            key: torch.cat([p.images[key] for p in prompts if p.images]) for key in ("pixel_values", "image_grid_thw")
        }
        inputs = {
            "prompt_ids": pad(prompt_ids, self._pad, "left"),
            "prompt_mask": pad([torch.ones_like(ids) for ids in prompt_ids], 0, "left"),
            "completion_ids": pad(answers, self._pad, "right"),
            "completion_mask": pad([torch.ones_like(ids) for ids in answers], 0, "right"),
            "advantages": torch.tensor([a for one in rewarded for a in one.advantage_K]),
            "num_items_in_batch": torch.tensor(sum(map(len, answers))),
            "num_images": [len(p.images.get("image_grid_thw", ())) for p in prompts],
            **images,
        }
        torch.manual_seed(0)
        dealt = shuffle_sequence_dict(split_pixel_values_by_grid(inputs))
        self._steps = len(prompts) // self._micro_batch
        self._inputs = [unsplit_pixel_values_by_grid(one) for one in split_tensor_dict(dealt, self._steps)]
        self._trainer.current_gradient_accumulation_steps = self._steps
        computed = inputs["prompt_ids"].numel() + inputs["completion_ids"].numel()
        return 1 - sum(map(len, (*prompt_ids, *answers))) / computed

    def backward(self) -> None:
        for inputs in self._inputs:
            self._trainer.compute_loss(self._model, inputs).backward()

    def step(self) -> None:
        self.backward()
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad()


def _no_reward(completions: list[Any], **_: Any) -> list[float]:
    return [0.0] * len(completions)


# --- ours ------------------------------------------------------------------------------------------------------------


class Ours:
    """The learner on one rank."""

    def __init__(self, recipe: Recipe, checkpoint: Path) -> None:
        become_rank(0, 1, free_port(), recipe.threads)
        self._learner = Learner(recipe, checkpoint, ())

    def prepare(self, batch: Batch) -> float:
        """Packs, recomputes the reference; gives the share of tokens that belong to no response."""
        self._share = batch.share(0)
        self._reference = self._learner.reference(self._share)
        rows = self._share.minibatches[0].rows[0]
        idle = sum(int((row.segment_T >= len(row.advantage_S)).sum()) for row in rows)
        return idle / sum(row.input_ids_T.numel() for row in rows)

    def step(self) -> None:
        self._learner.step(self._share, self._reference)


def our_gradients(model: PreTrainedModel, recipe: Recipe, batch: Batch) -> dict[str, torch.Tensor]:
    """Those of the learner's own loss over the learner's own log-probs."""
    module = RowLogProbs(model, recipe.rl.temperature, (), recipe.learner.logp_chunk)
    (minibatch,) = batch.minibatches
    tokens = sum(int(row.trained_T.sum()) for row in minibatch.rows[0])
    totals = Totals(minibatch.prompts, minibatch.sequences, tokens)
    for row in minibatch.rows[0]:
        logp_N, _ = module(row)
        weight_N = torch.ones_like(logp_N)
        row_loss(recipe.rl.objective, logp_N, logp_N.detach(), weight_N, row, totals).loss.backward()
    return _taken(model)


def _taken(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Gradients by parameter, which then has none."""
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return gradients


def disagreement(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The largest difference over the largest element, of the parameter where it is worst."""
    assert one.keys() == other.keys()
    return max(float((one[n] - other[n]).abs().max() / other[n].abs().max().clamp_min(1e-8)) for n in one)


# --- the comparison --------------------------------------------------------------------------------------------------


def seconds(step: Callable[[], None]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def compare(size: Size, rounds: int, threads: int, micro_batch: int, folder: Path) -> dict[str, Any]:
    model, processor = build_tiny_kimi(size.policy, (" ".join(WORDS),), seed=0)
    save_policy(model, processor, folder / "hf")
    store = ImageStore(folder / "images")
    encoder = PromptEncoder(processor, store, model.config)
    recipe = recipe_of(size, folder, threads)
    rewarded = batch_of(size, encoder, store, processor.tokenizer.convert_tokens_to_ids(WORDS[0]))
    batch = pack(rewarded, encoder, recipe, seed=0)
    tokens = [len(t.prompt_ids) + t.length for one in rewarded for t in one.group.trajectories]
    answers = [t.length for one in rewarded for t in one.group.trajectories]

    gradients = our_gradients(copy.deepcopy(model).train(), recipe, batch)
    theirs = Theirs(model, processor, folder / "trl", micro_batch)
    their_padding = theirs.prepare(rewarded, encoder)
    theirs.backward()
    apart = disagreement(gradients, _taken(model))
    ours = Ours(recipe, folder / "hf")
    our_padding = ours.prepare(batch)

    for warm in (theirs.step, ours.step):
        warm()
    times: dict[str, list[float]] = {"trl": [], "rlvlm": []}
    for turn in range(rounds):
        pair = [("trl", theirs.step), ("rlvlm", ours.step)]
        for name, step in pair if turn % 2 == 0 else reversed(pair):
            times[name].append(seconds(step))
    return {
        "machine": f"{_processor()}, {os.cpu_count()} cores, {threads} threads, torch {torch.__version__}",
        "parameters": sum(p.numel() for p in model.parameters()),
        "responses": len(answers),
        "tokens": sum(tokens),
        "mean_over_longest": statistics.fmean(answers) / max(answers),
        "padding": {"trl": their_padding, "rlvlm": our_padding},
        "tokens_per_s": {name: sum(tokens) / statistics.median(taken) for name, taken in times.items()},
        "seconds": times,
        "ratio": statistics.median(a / b for a, b in zip(times["trl"], times["rlvlm"], strict=True)),
        "gradients_apart": apart,
    }


def _processor() -> str:
    """The processor's name, where Linux tells it."""
    told = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [line.split(":")[1].strip() for line in told.splitlines() if line.startswith("model name")]
    return names[0] if names else platform.machine()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--micro-batch", type=int, default=16)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    size, rounds = (QUICK, 1) if arguments.quick else (FULL, arguments.rounds)
    if size.prompts * size.samples % arguments.micro_batch:
        parser.error(f"--micro-batch has to divide the {size.prompts * size.samples} responses")
    with tempfile.TemporaryDirectory() as folder:
        found = compare(size, rounds, arguments.threads, arguments.micro_batch, Path(folder))
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=2) + "\n")
    print(f"{found['machine']}; {found['parameters']:,} parameters, float32")
    print(
        f"{found['responses']} responses, {found['tokens']:,} tokens with their prompts; "
        f"mean length {found['mean_over_longest']:.0%} of the longest; {rounds} rounds, medians\n"
    )
    print("| | tokens/s | padding |\n|---|---|---|")
    for name in ("trl", "rlvlm"):
        print(f"| {name} | {found['tokens_per_s'][name]:,.0f} | {found['padding'][name]:.1%} |")
    print(f"\nratio {found['ratio']:.2f}; gradients: {found['gradients_apart']:.1e} of the largest element apart")
    claims = {
        f"tokens/s >= {SPEEDUP} x TRL's": arguments.quick or found["ratio"] >= SPEEDUP,
        f"padding <= {PADDING:.0%}": found["padding"]["rlvlm"] <= PADDING,
        f"gradients agree to {AGREEMENT}": found["gradients_apart"] <= AGREEMENT,
    }
    broken = [claim for claim, holds in claims.items() if not holds]
    if broken:
        print("does not hold: " + "; ".join(broken))
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
