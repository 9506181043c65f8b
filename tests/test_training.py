"""The loop: the same in one process and in two, and the same with and without an interruption."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from conftest import random_ids, toy_histories

from tiger import training
from tiger.config import build
from tiger.errors import HealthError
from tiger.examples import Examples, Sequences
from tiger.learning import learn_model, learn_tokenizer
from tiger.model import ModelConfig
from tiger.tokenizers import TokenizerConfig
from tiger.training import Hooks

CPU = torch.device("cpu")
TOKENIZER = {"codebook_size": 16, "dropout": 0.0, "training": {"epochs": 4, "batch_size": 100, "validate_every": 1.0}}
MODEL = {
    "d_model": 16, "heads": 2, "head_dim": 8, "d_ff": 32, "layers": 1, "dropout": 0.0, "max_items": 5,
    "training": {"epochs": 2, "batch_size": 64, "warmup_steps": 2, "precision": "float32"},
}  # fmt: skip


def learn(which: str, hooks: Hooks | None = None, **changes: Any) -> tuple[torch.nn.Module, Any]:
    rng = np.random.default_rng(0)
    if which == "tokenizer":
        vectors = torch.from_numpy(rng.normal(size=(551, 12)).astype(np.float32))  # odd: shares are uneven
        config = TokenizerConfig.resolve(TOKENIZER | changes)
        return learn_tokenizer(config, vectors, device=CPU, hooks=hooks)
    ids = random_ids(rng, 60, (8, 8, 8))
    kind = {"mode": "fast", "item_tokens": True, "dense": 0.5} if which == "dense" else {"mode": which}
    config, vectors = build(ModelConfig, MODEL | kind | changes), torch.from_numpy(rng.normal(size=(60, 7))).float()
    return learn_model(config, toy_histories(rng, 201, 60), ids, device=CPU, vectors=vectors, hooks=hooks)


def losses(result: Any) -> list[float]:
    return [loss for look in result.log for loss in look.get("losses", [])]


def _worker(rank: int, port: int, workers: int, which: str, changes: dict[str, Any], target: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=workers)
    if "diverging" in changes:
        try:
            _diverge(rank)
        except HealthError as error:
            Path(target, f"{rank}.json").write_text(json.dumps(str(error)))
    else:
        module, result = learn(which, **changes)
        state = {name: tensor.tolist() for name, tensor in module.state_dict().items()}
        left = {"losses": losses(result), "best": result.best, "state": state}
        Path(target, f"{rank}.json").write_text(json.dumps(left))
    dist.destroy_process_group()


def _diverge(rank: int) -> None:
    """A tokenizer whose refresh is not broadcast: worker 1 adds one millionth to a number of its codebook."""
    module = torch.nn.Linear(3, 1)
    torch.nn.init.ones_(module.weight)
    torch.nn.init.ones_(module.bias)
    module.register_buffer("codebook", torch.ones(4))
    if rank == 1:
        module.codebook[2] += 1e-6
    training.require_equal(module, "tokenizer")


def group(workers: int, which: str, target: Path, **changes: Any) -> list[Any]:
    """What each worker of a process group left."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(_worker, (port, workers, which, changes, str(target)), nprocs=workers)
    return [json.loads((target / f"{rank}.json").read_text()) for rank in range(workers)]


@pytest.mark.parametrize("which", ["tokenizer", "faithful", "fast", "dense"])
def test_two_workers_equal_one(which: str, tmp_path: Path) -> None:
    _, alone = learn(which)
    first, second = group(2, which, tmp_path)
    assert first == second  # losses, figures and every parameter and buffer
    assert len(losses(alone)) >= 20
    np.testing.assert_allclose(first["losses"][:20], losses(alone)[:20], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("workers", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("update", ["ema", "gradient"])
def test_averages_and_resets_are_the_same_on_every_worker(update: str, workers: int, tmp_path: Path) -> None:
    """551 rows in batches of 100: the last batch, of 51, is uneven on 2 and on 4 workers, and no row is lost."""
    changes = {"codebook_update": update, "balance_last_level": True, "linear_path": False}
    _, alone = learn("tokenizer", **changes)
    first, *others = group(workers, "tokenizer", tmp_path, **changes)
    assert all(other == first for other in others)
    np.testing.assert_allclose(first["losses"][:6], losses(alone)[:6], atol=1e-3, rtol=1e-3)


def test_workers_that_come_apart_are_stopped(tmp_path: Path) -> None:
    said = group(2, "tokenizer", tmp_path, diverging=True)
    assert said[0] == said[1]
    assert "the workers' states have come apart in codebook (1 of 3 tensors)" in said[0]


@pytest.mark.parametrize("which", ["tokenizer", "faithful", "fast", "dense"])
def test_going_on_from_a_snapshot_changes_nothing(which: str) -> None:
    """With dropout on: everything random is a function of the step."""

    class Killed(Exception):
        pass

    kept: list[bytes] = []

    def save(state: dict[str, Any], metrics: dict[str, Any]) -> None:
        import io

        buffer = io.BytesIO()
        torch.save(state, buffer)
        kept.append(buffer.getvalue())
        if len(kept) == 1:
            raise Killed

    def load() -> dict[str, Any] | None:
        import io

        return torch.load(io.BytesIO(kept[-1]), weights_only=True) if kept else None

    undisturbed, expected = learn(which, dropout=0.2)
    with pytest.raises(Killed):
        learn(which, Hooks(save=save, load=load), dropout=0.2)
    module, result = learn(which, Hooks(save=save, load=load), dropout=0.2)
    assert losses(result) == losses(expected)
    assert result.best == expected.best
    for name, tensor in undisturbed.state_dict().items():
        assert torch.equal(tensor, module.state_dict()[name]), name


def test_the_best_weights_are_left_and_patience_ends_the_training() -> None:
    """A learning rate of almost nothing cannot improve on the first look for long."""
    _, result = learn(
        "tokenizer", codebook_update="gradient", training={"epochs": 50, "patience": 2, "learning_rate": 1e-12}
    )
    assert result.stopped_early
    assert result.steps < 50 * 3
    assert result.best["objective"] == max(look["objective"] for look in result.log)


# --- examples ---------------------------------------------------------------------------------------------------


def toy_examples(**changes: int) -> Examples:
    rng = np.random.default_rng(3)
    return Examples(
        toy_histories(rng, 40, 30), random_ids(rng, 30, (4, 4, 4)), **{"max_items": 5, "user_tokens": 0} | changes
    )


def test_all_prefixes_of_the_training_part_and_nothing_else() -> None:
    rng = np.random.default_rng(3)
    histories, ids = toy_histories(rng, 40, 30), random_ids(rng, 30, (4, 4, 4))
    examples = Examples(histories, ids, 5, 0)
    expected = []
    for user in range(40):
        training = histories.of(user)[:-2]  # leave-one-out: the last two are targets of test and validation
        expected += [(training[max(0, n - 5) : n].tolist(), int(training[n])) for n in range(1, len(training))]
    found = []
    for row in range(len(examples)):
        history, target = examples.collate(np.array([row]))
        found.append((ids.item_of(history[0].numpy()).tolist(), int(ids.item_of(target.numpy())[0])))
    assert sorted(found) == sorted(expected)
    assert len(examples) == histories.training_examples()


def test_sequences_have_the_same_targets_and_histories() -> None:
    rng = np.random.default_rng(3)
    histories, ids = toy_histories(rng, 40, 30, longest=25), random_ids(rng, 30, (4, 4, 4))
    examples, sequences = Examples(histories, ids, 5, 0), Sequences(histories, ids, 5)
    assert len(sequences) == len(examples)
    found = []
    for row in range(len(sequences.length)):
        sequence, targets = sequences.collate(np.array([row]))
        items = ids.item_of(sequence[0].numpy()).tolist()
        found += [(items[max(0, n - 5) : n], items[n]) for n in range(len(items) - int(targets[0]), len(items))]
    expected = []
    for row in range(len(examples)):
        history, target = examples.collate(np.array([row]))
        expected.append((ids.item_of(history[0].numpy()).tolist(), int(ids.item_of(target.numpy())[0])))
    assert sorted(found) == sorted(expected)
    order = sequences.order(0, 0, 32)
    assert sorted(np.concatenate(order).tolist()) == list(range(len(sequences.length)))
    assert sequences.steps_per_epoch(32) == len(sequences.order(1, 7, 32))


def test_an_epoch_shows_every_example_once_and_orders_differ() -> None:
    examples = toy_examples()
    first, again, second = (examples.order(0, epoch, 16) for epoch in (0, 0, 1))
    assert sorted(np.concatenate(first).tolist()) == list(range(len(examples)))
    assert [batch.tolist() for batch in first] == [batch.tolist() for batch in again]
    assert [batch.tolist() for batch in first] != [batch.tolist() for batch in second]
    assert len(first) == examples.steps_per_epoch(16)


def test_shorter_histories_are_padded_in_front() -> None:
    examples = toy_examples()
    rows = np.array([int(np.flatnonzero(examples.length == n)[0]) for n in (1, 3)])
    history, _ = examples.collate(rows)
    assert (history[0, :2] == -1).all()
    assert (history[0, 2:] >= 0).all()
    assert (history[1] >= 0).all()
