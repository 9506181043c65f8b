"""Which devices a process may compute on: a GPU is what CUDA sees.

Ray also counts the GPUs of Apple and Intel machines, on which neither NCCL nor our CUDA code runs; they are not used.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch

PRETEND = "TIGER_PRETEND_GPUS"
"""Environment variable for tests of placement: so many GPUs are taken as usable; work placed on them runs on CPUs."""


def pretended_gpus() -> int:
    """Return the number of GPUs that a test pretends a machine has; 0 outside of tests."""
    value = os.environ.get(PRETEND, "")
    return int(value) if value.isdecimal() else 0


def usable_gpus() -> int:
    """Return how many GPUs this process can compute on with CUDA."""
    if pretended := pretended_gpus():
        return pretended
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def assigned_device(gpu_ids: Sequence[int | str]) -> torch.device:
    """Return the device for a process that was assigned these GPUs: the first of them, or the CPU if there are none.

    Ray sets CUDA_VISIBLE_DEVICES to the assigned GPUs, so that the first one is `cuda:0`. A process without an assigned
    GPU may still see all of the node's; it must not touch them.
    """
    if not gpu_ids or pretended_gpus():
        return torch.device("cpu")
    return torch.device("cuda")
