"""The service with the result of `tiger append`: new, changed and deleted items in every answer. Without Ray."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from ray.serve.schema import ServeDeploySchema
from starlette.testclient import TestClient

from tests.living_catalogs import TRAINED, Shop, append_to, item
from tests.paths import CONFIGS
from tests.serving import ToyService, ask, ids
from tiger.core.artifacts import Artifact
from tiger.core.config import load
from tiger.core.errors import ArtifactError, ConfigError
from tiger.models.recommender import Recommender
from tiger.on_ray import swap
from tiger.on_ray.replica import ModelConfig
from tiger.pipeline.serve import serve
from tiger.run import RunConfig
from tiger.serving.app import build_app
from tiger.serving.model import ModelVersion, ServedModel

NEW = list(range(len(TRAINED), len(TRAINED) + 24))
GONE = ["s0001", "s0125"]
TOTAL = len(TRAINED) + len(NEW)
EVERY_ID, NEW_IDS = ({item(number)["sku"] for number in numbers} - set(GONE) for numbers in (TRAINED + NEW, NEW))


@pytest.fixture(scope="module")
def appended(shop: Shop, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """New items; then an update, and two deletions."""
    folder = tmp_path_factory.mktemp("new")
    first = append_to(shop, [item(number) for number in NEW], folder)
    (folder / "gone.txt").write_text("\n".join(GONE))
    changed = item(7) | {"name": "renamed", "price": 999.0, "category": "clearance"}
    return append_to(
        shop, [changed], folder, f"append.onto={first.folder.uri}", f"append.deleted_file={folder}/gone.txt",
        without=("s0007",),
    )  # fmt: skip


@pytest.fixture(scope="module")
def model(shop: Shop, appended: Artifact) -> ServedModel:
    return ServedModel.load(shop[1].folder.uri, "cpu", appended.folder.uri)


@pytest.fixture
def client(model: ServedModel) -> TestClient:
    return TestClient(build_app(ToyService(model, beam=TOTAL)))


def test_the_version_names_the_model_and_its_semantic_ids(
    shop: Shop, appended: Artifact, model: ServedModel, client: TestClient
) -> None:
    trained = shop[1].inputs["semantic_ids"].fingerprint
    name, ids_name = f"model-{shop[1].fingerprint}", f"semantic_ids-{appended.fingerprint}"
    assert model.version == ModelVersion(model=shop[1].folder.uri, semantic_ids=appended.folder.uri)
    assert client.get("/readyz").json() == {"status": "ready", "model": f"{name}+{ids_name}", "semantic_ids": ids_name}
    status = client.get("/status").json()
    assert (status["model"], status["semantic_ids"]) == (f"{name}+{ids_name}", ids_name)
    assert status["num_items"] == TOTAL - len(GONE)
    assert ask(client, history=["s0003"])["model"] == client.get("/healthz").json()["model"] == f"{name}+{ids_name}"
    plain = ServedModel.load(shop[1].folder.uri)
    assert (plain.name, plain.ids_name, plain.num_items) == (name, f"semantic_ids-{trained}", len(TRAINED))
    again = ServedModel.load(shop[1].folder.uri, semantic_ids=shop[1].inputs["semantic_ids"].folder.uri)
    assert (again.name, again.ids_name) == (name, f"semantic_ids-{trained}")  # nothing was appended


def test_lists_are_those_of_the_recommender(shop: Shop, appended: Artifact, client: TestClient) -> None:
    recommender = Recommender.load(shop[1], semantic_ids=appended)
    histories = [["s0003", "s0015"], ["s0130"], ["s0001", "s0125"], []]
    answers = ask(client, histories=histories, k=20, exclude_seen=False)["answers"]
    found = recommender.recommend(histories, k=20, beam=TOTAL, exclude_seen=False)
    assert [ids(answer) for answer in answers] == found.ids
    assert [answer["by_popularity"] for answer in answers] == [False, False, False, True]
    assert all(answer["ignored"] == [] for answer in answers)  # deleted items may be in histories
    for answer, titles, scores in zip(answers, found.titles, found.scores, strict=True):
        assert [each["title"] for each in answer["items"]] == titles
        np.testing.assert_allclose([each["score"] for each in answer["items"]], scores, atol=1e-5)


def test_filters_know_new_items_and_fields(client: TestClient) -> None:
    def recommended(history: list[str], **filters: Any) -> set[str]:
        return set(ids(ask(client, history=history, k=TOTAL, exclude_seen=False, filters=filters)))

    for history in (["s0003", "s0015"], []):  # by the model, and by popularity
        assert recommended(history) == EVERY_ID
        assert recommended(history, only_new=True) == NEW_IDS
        assert recommended(history, category="GROUP 3", only_new=True) == {"s0123", "s0135"}
        assert recommended(history, min_price=130, max_price=132) == {"s0129", "s0130", "s0131"}
        assert recommended(history, min_price=900) == recommended(history, category="clearance") == {"s0007"}
        assert "s0007" not in recommended(history, category="group 7")
        assert recommended(history, allow=["s0120", *GONE]) == {"s0120"}
        assert recommended(history, allow=GONE) == set()
    assert ask(client, history=["s0003"], k=2, filters={"only_new": True})["items"][0]["item"] in {"s0123", "s0135"}


def test_items_are_described_and_deleted_ones_are_not_found(model: ServedModel, client: TestClient) -> None:
    new = client.get("/items/s0123").json()
    assert (new["title"], new["price"], new["categories"]) == ("thing 123. maker 3", 124.0, ["group 3"])
    assert (new["seen_in_training"], len(new["semantic_id"])) == (0, 2)
    changed = client.get("/items/s0007").json()
    assert (changed["title"], changed["price"], changed["categories"]) == ("renamed. maker 7", 999.0, ["clearance"])
    assert changed["seen_in_training"] > 0
    for name in GONE:
        answer = client.get(f"/items/{name}")
        assert (answer.status_code, answer.json()["detail"]) == (404, f"'{name}' was deleted from the catalog")
    assert model.tree is not None
    shown = {each.item for number in range(TOTAL) if number not in (1, 125) for each in model.tree.neighbors(number, 9)}
    assert not shown & set(GONE)
    assert shown & NEW_IDS


def test_search_and_tree_have_the_new_items_and_not_the_deleted_ones(client: TestClient) -> None:
    def found(words: str) -> list[str]:
        return [each["item"] for each in client.get("/search", params={"q": words, "limit": 100}).json()["items"]]

    assert found("thing 123") == found("s0123") == ["s0123"]
    assert found("renamed") == ["s0007"]
    assert "s0007" not in found("thing 7")  # its title of before
    for words in ("thing 125", "s0125", " s0001 "):
        assert found(words) == []
    assert {"s0121", "s0133"} <= set(found("maker 1")) and not set(GONE) & set(found("maker 1"))
    root = client.get("/prefix").json()
    assert root["num_items"] == sum(each["num_items"] for each in root["children"]) == TOTAL - len(GONE)
    below = [client.get(f"/prefix?codes={first['code']}").json()["items"] for first in root["children"]]
    assert sorted(each["item"] for items in below for each in items) == sorted(EVERY_ID)
    beam = ask(client, history=["s0013"], k=5, explain=True)["beam"]
    assert all(each["num_items"] > 0 for level in beam for each in level)  # none has deleted items only


def test_a_catalog_of_one_item_is_not_degenerate(shop: Shop, tmp_path: Path) -> None:
    """Equal lists after different histories are right if there is nothing else to recommend."""
    (tmp_path / "gone.txt").write_text("\n".join(item(number)["sku"] for number in TRAINED[1:]))
    last = append_to(shop, [], tmp_path, f"append.deleted_file={tmp_path}/gone.txt")
    model = ServedModel.load(shop[1].folder.uri, semantic_ids=last.folder.uri)
    assert (model.num_items, ids(ask(TestClient(build_app(ToyService(model))), history=["s0003"]))) == (1, ["s0000"])


# --- which model and items ----------------------------------------------------------------------------------------


def test_semantic_ids_of_another_model_are_refused(other_shop: Artifact, appended: Artifact) -> None:
    reason = r"continues .*semantic_ids-\w+, but the model was trained with .*; append the items to this model"
    with pytest.raises(ArtifactError, match=reason):
        ServedModel.load(other_shop.folder.uri, semantic_ids=appended.folder.uri)
    with pytest.raises(ArtifactError, match="is a model artifact where semantic_ids is needed"):
        ServedModel.load(other_shop.folder.uri, semantic_ids=other_shop.folder.uri)


def test_a_swap_changes_the_model_the_items_or_both_and_goes_back(
    shop: Shop, other_shop: Artifact, appended: Artifact, tmp_path: Path
) -> None:
    model, new = shop[1].home.uri, appended.home.uri
    current = ModelConfig(model=model)
    assert swap._wanted(current, None, f"{new}/") == ModelVersion(model=model, semantic_ids=new)
    assert swap._wanted(current, other_shop.home.uri, None) == ModelVersion(model=other_shop.home.uri)
    current = ModelConfig(model=other_shop.home.uri, previous=ModelVersion(model=model, semantic_ids=new))
    assert swap._wanted(current, model, new) == current.previous
    assert swap._wanted(current, None, None) == current.previous
    assert swap._wanted(ModelConfig(model=model, semantic_ids=new), model, None) == ModelVersion(model=model)
    with pytest.raises(ArtifactError, match="but the model was trained with"):
        swap._wanted(current, None, new)
    with pytest.raises(ArtifactError, match="no-such is not a finished artifact"):
        swap._wanted(current, model, str(tmp_path / "no-such"))
    with pytest.raises(ConfigError, match="nothing answered before; name what is to answer: tiger swap MODEL, or"):
        swap._wanted(ModelConfig(model=model), None, None)


def test_previous_may_be_the_uri_of_a_model() -> None:
    """As `user_config` had it before models came with semantic IDs."""
    config = ModelConfig.model_validate({"model": "s3://b/model-2", "previous": "s3://b/model-1"})
    assert config.previous == ModelVersion(model="s3://b/model-1")
    assert ModelConfig.model_validate(config.model_dump(exclude_none=True)) == config


@pytest.mark.parametrize("arguments", [[], ["--back", "runs/model-1"], ["--back", "--semantic-ids", "runs/ids"]])
def test_a_swap_needs_one_choice(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        swap.main(arguments)
    assert "give a model, --semantic-ids, or both; or --back alone" in capsys.readouterr().err


def test_a_configuration_for_serve_deploy_names_the_semantic_ids(
    shop: Shop, other_shop: Artifact, appended: Artifact, tmp_path: Path
) -> None:
    given = [f"serve.config_file={tmp_path}/serve.yaml", f"serve.semantic_ids={appended.folder.uri}/"]
    run = load(RunConfig, None, given, CONFIGS)
    serve(run, shop[1])
    config = ServeDeploySchema.model_validate(yaml.safe_load((tmp_path / "serve.yaml").read_text()))
    (server,) = config.applications[0].deployments
    assert server.user_config == {"model": shop[1].home.uri, "semantic_ids": appended.home.uri}
    with pytest.raises(ArtifactError, match="but the model was trained with"):
        serve(run, other_shop)
