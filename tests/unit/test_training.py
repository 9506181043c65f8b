"""The loop: the same in one process and in two, and the same with and without an interruption."""

from __future__ import annotations

import io
import json
import logging
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests.factories import random_ids, toy_histories
from tiger.core.config import build
from tiger.core.errors import ConfigError, HealthError
from tiger.core.precision import Choice
from tiger.core.storage import Folder
from tiger.data.histories import Histories
from tiger.models import sasrec
from tiger.models.sasrec import SASRecConfig
from tiger.models.tiger.batches import SequenceExamples, TargetExamples, make_examples
from tiger.models.tiger.config import ModelConfig
from tiger.models.tiger.train import fit_model
from tiger.semantic_ids.trie import Trie
from tiger.tokenizers.base import TokenizerConfig
from tiger.tokenizers.train import fit_tokenizer
from tiger.training import loop as training
from tiger.training.checkpoints import CheckpointStore
from tiger.training.loop import Callbacks, prefetch

CPU = torch.device("cpu")
TOKENIZER = {
    "codebook_size": 16,
    "dropout": 0.0,
    "training": {"epochs": 4, "batch_size": 100, "validate_every_epochs": 1.0},
}
MODEL = {
    "d_model": 16, "num_heads": 2, "head_dim": 8, "d_ff": 32, "num_layers": 1, "dropout": 0.0,
    "item_dropout": 0.0, "max_history_items": 5,
    "training": {"epochs": 2, "batch_size": 64, "warmup_steps": 2, "precision": "float32"},
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "trie": {},
    "trie bidirectional": {"encoder": "bidirectional"},
    "paper": {"encoder": "bidirectional", "encoder_input": "codes", "softmax": "codes"},
}
SASREC = {
    "embedding_dim": 16, "max_history_items": 6, "dropout": 0.0,
    "training": {"epochs": 4, "batch_size": 32, "validate_every_epochs": 1},
}  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Toy sizes gain nothing from a second thread, and lose much to it on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def learn(which: str, hooks: Callbacks | None = None, **changes: Any) -> tuple[torch.nn.Module, Any]:
    rng = np.random.default_rng(0)
    if which == "tokenizer":
        vectors = torch.from_numpy(rng.normal(size=(551, 12)).astype(np.float32))  # odd: shares are uneven
        config = TokenizerConfig.resolve(TOKENIZER | changes)
        return fit_tokenizer(config, vectors, device=CPU, hooks=hooks)
    if which == "sasrec":
        config = build(SASRecConfig, SASREC | changes)
        return sasrec.learn(config, toy_histories(rng, 201, 60), 60, device=CPU, hooks=hooks)
    ids = random_ids(rng, 60, (8, 8, 8))
    config, vectors = (
        build(ModelConfig, MODEL | KINDS[which] | changes),
        torch.from_numpy(rng.normal(size=(60, 7))).float(),
    )
    return fit_model(config, toy_histories(rng, 201, 60), ids, device=CPU, vectors=vectors, hooks=hooks)


def losses(result: Any) -> list[float]:
    return [loss for look in result.log for loss in look.get("losses", [])]


def _worker(rank: int, port: int, workers: int, which: str, changes: dict[str, Any], target: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=workers)
    parallel = torch.nn.parallel.DistributedDataParallel
    sync_buffers, synced = parallel._sync_buffers, []
    parallel._sync_buffers = lambda self: (synced.append(1), sync_buffers(self))
    if "diverging" in changes:
        try:
            _diverge(rank)
        except HealthError as error:
            Path(target, f"{rank}.json").write_text(json.dumps(str(error)))
    else:
        hooks = None
        if "preferred" in changes:  # what the worker's processor would take
            preferred = Choice(*changes.pop("preferred")[rank])
            training.choose = lambda precision, device, shapes: preferred
        if "snapshots" in changes:
            hooks = kept_in(changes.pop("snapshots"), workers, changes.pop("saves"))
        try:
            module, result = learn(which, hooks, **changes)
        except Killed:
            left: dict[str, Any] = {}
        else:
            state = {name: tensor.tolist() for name, tensor in module.state_dict().items()}
            left = {"losses": losses(result), "best": result.best, "state": state} | result.precision.figures()
        Path(target, f"{rank}.json").write_text(json.dumps(left | {"buffers_synced": len(synced)}))
    dist.destroy_process_group()


class Killed(Exception):
    pass


def kept_in(folder: str, workers: int, saves: int) -> Callbacks:
    """Checkpoints of a training whose workers are lost after `saves` of them."""
    snapshots = CheckpointStore(
        Folder(folder), {"scale": {"train_workers": workers}}, may_differ={"scale.train_workers"}
    )
    made = 0

    def save(state: dict[str, Any], metrics: dict[str, Any]) -> None:
        nonlocal made
        snapshots.save(state, metrics)
        made += 1
        if made == saves:
            raise Killed

    return Callbacks(save=save, load=snapshots.load)


def _diverge(rank: int) -> None:
    """A tokenizer whose refresh is not broadcast: worker 1 adds one millionth to a number of its codebook."""
    module = torch.nn.Linear(3, 1)
    torch.nn.init.ones_(module.weight)
    torch.nn.init.ones_(module.bias)
    module.register_buffer("codebook", torch.ones(4))
    if rank == 1:
        module.codebook[2] += 1e-6
    training.check_replicas_identical(module, "tokenizer")


def group(workers: int, which: str, target: Path, **changes: Any) -> list[Any]:
    """What each worker of a process group left."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(_worker, (port, workers, which, changes, str(target)), nprocs=workers)
    return [json.loads((target / f"{rank}.json").read_text()) for rank in range(workers)]


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


@pytest.mark.parametrize("which", ["tokenizer", "trie"])
def test_another_number_of_workers_resumes_with_a_warning(
    which: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Two workers are lost after their first snapshot, and one continues: losses are equal up to rounding."""
    folder = str(tmp_path / "snapshots")
    _, undisturbed = learn(which)
    group(2, which, tmp_path, snapshots=folder, saves=1)
    with pytest.raises(ConfigError, match="scale.train_workers was 2, is 1"):
        CheckpointStore(Folder(folder), {"scale": {"train_workers": 1}}).load()
    _, result = learn(which, kept_in(folder, 1, saves=0))
    (warning,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert warning.startswith("scale.train_workers was 2, is 1 since the last checkpoint: ")
    assert len(losses(result)) == len(losses(undisturbed))
    np.testing.assert_allclose(losses(result), losses(undisturbed), atol=1e-3, rtol=1e-3)


def test_what_else_differs_is_refused_still(tmp_path: Path) -> None:
    given = {"lr": 0.1, "scale": {"train_workers": 2}}
    CheckpointStore(Folder(str(tmp_path)), given).save({"state": {"step": 1}}, {"step": 1})
    changed = CheckpointStore(
        Folder(str(tmp_path)), {"lr": 0.2, "scale": {"train_workers": 1}}, may_differ=["scale.train_workers"]
    )
    with pytest.raises(ConfigError, match=r"different configuration: lr was 0.1, is 0.2; restore"):
        changed.load()


# --- precision --------------------------------------------------------------------------------------------------

AUTO = {"training": MODEL["training"] | {"precision": "auto"}}


def prefer(choice: Choice, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "choose", lambda precision, device, shapes: choice)


def test_all_workers_take_the_precision_of_rank_0(tmp_path: Path) -> None:
    preferred = [("bfloat16", 1.83), ("float32", 0.5)]
    first, second = group(2, "trie", tmp_path, preferred=preferred, **AUTO)
    assert first == second
    assert (first["precision"], first["precision_speedup"]) == ("bfloat16", 1.83)


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


def prefetching() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


def test_prefetched_items_come_in_order_from_one_thread_that_ends() -> None:
    names, begun = set(), []

    def items() -> Iterator[int]:
        for item in range(50):
            names.add(threading.current_thread().name)
            yield item

    assert list(prefetch(items(), begin=lambda: begun.append(1))) == list(range(50))
    assert list(prefetch(iter([]))) == []
    assert len(names) == 1
    assert names != {threading.current_thread().name}
    assert begun == [1]
    assert not prefetching()


def test_an_exception_of_the_thread_reaches_the_caller_in_its_place() -> None:
    def items() -> Iterator[int]:
        yield 1
        yield 2
        raise HealthError("torn")

    found = []
    with pytest.raises(HealthError, match="torn"):
        found.extend(prefetch(items()))  # extends by what came before
    with pytest.raises(HealthError, match="torn"):
        for item in prefetch(items()):
            found.append(item)  # noqa: PERF402
    assert found[-2:] == [1, 2]
    assert not prefetching()


def test_stopping_early_ends_the_thread_and_no_item_too_many_is_made() -> None:
    made = []

    def items() -> Iterator[int]:
        for item in range(1000):
            made.append(item)
            yield item

    with closing(prefetch(items(), ahead=2)) as coming:
        assert next(coming) == 0
        assert next(coming) == 1
    assert not prefetching()
    assert len(made) <= 4


def test_on_a_gpu_batches_are_pinned_in_the_thread_and_copied_without_waiting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With the calls of CUDA replaced: pinning in the thread, on this worker's GPU; the order stays."""
    examples, _ = toy_examples()
    calls: list[Any] = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: calls.append(("set_device", index)))
    monkeypatch.setattr(
        torch.Tensor, "pin_memory", lambda self: (calls.append(threading.current_thread().name), self.clone())[1]
    )
    monkeypatch.setattr(
        torch.Tensor, "to", lambda self, device, non_blocking=False: (calls.append((device, non_blocking)), self)[1]
    )
    ready = list(training.on_device(examples.batches(0, 0, 16), torch.device("cuda", 3)))
    monkeypatch.undo()
    expected = list(examples.batches(0, 0, 16))
    assert len(ready) == len(expected) > 3
    for one, other in zip(ready, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one.inputs, other.inputs, strict=True))
        assert torch.equal(one.weights, other.weights)
    assert calls[0] == ("set_device", 3)
    tensors = sum(len(batch.inputs) + 1 for batch in ready)  # and the weights
    assert sum(isinstance(call, str) and call.startswith("prefetch") for call in calls) == tensors
    assert calls.count((torch.device("cuda", 3), True)) == tensors


def test_the_best_weights_are_left_and_patience_ends_the_training() -> None:
    """A learning rate of almost nothing cannot improve on the first look for long."""
    _, result = learn(
        "tokenizer", codebook_update="gradient", training={"epochs": 50, "patience": 2, "learning_rate": 1e-12}
    )
    assert result.stopped_early
    assert result.steps < 50 * 3
    assert result.best["objective"] == max(look["objective"] for look in result.log)


# --- examples ---------------------------------------------------------------------------------------------------


def toy_examples(longest: int = 12, **changes: Any) -> tuple[Any, Histories]:
    """Examples whose encoder is the bidirectional one unless `changes` says otherwise."""
    rng = np.random.default_rng(3)
    histories, ids = toy_histories(rng, 40, 30, longest), random_ids(rng, 30, (4, 4, 4))
    config = build(ModelConfig, MODEL | KINDS["trie bidirectional"] | changes)
    trie = Trie(ids)
    known = trie.allowed_nodes(torch.from_numpy(histories.training_counts(30) > 0))
    return make_examples(histories, config, trie, known), histories


def pairs_of(histories: Histories) -> list[tuple[list[int], int]]:
    """All (last five items, next item) of the training parts: leave-one-out holds back the last two."""
    pairs = []
    for user in range(len(histories)):
        training = histories.of(user)[:-2]
        pairs += [(training[max(0, n - 5) : n].tolist(), int(training[n])) for n in range(1, len(training))]
    return sorted(pairs)


def test_all_prefixes_of_the_training_part_and_nothing_else() -> None:
    examples, histories = toy_examples()
    assert isinstance(examples, TargetExamples)
    found = []
    for row in range(len(examples)):
        history, target, *_ = examples.collate(np.array([row]))
        found.append((history[0].tolist(), int(target[0])))
    assert sorted(found) == pairs_of(histories)
    assert len(examples) == histories.training_examples()


@pytest.mark.parametrize("longest", [12, 60])
def test_sequences_have_the_same_targets_and_all_that_reaches_them(longest: int) -> None:
    """A window begins at the history's first item, or `context_items` before its first target."""
    sequences, histories = toy_examples(longest, encoder="causal", encoder_input="items")
    assert isinstance(sequences, SequenceExamples)
    context = 5 + 1 * 4 + 1
    found = []
    for row in range(len(sequences.length)):
        sequence, targets, positions, *_ = sequences.collate(np.array([row]))
        assert positions.tolist() == list(range(sequence.shape[1] - 1))[-int(targets[0]) :]
        items = sequence[0].tolist()
        first = len(items) - int(targets[0])
        assert first == context or sequences.begin[row] in histories.offsets
        found += [(items[max(0, n - 5) : n], items[n]) for n in range(first, len(items))]
    assert sorted(found) == pairs_of(histories)
    for batch_size in (32, 7, 1000):
        order = sequences.order(0, 0, batch_size)
        assert sorted(np.concatenate(order).tolist()) == list(range(len(sequences.length)))
        assert all(len(rows) for rows in order)
        assert sequences.steps_per_epoch(batch_size) == len(sequences.order(1, 7, batch_size)) == len(order)
    sizes = [int(sequences.targets[rows].sum()) for rows in sequences.order(0, 0, 64)]
    assert max(sizes) - min(sizes) <= 2 * int(sequences.targets.max())  # full batches


def test_an_epoch_shows_every_example_once_and_orders_differ() -> None:
    examples, _ = toy_examples()
    first, again, second = (examples.order(0, epoch, 16) for epoch in (0, 0, 1))
    assert sorted(np.concatenate(first).tolist()) == list(range(len(examples)))
    assert [batch.tolist() for batch in first] == [batch.tolist() for batch in again]
    assert [batch.tolist() for batch in first] != [batch.tolist() for batch in second]
    assert len(first) == examples.steps_per_epoch(16)


def test_shorter_histories_are_padded_in_front() -> None:
    examples, _ = toy_examples()
    rows = np.array([int(np.flatnonzero(examples.length == n)[0]) for n in (1, 3)])
    history, *_ = examples.collate(rows)
    assert (history[0, :2] == -1).all()
    assert (history[0, 2:] >= 0).all()
    assert (history[1] >= 0).all()
