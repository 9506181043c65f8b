"""CheckpointStore of a training that survive a kill at any moment, on any filesystem.

A snapshot is a folder `step-000123`: tensors as safetensors, all else as JSON, and `record.json`, written last, with
the sha256 of both and what the training was given. A torn, emptied or altered snapshot is passed over for the next
older one; where a training has left snapshots and none of them is whole, that is an error and never a start from step
0. Ray Train's own checkpoints are not used: their register is rewritten in place and a kill can leave it torn, a
report can come too late for the register, and folders that it does not know are never collected.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Collection
from typing import Any

import safetensors.torch
import torch.distributed as dist
from torch import Tensor

from tiger.core import errors
from tiger.core.config import flat
from tiger.core.errors import ArtifactError, ConfigError, TigerError
from tiger.core.storage import Folder
from tiger.training.loop import rank

log = logging.getLogger(__name__)

_TENSORS, _REST, _RECORD, _NEWEST = "tensors.safetensors", "state.json", "record.json", "newest.json"


class CheckpointStore:
    """The snapshots of one training; `save` and `load` are `training.Callbacks`."""

    def __init__(
        self, folder: Folder, given: dict[str, Any], keep: int = 2, *, may_differ: Collection[str] = ()
    ) -> None:
        """
        Args:
            given: what decides the outcome of the training, JSON values; a snapshot of another training is refused.
            keep: snapshots that stay; older ones, and what killed attempts have left, are removed after every save.
            may_differ: dotted keys of `given` that change the outcome by rounding and dropout only, such as the number
                of workers: a snapshot with other values of these is used, with a warning.
        """
        self.folder, self.given, self.keep = folder, json.loads(json.dumps(given)), keep
        self.may_differ = frozenset(may_differ)

    def save(self, state: dict[str, Any], metrics: dict[str, Any]) -> None:
        """Called on every worker, writes on rank 0."""
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
        digests = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
        own.write_json(_RECORD, {"step": step, "given": self.given, "sha256": digests})
        self.folder.write_json(_NEWEST, {"step": step})
        for older in self._steps()[self.keep :]:
            self.folder.delete(f"step-{older:08d}")

    def load(self) -> dict[str, Any] | None:
        """The newest whole snapshot, the same one on every worker; None where there has been none.

        Raises:
            ArtifactError: there were snapshots, and none of them is whole.
            ConfigError: it was made by a training that was given something else; lists what.
        """
        chosen: list[Any] = [None, None]
        if rank() == 0:
            try:
                chosen[0] = self._newest()
            except TigerError as error:  # all workers must hear of it, or they would wait for each other
                chosen[1] = [type(error).__name__, str(error)]
        if dist.is_initialized():
            dist.broadcast_object_list(chosen)
        if chosen[1] is not None:
            raise getattr(errors, chosen[1][0])(chosen[1][1])
        return None if chosen[0] is None else self._read(self.folder.child(f"step-{chosen[0]:08d}"))

    def _newest(self) -> int | None:
        steps = self._steps()
        for step in steps:
            own = self.folder.child(f"step-{step:08d}")
            try:
                record = own.read_json(_RECORD)
                whole = all(own.digest(name) == sha256 for name, sha256 in record["sha256"].items())
            except (OSError, ValueError, KeyError, TypeError, AttributeError):
                whole = False  # torn, emptied, or never finished: an older one stands in, or the error below
            if whole:
                self._check_same_training(record["given"])
                return step
            log.warning("the snapshot of step %d is not whole and is passed over (%s)", step, own.uri)
        if self.folder.exists(_NEWEST):
            raise ArtifactError(
                f"{self.folder.uri} has held snapshots, and none of the {len(steps)} there is whole; bring one back, "
                "or delete that folder to train from the start"
            )
        return None

    def _steps(self) -> list[int]:
        """Of all snapshots, whole or not, the newest first."""
        names = [info.base_name for info in self.folder.entries(recursive=False)]
        return sorted((int(name[5:]) for name in names if name.startswith("step-")), reverse=True)

    def _check_same_training(self, given: Any) -> None:
        before, now = flat(given), flat(self.given)
        changed = {
            key: f"{key} was {before.get(key)}, is {now.get(key)}"
            for key in sorted({*before, *now})
            if before.get(key) != now.get(key)
        }
        if tolerated := [said for key, said in changed.items() if key in self.may_differ]:
            log.warning(
                "%s since the last snapshot: from here on the losses are those of an undisturbed training up to "
                "rounding and other random numbers for dropout",
                "; ".join(tolerated),
            )
        if refused := [said for key, said in changed.items() if key not in self.may_differ]:
            said = "; ".join(refused)
            raise ConfigError(
                f"{self.folder.uri} holds snapshots of a training that was given something else: {said}; set that "
                "back, or delete the folder to train from the start"
            )

    def _read(self, own: Folder) -> dict[str, Any]:
        tensors = own.read_tensors(_TENSORS)
        state: dict[str, Any] = _unpack(own.read_json(_REST), tensors)
        return state


def _pack(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """JSON with every value in a box that tells its type; tensors go into `tensors`, under their paths."""
    if isinstance(value, Tensor):
        tensors[path] = value.detach().cpu().contiguous()
        return {"tensor": path}
    if isinstance(value, dict):  # as pairs, because an optimizer's keys are numbers
        return {"dict": [[key, _pack(item, f"{path}/{key}", tensors)] for key, item in value.items()]}
    if isinstance(value, (list, tuple)):
        kind = "tuple" if isinstance(value, tuple) else "list"
        return {kind: [_pack(item, f"{path}/{index}", tensors) for index, item in enumerate(value)]}
    assert value is None or isinstance(value, (bool, int, float, str)), f"{path}: {type(value)} has no place here"
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
