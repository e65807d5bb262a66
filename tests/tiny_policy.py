"""What the tests of several parts need: a policy that runs in milliseconds, and tasks with pictures for it."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from transformers import Kimi_K25ForConditionalGeneration, Kimi_K25Processor

from rlvlm.policy.prompts import PromptEncoder
from rlvlm.policy.tiny import build_tiny_kimi
from rlvlm.recipe.schema import TinyPolicy
from rlvlm.records import Chain, Group, Segment, StopReason, Task, Trajectory
from rlvlm.tasks.images import ImageStore

TINY = TinyPolicy(
    hidden=32, layers=2, experts=4, experts_per_token=2, expert_width=16, vision_hidden=16, vision_layers=1, patch=8
)
TEXTS = ("what is the sum of digits ?", "a1 a2 a3 : ; so then check left right top")


def build(seed: int = 0, spread: float | None = None) -> tuple[Kimi_K25ForConditionalGeneration, Kimi_K25Processor]:
    """spread: standard deviation of every matrix. An untrained policy hardly depends on its input; with 0.2 it does, so
    that a leak from one token to another shows."""
    model, processor = build_tiny_kimi(TINY, TEXTS, seed)
    if spread is not None:
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(spread / parameter.std())
    return model.eval(), processor


def picture(seed: int, width: int, height: int) -> Image.Image:
    """Grey noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 1), dtype=np.uint8)
    return Image.fromarray(pixels.repeat(3, axis=2))


def task(name: str, store: ImageStore, text: str, *pictures: Image.Image, **more: object) -> Task:
    content = [*({"type": "image"} for _ in pictures), {"type": "text", "text": text}]
    given: dict = {"answer": "7", "reward": "exact", "level": 1, "source": "s", **more}
    return Task(name, ({"role": "user", "content": content},), tuple(store.add(p) for p in pictures), **given)


def trajectory(of: Task, encoder: PromptEncoder, token_ids: tuple[int, ...], index: int = 0) -> Trajectory:
    """A response whose engine log-probs are all -1."""
    segment = Segment(token_ids, (-1.0,) * len(token_ids), True, 0)
    return Trajectory(of.id, index, encoder.prompt(of).input_ids, (segment,), StopReason.END, encoder.decode(token_ids))


def group(of: Task, encoder: PromptEncoder, *responses: tuple[int, ...]) -> Group:
    return Group(of, tuple(trajectory(of, encoder, ids, j) for j, ids in enumerate(responses)))


def chain(*words: str) -> Chain:
    return Chain.of(words)
