"""Further routes of the service without Ray: items, search, prefixes, health, the page; models that are refused."""

from __future__ import annotations

import asyncio
import re
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest
import torch
from starlette.testclient import TestClient

from tests.serving import ToyService, ask, ids, toy_model
from tiger.core.errors import HealthError
from tiger.serving import app as serving_app
from tiger.serving.app import build_app
from tiger.serving.model import ServedModel
from tiger.serving.schemas import Request, Swap

ITEMS = 24


@pytest.fixture
def service() -> ToyService:
    return ToyService(toy_model(ITEMS))


@pytest.fixture
def client(service: ToyService) -> TestClient:
    return TestClient(build_app(service))


def test_items_are_described(service: ToyService, client: TestClient) -> None:
    tree, prices = service.model.tree, service.model.items.prices
    assert tree is not None
    assert prices is not None
    for item in range(ITEMS):
        found = client.get(f"/items/i{item}?neighbors=3").json()
        assert (found["item"], found["title"]) == (f"i{item}", service.model.items.titles[item])
        assert (found["semantic_id"], found["seen_in_training"]) == (tree.codes(item), item % 7)
        assert found["price"] == (None if item % 5 == 0 else prices[item])
        assert found["categories"] == service.model.items.categories_of(item)
        assert [each["item"] for each in found["neighbors"]] == [each.item for each in tree.neighbors(item, 3)]
    missing = client.get("/items/%F0%9F%90%AF")
    assert (missing.status_code, missing.json()["detail"]) == (404, "'🐯' is not an item id of the catalog")


def test_ids_with_any_characters_are_found() -> None:
    model = toy_model(ITEMS)
    names = ["a/b", "../x", "q?x=1", "50%", "<b>", " ", "é"] + [f"i{n}" for n in range(7, ITEMS)]
    model.items.source_ids = names
    model.items.index = {name: item for item, name in enumerate(names)}
    client = TestClient(build_app(ToyService(model)))
    for name in names[:7]:
        assert client.get(f"/items/{quote(name, safe='')}").json()["item"] == name
        assert client.get("/search", params={"q": name}).json()["items"][0]["item"] == name


def test_search_finds_titles_and_ids(client: TestClient) -> None:
    found = client.get("/search", params={"q": "red soap", "limit": 2}).json()["items"]
    assert [each["item"] for each in found] == ["i6", "i12"]
    assert found[0].keys() == {"item", "title", "semantic_id"}
    assert client.get("/search", params={"q": "i7"}).json()["items"][0]["item"] == "i7"
    assert client.get("/search", params={"q": "zebra"}).json() == {"items": []}
    for wrong in ({}, {"q": "a" * 257}, {"q": "a", "limit": "0"}):
        assert client.get("/search", params=wrong).status_code == 422


def test_prefixes_lead_to_all_items(client: TestClient) -> None:
    root = client.get("/prefix").json()
    assert (root["num_items"], root["depth"], root["prefix"], root["items"]) == (ITEMS, 3, [], [])
    reached = []
    for first in root["children"]:
        middle = client.get("/prefix", params={"codes": str(first["code"])}).json()
        assert middle["num_items"] == first["num_items"]
        for second in middle["children"]:
            last = client.get("/prefix", params={"codes": f"{first['code']},{second['code']}"}).json()
            assert last["num_items"] == second["num_items"] == len(last["items"])
            reached += [each["item"] for each in last["items"]]
            assert all(each["semantic_id"][:2] == last["prefix"] for each in last["items"])
    assert sorted(reached) == sorted(f"i{item}" for item in range(ITEMS))
    for codes, status in (("9", 404), ("0,0,0,0", 404), ("99999", 404), ("a", 422), ("1,", 422), ("-1", 422)):
        assert client.get("/prefix", params={"codes": codes}).status_code == status, codes


def test_health_is_a_decoded_list(service: ToyService, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving_app, "_PROBE_SECONDS", 0.0)
    client = TestClient(build_app(service))
    assert client.get("/healthz").json() == {"status": "ok", "model": "model-0"}
    assert client.get("/readyz").json() == {"status": "ready", "model": "model-0", "semantic_ids": None}
    service.swap = Swap(model="runs/model-2", state="refused", reason="altered")
    status = client.get("/status").json()
    assert status["swap"] == {"model": "runs/model-2", "semantic_ids": None, "state": "refused", "reason": "altered"}
    assert (status["num_items"], status["has_prices"], status["has_categories"], status["beam"]) == (
        ITEMS,
        True,
        True,
        10,
    )
    with torch.no_grad():
        for parameter in service.model.recommender.model.parameters():  # type: ignore[attr-defined]
            parameter.fill_(float("nan"))
    answer = client.get("/healthz")
    assert (answer.status_code, answer.json()["status"]) == (503, "failed")


def test_degenerate_models_are_found() -> None:
    toy_model(ITEMS).probe()
    constant, empty, broken = toy_model(ITEMS), toy_model(ITEMS), toy_model(ITEMS)
    found = constant.recommender.recommend([[1]], k=10)
    cases: list[tuple[ServedModel, str, Any, Any]] = [
        (constant, "recommends the same items after 16 different histories", found.items, found.scores),
        (empty, "recommends nothing after i6, ", np.full((1, 10), -1), np.full((1, 10), -np.inf)),
        (broken, "its scores are not finite", found.items, np.full((1, 10), np.nan)),
    ]
    for model, reason, items, scores in cases:

        def recommend(histories: Any, *_: Any, items: Any = items, scores: Any = scores, **__: Any) -> Any:
            rows = len(histories)
            return type(found)(np.repeat(items, rows, 0), np.repeat(scores, rows, 0), np.zeros(rows, bool))

        model.recommender.recommend = recommend  # type: ignore[method-assign]
        with pytest.raises(HealthError, match=f"model-0 is degenerate: .*{reason}"):
            model.probe()
    constant.is_personalized = False
    constant.probe()  # such as popularity


def test_the_page_allows_no_foreign_code(client: TestClient) -> None:
    for path in ("/", "/page/app.js", "/page/style.css"):
        answer = client.get(path)
        assert answer.headers["x-content-type-options"] == "nosniff"
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert "*" not in policy
    page, script = client.get("/").text, client.get("/page/app.js").text
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|https?://(?!www\.w3\.org/2000/svg)", script
    )
    assert not re.search(r"<script(?! src=\"page/app.js\" defer>)|\son\w+=|\sstyle=", page)
    assert not re.search(r"(src|href)=\"(https?:)?//", page)


def test_responses_are_counted_by_route(service: ToyService, client: TestClient) -> None:
    for path in ("/readyz", "/items/i1", "/items/a%20b", "/nowhere", "/search?q=x", "/"):
        client.get(path)
    assert service.counted == [
        ("/readyz", 200), ("/items", 200), ("/items", 404), ("other", 404), ("/search", 200), ("/", 200)
    ]  # fmt: skip


def test_a_request_keeps_its_model_while_another_takes_over(service: ToyService) -> None:
    """Items of the answer are those of the model that decoded it."""
    old, new = service.model, toy_model(12, seed=1)

    async def swapped(query: Any) -> Any:
        service.model = new
        return query.model.decode([query])[0]

    service.decode = swapped  # type: ignore[method-assign]
    client = TestClient(build_app(service))
    answer = ask(client, history=["i20"], k=10)
    assert answer["model"] == old.name
    assert ids(answer) == [
        f"i{item}"
        for item, _ in asyncio.run(
            ToyService(old).decode(old.queries(Request(history=["i20"], k=10), service.options)[0][0])
        ).items
    ]
    assert ask(client, history=["i20"])["ignored"] == ["i20"]
