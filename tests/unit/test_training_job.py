"""Training jobs: their identity in checkpoints, and how they travel to worker processes."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from pathlib import Path

import pytest

from tiger.core.errors import ConfigError
from tiger.core.storage import Folder
from tiger.models.sasrec import Config as SASRecConfig
from tiger.models.tiger.config import TigerConfig
from tiger.models.train import ModelJob
from tiger.tokenizers import rkmeans, rqvae
from tiger.tokenizers.train import TokenizerJob
from tiger.training.checkpoints import CheckpointStore
from tiger.training.job import TrainingJob

DATA, TARGET = Folder("/data"), Folder("/target")
JOBS = [
    TokenizerJob(rqvae.Config(), DATA, TARGET),
    TokenizerJob(rkmeans.Config(), DATA, TARGET),
    ModelJob(TigerConfig(), {"catalog": DATA, "semantic_ids": Folder("/ids")}, TARGET),
    ModelJob(SASRecConfig(), {"catalog": DATA}, TARGET),
]


@pytest.mark.parametrize("job", JOBS, ids=lambda job: type(job).__name__)
def test_identity_is_every_field_except_the_target(job: TrainingJob) -> None:
    identity = job.identity()
    assert json.loads(json.dumps(identity)) == identity
    assert "/data" in json.dumps(identity)
    assert "target" not in identity
    assert replace(job, target=Folder("/other")).identity() == identity
    assert replace(job, config=job.config.model_copy(update={"seed": 7})).identity() != identity


def test_identity_contains_the_options_of_the_kind_of_tokenizer() -> None:
    assert {"kind", "commitment_weight", "codebook_size"} <= JOBS[0].identity()["config"].keys()


@pytest.mark.parametrize("job", JOBS, ids=lambda job: type(job).__name__)
def test_a_pickled_job_is_equal_and_holds_uris(job: TrainingJob) -> None:
    sent = pickle.dumps(job)
    assert b"FileSystem" not in sent
    received = pickle.loads(sent)
    assert type(received) is type(job)
    assert received.identity() == job.identity()
    assert received.target.uri == "/target"


def test_a_pickled_folder_contains_no_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "an-access-key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a-secret-key")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_REGION", "eu-west-1")
    sent = pickle.dumps(Folder("s3://bucket/runs").child("model"))
    assert b"key" not in sent
    assert pickle.loads(sent).uri == "s3://bucket/runs/model"


def test_checkpoints_of_another_job_are_rejected(tmp_path: Path) -> None:
    folder, job = Folder(str(tmp_path)), JOBS[0]
    CheckpointStore(folder, job.identity()).save({}, {"step": 1})
    assert CheckpointStore(folder, job.identity()).load() == {}
    with pytest.raises(ConfigError, match="embeddings was /data, is /others"):
        CheckpointStore(folder, replace(job, embeddings=Folder("/others")).identity()).load()
