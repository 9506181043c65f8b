"""Training examples: which targets they have, in which order they come, and how they are padded."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.trainings import toy_examples
from tiger.data.histories import Histories
from tiger.models.tiger import batches
from tiger.models.tiger.batches import BlocksOfExamples, SequenceExamples, TargetExamples

pytestmark = pytest.mark.usefixtures("one_thread")

# --- examples ---------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("changes", [{}, {"encoder": "causal", "encoder_input": "items"}])
def test_blocks_of_users_show_every_target_once(changes: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """What does not fit memory at once is read block by block: other batches, the same targets."""
    whole, _ = toy_examples(20, **changes)
    monkeypatch.setattr(batches, "BLOCK_EVENTS", 90)
    blocks, histories = toy_examples(20, **changes)
    assert isinstance(blocks, BlocksOfExamples)
    assert len(blocks.histories) > 3
    assert len(blocks) == len(whole) == histories.training_examples()
    epochs = [list(blocks.batches(3, epoch, 16)) for epoch in (0, 0, 1)]
    assert [len(epoch) for epoch in epochs] == [blocks.steps_per_epoch(16)] * 3
    shown = [[[tensor.tolist() for tensor in batch.inputs] for batch in epoch] for epoch in epochs]
    assert shown[0] == shown[1] != shown[2]
    for epoch in epochs:
        assert sum(batch.total_weight for batch in epoch) == len(whole)
    assert _targets(epochs[0], changes) == _targets(whole.batches(3, 0, 16), changes)


def _targets(found: Any, changes: dict[str, str]) -> list[int]:
    items: list[int] = []
    for batch in found:
        if changes:
            sequence, _, positions, *_ = batch.inputs
            items += sequence[:, 1:].reshape(-1)[positions].tolist()
        else:
            items += batch.inputs[1].tolist()
    return sorted(items)
