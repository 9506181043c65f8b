"""Resources of stages: one shape, in no fingerprint, and limits that agree."""

from __future__ import annotations

import pytest

from tests.paths import CONFIGS
from tiger.core.config import load
from tiger.core.errors import ConfigError
from tiger.core.resources import Resources
from tiger.run import RunConfig
from tiger.tuning import TuningConfig


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("embedding.resources.min_workers=0", "embedding.resources.min_workers = 0: .*greater than or equal to 1"),
        ("decoding.resources.cpus=0", "decoding.resources.cpus = 0: .*greater than 0"),
        ("serve.resources.gpus=2", "serve.resources.gpus = 2: .*less than or equal to 1"),
        ("scale.training.gpus=0.5", "scale.training: gpus = 0.5 cannot be set: a worker takes one whole GPU"),
        ("scale.training.gpus=1", r"scale.training: gpus = 1 cannot be set: .*\(scale.gpus\)"),
    ],
)
def test_an_impossible_value_is_refused_with_its_key(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(RunConfig, None, [override], CONFIGS)


def test_a_minimum_is_at_most_the_maximum() -> None:
    with pytest.raises(ConfigError, match="embedding.resources: min_workers = 3 is more than max_workers = 2"):
        load(RunConfig, None, ["embedding.resources.min_workers=3", "embedding.resources.max_workers=2"], CONFIGS)


@pytest.mark.parametrize("section", ["scale.training", "serve.resources"])
def test_a_number_of_workers_that_does_not_change_is_one_number(section: str) -> None:
    with pytest.raises(ConfigError, match=rf"{section}: min_workers = 1 differs from max_workers = 2"):
        load(RunConfig, None, [f"{section}.min_workers=1", f"{section}.max_workers=2"], CONFIGS)
    with pytest.raises(ConfigError, match="resources: min_workers = 1 differs from max_workers = 2"):
        load(TuningConfig, None, ["resources.min_workers=1", "resources.max_workers=2"], CONFIGS)
    run = load(RunConfig, None, ["embedding.resources.min_workers=1", "embedding.resources.max_workers=2"], CONFIGS)
    assert run.embedding.resources == Resources(min_workers=1, max_workers=2)


@pytest.mark.parametrize(("given", "expected"), [({}, None), ({"min_workers": 2}, 2), ({"max_workers": 3}, 3)])
def test_either_limit_gives_a_fixed_number(given: dict[str, int], expected: int | None) -> None:
    assert Resources(**given).num_workers == expected


def test_resources_are_in_no_identity() -> None:
    run = RunConfig()
    assert Resources(max_workers=2).identity() == {}
    for section in (run.embedding, run.decoding, TuningConfig()):
        assert "resources" not in section.identity()
