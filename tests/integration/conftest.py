"""One finished run for all tests of this folder that read it."""

from __future__ import annotations

import os

import pytest

from tests.pipelines import run_pipeline
from tiger.core.artifacts import Artifact


@pytest.fixture(scope="session")
def finished(local_ray: None, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """Return the evaluation of a run of the whole pipeline; tests add artifacts to its root and change none."""
    os.environ["TIGER_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    return run_pipeline(tmp_path_factory.mktemp("runs"))
