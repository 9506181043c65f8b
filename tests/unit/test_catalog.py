from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from tiger.core.config import build
from tiger.core.errors import DataError
from tiger.core.storage import Folder
from tiger.data import histories as histories_module
from tiger.data import profile
from tiger.data.catalog import CatalogConfig, make
from tiger.data.histories import EvalSplit, Histories, read_histories
from tiger.data.prepare import interactions
from tiger.data.prepare import items as items_module
from tiger.data.readers import merge as _merge
from tiger.data.sources.base import INTERACTIONS

ITEM_SCHEMA = pa.schema(
    [
        ("source_id", pa.string()),
        ("title", pa.string()),
        ("categories", pa.list_(pa.list_(pa.string()))),
        ("price", pa.float64()),
    ]
)


def made(folder: Path, items: list[Any], events: list[tuple[str, str, int]], **config: Any) -> tuple[dict, Histories]:
    values = {"text_fields": ["title", "categories", "price"], "k_core": 0} | config
    rows = [item if isinstance(item, dict) else {"source_id": item, "title": f"title of {item}"} for item in items]
    table = pa.RecordBatch.from_pylist(rows, schema=ITEM_SCHEMA)
    pairs = [{"user": user, "item": item, "time": 1_400_000_000 + time} for user, item, time in events]
    batch = pa.RecordBatch.from_pylist(pairs, schema=INTERACTIONS)
    profile = make(build(CatalogConfig, values), [table], [batch], Folder(str(folder)))
    return profile, read_histories(Folder(str(folder)))


def named(folder: Path, histories: Histories) -> dict[str, list[str]]:
    names = Folder(str(folder)).read_table("items.parquet")["source_id"].to_pylist()
    return {user: [names[item] for item in histories.of(row)] for row, user in enumerate(histories.source_ids)}


def test_texts_are_cleaned_and_joined(tmp_path: Path) -> None:
    item = {
        "source_id": "a",
        "title": "Tea &amp;amp; Mint\n  é",
        "categories": [["Beauty", "Bath &amp; Body"], ["Home"]],
        "price": 9.5,
    }
    bare = {"source_id": "b", "title": None, "categories": None, "price": float("nan")}
    made(tmp_path, [item, bare, "c"], [("u", "a", 0), ("u", "b", 1), ("u", "c", 2)])
    first, second, _ = Folder(str(tmp_path)).read_table("items.parquet").to_pylist()
    assert first["text"] == "Tea & Mint é. Beauty > Bath & Body; Home. $9.50"
    assert first["category_leaf"] == "Bath & Body"
    assert (second["text"], second["category_leaf"]) == ("", None)


def test_a_text_field_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="text_fields contains color; the items have source_id, title"):
        made(tmp_path, ["a"], [("u", "a", 0)], text_fields=["title", "color"])


def test_of_duplicate_items_the_most_complete_is_kept_in_any_order(tmp_path: Path) -> None:
    rows = [
        {"source_id": "a", "title": "B"},
        {"source_id": "a", "title": "A", "price": 1.0},
        {"source_id": "a", "title": "C", "price": 1.0},
    ]
    for index in range(6):
        order = np.random.default_rng(index).permutation(3)
        profile, _ = made(tmp_path / str(index), [rows[i] for i in order] + ["b"], [("u", "a", 0), ("u", "b", 1)])
        assert profile["dropped"]["duplicate items"] == 2
        assert Folder(str(tmp_path / str(index))).read_table("items.parquet")["title"][0].as_py() == "A"


def test_only_the_fields_of_the_text_and_what_lists_show_are_kept(tmp_path: Path) -> None:
    rows = [{"source_id": name, "text": name * 3, "vector": [1.5, 2.0], "image": b"x", "tags": ["t"]} for name in "abc"]
    kinds = {"vector": pa.list_(pa.float32()), "image": pa.binary()}
    batch = pa.RecordBatch.from_pylist(rows, pa.schema([
        (name, kinds.get(name, pa.list_(pa.string()) if name == "tags" else pa.string())) for name in rows[0]
    ]))  # fmt: skip
    events = pa.RecordBatch.from_pylist([{"user": "u", "item": name, "time": 0} for name in "abc"], schema=INTERACTIONS)
    for number, (fields, extra) in enumerate(((["text"], set()), (["text", "vector"], {"vector"}))):
        config = build(CatalogConfig, {"text_fields": fields, "k_core": 0})
        folder = Folder(str(tmp_path / str(number)))
        make(config, [batch], [events], folder)
        table = folder.read_table("items.parquet")
        assert set(table.column_names) == {"item_id", "source_id", "text", "field_text"} | extra
        assert table["text"][0].as_py() == ("aaa. 1.5 > 2.0" if extra else "aaa")


def test_batches_with_other_columns_are_joined_by_name(tmp_path: Path) -> None:
    one = pa.RecordBatch.from_pydict({"source_id": ["b"], "title": ["B"], "price": [1]})
    two = pa.RecordBatch.from_pydict({"price": [1.5], "title": ["A"], "more": ["x"], "source_id": ["a"]})
    events = pa.RecordBatch.from_pylist([{"user": "u", "item": n, "time": 0} for n in "ab"], schema=INTERACTIONS)
    config = build(CatalogConfig, {"text_fields": ["title", "price", "more"], "k_core": 0})
    make(config, [one, two], [events], Folder(str(tmp_path)))
    assert Folder(str(tmp_path)).read_table("items.parquet")["text"].to_pylist() == ["A. $1.50. x", "B. $1.00"]


def test_long_ids_of_several_batches_are_numbers(tmp_path: Path) -> None:
    name = "u" * 2_000

    def batches() -> Any:
        for begin in range(0, 40, 10):
            items = pa.array([f"i{(begin + n) % 7}" for n in range(10)])
            yield pa.RecordBatch.from_arrays(
                [pa.array([f"{name}{n % 3}" for n in range(10)]), items, pa.array(range(begin, begin + 10))],
                schema=INTERACTIONS,
            )

    items = pa.RecordBatch.from_pydict({"source_id": [f"i{n}" for n in range(7)], "title": [f"t{n}" for n in range(7)]})
    config = build(CatalogConfig, {"text_fields": ["title"], "k_core": 0, "duplicates": "all"})
    profile = make(config, [items], batches(), Folder(str(tmp_path)))
    assert (profile["users"], profile["interactions"]) == (3, 40)


def test_repeated_interactions(tmp_path: Path) -> None:
    events = [("u", "a", 5), ("u", "b", 1), ("u", "a", 0), ("u", "a", 0), ("u", "c", 9)]
    first, histories = made(tmp_path / "first", ["a", "b", "c"], events)
    assert named(tmp_path / "first", histories) == {"u": ["a", "b", "c"]}
    assert (first["dropped"]["equal interactions"], first["dropped"]["repeated interactions"]) == (1, 1)
    _, histories = made(tmp_path / "all", ["a", "b", "c"], events, duplicates="all")
    assert named(tmp_path / "all", histories) == {"u": ["a", "b", "a", "c"]}


def test_k_core_is_iterative(tmp_path: Path) -> None:
    """Dropping user w leaves item c with one user, dropping c leaves v with one item, and so on."""
    events = [("u", "a", 0), ("u", "b", 1), ("t", "a", 0), ("t", "b", 1), ("v", "a", 0), ("v", "c", 1), ("w", "c", 0)]
    profile, histories = made(tmp_path, ["a", "b", "c"], events, k_core=2)
    assert named(tmp_path, histories) == {"t": ["a", "b"], "u": ["a", "b"]}
    assert profile["dropped"]["interactions outside the k-core"] == 3
    assert profile["dropped"]["items without interactions"] == 1


def test_nothing_left_after_the_k_core(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no user and item with 5 interactions each is left out of 1"):
        made(tmp_path, ["a"], [("u", "a", 0)], k_core=5)


def test_ties(tmp_path: Path) -> None:
    events = [("u", item, 0) for item in "cabed"]
    for ties, expected in (("file", "cabed"), ("id", "abcde")):
        _, histories = made(tmp_path / ties, list("abcde"), events, tie_break=ties)
        assert named(tmp_path / ties, histories)["u"] == list(expected)
    orders = set()
    for seed in range(5):
        _, histories = made(tmp_path / f"s{seed}", list("abcde"), events, tie_break="shuffle", seed=seed)
        orders.add(tuple(named(tmp_path / f"s{seed}", histories)["u"]))
    assert len(orders) > 1
    assert all(sorted(order) == list("abcde") for order in orders)


def test_the_result_does_not_depend_on_the_order_of_files_with_ties_by_id(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    events = [(f"u{rng.integers(9)}", f"i{rng.integers(12)}", int(rng.integers(4))) for _ in range(150)]
    results = []
    for index in range(20):
        order = rng.permutation(len(events))
        made(
            tmp_path / str(index),
            [f"i{n}" for n in rng.permutation(12)],
            [events[i] for i in order],
            tie_break="id",
            k_core=3,
        )
        results.append((tmp_path / str(index) / "histories.parquet").read_bytes())
    assert len(set(results)) == 1


def test_unknown_items_are_counted_and_too_many_stop(tmp_path: Path) -> None:
    events = [("u", item, time) for time, item in enumerate("abcx")]
    profile, histories = made(tmp_path, list("abc"), events, max_unknown_item_fraction=0.3)
    assert profile["dropped"]["interactions with unknown items"] == 1
    assert named(tmp_path, histories)["u"] == list("abc")
    with pytest.raises(DataError, match="1 of 4 interactions are with items that have no row.*'x'"):
        made(tmp_path, list("abc"), events)


def test_leave_one_out(tmp_path: Path) -> None:
    events = [("long", item, time) for time, item in enumerate("abcd")] + [("short", "a", 0), ("short", "b", 1)]
    profile, histories = made(tmp_path, list("abcd"), events)
    for split, target, history in (("test", "d", "abc"), ("valid", "c", "ab")):
        users = histories.evaluation(split)
        assert [histories.source_ids[user] for user in users.users] == ["long"]  # two items are too few to split
        assert "abcd"[users.targets[0]] == target
        assert ["abcd"[item] for item in users.histories()[0]] == list(history)
    assert profile["training_examples"] == 2  # a -> b of long, a -> b of short; b -> c would show a target


def test_by_time(tmp_path: Path) -> None:
    """Two moments cut all histories; a target is the first item after one, with a history before it."""
    events = [("u", item, time) for time, item in enumerate("abcdefghij")] + [("late", "j", 9), ("late", "a", 99)]
    _, histories = made(tmp_path, list("abcdefghij"), events, split="temporal", valid_fraction=0.2, test_fraction=0.2)
    times = np.asarray(Folder(str(tmp_path)).read_table("histories.parquet")["times"].combine_chunks().flatten())
    begins, ends = histories.offsets[:-1], histories.offsets[1:]
    newest_training = max(times[b:e].max(initial=0) for b, e in zip(begins, histories.train_end, strict=True))
    oldest_test = min(times[b:e].min(initial=2**62) for b, e in zip(histories.valid_end, ends, strict=True))
    for begin, end in zip(histories.train_end, histories.valid_end, strict=True):
        assert ((newest_training < times[begin:end]) & (times[begin:end] < oldest_test)).all()
    users = histories.evaluation("test")
    assert all(len(history) for history in users.histories())


def _check_that_training_reads_no_target(folder: Path, split: str) -> None:
    """Compare what training, validation and testing read of a catalog with plain Python over the raw events."""
    rng = np.random.default_rng(1)
    events = [(f"u{rng.integers(30):02d}", f"i{rng.integers(40):02d}", int(t)) for t in rng.permutation(2000)[:600]]
    _, histories = made(folder, [f"i{n:02d}" for n in range(40)], events, split=split)
    first: dict[tuple[str, str], int] = {}
    for user, item, t in sorted(events, key=lambda event: event[2]):
        first.setdefault((user, item), t)
    times = sorted(first.values())
    cuts = [times[math.ceil(share * (len(times) - 1))] for share in (0.8, 0.9)]
    trained: list[str] = []
    targets: dict[str, dict[str, tuple[list[str], str]]] = {"valid": {}, "test": {}}
    for user in sorted({user for user, _ in first}):
        own = [(item, t) for (owner, item), t in first.items() if owner == user]
        ends = [sum(t < cut for _, t in own) for cut in cuts]
        if split == "leave-one-out":
            ends = [len(own) - 2, len(own) - 1] if len(own) >= 3 else [len(own)] * 2
        names = [item for item, _ in own]
        trained += names[1 : ends[0]]
        for name, begin, end in (("valid", ends[0], ends[1]), ("test", ends[1], len(own))):
            if 0 < begin < end:
                targets[name][user] = names[:begin], names[begin]
    items = Folder(str(folder)).read_table("items.parquet")["source_id"].to_pylist()
    assert sorted(items[item] for item in histories.training_targets()) == sorted(trained)
    first_items = [items[histories.items[at]] for at, end in zip(histories.offsets, histories.train_end, strict=False)
                   if end > at]  # fmt: skip
    counts = Counter(trained + first_items)
    assert histories.training_counts(len(items)).tolist() == [counts[name] for name in items]
    for name, expected in targets.items():
        users = histories.evaluation(name)
        found = {
            histories.source_ids[user]: ([items[item] for item in history], items[target])
            for user, history, target in zip(users.users, users.histories(), users.targets.tolist(), strict=True)
        }
        assert found == expected
        assert len(found) > 10


@pytest.mark.parametrize("split", ["leave-one-out", "temporal"])
@pytest.mark.parametrize("fault", ["none", "a target more is trained on", "one is read before its time", "late split"])
def test_no_target_is_ever_a_training_item(
    split: str, fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted faults show that the check finds them."""
    if fault == "none":
        _check_that_training_reads_no_target(tmp_path, split)
        return
    if fault == "a target more is trained on":
        in_training = Histories._in_training
        monkeypatch.setattr(
            Histories, "_in_training", lambda own: in_training(replace(own, train_end=own.valid_end.copy()))
        )
    elif fault == "one is read before its time":
        monkeypatch.setattr(
            EvalSplit, "histories", lambda own: [own.items[b : e + 1] for b, e in zip(own.begin, own.end, strict=True)]
        )
    else:
        right = interactions.split_points

        def late(offsets: Any, time: Any, cuts: Any) -> Any:
            train_end, valid_end = right(offsets, time, cuts)
            return np.minimum(train_end + 1, offsets[1:]), np.minimum(valid_end + 1, offsets[1:])

        monkeypatch.setattr(interactions, "split_points", late)
    with pytest.raises(AssertionError):
        _check_that_training_reads_no_target(tmp_path, split)


def test_the_profile_counts_missing_and_distinct_values_of_lists(tmp_path: Path) -> None:
    items = [
        {"source_id": "a", "title": "x", "categories": [["A"]]},
        {"source_id": "b", "title": "x", "categories": [["A"]]},
        {"source_id": "c", "title": None, "categories": []},
    ]
    profile, _ = made(tmp_path, items, [("u", item, time) for time, item in enumerate("abc")])
    assert profile["columns"]["categories"] == {"missing": 1, "distinct": 1}
    assert profile["columns"]["title"] == {"missing": 1, "distinct": 1}
    assert profile["history_length"]["100%"] == 3


# --- columns beyond 2 GiB ------------------------------------------------------------------------------------------


def test_large_tables_give_the_same_catalog_as_small_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With limits of a few bytes in place of gigabytes, every column is taken and written in pieces."""
    items = [{"source_id": f"i{n % 90}", "title": "x" * (n % 7), "categories": [["a", f"b{n}"], []], "price": n / 4}
             for n in range(100)]  # fmt: skip
    items[3]["categories"] = None
    events = [(f"u{n % 13}", f"i{7 * n % 90}", n) for n in range(300)]
    one = made(tmp_path / "one", items, events)
    for name, value in (("ONE_CHUNK", 16), ("PIECE", 7)):
        monkeypatch.setattr(_merge, name, value)
    monkeypatch.setattr(items_module, "PIECE", 7)
    monkeypatch.setattr(profile, "PIECE", 7)
    monkeypatch.setattr(histories_module, "CHUNK_EVENTS", 16)
    other = made(tmp_path / "other", items, events)
    assert one[0] == other[0]
    for name in ("items.parquet", "histories.parquet"):
        first, second = (Folder(str(tmp_path / each)).read_table(name) for each in ("one", "other"))
        assert first.schema == second.schema
        assert first.to_pylist() == second.to_pylist()
    for field in ("source_ids", "offsets", "items", "train_end", "valid_end"):
        np.testing.assert_array_equal(getattr(one[1], field), getattr(other[1], field))


@pytest.mark.slow
def test_texts_of_more_than_2_gib_are_a_catalog(tmp_path: Path) -> None:
    """33,000 items with 64 KiB of text each: 2.16 GB in one column, where a chunk of text has room for 2 GiB."""
    count, length = 33_000, 1 << 16
    schema = pa.schema([("source_id", pa.string()), ("title", pa.string())])
    rng = np.random.default_rng(0)

    def batches() -> Any:
        for begin in range(0, count, 500):
            names = [f"i{n:05d}" for n in range(begin, begin + 500)]
            texts = [f"{name} {'x' * length}" for name in names]
            yield pa.RecordBatch.from_arrays([pa.array(names), pa.array(texts)], schema=schema)

    pairs = [(f"u{n // 5}", f"i{item:05d}", n) for n, item in enumerate(rng.permutation(count))]
    events = pa.RecordBatch.from_pylist([{"user": u, "item": i, "time": t} for u, i, t in pairs], schema=INTERACTIONS)
    config = build(CatalogConfig, {"text_fields": ["title"], "k_core": 0})
    profile = make(config, batches(), [events], Folder(str(tmp_path)))
    assert profile["columns"]["title"] == {"missing": 0, "distinct": count}
    assert profile["text_characters"]["100%"] == length + 7
    parquet = pq.ParquetFile(tmp_path / "items.parquet")
    assert parquet.metadata.num_rows == count
    last = parquet.read_row_group(parquet.num_row_groups - 1)
    assert pc.utf8_slice_codeunits(last["text"], 0, 6).to_pylist()[-1] == f"i{count - 1:05d}"
