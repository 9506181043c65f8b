"""Peak memory of a process tree."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.paths import ROOT
from tiger.core.memory import tree_memory, watch_memory

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="there is no /proc on this system")


def test_memory_of_this_process_and_of_its_children_is_counted() -> None:
    before = tree_memory()
    assert before is not None
    own = np.ones(50_000_000 // 8)
    with_own = tree_memory()
    assert with_own is not None
    assert 45e6 < with_own - before < 80e6
    child = subprocess.Popen(
        [sys.executable, str(ROOT / "tests/scripts/hold_memory.py"), "60000000"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert child.stdout is not None
    child.stdout.readline()  # it holds the memory
    with_child = tree_memory()
    child.communicate()
    assert with_child is not None
    assert 55e6 < with_child - with_own < 120e6
    del own


def test_large_tensors_of_a_job_lie_in_huge_pages() -> None:
    """A training with many item vectors spends a third of its time on page faults otherwise."""
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not setting.exists() or "[never]" in setting.read_text():
        pytest.skip("this system has no transparent huge pages")
    environment = {name: value for name, value in os.environ.items() if name != "THP_MEM_ALLOC_ENABLE"}
    command = [sys.executable, "-m", "tests.scripts.huge_pages"]
    answer = subprocess.run(command, env=environment, cwd=ROOT, check=True, capture_output=True, text=True)
    assert int(answer.stdout) > 32_000


def test_the_peak_outlives_what_was_freed() -> None:
    with watch_memory() as peak:
        before = peak.bytes
        held = np.ones(80_000_000 // 8)
        peak.sample()
        del held
    assert peak.bytes is not None
    assert peak.bytes - (before or 0) > 70e6
