"""The commands of docs/serving.md: requests that the service understands, keys and metrics that exist."""

from __future__ import annotations

import json
import re
import shlex
from urllib.parse import urlsplit

import pytest
from starlette.testclient import TestClient

from tests.paths import ROOT
from tests.serving import ToyService, documented_metrics, toy_model
from tiger.run import ServeConfig
from tiger.serving.app import build_app
from tiger.serving.schemas import Filters, Request

DOCUMENT = (ROOT / "docs/serving.md").read_text()
BLOCKS = [block for kind, block in re.findall(r"```(\w*)\n(.*?)```", DOCUMENT, re.DOTALL) if not kind]
COMMANDS = re.findall(r"^curl (?:'[^']*'|[^\n'])*", "".join(BLOCKS), re.MULTILINE)


def test_the_document_has_commands() -> None:
    assert len(COMMANDS) >= 6


@pytest.mark.parametrize("command", COMMANDS)
def test_a_documented_command_is_answered(command: str) -> None:
    """By a catalog that has its items and categories."""
    arguments = shlex.split(command)
    address = next(argument for argument in arguments if argument.startswith("$URL"))
    body = json.loads(arguments[arguments.index("-d") + 1]) if "-d" in arguments else None
    model = toy_model()
    parts = urlsplit(address.removeprefix("$URL"))
    known = re.findall(r"B0\w{8}", command)
    model.items.index |= {name: item for item, name in enumerate(known)}
    if body is not None and "filters" in body:
        Request.model_validate(body)
        del body["filters"]["category"]
    if parts.path == "/prefix":
        parts = parts._replace(query=re.sub(r"codes=\d+", "codes=1", parts.query))
    client = TestClient(build_app(ToyService(model)))
    answer = client.get(parts.geturl()) if body is None else client.post(parts.path, json=body)
    assert answer.status_code == 200, answer.text


def test_documented_keys_exist() -> None:
    keys = set(re.findall(r"serve\.(\w+)", DOCUMENT)) - {"yaml"}
    assert keys <= set(ServeConfig.model_fields), keys
    for model in (Request, Filters):
        assert set(model.model_fields) <= set(re.findall(r"`(\w+)`", DOCUMENT))


def test_documented_metrics_exist() -> None:
    source = (ROOT / "tiger/on_ray/replica.py").read_text()
    named = set(re.findall(r'"(tiger_serve_\w+)"', source))
    documented = {name.removeprefix("ray_").removesuffix("_total") for name in documented_metrics()}
    assert named == documented
