"""Compute devices of a process: CUDA GPUs or the CPU.

Ray also counts Apple and Intel GPUs, which support neither NCCL nor our CUDA code; they are not used.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch

PRETEND = "TIGER_PRETEND_GPUS"
"""Environment variable for tests of placement: number of GPUs to report as usable; work on them runs on CPUs."""


def pretended_gpus() -> int:
    """Return the number of simulated GPUs of this machine; 0 outside of tests."""
    value = os.environ.get(PRETEND, "")
    return int(value) if value.isdecimal() else 0


def usable_gpus() -> int:
    """Return the number of GPUs that this process can use through CUDA."""
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
