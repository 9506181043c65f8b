"""Training checkpoints that survive a kill at any time, on any file system.

A checkpoint is a folder `step-00000123`: tensors as safetensors, the remaining state as JSON, and `record.json`,
written last, with the sha256 of both and the configuration of the training. Incomplete or corrupt checkpoints are
skipped in favor of older ones; if there were checkpoints and all are corrupt, loading fails rather than restarting from
step 0. Ray Train's own checkpoints are not used: their index is rewritten in place and may be corrupted by a kill, a
report can arrive too late for the index, and folders that are not in the index are never removed.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Collection
from typing import Any

import safetensors.torch
import torch.distributed as dist
from torch import Tensor

from tiger.core.config import flat
from tiger.core.errors import ArtifactError, ConfigError, TigerError
from tiger.core.hashing import sha256
from tiger.core.storage import Folder
from tiger.training.loop import rank

log = logging.getLogger(__name__)

_TENSORS, _REST, _RECORD, _NEWEST = "tensors.safetensors", "state.json", "record.json", "newest.json"


class CheckpointStore:
    """The checkpoints of one training; its methods `save` and `load` are used as `Callbacks`."""

    def __init__(
        self, folder: Folder, given: dict[str, Any], keep: int = 2, *, may_differ: Collection[str] = ()
    ) -> None:
        """Describe the training.

        Args:
            folder: folder of the checkpoints.
            given: configuration that determines the result of the training, JSON values; checkpoints with another
                configuration are rejected.
            keep: number of checkpoints to keep; older ones, and leftovers of interrupted saves, are removed after every
                save.
            may_differ: dotted keys of `given` that affect the result through rounding and dropout only, such as the
                number of workers: a checkpoint with other values of these is used, with a warning.
        """
        self.folder, self.given, self.keep = folder, json.loads(json.dumps(given)), keep
        self.may_differ = frozenset(may_differ)

    def save(self, state: dict[str, Any], metrics: dict[str, Any]) -> None:
        """Write a checkpoint on rank 0; call it on every worker.

        Args:
            state: nested dicts, lists and tuples of tensors and plain values.
            metrics: metrics with the key `step`.

        Raises:
            StorageError: the write fails.
        """
        if rank() != 0:
            return
        step = int(metrics["step"])
        own = self.folder.child(f"step-{step:08d}")
        own.delete()
        tensors: dict[str, Tensor] = {}
        rest = json.dumps(_pack(state, "state", tensors)).encode()
        contents = {_TENSORS: safetensors.torch.save(tensors), _REST: rest}
        for name, content in contents.items():
            own.write_bytes(name, content)
        digests = {name: sha256(content) for name, content in contents.items()}
        own.write_json(_RECORD, {"step": step, "given": self.given, "sha256": digests})
        self.folder.write_json(_NEWEST, {"step": step})
        for older in self._steps()[self.keep :]:
            self.folder.delete(f"step-{older:08d}")

    def load(self) -> dict[str, Any] | None:
        """Load the newest valid checkpoint, the same one on every worker; None if there has been none.

        Raises:
            ArtifactError: there were checkpoints, and none of them is valid.
            ConfigError: it belongs to a training with another configuration; lists the differences.
        """
        chosen: list[Any] = [None, None]
        if rank() == 0:
            try:
                chosen[0] = self._newest()
            except TigerError as error:  # broadcast the error to avoid a deadlock
                chosen[1] = error.to_record()
        if dist.is_initialized():
            dist.broadcast_object_list(chosen)
        if chosen[1] is not None:
            raise TigerError.from_record(chosen[1])
        return None if chosen[0] is None else self._read(self.folder.child(f"step-{chosen[0]:08d}"))

    def _newest(self) -> int | None:
        steps = self._steps()
        for step in steps:
            own = self.folder.child(f"step-{step:08d}")
            try:
                record = own.read_json(_RECORD)
                whole = all(own.digest(name) == sha256 for name, sha256 in record["sha256"].items())
            except (OSError, ValueError, KeyError, TypeError, AttributeError):
                whole = False  # incomplete or corrupt: use an older one, or raise the error below
            if whole:
                self._check_same_training(record["given"])
                return step
            log.warning("the checkpoint at step %d is incomplete or corrupt; trying an older one (%s)", step, own.uri)
        if self.folder.exists(_NEWEST):
            raise ArtifactError(
                f"{self.folder.uri} contains no valid checkpoint ({len(steps)} incomplete or corrupt); restore one, or "
                "delete that folder to train from the start"
            )
        return None

    def _steps(self) -> list[int]:
        """Return the steps of all checkpoints, complete or not, newest first."""
        names = [info.base_name for info in self.folder.entries(recursive=False)]
        return sorted((int(name[5:]) for name in names if name.startswith("step-")), reverse=True)

    def _check_same_training(self, given: Any) -> None:
        before, now = flat(given), flat(self.given)
        changed = {
            key: f"{key} was {before.get(key)}, is {now.get(key)}"
            for key in sorted({*before, *now})
            if before.get(key) != now.get(key)
        }
        if tolerated := [change for key, change in changed.items() if key in self.may_differ]:
            log.warning(
                "%s since the last checkpoint: from here on the losses equal those of an uninterrupted training up to "
                "rounding and other random numbers for dropout",
                "; ".join(tolerated),
            )
        if rejected := [change for key, change in changed.items() if key not in self.may_differ]:
            raise ConfigError(
                f"{self.folder.uri} contains checkpoints of a different configuration: {'; '.join(rejected)}; restore "
                "these values, or delete the folder to train from the start"
            )

    def _read(self, own: Folder) -> dict[str, Any]:
        tensors = own.read_tensors(_TENSORS)
        state: dict[str, Any] = _unpack(own.read_json(_REST), tensors)
        return state


def _pack(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """Convert a value to JSON with type tags; store tensors in `tensors`, under their paths."""
    if isinstance(value, Tensor):
        tensors[path] = value.detach().cpu().contiguous()
        return {"tensor": path}
    if isinstance(value, dict):  # as pairs, because an optimizer's keys are integers
        return {"dict": [[key, _pack(item, f"{path}/{key}", tensors)] for key, item in value.items()]}
    if isinstance(value, (list, tuple)):
        kind = "tuple" if isinstance(value, tuple) else "list"
        return {kind: [_pack(item, f"{path}/{index}", tensors) for index, item in enumerate(value)]}
    assert value is None or isinstance(value, (bool, int, float, str)), f"{path}: {type(value)} is not supported"
    return {"value": value}


def _unpack(box: Any, tensors: dict[str, Tensor]) -> Any:
    ((kind, content),) = box.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: _unpack(item, tensors) for key, item in content}
    if kind in ("list", "tuple"):
        items = [_unpack(item, tensors) for item in content]
        return tuple(items) if kind == "tuple" else items
    return content
