"""The Ray layer on a real local Ray: parts through actors, and a process group that goes on after a loss."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.workers import Double, source
from tiger.core.errors import HealthError, ResourceError
from tiger.core.storage import Folder
from tiger.on_ray.map import MAX_ATTEMPTS, ActorPool, map_shards
from tiger.on_ray.train import train
from tiger.run import ResourcesConfig
from tiger.training.loop import Callbacks

pytestmark = pytest.mark.usefixtures("local_ray")


def run(folder: Folder, maximum: int = 2, **worker: Any) -> int:
    arguments = {"notes": f"{folder.path}/notes", **worker}
    target = folder.child("out")
    return map_shards(
        folder, "source.parquet", ["x"], target, Double, arguments, actors=ActorPool(maximum=maximum), what="test"
    )


def result(folder: Folder) -> list[tuple[int, int]]:
    table = folder.read_table("out")
    return list(zip(table["x"].to_pylist(), table["y"].to_pylist(), strict=True))


EXPECTED = [(x, 2 * x) for x in range(95)]


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
            folder, "source.parquet", ["x"], folder.child("out"), Double, {}, actors=ActorPool(minimum=9), what="test"
        )
    with pytest.raises(ResourceError, match="training with 8 workers needs 8 x 2 CPUs"):
        train(count, {}, Folder(str(tmp_path)), ResourcesConfig(train_workers=8, cpus_per_worker=2), "test")
    with pytest.raises(ResourceError, match=r"requested 2 GPUs \(scale.gpus\), and CUDA sees 0"):
        train(count, {}, Folder(str(tmp_path)), ResourcesConfig(gpus=2), "test")


def count(arguments: dict[str, Any], device: torch.device, hooks: Callbacks) -> dict[str, Any]:
    """Counts to five, saves every step, and is killed once at three."""
    from tiger.training.loop import all_reduce_sum, rank, world_size

    state = hooks.load() or {"step": 0, "starts": 0}
    state["starts"] += 1
    while state["step"] < 5:
        state["step"] += 1
        hooks.save(state, {"step": state["step"]})
        died = Path(arguments["died"])
        if state["step"] == 3 and rank() == 1 and not died.exists():
            died.touch()
            os.kill(os.getpid(), signal.SIGKILL)
    if "fail" in arguments:
        raise HealthError("planted")
    ranks = all_reduce_sum(torch.tensor(float(rank() + 1)))
    return {"steps": state["step"], "starts": state["starts"], "world": world_size(), "ranks": ranks.item()}


@pytest.mark.slow
def test_training_goes_on_after_a_worker_was_killed(tmp_path: Path) -> None:
    scale = ResourcesConfig(train_workers=2, cpus_per_worker=1, max_failures=1)
    found = train(count, {"died": str(tmp_path / "died")}, Folder(str(tmp_path / "out")), scale, "test")
    assert (tmp_path / "died").exists()
    assert found == {"steps": 5, "starts": 2, "world": 2, "ranks": 3.0}


def fail_on_one_rank(arguments: dict[str, Any], device: torch.device, hooks: Callbacks) -> dict[str, Any]:
    """Rank 1 fails while rank 0 waits for it in a collective."""
    from tiger.training.loop import all_reduce_sum, rank

    if rank() == arguments["rank"]:
        Path(arguments["folder"], f"failed-{os.getpid()}").write_text(str(time.time()))
        raise HealthError("planted")
    all_reduce_sum(torch.ones(1))
    return {}


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_tiger_error_on_any_rank_stops_training_within_seconds(tmp_path: Path, rank: int) -> None:
    scale = ResourcesConfig(train_workers=2, cpus_per_worker=1, max_failures=3)
    with pytest.raises(HealthError, match="^planted$"):
        train(fail_on_one_rank, {"folder": str(tmp_path), "rank": rank}, Folder(str(tmp_path / "out")), scale, "test")
    (failed,) = tmp_path.glob("failed-*")  # once: it was not tried again
    assert time.time() - float(failed.read_text()) < 10
