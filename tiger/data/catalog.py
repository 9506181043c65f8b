"""Raw rows -> the catalog: items with dense ids and one text each, users with histories in time order, and splits.

Rules, in the order in which they are applied; every row that one of them drops is counted in the profile.

1. Of several rows for one item, the most complete one (most non-empty fields) is kept; ties are broken by the
   lexicographic order of the cleaned fields, so that the result does not depend on the order of rows or files.
2. Interactions with items that have no row in the catalog are dropped; above
   `max_unknown_item_fraction` the stage fails.
3. Equal interactions (user, item and time) count once; of a user's several interactions with one item the first in
   time is kept (`repeats = "first"`), or all are.
4. k-core: users and items with fewer than `k_core` interactions are dropped iteratively until convergence.
5. Items and users are numbered in the order of their source ids. Items without interactions are left out.
6. A history is in time order, to the microsecond. Ties are broken by `tie_break`: file order, at random by `seed`, or
   item id.
7. leave-one-out: a user's last item is the test target, the one before it the validation target, the remaining ones
   are for training (TIGER, section 4.1). temporal: two points in time cut all histories; the first item after each is a
   target.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from functools import cached_property
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from tiger.core.artifacts import Artifact, open_artifact
from tiger.core.config import Config
from tiger.core.errors import ArtifactError, DataError
from tiger.core.progress import timed
from tiger.core.storage import Folder
from tiger.data.histories import Histories, Split, history_table, read_histories
from tiger.data.profile import build_profile
from tiger.data.readers.merge import PIECE, clean_batches, deduplicate_items, take_rows, texts_array
from tiger.data.readers.row_counts import RowCounts, listed
from tiger.data.sources.base import field_name

log = logging.getLogger(__name__)

_UNKNOWN, _EQUAL, _REPEATED = "interactions with unknown items", "equal interactions", "repeated interactions"
_OUTSIDE = "interactions outside the k-core"
_DROPPED_INTERACTIONS = (_UNKNOWN, _EQUAL, _REPEATED, _OUTSIDE)

ITEM_ROW_GROUP = 1024
"""Items per row group of items.parquet: the unit in which the embedding stage reads, encodes and resumes."""


class CatalogConfig(Config):
    """How raw rows become items, texts and histories."""

    text_fields: list[str] = Field(
        ["title", "brand", "categories", "price", "description"],
        min_length=1,
        description="fields of an item's text, in order",
    )
    k_core: int = Field(5, ge=0, description="minimum interactions per user and item (0 = no filter)")
    duplicates: Literal["first", "all"] = Field("first", description="which of a user's interactions per item to keep")
    tie_break: Literal["file", "shuffle", "id"] = Field(
        "file", description="order of a user's interactions at equal times"
    )
    split: Literal["leave-one-out", "temporal"] = Field(
        "leave-one-out", description="how evaluation targets are chosen"
    )
    valid_fraction: float = Field(0.1, gt=0, lt=0.5, description="temporal: fraction of interactions for validation")
    test_fraction: float = Field(0.1, gt=0, lt=0.5, description="temporal: fraction of interactions for testing")
    max_unknown_item_fraction: float = Field(
        0.05, ge=0, le=1, description="maximum fraction of interactions with unknown items"
    )
    seed: int = Field(0, ge=0, description="seed of shuffled ties")

    unfingerprinted = frozenset({"max_unknown_item_fraction"})  # a limit that does not affect the stage's output


class Catalog:
    """A catalog artifact, or its folder; tables are read on first access."""

    def __init__(self, artifact: Artifact | str) -> None:
        artifact = open_artifact(artifact) if isinstance(artifact, str) else artifact
        if artifact.kind != "catalog":
            raise ArtifactError(f"{artifact.folder.uri} is a {artifact.kind} artifact where a catalog is needed")
        self.artifact = artifact
        self.n_items: int = artifact.metrics["items"]

    @property
    def items_folder(self) -> Folder:
        """The folder with items.parquet."""
        return self.artifact.folder

    @cached_property
    def items(self) -> pa.Table:
        """items.parquet: one row per item, in the order of item ids."""
        return self.artifact.folder.read_table("items.parquet")

    @cached_property
    def titles(self) -> list[str]:
        """Display title of each item: its title, else the beginning of its text, else its source id."""
        columns = self.items.column_names
        texts = self.items["text"].to_pylist()
        titles = self.items["title"].to_pylist() if "title" in columns else [None] * len(texts)
        names = self.source_ids
        return [str(title or text[:80] or name) for title, text, name in zip(titles, texts, names, strict=True)]

    @cached_property
    def source_ids(self) -> list[str]:
        """Original id of each item in the raw data."""
        names: list[str] = self.items["source_id"].to_pylist()
        return names

    @cached_property
    def item_index(self) -> dict[str, int]:
        """Index of each item by its original id."""
        return {name: item for item, name in enumerate(self.source_ids)}

    @cached_property
    def histories(self) -> Histories:
        """All users' histories."""
        return read_histories(self.artifact.folder)


def check_limits(artifact: Artifact, max_bad_row_fraction: float, max_unknown_item_fraction: float) -> None:
    """Compare the counts of a finished catalog with the limits, which may be stricter than when it was made.

    The limits are not part of its fingerprint, because they do not change its content.

    Raises:
        DataError: more rows were skipped, or more interactions dropped because their items are unknown, than allowed.
    """
    for table, record in artifact.metrics["rows"].items():
        RowCounts.from_record(table, record).check(max_bad_row_fraction)
    profile = artifact.folder.read_json("profile.json")
    dropped = profile["dropped"]
    read = profile["interactions"] + sum(dropped.get(what, 0) for what in _DROPPED_INTERACTIONS)
    _check_unknown(dropped[_UNKNOWN], read, max_unknown_item_fraction)


def make(
    config: CatalogConfig, items: Iterable[pa.RecordBatch], interactions: Iterable[pa.RecordBatch], folder: Folder
) -> dict[str, Any]:
    """Apply the rules above, write items.parquet, histories.parquet and profile.json; return the profile.

    Raises:
        DataError: no item or user is left, a text field does not exist, too many interactions have unknown items, or a
            split by time leaves no validation or test users.
    """
    kept_items, duplicate_items = deduplicate_items(clean_batches(items, config.text_fields))
    fields = _fields(config.text_fields, kept_items.column_names)
    dropped: dict[str, int] = {"duplicate items": duplicate_items}
    user_names, user, item, time = _index_interactions(config, interactions, kept_items["source_id"], dropped)
    read = len(user) + dropped[_UNKNOWN]
    size = f"{len(user):,} interactions"
    with timed(f"find repeats among {size}"):
        user, item, time = _deduplicate_interactions(config, user, item, time, dropped)
    if config.k_core > 1:
        with timed(f"{config.k_core}-core of {size}"):
            kept = _k_core(user, item, config.k_core)
        dropped[_OUTSIDE] = int(len(user) - kept.sum())
        user, item, time = user[kept], item[kept], time[kept]
    if not len(user):
        raise DataError(
            f"no user and item with {config.k_core} interactions each is left out of {read:,} interactions; "
            "lower catalog.k_core or use more data"
        )
    item_kept, item = _dense(item)  # the items are sorted by source id
    dropped["items without interactions"] = int(kept_items.num_rows - len(item_kept))
    user_kept, user = _dense(user)
    with timed(f"order {size} of {len(user_kept):,} users"):
        names = pa.array([user_names[code] for code in user_kept.tolist()], pa.large_string())
        del user_names
        by_name = pc.sort_indices(names)
        rank = np.empty(len(names), np.int32)
        rank[np.asarray(by_name)] = np.arange(len(names), dtype=np.int32)
        user = rank[user]
        order = _in_order(config, user, item, time)
        user, item, time = user[order], item[order], time[order]
        del order

    with timed(f"texts of {len(item_kept):,} items"):
        kept_items = take_rows(kept_items, item_kept)
        table = _add_text(kept_items, fields)
        del kept_items
    offsets = np.concatenate([[0], np.bincount(user).cumsum()])
    train_end, valid_end = _split(config, offsets, time)
    histories = Histories(names.take(by_name).to_pylist(), offsets, item.astype(np.int32), train_end, valid_end)
    _check_split(config, histories)
    with timed("write the catalog"):
        folder.write_table("items.parquet", table, row_group_size=ITEM_ROW_GROUP)
        folder.write_table("histories.parquet", history_table(histories, time))
    with timed("profile of the catalog"):
        profile = build_profile(table, histories, dropped, config.text_fields)
    folder.write_json("profile.json", profile)
    return profile


# --- items ------------------------------------------------------------------------------------------------------


def _fields(text_fields: list[str], columns: list[str]) -> list[str]:
    """Find the columns of text fields, which are named as in the raw files.

    Raises:
        DataError: there is no such field.
    """
    found = [next((each for each in (field_name(name), name) if each in columns), None) for name in text_fields]
    missing = [name for name, column in zip(text_fields, found, strict=True) if column is None]
    if missing:
        raise DataError(f"catalog.text_fields contains {listed(missing)}; the items have {listed(columns)}")
    return [column for column in found if column is not None]


def _add_text(items: pa.Table, text_fields: list[str]) -> pa.Table:
    """Add item_id, text, and category_leaf (the last name of an item's first category path)."""
    has_leaf = "categories" in items.column_names and "category_leaf" not in items.column_names
    texts: list[pa.Array] = []
    leaves: list[pa.Array] = []
    for begin in range(0, items.num_rows, PIECE):
        piece = items.slice(begin, PIECE)
        fields = [piece[name].to_pylist() for name in text_fields]
        joined = [
            ". ".join(filter(None, (_field_text(name, value) for name, value in zip(text_fields, values, strict=True))))
            for values in zip(*fields, strict=True)
        ]
        texts += texts_array(joined)
        if has_leaf:
            leaves += texts_array([_leaf_category(value) for value in piece["categories"].to_pylist()])
    table = items.add_column(0, "item_id", pa.array(np.arange(len(items), dtype=np.int32)))
    table = table.add_column(2, "text", pa.chunked_array(texts, pa.string()))
    return table.append_column("category_leaf", pa.chunked_array(leaves, pa.string())) if has_leaf else table


def _field_text(name: str, value: Any) -> str:
    if value is None or value != value:  # NaN never reaches a text
        return ""
    if name == "price" and isinstance(value, (int, float)):
        return f"${value:.2f}"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):  # a path reads "Hair Care > Shampoo", several of them are separated by semicolons
        nested = any(isinstance(inner, list) for inner in value)
        return ("; " if nested else " > ").join(filter(None, (_field_text(name, inner) for inner in value)))
    return str(value)


def _leaf_category(value: Any) -> str | None:
    while isinstance(value, list) and value:
        value = value[0] if isinstance(value[0], list) else value[-1]
    return value if isinstance(value, str) else None


# --- interactions -----------------------------------------------------------------------------------------------


def _index_interactions(
    config: CatalogConfig, batches: Iterable[pa.RecordBatch], known_items: pa.ChunkedArray, dropped: dict[str, int]
) -> tuple[list[str], npt.NDArray[np.int32], npt.NDArray[np.int32], npt.NDArray[np.int64]]:
    """Convert ids of users (in order of appearance) and items to indices; drop events with unknown items (rule 2).

    Ids are converted batch by batch, so that an event takes 16 bytes, regardless of the length of its ids.
    """
    user_of: dict[str, int] = {}
    item_of = {name: row for row, name in enumerate(known_items.to_pylist())}
    users, items, times = [], [], []
    unknown, unknown_example, read = 0, "", 0
    for batch in batches:
        coded_item, coded_user = batch["item"].dictionary_encode(), batch["user"].dictionary_encode()
        codes = np.array([item_of.get(name, -1) for name in coded_item.dictionary.to_pylist()], np.int32)
        item = codes[np.asarray(coded_item.indices)] if len(codes) else np.empty(0, np.int32)
        known = item >= 0
        if not known.all():
            if not unknown:
                unknown_example = batch["item"][int(np.flatnonzero(~known)[0])].as_py()
            unknown += int((~known).sum())
            item = item[known]
            coded_user = batch["user"].filter(pa.array(known)).dictionary_encode()
        names = coded_user.dictionary.to_pylist()
        codes = np.array([user_of.setdefault(name, len(user_of)) for name in names], np.int32)
        users.append(codes[np.asarray(coded_user.indices)] if len(codes) else codes)
        items.append(item)
        times.append(np.asarray(batch["time"])[known])
        read += batch.num_rows
    dropped[_UNKNOWN] = unknown
    examples = f", such as {unknown_example!r}, while the items have ids such as {next(iter(item_of))!r}"
    _check_unknown(unknown, read, config.max_unknown_item_fraction, examples)
    del item_of
    user, item = (np.concatenate([np.empty(0, np.int32), *each]) for each in (users, items))
    return list(user_of), user, item, np.concatenate([np.empty(0, np.int64), *times])


def _check_unknown(unknown: int, read: int, max_fraction: float, examples: str = "") -> None:
    if unknown > max_fraction * max(read, 1):
        raise DataError(
            f"{unknown:,} of {read:,} interactions are with items that have no row among the items{examples}: do the "
            f"files belong together? This exceeds catalog.max_unknown_item_fraction = {max_fraction}"
        )


def _dense(codes: npt.NDArray[np.int32]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int32]]:
    """Renumber the codes that occur as 0, 1, ... in ascending order; return (these codes, the new numbers)."""
    occurs = np.bincount(codes) > 0
    return np.flatnonzero(occurs), (np.cumsum(occurs, dtype=np.int32) - 1)[codes]


def _in_order(
    config: CatalogConfig, user: npt.NDArray[np.int32], item: npt.NDArray[np.int32], time: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    """Return the order of events (rule 6): by user, time, `tie_break`. Events are in file order; sorting is stable."""
    if config.tie_break == "file":
        return np.lexsort((time, user))
    if config.tie_break == "id":
        return np.lexsort((item, time, user))
    return np.lexsort((np.random.default_rng(config.seed).permutation(len(user)), time, user))


def _deduplicate_interactions(
    config: CatalogConfig,
    user: npt.NDArray[np.int32],
    item: npt.NDArray[np.int32],
    time: npt.NDArray[np.int64],
    dropped: dict[str, int],
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32], npt.NDArray[np.int64]]:
    """Apply rule 3, keeping file order."""
    order = np.lexsort((time, item, user))
    same = np.ones(max(len(order) - 1, 0), bool)
    for column in (user, item):
        ordered = column[order]
        same &= ordered[1:] == ordered[:-1]
    ordered_time = time[order]
    equal = same & (ordered_time[1:] == ordered_time[:-1])
    dropped[_EQUAL] = int(equal.sum())
    dropped[_REPEATED] = int((same & ~equal).sum()) if config.duplicates == "first" else 0
    drop = order[1:][same if config.duplicates == "first" else equal]
    if not len(drop):
        return user, item, time
    kept = np.ones(len(user), bool)
    kept[drop] = False
    return user[kept], item[kept], time[kept]


def _k_core(user: npt.NDArray[Any], item: npt.NDArray[Any], k: int) -> npt.NDArray[np.bool_]:
    """Return the mask of the k-core: the largest subset in which every user and item has at least `k` interactions."""
    kept = np.ones(len(user), bool)
    while kept.any():
        rare_user = np.bincount(user[kept], minlength=user.max() + 1) < k
        rare_item = np.bincount(item[kept], minlength=item.max() + 1) < k
        after = kept & ~rare_user[user] & ~rare_item[item]
        if (after == kept).all():
            break
        kept = after
    return kept


def _split(
    config: CatalogConfig, offsets: npt.NDArray[np.int64], time: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return the absolute positions [U] at which training and validation end (rule 7)."""
    begin, end = offsets[:-1], offsets[1:]
    if config.split == "leave-one-out":
        enough = end - begin >= 3  # a shorter history is only for training
        return np.where(enough, end - 2, end), np.where(enough, end - 1, end)
    shares = [1 - config.valid_fraction - config.test_fraction, 1 - config.test_fraction]
    valid_from, test_from = np.quantile(time, shares, method="higher")
    before_valid = np.concatenate([[0], np.cumsum(time < valid_from)])
    before_test = np.concatenate([[0], np.cumsum(time < test_from)])
    return begin + before_valid[end] - before_valid[begin], begin + before_test[end] - before_test[begin]


def _check_split(config: CatalogConfig, histories: Histories) -> None:
    """Check that a split by time has validation and test targets.

    Raises:
        DataError: no user is left for validation or for testing.
    """
    if config.split != "temporal":
        return
    splits: tuple[tuple[Split, str, float], ...] = (
        ("valid", "validation", config.valid_fraction),
        ("test", "test", config.test_fraction),
    )
    for split, name, share in splits:
        if not len(histories.evaluation(split)):
            raise DataError(
                f'catalog.split = "temporal" leaves no {name} users: no user has events before and within the {name} '
                f"period; choose another catalog.{split}_fraction than {share}, finer times, or leave-one-out"
            )


# --- profile ----------------------------------------------------------------------------------------------------
