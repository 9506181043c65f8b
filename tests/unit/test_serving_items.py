"""Filters, search and the prefix tree, against loops over all items."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from tests.factories import SIZES, random_ids
from tests.serving import toy_items
from tiger.core.artifacts import Artifact
from tiger.core.storage import Folder
from tiger.data.catalog import Catalog
from tiger.semantic_ids.assignment import SemanticIds
from tiger.serving.items import ItemTable, parse_prices
from tiger.serving.schemas import Filters
from tiger.serving.search import TitleIndex
from tiger.serving.tree import PrefixTree

ITEMS = 60


def test_items_have_the_ids_titles_and_fields_of_the_catalog(tmp_path: Path) -> None:
    """Read in several row groups, with and without each field."""
    folder = Folder(str(tmp_path))
    table = pa.table({"item_id": [0, 1, 2], "source_id": ["a", "b", "c"], "text": ["one " * 30, "two", ""]})
    catalog = Catalog(Artifact(folder, {"kind": "catalog", "metrics": {"items": 3}}))
    fields: list[dict[str, Any]] = [
        {},
        {"title": [None, "", "three"], "price": [1.5, None, 0.0]},
        {"title": ["é", "x", None], "price": ["$1,299.50", "no", None], "category": ["Soap", None, "Oils"]},
        {"categories": pa.array([["Beauty", "Soap"], [], None]), "category_leaf": ["Soap", None, None]},
    ]
    for extra in fields:
        whole = table
        for name, values in extra.items():
            whole = whole.append_column(name, pa.array(values) if isinstance(values, list) else values)
        folder.write_table("items.parquet", whole, row_group_size=2)
        for cached in ("items", "source_ids", "titles"):
            catalog.__dict__.pop(cached, None)
        items = ItemTable.read(folder)
        assert (items.source_ids, items.titles) == (["a", "b", "c"], catalog.titles)
        assert (items.prices is None) == ("price" not in extra)
        assert (items.categories is None) == (not {"category", "categories"} & extra.keys())
    assert items.categories_of(0) == ["Beauty", "Soap"]
    assert items.categories_of(1) == items.categories_of(2) == []
    assert items.categories is not None
    assert items.categories.items("sOAP").tolist() == [0]


def test_prices_are_the_first_number() -> None:
    def parsed(values: list[Any]) -> Any:
        found = parse_prices(pa.chunked_array([values]))
        return found if found is None else [None if np.isnan(each) else each for each in found]

    assert parsed([1, None, 3]) == [1, None, 3]
    assert parsed(["$1,299.00", "from 5", "", None, "free", "7."]) == [1299, 5, None, None, None, 7]
    assert parsed([True, False]) is None
    assert parsed([None, "free"]) is None


def passes(item: int, items: ItemTable, given: dict[str, Any]) -> bool:
    """What `ItemTable.allowed` says of one item, by its fields."""
    assert items.prices is not None
    wanted = given.get("category")
    names = {name.lower() for name in items.categories_of(item)}
    return (
        (given.get("allow") is None or items.source_ids[item] in given["allow"])
        and items.source_ids[item] not in given.get("deny", [])
        and (wanted is None or any(each.lower() in names for each in ([wanted] if isinstance(wanted, str) else wanted)))
        and (given.get("min_price") is None or items.prices[item] >= given["min_price"])
        and (given.get("max_price") is None or items.prices[item] <= given["max_price"])
        and (not given.get("only_new") or item % 7 == 0)
    )


def test_filters_agree_with_a_loop() -> None:
    items, is_new = toy_items(ITEMS), np.arange(ITEMS) % 7 == 0
    choices: dict[str, list[Any]] = {
        "allow": [None, [], [f"i{item}" for item in range(0, ITEMS, 2)], ["i3", "i3", "who?"]],
        "deny": [[], ["i0", "i4", "nobody"]],
        "category": [None, "kind 1", ["KIND 0", "Kind 2"], "Sale"],
        "min_price": [None, 5.0],
        "max_price": [None, 12],
        "only_new": [False, True],
    }
    for values in itertools.product(*choices.values()):
        given = dict(zip(choices, values, strict=True))
        allowed = items.allowed(Filters(**given), is_new)
        expected = [passes(item, items, given) for item in range(ITEMS)]
        assert (allowed is None and all(expected)) or (allowed is not None and allowed.tolist() == expected), given
    assert items.unknown(Filters(allow=["i3", "a", "a"], deny=["b", "i1"])) == ["a", "b"]


def test_filters_that_cannot_be_applied_say_why() -> None:
    items, is_new = toy_items(ITEMS), np.zeros(ITEMS, bool)
    with pytest.raises(ValueError, match=r"filters.category: no item is in 'kinds 1'; similar: kind 1, kind"):
        items.allowed(Filters(category="kinds 1"), is_new)
    bare = ItemTable(["a"], ["A"])
    with pytest.raises(ValueError, match="this catalog have no categories"):
        bare.allowed(Filters(category="x"), is_new[:1])
    with pytest.raises(ValueError, match="this catalog have no prices"):
        bare.allowed(Filters(max_price=1), is_new[:1])
    with pytest.raises(ValueError, match="min_price = 2 is more than max_price = 1"):
        Filters(min_price=2, max_price=1)


def test_search_agrees_with_a_loop() -> None:
    items, popularity = toy_items(ITEMS), np.arange(ITEMS) % 11
    index = TitleIndex(items.titles, popularity)
    for query in ("red", "RE so", "soap 1", "s", "no. 12", "shampoo blue 3", "sham'poo", "", "!", "zebra", "red red"):
        words = list(dict.fromkeys(re.findall(r"[^\W_]+", query.lower())))
        found = []
        for item, title in enumerate(items.titles):
            own = re.findall(r"[^\W_]+", title.lower())
            if words and all(any(each.startswith(word) for each in own) for word in words):
                found.append((-sum(word in own for word in words), -popularity[item], item))
        for limit in (3, 100):
            assert index.find(query, limit) == [item for *_, item in sorted(found)][:limit], query
    assert TitleIndex([], popularity[:0]).find("a", 5) == []
    assert TitleIndex(["Ägypten Öl", "日本 茶"], popularity[:2]).find("ÖL", 5) == [0]
    assert TitleIndex(["Ägypten Öl", "日本 茶"], popularity[:2]).find("茶", 5) == [1]


def test_the_tree_agrees_with_a_loop() -> None:
    ids, items = random_ids(np.random.default_rng(1), ITEMS, SIZES), toy_items(ITEMS)
    tree = PrefixTree(ids, items.source_ids, items.titles, np.arange(ITEMS) % 11)
    codes = [tuple(row) for row in ids.codes.tolist()]
    for depth in range(4):
        for prefix in {code[:depth] for code in codes} | {(9, 9, 9)[:depth]}:
            below = sorted((code, item) for item, code in enumerate(codes) if code[:depth] == prefix)
            assert tree.items(prefix).tolist() == [item for _, item in below]
            children, count = tree.children(prefix, 2)
            next_codes = {code[depth] for code, _ in below} if depth < 3 else set()
            sizes = [sum(code[depth] == each for code, _ in below) for each in next_codes]
            assert count == len(sizes)
            assert [child.num_items for child in children] == sorted(sizes, reverse=True)[:2]
            for child in children:
                of_child = [item for code, item in below if code[depth] == child.code]
                assert len(of_child) == child.num_items
                most = max(item % 11 for item in of_child)
                assert child.example in {items.titles[item] for item in of_child if item % 11 == most}
    assert not len(tree.items((0, 0, 0, 0)))


def test_neighbors_share_the_longest_prefixes() -> None:
    ids, items = random_ids(np.random.default_rng(2), ITEMS, SIZES), toy_items(ITEMS)
    tree = PrefixTree(ids, items.source_ids, items.titles, np.zeros(ITEMS, np.int64))
    codes = ids.codes.tolist()

    def shared(one: int, other: int) -> int:
        return next((level for level in range(3) if codes[one][level] != codes[other][level]), 3)

    for item in range(ITEMS):
        lengths = sorted((shared(item, other) for other in range(ITEMS) if other != item), reverse=True)
        for count in (1, 5, 30):
            found = tree.neighbors(item, count)
            assert [each.shared_codes for each in found] == [length for length in lengths[:count] if length]
            for each in found:
                other = int(each.item[1:])
                assert (shared(item, other), each.semantic_id) == (each.shared_codes, codes[other])


def test_words_set_a_prefix_apart() -> None:
    names = ["red soap bar"] * 20 + ["blue shampoo bar"] * 20 + [f"other thing {'ab'[n % 2]}" for n in range(20)]
    codes = np.array([[n // 20, n % 5, n % 3] for n in range(60)], np.int16)
    codes[:, 1:] = np.stack(np.unravel_index(np.arange(60) % 20, (5, 4)), axis=1)
    tree = PrefixTree(SemanticIds(codes, (3, 5, 4)), [str(n) for n in range(60)], names, np.zeros(60, np.int64))
    assert set(tree.words((0,))) >= {"red", "soap"}
    assert not {"blue", "shampoo", "other"} & set(tree.words((0,)))
    assert tree.words((0, 0, 0)) == ()
