"""Raw rows -> the catalog: items with dense ids and one text each, users with histories in time order, and splits.

Rules, in the order in which they are applied; every row that one of them drops is counted in the profile.

1. Of several rows for one item, the one with most non-empty fields is kept, among equals the one whose cleaned fields
   come first as text: the result does not depend on the order of rows or files.
2. Interactions with items that have no row in the catalog are dropped; above `max_unknown_items` the stage stops.
3. Equal interactions (user, item and time) count once; of a user's several interactions with one item the first in
   time is kept (`repeats = "first"`), or all are.
4. k-core: users and items with fewer than `k_core` interactions are dropped, again and again until none is left.
5. Items and users are numbered in the order of their source ids. Items without interactions are left out.
6. A history is in time order. Equal times are ordered by `ties`: as in the files, at random by `seed`, or by item id.
7. leave-one-out: a user's last item is the test target, the one before it the validation target, the rest is for
   training (TIGER, section 4.1). by-time: two moments cut all histories; the first item after each is a target.
"""

from __future__ import annotations

import html
import json
import logging
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from tiger.artifacts import Artifact, Folder
from tiger.config import Config
from tiger.errors import ArtifactError, DataError

log = logging.getLogger(__name__)

ITEM_ROW_GROUP = 1024
"""Items per row group of items.parquet: the unit in which the embedding stage reads, encodes and restarts."""

Split = Literal["valid", "test"]


class CatalogConfig(Config):
    """How raw rows become items, texts and histories."""

    text_fields: list[str] = Field(
        ["title", "brand", "categories", "price", "description"], min_length=1, description="fields of an item's text"
    )
    k_core: int = Field(5, ge=0, description="least interactions of every user and item; 0 keeps all")
    repeats: Literal["first", "all"] = Field("first", description="which of a user's events with one item to keep")
    ties: Literal["file", "shuffle", "id"] = Field("file", description="order of a user's events at equal times")
    split: Literal["leave-one-out", "by-time"] = Field("leave-one-out", description="how evaluation targets are chosen")
    valid_share: float = Field(0.1, gt=0, lt=0.5, description="by-time: share of interactions that validate")
    test_share: float = Field(0.1, gt=0, lt=0.5, description="by-time: share of interactions that test")
    max_unknown_items: float = Field(0.05, ge=0, le=1, description="stop above this share of events without an item")
    seed: int = Field(0, ge=0, description="seed of shuffled ties")


@dataclass(frozen=True)
class Histories:
    """All users' items in time order, back to back; user u owns positions offsets[u] to offsets[u + 1].

    Attributes:
        source_ids: names of the users in the raw data, [U].
        offsets: int64 [U + 1].
        items: int32, item ids.
        train_end, valid_end: int64 [U], absolute positions: training items lie in [offsets[u], train_end[u]),
            validation targets in [train_end[u], valid_end[u]), test targets in [valid_end[u], offsets[u + 1]).
    """

    source_ids: list[str]
    offsets: npt.NDArray[np.int64]
    items: npt.NDArray[np.int32]
    train_end: npt.NDArray[np.int64]
    valid_end: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def of(self, user: int) -> npt.NDArray[np.int32]:
        return self.items[self.offsets[user] : self.offsets[user + 1]]

    def training_examples(self) -> int:
        """Number of (prefix, next item) pairs inside the training part."""
        return int(np.maximum(self.train_end - self.offsets[:-1] - 1, 0).sum())

    def evaluation(self, split: Split) -> EvaluationUsers:
        """The users with a target in `split`; a target is the first item of the split, its history all before it."""
        begin = self.train_end if split == "valid" else self.valid_end
        end = self.valid_end if split == "valid" else self.offsets[1:]
        users = np.flatnonzero((end > begin) & (begin > self.offsets[:-1]))
        return EvaluationUsers(users, self.offsets[users], begin[users], self.items[begin[users]], self.items)


@dataclass(frozen=True)
class EvaluationUsers:
    """Users to evaluate: `users` int64 [E], `targets` int32 [E]; history of row e is items[begin[e] : end[e]]."""

    users: npt.NDArray[np.int64]
    begin: npt.NDArray[np.int64]
    end: npt.NDArray[np.int64]
    targets: npt.NDArray[np.int32]
    items: npt.NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.users)

    def histories(self) -> list[npt.NDArray[np.int32]]:
        return [self.items[b:e] for b, e in zip(self.begin, self.end, strict=True)]

    def take(self, rows: npt.NDArray[np.int64]) -> EvaluationUsers:
        return EvaluationUsers(self.users[rows], self.begin[rows], self.end[rows], self.targets[rows], self.items)


class Catalog:
    """Reads a catalog artifact."""

    def __init__(self, artifact: Artifact) -> None:
        if artifact.kind != "catalog":
            raise ArtifactError(f"{artifact.folder.uri} is a {artifact.kind} artifact where a catalog is needed")
        self.artifact = artifact
        self.n_items: int = artifact.figures["items"]

    @cached_property
    def items(self) -> pa.Table:
        return self.artifact.folder.read_table("items.parquet")

    @cached_property
    def titles(self) -> list[str]:
        """What to show a person of each item: its title, else the beginning of its text, else its source id."""
        columns = self.items.column_names
        texts = self.items["text"].to_pylist()
        titles = self.items["title"].to_pylist() if "title" in columns else [None] * len(texts)
        names = self.source_ids
        return [str(title or text[:80] or name) for title, text, name in zip(titles, texts, names, strict=True)]

    @cached_property
    def source_ids(self) -> list[str]:
        return self.items["source_id"].to_pylist()

    @cached_property
    def histories(self) -> Histories:
        return read_histories(self.artifact.folder)


def read_histories(folder: Folder) -> Histories:
    table = folder.read_table("histories.parquet").combine_chunks()
    lists = table["items"].combine_chunks() if table.num_rows else pa.array([], pa.list_(pa.int32()))
    offsets = np.asarray(lists.offsets).astype(np.int64)
    return Histories(
        table["source_id"].to_pylist(),
        offsets,
        np.asarray(lists.values),
        offsets[:-1] + np.asarray(table["train_end"]),
        offsets[:-1] + np.asarray(table["valid_end"]),
    )


def make(
    config: CatalogConfig, items: Iterable[pa.RecordBatch], interactions: Iterable[pa.RecordBatch], folder: Folder
) -> dict[str, Any]:
    """Applies the rules above, writes items.parquet, histories.parquet and profile.json; returns the profile.

    Raises:
        DataError: no item or user is left, a text field does not exist, or too many events have unknown items.
    """
    raw_items = pa.Table.from_batches(list(items))
    missing = [name for name in config.text_fields if name not in raw_items.column_names]
    if missing:
        raise DataError(
            f"catalog.text_fields names {', '.join(missing)}; the items have {', '.join(raw_items.column_names)}"
        )
    kept_items, duplicate_items = _one_row_an_item(_clean_rows(raw_items), raw_items.schema)
    events = pa.Table.from_batches(list(interactions)).combine_chunks()
    dropped: dict[str, int] = {"duplicate items": duplicate_items}
    user_names, item_names, user, item, time, row = _encode_events(config, events, kept_items["source_id"], dropped)
    user, item, time, row = _drop_repeats(config, user, item, time, row, dropped)
    if config.k_core > 1:
        kept = _k_core(user, item, config.k_core)
        dropped["interactions outside the k-core"] = int(len(user) - kept.sum())
        user, item, time, row = user[kept], item[kept], time[kept], row[kept]
    if not len(user):
        raise DataError(
            f"no user and item with {config.k_core} interactions each is left of {events.num_rows:,} interactions; "
            "lower catalog.k_core or use more data"
        )
    dropped["items without interactions"] = int(len(item_names) - len(np.unique(item)))
    item_kept, item = np.unique(item, return_inverse=True)  # names are sorted, so dense ids follow source ids
    user_kept, user = np.unique(user, return_inverse=True)
    tie = {"file": row, "id": item, "shuffle": _shuffled(config.seed, row)}[config.ties]
    order = np.lexsort((tie, time, user))
    user, item, time = user[order], item[order], time[order]

    table = _with_text(kept_items.take(pa.array(item_kept)), config.text_fields)
    offsets = np.concatenate([[0], np.bincount(user).cumsum()])
    train_end, valid_end = _split(config, offsets, time)
    histories = Histories(
        user_names.take(pa.array(user_kept)).to_pylist(), offsets, item.astype(np.int32), train_end, valid_end
    )
    folder.write_table("items.parquet", table, row_group_size=ITEM_ROW_GROUP)
    folder.write_table("histories.parquet", _history_table(histories, time))
    profile = _profile(table, histories, dropped, config)
    folder.write_json("profile.json", profile)
    return profile


# --- items ------------------------------------------------------------------------------------------------------


def _clean_rows(table: pa.Table) -> Iterator[dict[str, Any]]:
    for batch in table.to_batches(8192):
        for row in batch.to_pylist():
            yield {name: value if name == "source_id" else _clean(value) for name, value in row.items()}


def _clean(value: Any) -> Any:
    """Undoes HTML entities (twice: some shops escape twice), normalises to NFC, joins runs of white space."""
    if isinstance(value, str):
        text = html.unescape(html.unescape(value)) if "&" in value else value
        return " ".join(unicodedata.normalize("NFC", text).split()) or None
    if isinstance(value, list):
        return [cleaned for cleaned in map(_clean, value) if cleaned not in (None, [])]
    return value


def _one_row_an_item(rows: Iterable[dict[str, Any]], schema: pa.Schema) -> tuple[pa.Table, int]:
    """Rule 1. Returns the rows in the order of their source ids, and how many were dropped."""
    best: dict[str, dict[str, Any]] = {}
    duplicates = 0
    for row in rows:
        rival = best.setdefault(row["source_id"], row)
        if rival is not row:
            duplicates += 1
            best[row["source_id"]] = min(rival, row, key=_completeness)
    ordered = [best[name] for name in sorted(best)]
    return pa.Table.from_pylist(ordered, schema=schema), duplicates


def _completeness(row: dict[str, Any]) -> tuple[int, str]:
    filled = sum(value not in (None, "", []) for value in row.values())
    return -filled, json.dumps(row, sort_keys=True, default=str)


def _with_text(items: pa.Table, text_fields: list[str]) -> pa.Table:
    """Adds item_id, text, and category_leaf (the last name of an item's first category path)."""
    fields = [items[name].to_pylist() for name in text_fields]
    texts = [
        ". ".join(filter(None, (_field_text(name, value) for name, value in zip(text_fields, values, strict=True))))
        for values in zip(*fields, strict=True)
    ]
    table = items.add_column(0, "item_id", pa.array(np.arange(len(items), dtype=np.int32)))
    table = table.add_column(2, "text", pa.array(texts, pa.string()))
    if "categories" in items.column_names and "category_leaf" not in items.column_names:
        leaves = [_leaf(value) for value in items["categories"].to_pylist()]
        table = table.append_column("category_leaf", pa.array(leaves, pa.string()))
    return table


def _field_text(name: str, value: Any) -> str:
    if value is None or value != value:  # NaN never reaches a text
        return ""
    if name == "price" and isinstance(value, (int, float)):
        return f"${value:.2f}"
    if isinstance(value, list):  # a path reads "Hair Care > Shampoo", several of them are separated by semicolons
        nested = any(isinstance(inner, list) for inner in value)
        return ("; " if nested else " > ").join(filter(None, (_field_text(name, inner) for inner in value)))
    return str(value)


def _leaf(value: Any) -> str | None:
    while isinstance(value, list) and value:
        value = value[0] if isinstance(value[0], list) else value[-1]
    return value if isinstance(value, str) else None


# --- interactions -----------------------------------------------------------------------------------------------


def _encode_events(
    config: CatalogConfig, events: pa.Table, known_items: pa.ChunkedArray, dropped: dict[str, int]
) -> tuple[pa.Array, pa.Array, npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any]]:
    """Numbers users and items in the order of their names; drops events with unknown items (rule 2)."""
    item_names = known_items.combine_chunks()  # sorted
    item = pc.index_in(events["item"], value_set=item_names)
    known = np.asarray(item.is_valid())
    unknown = int((~known).sum())
    dropped["interactions with unknown items"] = unknown
    if unknown > config.max_unknown_items * max(len(known), 1):
        example = events["item"].filter(pa.array(~known))[0].as_py()
        raise DataError(
            f"{unknown:,} of {len(known):,} interactions are with items that have no row among the items, such as "
            f"{example!r}: do the files belong together? catalog.max_unknown_items = {config.max_unknown_items} allows "
            "fewer"
        )
    users = events["user"].filter(pa.array(known)).combine_chunks()
    names = pc.unique(users)
    user_names = names.take(pc.sort_indices(names))
    return (
        user_names,
        item_names,
        np.asarray(pc.index_in(users, value_set=user_names)).astype(np.int64),
        np.asarray(item.filter(pa.array(known)).combine_chunks()).astype(np.int64),
        np.asarray(events["time"])[known],
        np.flatnonzero(known),
    )


def _drop_repeats(
    config: CatalogConfig,
    user: npt.NDArray[Any],
    item: npt.NDArray[Any],
    time: npt.NDArray[Any],
    row: npt.NDArray[Any],
    dropped: dict[str, int],
) -> tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any]]:
    """Rule 3. Rows come back in the order of `row`."""
    order = np.lexsort((row, time, item, user))
    same_pair = (np.diff(user[order]) == 0) & (np.diff(item[order]) == 0)
    equal = same_pair & (np.diff(time[order]) == 0)
    dropped["equal interactions"] = int(equal.sum())
    dropped["repeated interactions"] = int((same_pair & ~equal).sum()) if config.repeats == "first" else 0
    drop = same_pair if config.repeats == "first" else equal
    kept = np.sort(order[np.concatenate([[True], ~drop])]) if len(order) else order
    return user[kept], item[kept], time[kept], row[kept]


def _k_core(user: npt.NDArray[Any], item: npt.NDArray[Any], k: int) -> npt.NDArray[np.bool_]:
    """Mask of the interactions of the largest part in which every user and every item has at least `k`."""
    kept = np.ones(len(user), bool)
    while kept.any():
        rare_user = np.bincount(user[kept], minlength=user.max() + 1) < k
        rare_item = np.bincount(item[kept], minlength=item.max() + 1) < k
        after = kept & ~rare_user[user] & ~rare_item[item]
        if (after == kept).all():
            break
        kept = after
    return kept


def _shuffled(seed: int, row: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    return np.random.default_rng(seed).permutation(len(row))


def _split(
    config: CatalogConfig, offsets: npt.NDArray[np.int64], time: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Rule 7. Absolute positions [U] where training and validation end."""
    begin, end = offsets[:-1], offsets[1:]
    if config.split == "leave-one-out":
        enough = end - begin >= 3  # a shorter history only trains
        return np.where(enough, end - 2, end), np.where(enough, end - 1, end)
    shares = [1 - config.valid_share - config.test_share, 1 - config.test_share]
    valid_from, test_from = np.quantile(time, shares, method="higher")
    before_valid = np.concatenate([[0], np.cumsum(time < valid_from)])
    before_test = np.concatenate([[0], np.cumsum(time < test_from)])
    return begin + before_valid[end] - before_valid[begin], begin + before_test[end] - before_test[begin]


def _history_table(histories: Histories, time: npt.NDArray[np.int64]) -> pa.Table:
    offsets = pa.array(histories.offsets.astype(np.int32))
    begin = histories.offsets[:-1]
    return pa.table(
        {
            "user_id": np.arange(len(histories), dtype=np.int32),
            "source_id": pa.array(histories.source_ids, pa.string()),
            "items": pa.ListArray.from_arrays(offsets, pa.array(histories.items)),
            "times": pa.ListArray.from_arrays(offsets, pa.array(time)),
            "train_end": (histories.train_end - begin).astype(np.int32),
            "valid_end": (histories.valid_end - begin).astype(np.int32),
        }
    )


# --- profile ----------------------------------------------------------------------------------------------------

_QUANTILES = (0, 0.05, 0.25, 0.5, 0.75, 0.95, 1)


def _profile(table: pa.Table, histories: Histories, dropped: dict[str, int], config: CatalogConfig) -> dict[str, Any]:
    columns = {}
    for name in table.column_names:
        values = table[name].to_pylist()
        present = [value for value in values if value not in (None, "", [])]
        distinct = len({json.dumps(value, sort_keys=True, default=str) for value in present})  # lists are unhashable
        columns[name] = {"missing": len(values) - len(present), "distinct": distinct}
    return {
        "items": table.num_rows,
        "users": len(histories),
        "interactions": len(histories.items),
        "training_examples": histories.training_examples(),
        "validation_users": len(histories.evaluation("valid")),
        "test_users": len(histories.evaluation("test")),
        "text_fields": config.text_fields,
        "columns": columns,
        "text_characters": _quantiles(np.asarray(pc.utf8_length(table["text"]))),
        "history_length": _quantiles(np.diff(histories.offsets)),
        "dropped": dropped,
    }


def _quantiles(values: npt.NDArray[Any]) -> dict[str, float]:
    return {f"{q:.0%}": float(np.quantile(values, q)) for q in _QUANTILES} | {"mean": round(float(values.mean()), 2)}


def describe(profile: dict[str, Any]) -> str:
    """The profile as lines for a person."""
    lines = [
        f"{profile['items']:,} items, {profile['users']:,} users, {profile['interactions']:,} interactions; "
        f"{profile['training_examples']:,} training examples, {profile['validation_users']:,} validation and "
        f"{profile['test_users']:,} test users"
    ]
    for name, figures in profile["columns"].items():
        lines.append(f"  {name:<16} {figures['distinct']:>9,} distinct {figures['missing']:>9,} missing")
    lines += [
        f"  {name}: " + ", ".join(f"{quantile} {value:g}" for quantile, value in profile[name].items())
        for name in ("text_characters", "history_length")
    ]
    lines.append("  dropped: " + ", ".join(f"{count:,} {what}" for what, count in profile["dropped"].items()))
    return "\n".join(lines)
