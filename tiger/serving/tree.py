"""The prefix tree of semantic IDs for people: what is below a prefix, in words, and an item's neighbors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from tiger.report.semantic_ids import distinctive_words, title_words
from tiger.semantic_ids.assignment import SemanticIds, packed
from tiger.serving.schemas import ItemSummary, PrefixChild

_SAMPLE_OF_ALL, _SAMPLE = 20_000, 200
"""Titles that are read to count words: of all items, and of the items below one prefix."""

_CACHED = 4096
"""Prefixes whose words are kept."""

Items = npt.NDArray[np.int64]


class PrefixTree:
    """Semantic IDs in lexicographic order, so that the items below a prefix are a range."""

    def __init__(
        self,
        ids: SemanticIds,
        source_ids: list[str],
        titles: list[str],
        popularity: Items,
        available: npt.NDArray[np.bool_] | None = None,
    ) -> None:
        """Index the IDs.

        Args:
            ids: the semantic IDs of all items.
            source_ids: the catalog's own ids, [items].
            titles: [items].
            popularity: int64 [items]; a prefix is shown with the title of its most popular item.
            available: bool [items], items that are in the tree; None: all.
        """
        self.ids, self.source_ids, self.titles, self.popularity = ids, source_ids, titles, popularity
        self.depth = ids.codes.shape[1]
        self.order: Items = ids.sorted_items if available is None else ids.sorted_items[available[ids.sorted_items]]
        self._keys = packed(ids.codes[self.order], ids.level_sizes)
        self._position = np.empty(len(ids), np.int64)
        self._position[self.order] = np.arange(len(self.order))
        sample = _evenly(np.sort(self.order), _SAMPLE_OF_ALL)
        self._num_sampled = len(sample)
        self._among = Counter(word for item in sample for word in title_words(titles[item]))
        self._words: dict[tuple[int, ...], tuple[str, ...]] = {}

    def codes(self, item: int) -> list[int]:
        """Return the semantic ID of an item."""
        codes: list[int] = self.ids.codes[item].tolist()
        return codes

    def items(self, prefix: Sequence[int]) -> Items:
        """Return the items below a prefix, in the order of their IDs; none if no ID begins with it."""
        sizes = self.ids.level_sizes
        if len(prefix) > self.depth or any(not 0 <= code < size for code, size in zip(prefix, sizes, strict=False)):
            return self.order[:0]
        first, below = 0, 1
        for level, size in enumerate(sizes):
            first = first * size + (prefix[level] if level < len(prefix) else 0)
            below *= size if level >= len(prefix) else 1
        begin, end = np.searchsorted(self._keys, [first, first + below])
        return self.order[begin:end]

    def children(self, prefix: Sequence[int], limit: int) -> tuple[list[PrefixChild], int]:
        """Return at most `limit` prefixes with one code more, largest first, and how many there are."""
        below = self.items(prefix)
        if len(prefix) >= self.depth or not len(below):
            return [], 0
        codes, starts, counts = np.unique(
            self.ids.codes[below, len(prefix)], return_index=True, return_counts=True
        )  # sorted: `starts` are where the ranges begin
        largest = np.argsort(-counts, kind="stable")[:limit]
        children = []
        for child in largest.tolist():
            items = below[starts[child] : starts[child] + counts[child]]
            code = int(codes[child])
            best = int(items[self.popularity[items].argmax()])
            words = list(self.words((*prefix, code)))
            children.append(PrefixChild(code=code, num_items=len(items), words=words, example=self.titles[best]))
        return children, len(codes)

    def words(self, prefix: tuple[int, ...]) -> tuple[str, ...]:
        """Return the words that set the titles below a prefix apart, by a sample of these titles; they are cached."""
        if (known := self._words.get(prefix)) is not None:
            return known
        if len(self._words) >= _CACHED:
            self._words.clear()
        self._words[prefix] = found = self._find_words(prefix)
        return found

    def _find_words(self, prefix: tuple[int, ...]) -> tuple[str, ...]:
        titles = [self.titles[item] for item in _evenly(self.items(prefix), _SAMPLE)]
        # A word of the group that the sample of all titles lacks is as rare as one that is in it once.
        among = Counter({word: max(self._among[word], 1) for title in titles for word in title_words(title)})
        return tuple(distinctive_words(titles, among, self._num_sampled)) if titles else ()

    def neighbors(self, item: int, count: int) -> list[ItemSummary]:
        """Return the items that share the longest prefixes with an item of the tree, longest first.

        Of prefixes of one length, those next to the item in the order of IDs come first. IDs with long common prefixes
        are next to each other in that order, so that a window holds them.
        """
        center = int(self._position[item])
        window = self.order[max(center - count, 0) : center + count + 1]
        window = window[window != item]
        same = np.cumprod(self.ids.codes[window] == self.ids.codes[item], axis=1).sum(axis=1)
        distance = np.abs(self._position[window] - center)
        best = np.lexsort((distance, -same))[:count]
        return [
            ItemSummary(
                item=self.source_ids[other],
                title=self.titles[other],
                semantic_id=self.codes(other),
                shared_codes=shared,
            )
            for other, shared in zip(window[best].tolist(), same[best].tolist(), strict=True)
            if shared
        ]


def _evenly(items: Items, count: int) -> list[int]:
    """Return at most `count` of the items, at equal distances."""
    chosen: list[int] = items[np.linspace(0, len(items) - 1, min(len(items), count)).astype(np.int64)].tolist()
    return chosen
