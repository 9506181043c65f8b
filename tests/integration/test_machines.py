"""First contact with other machines than this one: GPUs, Macs, several nodes, autoscaling clusters, running heads.

GPUs are pretended: Ray counts them and work is placed on them, and computes on the CPU. Each test has a Ray of its own
in a process of its own, with its own folder and ports.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest

from tests.paths import ROOT
from tests.pipelines import TINY
from tests.processes import RAY, free_ports
from tiger.core.artifacts import newest

pytestmark = pytest.mark.slow


@pytest.fixture
def ray_folder() -> Iterator[str]:
    """A short folder for sessions of Ray; every process that still works in it is ended afterwards."""
    folder = tempfile.mkdtemp(prefix="ray")
    yield folder
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError, PermissionError):
            if folder.encode() in entry.read_bytes():
                os.kill(int(entry.parent.name), signal.SIGKILL)
    shutil.rmtree(folder, ignore_errors=True)


def run_script(name: str, *arguments: str, folder: str, seconds: int = 600, **environment: str) -> str:
    """Run a script of tests/scripts in a process of its own, in `folder`; return what it printed on both streams."""
    settings = os.environ | {
        "PYTHONPATH": str(ROOT),
        "RAY_TMPDIR": folder,
        "RAY_AUTH_MODE": "disabled",
    }
    settings.pop("RAY_ADDRESS", None)
    done = subprocess.run(
        [sys.executable, "-m", f"tests.scripts.{name}", *arguments],
        cwd=ROOT, env=settings | environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, timeout=seconds,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:]
    return done.stdout


def test_pipeline_uses_every_gpu_that_ray_counts(ray_folder: str, tmp_path: Path) -> None:
    overrides = [
        *TINY,
        f"root={tmp_path}",
        "embedding.resources.max_workers=4",
        "decoding.resources.max_workers=4",
        "scale.training.max_workers=2",
    ]
    settings = {"TIGER_PRETEND_GPUS": "2", "TIGER_CACHE": str(tmp_path / "cache")}
    printed = run_script("pipeline_on_gpus", "2", *overrides, folder=ray_folder, **settings)
    assert re.search(r"embed: \d+ shards?, (1 to )?\d actors? with 1 CPU and 0.5 GPUs", printed), printed[-6000:]
    for what in ("tokenizer", "model"):
        assert re.search(rf"{what}: 2 workers with \d CPUs? and 1 GPU each", printed), printed[-6000:]
    assert re.search(r"evaluate: \d+ shards?, (1 to )?\d actors? with 1 CPU and 0.5 GPUs", printed)
    assert "experimental" not in printed
    assert "Traceback" not in printed
    newest(str(tmp_path), "evaluation").verify()
    newest(str(tmp_path), "recommendations").verify()


def test_pipeline_computes_on_cpus_where_cuda_sees_no_gpu(ray_folder: str, tmp_path: Path) -> None:
    """As on a Mac: Ray counts one GPU, CUDA does not see it."""
    overrides = [*TINY, f"root={tmp_path}"]
    printed = run_script("pipeline_on_gpus", "1", *overrides, folder=ray_folder, TIGER_CACHE=str(tmp_path / "cache"))
    assert "Ray counts 1 GPUs, CUDA sees 0; the others (Apple, Intel, or without a driver) are not used" in printed
    assert re.search(r"embed: \d+ shards?, 1 actor with 2 CPUs", printed), printed[-6000:]
    assert re.search(r"model: 1 worker with 4 CPUs", printed)
    newest(str(tmp_path), "recommendations").verify()


def test_gpus_are_assigned_to_actors_and_workers(ray_folder: str, tmp_path: Path) -> None:
    printed = run_script("assign_gpus", str(tmp_path), folder=ray_folder, TIGER_PRETEND_GPUS="2")
    assert "scale.training.max_workers = 3 is more than the 2 GPUs of this run" in printed
    tables = {name: pa.parquet.read_table(tmp_path / name) for name in ("halves", "whole", "none")}
    for table in tables.values():
        assert table["x"].to_pylist() == list(range(68))
    assert set(tables["halves"]["gpus"].to_pylist()) == {"0", "1"}
    assert set(tables["whole"]["gpus"].to_pylist()) == {"0", "1"}
    assert set(tables["none"]["gpus"].to_pylist()) == {""}
    sizes = [len(pa.parquet.read_table(path)) for path in sorted((tmp_path / "halves").glob("*.parquet"))]
    assert sizes == [10, 5, 10, 10, 3, 10, 10, 10]
    ranks = [json.loads((tmp_path / f"rank-{rank}").read_text())[0] for rank in range(2)]
    assert sorted(ranks) == [["0"], ["1"]]


def test_training_on_a_head_without_cpus_and_two_nodes(ray_folder: str, tmp_path: Path) -> None:
    printed = run_script("head_without_cpus", str(tmp_path), folder=ray_folder)
    assert "none needs 1 x 1 CPU, each on one node; the cluster has no node for work yet" in printed
    assert "one: 1 worker with 4 CPUs" in printed  # what one node has, not the 6 of their sum
    one, ranks = json.loads(next(line for line in printed.splitlines() if line.startswith("[[")))
    assert one[2] == 4
    assert len({node for _, node, _ in ranks}) == 2


def test_pool_grows_with_an_autoscaling_cluster_and_lets_it_shrink(ray_folder: str, tmp_path: Path) -> None:
    """Ray's fake autoscaler starts raylets on this machine; its port is written into its node provider."""
    (client,) = free_ports(1)
    node_types = {
        "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
        "cpu": {
            "resources": {"CPU": 4, "object_store_memory": 90_000_000},
            "node_config": {}, "min_workers": 0, "max_workers": 3,
        },
    }  # fmt: skip
    empty_lists = (
        "initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands",
        "head_start_ray_commands", "worker_start_ray_commands", "cluster_synced_files", "rsync_exclude", "rsync_filter",
    )  # fmt: skip
    config = {
        "cluster_name": "tiger", "max_workers": 3, "head_node_type": "ray.head.default", "upscaling_speed": 10.0,
        "provider": {
            "type": "fake_multinode", "use_node_id_as_ip": True, "disable_node_updaters": True,
            "disable_launch_config_check": True,
        },
        "available_node_types": node_types, "idle_timeout_minutes": 0.2, "auth": {}, "docker": {}, "file_mounts": {},
        "file_mounts_sync_continuously": False, **{name: [] for name in empty_lists},
    }  # fmt: skip
    Path(ray_folder, "autoscaling.json").write_text(json.dumps(config))
    settings = os.environ | {
        "AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_FAKE_CLUSTER": "1", "RAY_AUTH_MODE": "disabled",
        "RAY_TMPDIR": ray_folder, "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    settings.pop("RAY_ADDRESS", None)
    command = [RAY, "start", "--head", f"--autoscaling-config={ray_folder}/autoscaling.json", "--num-cpus=0"]
    command += ["--port=6379", "--include-dashboard=false", "--disable-usage-stats", "--object-store-memory=100000000"]
    command += [f"--ray-client-server-port={client}", "--min-worker-port=0", "--max-worker-port=0"]
    subprocess.run(command, env=settings, check=True, capture_output=True, timeout=120)
    printed = run_script(
        "grow_and_shrink", str(tmp_path), folder=ray_folder, RAY_ADDRESS="127.0.0.1:6379", RAY_FAKE_CLUSTER="1"
    )
    assert "embed: waiting for 1 x 1 CPU; pending: " in printed
    found = json.loads(next(line for line in printed.splitlines() if line.startswith('{"most"')))
    assert found == {"most": 3, "left": 0}, printed
    assert pa.parquet.read_table(tmp_path / "out")["x"].to_pylist() == list(range(40))


@pytest.mark.parametrize("mode", ["token", "disabled"])
def test_process_joins_a_head_that_was_started_on_this_machine(ray_folder: str, tmp_path: Path, mode: str) -> None:
    """`ray start` asks for a token if one exists; who joins finds it without RAY_AUTH_MODE, and without RAY_ADDRESS."""
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray/auth_token").write_text("0123456789abcdef" * 4)
    settings = os.environ | {"HOME": str(tmp_path), "RAY_TMPDIR": ray_folder, "PYTHONPATH": str(ROOT)}
    for name in ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        settings.pop(name, None)
    gcs, client = free_ports(2)
    command = [RAY, "start", "--head", "--num-cpus=3", f"--port={gcs}", f"--ray-client-server-port={client}"]
    command += ["--include-dashboard=false", "--disable-usage-stats", "--object-store-memory=100000000"]
    command += ["--min-worker-port=0", "--max-worker-port=0"]
    started = settings | ({"RAY_AUTH_MODE": "disabled"} if mode == "disabled" else {})
    subprocess.run(command, env=started, check=True, capture_output=True, timeout=120)

    def join(**environment: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "tests.scripts.join_head"],
            cwd=ROOT,
            env=settings | environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert "Traceback" not in done.stderr, done.stderr
        return done.stdout + done.stderr

    assert "that was started on this machine" in (found := join())
    assert "the cluster has 1 node with 3 CPUs" in found
    assert "the cluster has 1 node with 3 CPUs" in join(RAY_ADDRESS=f"127.0.0.1:{gcs}")
    assert "the cluster has 1 node with 3 CPUs" in join(RAY_ADDRESS="auto")
    if mode == "token":
        begin = time.monotonic()
        refused = join(RAY_ADDRESS=f"127.0.0.1:{gcs}", RAY_AUTH_MODE="token", RAY_AUTH_TOKEN="f" * 64)
        assert "rejects this process. If it requires a token, set RAY_AUTH_MODE=token" in refused
        assert time.monotonic() - begin < 60  # with the start of Python and its imports
