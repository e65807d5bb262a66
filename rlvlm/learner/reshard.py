"""The state of an optimizer that other ranks, or another ZeRO stage, wrote: cut anew for the ranks that are here now.

DeepSpeed lays the parameters of a rank end to end in flat tensors, master weights and Adam's moments alike, and writes
one file a rank. Both sides are told here by where each piece of a parameter lies; nothing is written on the way, and no
more than one parameter is whole at a time.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

_MASTER = "fp32"


@dataclass(frozen=True, slots=True)
class _Piece:
    """`length` elements of a parameter: from `start` of the flat tensor `flat`, from `offset` of the parameter."""

    name: str
    flat: int
    start: int
    offset: int
    length: int


class SavedState:
    """What all ranks saved to `folder`. steps: how many steps the optimizer had made; None if none at all."""

    def __init__(self, folder: Path, ranks: int, zero_stage: int) -> None:
        self._kinds: list[list[dict[str, torch.Tensor]]] = []  # rank -> flat tensor -> kind -> the tensor
        self._pieces: dict[str, list[tuple[int, _Piece]]] = defaultdict(list)  # parameter -> rank and piece, in order
        self._model = _load(folder / _model_file(0, zero_stage))
        for rank in range(ranks):
            state = _load(folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")["optimizer_state_dict"]
            if zero_stage == 3:
                flats, adam = state["fp32_flat_groups"], state["optimizer_state_dict"]["state"]
                pieces = _sharded_pieces(self._model["param_shapes"], rank, ranks)
            else:
                flats, adam = state["single_partition_of_fp32_groups"], state["base_optimizer_state"]["state"]
                pieces = _partition_pieces(state["param_slice_mappings"])
            self._kinds.append([{_MASTER: flat, **adam.get(i, {})} for i, flat in enumerate(flats)])
            for piece in pieces:
                self._pieces[piece.name].append((rank, piece))
        self.steps = next((kinds["step"] for kinds in self._kinds[0] if "step" in kinds), None)

    @property
    def moments(self) -> list[str]:
        return [] if self.steps is None else [kind for kind in self._kinds[0][0] if kind not in (_MASTER, "step")]

    def whole(self, name: str, kind: str) -> torch.Tensor:
        """The parameter's master weights or a moment, flat, float32."""
        return torch.cat(
            [self._kinds[r][p.flat][kind].narrow(0, p.start, p.length) for r, p in self._pieces[name]]
        ).float()

    def buffer(self, name: str) -> torch.Tensor:
        """A tensor of the model that is no parameter, the same on all ranks."""
        value: torch.Tensor = self._model["module"][name]
        return value


def take_over(engine: Any, saved: SavedState) -> None:
    """Puts master weights, weights, moments, step counts and buffers into a DeepSpeed engine. Collective. Parameters
    that do not train keep what they have."""
    optimizer = engine.optimizer
    stage3 = hasattr(optimizer, "fp32_partitioned_groups_flat")
    flats = optimizer.fp32_partitioned_groups_flat if stage3 else optimizer.single_partition_of_fp32_groups
    names = {parameter: name for name, parameter in engine.module.named_parameters()}
    for flat, pieces in zip(flats, _own_pieces(optimizer, names, stage3), strict=True):
        state = {kind: torch.zeros_like(flat) for kind in saved.moments}
        for piece in pieces:
            for kind, target in ((_MASTER, flat.data), *state.items()):
                whole = saved.whole(piece.name, kind)
                target.narrow(0, piece.start, piece.length).copy_(whole.narrow(0, piece.offset, piece.length))
        if saved.steps is not None:
            optimizer.optimizer.state[flat] = {"step": saved.steps.clone(), **state}
    for parameter, name in names.items():
        if parameter.requires_grad:
            _set(parameter, saved.whole(name, _MASTER))
    kept = engine.module.state_dict().keys()
    for name, buffer in engine.module.named_buffers():
        if name in kept:
            buffer.copy_(saved.buffer(name))


def _model_file(rank: int, zero_stage: int) -> str:
    return f"{f'zero_pp_rank_{rank}_' if zero_stage == 3 else ''}mp_rank_00_model_states.pt"


def _load(path: Path) -> Any:
    """Tensors stay on the disk until they are read. The file is our own: it holds DeepSpeed's classes."""
    return torch.load(path, map_location="cpu", mmap=True, weights_only=False)


def _partition_pieces(mappings: list[dict[str, Any]]) -> Iterator[_Piece]:
    """Stages 1 and 2: a rank has a stretch of all parameters laid end to end. Where in a parameter a piece begins is
    not written; the pieces of a parameter are in the order of the ranks."""
    for flat, mapping in enumerate(mappings):
        for name, address in mapping.items():
            yield _Piece(name, flat, address.start, 0, address.numel)


def _sharded_pieces(shapes: list[dict[str, torch.Size]], rank: int, ranks: int) -> Iterator[_Piece]:
    """Stage 3: every parameter is cut in equal parts, the last one filled up."""
    for flat, group in enumerate(shapes):
        start = 0
        for name, shape in group.items():
            whole = math.prod(shape)
            part = math.ceil(whole / ranks)
            length = max(0, min(part, whole - rank * part))
            if length:
                yield _Piece(name, flat, start, rank * part, length)
            start += part


def _own_pieces(optimizer: Any, names: dict[torch.nn.Parameter, str], stage3: bool) -> Iterator[list[_Piece]]:
    """For each flat tensor of this rank's optimizer."""
    if stage3:
        ranks, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
        shapes = [{names[p]: p.ds_shape for p in group} for group in optimizer.fp16_groups]
        pieces = list(_sharded_pieces(shapes, rank, ranks))
        yield from ([piece for piece in pieces if piece.flat == flat] for flat in range(len(shapes)))
        return
    for flat, group in enumerate(optimizer.bit16_groups):
        mapped = [(names[p], p._hp_mapping) for p in group if p._hp_mapping is not None]
        yield [
            _Piece(name, flat, m.hp_fragment_address.start, m.lp_fragment_address.start, m.hp_fragment_address.numel)
            for name, m in mapped
        ]


def _set(parameter: torch.nn.Parameter, value: torch.Tensor) -> None:
    """The weights that the model computes with."""
    if not hasattr(parameter, "ds_id"):
        parameter.data.copy_(value.view(parameter.shape))
        return
    from deepspeed import zero

    with zero.GatheredParameters([parameter], modifier_rank=0):
        parameter.data.copy_(value.view(parameter.shape))
