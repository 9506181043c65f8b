"""Commands in processes of their own: an error is one line and an exit code."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.paths import ROOT

ONE_LINE = {
    ("jobs.prepare", "tokenizer.num_levls=4"): "unknown key tokenizer.num_levls; did you mean tokenizer.num_levels?",
    ("jobs.tune", "tuning.num_trails=4"): "unknown key tuning.num_trails; did you mean tuning.num_trials?",
    ("jobs.tune", "beauty"): "tiger/configs/beauty.tune.toml does not exist",
}


@pytest.mark.parametrize("command", ONE_LINE, ids=" ".join)
def test_an_error_is_one_line_and_an_exit_code(command: tuple[str, ...]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", *command],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONWARNINGS": "ignore"},
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert ONE_LINE[command] in done.stderr
