"""Unit tests start no Ray: what needs one belongs to tests/integration or tests/faults."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:  # what trains is imported by the fixtures: most modules do without
    from tests.living_catalogs import Shop
    from tiger.core.artifacts import Artifact


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


@pytest.fixture(scope="session")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    """Return a shop whose model is trained; tests add artifacts to its root and change none."""
    from tests.living_catalogs import TRAINED, shop_run, train_in_process, train_shop

    folder = tmp_path_factory.mktemp("shop")
    with pytest.MonkeyPatch.context() as monkeypatch:
        train_in_process(monkeypatch)
        return folder, train_shop(shop_run(folder / "files", TRAINED, f"root={folder}/runs"))


@pytest.fixture(scope="session")
def other_shop(shop: Shop, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """Return a model with other semantic IDs, in the same root."""
    from tests.living_catalogs import TRAINED, shop_run, train_in_process, train_shop

    files = tmp_path_factory.mktemp("other")
    with pytest.MonkeyPatch.context() as monkeypatch:
        train_in_process(monkeypatch)
        return train_shop(shop_run(files, TRAINED, f"root={shop[0]}/runs", "model.seed=1", clicks_seed=5))
