"""The recipes of docs/recipes on excerpts made by hand: real formats, invented values, counts by plain Python."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.paths import ROOT
from tiger.core.config import build, load, load_plugin
from tiger.core.errors import ConfigError
from tiger.core.storage import Folder
from tiger.data.catalog import make
from tiger.data.histories import read_histories
from tiger.data.sources import tables
from tiger.data.sources.base import RowCounts
from tiger.run import RunConfig

RECIPES = ROOT / "docs/recipes"
USERS, ITEMS, LENGTH = 7, 9, 5
NAMES = ["Amber Kettle", "Brisk Lantern", "Calm Mortar", "Dusty Needle", "Early Oar", "Faint Pillow", "Gilded Quilt",
         "Hollow Ribbon", "Ivory Saddle"]  # fmt: skip


@dataclass(frozen=True)
class Counts:
    """What a plain reading of the excerpt finds."""

    items: int
    users: int
    events: int
    text: str


def pairs() -> list[tuple[int, int, int]]:
    """(user, item, step) of events in which no user has an item twice."""
    return [(user, (2 * user + step) % ITEMS, step) for user in range(USERS) for step in range(LENGTH)]


def write(path: str, text: str, encoding: str = "utf-8", zipped: bool = False) -> None:
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    data = text.encode(encoding)
    target.write_bytes(gzip.compress(data) if zipped else data)


def movielens() -> Counts:
    movies = "".join(f"{n + 1}::{name} café ({1990 + n})::Action|Comedy\n" for n, name in enumerate(NAMES))
    ratings = "".join(f"{u + 1}::{i + 1}::{1 + s}::{978_300_000 + 60 * s}\n" for u, i, s in pairs())
    write("ml-1m/movies.dat", movies, "latin-1")
    write("ml-1m/ratings.dat", ratings)
    rows = [line.split("::") for line in ratings.splitlines()]
    return Counts(len(movies.splitlines()), len({row[0] for row in rows}), len(rows),
                  "Amber Kettle café (1990). Action|Comedy")  # fmt: skip


def recbole() -> Counts:
    item = "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n" + "".join(
        f"{n + 1}\t{'' if n else chr(34)}{name}\t{1990 + n}\tAction Comedy\n" for n, name in enumerate(NAMES)
    )
    inter = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n" + "".join(
        f"{u + 1}\t{i + 1}\t{1 + s}\t{881_250_949 + s}\n" for u, i, s in pairs()
    )
    write("ml-100k/ml-100k.item", item)
    write("ml-100k/ml-100k.inter", inter)
    rows = list(csv.DictReader(io.StringIO(inter), delimiter="\t"))
    users = {row["user_id:token"] for row in rows}
    return Counts(len(item.splitlines()) - 1, len(users), len(rows), '"Amber Kettle. 1990. Action Comedy')


def steam() -> Counts:
    games = [
        {"app_name": name, "developer": f"Studio {n}", "genres": ["Indie", "Puzzle"], "id": str(100 + n),
         "tags": ["Co-op", "It's"], "price": n + 0.99}
        for n, name in enumerate(NAMES)
    ]  # fmt: skip
    games.append({"app_name": "no id", "developer": "Nobody"})
    reviews = [
        {"username": f"player {u}", "product_id": str(100 + i), "date": f"2017-0{1 + s}-11", "text": "fun\u00e9"}
        for u, i, s in pairs()
    ]  # fmt: skip
    literal = lambda rows: "".join(f"{row!r}\n".replace("'", "u'", 1) for row in rows)  # noqa: E731
    write("steam/steam_games.json.gz", literal(games), zipped=True)
    write("steam/steam_reviews.json.gz", literal(reviews), zipped=True)
    ids = {game["id"] for game in games if "id" in game}
    users = {review["username"] for review in reviews}
    return Counts(len(ids), len(users), len(reviews), "Amber Kettle. Studio 0. Indie > Puzzle. Co-op > It's")


def goodreads() -> Counts:
    books = [{"book_id": str(n), "title": name, "description": f"On {n}.", "authors": [{"author_id": "1", "role": ""}]}
             for n, name in enumerate(NAMES)]  # fmt: skip
    shelves = [
        {"user_id": f"{u:032x}", "book_id": str(i), "rating": 1 + (u + s) % 5, "is_read": True,
         "date_added": f"Fri Aug 25 13:55:{s:02d} -0700 2017"}
        for u, i, s in pairs()
    ]  # fmt: skip
    write("goodreads/goodreads_books.json.gz", "".join(json.dumps(b) + "\n" for b in books), zipped=True)
    write("goodreads/goodreads_interactions_dedup.json.gz", "".join(json.dumps(s) + "\n" for s in shelves), zipped=True)
    liked = [row for row in shelves if int(row["rating"]) >= 4]
    return Counts(len(books), len({row["user_id"] for row in liked}), len(liked), "Dusty Needle. On 3.")


def retailrocket() -> Counts:
    header = "timestamp,itemid,property,value\n"
    parts = ["", ""]
    for n, name in enumerate(NAMES):
        parts[n % 2] += f"1435460400000,{n},categoryid,{n % 3}\n1435460400000,{n},888,{name}\n"
        parts[n % 2] += f"1433041200000,{n},790,n{n}00.000\n1435460400000,{n},17,ignored\n"
    parts[1] += "1442113200000,0,categoryid,9\n1431226800000,0,888,too old\n"
    for n, part in enumerate(parts):
        write(f"retailrocket/item_properties_part{n + 1}.csv", header + part)
    kinds = ["view", "addtocart", "transaction"]
    events = "timestamp,visitorid,event,itemid,transactionid\n" + "".join(
        f"{1_433_221_332_117 + s},{u},{kinds[(u + s) % 3]},{i},{7 if (u + s) % 3 == 2 else ''}\n" for u, i, s in pairs()
    )
    write("retailrocket/events.csv", events)
    rows = [row for row in csv.DictReader(io.StringIO(events)) if row["event"] != "view"]
    return Counts(ITEMS, len({row["visitorid"] for row in rows}), len(rows), "9. n000.000. Amber Kettle")


def hm() -> Counts:
    articles = "article_id,product_code,prod_name,product_type_name,colour_group_name,detail_desc\n" + "".join(
        f'01087750{n:02d},0108775,{name},Vest top,Black,"Jersey top, with straps ""{n}"""\n'
        for n, name in enumerate(NAMES)
    )
    sales = "t_dat,customer_id,article_id,price,sales_channel_id\n" + "".join(
        f"2018-09-{20 + s},{u:064x},01087750{i:02d},0.0508474576271186,2\n" for u, i, s in pairs()
    )
    write("h-and-m/articles.csv", articles)
    write("h-and-m/transactions_train.csv", sales)
    rows = list(csv.DictReader(io.StringIO(sales)))
    count = len(list(csv.DictReader(io.StringIO(articles))))
    return Counts(count, len({row["customer_id"] for row in rows}), len(rows),
                  'Amber Kettle. Vest top. Black. Jersey top, with straps "0"')  # fmt: skip


def mind() -> Counts:
    news = "".join(
        f'N{n}\tnews\tworld\t{name} "says\t{"A summary." if n else ""}\thttps://x/{n}\t[{{"Label": "{name}"}}]\t[]\n'
        for n, name in enumerate(NAMES)
    )
    behaviors, events, last = "", set(), len(NAMES) - 1
    for u in range(USERS):
        clicked = [i for user, i, _ in pairs() if user == u]
        for n, seen in enumerate((clicked[:3], clicked)):  # a user's history grows from impression to impression
            shown = " ".join(f"N{i}" for i in seen) if u else ""
            click = {0: f"N{last - u}-1 N1-0", 1: "N3-0 N1-1 N6-0"}[n] if u != 2 else "N0-0 N5-0"
            behaviors += f"{2 * u + n}\tU{u}\t11/1{n}/2019 9:05:58 AM\t{shown}\t{click}\n"
            events |= {(u, i) for i in seen if u} | {(u, int(c[1])) for c in click.split() if c.endswith("-1")}
    write("mind/news.tsv", news)
    write("mind/behaviors.tsv", behaviors)
    return Counts(len(news.splitlines()), len({u for u, _ in events}), len(events), 'Amber Kettle "says. news. world')


def amazon(year: str) -> Counts:
    new = year == "2023"
    metas: list[dict[str, Any]] = []
    for n, name in enumerate(NAMES):
        meta: dict[str, Any] = {"parent_asin" if new else "asin": f"B00{n}", "title": name}
        meta |= {"categories": [["Beauty", "Hair"]]} if year == "2014" else {}
        meta |= {"category": ["Beauty", "Hair"], "description": ["soft"]} if year == "2018" else {}
        meta |= {"categories": ["Beauty", "Hair"], "store": "Fern", "description": []} if new else {}
        metas.append(meta)
    reviews: list[dict[str, Any]] = [
        {"user_id": f"A{u}", "parent_asin": f"B00{i}", "asin": "V", "timestamp": 1_588_687_728_923 + s}
        if new
        else {"reviewerID": f"A{u}", "asin": f"B00{i}", "unixReviewTime": 1_355_616_000 + s}
        for u, i, s in pairs()
    ]
    meta_name, review_name = {
        "2014": ("meta_Beauty.json.gz", "reviews_Beauty_5.json.gz"),
        "2018": ("meta_Beauty.json.gz", "Beauty_5.json.gz"),
        "2023": ("meta_Beauty.jsonl.gz", "Beauty.jsonl.gz"),
    }[year]
    form = repr if year == "2014" else json.dumps
    write(f"amazon-{year}/{meta_name}", "".join(form(meta) + "\n" for meta in metas), zipped=True)
    write(f"amazon-{year}/{review_name}", "".join(json.dumps(r) + "\n" for r in reviews), zipped=True)
    text = {"2014": "Amber Kettle. Beauty > Hair", "2018": "Amber Kettle. Beauty > Hair. soft",
            "2023": "Amber Kettle. Fern. Beauty > Hair"}[year]  # fmt: skip
    users = {review["user_id" if new else "reviewerID"] for review in reviews}
    return Counts(len(metas), len(users), len(reviews), text)


EXCERPTS: dict[str, Callable[[], Counts]] = {
    "movielens-1m": movielens,
    "recbole": recbole,
    "steam": steam,
    "goodreads": goodreads,
    "retailrocket": retailrocket,
    "hm": hm,
    "mind": mind,
    "amazon-2014": lambda: amazon("2014"),
    "amazon-2018": lambda: amazon("2018"),
    "amazon-2023": lambda: amazon("2023"),
}


def test_every_recipe_has_an_excerpt() -> None:
    assert {path.stem for path in RECIPES.glob("*.toml")} == set(EXCERPTS)


@pytest.mark.parametrize("name", EXCERPTS)
def test_a_recipe_reads_what_plain_python_counts(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    counts = EXCERPTS[name]()
    run = load(RunConfig, str(RECIPES / f"{name}.toml"), ["catalog.k_core=0"], RECIPES)
    source = load_plugin("tiger.data.sources", run.data.kind)
    files = source.locate(run.data, tmp_path / "cache")
    item_ledger, event_ledger = RowCounts("items"), RowCounts("interactions")
    items = list(source.read_items(run.data, files, item_ledger))
    events = list(source.read_interactions(run.data, files, event_ledger))
    assert event_ledger.skipped.total() == 0
    assert len(set(pa.Table.from_batches(items)["source_id"].to_pylist())) == counts.items
    rows = pa.Table.from_batches(events).to_pylist()
    assert len({row["user"] for row in rows}) == counts.users
    assert len({(row["user"], row["item"]) for row in rows}) == counts.events

    profile = make(run.catalog, items, events, Folder(str(tmp_path / "catalog")))
    assert (profile["users"], profile["interactions"]) == (counts.users, counts.events)
    assert profile["dropped"]["interactions with unknown items"] == 0
    assert Folder(str(tmp_path / "catalog")).read_table("items.parquet")["text"].to_pylist().count(counts.text) == 1
    histories = read_histories(Folder(str(tmp_path / "catalog")))
    assert histories.offsets[-1] == counts.events


def test_a_mind_history_is_what_was_clicked_before_and_then_in_the_impressions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    mind()
    run = load(RunConfig, str(RECIPES / "mind.toml"), ["catalog.k_core=0"], RECIPES)
    source = load_plugin("tiger.data.sources", run.data.kind)
    files = source.locate(run.data, tmp_path)
    ledger = RowCounts("interactions")
    items = list(source.read_items(run.data, files, RowCounts("items")))
    make(run.catalog, items, source.read_interactions(run.data, files, ledger), Folder("catalog"))
    histories = read_histories(Folder("catalog"))
    names = Folder("catalog").read_table("items.parquet")["source_id"].to_pylist()
    expected: dict[str, list[str]] = {}
    not_clicked = 0
    for row in Path("mind/behaviors.tsv").read_text().splitlines():  # in the order of the impressions' times
        _, user, _, history, impressions = row.split("\t")
        shown = impressions.split()
        not_clicked += sum(entry.endswith("-0") for entry in shown)
        for item in [*history.split(), *(entry[:-2] for entry in shown if entry.endswith("-1"))]:
            if item not in expected.setdefault(user, []):
                expected[user].append(item)
    found = {user: [names[item] for item in histories.of(row)] for row, user in enumerate(histories.source_ids)}
    assert found == expected
    assert found["U0"] == ["N8", "N1"]  # no history, two clicks
    reason = r"entries of impressions that are not (N\d+)(?:-1)?"
    assert ledger.record()["entries_left_out"] == {reason: not_clicked}
    assert "left_out" not in ledger.record()


@pytest.mark.parametrize(("more", "message"), [
    (["data.history_pattern=N[0-9]+"], "has no group in parentheses"),
    (["data.history_pattern=("], "is not a regular expression"),
    (["data.history_pattern=(.+)-1", 'data.history=""'], "history_pattern requires history"),
])  # fmt: skip
def test_a_pattern_that_cannot_be_is_refused(more: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(RunConfig, str(RECIPES / "mind.toml"), more, RECIPES)


def test_entries_of_a_history_without_an_id_are_counted(tmp_path: Path) -> None:
    rows = {"user_id": ["u", "v", "w"], "history": [["a", None, "b"], [None], ["c"]], "also": [["d"], ["e"], None]}
    pq.write_table(pa.table(rows), tmp_path / "events.parquet")
    pq.write_table(pa.table({"item_id": list("abcde"), "title": list("abcde")}), tmp_path / "items.parquet")
    paths = {role: str(tmp_path / f"{name}.parquet") for role, name in (("items", "items"), ("interactions", "events"))}
    config = build(tables.Config, paths | {"history": ["history", "also"]})
    ledger = RowCounts("interactions")
    files = tables.locate(config, tmp_path)
    events = pa.Table.from_batches(tables.read_interactions(config, files, ledger)).to_pylist()
    assert [(e["user"], e["item"]) for e in events] == [("u", "a"), ("u", "b"), ("u", "d"), ("v", "e"), ("w", "c")]
    assert ledger.record()["entries_left_out"] == {"entries of history without an id": 2}
