"""Training in process groups: every worker ends with the same state, and with what one process would have."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest

from tests.trainings import AUTO, KINDS, group, kept_in, learn, losses
from tiger.core.errors import ConfigError
from tiger.core.storage import Folder
from tiger.training.checkpoints import CheckpointStore

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("which", ["tokenizer", *KINDS, "sasrec"])
def test_two_workers_equal_one(which: str, tmp_path: Path) -> None:
    """Buffers are not sent at any step: the text embeddings are one, of gigabytes in large catalogs."""
    _, alone = learn(which)
    first, second = group(2, which, tmp_path)
    assert first == second  # losses, figures and every parameter and buffer
    assert first["buffers_synced"] == 0
    assert len(losses(alone)) >= 20
    np.testing.assert_allclose(first["losses"][:20], losses(alone)[:20], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("workers", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("update", ["ema", "gradient"])
def test_averages_and_resets_are_the_same_on_every_worker(update: str, workers: int, tmp_path: Path) -> None:
    """551 rows in batches of 100: the last batch, of 51, is uneven on 2 and on 4 workers, and no row is lost."""
    changes = {"codebook_update": update, "sinkhorn_last_level": True, "linear_skip": False}
    _, alone = learn("tokenizer", **changes)
    first, *others = group(workers, "tokenizer", tmp_path, **changes)
    assert all(other == first for other in others)
    np.testing.assert_allclose(first["losses"][:6], losses(alone)[:6], atol=1e-3, rtol=1e-3)


def test_workers_that_come_apart_are_stopped(tmp_path: Path) -> None:
    said = group(2, "tokenizer", tmp_path, diverging=True)
    assert said[0] == said[1]
    assert "the workers' states diverged in codebook (1 of 3 tensors)" in said[0]


@pytest.mark.parametrize("which", ["tokenizer", "trie"])
def test_another_number_of_workers_resumes_with_a_warning(
    which: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Two workers are lost after their first snapshot, and one continues: losses are equal up to rounding."""
    folder = str(tmp_path / "snapshots")
    _, undisturbed = learn(which)
    group(2, which, tmp_path, snapshots=folder, saves=1)
    with pytest.raises(ConfigError, match="scale.training.max_workers was 2, is 1"):
        CheckpointStore(Folder(folder), {"scale": {"training": {"max_workers": 1}}}).load()
    _, result = learn(which, kept_in(folder, 1, saves=0))
    (warning,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert warning.startswith("scale.training.max_workers was 2, is 1 since the last checkpoint: ")
    assert len(losses(result)) == len(losses(undisturbed))
    np.testing.assert_allclose(losses(result), losses(undisturbed), atol=1e-3, rtol=1e-3)


# --- precision --------------------------------------------------------------------------------------------------


def test_all_workers_take_the_precision_of_rank_0(tmp_path: Path) -> None:
    preferred = [("bfloat16", 1.83), ("float32", 0.5)]
    first, second = group(2, "trie", tmp_path, preferred=preferred, **AUTO)
    assert first == second
    assert (first["precision"], first["precision_speedup"]) == ("bfloat16", 1.83)
