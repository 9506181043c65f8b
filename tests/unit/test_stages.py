"""The stages that tiger/pipeline declares, and what building one does."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import tiger.pipeline
from tests.identities import config_of, identities
from tiger.core import artifacts
from tiger.core.artifacts import Draft, Stage, open_artifact, stage
from tiger.core.config import Config
from tiger.core.errors import ArtifactError


def declared() -> Iterator[tuple[str, Stage[*tuple[Any, ...]]]]:
    """Yield every stage with the name of the module that declares it."""
    for info in pkgutil.iter_modules(tiger.pipeline.__path__):
        module = importlib.import_module(f"tiger.pipeline.{info.name}")
        for value in vars(module).values():
            if isinstance(value, Stage) and value.body.__module__ == module.__name__:
                yield info.name, value


def test_a_missing_artifact_names_the_verb_of_its_stage(tmp_path: Path) -> None:
    stages = list(declared())
    verbs: dict[str, list[str]] = {}
    for module, each in stages:
        assert each.verb == module
        verbs.setdefault(each.kind, []).append(module)
    assert verbs.keys() == artifacts._MADE_BY.keys()
    assert verbs["semantic_ids"] == ["append", "semantic_ids"]  # of a finished model, or from the beginning
    for kind, module in artifacts._MADE_BY.items():
        assert module in verbs[kind]
        with pytest.raises(ArtifactError, match=rf"create it with `python -m jobs\.{module}`$"):
            open_artifact(f"{tmp_path}/{kind}-00000000")


def test_every_stage_has_its_identity_tested() -> None:
    assert {each.kind for _, each in declared()} == identities(config_of()).keys()


class Options(Config):
    size: int = 1


@stage("catalog", verb="prepare")
def write_number(draft: Draft, number: int, made: list[int]) -> None:
    draft.folder.write_json("number.json", {"number": number})
    draft.metrics["number"] = number
    made.append(number)


def test_a_stage_does_its_work_once_for_its_configuration(tmp_path: Path) -> None:
    made: list[int] = []
    first = write_number.build(str(tmp_path), Options(), {}, 1, made, source={"x": "0"}, record={"note": "a"})
    assert (first.kind, first.metrics, first.manifest["note"]) == ("catalog", {"number": 1}, "a")
    assert first.folder.read_json("number.json") == {"number": 1}
    again = write_number.build(str(tmp_path), Options(), {}, 2, made, source={"x": "0"})  # arguments are not identity
    assert again.manifest == first.manifest
    assert write_number.build(str(tmp_path), Options(), {}, 3, made, source={"x": "1"}).fingerprint != first.fingerprint
    assert made == [1, 3]
