"""Items that come after the training: nothing published moves, and the model recommends them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.living_catalogs import (
    GROUPS,
    TRAINED,
    Shop,
    append_to,
    item,
    shop_run,
    train_in_process,
    train_shop,
    write_clicks,
    write_table,
)
from tests.paths import CONFIGS
from tiger.core.artifacts import Artifact
from tiger.core.config import load
from tiger.core.errors import ArtifactError, ConfigError, DataError
from tiger.data.catalog import Catalog
from tiger.data.grown_catalog import GrownCatalog, chain
from tiger.data.item_names import ItemNames
from tiger.evaluation.drift import DriftReport
from tiger.models.recommender import Recommender
from tiger.pipeline.append import append
from tiger.run import RunConfig
from tiger.semantic_ids.assignment import SemanticIds

NEW = list(range(len(TRAINED), len(TRAINED) + 36))


@pytest.fixture(scope="module")
def appended(shop: Shop, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return append_to(shop, [item(number) for number in NEW], tmp_path_factory.mktemp("new"))


def published(ids: Artifact, count: int) -> list[Any]:
    """What of the first items has been published: index, id and semantic ID."""
    return ids.folder.read_table("ids.parquet").slice(0, count).select(["item_id", "source_id", "codes"]).to_pylist()


def test_nothing_published_moves(shop: Shop, appended: Artifact) -> None:
    before = shop[1].inputs["semantic_ids"]
    assert published(appended, len(TRAINED)) == published(before, len(TRAINED))
    ids = SemanticIds.load(appended)
    assert len(ids) == len(TRAINED) + len(NEW)
    assert ids.level_sizes == SemanticIds.load(before).level_sizes
    assert [part.fingerprint for part in chain(appended)] == [before.fingerprint, appended.fingerprint]
    assert [part.kind for part in appended.lineage()].count("semantic_ids") == 2
    old, new = Catalog(shop[1].inputs["catalog"]), GrownCatalog(shop[1].inputs["catalog"], appended)
    assert new.items.slice(0, len(TRAINED)).equals(old.items.combine_chunks()) or (
        new.items.slice(0, len(TRAINED)).to_pylist() == old.items.to_pylist()
    )
    assert new.source_ids[len(TRAINED) :] == [item(number)["sku"] for number in NEW]
    appended.verify()


def test_new_items_are_recommended_with_ids_and_titles(shop: Shop, appended: Artifact) -> None:
    recommender = Recommender.load(shop[1], semantic_ids=appended.folder.uri)
    total = len(TRAINED) + len(NEW)
    assert recommender.num_items == total
    new = np.arange(total) >= len(TRAINED)
    found = recommender.recommend([["s0003", "s0015"]], k=len(NEW), beam=total, allowed_items=new)
    assert sorted(found.items[0].tolist()) == list(range(len(TRAINED), total))  # every one is reached
    assert sorted(found.ids[0]) == [item(number)["sku"] for number in NEW]
    assert found.titles[0][0].startswith("thing ")
    groups = [int(name[1:]) % GROUPS for name in found.ids[0][:3]]
    assert groups == [3, 3, 3]  # of 36 new items, the three of the history's group come first
    with_new = recommender.recommend([["s0003", item(NEW[3])["sku"]]], k=5, beam=total)
    assert not with_new.by_popularity.any()
    names = ItemNames(recommender.catalog.items_folder)
    assert names.ids.to_pylist() == list(recommender.catalog.source_ids)
    assert names.titles.to_pylist() == recommender.catalog.titles


def test_old_items_keep_their_order_among_themselves(shop: Shop, appended: Artifact) -> None:
    """Lists of old items alone: new ones take a little of their probability, and reorder hardly anything."""
    one, other = Recommender.load(shop[1]), Recommender.load(shop[1], semantic_ids=appended)
    histories = [[f"s{user:04d}", f"s{user + GROUPS:04d}"] for user in range(60)]
    old = np.arange(len(TRAINED) + len(NEW)) < len(TRAINED)
    found = one.recommend(histories, k=5, beam=120)
    again = other.recommend(histories, k=5, beam=160, allowed_items=old)
    same = np.mean([len(set(a) & set(b)) / 5 for a, b in zip(found.items.tolist(), again.items.tolist(), strict=True)])
    assert same > 0.9


def test_updates_deletions_and_items_that_come_back(shop: Shop, appended: Artifact, tmp_path: Path) -> None:
    (tmp_path / "gone.txt").write_text("s0001\ns0125\nnever there\n")
    rows = [item(7) | {"name": "renamed", "price": None}, item(200), item(200) | {"name": None}]
    second = append_to(
        shop, rows, tmp_path, f"append.onto={appended.folder.uri}", f"append.deleted_file={tmp_path}/gone.txt",
        without=("s0007",),
    )  # fmt: skip
    total = len(TRAINED) + len(NEW) + 1
    figures = second.metrics
    assert (figures["items"], figures["new_items"], figures["updated_items"]) == (total, 1, 1)
    assert (figures["deleted_items"], figures["unknown_deleted"], figures["duplicate_rows"]) == (2, 1, 1)
    assert published(second, total - 1) == published(appended, total - 1)
    recommender = Recommender.load(shop[1], semantic_ids=second)
    catalog = recommender.catalog
    assert (catalog.titles[7], catalog.titles[-1]) == ("renamed. maker 7", "thing 200. maker 8")
    assert catalog.items["price"][7].as_py() is None
    everything = recommender.recommend([["s0001", "s0125"]], k=total, beam=total, exclude_seen=False)
    assert set(range(total)) - set(everything.items[0].tolist()) == {1, 125}
    third = append_to(shop, [item(125)], tmp_path, f"append.onto={second.folder.uri}", without=("s0125",))
    assert third.metrics["deleted_items"] == 1
    assert np.flatnonzero(~Recommender.load(shop[1], semantic_ids=third).available).tolist() == [1]
    assert [part.fingerprint for part in chain(third)][1:] == [each.fingerprint for each in (appended, second, third)]
    assert published(third, total) == published(second, total)


def test_without_drift_the_verdict_is_to_continue_and_with_a_shift_to_retrain(
    shop: Shop, appended: Artifact, tmp_path: Path
) -> None:
    report = DriftReport.model_validate(appended.folder.read_json("drift.json"))
    assert (report.verdict, report.reasons) == ("continue", [])
    assert report.metrics["far_fraction"] < 0.15
    clicks = write_clicks(tmp_path / "clicks.parquet", TRAINED + NEW, seed=3, prefix="n")
    rows = [item(number) for number in NEW]
    measured = append_to(shop, rows, tmp_path, f"append.interactions={json.dumps([str(clicks)])}")
    metrics = measured.folder.read_json("drift.json")["metrics"]
    assert metrics["users_with_new_items"] > 100
    assert metrics["recall_ratio"] > 2
    assert metrics["recall@10_among_new_items"] > metrics["recall@10_new_items"] > 0
    shifted = append_to(shop, rows, tmp_path, shift=3.0)
    report = DriftReport.model_validate(shifted.folder.read_json("drift.json"))
    assert report.verdict == shifted.metrics["verdict"] == "retrain now"
    assert any("further from all trained ones" in reason for reason in report.reasons)
    relaxed = [f"{limit}=1" for limit in ("max_far_fraction", "max_prefix_churn", "max_moved_fraction")]
    relaxed += ["max_error_ratio=99", "max_crowded_fraction=1"]
    allowed = append_to(shop, rows, tmp_path, *(f"append.limits.{limit}" for limit in relaxed), shift=3.0)
    assert allowed.metrics["verdict"] == "continue"
    assert published(allowed, 156) == published(shifted, 156)


def test_equal_content_is_one_append(shop: Shop, appended: Artifact, tmp_path: Path) -> None:
    assert append_to(shop, [item(number) for number in NEW], tmp_path).fingerprint == appended.fingerprint
    fewer = append_to(shop, [item(number) for number in NEW[:-1]], tmp_path)
    assert fewer.fingerprint != appended.fingerprint


def test_what_cannot_be_appended_is_named(
    shop: Shop, other_shop: Artifact, appended: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, model = shop
    with pytest.raises(ConfigError, match=r"nothing to append: set append.items"):
        append_to(shop, [], tmp_path)
    with pytest.raises(DataError, match=r"new-vectors.parquet: 1 of 2 items of the catalog have no vector"):
        append_to(shop, [item(300), item(301)], tmp_path, without=("s0301",))
    with pytest.raises(DataError, match=r"text_fields contains maker"):
        append_to(shop, [{"sku": "s0300", "name": "x"}], tmp_path)
    with pytest.raises(DataError, match=r"append.deleted_file = .*missing.txt cannot be read"):
        append_to(shop, [], tmp_path, f"append.deleted_file={tmp_path}/missing.txt")
    names = json.dumps([str(write_table(tmp_path / "new-items.parquet", [item(300)]))])
    keys = [f"root={root}/runs", "data.kind=tables", "data.item_id=sku", f"append.items={names}"]
    without_vectors = load(RunConfig, None, [*keys, 'data.items=["-"]', 'data.interactions=["-"]'], CONFIGS)
    with pytest.raises(ConfigError, match=r"were imported: set embedding.import_path"):
        append(without_vectors, model)
    train_in_process(monkeypatch)
    with pytest.raises(ArtifactError, match=r"continues .*semantic_ids-.*, but the model was trained with"):
        Recommender.load(other_shop, semantic_ids=appended)
    with pytest.raises(ArtifactError, match="trained without semantic IDs"):
        Recommender.load(popularity_model(root), semantic_ids=appended)
    assert model.fingerprint != other_shop.fingerprint


def popularity_model(root: Path) -> Artifact:
    run = shop_run(root / "files", TRAINED, f"root={root}/runs")
    model = load(RunConfig, None, ["model.kind=popularity"], CONFIGS).model
    return train_shop(run.model_copy(update={"model": model}))


def test_a_warm_training_starts_from_what_was_learned(
    shop: Shop, appended: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next training has the appended items among its own: published IDs stay, and the first validation is good."""
    train_in_process(monkeypatch)
    files, numbers = tmp_path / "files", TRAINED + NEW
    cold = train_shop(shop_run(files, numbers, f"root={shop[0]}/runs", clicks_seed=1))
    warm = train_shop(
        shop_run(files, numbers, f"root={shop[0]}/runs", f"warm_start={appended.folder.uri}", clicks_seed=1)
    )
    assert warm.fingerprint != cold.fingerprint
    first = {
        name: json.loads(model.folder.read_bytes("metrics.jsonl").splitlines()[0])["recall@10"]
        for name, model in (("cold", cold), ("warm", warm))
    }
    assert first["warm"] > 2 * first["cold"]
    ids = warm.inputs["semantic_ids"]
    assert ids.metrics["published_items"] == len(numbers)
    assert ids.metrics["kept_ids"] > 0.8
    before = {row["source_id"]: row["codes"] for row in published(appended, len(numbers))}
    after = {row["source_id"]: row["codes"] for row in published(ids, len(numbers))}
    same = np.mean([before[name] == after[name] for name in before])
    assert same == pytest.approx(ids.metrics["kept_ids"])
    for stage in ("item_vectors", "tokenizer"):
        vectors = ids.inputs[stage]
        assert vectors.fingerprint != cold.inputs["semantic_ids"].inputs[stage].fingerprint
