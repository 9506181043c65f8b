"""Parts of the report: intervals, groups, tables, colors."""

from __future__ import annotations

import xml.etree.ElementTree

import pytest
from scipy.stats import binomtest

from tiger.data.item_names import shortened
from tiger.evaluation.evaluator import GroupResult, MethodResult
from tiger.report.figures import COLORS, INK, picture, standalone, wilson
from tiger.report.markup import Html, Number, escaped, paragraph, seconds, table
from tiger.report.sections.groups import known_and_new


@pytest.mark.parametrize(("hits", "count"), [(0, 5), (3, 10), (24, 24), (400, 4000)])
def test_wilson_interval_is_that_of_scipy(hits: int, count: int) -> None:
    exact = binomtest(hits, count).proportion_ci(0.95, method="wilson")
    assert wilson(hits / count, count) == pytest.approx((exact.low, exact.high), abs=1e-4)


def test_known_targets_are_all_groups_but_that_without_interactions() -> None:
    groups = {
        "0 to 0": GroupResult(users=10, recall=0.5),
        "1 to 4": GroupResult(users=30, recall=0.2),
        "over 4": GroupResult(users=60, recall=0.4),
    }
    result = MethodResult(
        metrics={}, ci95={}, exclude_seen={}, lists={}, by_history_length={}, by_target_popularity=groups
    )
    found = known_and_new(result)
    assert found["new"] == groups["0 to 0"]
    assert found["known"].users == 90
    assert found["known"].recall == pytest.approx((30 * 0.2 + 60 * 0.4) / 90)


def test_pictures_follow_the_colors_of_the_page() -> None:
    with picture('a & "b"', columns=2, height=2) as drawn:
        for axes in drawn.axes:
            axes.plot([0, 1], [1, 2], color=COLORS[0])
            axes.set(title="<title>")
    assert drawn.svg.startswith("<svg ")
    assert INK not in drawn.svg
    assert "var(--ink)" in drawn.svg
    assert COLORS[0] in drawn.svg
    for svg in (drawn.svg, standalone(drawn.svg)):
        root = xml.etree.ElementTree.fromstring(svg)
        assert root.get("aria-label") == 'a & "b"'
    with picture('a & "b"', columns=2, height=2) as again:
        for axes in again.axes:
            axes.plot([0, 1], [1, 2], color=COLORS[0])
            axes.set(title="<title>")
    assert again.svg == drawn.svg  # a function of what is drawn


def test_tables_escape_text_and_format_numbers() -> None:
    text = table(["name", "value"], [("<a>", 1234), ("b", 0.123456), (Html("<i>c</i>"), None)])
    assert "&lt;a&gt;" in text
    assert '<td class="number">1,234</td>' in text
    assert '<td class="number">0.1235</td>' in text
    assert '<th>name</th><th class="number">value</th>' in text  # a head is aligned as its numbers are
    assert '<td><i>c</i></td><td class="number">&ndash;</td>' in text
    assert '<th class="number">change' in table(["name", "change"], [("a", Number("+1 s"))])
    assert escaped(True) == "yes"
    assert escaped(float("nan")) == "&ndash;"
    assert paragraph("`a < b` & c") == "<p><code>a &lt; b</code> &amp; c</p>"


@pytest.mark.parametrize(
    ("value", "text"), [(2.34, "2.3 s"), (59.94, "59.9 s"), (187, "3 min 07 s"), (3600 * 5 + 61, "5 h 01 min")]
)
def test_durations_are_readable(value: float, text: str) -> None:
    assert seconds(value) == text


def test_titles_are_shortened_with_an_ellipsis() -> None:
    assert shortened("a" * 80) == "a" * 80
    assert shortened("word " * 20, 10) == "word word…"
    assert len(shortened("字" * 200)) == 80
