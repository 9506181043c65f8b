"""What the workers of a training run: a typed job, sent to each of them, in one process or in a process group."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import Any

import torch

from tiger.core.config import Config
from tiger.core.storage import Folder
from tiger.training.loop import Callbacks


@dataclass(frozen=True)
class TrainingJob(ABC):
    """Base of the jobs that `on_ray.train.train` runs on every worker.

    A subclass is a frozen dataclass that worker processes can import; it is pickled. Its fields are configurations,
    folders (pickled as URIs), and JSON values.
    """

    @abstractmethod
    def run(self, device: torch.device, callbacks: Callbacks) -> dict[str, Any]:
        """Train, and write the result; called on every worker of the process group.

        Args:
            device: where to compute.
            callbacks: callbacks for metrics and checkpoints.

        Returns:
            The metrics of the artifact, JSON values; those of rank 0 are used.
        """

    def identity(self) -> dict[str, Any]:
        """Return what determines the result, as JSON values: every field except `target`.

        Checkpoints of a job with another identity are rejected.
        """
        return {field.name: _plain(getattr(self, field.name)) for field in fields(self) if field.name != "target"}


def _plain(value: Any) -> Any:
    if isinstance(value, Config):
        return value.model_dump(mode="json")
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return value.uri if isinstance(value, Folder) else value
