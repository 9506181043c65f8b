"""Times as users have them: within a second, in many formats, out of bounds."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import pytest

from tests.raw_tables import EVENTS, ITEMS, START, events_csv, histories, items_csv, run, truth
from tiger.core.errors import DataError

# --- 03: times within a second ------------------------------------------------------------------------------------


@pytest.mark.parametrize("unit", ["ms", "us", "ns"])
def test_the_order_within_a_second_is_the_truth(unit: str, tmp_path: Path) -> None:
    scale = {"ms": 10**3, "us": 10**6, "ns": 10**9}[unit]
    rows = [(f"c{u}", ITEMS[n], START * scale + (5 * n) % 12 * scale // 20) for u in range(3) for n in range(12)]
    artifact = run(
        tmp_path, items_csv(tmp_path), events_csv(tmp_path, rows), time_unit=unit, catalog={"duplicates": "all"}
    )
    assert histories(artifact) == truth(rows)


def test_plays_within_a_second_are_not_equal(tmp_path: Path) -> None:
    rows = [("c0", ITEMS[0], START * 1000 + 300 * n) for n in range(30)] + [
        ("c1", ITEMS[1], START * 1000 + n) for n in range(5)
    ]
    artifact = run(
        tmp_path, items_csv(tmp_path), events_csv(tmp_path, rows), time_unit="ms", catalog={"duplicates": "all"}
    )
    assert artifact.metrics["interactions"] == 35


# --- 14: times ----------------------------------------------------------------------------------------------------

FORMS = {
    "%m/%d/%Y %I:%M:%S %p": "%m/%d/%Y %I:%M:%S %p",
    "%a %b %d %H:%M:%S %z %Y": "%a %b %d %H:%M:%S +0000 %Y",
    "%d-%b-%Y": "%d-%b-%Y",
    "%Y/%m/%d %H:%M": "%Y/%m/%d %H:%M",
}


@pytest.mark.parametrize("form", FORMS)
def test_a_time_format(form: str, tmp_path: Path) -> None:
    rows = [
        (user, item, datetime.datetime.fromtimestamp(time, datetime.UTC).strftime(FORMS[form]))
        for user, item, time in EVENTS
    ]
    path = events_csv(tmp_path, rows)
    with pytest.raises(DataError, match=r'data.time_format = "') as error:
        run(tmp_path, items_csv(tmp_path), path)
    assert form in str(error.value)
    assert str(error.value).count("timestamp is not a time") == 2  # the reason, and one example of it
    assert histories(run(tmp_path, items_csv(tmp_path), path, time_format=form)) == truth()


def test_several_formats_and_utc(tmp_path: Path) -> None:
    rows = []
    for n, (user, item, time) in enumerate(EVENTS):
        moment = datetime.datetime.fromtimestamp(time, datetime.UTC)
        rows.append((user, item, moment.strftime("%Y-%m-%d %H:%M:%S UTC" if n % 2 else "%d.%m.%Y %H:%M:%S")))
    path = events_csv(tmp_path, rows)
    formats = ["%d.%m.%Y %H:%M:%S", "%Y-%m-%d %H:%M:%S %Z"]
    assert histories(run(tmp_path, items_csv(tmp_path), path, time_format=formats)) == truth()
    assert histories(run(tmp_path, items_csv(tmp_path), events_csv(tmp_path, rows[1::2]))) == truth(EVENTS[1::2])


def test_ordinals_and_no_time(tmp_path: Path) -> None:
    rows = [(user, item, 4 - step) for step, (user, item, _) in enumerate(EVENTS[:5])]
    rows += [(user, item, step + 0.5) for step, (user, item, _) in enumerate(EVENTS[5:10])]
    path = events_csv(tmp_path, rows)
    assert histories(run(tmp_path, items_csv(tmp_path), path, time_unit="order")) == truth(rows)
    path = events_csv(tmp_path, [row[:2] for row in EVENTS], header="user_id,item_id")
    assert histories(run(tmp_path, items_csv(tmp_path), path, time="")) == truth()
    with pytest.raises(DataError, match="no column timestamp; columns found: user_id, item_id. Set data.time"):
        run(tmp_path, items_csv(tmp_path), path)


@pytest.mark.parametrize(
    ("factor", "hint"),
    [(10**3, '"ms"'), (10**6, '"us"'), (10**9, '"ns"'), (1, "other bounds: data.years")],
)
def test_a_time_out_of_bounds_shows_the_unit_that_fits(factor: int, hint: str, tmp_path: Path) -> None:
    rows = [(user, item, (time if factor > 1 else time - 10**9) * factor) for user, item, time in EVENTS]
    with pytest.raises(
        DataError, match=r"events.csv:2: timestamp is outside the years 1990 to 2100 \('\d+' in seconds is"
    ) as error:
        run(tmp_path, items_csv(tmp_path), events_csv(tmp_path, rows))
    assert hint in str(error.value)
    fix: dict[str, Any] = {"time_unit": hint.strip('"')} if factor > 1 else {"years": [1970, 2000]}
    assert histories(run(tmp_path, items_csv(tmp_path), events_csv(tmp_path, rows), **fix)) == truth()
