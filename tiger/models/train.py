"""Train a model of any family: what every training worker runs.

Plain PyTorch in one process or in a process group; `on_ray/train.py` starts the group on Ray.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tiger.core.artifacts import open_artifact
from tiger.core.errors import ConfigError
from tiger.core.storage import Folder
from tiger.models.base import ModelConfig, ModelData, StoredData, load_family
from tiger.models.warm_start import WarmStart
from tiger.semantic_ids.assignment import SemanticIds
from tiger.training.job import TrainingJob
from tiger.training.loop import Callbacks, FitResult
from tiger.training.weights import WEIGHTS, save_training_result

log = logging.getLogger(__name__)


def fit_model(
    config: ModelConfig,
    data: ModelData,
    *,
    device: torch.device,
    callbacks: Callbacks | None = None,
    start: Callable[[nn.Module], None] | None = None,
) -> tuple[nn.Module, FitResult]:
    """Build and train the model of a configuration; return it with the best weights, in eval mode.

    Args:
        config: the family and its options.
        data: what the family reads.
        device: where to compute.
        callbacks: callbacks for metrics and checkpoints.
        start: changes the weights before the first step.

    Raises:
        HealthError: the loss is not finite, or what the family finds wrong with the data.
    """
    family = load_family(config)
    torch.manual_seed(config.seed)
    module: nn.Module = family.build(config, data)
    if start is not None:
        start(module)
    result: FitResult = family.train(module, config, data, device=device, callbacks=callbacks)
    return module.eval(), result


def _take_weights(folder: Folder, config: ModelConfig, data: StoredData, module: nn.Module) -> None:
    """Give a module the weights of a trained one, item by item.

    Raises:
        ConfigError: the family cannot, or is another one.
    """
    start = WarmStart.open(folder)
    kind, family = start.model.manifest["config"]["kind"], load_family(config)
    if kind != config.kind or not hasattr(family, "warm_start"):
        raise ConfigError(
            f"warm_start: a model of kind {config.kind} cannot start from {start.model.home.uri} ({kind})"
        )
    trained = SemanticIds.read(start.model.inputs["semantic_ids"].folder)
    before = start.items_of(data.catalog.items_folder)
    before[before >= len(trained)] = -1  # appended since: without learned weights
    state = start.model.folder.read_tensors(WEIGHTS)
    taken = family.warm_start(module, state, config, trained, torch.from_numpy(before))
    log.info(
        "model: %d of %d tensors start from %s, with %s of %s items", taken, len(module.state_dict()),
        start.model.home.uri, f"{int((before >= 0).sum()):,}", f"{len(before):,}",
    )  # fmt: skip


@dataclass(frozen=True)
class ModelJob(TrainingJob):
    """Training of a model on the artifacts that its family reads; the weights are written to `target`."""

    config: ModelConfig
    inputs: dict[str, Folder]
    """Folders of the artifacts of `ModelConfig.inputs`, by kind."""
    target: Folder
    warm_start: Folder | None = None
    """A trained model, or an append to one, to start from; see `WarmStart.open`."""

    def run(self, device: torch.device, callbacks: Callbacks) -> dict[str, Any]:
        """Train; return the best validation metrics."""
        data = StoredData({kind: open_artifact(folder, kind) for kind, folder in self.inputs.items()})
        start = (
            None if self.warm_start is None else functools.partial(_take_weights, self.warm_start, self.config, data)
        )
        module, result = fit_model(self.config, data, device=device, callbacks=callbacks, start=start)
        return save_training_result(module, result, self.target)
