from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from tests.paths import CONFIGS, ROOT
from tiger.cli import TOOLS
from tiger.core.config import RENAMED, Config, build, describe, dump_toml, load
from tiger.core.errors import ConfigError
from tiger.run import RunConfig
from tiger.tuning import TuningConfig

JOBS = sorted(path.stem for path in ROOT.glob("jobs/*.py") if path.stem != "__init__")
SHIPPED = sorted(path.stem for path in CONFIGS.glob("*.toml") if "." not in path.stem)


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_file_loads(name: str) -> None:
    run = load(RunConfig, name, [], CONFIGS)
    again = build(RunConfig, json.loads(run.model_dump_json()))  # what a manifest records comes back as it was
    assert again == run


@pytest.mark.parametrize("name", SHIPPED)
def test_overrides_beat_the_file(name: str) -> None:
    run = load(RunConfig, name, ["tokenizer.num_levels=4", "model.training.learning_rate=3e-4", "root=/x/y"], CONFIGS)
    assert (run.tokenizer.num_levels, run.model.training.learning_rate, run.root) == (4, 3e-4, "/x/y")


def test_a_plugin_section_takes_the_keys_of_its_kind() -> None:
    overrides = ["data.kind=tables", 'data.items=["i.csv"]', 'data.interactions=["e.csv"]', "tokenizer.kind=rkmeans"]
    run = load(RunConfig, None, overrides, CONFIGS)
    assert (type(run.data).__module__, type(run.tokenizer).__module__) == (
        "tiger.data.sources.tables",
        "tiger.tokenizers.rkmeans",
    )


AMAZON = ["data.kind=amazon", "data.category=Toys_and_Games", "data.version=2014"]
TABLES = ["data.kind=tables", 'data.items=["i.csv"]', 'data.interactions=["e.csv"]']


@pytest.mark.parametrize("name", [*SHIPPED, None])
@pytest.mark.parametrize("overrides", [AMAZON, AMAZON[::-1], TABLES, TABLES[::-1]], ids=repr)
def test_another_kind_drops_the_keys_of_the_former(name: str | None, overrides: list[str]) -> None:
    run = load(RunConfig, name, overrides, CONFIGS)
    given = {"kind": run.data.kind, "category": "Toys_and_Games", "version": "2014"}
    if run.data.kind == "tables":
        given = {"kind": "tables", "items": ["i.csv"], "interactions": ["e.csv"]}
    assert run.data.model_dump(exclude_unset=True) == given


def test_another_kind_keeps_the_keys_that_all_kinds_share(tmp_path: Path) -> None:
    (tmp_path / "x.toml").write_text(
        "[tokenizer]\nnum_levels = 4\ncodebook_size = 64\nlatent_dim = 32\nseed = 7\n[tokenizer.training]\nepochs = 3\n"
    )
    for kind in ("rkmeans", "opq"):
        tokenizer = load(RunConfig, str(tmp_path / "x.toml"), [f"tokenizer.kind={kind}"], CONFIGS).tokenizer
        assert (tokenizer.kind, tokenizer.num_levels, tokenizer.codebook_size, tokenizer.seed) == (kind, 4, 64, 7)
        assert tokenizer.training.epochs == 0
    same = load(RunConfig, str(tmp_path / "x.toml"), ["tokenizer.kind=rqvae"], CONFIGS).tokenizer
    assert (same.model_dump()["latent_dim"], same.training.epochs) == (32, 3)


def test_another_kind_hides_no_mistyped_key(tmp_path: Path) -> None:
    (tmp_path / "x.toml").write_text("[tokenizer]\nnum_levls = 4\n")
    with pytest.raises(ConfigError, match="unknown key tokenizer.num_levls; did you mean tokenizer.num_levels"):
        load(RunConfig, str(tmp_path / "x.toml"), ["tokenizer.kind=rkmeans"], CONFIGS)


def test_a_renamed_key_is_told_its_new_name() -> None:
    """Also in the section of a plug-in, and of each key that the table has; the new names exist."""
    for old, new in RENAMED.items():
        section = "tuning" if old.startswith("tuning.") else ""
        model: type[Config] = TuningConfig if section else RunConfig
        key = old.removeprefix("tuning.")
        given = ["tokenizer.kind=rkmeans"] if old in ("tokenizer.streamed", "tokenizer.passes") else []
        given += ["tokenizer.kind=opq"] if old == "tokenizer.rotations" else []
        with pytest.raises(ConfigError, match=rf"unknown key {re.escape(old)}; it was renamed to {re.escape(new)}$"):
            load(model, None, [*given, f"{key}=1"], CONFIGS, prefix=f"{section}." if section else "")
        values: dict[str, Any] = {"tokenizer": {"kind": given[0].partition("=")[2]}} if given else {}
        known = {f"{section}.{key}".strip(".") for key, *_ in describe(model, values)}
        assert new in known | {"tuning", "model"}


def test_text_may_look_like_a_number(tmp_path: Path) -> None:
    typed = ["data.item_id=7", "data.user_id=1e5", "data.time=2020-01-01", "root=0017", "catalog.text_fields=[1, 2]"]
    run = load(RunConfig, None, [*TABLES, *typed], CONFIGS)
    data = run.data.model_dump()
    assert [data[name] for name in ("item_id", "user_id", "time")] == ["7", "1e5", "2020-01-01"]
    assert (run.root, run.catalog.text_fields) == ("0017", ["1", "2"])
    (tmp_path / "x.toml").write_text('root = 2026\n[data]\nkind = "amazon"\ncategory = "Beauty"\nversion = 2018\n')
    run = load(RunConfig, str(tmp_path / "x.toml"), [], CONFIGS)
    assert (run.root, run.data.model_dump()["version"]) == ("2026", "2018")
    with pytest.raises(ConfigError, match="root = 1.5: .*; write it in quotes"):  # 1.50 would come out as 1.5
        build(RunConfig, {"root": 1.5})


NO_KINDS = ("5", "true", "..x", ".", "", "[1]", "2020-01-01", "a b", "_residual", "os.path", "\ud800")


@pytest.mark.parametrize("section", ["data", "tokenizer"])
@pytest.mark.parametrize("kind", NO_KINDS, ids=ascii)
def test_what_is_no_kind_is_one_line(section: str, kind: str) -> None:
    for name in (None, "beauty"):
        with pytest.raises(ConfigError, match=rf"^{section}\.kind = [^\n]+$"):
            load(RunConfig, name, [f"{section}.kind={kind}"], CONFIGS)
    for value in (5, True, None, 1.5, [], {}):
        with pytest.raises(ConfigError, match=rf"^{section}\.kind = .* is not the name of a module; shipped: "):
            build(RunConfig, {section: {"kind": value}})


def test_byte_order_marks_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "x.toml").write_bytes(b'\xef\xbb\xbfroot = "here"\n')
    assert load(RunConfig, str(tmp_path / "x.toml"), [], CONFIGS).root == "here"


@pytest.mark.parametrize("prompt", ["find \U0001f525: ", "a\x7f\x00\t", 'quo"te\\', "\ufeff", "line\nbreak"], ids=ascii)
def test_written_toml_holds_any_text(prompt: str, tmp_path: Path) -> None:
    run = build(RunConfig, {"embedding": {"prefix": prompt}})
    (tmp_path / "x.toml").write_bytes(dump_toml(run.model_dump(mode="json", serialize_as_any=True)).encode())
    assert load(RunConfig, str(tmp_path / "x.toml"), [], CONFIGS) == run
    assert tomllib.loads(dump_toml({"a": {"b": None, "c": [1, 2]}})) == {"a": {"c": [1, 2]}}


IMPOSSIBLE = {
    (
        "tokenizer.num_levels=8",
    ): "tokenizer.num_levels = 8 of tokenizer.codebook_size = 256 codes give 2^63 tuples or more",
    ("tokenizer.num_levels=7",): "a collision level of semantic_ids.collision_codes = 256 give 2^63 tuples or more",
    ("tokenizer.kmeans_sample=256", "tokenizer.codebook_size=2048"): "kmeans_sample = 256 is less than codebook_size",
    tuple(f"x{number}=1" for number in range(30)): "unknown key x9; and 20 more",
    ("a=1\nroot=2",): "unknown key a",
    ("tokenizer.num_levels=" + "9" * 5000,): "tokenizer.num_levels = '999",
    ("tokenizer.num_levels=" + "[" * 5000,): "tokenizer.num_levels = '[[[",
    ("root.x=1", "root.y=2"): "root",
}


@pytest.mark.parametrize("overrides", IMPOSSIBLE, ids=lambda overrides: overrides[0][:40])
def test_what_cannot_be_used_together_is_refused_before_the_first_stage(overrides: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as error:
        load(RunConfig, None, list(overrides), CONFIGS)
    assert IMPOSSIBLE[overrides] in str(error.value)
    assert "\n" not in str(error.value)


def test_what_can_be_used_together_is_not_refused() -> None:
    for overrides in (
        ["tokenizer.num_levels=7", "semantic_ids.collision_policy=error"],
        ["tokenizer.num_levels=7", "semantic_ids.collision_codes=127"],
        ["tokenizer.kind=rkmeans", "tokenizer.streaming=true", "semantic_ids.collision_policy=nearest_free"],
        ["tokenizer.kmeans_sample=256", "tokenizer.codebook_size=256"],
    ):
        load(RunConfig, None, overrides, CONFIGS)


REFUSED = {
    "tokenizer.num_levls=4": "unknown key tokenizer.num_levls; did you mean tokenizer.num_levels?",
    "modell.d_ff=4": "unknown key modell",
    "tokenizer.num_levels=0": "tokenizer.num_levels = 0: Input should be greater than or equal to 1",
    "tokenizer.num_levels=three": "tokenizer.num_levels = 'three': Input should be a valid integer",
    "model.preset=huge": "model.preset = 'huge': Input should be 'small', 'medium', 'tiger-paper' or 'tiger-tuned'",
    "data.kind=amzon": "there is no module tiger.data.sources.amzon; shipped: amazon, synthetic, tables",
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
    (tmp_path / "x.toml").write_text("x = " + "9" * 5000)
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
    other = load(RunConfig, None, ["embedding.resources.max_workers=3", "decoding.resources.max_workers=1"], CONFIGS)
    assert base.embedding.identity() == other.embedding.identity()
    assert base.decoding.identity() == other.decoding.identity()
    changed = load(RunConfig, None, ["embedding.max_tokens=64"], CONFIGS)
    assert base.embedding.identity() != changed.embedding.identity()


@pytest.mark.parametrize("job", sorted(set(JOBS) - set(TOOLS)))
def test_help_prints_every_key(job: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", [job, "--help"])
    monkeypatch.delitem(sys.modules, f"jobs.{job}", raising=False)
    runpy.run_module(f"jobs.{job}", run_name="__main__")
    printed = capsys.readouterr().out
    for key, *_ in describe(RunConfig):
        assert f"  {key} = " in printed
    for kind in ("amazon", "tables", "rkmeans"):
        assert f'kind = "{kind}":' in printed
    for key, *_ in describe(TuningConfig):
        assert (f"  tuning.{key} = " in printed) == (job == "tune")


@pytest.mark.parametrize("arguments", [[], ["train", "--help"], ["check", "--help"]])
def test_a_reader_that_ends_early_is_no_error(arguments: list[str]) -> None:
    """As `head` does."""
    end, start = os.pipe()
    os.close(end)
    with os.fdopen(start, "w") as output:
        found = subprocess.run([sys.executable, "-m", "tiger", *arguments], stdout=output, stderr=subprocess.PIPE)
    assert (found.returncode, found.stderr) == (1, b"")


def test_none_as_the_help_prints_it_can_be_given() -> None:
    assert load(RunConfig, None, ["recommend.users=none"], CONFIGS).recommend.users is None
    assert load(RunConfig, None, ["recommend.users=7"], CONFIGS).recommend.users == 7
    with pytest.raises(ConfigError, match="decoding.k"):
        load(RunConfig, None, ["decoding.k=none"], CONFIGS)
