"""What tests share: a toy run in one process, and one local Ray for the whole session."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import tiger.scale  # noqa: F401  settles Ray's environment, which Ray reads when any test imports it first
from tiger.catalog import Histories
from tiger.semantic_ids import SemanticIds

BEAUTY = Path(os.environ.get("TIGER_BEAUTY", Path(__file__).parents[2] / "shared/data/amazon-beauty"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of the real data are skipped, with the reason, where the files are not."""
    if not BEAUTY.is_dir():
        for item in items:
            if item.get_closest_marker("beauty"):
                item.add_marker(pytest.mark.skip(reason=f"the Amazon Beauty files are not in {BEAUTY}"))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIGER_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    """A Ray of our own: four logical CPUs, its own short folder, no dashboard."""
    import ray

    folder = tempfile.mkdtemp(prefix="ray")  # short: socket paths have at most 107 bytes
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = str(Path(__file__).parent)  # workers import what test modules define
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


def random_ids(rng: np.random.Generator, items: int, sizes: tuple[int, ...]) -> SemanticIds:
    """Distinct random semantic IDs."""
    flat = rng.choice(int(np.prod(sizes)), size=items, replace=False)
    return SemanticIds(np.stack(np.unravel_index(flat, sizes), axis=1).astype(np.int16), sizes)


def toy_histories(rng: np.random.Generator, users: int, items: int, longest: int = 12) -> Histories:
    """Random histories of 3 to `longest` items, split leave-one-out."""
    lengths = rng.integers(3, longest + 1, users)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return Histories(
        [f"user{u}" for u in range(users)],
        offsets,
        rng.integers(0, items, offsets[-1]).astype(np.int32),
        offsets[1:] - 2,
        offsets[1:] - 1,
    )
