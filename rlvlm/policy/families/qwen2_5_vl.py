"""Qwen2.5-VL (arXiv 2502.13923): Qwen2-VL with windows in the vision tower's attention."""

from __future__ import annotations

from rlvlm.policy.families.qwen2_vl import Qwen2VL


class Qwen25VL(Qwen2VL):
    name = "Qwen2.5-VL"
    model_types = ("qwen2_5_vl",)
