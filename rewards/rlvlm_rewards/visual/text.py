"""A reward for reading text off a picture."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from typing import Literal

from rapidfuzz.distance import Levenshtein

from rlvlm_rewards.records import Sample, Score
from rlvlm_rewards.visual.reading import MOST, answer_of, stream_safe, unparsable

_LONGEST = 20_000  # characters of a reference: a dense page has 5,000, and the distance takes quadratic time


@dataclass(frozen=True)
class OCR:
    """1 - d / max(m, n): d the Levenshtein distance of answer and reference, m and n their lengths in characters (NFC).

    threshold: a similarity below it is worth 0. Two unrelated texts of one language have a similarity of 0.2 or 0.3, so
    without it copying the question would pay. 0.5 is that of ANLS (Biten et al. 2019, Scene Text VQA); 0 is none.
    ignore_case: compare case folded. whitespace: `fold` runs of it to one blank, `ignore` or `keep` it.
    An answer of more than ten times the reference's length is worth 0. References have at most 20,000 characters.
    """

    threshold: float = 0.5
    ignore_case: bool = False
    whitespace: Literal["fold", "ignore", "keep"] = "fold"

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"threshold is {self.threshold!r}; give a similarity from 0 to 1")
        if self.whitespace not in ("fold", "ignore", "keep"):
            raise ValueError(f"whitespace is {self.whitespace!r}; give 'fold', 'ignore' or 'keep'")

    def __call__(self, sample: Sample) -> Score:
        reference = self.prepare(sample.answer, 2 * _LONGEST)
        if not reference or len(reference) > _LONGEST:
            return unparsable(sample, f"it is not a text of 1 to {_LONGEST} characters; mend the row or its reward")
        answer = self.prepare(answer_of(sample), (MOST + 1) * len(reference))
        if not answer or len(answer) > MOST * len(reference):
            return Score(value=0.0)
        similarity = Levenshtein.normalized_similarity(answer, reference)
        return Score(value=similarity if similarity >= self.threshold else 0.0)

    def prepare(self, text: str, most: int) -> str:
        """The text as it is compared; an empty one if it has more than `most` characters or cannot be normalised in
        linear time."""
        text = text.strip()
        if self.whitespace != "keep":
            text = ("" if self.whitespace == "ignore" else " ").join(text.split())
        if len(text) > most or not stream_safe(text):
            return ""
        text = unicodedata.normalize("NFC", text)
        return unicodedata.normalize("NFC", text.casefold()) if self.ignore_case else text
