"""Save and load a module's weights as safetensors."""

from __future__ import annotations

import json
from typing import Any

from torch import nn

from tiger.core.errors import ArtifactError
from tiger.core.storage import Folder
from tiger.training import loop as training
from tiger.training.loop import FitResult

WEIGHTS = "model.safetensors"


def load_weights(module: nn.Module, folder: Folder) -> None:
    """Fills a module with the weights of an artifact.

    Raises:
        ArtifactError: they are not safetensors, or not of this module.
    """
    try:
        module.load_state_dict(folder.read_tensors(WEIGHTS))
    except RuntimeError as error:
        said = " ".join(str(error).split())
        raise ArtifactError(f"{folder.uri}/{WEIGHTS} does not fit the configuration beside it: {said:.300}") from None


def save_training_result(module: nn.Module, result: FitResult, target: Folder) -> dict[str, Any]:
    """Rank 0 writes weights and the log of the training; returns the figures of the best look."""
    if training.rank() == 0:
        write_weights(module, target)
        target.write_bytes("metrics.jsonl", "".join(json.dumps(look) + "\n" for look in result.log).encode())
    steps = {"best_step": result.best_step, "steps": result.steps, "stopped_early": result.stopped_early}
    return result.best | steps | result.precision.figures()


def write_weights(module: nn.Module, target: Folder) -> None:
    """All parameters and buffers, as safetensors."""
    target.write_tensors(WEIGHTS, module.state_dict())
