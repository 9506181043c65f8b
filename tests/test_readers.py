"""Raw files at the limits of what can be read: separators of one table, files that vanish, numbers without end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from test_cases import EVENTS, events_csv, histories, items_csv, put, run, truth

from tiger.core.artifacts import Artifact
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


# --- limits of a catalog that is reused ---------------------------------------------------------------------------


def test_a_lower_limit_of_bad_rows_holds_for_a_finished_catalog(tmp_path: Path) -> None:
    """It is not made again, and a limit that it meets uses it."""
    events = events_csv(tmp_path, [*EVENTS, ("c0", "p00", "soon"), ("", "p01", "1450000000")])
    first = run(tmp_path, items_csv(tmp_path), events, max_bad_row_fraction=0.5)
    message = (
        r"interactions: 2 of 42 rows cannot be read \(4.76%, allowed: 1.00%, data.max_bad_row_fraction\): .*'soon'"
    )
    for _ in range(2):
        with pytest.raises(DataError, match=message):
            run(tmp_path, items_csv(tmp_path), events)
    again = run(tmp_path, items_csv(tmp_path), events, max_bad_row_fraction=0.05)
    assert again.manifest == first.manifest


@pytest.mark.parametrize("catalog", [{"k_core": 0}, {"k_core": 2}, {"duplicates": "all"}])
def test_a_lower_limit_of_unknown_items_holds_for_a_finished_catalog(catalog: dict[str, Any], tmp_path: Path) -> None:
    rows = [*EVENTS, *EVENTS[:3], ("c1", "p00", 1_450_000_007), ("c0", "who", 1_450_000_001)]
    events = events_csv(tmp_path, rows)

    def made(limit: float) -> Artifact:
        return run(tmp_path, items_csv(tmp_path), events, catalog=catalog | {"max_unknown_item_fraction": limit})

    first = made(0.5)
    with pytest.raises(DataError, match=r"1 of 45 interactions .*catalog.max_unknown_item_fraction = 0.0"):
        made(0.0)
    assert made(0.03).manifest == first.manifest
