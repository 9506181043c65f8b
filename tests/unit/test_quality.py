from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from itertools import combinations
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tiger.metrics.codes import category_agreement, gini
from tiger.report.semantic_ids import (
    CodedItems,
    distinctive_words,
    figures,
    largest_groups,
    main,
    of_parquet,
    page,
    prefix_tree,
)


def test_gini_against_the_definition() -> None:
    counts = np.random.default_rng(0).integers(0, 20, 30)
    truth = np.abs(counts[:, None] - counts).sum() / (2 * len(counts) ** 2 * counts.mean())
    assert gini(counts) == pytest.approx(truth)
    assert gini(np.full(9, 4)) == pytest.approx(0)
    assert gini(np.array([0] * 99 + [7])) == pytest.approx(0.99)


def test_purity_against_all_pairs() -> None:
    rng = np.random.default_rng(1)
    codes = rng.integers(0, 3, (40, 2))
    categories = [None if x == 4 else "abcd"[x] for x in rng.integers(0, 5, 40)]
    for depth in (1, 2):
        pairs = [
            (categories[a] == categories[b], (codes[a, :depth] == codes[b, :depth]).all())
            for a, b in combinations(range(40), 2)
            if categories[a] is not None and categories[b] is not None
        ]
        within = np.mean([same for same, prefix in pairs if prefix])
        assert category_agreement(codes, categories, depth) == pytest.approx(
            (within, np.mean([same for same, _ in pairs]))
        )


def shop() -> CodedItems:
    """Two departments; the first code is the department, and three of its items collide."""
    rng = np.random.default_rng(2)
    names = [f"rose lipstick {n}" for n in range(20)] + [f"argan <shampoo> {n}" for n in range(20)]
    codes = np.stack([np.arange(40) // 20, np.arange(40) % 20], axis=1)
    codes[:3] = (0, 7)
    vectors = (codes[:, :1] * 10 + rng.normal(size=(40, 4))).astype(np.float32)
    return CodedItems(
        codes, (2, 20), np.array([0, 1, 2, *[0] * 37]), names, ["lips"] * 20 + ["hair"] * 20, vectors, 0.25
    )


def test_figures_of_a_shop() -> None:
    found = figures(shop())
    assert found["category_agreement@1"] == 1
    assert found["category_agreement of any two items"] == pytest.approx(19 / 39)
    assert found["largest_group"] == 4
    assert found["unique_ratio"] == 37 / 40
    assert found["reconstruction_error"] == 0.25
    assert (found["usage@1"], found["usage@2"]) == (1, 1)
    assert figures(replace(shop(), sizes=(4, 20)))["usage@1"] == 0.5
    codes, names = largest_groups(shop())[0]
    assert (codes, names) == ((0, 7), ["rose lipstick 0", "rose lipstick 1", "rose lipstick 2", "rose lipstick 7"])


def test_telling_words_are_those_that_set_a_group_apart() -> None:
    names = shop().names
    among = Counter({"rose": 20, "lipstick": 20, "argan": 20, "shampoo": 20})
    assert distinctive_words(names[:20], among, 40) == ["lipstick", "rose"]
    assert distinctive_words(["rose lipstick 1", "rose shampoo 2", "rose"], among, 40) == ["rose"]


class Tree(HTMLParser):
    """Counts tags, and refuses one that is closed before those inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: Counter[str] = Counter()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen[tag] += 1
        if tag not in ("meta", "html"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag != "html":
            assert self.open.pop() == tag


def test_the_page_holds_every_prefix_and_escapes_titles() -> None:
    text = page(shop())
    tree = Tree()
    tree.feed(text)
    assert tree.open == []
    assert tree.seen["details"] == 2  # one per first code; the leaves below are lines
    assert "<shampoo>" not in text
    assert "argan &lt;shampoo&gt; 3" in text
    assert "lips: 100%" in text
    assert tree.seen["script"] == 0


def test_a_page_says_what_it_leaves_out() -> None:
    assert "smaller ones, with" in prefix_tree(shop(), widest=[5])


def test_codes_from_anywhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "codes.parquet"
    pq.write_table(pa.table({"codes": [[1, 2], [1, 2], [0, 5]], "title": ["a", None, "c"]}), path)
    assert main([str(path), "--page", str(tmp_path / "tree.html")]) == 0
    printed = capsys.readouterr().out
    assert "2 items share (1, 2):\n  a\n  (no title)" in printed
    assert "unique ratio                      0.666667" in printed
    assert (tmp_path / "tree.html").read_text().startswith("<!doctype html>")


def test_item_0_has_a_name(tmp_path: Path) -> None:
    pq.write_table(pa.table({"codes": [[0], [1]], "item_id": [0, 1]}), tmp_path / "codes.parquet")
    assert of_parquet(str(tmp_path / "codes.parquet")).names == ["0", "1"]


BAD = {
    "row 1: codes must be less than 16,777,216, not 1000000000000": {"codes": [[1], [10**12]]},
    "no column `codes`; its columns: x": {"x": [1]},
    r"row 1: codes must be 2 integers from 0, not \[1\]": {"codes": [[1, 2], [1]]},
    r"row 1: codes must be 1 integers from 0, not \[-4\]": {"codes": [[1], [-4]]},
    "row 1: codes must be 1 integers from 0, not None": {"codes": [[1], None]},
    "has no rows": {"codes": pa.array([], pa.list_(pa.int64()))},
}


@pytest.mark.parametrize("message", BAD)
def test_codes_that_make_no_sense_are_refused(message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "codes.parquet"
    pq.write_table(pa.table(BAD[message]), path)
    assert main([str(path)]) == 3
    assert re.search(message, capsys.readouterr().err)
