"""Attention over packed rows without a dense mask: every sequence attends to itself alone, whatever else is in a row.

transformers asks an attention implementation for two functions, of the mask and of the attention. The mask of ours,
made once per forward, is no tensor but where the sequences lie (`Sequences`), and it travels through the layers as a
mask would. So it is an argument of each layer like any other, and activation checkpointing recomputes a layer with the
row that it began with.

Nothing [T, T] exists. On a GPU in bfloat16 or float16 this is flash attention of variable lengths, elsewhere a loop of
sdpa over the sequences: on a CPU (one thread, forward and backward, heads of 32, sequences of 40 to 200 tokens) 4x as
fast as sdpa with the block mask in rows of 1,024 tokens, 12x at 4,096 and 35x at 8,192.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

PACKED = "rlvlm_packed"
_FLASH_HEAD = 256  # the widest head that flash attention takes; widths are multiples of 8
_FLASH_DTYPES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True)
class Sequences:
    """Where the sequences of a row lie. lengths: of each, in tokens; they fill the row. ends_S1: 0 and the running sum
    of the lengths, int32 on the row's device, as flash attention wants it."""

    lengths: tuple[int, ...]
    ends_S1: torch.Tensor

    @classmethod
    def of(cls, segment_T: torch.Tensor) -> Sequences:
        """segment_T: which sequence each token belongs to, as in `Row`."""
        _, length_S = segment_T.unique_consecutive(return_counts=True)
        return cls(tuple(length_S.tolist()), pad(length_S.cumsum(0), (1, 0)).to(torch.int32))


_row: ContextVar[Sequences | None] = ContextVar("row", default=None)


@contextmanager
def packed(segment_T: torch.Tensor) -> Iterator[None]:
    """Forward passes in this block take their tokens [1, T] for a packed row. Backward may come after the block."""
    token = _row.set(Sequences.of(segment_T))
    try:
        yield
    finally:
        _row.reset(token)


def use_packed_attention(model: PreTrainedModel) -> None:
    """Gives the language model this attention; the vision tower keeps its own. Outside a `packed` block the model
    computes as with sdpa."""
    AttentionInterface.register(PACKED, _attention)
    AttentionMaskInterface.register(PACKED, _mask)
    language = next(
        key for key in model.config.sub_configs if getattr(model.config, key) is model.config.get_text_config()
    )
    model.set_attn_implementation({language: PACKED})


def _mask(**keywords: Any) -> Sequences | torch.Tensor | None:
    row = _row.get()
    return row if row is not None else sdpa_mask(**keywords)


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Sequences | torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **keywords: Any,
) -> tuple[torch.Tensor, None]:
    """query [1, heads, T, D], key [1, kv heads, T, D], value [1, kv heads, T, Dv] -> [1, T, heads, Dv].

    There is no dropout in a row: pi and its reference are to be the same function.
    """
    if not isinstance(attention_mask, Sequences):
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **keywords)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    flash = query.is_cuda and query.dtype in _FLASH_DTYPES and query.shape[-1] <= _FLASH_HEAD
    attend = _flash if flash else _one_by_one
    # The kernels want all heads of the same width: zeros change no product, and what they add to the values is cut off.
    width, values = max(query.shape[-1], value.shape[-1]), value.shape[-1]
    width = -(-width // 8) * 8 if flash else width
    q, k, v = (pad(x, (0, width - x.shape[-1])) if x.shape[-1] < width else x for x in (query, key, value))
    return attend(q, k, v, attention_mask, scaling, sliding_window)[..., :values], None


def _flash(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, row: Sequences, scaling: float, window: int | None
) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    longest = max(row.lengths)
    q, k, v = (x[0].transpose(0, 1).contiguous() for x in (query, key, value))
    back = (-1 if window is None else window - 1, 0)  # tokens before and after the query's own
    attended = varlen_attn(
        q, k, v, row.ends_S1, row.ends_S1, longest, longest, scale=scaling, window_size=back, enable_gqa=True
    )
    assert isinstance(attended, torch.Tensor)
    return attended[None]


def _one_by_one(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, row: Sequences, scaling: float, window: int | None
) -> torch.Tensor:
    parts = zip(*(x.split(row.lengths, dim=2) for x in (query, key, value)), strict=True)
    attended = [_causal(q, k, v, scaling, window) for q, k, v in parts]
    return torch.cat(attended, dim=2).transpose(1, 2)


def _causal(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float, window: int | None
) -> torch.Tensor:
    """One sequence: each token attends to itself and what is before it, no farther back than `window` - 1."""
    length = query.shape[2]
    grouped = query.shape[1] != key.shape[1]
    if window is None or length <= window:
        return scaled_dot_product_attention(query, key, value, is_causal=length > 1, scale=scaling, enable_gqa=grouped)
    mask_TT = torch.ones(length, length, dtype=torch.bool, device=query.device).tril().triu(1 - window)
    return scaled_dot_product_attention(query, key, value, mask_TT, scale=scaling, enable_gqa=grouped)
