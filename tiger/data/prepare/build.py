"""Raw rows -> items.parquet, histories.parquet and profile.json, in tasks of bounded memory.

The process that calls `build_catalog` holds a few numbers per item, and none per interaction or user.
"""

from __future__ import annotations

import itertools
import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from tiger.core.errors import DataError
from tiger.core.external_sort import KeyRange, Run, TableStore, choose_ranges
from tiger.core.progress import timed
from tiger.core.row_groups import groups_of, regroup, write_row_groups
from tiger.core.runner import Runner
from tiger.core.storage import Folder
from tiger.data.histories import write_histories
from tiger.data.prepare.interactions import (
    HistoryCounts,
    HistoryRule,
    count_items,
    count_range_times,
    finish_histories,
    finished_histories,
    merge_interaction_range,
    read_interaction_runs,
)
from tiger.data.prepare.items import (
    common_schema,
    find_text_columns,
    finish_items,
    finished_items,
    merge_item_range,
    read_item_ids,
    read_item_runs,
)
from tiger.data.prepare.raw import RawData, Reading
from tiger.data.prepare.rules import time_cuts
from tiger.data.profile import ColumnCounts, Quantiles
from tiger.data.readers.row_counts import RowCounts

if TYPE_CHECKING:
    from tiger.data.catalog import CatalogConfig

log = logging.getLogger(__name__)

ITEM_ROW_GROUP = 1024
"""Items per row group of items.parquet: the unit in which the embedding stage reads, encodes and resumes."""

UNKNOWN = "interactions with unknown items"
EQUAL, REPEATED, OUTSIDE = "equal interactions", "repeated interactions", "interactions outside the k-core"
DROPPED_INTERACTIONS = (UNKNOWN, EQUAL, REPEATED, OUTSIDE)


@dataclass(frozen=True)
class Sizes:
    """How much a task takes at a time; none of it changes the result.

    Attributes:
        run_bytes: of items that are sorted at a time.
        item_range_bytes: of items that are merged at a time.
        run_rows: interactions that are sorted at a time.
        range_rows: interactions that are merged at a time.
    """

    run_bytes: int = 64 << 20
    item_range_bytes: int = 64 << 20
    run_rows: int = 1 << 21
    range_rows: int = 1 << 23


ONE_RANGE = Sizes(item_range_bytes=1 << 62, range_rows=1 << 62)
"""For tables in the memory of one process: there is nothing to gain from several ranges."""


@dataclass
class _Building:
    """What the steps share: the rules, and where and how tasks run; and what has been dropped so far."""

    config: CatalogConfig
    raw: RawData
    store: TableStore
    runner: Runner
    sizes: Sizes
    reading: Reading
    dropped: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class _Items:
    """All items: how many each range has, the columns of their texts, and a handle of their ids."""

    sizes: list[int]
    text_columns: list[str]
    ids: Any

    @property
    def total(self) -> int:
        return sum(self.sizes)


@dataclass(frozen=True)
class _Core:
    """What the k-core leaves: items bool [all items], users of every range, and the number of interactions."""

    alive: npt.NDArray[np.bool_]
    users: list[int]
    interactions: int


def build_catalog(
    config: CatalogConfig,
    raw: RawData,
    folder: Folder,
    *,
    store: TableStore,
    runner: Runner,
    sizes: Sizes,
    reading: Reading,
) -> dict[str, Any]:
    """Apply the rules of the catalog, write its files to `folder`, and return the profile.

    The result depends neither on the parts of `raw`, except for their order, nor on `runner` and `sizes`.

    Raises:
        DataError: see `tiger.data.catalog.make`.
    """
    own = _Building(config, raw, store, runner, sizes, reading)
    items = _sort_items(own)
    ranges, spans, read = _sort_interactions(own, items)
    core = _find_core(own, items, ranges, read)
    own.dropped["items without interactions"] = int(items.total - core.alive.sum())
    histories = _finish_histories(own, core, spans)
    with timed(f"texts of {int(core.alive.sum()):,} items"):
        columns, characters = _finish_items(own, items, core)
    with timed("write the catalog"):
        list(runner.map(_write_tables, [(store, folder, len(items.sizes), ranges)], what="write the catalog"))
    profile = _profile(own, core, histories, columns, characters)
    folder.write_json("profile.json", profile)
    return profile


def _sort_items(own: _Building) -> _Items:
    text_fields = tuple(own.config.text_fields)
    counts, columns, schemas, rows = RowCounts("items"), dict[str, None](), [], 0
    runs: list[Run] = []
    tasks = [(own.raw, part, text_fields, own.store, own.sizes.run_bytes) for part in range(own.raw.num_parts("items"))]
    for part, found in enumerate(own.runner.map(read_item_runs, tasks, what="read items", here=own.raw.is_here)):
        own.reading.part_read("items", part, found.rows)
        counts.add(found.counts)
        columns |= dict.fromkeys(found.columns)
        schemas += [found.schema] if found.schema is not None else []
        runs += found.runs
        rows += found.rows
    own.reading.table_read("items", counts)
    if not rows:
        raise DataError("there are no items")
    text_columns = find_text_columns(text_fields, list(columns))
    ranges = choose_ranges(runs, own.sizes.item_range_bytes)
    schema = common_schema(schemas)
    merging = [(own.store, runs, schema, keys, part) for part, keys in enumerate(ranges)]
    with timed(f"one row per item of {rows:,}"):
        merged = list(own.runner.map(merge_item_range, merging, what="one row per item"))
    own.store.delete(run.name for run in runs)
    duplicates = sum(dropped for _, dropped in merged)
    own.dropped["duplicate items"] = duplicates
    if duplicates > rows / 4:
        log.warning(
            "%s of %s item rows are duplicates, of which one row per item is kept; if each row is one property of "
            "an item, set data.property and data.value",
            f"{duplicates:,}",
            f"{rows:,}",
        )
    return _Items([size for size, _ in merged], text_columns, own.runner.share(read_item_ids, own.store, len(ranges)))


def _sort_interactions(own: _Building, items: _Items) -> tuple[int, tuple[int, int], int]:
    """Return the number of ranges of users, two times between which all times are, and the number of rows."""
    tasks = [
        (own.raw, part, items.ids, own.store, own.sizes.run_rows) for part in range(own.raw.num_parts("interactions"))
    ]
    counts, runs, shifts = RowCounts("interactions"), list[Run](), list[int]()
    read = unknown = 0
    example = ""
    for part, found in enumerate(
        own.runner.map(read_interaction_runs, tasks, what="read interactions", here=own.raw.is_here)
    ):
        own.reading.part_read("interactions", part, found.rows)
        # Times that are positions in the files count from the beginning of their part.
        shifts += [counts.in_order if found.counts.in_order else 0] * len(found.runs)
        runs += found.runs
        counts.add(found.counts)
        read += found.rows
        unknown += found.unknown
        example = example or found.unknown_example
    own.reading.table_read("interactions", counts)
    own.dropped[UNKNOWN] = unknown
    check_unknown(unknown, read, own.config.max_unknown_item_fraction, example, own.runner, items.ids)
    ranges: list[KeyRange] = choose_ranges(runs, own.sizes.range_rows)
    duplicates = own.config.duplicates
    merging = [(own.store, runs, shifts, keys, part, duplicates) for part, keys in enumerate(ranges)]
    with timed(f"find repeats among {read - unknown:,} interactions"):
        merged = list(own.runner.map(merge_interaction_range, merging, what="sort interactions by user"))
    own.store.delete(run.name for run in runs)
    own.dropped[EQUAL] = sum(each.equal for each in merged)
    own.dropped[REPEATED] = sum(each.repeated for each in merged)
    times = [time for each in merged for time in each.times or ()]
    return len(ranges), (min(times, default=0), max(times, default=0)), read


def check_unknown(
    unknown: int, read: int, max_fraction: float, example: str = "", runner: Runner | None = None, item_ids: Any = None
) -> None:
    """Check the number of interactions with unknown items.

    Raises:
        DataError: there are more than allowed; names one, and if `runner` is given, the first id of the items.
    """
    if unknown <= max_fraction * max(read, 1):
        return
    examples = ""
    if runner is not None:
        known = next(iter(runner.map(_first_id, [(item_ids,)], what="find an example")))
        examples = f", such as {example!r}, while the items have ids such as {known!r}"
    raise DataError(
        f"{unknown:,} of {read:,} interactions are with items that have no row among the items{examples}: do the "
        f"files belong together? This exceeds catalog.max_unknown_item_fraction = {max_fraction}"
    )


def _first_id(item_ids: Any) -> str:
    first: str = item_ids[0].as_py()
    return first


def _find_core(own: _Building, items: _Items, ranges: int, read: int) -> _Core:
    """Return what is left after removing items and users with fewer than `k_core` interactions, until none has."""
    k, total = own.config.k_core, items.total
    parts = range(ranges)
    counts = np.zeros(total, np.int64)
    users = [0] * ranges
    tasks = [(own.store, part, k, total) for part in parts]
    for part, found in enumerate(own.runner.map(count_items, tasks, what="k-core")):
        counts[found.items] += found.counts
        users[part] = found.users
    before = np.ones(total, bool)
    alive = counts >= max(k, 1)
    with timed(f"{k}-core"):
        while k > 1 and not np.array_equal(alive, before):
            masks = own.runner.share(_as_is, (alive, before))
            for part, found in enumerate(own.runner.map(_count_lost, [(*t, masks) for t in tasks], what="k-core")):
                counts[found.items] -= found.counts
                users[part] = found.users
            before, alive = alive, alive & (counts >= k)
    interactions = int(counts.sum())
    if k > 1:
        own.dropped[OUTSIDE] = read - interactions - sum(own.dropped[what] for what in (UNKNOWN, EQUAL, REPEATED))
    if not interactions:
        raise DataError(
            f"no user and item with {k} interactions each is left out of {read:,} interactions; "
            "lower catalog.k_core or use more data"
        )
    return _Core(alive, users, interactions)


def _as_is(value: Any) -> Any:
    return value


def _count_lost(
    store: TableStore, part: int, k: int, num_items: int, masks: tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]
) -> Any:
    return count_items(store, part, k, num_items, *masks)


def _finish_histories(own: _Building, core: _Core, span: tuple[int, int]) -> HistoryCounts:
    config, parts = own.config, range(len(core.users))
    arrays = own.runner.share(_item_numbers, core.alive)
    cuts: tuple[int, int] | None = None
    if config.split == "temporal":

        def histogram(first: int, last: int, width: int) -> npt.NDArray[np.int64]:
            tasks = [(own.store, part, config.k_core, arrays, first, last, width) for part in parts]
            counts: list[npt.NDArray[np.int64]] = list(own.runner.map(_count_times, tasks, what="temporal split"))
            total: npt.NDArray[np.int64] = np.stack(counts).sum(0)
            return total

        shares = [1 - config.valid_fraction - config.test_fraction, 1 - config.test_fraction]
        valid_from, test_from = time_cuts(core.interactions, shares, span, histogram)
        cuts = valid_from, test_from
    rule = HistoryRule(config.k_core, config.tie_break, config.seed, cuts)
    first_users = [0, *itertools.accumulate(core.users)]
    tasks = [(own.store, part, rule, arrays, first_users[part]) for part in parts]
    with timed(f"order {core.interactions:,} interactions of {first_users[-1]:,} users"):
        counted = list(own.runner.map(_finish_range, tasks, what="order interactions"))
    names = ("users", "interactions", "training_examples", "validation_users", "test_users")
    sums = {name: sum(getattr(each, name) for each in counted) for name in names}
    _check_split(config, sums)
    return HistoryCounts(**sums, lengths=Quantiles.together(each.lengths for each in counted))


def _item_numbers(alive: npt.NDArray[np.bool_]) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.int32]]:
    return alive, np.cumsum(alive, dtype=np.int32) - 1


def _count_times(store: TableStore, part: int, k: int, arrays: Any, first: int, last: int, width: int) -> Any:
    return count_range_times(store, part, k, arrays[0], first, last, width)


def _finish_range(store: TableStore, part: int, rule: HistoryRule, arrays: Any, first_user: int) -> HistoryCounts:
    alive, item_of = arrays
    return finish_histories(store, part, rule, alive, item_of, first_user)


def _check_split(config: CatalogConfig, counts: dict[str, int]) -> None:
    """Check that a split by time has validation and test targets.

    Raises:
        DataError: no user is left for validation or for testing.
    """
    if config.split != "temporal":
        return
    splits = (("valid", "validation", config.valid_fraction), ("test", "test", config.test_fraction))
    for split, name, share in splits:
        if not counts[f"{name}_users"]:
            raise DataError(
                f'catalog.split = "temporal" leaves no {name} users: no user has events before and within the {name} '
                f"period; choose another catalog.{split}_fraction than {share}, finer times, or leave-one-out"
            )


def _finish_items(own: _Building, items: _Items, core: _Core) -> tuple[ColumnCounts, Quantiles]:
    begins = [0, *itertools.accumulate(items.sizes)]
    kept = [core.alive[begin:end] for begin, end in itertools.pairwise(begins)]
    first = [0, *itertools.accumulate(int(each.sum()) for each in kept)]
    tasks = [(own.store, part, kept[part], first[part], items.text_columns) for part in range(len(items.sizes))]
    columns, characters = ColumnCounts(), []
    for counts, lengths in own.runner.map(finish_items, tasks, what="texts"):
        columns.add(counts)
        characters.append(lengths)
    return columns, Quantiles.together(characters)


def _write_tables(store: TableStore, folder: Folder, item_ranges: int, user_ranges: int) -> None:
    items = regroup(finished_items(store, item_ranges), groups_of(ITEM_ROW_GROUP))
    write_row_groups(folder, "items.parquet", items)
    write_histories(folder, finished_histories(store, user_ranges))


def _profile(
    own: _Building, core: _Core, histories: HistoryCounts, columns: ColumnCounts, characters: Quantiles
) -> dict[str, Any]:
    """Return the counts and quantiles of a catalog, for profile.json and for its health checks."""
    num_items = int(core.alive.sum())
    figures = columns.record()
    for name in ("item_id", "source_id"):  # exact, whatever their number
        figures[name]["distinct"] = num_items
    return {
        "items": num_items,
        "users": histories.users,
        "interactions": histories.interactions,
        "training_examples": histories.training_examples,
        "validation_users": histories.validation_users,
        "test_users": histories.test_users,
        "text_fields": list(own.config.text_fields),
        "columns": figures,
        "text_characters": characters.record(),
        "history_length": histories.lengths.record(),
        "dropped": own.dropped,
    }
