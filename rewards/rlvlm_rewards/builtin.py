"""The built-in rewards by name. Each is imported when it is asked for: what one depends on loads only where it is
used."""

from __future__ import annotations

from collections.abc import Mapping

BUILT_IN: Mapping[str, str] = {
    "exact": "rlvlm_rewards.visual.answers:Exact",
    "choice": "rlvlm_rewards.visual.answers:Choice",
    "number": "rlvlm_rewards.visual.answers:Number",
    "count": "rlvlm_rewards.visual.answers:Count",
    "grounding": "rlvlm_rewards.visual.geometry:Grounding",
    "points": "rlvlm_rewards.visual.geometry:Points",
    "polygon": "rlvlm_rewards.visual.geometry:Polygon",
    "ocr": "rlvlm_rewards.visual.text:OCR",
    "ordering": "rlvlm_rewards.visual.sequences:Ordering",
    "permutation": "rlvlm_rewards.visual.sequences:Permutation",
    "grid_path": "rlvlm_rewards.visual.sequences:GridPath",
    "chart_table": "rlvlm_rewards.visual.tables:ChartTable",
    "math": "rlvlm_rewards.math:Math",
    "judge": "rlvlm_rewards.judge:Judge",
    "code": "rlvlm_rewards.code:Code",
    "format": "rlvlm_rewards.shape:Format",
    "language": "rlvlm_rewards.shape:Language",
    "repetition": "rlvlm_rewards.shape:Repetition",
    "tool_bonus": "rlvlm_rewards.shape:ToolBonus",
}

# These end on their own whatever the response, so that a slow answer is wrong and not a failure (see `keeps_time`).
KEEP_TIME = frozenset({"math", "judge", "code"})
