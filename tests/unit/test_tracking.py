"""Figures arrive where they are watched: an event file, MLflow's own store, a node's Prometheus page."""

from __future__ import annotations

import struct
import threading
from pathlib import Path

import pytest
from tensorboardX.proto.event_pb2 import Event

from tests.factories import record
from tiger.core import tracking
from tiger.core.config import flat
from tiger.core.errors import ResourceError
from tiger.run import RunConfig


def events(file: Path) -> list[tuple[int, str, float]]:
    """(step, tag, value) of an event file: records of length, check, content, check (TFRecord)."""
    content, found, at = file.read_bytes(), [], 0
    while at < len(content):
        (length,) = struct.unpack_from("<Q", content, at)
        event = Event.FromString(content[at + 12 : at + 12 + length])
        found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
        at += length + 16
    return found


def test_tensorboard_gets_every_number(tmp_path: Path) -> None:
    with tracking.tensorboard(str(tmp_path), "pipeline-1") as sink, tracking.recording(sink):
        record()
    (file,) = (tmp_path / "pipeline-1").iterdir()
    assert events(file) == [
        (47, "tokenizer/loss", 1.5),
        (47, "tokenizer/usage_at_1", 1.0),
        (94, "tokenizer/loss", 1.25),
        (94, "tokenizer/usage_at_1", 0.75),
    ]


def test_mlflow_gets_figures_and_parameters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    from mlflow import MlflowClient

    uri = (tmp_path / "mlruns").as_uri()
    parameters = {"model": {"preset": "small", "training": {"epochs": 2}}, "root": None}
    with tracking.mlflow(uri, "tiger", "pipeline-1", parameters) as sink, tracking.recording(sink):
        relay = threading.Thread(target=record)  # as figures of a training come
        relay.start()
        relay.join()
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("tiger")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_name == "pipeline-1" and run.info.status == "FINISHED"
    assert run.data.params == {"model.preset": "small", "model.training.epochs": "2"}
    history = client.get_metric_history(run.info.run_id, "tokenizer/loss")
    assert [(point.step, point.value) for point in history] == [(47, 1.5), (94, 1.25)]
    assert run.data.metrics["tokenizer/usage_at_1"] == 0.75


def test_mlflow_takes_a_whole_configuration_without_its_secrets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    from mlflow import MlflowClient

    run = RunConfig.model_validate({"recommend": {"allowed_items_file": "https://me:hunter2@example.org/allowed.txt"}})
    parameters = run.model_dump(mode="json", serialize_as_any=True)
    uri = (tmp_path / "mlruns").as_uri()
    with tracking.mlflow(uri, "tiger", "whole", parameters):
        pass
    client = MlflowClient(uri)
    (found,) = client.search_runs([client.get_experiment_by_name("tiger").experiment_id])
    given = {key for key, value in flat(parameters).items() if value is not None}
    assert set(found.data.params) == given and len(given) > 100  # MLflow takes a hundred a call
    assert "hunter2" not in found.data.params["recommend.allowed_items_file"]
    assert found.data.params["model.training.learning_rate"] == "0.001"


def test_a_server_that_does_not_answer_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with (
        pytest.raises(ResourceError, match=r"tracking\.mlflow = http://127\.0\.0\.1:9"),
        tracking.mlflow("http://127.0.0.1:9", "tiger", "pipeline-1", {}),
    ):
        pass


def test_a_sink_that_fails_is_switched_off_aloud(caplog: pytest.LogCaptureFixture) -> None:
    seen: list[int] = []

    def broken(stage: str, step: int, figures: object) -> None:
        raise OSError("the server is gone")

    with tracking.recording(broken, lambda stage, step, figures: seen.append(step)):
        record()
    assert seen == [47, 94]
    assert caplog.text.count("no longer tracked by") == 1 and "the server is gone" in caplog.text
