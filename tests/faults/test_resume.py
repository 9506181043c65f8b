"""Real process groups on a real Ray, killed again and again: losses and weights come out as if nothing had happened."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.paths import ROOT
from tests.unit.test_training import group, learn, losses
from tiger.training.loop import Callbacks, rank

pytestmark = pytest.mark.slow
CHANGES: dict[str, dict[str, Any]] = {
    "tokenizer": {"dropout": 0.2, "training": {"epochs": 6, "batch_size": 100, "validate_every_epochs": 1.0}},
    "trie": {
        "dropout": 0.2,
        "training": {
            "epochs": 6, "batch_size": 64, "warmup_steps": 2, "precision": "float32", "patience": 50,
        },
    },
}  # fmt: skip
KILLS = [(1, "before", 0), (2, "after", 1), (4, "before", 0)]
"""(which save, whether it has been made, the worker that is killed)."""
DRIVER = """
import json, sys
sys.path.insert(0, {tests!r})
import tiger.on_ray
from tests.faults.test_resume import killed_now_and_then
from tiger.core.storage import Folder
from tiger.run import ResourcesConfig
from tiger.on_ray.train import train
import os, ray
os.environ["PYTHONPATH"] = {tests!r}
ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, object_store_memory=200_000_000)
arguments = {{"which": {which!r}, "marks": {marks!r}}}
open({marks!r} + "/driver", "w").write(str(os.getpid()))
scale = ResourcesConfig(train_workers=2, cpus_per_worker=1, max_failures=5)
print(json.dumps(train(killed_now_and_then, arguments, Folder({target!r}), scale, "test")))
"""


def killed_now_and_then(arguments: dict[str, Any], device: torch.device, hooks: Callbacks) -> dict[str, Any]:
    """Trains; a worker is killed around three saves, and then the driver around one."""
    marks, saves = Path(arguments["marks"]), 0
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
    module, result = learn(arguments["which"], watched, **CHANGES[arguments["which"]])
    state = {name: tensor.tolist() for name, tensor in module.state_dict().items()}
    return {"losses": losses(result), "best": result.best, "state": state}


@pytest.mark.parametrize("which", ["tokenizer", "trie"])
def test_three_worker_kills_and_a_driver_kill_change_nothing(which: str, tmp_path: Path) -> None:
    truth, _ = group(2, which, tmp_path, **CHANGES[which])
    marks = tmp_path / "marks"
    marks.mkdir()
    script = DRIVER.format(tests=str(ROOT), which=which, marks=str(marks), target=str(tmp_path / "artifact"))

    def drive() -> int:
        """Output goes to files: what a killed driver leaves running for a moment would keep a pipe open."""
        environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
        with (tmp_path / "out").open("w") as out, (tmp_path / "err").open("w") as err:
            command = [sys.executable, "-c", script]
            return subprocess.run(command, stdout=out, stderr=err, timeout=900, env=environment, check=False).returncode

    assert drive() == -signal.SIGKILL, (tmp_path / "err").read_text()[-3000:]
    assert drive() == 0, (tmp_path / "err").read_text()[-3000:]
    found = json.loads((tmp_path / "out").read_text().splitlines()[-1])
    assert found == {key: truth[key] for key in found}  # every loss, every figure, every number of every tensor
    struck = sorted(path.name for path in marks.iterdir() if path.name.endswith(("before", "after")))
    assert len(struck) == len(KILLS) + 1
    one = len(truth["losses"]) // 6
    starts = {int(path.name.split("-")[1]) // one for path in marks.glob("from-*")}
    # Killed before its first save, it began anew; no kill cost more than an interval; and workers that have lost their
    # driver may finish a last one.
    assert starts in ({2, 3, 5}, {2, 3, 6})
