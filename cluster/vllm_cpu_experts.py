"""Data- and expert-parallel layouts on CPUs: what vLLM (0.32) lacks there, and without which the first
iteration of a group ends it.

Its communicator can't gather and scatter rows of which the ranks have unequally many. Its kernel takes the
numbers that experts have in the model for those that they have on the rank.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.distributed

from cluster import vllm_api


def spread_experts() -> None:
    """Add it, in this process; any number of times."""
    communicator_class, experts_class = vllm_api.CpuCommunicator, vllm_api.CPUUnquantizedExperts
    if "all_gatherv" in vars(communicator_class):
        return
    communicator_class.all_gatherv = _all_gatherv
    communicator_class.reduce_scatterv = _reduce_scatterv
    stock = experts_class.apply
    parameters = inspect.signature(stock)

    def apply(*args: Any, **kwargs: Any) -> None:
        call = parameters.bind(*args, **kwargs)
        given = call.arguments
        if given["expert_map"] is not None:
            given["topk_weights"], given["topk_ids"] = own_experts(
                given["topk_weights"], given["topk_ids"], given["expert_map"]
            )
        stock(*call.args, **call.kwargs)

    experts_class.apply = apply


def own_experts(
    weights: torch.Tensor, ids: torch.Tensor, expert_map: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """What a rank adds to each token: weights and the rank's own numbers of the experts chosen, both (tokens,
    chosen). Experts of other ranks weigh nothing.

    Args:
        expert_map: (experts,): the rank's number of each expert of the model, -1 for one of another rank.
    """
    own = expert_map[ids.long()]
    return weights.masked_fill(own < 0, 0.0), own.clamp(min=0).to(ids.dtype)


def _all_gatherv(
    communicator: Any, input_: torch.Tensor | list[torch.Tensor], dim: int = 0, sizes: list[int] | None = None
) -> torch.Tensor | list[torch.Tensor]:
    """The rows of all ranks in their order, (sum(sizes), ...); of each tensor, if there are several."""
    if not isinstance(input_, torch.Tensor):
        return [_gathered(communicator, one, dim, sizes) for one in input_]
    return _gathered(communicator, input_, dim, sizes)


def _gathered(communicator: Any, own: torch.Tensor, dim: int, sizes: list[int] | None) -> torch.Tensor:
    if dim != 0:
        raise NotImplementedError("rows are exchanged, not columns")
    sizes = sizes or [len(own)] * communicator.world_size
    most = max(sizes)
    # gloo sends equally many: the shorter ones are filled up.
    padded = own.new_zeros((most, *own.shape[1:]))
    padded[: len(own)] = own
    everybodys = own.new_empty((communicator.world_size * most, *own.shape[1:]))
    torch.distributed.all_gather_into_tensor(everybodys, padded, group=communicator.device_group)
    return torch.cat([everybodys[rank * most :][:size] for rank, size in enumerate(sizes)])


def _reduce_scatterv(
    communicator: Any, input_: torch.Tensor, dim: int = -1, sizes: list[int] | None = None
) -> torch.Tensor:
    """Of the sum over all ranks, (sum(sizes), ...), this rank's rows, (sizes[rank], ...)."""
    if dim not in (0, -input_.dim()):
        raise NotImplementedError("rows are exchanged, not columns")
    sizes = sizes or [len(input_) // communicator.world_size] * communicator.world_size
    total = input_.contiguous().clone()
    torch.distributed.all_reduce(total, group=communicator.device_group)
    first = sum(sizes[: communicator.rank_in_group])
    return total[first : first + sizes[communicator.rank_in_group]]
