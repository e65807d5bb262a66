"""Qwen2-VL (arXiv 2409.12191): a vision tower without windows, a merger of 2 x 2 patches, a dense decoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from rlvlm.policy.families.mrope import Mrope


class Qwen2VL(Mrope):
    name = "Qwen2-VL"
    model_types = ("qwen2_vl",)
    groups: ClassVar[Mapping[str, str]] = {"projector": r"\bvisual\.merger\.", "vision": r"\bvisual\."}
