"""The Ray layer on a real local Ray: parts through actors, and a process group that resumes after a loss."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import torch

from tests.workers import Double, source
from tiger.core.errors import HealthError, ResourceError
from tiger.core.resources import Resources
from tiger.core.storage import Folder
from tiger.on_ray import map as map_module
from tiger.on_ray.map import MAX_ATTEMPTS, map_shards
from tiger.on_ray.train import train
from tiger.run import ResourcesConfig
from tiger.training.job import TrainingJob
from tiger.training.loop import Callbacks

pytestmark = pytest.mark.usefixtures("local_ray")


def run(folder: Folder, maximum: int = 2, **worker: Any) -> int:
    arguments = {"notes": f"{folder.path}/notes", **worker}
    target = folder.child("out")
    return map_shards(
        folder, "source.parquet", ["x"], target, Double, arguments, actors=Resources(max_workers=maximum), what="test"
    )


def result(folder: Folder) -> list[tuple[int, int]]:
    table = folder.read_table("out")
    return list(zip(table["x"].to_pylist(), table["y"].to_pylist(), strict=True))


EXPECTED = [(x, 2 * x) for x in range(95)]


@pytest.mark.slow
def test_a_table_through_actors_restarts_where_it_stopped(tmp_path: Path) -> None:
    folder = source(tmp_path / "a")
    with pytest.raises(HealthError, match="planted at 50"):  # our own error, not Ray's wrappers
        run(folder, maximum=1, fail_at=50)
    done = {path.name for path in Path(folder.path, "out").glob("*.parquet")}
    assert "part-00005.parquet" not in done
    second = tmp_path / "second"  # notes of its own: an actor of the first run may be at its last part still
    second.mkdir()
    assert run(folder, notes=str(second)) == len(done)
    assert result(folder) == EXPECTED
    computed = sorted(int(path.name.partition("-")[0]) for path in second.iterdir())
    assert computed == [part * 10 for part in range(10) if f"part-{part:05d}.parquet" not in done]  # nothing twice
    assert run(folder) == 10


def test_the_footer_is_read_once_and_not_for_every_shard(tmp_path: Path) -> None:
    """With the metadata that the driver has read, shards are read of a file whose footer is gone."""
    folder = source(tmp_path / "a")
    path = Path(folder.path, "source.parquet")
    footer = ray.put(pq.read_metadata(path))
    path.write_bytes(path.read_bytes()[:-8] + bytes(8))
    for shard in range(10):
        row = map_module._read(
            pa.table({"shard": [shard], "groups": [[shard]]}), folder.uri, "source.parquet", ["x"], [footer]
        )
        assert map_module._table(row)["x"].to_pylist() == list(range(95))[10 * shard : 10 * shard + 10]
    assert map_module._metadata.cache_info().misses == 1


def test_a_killed_actor_loses_and_doubles_nothing(tmp_path: Path) -> None:
    folder = source(tmp_path / "a")
    run(folder, die_at=30)
    assert Path(folder.path, "notes", "died").exists()
    assert result(folder) == EXPECTED
    assert len(list(Path(folder.path, "out").glob("*"))) == 10


@pytest.mark.slow
def test_map_table_names_a_shard_that_kills_its_actor(tmp_path: Path) -> None:
    folder = source(tmp_path / "a")
    with pytest.raises(ResourceError, match=r"shard 5 of source.parquet \(rows 50 to 59 of 95\).* lost 4 times"):
        run(folder, maximum=1, poison=50)
    attempts = [path for path in Path(folder.path, "notes").iterdir() if path.name.startswith("50-")]
    assert len(attempts) == MAX_ATTEMPTS
    assert run(folder) < 10  # what was finished is kept; without the poison the rest is computed
    assert result(folder) == EXPECTED


def test_work_that_never_fits_is_refused(tmp_path: Path) -> None:
    folder = source(tmp_path / "a")
    with pytest.raises(ResourceError, match=r"of 9 actors needs 9 x 1 CPU, .* the cluster has 1 node with 4 CPUs"):
        map_shards(
            folder,
            "source.parquet",
            ["x"],
            folder.child("out"),
            Double,
            {},
            actors=Resources(min_workers=9),
            what="test",
        )
    with pytest.raises(ResourceError, match="training with 8 workers needs 8 x 2 CPUs"):
        train(Count(), Folder(str(tmp_path)), ResourcesConfig(training=Resources(max_workers=8, cpus=2)), "test")
    with pytest.raises(ResourceError, match=r"requested 2 GPUs \(scale.gpus\), and CUDA sees 0"):
        train(Count(), Folder(str(tmp_path)), ResourcesConfig(gpus=2), "test")


@dataclass(frozen=True)
class Count(TrainingJob):
    """Counts to five, saves every step, and is killed once at three."""

    died: str = ""

    def run(self, device: torch.device, callbacks: Callbacks) -> dict[str, Any]:
        from tiger.training.loop import all_reduce_sum, rank, world_size

        state = callbacks.load() or {"step": 0, "starts": 0}
        state["starts"] += 1
        while state["step"] < 5:
            state["step"] += 1
            callbacks.save(state, {"step": state["step"]})
            died = Path(self.died)
            if state["step"] == 3 and rank() == 1 and not died.exists():
                died.touch()
                os.kill(os.getpid(), signal.SIGKILL)
        ranks = all_reduce_sum(torch.tensor(float(rank() + 1)))
        return {"steps": state["step"], "starts": state["starts"], "world": world_size(), "ranks": ranks.item()}


@pytest.mark.slow
def test_training_resumes_after_a_worker_was_killed(tmp_path: Path) -> None:
    scale = ResourcesConfig(training=Resources(max_workers=2, cpus=1), max_failures=1)
    found = train(Count(str(tmp_path / "died")), Folder(str(tmp_path / "out")), scale, "test")
    assert (tmp_path / "died").exists()
    assert found == {"steps": 5, "starts": 2, "world": 2, "ranks": 3.0}


@dataclass(frozen=True)
class FailOnOneRank(TrainingJob):
    """One rank fails while the other waits for it in a collective."""

    folder: str
    rank: int

    def run(self, device: torch.device, callbacks: Callbacks) -> dict[str, Any]:
        from tiger.training.loop import all_reduce_sum, rank

        if rank() == self.rank:
            Path(self.folder, f"failed-{os.getpid()}").write_text(str(time.time()))
            raise HealthError("planted")
        all_reduce_sum(torch.ones(1))
        return {}


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_tiger_error_on_any_rank_stops_training_within_seconds(tmp_path: Path, rank: int) -> None:
    scale = ResourcesConfig(training=Resources(max_workers=2, cpus=1), max_failures=3)
    with pytest.raises(HealthError, match="^planted$"):
        train(FailOnOneRank(str(tmp_path), rank), Folder(str(tmp_path / "out")), scale, "test")
    (failed,) = tmp_path.glob("failed-*")  # once: it was not tried again
    assert time.time() - float(failed.read_text()) < 10
