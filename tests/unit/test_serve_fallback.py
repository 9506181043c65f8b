"""Answers to histories without a known item, and the limits of bodies in Ray Serve's proxy."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch

from tests.factories import model_of_random_ids
from tests.paths import ROOT
from tiger.models.decoding import DecodingConfig
from tiger.models.tiger.recommender import TigerRecommender
from tiger.on_ray import serve as tiger_serve
from tiger.on_ray.body_limit import PROXY_CALLBACK, PROXY_MIDDLEWARES, proxy_middlewares

ITEMS = 24


class Replica:
    """The server's endpoint without Ray: its requests of one moment are one batch."""

    options, model = DecodingConfig(beam=10), "model-1"

    def __init__(self) -> None:
        model = model_of_random_ids(ITEMS)
        model.items.training_counts.copy_(torch.arange(ITEMS) % 7)
        self.recommender = TigerRecommender(model)
        self.names = self.titles = [f"i{n}" for n in range(ITEMS)]
        self.item_of = {name: item for item, name in enumerate(self.names)}

    def _excludes(self, request: Any) -> bool:
        excludes: bool = tiger_serve._deployment.func_or_class._excludes(self, request)
        return excludes

    def ask(self, *bodies: dict[str, Any]) -> list[dict[str, Any]]:
        server_class = tiger_serve._deployment.func_or_class
        decode = server_class._decode.__wrapped__  # without Ray Serve's batching
        requests = [tiger_serve.Request.model_validate(body) for body in bodies]
        histories = [[self.item_of[name] for name in one.history if name in self.item_of] for one in requests]
        found = asyncio.run(decode(self, list(zip(requests, histories, strict=True))))

        class One:
            """This replica, whose batch has been decoded."""

            def __init__(self, own: Replica, row: int) -> None:
                self.__dict__ |= vars(own) | {"row": row, "options": own.options, "model": own.model}

            async def _decode(self, asked: Any) -> Any:
                return found[self.row]

        return [
            asyncio.run(server_class.recommend(One(self, row), one)).model_dump() for row, one in enumerate(requests)
        ]


@pytest.mark.parametrize("exclude", [True, False])
def test_a_history_without_a_known_item_gets_the_most_popular_ones_and_says_so(exclude: bool) -> None:
    replica = Replica()
    empty, unknown, known, mixed = replica.ask(
        {"history": [], "k": 5, "exclude_seen": exclude},
        {"history": ["who?", "what?"], "k": 3, "exclude_seen": exclude},
        {"history": ["i3", "i4"], "k": 4, "exclude_seen": exclude},
        {"history": ["who?", "i3", "i4"], "k": 4, "exclude_seen": exclude},
    )
    popular = np.argsort(-(np.arange(ITEMS) % 7), kind="stable")[:5]
    assert [each["item"] for each in empty["items"]] == [f"i{item}" for item in popular]
    assert unknown["items"] == empty["items"][:3]
    assert [answer["by_popularity"] for answer in (empty, unknown, known, mixed)] == [True, True, False, False]
    assert [answer["ignored"] for answer in (empty, unknown, known, mixed)] == [[], ["who?", "what?"], [], ["who?"]]
    assert [each["item"] for each in mixed["items"]] == [each["item"] for each in known["items"]]
    scores = [each["score"] for each in empty["items"]]
    assert scores == sorted(scores, reverse=True)
    assert all(np.isfinite(scores))


def test_the_proxy_of_a_ray_that_is_started_here_limits_bodies() -> None:
    assert os.environ[PROXY_CALLBACK] == PROXY_MIDDLEWARES
    assert [each.cls.__name__ for each in proxy_middlewares()] == ["BodyLimit"]
    command = [sys.executable, "-X", "importtime", "-m", PROXY_MIDDLEWARES.partition(":")[0]]
    imported = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stderr.split()
    assert "tiger" in imported
    assert not {"ray", "torch"} & set(imported)  # it is imported where Ray starts its proxies
