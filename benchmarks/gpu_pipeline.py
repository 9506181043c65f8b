"""The whole pipeline on a machine with GPUs: seconds, GPU utilization and GPU memory per stage.

    uv run python benchmarks/gpu_pipeline.py [config=beauty] [root=FOLDER] [data.path=FOLDER] [key=value ...]

Runs `python -m jobs.pipeline` with the bundled text encoder in a fresh root, and samples `nvidia-smi` once per second
meanwhile. A stage is what passes between two artifacts: utilization is the mean over its samples and all GPUs, memory
the maximum of any GPU. Training speed next to the device's limit: `benchmarks/step_profile.py`. Without a GPU the
seconds are reported alone.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

QUERY = ["nvidia-smi", "--query-gpu=utilization.gpu,memory.used", "--format=csv,noheader,nounits"]


def sample(samples: list[tuple[float, float, float]], over: threading.Event) -> None:
    """Append (time, mean utilization in %, maximum memory in MiB) over the GPUs, once per second."""
    while not over.wait(1):
        lines = subprocess.run(QUERY, capture_output=True, text=True, check=True).stdout.splitlines()
        values = [[float(value) for value in line.split(",")] for line in lines]
        samples.append((time.time(), sum(u for u, _ in values) / len(values), max(memory for _, memory in values)))


def main() -> None:
    overrides = dict(argument.split("=", 1) for argument in sys.argv[1:])
    config = overrides.pop("config", "beauty")
    root = Path(overrides.pop("root", "") or tempfile.mkdtemp(prefix="tiger-gpu-"))
    overrides.setdefault("embedding.model", "bundled")
    samples: list[tuple[float, float, float]] = []
    over = threading.Event()
    thread = threading.Thread(target=sample, args=(samples, over), daemon=True)
    has_gpu = shutil.which("nvidia-smi") is not None
    if has_gpu:
        thread.start()
    command = [
        sys.executable,
        "-m",
        "jobs.pipeline",
        config,
        f"root={root}",
        *(f"{k}={v}" for k, v in overrides.items()),
    ]
    begin = time.time()
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    over.set()
    if done.returncode:
        sys.exit(done.returncode)
    print(done.stdout.strip().splitlines()[-1])
    manifests = sorted(root.glob("*/manifest.json"), key=lambda path: path.stat().st_mtime)
    print(f"{'stage':<18}{'seconds':>9}{'GPU %':>8}{'GPU MiB':>9}")
    for manifest in manifests:
        end = manifest.stat().st_mtime
        own = [(utilization, memory) for at, utilization, memory in samples if begin <= at < end]
        gpu = f"{sum(u for u, _ in own) / len(own):>8.0f}{max(m for _, m in own):>9.0f}" if own else f"{'-':>8}{'-':>9}"
        print(f"{json.loads(manifest.read_text())['kind']:<18}{end - begin:>9.1f}{gpu}")
        begin = end


if __name__ == "__main__":
    main()
