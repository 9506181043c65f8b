"""The loop: the same in one process and in two, and the same with and without an interruption."""

from __future__ import annotations

import errno
import io
import logging
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.trainings import AUTO, KINDS, Killed, kept_in, learn, losses
from tiger.core.errors import ConfigError
from tiger.core.precision import Choice
from tiger.core.storage import Folder
from tiger.training import loop as training
from tiger.training.checkpoints import CheckpointStore
from tiger.training.loop import Callbacks
from tiger.training.schedule import TrainingConfig

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("which", ["tokenizer", *KINDS, "sasrec"])
def test_going_on_from_a_snapshot_changes_nothing(which: str) -> None:
    """With dropout on: everything random is a function of the step."""

    kept: list[bytes] = []

    def save(state: dict[str, Any], metrics: dict[str, Any]) -> None:
        buffer = io.BytesIO()
        torch.save(state, buffer)
        kept.append(buffer.getvalue())
        if len(kept) == 1:
            raise Killed

    def load() -> dict[str, Any] | None:
        return torch.load(io.BytesIO(kept[-1]), weights_only=True) if kept else None

    undisturbed, expected = learn(which, dropout=0.2)
    with pytest.raises(Killed):
        learn(which, Callbacks(save=save, load=load), dropout=0.2)
    module, result = learn(which, Callbacks(save=save, load=load), dropout=0.2)
    assert losses(result) == losses(expected)
    assert result.best == expected.best
    for name, tensor in undisturbed.state_dict().items():
        assert torch.equal(tensor, module.state_dict()[name]), name


def test_what_else_differs_is_refused_still(tmp_path: Path) -> None:
    given = {"lr": 0.1, "scale": {"training": {"max_workers": 2}}}
    CheckpointStore(Folder(str(tmp_path)), given).save({"state": {"step": 1}}, {"step": 1})
    changed = CheckpointStore(
        Folder(str(tmp_path)),
        {"lr": 0.2, "scale": {"training": {"max_workers": 1}}},
        may_differ=["scale.training.max_workers"],
    )
    with pytest.raises(ConfigError, match=r"different configuration: lr was 0.1, is 0.2; restore"):
        changed.load()


# --- precision --------------------------------------------------------------------------------------------------


def prefer(choice: Choice, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "choose", lambda precision, device, shapes: choice)


def test_a_resumed_training_continues_in_the_precision_of_its_snapshot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    prefer(Choice("bfloat16", 1.83), monkeypatch)
    _, undisturbed = learn("trie", **AUTO)
    with pytest.raises(Killed):
        learn("trie", kept_in(str(tmp_path), 1, saves=1), **AUTO)
    prefer(Choice("float32", 0.5), monkeypatch)
    with caplog.at_level(logging.INFO):
        _, result = learn("trie", kept_in(str(tmp_path), 1, saves=0), **AUTO)
    assert any("continuing in bfloat16, the precision of its checkpoint" in line for line in caplog.messages)
    assert losses(result) == losses(undisturbed)
    assert result.precision == undisturbed.precision == Choice("bfloat16", 1.83)
    _, other = learn("trie", **AUTO)
    assert losses(other) != losses(undisturbed)  # it does matter


def test_a_snapshot_from_before_precisions_were_kept_takes_the_present_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(Killed):
        learn("trie", kept_in(str(tmp_path), 1, saves=1))
    hooks = kept_in(str(tmp_path), 1, saves=0)
    load = hooks.load

    def load_old() -> dict[str, Any] | None:
        state = load()
        assert state is not None
        del state["state"]["precision"], state["state"]["precision_speedup"]
        return state

    hooks.load = load_old
    prefer(Choice("bfloat16", 1.5), monkeypatch)
    _, result = learn("trie", hooks, **AUTO)
    assert result.precision == Choice("bfloat16", 1.5)


def test_a_training_of_no_steps_measures_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "choose", lambda *arguments: pytest.fail("measured"))
    _, result = learn("trie", training=AUTO["training"] | {"epochs": 0})
    assert result.precision == Choice("float32")


# --- prefetching ------------------------------------------------------------------------------------------------


def test_max_steps_end_a_training_inside_an_epoch() -> None:
    config = TrainingConfig(epochs=3, batch_size=10, max_steps=25, learning_rate=1.0, warmup_steps=4)
    schedule = config.schedule(examples=100, seed=0)
    assert schedule.steps == 25
    assert [step for step in range(1, 26) if schedule.is_validation_step(step)] == [10, 20, 25]
    rates = [schedule.learning_rate(step) for step in range(25)]
    assert rates[3] == 1.0
    assert 0 < rates[-1] < 0.01
    assert config.model_copy(update={"max_steps": 99}).schedule(100, 0).steps == 30


def test_the_best_weights_are_left_and_patience_ends_the_training() -> None:
    """A learning rate of almost nothing cannot improve on the first look for long."""
    _, result = learn(
        "tokenizer", codebook_update="gradient", training={"epochs": 50, "patience": 2, "learning_rate": 1e-12}
    )
    assert result.stopped_early
    assert result.steps < 50 * 3
    assert result.best["objective"] == max(look["objective"] for look in result.log)


def test_a_checkpoint_in_the_background_is_that_of_its_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The training goes on, and changes its weights in place, while they are written; an error comes with the next."""
    snapshots = CheckpointStore(Folder(str(tmp_path)), {}, in_background=True)
    weight, may_write = torch.ones(3), threading.Event()
    write = CheckpointStore._write
    monkeypatch.setattr(CheckpointStore, "_write", lambda *arguments: may_write.wait(60) and write(*arguments))
    snapshots.save({"weight": weight}, {"step": 1})
    weight += 1
    assert not list(tmp_path.rglob("record.json"))
    may_write.set()
    assert torch.equal(snapshots.load()["weight"], torch.ones(3))
    for step in (2, 3, 4):
        snapshots.save({"weight": weight}, {"step": step})
    snapshots.close()
    assert torch.equal(snapshots.load()["weight"], weight)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "injected")

    monkeypatch.setattr(CheckpointStore, "_write", full)
    snapshots.save({"weight": weight}, {"step": 5})
    with pytest.raises(OSError, match="injected"):
        snapshots.save({"weight": weight}, {"step": 6})
    assert torch.equal(snapshots.load()["weight"], weight)
