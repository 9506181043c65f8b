"""Real process groups on a real Ray, killed again and again: losses and weights come out as if nothing had happened."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.paths import ROOT
from tests.trainings import group
from tests.workers import KILL_TRAINING, KILLS

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("which", ["tokenizer", "trie"])
def test_three_worker_kills_and_a_driver_kill_change_nothing(which: str, tmp_path: Path) -> None:
    truth, _ = group(2, which, tmp_path, **KILL_TRAINING[which])
    marks = tmp_path / "marks"
    marks.mkdir()
    arguments = [which, str(marks), str(tmp_path / "artifact")]

    def drive() -> int:
        """Output goes to files: what a killed driver leaves running for a moment would keep a pipe open."""
        environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
        environment["PYTHONPATH"] = str(ROOT)
        with (tmp_path / "out").open("w") as out, (tmp_path / "err").open("w") as err:
            command = [sys.executable, "-m", "tests.scripts.killed_training", *arguments]
            return subprocess.run(
                command, cwd=ROOT, stdout=out, stderr=err, timeout=900, env=environment, check=False
            ).returncode

    assert drive() == -signal.SIGKILL, (tmp_path / "err").read_text()[-3000:]
    assert drive() == 0, (tmp_path / "err").read_text()[-3000:]
    found = json.loads((tmp_path / "out").read_text().splitlines()[-1])
    assert found == {key: truth[key] for key in found}  # every loss, every figure, every number of every tensor
    struck = sorted(path.name for path in marks.iterdir() if path.name.endswith(("before", "after")))
    assert len(struck) == len(KILLS) + 1
    one = len(truth["losses"]) // 6
    starts = {int(path.name.split("-")[1]) // one for path in marks.glob("from-*")}
    # Killed before its first save, it began at step 0. Checkpoints are written while the training continues, so that a
    # kill costs the interval under way, and the one whose checkpoint was not yet complete; and workers that have lost
    # their driver may finish a last one.
    possible = itertools.product((1, 2), (2, 3), (4, 5, 6))
    assert starts in [set(each) for each in possible]
