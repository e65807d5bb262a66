"""Responses -> packed rows, dealt to the ranks: sequences end to end, no padding, pictures by the forward's own keyword
tensors, every row and every rank with about the same to do.

Sequences keep apart by `Row.segment_T` (rlvlm/learner/attention.py) and by their positions, which restart with each
(tests/learner/test_packing.py holds packed to separate).
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from transformers import PretrainedConfig

from rlvlm.learner.objective import Rewarded
from rlvlm.policy.prompts import Prompt, PromptEncoder, stack_images
from rlvlm.recipe.schema import Learner, Recipe
from rlvlm.records import Batch, Minibatch, Row, Trajectory


@dataclass(frozen=True, slots=True)
class SequenceCost:
    """What sequences cost, in multiply-adds of a forward pass: `token` for each token, `pair` for each pair of tokens
    of a sequence, `patch` and `patch_pair` for those of a picture. From the sizes in a config, so that the process that
    packs needs no model; rough, which is enough to compare sequences (rlvlm/learner/flops.py counts a step's)."""

    token: float
    pair: float
    patch: float
    patch_pair: float

    @classmethod
    def of(cls, config: PretrainedConfig) -> SequenceCost:
        text, vision = config.get_text_config(), _vision(config)
        hidden, layers = text.hidden_size, text.num_hidden_layers
        heads = text.num_attention_heads
        head = getattr(text, "head_dim", None) or hidden // heads
        query, value = getattr(text, "qk_head_dim", None) or head, getattr(text, "v_head_dim", None) or head
        seen = getattr(vision, "embed_dim", None) or vision.hidden_size
        seen_layers = getattr(vision, "depth", None) or vision.num_hidden_layers
        seen_width = getattr(vision, "intermediate_size", None) or 4 * seen
        return cls(
            token=layers * (4 * hidden**2 + 3 * hidden * _active_width(text)) + hidden * text.vocab_size,
            pair=layers * heads * (query + value) / 2,  # of a pair's two directions only one is attended to
            patch=seen_layers * (4 * seen**2 + 2 * seen * seen_width),
            patch_pair=seen_layers * 2 * seen,
        )

    def __call__(self, lengths: Iterable[int], patches: Iterable[int]) -> float:
        """lengths: of sequences, in tokens. patches: of their pictures."""
        text = sum(self.token * n + self.pair * n**2 for n in lengths)
        return text + sum(self.patch * n + self.patch_pair * n**2 for n in patches)


def _vision(config: PretrainedConfig) -> PretrainedConfig:
    """The vision tower's part of a config, which may stand in a part of it (Qwen2.5-Omni's thinker)."""
    parts = (config, *(getattr(config, key) for key in config.sub_configs))
    return next(part.vision_config for part in parts if hasattr(part, "vision_config"))


def _active_width(text: PretrainedConfig) -> int:
    """Of a layer's feed-forward part, the width that one token goes through."""
    chosen = getattr(text, "num_experts_per_tok", None)
    if not chosen:
        return int(getattr(text, "intermediate_size", None) or text.ffn_dim)
    return int(text.moe_intermediate_size * (chosen + (getattr(text, "n_shared_experts", None) or 0)))


@dataclass(frozen=True, slots=True)
class _Sequence:
    """trajectory: None for one that is there for its picture alone, or to fill a rank's turn."""

    prompt: Prompt
    trajectory: Trajectory | None
    advantage: float
    group_size: int
    cost: float

    @property
    def length(self) -> int:
        return len(self.prompt.input_ids) + (self.trajectory.length if self.trajectory else 0)


def pack(rewarded: Sequence[Rewarded], encoder: PromptEncoder, recipe: Recipe, seed: int) -> Batch:
    """Deals the groups into minibatches (samples of a prompt stay together), and each into rows for the ranks.

    A row has at most `learner.row_tokens` tokens, or one sequence where that is longer. Responses that could not be
    scored are left out. The same seed gives the same deal.
    """
    order = list(rewarded)
    random.Random(seed).shuffle(order)
    cost, blank = SequenceCost.of(encoder.config), cache(encoder.blank)
    packed = []
    for part in (order[i :: recipe.rl.minibatches] for i in range(recipe.rl.minibatches)):
        sequences = [s for group in part for s in _sequences(group, encoder, cost)]
        if sequences:
            bins = _balanced(sequences, recipe.learner.ranks, recipe.learner.row_tokens)
            pictured = _needs_pictures(sequences, recipe.learner)
            rows = [_row([*members, *_fillers(members, pictured, blank)], encoder) for members in bins]
            packed.append(Minibatch(_by_rank(rows, recipe.learner.ranks), len(part), len(sequences)))
    return Batch(tuple(packed))


def _sequences(rewarded: Rewarded, encoder: PromptEncoder, cost: SequenceCost) -> list[_Sequence]:
    prompt = encoder.prompt(rewarded.group.task)
    size = sum(advantage is not None for advantage in rewarded.advantage_K)
    patches = encoder.family.patches(encoder.config, prompt.images)
    return [
        _Sequence(prompt, one, advantage, size, cost([len(prompt.input_ids) + one.length], patches))
        for one, advantage in zip(rewarded.group.trajectories, rewarded.advantage_K, strict=True)
        if advantage is not None
    ]


def _balanced(sequences: Sequence[_Sequence], ranks: int, row_tokens: int) -> list[list[_Sequence]]:
    """As few rows as hold everything, the same number for every rank, of about the same cost; dearest first. Rows stay
    empty only where there are more of them than sequences."""
    alone = sum(s.length > row_tokens for s in sequences)
    shared = sum(s.length for s in sequences if s.length <= row_tokens)
    turns = math.ceil((alone + math.ceil(shared / row_tokens)) / ranks)
    while (bins := _spread(sequences, turns * ranks, row_tokens)) is None:
        turns += 1
    return sorted(bins, key=lambda members: -sum(s.cost for s in members))


def _spread(sequences: Sequence[_Sequence], rows: int, row_tokens: int) -> list[list[_Sequence]] | None:
    """The dearest sequence first, each to the cheapest row that has room; None if there is not room enough. Where room
    is no matter the dearest row is at most 4/3 of the best possible (Graham 1969)."""
    bins: list[list[_Sequence]] = [[] for _ in range(rows)]
    costs, lengths = [0.0] * rows, [0] * rows
    for sequence in sorted(sequences, key=lambda s: -s.cost):
        fitting = [i for i in range(rows) if not bins[i] or lengths[i] + sequence.length <= row_tokens]
        if not fitting:
            return None
        cheapest = min(fitting, key=lambda i: costs[i])
        bins[cheapest].append(sequence)
        costs[cheapest] += sequence.cost
        lengths[cheapest] += sequence.length
    return bins


def _needs_pictures(sequences: Sequence[_Sequence], learner: Learner) -> bool:
    """Whether each row of a minibatch has to go through the vision tower.

    Several ranks: all of them or none, or they wait for each other in different collectives. And in DeepSpeed 0.19 a
    parameter that a step's first pass does not reach keeps its gradient of the step before under ZeRO-3, and later
    passes add to that; with an offloaded optimizer only a step's last pass hands a parameter's gradient over.
    """
    if learner.zero_stage == 3 or learner.offload != "none":
        return True  # the step before may have had pictures if this one has none
    return learner.ranks > 1 and any(s.prompt.images for s in sequences)


def _fillers(members: Sequence[_Sequence], pictured: bool, blank: Callable[[], Prompt]) -> list[_Sequence]:
    """What a row needs to do its part, never trained on: the blank picture if it has to have one and has none, after
    the text; a token if it has nothing at all."""
    if pictured and not any(s.prompt.images for s in members):
        return [_Sequence(blank(), None, 0.0, 0, 0.0)]
    if not members:
        whole = blank()
        token = Prompt(whole.text_ids[:1], whole.input_ids[:1], whole.position_ids[:, :1], {})
        return [_Sequence(token, None, 0.0, 0, 0.0)]
    return []


def _by_rank(rows: Sequence[Row], ranks: int) -> tuple[tuple[Row, ...], ...]:
    """Rows of one turn, which the ranks compute together, are neighbours in cost; the order of the ranks turns round
    each time, so that none gets the dearest always."""
    turns = [rows[start : start + ranks] for start in range(0, len(rows), ranks)]
    turns = [turn if n % 2 == 0 else turn[::-1] for n, turn in enumerate(turns)]
    return tuple(zip(*turns, strict=True))


def _row(members: Sequence[_Sequence], encoder: PromptEncoder) -> Row:
    ids: list[int] = []
    segments: list[int] = []
    positions: list[torch.Tensor] = []
    trained: list[bool] = []
    logp: list[float] = []
    for s, member in enumerate(members):
        prompt = member.prompt
        ids += prompt.input_ids
        segments += [s] * member.length
        positions.append(prompt.position_ids)
        trained += [False] * len(prompt.input_ids)
        logp += [0.0] * len(prompt.input_ids)
        if member.trajectory is not None:
            ids += member.trajectory.response_ids
            positions.append(encoder.family.continued(prompt.position_ids, member.trajectory.length))
            trained += [segment.trained for segment in member.trajectory.segments for _ in segment.token_ids]
            logp += member.trajectory.engine_logp_T
    responses = [member for member in members if member.trajectory is not None]
    return Row(
        input_ids_T=torch.tensor(ids),
        segment_T=torch.tensor(segments),
        position_ids=torch.cat(positions, dim=1),
        trained_T=torch.tensor(trained),
        advantage_S=torch.tensor([member.advantage for member in responses]),
        group_size_S=torch.tensor([member.group_size for member in responses], dtype=torch.int64),
        engine_logp_T=torch.tensor(logp),
        images=stack_images([member.prompt.images for member in members]),
        routing_TLK=_routing(members),
    )


def _routing(members: Sequence[_Sequence]) -> torch.Tensor | None:
    """The engine's choice of experts, end to end; free where it was not recorded, as at a sequence's last token, which
    the engine sampled and never read."""
    recorded = [m.trajectory.routing_TLK if m.trajectory else None for m in members]
    shape = next((one.shape[1:] for one in recorded if one is not None), None)
    if shape is None:
        return None
    parts = []
    for member, one in zip(members, recorded, strict=True):
        part_TLK = torch.full((member.length, *shape), -1, dtype=torch.int16)
        if one is not None:
            part_TLK[: len(one)] = torch.from_numpy(one)
        parts.append(part_TLK)
    return torch.cat(parts)


def balance(batch: Batch, encoder: PromptEncoder) -> float:
    """What all rows cost, over what each turn's dearest row costs on every rank: 1 if no rank waits for another."""
    cost = SequenceCost.of(encoder.config)
    done = waited = 0.0
    for minibatch in batch.minibatches:
        for turn in zip(*minibatch.rows, strict=True):
            patches = (encoder.family.patches(encoder.config, row.images) for row in turn)
            costs = [cost(row.segment_T.bincount().tolist(), n) for row, n in zip(turn, patches, strict=True)]
            done += sum(costs)
            waited += len(costs) * max(costs)
    return done / waited if waited else 1.0
