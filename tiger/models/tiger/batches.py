"""Histories + semantic IDs -> training batches, in an order that is a function of (seed, epoch) alone.

Every item of a user's training part but the first is a target, with the items before it as history: no validation or
test item is ever seen. Examples of one history length share a batch, so that almost nothing is padding: on Beauty
histories fill 7 of 20 places on average.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tiger.data.histories import Histories
from tiger.semantic_ids.assignment import SemanticIds
from tiger.training.loop import Batch, share

PAD = -1
"""Code of a place in a batch that holds no item."""


def columns(ids: SemanticIds, with_items: bool) -> npt.NDArray[np.int64]:
    """What a model reads of each item, int64 [items, C]: its codes, and its number for a model with a dense head."""
    codes = ids.codes.astype(np.int64)
    return np.column_stack([codes, np.arange(len(codes))]) if with_items else codes


class TargetExamples:
    """All (history, target) pairs of the training part."""

    def __init__(
        self,
        histories: Histories,
        ids: SemanticIds,
        max_items: int,
        user_tokens: int,
        with_items: bool = False,
    ) -> None:
        """
        Args:
            with_items: items bring their number along, see `columns`.
            max_items: the most recent items of a history that the model sees.
            user_tokens: number of user tokens, 0 for none.
        """
        self.codes = columns(ids, with_items)
        self.items, self.max_items = histories.items, max_items
        begins = histories.offsets[:-1]
        counts = np.maximum(histories.train_end - begins - 1, 0)
        users = np.repeat(np.arange(len(histories)), counts)
        within = np.arange(counts.sum()) - np.repeat(np.concatenate([[0], np.cumsum(counts)[:-1]]), counts)
        self.target = begins[users] + 1 + within  # position of the target in `items`
        self.length = np.minimum(within + 1, max_items)
        self.user_token = user_token_ids(histories.source_ids, user_tokens)[users] if user_tokens else None

    def __len__(self) -> int:
        return len(self.target)

    def steps_per_epoch(self, batch_size: int) -> int:
        return -(-len(self) // batch_size)

    def order(self, seed: int, epoch: int, batch_size: int) -> list[npt.NDArray[np.int64]]:
        """Global batches of rows: each example once, full batches of one length, the remainders together by length."""
        random = np.random.default_rng([seed, epoch])
        shuffled = random.permutation(len(self))
        by_length = shuffled[np.argsort(self.length[shuffled], kind="stable")]
        ends = np.cumsum(np.bincount(self.length, minlength=self.max_items + 1))
        batches, remainders = [], []
        for begin, end in zip(np.concatenate([[0], ends[:-1]]), ends, strict=True):
            full = begin + (end - begin) // batch_size * batch_size
            batches += [by_length[b : b + batch_size] for b in range(begin, full, batch_size)]
            remainders.append(by_length[full:end])
        rest = np.concatenate(remainders)
        batches += [rest[b : b + batch_size] for b in range(0, len(rest), batch_size)]
        return [batches[i] for i in random.permutation(len(batches))]

    def batches(self, seed: int, epoch: int, batch_size: int) -> Iterator[Batch]:
        """This worker's shares of the epoch's global batches."""
        for rows in self.order(seed, epoch, batch_size):
            own, weights = share(torch.from_numpy(rows))
            yield Batch(self.collate(own.numpy()), weights, float(len(rows)))

    def collate(self, rows: npt.NDArray[np.int64]) -> tuple[Tensor, ...]:
        """Arguments of the model's forward: history codes, target codes, and the user tokens if there are any."""
        ends = self.target[rows]
        history = pad_histories(self.items, ends - self.length[rows], ends, self.codes)
        target = torch.from_numpy(self.codes[self.items[ends]])
        if self.user_token is None:
            return history, target
        return history, target, torch.from_numpy(self.user_token[rows])


class SequenceExamples:
    """The training part again, as whole sequences: one pass over a sequence trains every position as a target.

    A training part of more than `max_items` + 1 items is cut into windows whose targets follow each other without gap
    or overlap; a window begins `max_items` before its first target, so that every target has its whole history.
    """

    def __init__(self, histories: Histories, ids: SemanticIds, max_items: int, with_items: bool = False) -> None:
        self.codes, self.items, self.max_items = columns(ids, with_items), histories.items, max_items
        begins, ends, firsts = [], [], []
        for begin, end in zip(histories.offsets[:-1].tolist(), histories.train_end.tolist(), strict=True):
            for first in range(begin + 1, end, max_items):
                begins.append(max(begin, first - max_items))
                ends.append(min(first + max_items, end))
                firsts.append(first)
        self.begin, self.end = np.array(begins, np.int64), np.array(ends, np.int64)
        self.length = self.end - self.begin
        self.targets = self.end - np.array(firsts, np.int64)

    def __len__(self) -> int:
        return int(self.targets.sum())

    def _rows(self, length: int, batch_size: int) -> int:
        return max(1, batch_size // (length - 1))

    def steps_per_epoch(self, batch_size: int) -> int:
        return len(self.order(0, 0, batch_size))

    def order(self, seed: int, epoch: int, batch_size: int) -> list[npt.NDArray[np.int64]]:
        """Global batches of about `batch_size` targets, by length as in `TargetExamples.order`."""
        random = np.random.default_rng([seed, epoch])
        shuffled = random.permutation(len(self.length))
        batches, remainders = [], []
        for length in np.unique(self.length).tolist():
            rows, size = shuffled[self.length[shuffled] == length], self._rows(length, batch_size)
            full = len(rows) // size * size
            batches += [rows[b : b + size] for b in range(0, full, size)]
            remainders.append(rows[full:])
        rest = np.concatenate(remainders)
        while len(rest):
            size = self._rows(int(self.length[rest[:batch_size]].max()), batch_size)
            batches.append(rest[:size])
            rest = rest[size:]
        return [batches[i] for i in random.permutation(len(batches))]

    def batches(self, seed: int, epoch: int, batch_size: int) -> Iterator[Batch]:
        """This worker's shares of the epoch's global batches; a row's loss is the sum over its targets."""
        for rows in self.order(seed, epoch, batch_size):
            own, weights = share(torch.from_numpy(rows))
            yield Batch(self.collate(own.numpy()), weights, float(self.targets[rows].sum()))

    def collate(self, rows: npt.NDArray[np.int64]) -> tuple[Tensor, ...]:
        """Arguments of the model's forward: sequence codes [B, N, C], PAD in front; how many of the last items are
        targets, int64 [B]; and where these are among the B x (N - 1) items that follow another one, int64 [targets].

        A GPU would be waited for to find those places there.
        """
        sequence, targets = pad_histories(self.items, self.begin[rows], self.end[rows], self.codes), self.targets[rows]
        last = sequence.shape[1] - 1
        wanted = np.flatnonzero(np.arange(last) >= last - targets[:, None])
        return sequence, torch.from_numpy(targets), torch.from_numpy(wanted)


def pad_histories(
    items: npt.NDArray[np.integer],
    begins: npt.NDArray[np.int64],
    ends: npt.NDArray[np.int64],
    codes: npt.NDArray[np.int64],
) -> Tensor:
    """Columns int64 [B, N, C] of the items at [begin, end) of each row; shorter rows have PAD in front.

    The last item of a history always stands in the last place, so that a place tells how recent an item is.
    """
    longest = int((ends - begins).max())
    positions = ends[:, None] - longest + np.arange(longest)
    inside = positions >= begins[:, None]
    history = codes[items[np.where(inside, positions, ends[:, None] - 1)]]
    history[~inside] = PAD
    return torch.from_numpy(history)


def user_token_ids(source_ids: list[str], buckets: int) -> npt.NDArray[np.int64]:
    """Token of each user in [0, buckets): a stable hash of the user's name, unlike `hash(str)`, which changes."""
    digests = (hashlib.blake2b(name.encode(), digest_size=8).digest() for name in source_ids)
    return np.array([int.from_bytes(digest, "little") % buckets for digest in digests], np.int64)
