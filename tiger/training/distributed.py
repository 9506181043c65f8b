"""The process group of a training: rank, sums, and equal states; without a group, those of a single process."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tiger.core.errors import HealthError
from tiger.core.hashing import sha256


def rank() -> int:
    """Return this process's rank in the process group; 0 without one."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Return the number of processes in the process group; 1 without one."""
    return dist.get_world_size() if dist.is_initialized() else 1


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sum over the process group, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def broadcast(module: nn.Module) -> None:
    """Copy the parameters and buffers of rank 0 to every worker."""
    if dist.is_initialized():
        for tensor in module.state_dict().values():
            dist.broadcast(tensor, src=0)


def check_replicas_identical(module: nn.Module, name: str) -> None:
    """Check that all parameters and buffers are bitwise equal on all workers.

    Args:
        module: the module.
        name: the stage, for messages.

    Raises:
        HealthError: on every worker, if one differs; lists the tensors. DDP averages gradients only, so divergence
            would otherwise go unnoticed.
    """
    if not dist.is_initialized():
        return
    state = module.state_dict()
    device = next(iter(state.values())).device
    minimum = torch.tensor([_digest(tensor) for tensor in state.values()], device=device)
    maximum = minimum.clone()
    dist.all_reduce(minimum, dist.ReduceOp.MIN)
    dist.all_reduce(maximum, dist.ReduceOp.MAX)
    differing = [key for key, low, high in zip(state, minimum.tolist(), maximum.tolist(), strict=True) if low != high]
    if differing:
        raise HealthError(
            f"{name}: the workers' states diverged in {', '.join(differing[:5])} ({len(differing)} of {len(state)} "
            "tensors); something modifies the module outside of DDP gradients on some workers only"
        )


def _digest(tensor: Tensor) -> int:
    """Return 63 bits of the sha256 of a tensor's bytes."""
    content = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    return int(sha256(content)[:16], 16) >> 1
