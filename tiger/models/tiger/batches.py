"""Histories -> training batches of item ids, in an order that is a function of (seed, epoch) alone.

Every item of a user's training part except the first is a target, with the items before it as history: no validation
or test item is ever seen. Examples of similar length share a batch, so that little is padding: on Beauty, histories
fill 7 of 20 positions on average.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tiger.data.histories import Histories
from tiger.models.padding import PAD
from tiger.models.sampling import hash_users
from tiger.models.tiger.config import TigerConfig
from tiger.semantic_ids.trie import Trie
from tiger.training.loop import Batch, share

BLOCK_EVENTS = 1 << 24
"""Events of a block of users; its examples take up to 400 MB."""


class Examples(ABC):
    """The targets of the training parts, in batches; `collate` gives what the model's forward reads."""

    def __init__(self, histories: Histories, config: TigerConfig, trie: Trie, known: list[Tensor]) -> None:
        """
        Args:
            trie: of the semantic IDs, on the CPU.
            known: per level bool [nodes], see `TigerModel.set_training_counts`.
        """
        self.items, self.trie, self.known = histories.items, trie, [mask.numpy() for mask in known]
        self.with_siblings = needs_siblings(config)

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of targets."""

    @abstractmethod
    def steps_per_epoch(self, batch_size: int) -> int:
        """Return the number of batches of an epoch."""

    @abstractmethod
    def order(self, seed: int, epoch: int, batch_size: int) -> list[npt.NDArray[np.int64]]:
        """Return the rows of the global batches of an epoch, all of them once."""

    @abstractmethod
    def num_targets(self, rows: npt.NDArray[np.int64]) -> int:
        """Return how many targets rows have together."""

    @abstractmethod
    def collate(self, rows: npt.NDArray[np.int64]) -> tuple[Tensor, ...]:
        """Return the arguments of the model's forward for rows."""

    def batches(self, seed: int, epoch: int, batch_size: int) -> Iterator[Batch]:
        """Yield this worker's shards of the epoch's global batches; a row's loss is the sum over its targets."""
        for rows in self.order(seed, epoch, batch_size):
            own, weights = share(torch.from_numpy(rows))
            yield Batch(self.collate(own.numpy()), weights, float(self.num_targets(rows)))

    def siblings_of(self, targets: npt.NDArray[np.int64]) -> list[Tensor]:
        """Return the tensors of the targets' siblings, level after level; none if the loss does not need them."""
        return self.trie.sibling_tensors(targets, self.known) if self.with_siblings else []


class TargetExamples(Examples):
    """All (history, target) pairs of the training part, for a bidirectional encoder."""

    def __init__(self, histories: Histories, config: TigerConfig, trie: Trie, known: list[Tensor]) -> None:
        """Take the arguments of `Examples`."""
        super().__init__(histories, config, trie, known)
        self.max_items = config.max_history_items
        begins = histories.offsets[:-1]
        counts = np.maximum(histories.train_end - begins - 1, 0)
        users = np.repeat(np.arange(len(histories)), counts)
        in_history = np.arange(counts.sum()) - np.repeat(np.concatenate([[0], np.cumsum(counts)[:-1]]), counts)
        self.target = begins[users] + 1 + in_history  # position of the target in `items`
        self.length = np.minimum(in_history + 1, self.max_items)
        tokens = config.num_user_tokens
        self.user_token = hash_users(histories.source_ids, tokens)[users] if tokens else None

    def __len__(self) -> int:
        return len(self.target)

    def steps_per_epoch(self, batch_size: int) -> int:
        """Return the number of batches of an epoch."""
        return -(-len(self) // batch_size)

    def order(self, seed: int, epoch: int, batch_size: int) -> list[npt.NDArray[np.int64]]:
        """Return the global batches of an epoch: each example once, sorted by length, then cut, then shuffled."""
        random = np.random.default_rng([seed, epoch])
        shuffled = random.permutation(len(self))
        by_length = shuffled[np.argsort(self.length[shuffled], kind="stable")]
        batches = [by_length[first : first + batch_size] for first in range(0, len(by_length), batch_size)]
        return [batches[i] for i in random.permutation(len(batches))]

    def num_targets(self, rows: npt.NDArray[np.int64]) -> int:
        """Return the number of rows: each is one target."""
        return len(rows)

    def collate(self, rows: npt.NDArray[np.int64]) -> tuple[Tensor, ...]:
        """Return the arguments of the model's forward: history, target, user tokens, siblings."""
        ends = self.target[rows]
        history = pad_histories(self.items, ends - self.length[rows], ends)
        target = self.items[ends].astype(np.int64)
        user = np.zeros(0, np.int64) if self.user_token is None else self.user_token[rows]
        return history, torch.from_numpy(target), torch.from_numpy(user), *self.siblings_of(target)


class SequenceExamples(Examples):
    """The training part again, as whole sequences: one pass over a sequence trains every position as a target.

    A long training part is cut into windows whose targets follow each other without gap or overlap. A window begins
    `context_items` before its first target, so that every target is predicted from what it would be predicted from at
    inference.
    """

    def __init__(self, histories: Histories, config: TigerConfig, trie: Trie, known: list[Tensor]) -> None:
        """Take the arguments of `Examples`."""
        super().__init__(histories, config, trie, known)
        context = config.context_items
        begin, end = histories.offsets[:-1], histories.train_end
        windows = np.maximum(-(-(end - begin - 1) // context), 0)
        users = np.repeat(np.arange(len(begin)), windows)
        window = np.arange(windows.sum()) - np.repeat(np.cumsum(windows) - windows, windows)
        first = begin[users] + 1 + window * context
        self.begin = np.maximum(begin[users], first - context)
        self.end = np.minimum(first + context, end[users])
        self.length, self.targets = self.end - self.begin, self.end - first
        self._num_targets = int(self.targets.sum())

    def __len__(self) -> int:
        return self._num_targets

    def steps_per_epoch(self, batch_size: int) -> int:
        """Return the number of batches of an epoch."""
        if not len(self):
            return 1
        return max(1, min(round(len(self) / batch_size), len(self) // int(self.targets.max())))

    def order(self, seed: int, epoch: int, batch_size: int) -> list[npt.NDArray[np.int64]]:
        """Return the global batches of an epoch, of about `batch_size` targets each and of sequences of like length."""
        random, count = np.random.default_rng([seed, epoch]), self.steps_per_epoch(batch_size)
        shuffled = random.permutation(len(self.length))
        by_length = shuffled[np.argsort(self.length[shuffled], kind="stable")]
        # A sequence belongs to the batch that its middle target falls into; no batch is empty, because none is smaller
        # than a sequence.
        targets = self.targets[by_length]
        batch = (2 * np.cumsum(targets) - targets) * count // (2 * len(self))
        batches = np.split(by_length, np.searchsorted(batch, np.arange(1, count)))
        return [batches[i] for i in random.permutation(count)]

    def num_targets(self, rows: npt.NDArray[np.int64]) -> int:
        """Return how many targets the sequences have together."""
        return int(self.targets[rows].sum())

    def collate(self, rows: npt.NDArray[np.int64]) -> tuple[Tensor, ...]:
        """Return the arguments of the model's forward.

        Sequences [B, N] with PAD in front; how many of the last items are targets, int64 [B]; where these are among the
        B x (N - 1) items that follow another one, int64 [T]; and their siblings. All sizes are known here, so that a
        GPU is never waited for.
        """
        sequence, targets = pad_histories(self.items, self.begin[rows], self.end[rows]), self.targets[rows]
        last = sequence.shape[1] - 1
        positions = np.flatnonzero(np.arange(last) >= last - targets[:, None])
        target = sequence[:, 1:].numpy().reshape(-1)[positions]
        return sequence, torch.from_numpy(targets), torch.from_numpy(positions), *self.siblings_of(target)


class BlocksOfExamples:
    """The examples of many users, made block by block of users, so that they do not take memory all at once.

    An epoch goes through the blocks in random order, and through the examples of a block in random order.
    """

    def __init__(self, blocks: Sequence[Histories], make: Callable[[Histories], Examples]) -> None:
        """Take the histories of every block, and what makes the examples of one."""
        self.histories, self.make = blocks, make

    def __len__(self) -> int:
        return sum(len(self.make(block)) for block in self.histories)

    def steps_per_epoch(self, batch_size: int) -> int:
        """Return the number of batches of an epoch."""
        return sum(self.make(block).steps_per_epoch(batch_size) for block in self.histories)

    def batches(self, seed: int, epoch: int, batch_size: int) -> Iterator[Batch]:
        """Yield this worker's shards of the epoch's global batches."""
        for index in np.random.default_rng([seed, epoch]).permutation(len(self.histories)).tolist():
            examples = self.make(self.histories[index])
            yield from examples.batches(seed, epoch * len(self.histories) + index, batch_size)


def make_examples(
    histories: Histories, config: TigerConfig, trie: Trie, known: list[Tensor]
) -> Examples | BlocksOfExamples:
    """Return the training examples that the encoder of a configuration reads."""
    kind = SequenceExamples if config.encoder == "causal" else TargetExamples
    blocks = [block for block in histories.blocks(BLOCK_EVENTS) if block.training_examples()]
    if len(blocks) <= 1:
        return kind(histories, config, trie, known)
    return BlocksOfExamples(blocks, lambda block: kind(block, config, trie, known))


def needs_siblings(config: TigerConfig) -> bool:
    """Return whether the loss compares a target with the children of its trie nodes."""
    return config.softmax == "trie" or config.softmax_support == "children"


def pad_histories(items: npt.NDArray[np.integer], begins: npt.NDArray[np.int64], ends: npt.NDArray[np.int64]) -> Tensor:
    """Return the items at [begin, end) of each row, int64 [B, N]; shorter rows have PAD in front.

    The last item of a history is always at the last position, so that a position tells how recent an item is.
    """
    longest = int((ends - begins).max())
    positions = ends[:, None] - longest + np.arange(longest)
    inside = positions >= begins[:, None]
    history = items[np.where(inside, positions, ends[:, None] - 1)].astype(np.int64)
    history[~inside] = PAD
    return torch.from_numpy(history)
