"""A real `ray job submit` against a real head with token authentication: exit codes, logs, who is let in."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.paths import ROOT
from tests.pipelines import TINY
from tests.processes import RAY, free_ports
from tiger.core.artifacts import open_artifact

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def head() -> Iterator[dict[str, str]]:
    """Environment of a client of a head of our own."""
    folder = tempfile.mkdtemp(prefix="ray")
    gcs, dashboard, client, agent, grpc, metrics = free_ports(6)
    environment = os.environ | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    environment.pop("RAY_ADDRESS", None)
    command = [RAY, "start", "--head", "--block", "--num-cpus=4", "--disable-usage-stats", f"--temp-dir={folder}"]
    command += [f"--port={gcs}", f"--dashboard-port={dashboard}", "--dashboard-host=127.0.0.1"]
    command += [f"--ray-client-server-port={client}", f"--dashboard-agent-listen-port={agent}"]
    command += [f"--dashboard-agent-grpc-port={grpc}", f"--metrics-export-port={metrics}"]
    command += ["--min-worker-port=0", "--max-worker-port=0", "--object-store-memory=200000000"]
    log = Path(folder, "start.log")
    with log.open("wb") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output, start_new_session=True)
    address = f"http://127.0.0.1:{dashboard}"
    deadline = time.monotonic() + 120
    while not _answers(f"{address}/api/version", environment["RAY_AUTH_TOKEN"]):
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(1)
    yield environment | {"RAY_API_SERVER_ADDRESS": address}
    os.killpg(process.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(20)
    for entry in Path("/proc").glob("[0-9]*/cmdline"):  # what has left the group, told by our folder's name
        try:
            if folder.encode() in entry.read_bytes():
                os.kill(int(entry.parent.name), signal.SIGKILL)
        except (FileNotFoundError, ProcessLookupError):
            continue
    shutil.rmtree(folder, ignore_errors=True)


def _answers(url: str, token: str) -> bool:
    try:
        request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"})
        with urllib.request.urlopen(request, timeout=5) as response:
            return response.status == 200
    except OSError:
        return False


def submit(head: dict[str, str], *command: str, options: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    arguments = [RAY, "job", "submit", *options, "--working-dir", ".", "--", sys.executable, "-m", *command]
    deadline = time.monotonic() + 120
    while True:
        done = subprocess.run(arguments, cwd=ROOT, env=head, capture_output=True, text=True, timeout=1500)
        if "No available agent to submit job" not in done.stderr or time.monotonic() > deadline:
            return done  # a head answers some seconds before it takes jobs
        time.sleep(2)


def test_a_job_runs_on_the_cluster_and_its_last_line_is_json(head: dict[str, str], tmp_path: Path) -> None:
    done = submit(head, "jobs.embed", *TINY, f"root={tmp_path}")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    line = next(line for line in reversed(done.stdout.splitlines()) if line.startswith('{"artifact"'))
    items = json.loads(line)["items"]
    assert 250 <= items <= 300  # those that nobody has bought are left out
    assert f"embed: {items} of {items} rows" in done.stdout  # progress of the driver reaches the submitter's log
    assert list(tmp_path.glob("embeddings-*/manifest.json"))


def test_a_failing_job_fails_with_its_error_in_the_last_lines(head: dict[str, str]) -> None:
    done = submit(head, "jobs.prepare", "tokenizer.num_levls=4")
    assert done.returncode == 1
    assert (
        "error: unknown key tokenizer.num_levls; did you mean tokenizer.num_levels?"
        in done.stdout[-1500:] + done.stderr[-1500:]
    )


def test_a_job_that_was_stopped_resumes_when_it_is_submitted_again(head: dict[str, str], tmp_path: Path) -> None:
    training = [
        "tokenizer.training.epochs=2000",
        "tokenizer.training.patience=1000",
        "tokenizer.training.validate_every_epochs=20",
    ]
    command = ["jobs.semantic_ids", *TINY, *training, f"root={tmp_path}"]
    begun = submit(head, *command, options=("--no-wait", "--submission-id=stopped"))
    assert begun.returncode == 0, begun.stdout + begun.stderr
    deadline = time.monotonic() + 900
    while not list(tmp_path.glob("tokenizer-*/scratch/snapshots/step-*/record.json")):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    subprocess.run([RAY, "job", "stop", "stopped"], env=head, check=True, capture_output=True, timeout=120)
    status = subprocess.run([RAY, "job", "status", "stopped"], env=head, capture_output=True, text=True, timeout=60)
    assert "was stopped" in status.stdout + status.stderr
    assert not list(tmp_path.glob("tokenizer-*/manifest.json")), "it had ended before it was stopped"
    done = submit(head, *command)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "resuming from the checkpoint at step" in done.stdout
    (tokenizer,) = tmp_path.glob("tokenizer-*")
    open_artifact(str(tokenizer)).verify()


def test_without_the_token_nobody_gets_in(head: dict[str, str]) -> None:
    with pytest.raises(urllib.error.HTTPError) as error:
        urllib.request.urlopen(f"{head['RAY_API_SERVER_ADDRESS']}/api/jobs/", timeout=10)
    assert error.value.code == 401
