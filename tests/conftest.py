"""Fixtures of all tests, and the catalog of faults: `-m fault` prints what was injected, promised and seen."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

import tiger.on_ray  # noqa: F401  settles Ray's environment, which Ray reads when any test imports it first
from tests.fault_catalog import FAULTS
from tests.paths import BEAUTY, ROOT

pytest_plugins = ["tests.object_stores"]  # its fixtures: proxy, root, google


_WITHOUT_RAY = frozenset(
    {
        "tests/faults/test_publish_store.py",
        "tests/integration/test_command_line.py",
        "tests/integration/test_process_groups.py",
    }
)


class _OneWithRay(LoadScopeScheduling):
    """Runs tests in two processes: one of them has all that use a Ray or start servers, which share cores and ports.

    Modules of other tests are not divided, because their fixtures are slow.
    """

    def _split_scope(self, nodeid: str) -> str:
        module = nodeid.partition("::")[0]
        needs_ray = module.startswith(("tests/integration", "tests/faults")) and module not in _WITHOUT_RAY
        return "ray" if needs_ray else module


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling:
    """Return the scheduler of `-n 2`."""
    return _OneWithRay(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Faults are marked; tests of the real data are skipped, with the reason, where the files are not."""
    for item in items:
        if _name(item.nodeid) in FAULTS:
            item.add_marker("fault")
    if not BEAUTY.is_dir():
        for item in items:
            if item.get_closest_marker("beauty"):
                item.add_marker(pytest.mark.skip(reason=f"the Amazon Beauty files are not in {BEAUTY}"))


def _name(nodeid: str) -> str:
    """`test_corpus::test_a_bad_file_is_named` of a test and all its variants."""
    return nodeid.partition("[")[0].rpartition("/")[2].replace(".py::", "::")


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """After `-m fault`: every fault, how often it was injected, what was promised and seen, and the seconds it took."""
    if config.option.markexpr != "fault":
        return
    seen: dict[str, list[Any]] = {}
    for outcome in ("passed", "failed", "error", "skipped"):
        for report in terminalreporter.stats.get(outcome, []):
            seen.setdefault(_name(report.nodeid), []).append((outcome, report))
    terminalreporter.section("faults")
    lines, total = [], 0
    for name, fault in FAULTS.items():
        reports = seen.get(name, [])
        outcomes = [outcome for outcome, _ in reports]
        wrong = [outcome for outcome in outcomes if outcome != "passed"]
        given = [value for _, report in reports for key, value in report.user_properties if key == "injections"]
        injected = sum(given) if given else len(outcomes)
        total += injected
        verdict = "as expected" if outcomes and not wrong else ", ".join(sorted(set(wrong))) or "not run"
        seconds = sum(report.duration for _, report in reports)
        lines.append(
            f"{fault.stage:<10}{fault.what:<58}{injected:>9,}  {fault.expected:<60}{verdict:<14}{seconds:>7.1f}"
        )
    terminalreporter.write_line(
        f"{'stage':<10}{'fault':<58}{'injected':>9}  {'expected':<60}{'seen':<14}{'seconds':>7}"
    )
    for line in lines:
        terminalreporter.write_line(line)
    terminalreporter.write_line(f"{len(FAULTS)} faults, {total:,} injections")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIGER_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    """A Ray of our own: four logical CPUs, its own short folder, no dashboard."""
    import ray

    folder = tempfile.mkdtemp(prefix="ray")  # short: socket paths have at most 107 bytes
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = str(ROOT)  # workers import what test modules define, as tests.*
    ray.init(
        num_cpus=4, include_dashboard=False, _temp_dir=folder, object_store_memory=200_000_000, log_to_driver=False
    )
    yield
    ray.shutdown()
    if before is None:
        del os.environ["PYTHONPATH"]
    else:
        os.environ["PYTHONPATH"] = before
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Toy sizes gain nothing from a second thread, and lose much to it on a busy machine."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
