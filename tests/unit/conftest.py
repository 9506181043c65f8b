"""Unit tests start no Ray: what needs one belongs to tests/integration or tests/faults."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session")
def local_ray() -> None:
    """Refuse the fixture that other tests start Ray with."""
    pytest.fail("tests/unit starts no Ray; move this test to tests/integration or tests/faults", pytrace=False)


@pytest.fixture(autouse=True)
def _no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refuse `ray.init`, which code under test may call."""
    monkeypatch.setattr(
        "ray.init", lambda *_, **__: pytest.fail("tests/unit starts no Ray; move this test to tests/integration")
    )


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """Train toy sizes on one thread: a second one gains nothing, and on a busy machine costs ten times the time."""
