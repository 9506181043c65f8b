"""Train a model of any family: what every training worker runs.

Plain PyTorch in one process or in a process group; `on_ray/train.py` starts the group on Ray.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tiger.core.artifacts import open_artifact
from tiger.core.storage import Folder
from tiger.models.base import ModelConfig, ModelData, StoredData, load_family
from tiger.training.job import TrainingJob
from tiger.training.loop import Callbacks, FitResult
from tiger.training.weights import save_training_result


def fit_model(
    config: ModelConfig, data: ModelData, *, device: torch.device, callbacks: Callbacks | None = None
) -> tuple[nn.Module, FitResult]:
    """Build and train the model of a configuration; return it with the best weights, in eval mode.

    Raises:
        HealthError: the loss is not finite, or what the family finds wrong with the data.
    """
    family = load_family(config)
    torch.manual_seed(config.seed)
    module: nn.Module = family.build(config, data)
    result: FitResult = family.train(module, config, data, device=device, callbacks=callbacks)
    return module.eval(), result


@dataclass(frozen=True)
class ModelJob(TrainingJob):
    """Training of a model on the artifacts that its family reads; the weights are written to `target`."""

    config: ModelConfig
    inputs: dict[str, Folder]
    """Folders of the artifacts of `ModelConfig.inputs`, by kind."""
    target: Folder

    def run(self, device: torch.device, callbacks: Callbacks) -> dict[str, Any]:
        """Train; return the best validation metrics."""
        data = StoredData({kind: open_artifact(folder, kind) for kind, folder in self.inputs.items()})
        module, result = fit_model(self.config, data, device=device, callbacks=callbacks)
        return save_training_result(module, result, self.target)
