from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from tiger.config import build, describe, load
from tiger.errors import ConfigError
from tiger.run import RunConfig

CONFIGS = Path(__file__).parents[1] / "jobs/configs"
JOBS = sorted(path.stem for path in CONFIGS.parent.glob("*.py") if path.stem not in ("__init__", "command"))
SHIPPED = sorted(path.stem for path in CONFIGS.glob("*.toml") if "." not in path.stem)


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_file_loads(name: str) -> None:
    run = load(RunConfig, name, [], CONFIGS)
    again = build(RunConfig, json.loads(run.model_dump_json()))  # what a manifest records comes back as it was
    assert again == run


@pytest.mark.parametrize("name", SHIPPED)
def test_overrides_beat_the_file(name: str) -> None:
    run = load(RunConfig, name, ["tokenizer.levels=4", "model.training.learning_rate=3e-4", "root=/x/y"], CONFIGS)
    assert (run.tokenizer.levels, run.model.training.learning_rate, run.root) == (4, 3e-4, "/x/y")


def test_a_plugin_section_takes_the_keys_of_its_kind() -> None:
    overrides = ["data.kind=tables", 'data.items=["i.csv"]', 'data.interactions=["e.csv"]', "tokenizer.kind=rkmeans"]
    run = load(RunConfig, None, overrides, CONFIGS)
    assert (type(run.data).__module__, type(run.tokenizer).__module__) == (
        "tiger.datasets.tables",
        "tiger.tokenizers.rkmeans",
    )


REFUSED = {
    "tokenizer.levls=4": "unknown key tokenizer.levls; did you mean tokenizer.levels?",
    "modell.d_ff=4": "unknown key modell",
    "tokenizer.levels=0": "tokenizer.levels = 0: Input should be greater than or equal to 1",
    "tokenizer.levels=three": "tokenizer.levels = 'three': Input should be a valid integer",
    "model.preset=huge": "model.preset = 'huge': Input should be 'small', 'medium', 'tiger-paper' or 'tiger-tuned'",
    "data.kind=amzon": "there is no module tiger.datasets.amzon; shipped: amazon, synthetic, tables",
    "data.kind=amazon": "set path (a folder), category (to download), or both items and interactions",
    "levels": "an override is written dotted.key=value",
    "root.x=1": "root",
}


@pytest.mark.parametrize(("override", "message"), REFUSED.items(), ids=REFUSED)
def test_impossible_configurations_are_refused_with_a_sentence(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load(RunConfig, None, [override], CONFIGS)
    assert message in str(error.value)


def test_an_unknown_name_has_a_nearest_one() -> None:
    with pytest.raises(ConfigError, match=r"no configuration named 'beuty'; did you mean beauty\?; shipped: .*sample"):
        load(RunConfig, "beuty", [], CONFIGS)


def test_broken_toml_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.toml").write_text("[data\n")
    with pytest.raises(ConfigError, match=r"x.toml: not valid TOML"):
        load(RunConfig, str(tmp_path / "x.toml"), [], CONFIGS)
    with pytest.raises(ConfigError, match="does not exist"):
        load(RunConfig, str(tmp_path / "y.toml"), [], CONFIGS)


def test_every_key_has_a_meaning() -> None:
    keys = list(describe(RunConfig))
    assert len(keys) > 60
    assert [key for key, _, _, meaning in keys if not meaning] == []
    assert len({key for key, *_ in keys}) == len(keys)


def test_what_changes_no_result_changes_no_fingerprint() -> None:
    base = load(RunConfig, None, [], CONFIGS)
    other = load(RunConfig, None, ["embedding.max_actors=3", "evaluation.max_actors=1"], CONFIGS)
    assert base.embedding.identity() == other.embedding.identity()
    assert base.evaluation.identity() == other.evaluation.identity()
    changed = load(RunConfig, None, ["embedding.max_tokens=64"], CONFIGS)
    assert base.embedding.identity() != changed.embedding.identity()


@pytest.mark.parametrize("job", JOBS)
def test_help_prints_every_key(job: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", [job, "--help"])
    monkeypatch.delitem(sys.modules, f"jobs.{job}", raising=False)
    runpy.run_module(f"jobs.{job}", run_name="__main__")
    printed = capsys.readouterr().out
    for key, *_ in describe(RunConfig):
        assert f"  {key} = " in printed
    for kind in ("amazon", "tables", "rkmeans"):
        assert f'kind = "{kind}":' in printed


def test_an_error_is_one_line_and_an_exit_code() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "jobs.prepare", "tokenizer.levls=4"],
        capture_output=True,
        text=True,
        cwd=CONFIGS.parents[1],
        env=os.environ | {"PYTHONWARNINGS": "ignore"},
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.strip() == "error: unknown key tokenizer.levls; did you mean tokenizer.levels?"
