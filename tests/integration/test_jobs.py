"""The whole path on a real local Ray, on a generated shop of 300 items."""

from __future__ import annotations

import csv
import gzip
import json
import subprocess
import sys
import time
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import torch

import tiger.cli
import tiger.pipeline.train
from tests.paths import ROOT
from tests.pipelines import TINY, digests, run_pipeline
from tiger.core.artifacts import Artifact, newest, open_artifact
from tiger.core.config import load
from tiger.core.errors import DataError, HealthError
from tiger.data.catalog import Catalog
from tiger.data.sources import synthetic
from tiger.evaluation import evaluator
from tiger.evaluation import health as diagnostics
from tiger.evaluation.evaluator import EvaluationConfig, EvaluationResult
from tiger.models.base import ModelConfig, StoredData, load_family, text_embeddings
from tiger.models.decoding import DecodingConfig
from tiger.models.recommender import Recommender
from tiger.run import RunConfig

FIELDS = ("ids", "titles", "scores")


def test_every_stage_leaves_its_artifact(finished: Artifact) -> None:
    assert [part.kind for part in finished.lineage()] == [
        "catalog",
        "embeddings",
        "item_vectors",
        "tokenizer",
        "semantic_ids",
        "model",
        "evaluation",
    ]
    for part in finished.lineage():
        part.verify()
        assert part.health
        assert all(check["healthy"] for check in part.health)
    assert any("popularity" in check["name"] for check in finished.inputs["model"].health)
    values = finished.folder.read_json("evaluation.json")
    jsonschema.validate(values, EvaluationResult.model_json_schema())
    result = EvaluationResult.model_validate(values)
    methods = result.splits["test"].methods
    assert list(methods) == ["tiger", "popularity", "markov_chain", "nearest_neighbors"]
    assert methods["tiger"].metrics["recall@10"] > 3 * methods["popularity"].metrics["recall@10"]
    search = result.exact_search
    assert set(search) == {"users", "beam_20", "beam_50", "exact"}
    assert abs(search["beam_50"] - search["exact"]) < 0.05
    assert set(result.splits["valid"].methods["tiger"].metrics) == {
        f"{name}@{cutoff}" for name in ("recall", "ndcg", "mrr") for cutoff in (1, 5, 10, 20, 50)
    }


def test_embeddings_are_one_row_an_item(finished: Artifact) -> None:
    embeddings = next(part for part in finished.lineage() if part.kind == "embeddings")
    items = np.sort(np.asarray(embeddings.folder.read_table("vectors")["item_id"]))
    assert np.array_equal(items, np.arange(embeddings.inputs["catalog"].metrics["items"]))


def test_a_second_run_skips_every_finished_stage(finished: Artifact, caplog: pytest.LogCaptureFixture) -> None:
    root = Path(finished.folder.uri).parent
    with caplog.at_level("INFO"):
        again = run_pipeline(root)
    assert again.folder.uri == finished.folder.uri
    skipped = [record.message.partition(":")[0] for record in caplog.records if "skipped" in record.message]
    assert skipped == [
        "catalog",
        "embeddings",
        "item_vectors",
        "tokenizer",
        "semantic_ids",
        "model",
        "evaluation",
        "recommendations",
        "report",
    ]


def test_recommendations_come_back_as_items_titles_and_scores(
    finished: Artifact, caplog: pytest.LogCaptureFixture
) -> None:
    from tiger.pipeline.recommend import print_examples

    recommendations = newest(str(Path(finished.folder.uri).parent), "recommendations")
    catalog = Catalog(recommendations.inputs["model"].inputs["catalog"])
    table = recommendations.folder.read_table("recommendations")
    for user, items, scores in zip(*(table[name].to_pylist() for name in ("user_id", "items", "scores")), strict=True):
        assert not set(items) & set(catalog.histories.of(user).tolist())
        assert scores == sorted(scores, reverse=True)
    assert table["user"].to_pylist() == catalog.histories.source_ids[:20]
    lists = table["items"].to_pylist()
    assert table["ids"].to_pylist() == [[catalog.source_ids[item] for item in items] for items in lists]
    assert table["titles"].to_pylist() == [[catalog.titles[item] for item in items] for items in lists]
    lines = [json.loads(line) for line in recommendations.folder.read_bytes("json_lines/part-00000.jsonl").splitlines()]
    assert [line["user"] for line in lines] == table["user"].to_pylist()
    for line, ids, titles, scores in zip(lines, *(table[name].to_pylist() for name in FIELDS), strict=True):
        expected = [(name, title, round(score, 4)) for name, title, score in zip(ids, titles, scores, strict=True)]
        assert [(item["item"], item["title"], item["score"]) for item in line["items"]] == expected
    with caplog.at_level("INFO"):
        print_examples(recommendations)
    shown = [record.message for record in caplog.records if record.message.startswith("user ")]
    assert len(shown) == 5
    assert catalog.titles[table["items"][0][0].as_py()][:60] in shown[0]


def test_an_evaluation_in_actors_is_that_of_one_process(finished: Artifact) -> None:
    model = finished.inputs["model"]
    data = StoredData(model.inputs)
    counts = data.histories.training_counts(data.num_items)
    recommenders = {"tiger": Recommender.load(model)}
    for kind in ("popularity", "markov_chain", "nearest_neighbors"):
        config = ModelConfig.resolve({"kind": kind})
        inputs = model.inputs | {"embeddings": text_embeddings(model.inputs["semantic_ids"])}
        recommenders[kind] = load_family(config).recommender(None, config, StoredData(inputs), torch.device("cpu"))
    result = EvaluationResult.model_validate(finished.folder.read_json("evaluation.json"))
    for split in ("valid", "test"):
        users = data.histories.evaluation(split)
        found = {
            name: evaluator.rank(each, users, data.histories.source_ids, DecodingConfig())
            for name, each in recommenders.items()
        }
        expected = evaluator.evaluate(found, evaluator.SplitUsers.of(users, counts), counts, EvaluationConfig())
        assert result.splits[split] == expected
    lists = finished.folder.read_table("lists/tiger")
    assert lists["user_id"].to_pylist() == [
        user for split in ("valid", "test") for user in data.histories.evaluation(split).users.tolist()
    ]


def test_histories_in_files_give_the_lists_of_the_catalogs_users(
    finished: Artifact, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same events, read from the files of the catalog, and as a table of another shop would have them."""
    model = finished.inputs["model"]
    catalog = Catalog(model.inputs["catalog"])
    histories = [catalog.histories.of(user) for user in range(len(catalog.histories))]
    found = Recommender.load(model).recommend(histories, k=10, beam=50)
    expected = dict(zip(catalog.histories.source_ids, found.ids, strict=True))
    shop = synthetic.Config.model_validate(model.inputs["catalog"].manifest["config"]["data"])
    (reviews,) = synthetic.locate(shop, tmp_path).interactions
    with gzip.open(reviews, "rt") as file:
        rows = [json.loads(line) for line in file]
    known = set(catalog.source_ids)  # others are outside the k-core
    num_unknown = sum(row["asin"] not in known for row in rows)
    clicks = tmp_path / "clicks.csv"
    lines = [f"{row['reviewerID']};{row['asin']};{row['unixReviewTime']}" for row in rows]
    clicks.write_text(
        "\n".join(["customer;sku;at", *lines[::-1], "newcomer;not an item;1400000000", "nobody;;1400000000"]) + "\n"
    )
    table_keys = ["data.kind=tables", "data.user_id=customer", "data.item_id=sku", "data.time=at"]
    for file, keys in ((reviews, []), (clicks, table_keys)):
        given = [model.folder.uri, f'recommend.histories=["{file}"]', *keys, "data.max_bad_row_fraction=1"]
        tiger.cli.run_job("recommend", [*given, "decoding.resources.max_workers=1"])
        printed = json.loads(capsys.readouterr().out.splitlines()[-1])
        table = open_artifact(printed["artifact"]).folder.read_table("recommendations")
        lists = dict(zip(table["user"].to_pylist(), table["ids"].to_pylist(), strict=True))
        assert len(table) == len(lists) == printed["users"]
        if keys:
            popular = lists.pop("newcomer")
            assert popular == Recommender.load(model).recommend([[]], k=10).ids[0]
            assert (printed["unknown"], printed["users_without_items"]) == (num_unknown + 1, 1)
            assert printed["rows"]["skipped"] == {"no customer or sku": 1}
        assert {user: lists[user] for user in expected} == expected


def test_items_of_a_file_are_appended_recommended_and_evaluated(
    finished: Artifact, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Copies of known items come under new ids: embedded, they are found where the originals are."""
    model = finished.inputs["model"]
    catalog = Catalog(model.inputs["catalog"])
    rows = [["sku", "title", "brand", "categories", "price", "description"]]
    for row in catalog.items.slice(0, 30).to_pylist():
        price, text = str(row["price"] or ""), row["description"] or ""
        rows.append([f"new-{row['source_id']}", row["title"], row["brand"], row["categories"][0][-1], price, text])
    with (tmp_path / "new.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    keys = ["data.kind=tables", "data.item_id=sku", f'append.items=["{tmp_path}/new.csv"]']
    tiger.cli.run_job("append", [model.folder.uri, *keys])
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (printed["items"], printed["new_items"]) == (catalog.n_items + 30, 30)
    appended = printed["artifact"]
    recommender = Recommender.load(model, semantic_ids=appended)
    assert recommender.catalog is not None
    assert recommender.catalog.source_ids[-30:] == [row[0] for row in rows[1:]]
    assert recommender.catalog.items["price"].to_pylist()[-30:] == catalog.items["price"].slice(0, 30).to_pylist()
    ids = recommender.trie.codes.numpy()
    assert (ids[-30:, 0] == ids[:30, 0]).mean() > 0.8  # equal texts, but for the categories
    options = ["decoding.resources.max_workers=1", "decoding.exclude_seen=false", "decoding.new_item_boost=8"]
    tiger.cli.run_job(
        "recommend", [model.folder.uri, f"recommend.semantic_ids={appended}", 'recommend.fields=["ids"]', *options]
    )
    artifact = open_artifact(json.loads(capsys.readouterr().out.splitlines()[-1])["artifact"])
    lists = artifact.folder.read_table("recommendations")["ids"].to_pylist()
    assert any(name.startswith("new-") for row in lists for name in row)
    tiger.cli.run_job(
        "evaluate", [model.folder.uri, f"evaluation.semantic_ids={appended}", "evaluation.max_users=100", options[0]]
    )
    result = open_artifact(json.loads(capsys.readouterr().out.splitlines()[-1])["artifact"])
    assert result.inputs["semantic_ids"].folder.uri == appended
    methods = EvaluationResult.model_validate(result.folder.read_json("evaluation.json")).splits["test"].methods
    assert methods["tiger"].metrics["recall@50"] > methods["popularity"].metrics["recall@50"]


def test_a_run_is_loaded_by_its_model(finished: Artifact) -> None:
    recommender = Recommender.load(finished.inputs["model"].folder.uri)
    found = recommender.recommend([[1, 2, 3]], k=5)
    assert (found.items >= 0).all()


def test_a_model_recommends_by_the_catalogs_own_ids(finished: Artifact) -> None:
    model = finished.inputs["model"]
    catalog, recommender = tiger.Catalog(model.inputs["catalog"].folder.uri), tiger.Recommender.load(model.folder.uri)
    history = catalog.source_ids[3:6]
    found = recommender.recommend([history, []], k=4)
    assert np.array_equal(found.items, recommender.recommend([[3, 4, 5], []], k=4).items)
    assert found.ids[0] == [catalog.source_ids[item] for item in found.items[0]]
    assert found.titles[1] == [catalog.titles[item] for item in found.items[1]]
    for words in (found.ids[0][0], found.titles[0][0], "history 1: most popular items"):
        assert words in str(found)
    with pytest.raises(DataError, match="history 1 holds 'who', which"):
        recommender.recommend([history, ["who"]])
    assert recommender.recommend([history], k=2, allowed_items=catalog.source_ids[10:12]).items[0].min() >= 10
    assert len(tiger.SemanticIds.load(model.inputs["semantic_ids"].folder.uri)) == recommender.num_items


def test_a_finished_model_is_evaluated_by_its_folder_next_to_another_family(
    finished: Artifact, capsys: pytest.CaptureFixture[str]
) -> None:
    """Overrides of the training are refused: the model is trained."""
    root = str(Path(finished.folder.uri).parent)
    others = [key for key in TINY if not key.startswith("model.")]
    sasrec = ["catalog.k_core=5", "model.kind=sasrec", "model.training.epochs=30"]
    run = tiger.load_config("sample", [*others, f"root={root}", *sasrec])
    other = tiger.pipeline.train.ensure_model(run)
    model = finished.inputs["model"].folder.uri
    with pytest.raises(SystemExit, match="2"):
        tiger.cli.run_job("evaluate", [model, "model.seed=1"])
    assert "can be set" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        tiger.cli.run_job("prepare", [model])
    tiger.cli.run_job(
        "evaluate",
        [
            model,
            f'evaluation.compare_with=["{other.folder.uri}"]',
            "evaluation.max_users=100",
            "decoding.resources.max_workers=1",
        ],
    )
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert printed.keys() == {"artifact", "tiger", "sasrec", "popularity", "markov_chain", "nearest_neighbors"}
    result = EvaluationResult.model_validate(open_artifact(printed["artifact"]).folder.read_json("evaluation.json"))
    assert result.splits["test"].users == 100
    assert set(result.splits["test"].paired) == {"sasrec", "popularity", "markov_chain", "nearest_neighbors"}


def test_diagnostics_print_the_whole_table(finished: Artifact) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tiger.evaluation.health", finished.folder.uri], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    for words in ("share of distinct titles", "mean pairwise distance", "usage of level 3", "invalid items"):
        assert words in done.stdout
    assert "UNHEALTHY" not in done.stdout


def test_other_settings_of_one_stage_redo_only_what_follows(
    finished: Artifact, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The settings are a filter: half of the items, and a name that is none."""
    root = Path(finished.folder.uri).parent
    before = {path.name for path in root.iterdir()}
    names = Catalog(finished.inputs["model"].inputs["catalog"]).source_ids
    (tmp_path / "in-stock.txt").write_text("\n".join([*names[::2], "no item"]))
    with caplog.at_level("INFO"):
        run_pipeline(root, "decoding.k=3", f"recommend.allowed_items_file={tmp_path}/in-stock.txt")
    made = {path.name.partition("-")[0] for path in root.iterdir() if path.name not in before}
    assert made == {"recommendations", "report"}
    found = newest(str(root), "recommendations").folder.read_table("recommendations")["items"].to_pylist()
    assert all(item % 2 == 0 for items in found for item in items)
    allowed = f"{len(names[::2])} items allowed, 1 ids are not in the catalog"
    assert any(allowed in record.message for record in caplog.records)
    assert any("time by stage" in record.message for record in caplog.records)


@pytest.mark.parametrize(
    ("content", "message"), [(b"nothing\n", "none of its 1 ids is in the catalog"), (b"\xff", "cannot be read")]
)
def test_a_filter_that_cannot_be_is_refused(content: bytes, message: str, finished: Artifact, tmp_path: Path) -> None:
    file = tmp_path / "names.txt"
    file.write_bytes(content)
    with pytest.raises(DataError, match=message):
        run_pipeline(Path(finished.folder.uri).parent, f"recommend.allowed_items_file={file}")


def test_a_split_by_time_without_validation_users_stops_before_the_training(tmp_path: Path) -> None:
    """A nightly export: all events of a day at midnight, so that both moments of the split are the same."""
    from tiger.pipeline.prepare import prepare

    items = [f"i{n:02d},title {n}" for n in range(30)]
    (tmp_path / "items.csv").write_text("\n".join(["item_id,title", *items]))
    events = [f"u{n % 10},i{n // 4:02d},{1_600_000_000 + 86_400 * (n // 50)}" for n in range(100)]
    (tmp_path / "events.csv").write_text("\n".join(["user_id,item_id,timestamp", *events]))
    files = [f'data.items=["{tmp_path}/items.csv"]', f'data.interactions=["{tmp_path}/events.csv"]']
    rules = ['catalog.text_fields=["title"]', "catalog.k_core=0", "catalog.split=temporal", f"root={tmp_path}/runs"]
    run = load(RunConfig, None, ["data.kind=tables", *files, *rules], ROOT / "tiger/configs")
    with pytest.raises((DataError, HealthError), match="validation users.*finer times.*leave-one-out"):
        prepare(run)


def test_a_collapsed_stage_stops_the_pipeline_there(local_ray: None, tmp_path: Path) -> None:
    """A field that is the same for all items: every text equal, and the run ends before anything is embedded."""
    done = subprocess.run(
        [sys.executable, "-m", "jobs.pipeline", *TINY, f"root={tmp_path}", 'catalog.text_fields=["features"]'],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 6
    assert "error: catalog is unhealthy: share of distinct texts" in done.stderr
    assert "likely cause: the reader found none of the expected fields" in done.stderr
    assert not list(tmp_path.glob("embeddings-*"))


@pytest.mark.slow
def test_equal_seeds_give_equal_artifacts(finished: Artifact, tmp_path: Path) -> None:
    assert digests(run_pipeline(tmp_path)) == digests(finished)


@pytest.mark.slow
def test_a_killed_driver_resumes_with_the_same_command(tmp_path: Path) -> None:
    """Killed once embeddings are being written; the same command ends with what a run alone leaves."""
    command = [sys.executable, "-m", "jobs.embed", *TINY, f"root={tmp_path}", "data.items=6000", "data.users=6000"]
    first = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    parts: list[Path] = []
    while first.poll() is None and not parts:
        time.sleep(0.1)
        parts = list(tmp_path.glob("embeddings-*/vectors/*.parquet"))
    assert parts, "the stage ended before it could be killed"
    first.kill()
    first.wait()
    assert not list(tmp_path.glob("embeddings-*/manifest.json"))
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.glob("embeddings-*/vectors/*.parquet")}
    second = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert second.returncode == 0, second.stderr
    assert "shards are already finished" in second.stderr
    artifact = open_artifact(json.loads(second.stdout.splitlines()[-1])["artifact"])
    artifact.verify()
    items = np.sort(np.asarray(artifact.folder.read_table("vectors")["item_id"]))
    assert np.array_equal(items, np.arange(artifact.metrics["items"]))
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())


def test_diagnostics_module_finds_the_newest(finished: Artifact, capsys: pytest.CaptureFixture[str]) -> None:
    assert diagnostics.main([str(Path(finished.folder.uri).parent)]) == 0
    assert "mean pairwise distance" in capsys.readouterr().out
