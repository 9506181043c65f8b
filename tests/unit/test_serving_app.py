"""The service's HTTP application without Ray, asked by a client: answers, filters, refusals."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from starlette.testclient import TestClient

from tests.serving import TOKEN, UNREADABLE, ToyService, ask, ids, toy_model
from tiger.models.tiger.beam_search import score_all_items
from tiger.serving.app import build_app
from tiger.serving.model import ServedModel
from tiger.serving.schemas import Request

ITEMS = 24


@pytest.fixture
def service() -> ToyService:
    return ToyService(toy_model(ITEMS))


@pytest.fixture
def client(service: ToyService) -> TestClient:
    return TestClient(build_app(service))


def best(service: ToyService, history: list[int], allowed: set[int]) -> list[str]:
    """Allowed items by their scores, without any search."""
    scores = score_all_items(service.model.recommender.model, torch.tensor([history]))[0].tolist()  # type: ignore[attr-defined]
    return [f"i{item}" for item in sorted(allowed, key=lambda item: -scores[item])]


# --- recommendations --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("exclude", [True, False])
def test_a_history_without_a_known_item_gets_the_most_popular_ones_and_says_so(
    client: TestClient, exclude: bool
) -> None:
    empty = ask(client, history=[], k=5, exclude_seen=exclude)
    unknown = ask(client, history=["who?", "what?"], k=3, exclude_seen=exclude)
    known = ask(client, history=["i3", "i4"], k=4, exclude_seen=exclude)
    mixed = ask(client, history=["who?", "i3", "i4"], k=4, exclude_seen=exclude)
    popular = np.argsort(-(np.arange(ITEMS) % 7), kind="stable")[:5]
    assert ids(empty) == [f"i{item}" for item in popular]
    assert unknown["items"] == empty["items"][:3]
    assert [answer["by_popularity"] for answer in (empty, unknown, known, mixed)] == [True, True, False, False]
    assert [answer["ignored"] for answer in (empty, unknown, known, mixed)] == [[], ["who?", "what?"], [], ["who?"]]
    assert ids(mixed) == ids(known)
    scores = [each["score"] for each in empty["items"]]
    assert scores == sorted(scores, reverse=True)
    assert all(np.isfinite(scores))


def test_filters_apply_to_the_search(service: ToyService) -> None:
    """With a beam as wide as the catalog, the list is that of all scores."""
    service.options = service.options.model_copy(update={"beam": ITEMS})
    client, items = TestClient(build_app(service)), range(ITEMS)
    prices = service.model.items.prices
    assert prices is not None
    cases: list[tuple[dict[str, Any], set[int]]] = [
        ({}, set(items)),
        ({"allow": ["i1", "i5", "who?"]}, {1, 5}),
        ({"deny": ["i1", "i5"]}, set(items) - {1, 5}),
        ({"category": "kind 1"}, {item for item in items if item % 3 == 1 and item % 7}),
        ({"min_price": 2, "max_price": 6.5}, {item for item in items if 2 <= prices[item] <= 6.5}),
        ({"only_new": True}, {item for item in items if item % 7 == 0}),
        ({"only_new": True, "deny": ["i7"]}, {item for item in items if item % 7 == 0 and item != 7}),
        ({"allow": []}, set()),
    ]
    for filters, allowed in cases:
        for exclude, seen in ((False, set()), (True, {3, 8})):
            answer = ask(client, history=["i3", "i8"], k=ITEMS, filters=filters, exclude_seen=exclude)
            assert ids(answer) == best(service, [3, 8], allowed - seen), filters
            assert answer["by_popularity"] is False
        popular = ask(client, history=[], k=ITEMS, filters=filters)
        assert {int(name[1:]) for name in ids(popular)} == allowed
        assert popular["by_popularity"] is True
    assert ask(client, history=[], filters={"allow": ["i1", "x"], "deny": ["y", "x"]})["unknown_in_filters"] == [
        "x",
        "y",
    ]


def test_several_users_in_one_request(service: ToyService, client: TestClient) -> None:
    histories = [["i3", "i4"], [], ["who?"], ["i9"], ["who?", "i2"]]
    many = ask(client, histories=histories, k=6)
    assert many.keys() == {"answers", "model", "unknown_in_filters"}
    for history, each in zip(histories, many["answers"], strict=True):
        alone = ask(client, history=history, k=6)
        assert ids(each) == ids(alone)
        assert (each["by_popularity"], each["ignored"]) == (alone["by_popularity"], alone["ignored"])
    assert service.counted[0] == ("model-0", {"unknown_items": 2, "empty": 0, "by_popularity": 2, "count": 5})


def test_queries_of_one_batch_keep_their_own_options() -> None:
    """Decoded together or alone, with other lengths, filters and samples around them."""
    model = toy_model(ITEMS)
    bodies: list[dict[str, Any]] = [
        {"history": [f"i{row % ITEMS}", f"i{row * 5 % ITEMS}"], "k": 1 + row % 7} for row in range(24)
    ]
    for row, body in enumerate(bodies):
        body["exclude_seen"] = row % 2 == 0
        body["filters"] = [{}, {"category": "kind 1"}, {"deny": ["i1", "i2"]}][row % 3]
        if row % 4 == 3:
            body |= {"temperature": 2.0, "seed": row % 2, "user": f"u{row}"}
        if row % 5 == 4:
            body["max_per_first_code"] = 1
    options = ToyService(model).options
    queries = [model.queries(Request.model_validate(body), options)[0][0] for body in bodies]
    for query, together in zip(queries, model.decode(queries), strict=True):
        (alone,) = model.decode([query])
        assert [item for item, _ in together.items] == [item for item, _ in alone.items]
        np.testing.assert_allclose([s for _, s in together.items], [s for _, s in alone.items], atol=1e-4)
        assert len(together.items) <= query.options.k


def test_samples_depend_on_the_seed_and_the_user(client: TestClient) -> None:
    def sample(**given: Any) -> list[str]:
        return ids(ask(client, history=["i3"], k=5, temperature=5.0, **given))

    assert sample() == sample()
    assert sample(seed=1) == sample(seed=1)
    assert len({tuple(sample(seed=seed)) for seed in range(8)}) > 4
    assert len({tuple(sample(user=f"u{user}")) for user in range(8)}) > 4


def test_lists_hold_few_items_per_first_code(service: ToyService, client: TestClient) -> None:
    answer = ask(client, history=["i3"], k=10, max_per_first_code=1)
    firsts = [each["semantic_id"][0] for each in answer["items"]]
    assert len(firsts) == len(set(firsts)) > 1


def test_the_beam_is_explained(service: ToyService, client: TestClient) -> None:
    answer = ask(client, history=["i3", "i4"], k=4, explain=True)
    tree = service.model.tree
    assert tree is not None
    assert [len(level) for level in answer["beam"]] == [4, 10, 10]  # of 4 first codes, and a beam of 10
    found = [tuple(each["semantic_id"]) for each in answer["items"]]
    for depth, level in enumerate(answer["beam"], 1):
        scores = [each["score"] for each in level]
        assert scores == sorted(scores, reverse=True)
        for each in level:
            prefix = tuple(each["prefix"])
            assert each["num_items"] == len(tree.items(prefix)) > 0
            assert each["recommended"] == sum(code[:depth] == prefix for code in found)
        assert sum(each["recommended"] for each in level) == 4
    leaves = {tuple(each["prefix"]): each["score"] for each in answer["beam"][-1]}
    for code, each in zip(found, answer["items"], strict=True):
        assert leaves[code] == pytest.approx(each["score"], abs=1e-4)
    first = {tuple(each["prefix"]): each["score"] for each in answer["beam"][0]}
    assert np.exp(list(first.values())).sum() == pytest.approx(1, abs=1e-3)  # all first codes are in the beam
    assert ask(client, history=[], explain=True)["beam"] == []


# --- refusals ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "where", "reason"),
    [
        ({}, "", "give either history, or histories"),
        ({"history": [], "histories": [[]]}, "", "give either history, or histories"),
        ({"histories": []}, "histories", "at least 1 item"),
        ({"histories": [[]] * 65}, "histories", "at most 64 items"),
        ({"histories": [["a"], ["a"] * 201]}, "histories.1", "at most 200 items"),
        ({"histories": [["a"]], "users": ["a", "b"]}, "", "2 users for 1 histories"),
        ({"histories": [["a"]], "user": "a"}, "", "with histories give users"),
        ({"histories": [["a"]], "explain": True}, "", "explain go with history"),
        ({"history": [], "users": ["a"]}, "", "with history give user"),
        ({"history": ["a"] * 201}, "history", "at most 200 items"),
        ({"history": "a"}, "history", "valid list"),
        ({"history": [1.5]}, "history.0", "valid string"),
        ({"history": ["a" * 257]}, "history.0", "at most 256 characters"),
        ({"history": ["a"], "k": 0}, "k", "greater than or equal to 1"),
        ({"history": ["a"], "k": "ten"}, "k", "valid integer"),
        ({"history": ["a"], "exclude_seen": "no"}, "exclude_seen", "valid boolean"),
        ({"history": ["a"], "kk": 3}, "kk", "not permitted"),
        ({"history": ["a"], "user": 7}, "user", "valid string"),
        ({"history": ["a"], "temperature": -1}, "temperature", "greater than or equal to 0"),
        ({"history": ["a"], "filters": {"prices": 1}}, "filters.prices", "not permitted"),
        ({"history": ["a"], "filters": {"category": 1}}, "filters.category", "valid string"),
        ({"history": ["a"], "filters": {"min_price": 2, "max_price": 1}}, "filters", "min_price = 2 is more"),
    ],
)
def test_a_request_that_cannot_be_answered_says_where_and_why(
    client: TestClient, body: dict[str, Any], where: str, reason: str
) -> None:
    found = ask(client, 422, **body)["detail"][0]
    location = ".".join(str(part) for part in found["loc"][1:])
    assert location == where or location.startswith(f"{where}.")
    assert reason in found["msg"]


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ({"history": ["a"], "k": 11}, "k: must be at most 10, the beam of this server"),
        ({"history": [], "filters": {"category": "Kind 4"}}, "filters.category: no item is in 'Kind 4'; similar: kind"),
    ],
)
def test_what_this_model_cannot_do_says_why(client: TestClient, body: dict[str, Any], reason: str) -> None:
    assert ask(client, 422, **body)["detail"].startswith(reason)


def test_a_model_without_semantic_ids_or_with_users_says_what_it_needs(service: ToyService) -> None:
    model = service.model
    service.model = ServedModel(model.recommender, model.items, name="plain")
    client = TestClient(build_app(service))
    assert (
        ask(client, 422, history=[], max_per_first_code=1)["detail"]
        == "max_per_first_code: this model has no semantic IDs"
    )
    assert client.get("/prefix").json() == {"detail": "plain has no semantic IDs"}
    assert ask(client, history=["i1"], explain=True)["beam"] == []
    assert ask(client, history=["i1"])["items"][0]["semantic_id"] is None
    assert client.get("/items/i1").json()["neighbors"] == []
    model.recommender.needs_users = True
    assert ask(client, 422, history=[])["detail"] == "user: required, because this model has user tokens"
    assert ask(client, 422, histories=[[]])["detail"].startswith("user: required")


@pytest.mark.parametrize("name", UNREADABLE)
def test_what_cannot_be_sent_back_is_refused_without_it(client: TestClient, name: str) -> None:
    answer = client.post("/recommend", content=UNREADABLE[name], headers={"Content-Type": "application/json"})
    assert answer.status_code == 422, answer.text
    assert len(answer.content) < 8000
    for found in json.loads(answer.content)["detail"] if b"loc" in answer.content else []:
        assert set(found) == {"type", "loc", "msg"}


def test_a_token_is_asked_for(service: ToyService) -> None:
    client = TestClient(build_app(service, token=TOKEN))
    for path in ("/status", "/search?q=a", "/items/i1", "/prefix", "/openapi.json"):
        assert client.get(path).status_code == 401
        assert client.get(path, headers={"Authorization": f"Bearer {TOKEN}"}).status_code == 200
    for path in ("/", "/page/app.js", "/page/style.css", "/healthz", "/readyz"):
        assert client.get(path).status_code == 200
    assert client.get("/docs").status_code == 401
    assert client.get("/nowhere", headers={"Authorization": f"Bearer {TOKEN}"}).status_code == 404


def test_other_origins_may_ask_only_if_they_are_named(service: ToyService) -> None:
    shop = {"Origin": "https://shop.example"}
    wants = shop | {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    closed = TestClient(build_app(service, token=TOKEN))
    assert closed.options("/recommend", headers=wants).status_code == 401
    assert "access-control-allow-origin" not in closed.get("/readyz", headers=shop).headers
    named = TestClient(build_app(service, token=TOKEN, allowed_origins=["https://shop.example"]))
    assert named.options("/recommend", headers=wants).headers["access-control-allow-origin"] == "https://shop.example"
    refused = named.post("/recommend", json={"history": []}, headers=shop)
    assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, "https://shop.example")
    other = named.options("/recommend", headers=wants | {"Origin": "https://other.example"})
    assert "access-control-allow-origin" not in other.headers
