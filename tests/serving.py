"""What tests of the server send it, and a service without Ray: tokens, bodies that cannot be answered, toy models."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from starlette.testclient import TestClient

from tests.factories import SIZES, model_of_random_ids, random_ids
from tests.paths import ROOT
from tiger.models.decoding import DecodingConfig
from tiger.models.tiger.recommender import TigerRecommender
from tiger.serving.items import ItemTable
from tiger.serving.model import ModelVersion, Query, Ranked, ServedModel

UNREADABLE = {
    "NaN": b'{"history": ["a"], "k": NaN}',
    "infinity": b'{"history": ["a"], "k": 1e400}',
    "minus infinity": b'{"history": [-Infinity]}',
    "a lone surrogate": b'{"history": ["\\ud800"]}',
    "a lone surrogate as a user": b'{"history": ["a"], "user": "\\udfff"}',
    "a lone surrogate as a key": b'{"history": ["a"], "\\ud800": 1}',
    "an unknown key with NaN": b'{"history": ["a"], "x": NaN}',
    "an integer of 400 digits": b'{"history": ["a"], "k": ' + b"9" * 400 + b"}",
    "an integer of 4,000 digits": b'{"history": ["a"], "k": ' + b"9" * 4000 + b"}",
    "an integer of 6,000 digits": b'{"history": ["a"], "k": ' + b"9" * 6000 + b"}",
    "integers as names": b'{"history": [' + b"9" * 6000 + b"]}",
    "nothing but NaN": b"NaN",
    "a surrogate alone": b'"\\ud800"',
    "deep nesting": b"[" * 30_000,
    "a deep value": b'{"history": ' + b"[" * 9000 + b"]" * 9000 + b"}",
    "bytes that are not UTF-8": b'{"history": ["\xff\xfe"]}',
    "NUL": b'{"history": [1, "\\u0000"]}',
    "a long key": b'{"history": ["a"], "' + b"k" * 60_000 + b'": 1}',
    "many keys": b'{"history": ["a"], ' + b", ".join(b'"k%d": 1' % n for n in range(3000)) + b"}",
}


TOKEN = "a-token-of-the-test"


def documented_metrics() -> set[str]:
    """Return the names of the metrics in docs/serving.md, as Prometheus has them."""
    document = (ROOT / "docs/serving.md").read_text()
    short = re.findall(r"`(_\w+_total)`", document)  # after a whole name, with the same beginning
    return set(re.findall(r"`(ray_tiger_serve_\w+)`", document)) | {f"ray_tiger_serve{name}" for name in short}


def token_file(folder: Path, content: str = TOKEN, mode: int = 0o600) -> str:
    path = folder / "token"
    path.write_text(content + "\n")
    path.chmod(mode)
    return str(path)


def toy_items(count: int) -> ItemTable:
    """Items with prices and categories; every fifth has no price, every seventh no category."""
    prices = [None if item % 5 == 0 else item / 2 for item in range(count)]
    categories = [
        None if item % 7 == 0 else [["Shop", f"Kind {item % 3}"], ["Shop", "Sale"][: item % 2 + 1]]
        for item in range(count)
    ]
    titles = [
        f"{('Red', 'blue', 'GREEN')[item % 3]} {('soap', 'shampoo')[item % 2]} No. {item}" for item in range(count)
    ]
    kind = pa.list_(pa.list_(pa.string()))
    return ItemTable(
        [f"i{item}" for item in range(count)],
        titles,
        np.array(prices, np.float64),
        [pa.chunked_array([categories], kind)],
    )


def toy_model(count: int = 24, seed: int = 0) -> ServedModel:
    """An untrained model of random IDs as the service has it; items whose index is a multiple of 7 are new."""
    model = model_of_random_ids(count, seed)
    model.items.training_counts.copy_(torch.arange(count) % 7)
    ids = random_ids(np.random.default_rng(seed), count, SIZES)
    return ServedModel(
        TigerRecommender(model),
        toy_items(count),
        ids,
        name=f"model-{seed}",
        version=ModelVersion(model=f"runs/model-{seed}"),
    )


class ToyService:
    """A service without Ray: each query is a batch of its own."""

    def __init__(self, model: ServedModel, **options: Any) -> None:
        self.model, self.options, self.swap = model, DecodingConfig(beam=10).model_copy(update=options), None
        self.metrics = self
        self.counted: list[tuple[Any, ...]] = []

    async def decode(self, query: Query) -> Ranked:
        return query.model.decode([query])[0]

    def request(self, path: str, status: int, seconds: float) -> None:
        self.counted.append((path, status))

    def lists(self, model: str, **numbers: int) -> None:
        self.counted.append((model, numbers))


def ask(client: TestClient, status: int = 200, **body: Any) -> Any:
    """The JSON that POST /recommend answers, with this status."""
    answer = client.post("/recommend", json=body)
    assert answer.status_code == status, answer.text
    return answer.json()


def ids(answer: Any) -> list[str]:
    return [each["item"] for each in answer["items"]]
