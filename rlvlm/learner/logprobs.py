"""Log-probabilities and entropies of the trained tokens of a row, the vocabulary materialised for a chunk at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from rlvlm.records import Row


class RowLogProbs(nn.Module):
    """The policy as the learner sees it: a packed row in, log-probs of its N trained tokens out.

    They are those of the distribution that the engine samples from: after `temperature`, and with `banned` token ids
    taken out. chunk: tokens whose logits exist at a time (recomputed in backward).
    """

    def __init__(self, policy: PreTrainedModel, temperature: float, banned: Sequence[int], chunk: int) -> None:
        super().__init__()
        self.policy = policy
        self._temperature = temperature
        self._banned = list(banned)
        self._chunk = chunk

    def forward(self, row: Row) -> tuple[torch.Tensor, torch.Tensor]:
        """(logp_N, entropy_N) in float32, in nats, for the positions where `row.trained_T` is True, in their order."""
        hidden_TH = self.policy.model(
            input_ids=row.input_ids_T[None], position_ids=row.position_ids, use_cache=False, **row.images
        ).last_hidden_state[0]
        # The state at t-1 predicts the token at t. A row's first token is a prompt token, so t-1 never leaves the
        # sequence.
        predicts_N = row.trained_T.nonzero()[:, 0]
        chunks = zip(
            hidden_TH[predicts_N - 1].split(self._chunk), row.input_ids_T[predicts_N].split(self._chunk), strict=True
        )
        parts = [checkpoint(self._chunk_logp, hidden, target, use_reentrant=False) for hidden, target in chunks]
        logp, entropy = zip(*parts, strict=True)
        return torch.cat(logp), torch.cat(entropy)

    def _chunk_logp(self, hidden_NH: torch.Tensor, target_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits_NV = self.policy.lm_head(hidden_NH).float() / self._temperature
        if self._banned:
            logits_NV = logits_NV.index_fill(1, torch.tensor(self._banned, device=logits_NV.device), -torch.inf)
        logp_NV = logits_NV.log_softmax(-1)
        entropy_N = -(logp_NV.exp() * logp_NV.masked_fill(logp_NV == -torch.inf, 0.0)).sum(-1).detach()
        return logp_NV.gather(1, target_N[:, None])[:, 0], entropy_N


def sum_by_segment(logp_N: torch.Tensor, row: Row) -> torch.Tensor:
    """log pi(y|x) of each of the row's S responses: logp_S."""
    responses = row.advantage_S.numel()
    return logp_N.new_zeros(responses).index_add(0, row.segment_T[row.trained_T], logp_N)
