"""Attention of packed rows against attention written out, and inside a model against a model left alone."""

import copy
import math

import pytest
import torch
from tiny_policy import build
from torch import nn

from rlvlm.learner.attention import PACKED, Sequences, _attention, packed, use_packed_attention

_LENGTHS = (7, 1, 30, 12)


def _segments(lengths: tuple[int, ...] = _LENGTHS) -> torch.Tensor:
    return torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))


def _written_out(query, key, value, scaling, window):
    """softmax(q k / s) v, token by token, in float64: [1, T, heads, values]."""
    segment_T = _segments()
    share = query.shape[1] // key.shape[1]
    q, k, v = query[0].double(), key[0].double(), value[0].double()
    attended = torch.zeros(segment_T.numel(), q.shape[0], v.shape[-1], dtype=torch.float64)
    for t in range(segment_T.numel()):
        seen = [s for s in range(t + 1) if segment_T[s] == segment_T[t] and t - s < window]
        for head in range(q.shape[0]):
            scores = k[head // share, seen] @ q[head, t] * scaling
            p = (scores - scores.max()).exp()
            attended[t, head] = (p / p.sum()) @ v[head // share, seen]
    return attended[None]


_CASES = {
    "plain": dict(heads=(4, 4), width=(16, 16)),
    "grouped": dict(heads=(4, 2), width=(16, 16)),
    "wide keys": dict(heads=(2, 2), width=(24, 16)),
    "wide values": dict(heads=(2, 2), width=(16, 24)),
    "window": dict(heads=(4, 2), width=(16, 16), window=5),
    "scaled": dict(heads=(2, 2), width=(16, 16), scaling=0.7),
}


@pytest.mark.parametrize("case", _CASES.values(), ids=_CASES.keys())
def test_against_attention_written_out(case):
    g = torch.Generator().manual_seed(0)
    tokens, (heads, kv_heads), (keys, values) = sum(_LENGTHS), case["heads"], case["width"]

    def drawn(heads: int, width: int) -> torch.Tensor:
        return torch.randn(1, tokens, heads, width, generator=g).transpose(1, 2).requires_grad_()

    inputs = drawn(heads, keys), drawn(kv_heads, keys), drawn(kv_heads, values)
    weights = torch.randn(1, tokens, heads, values, generator=g)
    scaling, window = case.get("scaling"), case.get("window")
    found, _ = _attention(
        nn.Module(), *inputs, Sequences.of(_segments()), scaling=scaling, sliding_window=window, position_ids=None
    )
    expected = _written_out(*inputs, scaling or 1 / math.sqrt(keys), window or tokens)
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=0)
    for ours, theirs in zip(
        torch.autograd.grad((found * weights).sum(), inputs),
        torch.autograd.grad((expected * weights).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=0)


def test_where_sequences_lie():
    row = Sequences.of(torch.tensor([0, 0, 0, 1, 2, 2]))
    assert row.lengths == (3, 1, 2)
    assert row.ends_S1.tolist() == [0, 3, 4, 6] and row.ends_S1.dtype == torch.int32


# --- in a model ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models():
    """(left alone, with the attention of rows)"""
    plain, _ = build(spread=0.25)
    ours = copy.deepcopy(plain)
    use_packed_attention(ours)
    return plain, ours


def _inputs(lengths: tuple[int, ...] = _LENGTHS, seed: int = 0) -> dict:
    ids = torch.randint(290, 330, (1, sum(lengths)), generator=torch.Generator().manual_seed(seed))
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    return {"input_ids": ids, "position_ids": positions, "use_cache": False}


def _logits(model, lengths: tuple[int, ...] = _LENGTHS, seed: int = 0) -> torch.Tensor:
    with packed(_segments(lengths)):
        return model(**_inputs(lengths, seed)).logits


def test_only_the_language_model_has_it(models):
    plain, ours = models
    assert ours.config.text_config._attn_implementation == PACKED
    assert ours.config.vision_config._attn_implementation == plain.config.vision_config._attn_implementation == "sdpa"
    assert PACKED not in str(ours.config.to_dict())  # a checkpoint does not ask for it


@torch.no_grad()
def test_a_row_is_as_under_transformers_block_mask(models):
    plain, ours = models
    torch.testing.assert_close(_logits(ours), plain(**_inputs()).logits, atol=2e-5, rtol=0)


@torch.no_grad()
def test_sequences_are_kept_apart_by_their_segments_and_not_by_positions(models):
    """Two halves of one run of positions are two sequences if the row says so."""
    _, ours = models
    apart = _inputs((20, 20))
    with packed(_segments((20, 20))):
        row = ours(**apart | {"position_ids": torch.arange(40)[None]}).logits
    second = ours(input_ids=apart["input_ids"][:, 20:], position_ids=torch.arange(20, 40)[None], use_cache=False).logits
    torch.testing.assert_close(row[:, 20:], second, atol=2e-5, rtol=0)


@torch.no_grad()
def test_outside_a_row_the_model_is_as_it_was(models):
    """Evaluation, generation with a cache, padded batches."""
    plain, ours = models
    ids = _inputs()["input_ids"]
    padded = {"input_ids": ids[:, :40].reshape(2, 20), "attention_mask": torch.ones(2, 20, dtype=torch.long)}
    padded["attention_mask"][0, :6] = 0
    assert torch.equal(ours(**padded, use_cache=False).logits, plain(**padded, use_cache=False).logits)
    drawn = [m.generate(input_ids=ids[:, :9], max_new_tokens=5, do_sample=False) for m in models]
    assert torch.equal(*drawn)


def test_gradient_checkpointing_recomputes_with_the_row_it_began_with(models):
    """Two rows forward, then backward of both: the second has other sequences, and the block is closed."""
    _, ours = models

    def gradients(model) -> dict[str, torch.Tensor]:
        model.zero_grad()
        first, second = _logits(model), _logits(model, (25, 25), seed=1)
        (first.square().mean() + second.square().mean()).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    expected = gradients(ours)
    saving = copy.deepcopy(ours)
    saving.gradient_checkpointing_enable()
    saving.train()
    found = gradients(saving)
    assert found.keys() == expected.keys() and len(found) > 20
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-7, rtol=1e-5)


def test_the_tokens_squared_are_never_there(models):
    """Nothing that autograd keeps has the tokens of the row twice."""
    _, ours = models
    tokens, kept = sum(_LENGTHS), []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        _logits(ours)
    assert len(kept) > 50
    assert [shape for shape in kept if shape.count(tokens) > 1] == []
