"""Publish small artifacts and save small checkpoints, and check that they are whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyarrow as pa
import torch

from tiger.core import artifacts
from tiger.core.artifacts import Draft, build
from tiger.core.config import Config
from tiger.core.storage import SCRATCH

Property = Callable[[str, object], None]


class Killed(BaseException):
    pass


class Knobs(Config):
    size: int = 1


def _fill(draft: Draft) -> None:
    draft.folder.write_table("table/part-00000.parquet", pa.table({"x": [1, 2]}))
    draft.folder.write_json("notes.json", {"a": 1})
    draft.folder.write_json(f"{SCRATCH}/state.json", {})
    draft.metrics = {"rows": 2}


def publish_small(root: str, size: int = 1) -> artifacts.Artifact:
    return build(root, "catalog", Knobs(size=size), {}, _fill)


def checkpoint_state(step: int) -> dict[str, Any]:
    return {
        "module": {"weight": torch.full((3, 2), float(step))},
        "optimizer": {"state": {0: {"step": torch.tensor(step)}}, "param_groups": [{"lr": 0.1, "betas": (0.9, 0.999)}]},
        "state": {"step": step, "best": {}, "log": [{"loss": 0.1 + step, "losses": [1 / 3]}], "best_weights": {}},
    }


def equal_states(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(equal_states(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return type(one) is type(other) and len(one) == len(other) and all(map(equal_states, one, other))
    return bool(one == other)


def publish_as(root: str, name: str) -> artifacts.Artifact:
    """Make one artifact as a training does: not bit for bit what another run makes, and resumable by its parts."""

    def fill(draft: Draft) -> None:
        for part in range(2):
            if not draft.folder.exists(f"table/part-0000{part}.parquet"):
                draft.folder.write_table(f"table/part-0000{part}.parquet", pa.table({"x": [part], "by": [name]}))
        draft.folder.write_json(f"{SCRATCH}/state.json", {"by": name})
        draft.folder.write_json("notes.json", {"by": name})
        draft.metrics = {"parts": len(draft.folder.read_table("table"))}

    return build(root, "model", Knobs(), {}, fill)


def require_whole(artifact: artifacts.Artifact) -> None:
    artifact.verify()
    assert artifact.metrics == {"parts": 2}
    assert set(artifact.manifest["files"]) == {"notes.json", "table/part-00000.parquet", "table/part-00001.parquet"}
