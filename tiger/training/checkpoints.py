"""Training checkpoints that survive a kill at any time, on any file system.

A checkpoint is a folder `step-00000123`. The workers' states are equal, so that every worker writes some of the
tensors, as safetensors, and then a record with their sha256; rank 0 also writes the remaining state as JSON, and in its
record the configuration of the training and the number of workers. Incomplete or corrupt checkpoints are skipped in
favor of older ones; if there were checkpoints and all are corrupt, loading fails rather than restarting from step 0.
Ray Train's own checkpoints are not used: their index is rewritten in place and may be corrupted by a kill, a report can
arrive too late for the index, and folders that are not in the index are never removed.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Collection
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tiger.core.config import flat
from tiger.core.errors import ArtifactError, ConfigError, TigerError
from tiger.core.hashing import sha256
from tiger.core.storage import Folder
from tiger.core.tensors import safetensors_pieces
from tiger.training.loop import all_reduce_sum, rank, world_size

log = logging.getLogger(__name__)

_TENSORS, _REST, _RECORD, _NEWEST = "tensors.safetensors", "state.json", "record.json", "newest.json"


class CheckpointStore:
    """The checkpoints of one training; its methods `save` and `load` are used as `Callbacks`."""

    def __init__(
        self,
        folder: Folder,
        given: dict[str, Any],
        keep: int = 2,
        *,
        may_differ: Collection[str] = (),
        in_background: bool = False,
    ) -> None:
        """Describe the training.

        Args:
            folder: folder of the checkpoints.
            given: configuration that determines the result of the training, JSON values; checkpoints with another
                configuration are rejected.
            keep: number of checkpoints to keep; older ones, and leftovers of interrupted saves, are removed at every
                save.
            may_differ: dotted keys of `given` that affect the result through rounding and dropout only, such as the
                number of workers: a checkpoint with other values of these is used, with a warning.
            in_background: return from `save` when the state is copied, and write it while the training continues; call
                `close` at the end.
        """
        self.folder, self.given, self.keep = folder, json.loads(json.dumps(given)), keep
        self.may_differ, self.in_background = frozenset(may_differ), in_background
        self.writing: Future[None] | None = None
        self.executor = ThreadPoolExecutor(1, "checkpoint") if in_background else None

    def save(self, state: dict[str, Any], metrics: dict[str, Any]) -> None:
        """Write a checkpoint; call it on every worker, with equal states.

        Args:
            state: nested dicts, lists and tuples of tensors and plain values.
            metrics: metrics with the key `step`.

        Raises:
            StorageError: the write fails, or that of the previous checkpoint has failed in the background.
        """
        self._wait()  # so that there is a complete checkpoint at any time
        tensors: dict[str, Tensor] = {}
        rest = json.dumps(_pack(state, "state", tensors)).encode()
        device = next(
            (tensor.device for tensor in tensors.values() if tensor.device.type != "cpu"), torch.device("cpu")
        )
        _barrier(device)
        own = self.folder.child(f"step-{int(metrics['step']):08d}")
        if rank() == 0:
            own.delete()
            self._delete_older()
        _barrier(device)
        part = {path: _on_host(tensors[path], self.in_background) for path in _own_part(tensors)}
        if self.executor is None:
            self._write(own, int(metrics["step"]), part, rest)
            _barrier(device)
            if rank() == 0:
                self._delete_older()
        else:
            self.writing = self.executor.submit(self._write, own, int(metrics["step"]), part, rest)

    def close(self) -> None:
        """Wait for what is being written in the background.

        Raises:
            StorageError: the write has failed.
        """
        self._wait()

    def _wait(self) -> None:
        writing, self.writing = self.writing, None
        if writing is not None:
            writing.result()

    def _delete_older(self) -> None:
        for older in self._steps()[self.keep :]:
            self.folder.delete(f"step-{older:08d}")

    def _write(self, own: Folder, step: int, tensors: dict[str, Tensor], rest: bytes) -> None:
        number = rank()
        contents = {_part(_TENSORS, number): safetensors_pieces(tensors)}
        if number == 0:
            contents[_REST] = [rest]
        for name, content in contents.items():
            own.write_bytes(name, content)
        record: dict[str, Any] = {"sha256": {name: sha256(content) for name, content in contents.items()}}
        if number == 0:
            record |= {"step": step, "given": self.given, "parts": world_size()}
        own.write_json(_part(_RECORD, number), record)
        if number == 0:
            self.folder.write_json(_NEWEST, {"step": step})

    def load(self) -> dict[str, Any] | None:
        """Load the newest valid checkpoint, the same one on every worker; None if there has been none.

        Raises:
            ArtifactError: there were checkpoints, and none of them is valid.
            ConfigError: it belongs to a training with another configuration; lists the differences.
        """
        self._wait()
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
                whole = all(
                    own.digest(name) == sha256
                    for number in range(record["parts"])
                    for name, sha256 in own.read_json(_part(_RECORD, number))["sha256"].items()
                )
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
        tensors: dict[str, Tensor] = {}
        for number in range(own.read_json(_RECORD)["parts"]):
            tensors |= own.read_tensors(_part(_TENSORS, number))
        state: dict[str, Any] = _unpack(own.read_json(_REST), tensors)
        return state


def _part(name: str, number: int) -> str:
    """Return the file of one worker: `record.json` of rank 0, `record-1.json` of rank 1."""
    stem, _, suffix = name.rpartition(".")
    return f"{stem}-{number}.{suffix}" if number else name


def _barrier(device: torch.device) -> None:
    """Wait for all workers; by a sum on the device of the training, because a group of GPUs may know no other."""
    if dist.is_initialized():
        all_reduce_sum(torch.zeros(1, device=device)).cpu()


def _own_part(tensors: dict[str, Tensor]) -> list[str]:
    """Return the paths of the tensors that this worker writes: shares of similar size, the same on every worker."""
    held = [0] * world_size()
    own = []
    for path in sorted(tensors, key=lambda path: (-tensors[path].nbytes, path)):
        number = held.index(min(held))
        held[number] += tensors[path].nbytes
        if number == rank():
            own.append(path)
    return own


def _on_host(tensor: Tensor, copy: bool) -> Tensor:
    """Return a contiguous tensor on the CPU; of its own memory if the training goes on while it is written."""
    host = tensor.cpu().contiguous()
    return host.clone() if copy and host.data_ptr() == tensor.data_ptr() else host


def _pack(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """Convert a value to JSON with type tags; store tensors in `tensors`, under their paths."""
    if isinstance(value, Tensor):
        tensors[path] = value.detach()
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
