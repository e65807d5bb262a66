"""Log-probabilities and entropies of the trained tokens of a row. The vocabulary is never materialised for a whole row:
a chunk of its tokens at a time, recomputed in backward, or on a GPU a tile of both at a time by TRL's fused kernel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeGuard

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from rlvlm.learner.attention import packed, use_packed_attention
from rlvlm.policy.family import family_of
from rlvlm.records import Row

Matrix = Callable[[torch.Tensor], torch.Tensor]

_TILE = 8192  # the fused kernel's share of the vocabulary
_NEVER = -1e9  # a logit of probability 0 in every dtype, whose product with 0 is 0: -inf would make entropies NaN


class RowLogProbs(nn.Module):
    """The policy as the learner sees it: a packed row in, log-probs of its N trained tokens out.

    They are those of the distribution that the engine samples from: after `temperature`, and with `banned` token ids
    taken out. chunk: tokens whose logits exist at a time. The policy's language model gets the attention of rows.
    """

    def __init__(self, policy: PreTrainedModel, temperature: float, banned: Sequence[int], chunk: int) -> None:
        super().__init__()
        use_packed_attention(policy)
        self.policy = policy
        self._family = family_of(policy.config, policy.config.name_or_path)
        self._temperature = temperature
        self._banned = list(banned)
        self._chunk = chunk

    def forward(self, row: Row) -> tuple[torch.Tensor, torch.Tensor]:
        """(logp_N, entropy_N) in float32, in nats, for the positions where `row.trained_T` is True, in their order. No
        gradient flows through the entropy. A row without trained tokens gives empty ones, which backward goes through
        all the same: its rank has to meet the others in the model."""
        # Processors give float32, and not every vision tower casts it to its own type.
        images = {k: v.to(self.policy.dtype) if v.is_floating_point() else v for k, v in row.images.items()}
        with packed(row.segment_T):
            hidden_TH = self._family.hidden(self.policy, replace(row, images=images))
        # The state at t-1 predicts the token at t. A sequence's first token is a prompt token, so t-1 never leaves the
        # sequence.
        predicts_N = row.trained_T.nonzero()[:, 0]
        hidden_NH, target_N = hidden_TH[predicts_N - 1], row.input_ids_T[predicts_N]
        head = self._family.head(self.policy)
        if hidden_NH.is_cuda and is_plain_matrix(head):
            return fused_logp(hidden_NH, target_N, head, self._temperature, self._banned)
        return _in_place_of_forward(head, self._in_chunks, hidden_NH, target_N)

    def _in_chunks(
        self, matrix: Matrix, hidden_NH: torch.Tensor, target_N: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        chunks = zip(hidden_NH.split(self._chunk), target_N.split(self._chunk), strict=True)
        parts = [checkpoint(self._chunk_logp, matrix, hidden, target, use_reentrant=False) for hidden, target in chunks]
        logp, entropy = zip(*parts, strict=True)
        return torch.cat(logp), torch.cat(entropy)

    def _chunk_logp(
        self, matrix: Matrix, hidden_NH: torch.Tensor, target_N: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        logits_NV = matrix(hidden_NH).float() / self._temperature
        if self._banned:
            logits_NV = logits_NV.index_fill(1, torch.tensor(self._banned, device=logits_NV.device), _NEVER)
        logp_NV = logits_NV.log_softmax(-1)
        with torch.no_grad():
            entropy_N = -(logp_NV.exp() * logp_NV).sum(-1)
        return logp_NV.gather(1, target_N[:, None])[:, 0], entropy_N


def _in_place_of_forward(module: nn.Module, function: Callable[..., Any], *arguments: Any) -> Any:
    """`function(module.forward, *arguments)` in a single call of the module. ZeRO-3 gathers a module's shards, all
    ranks together, when it is called: ranks with more chunks than others must not call it more often."""
    forward = module.forward
    module.forward = partial(function, forward)
    try:
        return module(*arguments)
    finally:
        module.forward = forward


def is_plain_matrix(head: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether the head is a matrix that is here: the fused kernel reads it without calling the module, which is what
    gathers ZeRO-3's shards and adds an adapter."""
    return type(head) is nn.Linear and not hasattr(head.weight, "ds_id")


def fused_logp(
    hidden_NH: torch.Tensor, target_N: torch.Tensor, head: nn.Linear, temperature: float, banned: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """(logp_N, entropy_N) by TRL's kernel: logits in tiles of 4,096 tokens by 8,192 ids, backward's sums in float32."""
    from trl.kernels import ChunkedLogProbFunction

    bias_V: torch.Tensor | None = head.bias
    if banned:
        bias_V = head.weight.new_zeros(head.out_features) if bias_V is None else bias_V
        bias_V = bias_V.index_fill(0, torch.tensor(banned, device=bias_V.device), _NEVER)
    logp_N, entropy_N, *_ = ChunkedLogProbFunction.apply(
        hidden_NH, head.weight, bias_V, target_N, temperature, _TILE, None, 1.0, ("entropy",)
    )
    return logp_N, entropy_N.detach()
