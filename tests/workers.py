"""Workers and trainings that tests run on Ray: they are killed, fail, wait or note where they run."""

from __future__ import annotations

import json
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from tests.trainings import learn, losses
from tiger.core.errors import HealthError
from tiger.core.storage import Folder
from tiger.training.job import TrainingJob
from tiger.training.loop import Callbacks, rank


class Double:
    """Doubles x; notes every shard that it computes; dies once, always, or fails on request."""

    def __init__(
        self,
        notes: str,
        die_at: int | None = None,
        fail_at: int | None = None,
        poison: int | None = None,
        device: torch.device | None = None,
    ) -> None:
        assert device == torch.device("cpu")  # this Ray has no GPU
        self.notes, self.die_at, self.fail_at, self.poison = Path(notes), die_at, fail_at, poison

    def __call__(self, part: pa.Table) -> pa.Table:
        first = part["x"][0].as_py()
        if first == self.fail_at:
            raise HealthError(f"planted at {first}")
        if first == self.die_at and not (self.notes / "died").exists():
            (self.notes / "died").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        (self.notes / f"{first}-{os.urandom(4).hex()}").touch()
        if first == self.poison:
            os.kill(os.getpid(), signal.SIGKILL)
        return pa.table({"x": part["x"], "y": [2 * x for x in part["x"].to_pylist()]})


def source(folder: Path) -> Folder:
    folder.mkdir()
    (folder / "notes").mkdir()
    Folder(str(folder)).write_table(
        "source.parquet", pa.table({"x": list(range(95)), "z": [0] * 95}), row_group_size=10
    )
    return Folder(str(folder))


NODE_TRAINING: dict[str, Any] = {
    "dropout": 0.2,
    "training": {"epochs": 6, "batch_size": 100, "validate_every_epochs": 1.0},
}
"""Changes of the tokenizer's training that loses a node."""


def slow_double(**arguments: Any) -> Any:
    """Doubles; with two parts written it waits until a node is gone, as a longer stage would meet it."""
    worker, table = Double(**arguments), Path(arguments["notes"]).parent

    def slowly(part: Any) -> Any:
        time.sleep(1)
        deadline = time.monotonic() + 120
        while len(list((table / "out").glob("*.parquet"))) >= 2 and not (table.parent / "lost").exists():
            assert time.monotonic() < deadline
            time.sleep(0.1)
        return worker(part)

    return slowly


@dataclass(frozen=True)
class Watched(TrainingJob):
    """Trains; after the second snapshot it waits until a node is gone, as a longer training would meet it."""

    folder: str

    def run(self, device: torch.device, callbacks: Callbacks) -> dict[str, Any]:
        folder, saves = Path(self.folder), 0

        def save(state: dict[str, Any], metrics: dict[str, Any]) -> None:
            nonlocal saves
            callbacks.save(state, metrics)
            saves += 1
            if saves == 2 and not (folder / "lost").exists():
                (folder / "second-save").touch()
                deadline = time.monotonic() + 120
                while not (folder / "lost").exists() and time.monotonic() < deadline:
                    time.sleep(0.1)

        torch.set_num_threads(1)
        own = Callbacks(report=callbacks.report, save=save, load=callbacks.load)
        module, result = learn("tokenizer", own, **NODE_TRAINING)
        state = {name: tensor.tolist() for name, tensor in module.state_dict().items()}
        return {"losses": losses(result), "best": result.best, "state": state}


KILL_TRAINING: dict[str, dict[str, Any]] = {
    "tokenizer": {"dropout": 0.2, "training": {"epochs": 6, "batch_size": 100, "validate_every_epochs": 1.0}},
    "trie": {
        "dropout": 0.2,
        "training": {
            "epochs": 6, "batch_size": 64, "warmup_steps": 2, "precision": "float32", "patience": 50,
        },
    },
}  # fmt: skip
"""Changes of the trainings whose workers are killed."""

KILLS = [(1, "before", 0), (2, "after", 1), (4, "before", 0)]
"""(which save, whether it has been made, the worker that is killed)."""


@dataclass(frozen=True)
class KilledNowAndThen(TrainingJob):
    """Trains; a worker is killed around three saves, and then the driver around one."""

    which: str
    marks: str

    def run(self, device: torch.device, callbacks: Callbacks) -> dict[str, Any]:
        return _killed_now_and_then(self.which, Path(self.marks), callbacks)


def _killed_now_and_then(which: str, marks: Path, hooks: Callbacks) -> dict[str, Any]:
    saves = 0
    steps_seen: list[int] = []

    def strike(moment: str, step: int) -> None:
        mark = marks / f"{step}-{moment}"
        driver = step == 5 * steps_seen[0] and moment == "after"
        planned = (step // steps_seen[0], moment, rank()) in KILLS or (driver and rank() == 0)
        if planned and not mark.exists():
            mark.touch()
            os.kill(int((marks / "driver").read_text()) if driver else os.getpid(), signal.SIGKILL)

    def save(state: dict[str, Any], metrics: dict[str, Any]) -> None:
        nonlocal saves
        saves += 1
        step = metrics["step"]
        if not steps_seen:
            steps_seen.append(next(look["step"] for look in state["state"]["log"] if look["step"]))
        strike("before", step)
        hooks.save(state, metrics)
        strike("after", step)

    found = hooks.load()
    if found is not None:
        (marks / f"from-{found['state']['step']}-{rank()}-{os.getpid()}").touch()
    torch.set_num_threads(1)
    watched = Callbacks(report=hooks.report, save=save, load=hooks.load)
    module, result = learn(which, watched, **KILL_TRAINING[which])
    state = {name: tensor.tolist() for name, tensor in module.state_dict().items()}
    return {"losses": losses(result), "best": result.best, "state": state}


class NotesGpu:
    """A worker that returns the GPUs that Ray assigned to its actor."""

    def __init__(self, device: torch.device, slow: float = 0.0) -> None:
        assert device == torch.device("cpu")
        self.slow = slow

    def __call__(self, shard: pa.Table) -> pa.Table:
        import ray

        time.sleep(self.slow)
        gpus = [",".join(map(str, ray.get_gpu_ids()))] * len(shard)
        return pa.table({"x": shard["x"], "gpus": gpus, "node": [ray.get_runtime_context().get_node_id()] * len(shard)})


@dataclass(frozen=True)
class GpuNotes(TrainingJob):
    """A training that notes the GPUs of every rank; all ranks meet in a collective of the process group."""

    folder: str

    def run(self, device: torch.device, callbacks: Callbacks) -> dict[str, Any]:
        import ray

        from tiger.training.loop import all_reduce_sum, rank, world_size

        Path(self.folder, f"rank-{rank()}").write_text(
            json.dumps(
                [list(map(str, ray.get_gpu_ids())), ray.get_runtime_context().get_node_id(), torch.get_num_threads()]
            )
        )
        assert device == torch.device("cpu")
        return {"sum": float(all_reduce_sum(torch.ones(1))), "world": world_size()}
