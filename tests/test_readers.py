"""Raw files at the limits of what can be read: separators of one table, files that vanish, numbers without end."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_cases import EVENTS, events_csv, histories, items_csv, put, run, truth

from tiger.core.errors import DataError

# --- settings of one table ----------------------------------------------------------------------------------------


def test_a_separator_of_one_table_is_not_asked_of_the_other(tmp_path: Path) -> None:
    """Each message names the setting that works; following them one after another ends."""
    items = put(tmp_path / "items.csv", items_csv(tmp_path).read_text().replace(",", "|"))
    ratings = put(tmp_path / "ratings.dat", "\n".join("::".join(map(str, row)) for row in EVENTS))
    names = ["user_id", "item_id", "timestamp"]
    with pytest.raises(DataError, match=r"""items.csv: .*contains '\|' and no '::': set data.separator={inter""") as e:
        run(tmp_path, items, ratings, separator="::")
    assert 'set data.separator={interactions="::"}; if' in str(e.value)
    assert "list the names in data.columns={items=[...]}" in str(e.value)
    with pytest.raises(DataError, match=r"ratings.dat: .*list the names in data.columns=\{interactions=\[...\]\}"):
        run(tmp_path, items, ratings, separator={"interactions": "::"})
    right = {"separator": {"interactions": "::"}, "columns": {"interactions": names}}
    assert histories(run(tmp_path, items, ratings, **right)) == truth()


def test_a_separator_of_the_items_is_not_asked_of_the_interactions(tmp_path: Path) -> None:
    items = put(tmp_path / "items.csv", items_csv(tmp_path).read_text().replace(",", "^"))
    with pytest.raises(
        DataError, match=r'events.csv: .*contains \',\' and no \'\^\': set data.separator=\{items="\^"\}'
    ):
        run(tmp_path, items, events_csv(tmp_path), separator="^")
    assert histories(run(tmp_path, items, events_csv(tmp_path), separator={"items": "^"})) == truth()


def test_a_wrong_separator_of_one_table_keeps_that_of_the_other(tmp_path: Path) -> None:
    items = put(tmp_path / "items.csv", items_csv(tmp_path).read_text().replace(",", "|"))
    events = put(tmp_path / "e.csv", events_csv(tmp_path).read_text().replace(",", "^"))
    wrong = {"items": "~", "interactions": "^"}
    with pytest.raises(DataError, match=r'set data.separator=\{items="\|", interactions="\^"\}'):
        run(tmp_path, items, events, separator=wrong)
    assert histories(run(tmp_path, items, events, separator=wrong | {"items": "|"})) == truth()


def test_names_of_headerless_interactions_do_not_hide_the_separator_of_the_items(tmp_path: Path) -> None:
    names = ["user_id", "item_id", "timestamp"]
    ratings = put(tmp_path / "ratings.dat", "\n".join("::".join(map(str, row)) for row in EVENTS))
    with pytest.raises(
        DataError, match=r"items.csv: the first line has 1 .*data.columns=\{items=\[...\]\} or set data"
    ):
        run(tmp_path, items_csv(tmp_path, header="sku,title,maker"), ratings, separator="::", columns=names)
