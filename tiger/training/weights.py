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
    """Load an artifact's weights into a module.

    Raises:
        ArtifactError: the file is not a safetensors file, or does not match the module.
    """
    try:
        module.load_state_dict(folder.read_tensors(WEIGHTS))
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise ArtifactError(f"{folder.uri}/{WEIGHTS} does not match its configuration: {reason:.300}") from None


def save_training_result(module: nn.Module, result: FitResult, target: Folder) -> dict[str, Any]:
    """Write the weights and metrics.jsonl (one line per validation) on rank 0; return the best validation metrics."""
    if training.rank() == 0:
        write_weights(module, target)
        target.write_bytes("metrics.jsonl", "".join(json.dumps(metrics) + "\n" for metrics in result.log).encode())
    steps = {"best_step": result.best_step, "steps": result.steps, "stopped_early": result.stopped_early}
    return result.best | steps | result.extra | result.precision.figures()


def write_weights(module: nn.Module, target: Folder) -> None:
    """Write all parameters and buffers as safetensors."""
    target.write_tensors(WEIGHTS, module.state_dict())
