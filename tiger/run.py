"""The complete run configuration, in the order of the stages.

Most sections are defined next to their components; this file composes them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field, SerializeAsAny, model_validator

from tiger.core.config import Config, load
from tiger.core.resources import FixedResources, Resources, TrainingResources
from tiger.core.tracking import TrackingConfig
from tiger.data.catalog import CatalogConfig
from tiger.data.sources import synthetic
from tiger.data.sources.base import DatasetConfig
from tiger.embedding.collaborative import CollaborativeConfig
from tiger.embedding.encoder import EmbeddingConfig
from tiger.evaluation.drift import DriftLimits
from tiger.evaluation.evaluator import EvaluationConfig
from tiger.models.base import ModelConfig
from tiger.models.decoding import DecodingConfig
from tiger.models.tiger.config import TigerConfig
from tiger.semantic_ids.assignment import SemanticIdsConfig
from tiger.tokenizers import rqvae
from tiger.tokenizers.base import TokenizerConfig

CONFIGS = Path(__file__).parent / "configs"
"""Folder of the built-in configurations."""


class RecommendConfig(Config):
    """To whom and what is recommended, given whole histories; `decoding` has the options of the lists."""

    unfingerprinted: ClassVar[frozenset[str]] = frozenset(
        {"allowed_items_file", "histories", "semantic_ids"}
    )  # their content is

    users: int | None = Field(100, ge=1, description="first users of the catalog by id to recommend to; none: all")
    histories: list[str] = Field(
        [],
        description="interaction files with the histories of users to recommend to, instead of the catalog's users: "
        "paths, folders, globs, URLs, s3:// or gs:// URIs; read by the keys of data, as the model's own were",
    )
    semantic_ids: str | None = Field(
        None, description="folder of the semantic IDs of an append (tiger append), to recommend its items, too"
    )
    fields: list[Literal["ids", "titles", "scores"]] = Field(
        ["ids", "scores"], description="columns of the lists in addition to the item indices: ids, titles, scores"
    )
    json_lines: bool = Field(False, description="write the lists as JSON lines, too: ids, titles and scores")
    allowed_items_file: str | None = Field(
        None, description="file of allowed item ids (source ids), one per line, UTF-8; none: all items are allowed"
    )


class AppendConfig(Config):
    """Items that come after the training (`tiger append`); published semantic IDs do not change."""

    unfingerprinted: ClassVar[frozenset[str]] = frozenset(
        {"items", "interactions", "deleted_file", "onto"}
    )  # their content is

    items: list[str] = Field(
        [],
        description="files of new items, and of published ones whose fields have changed: paths, folders, globs, URLs, "
        "s3:// or gs:// URIs; read by the keys of data, as the model's own were",
    )
    interactions: list[str] = Field(
        [],
        description="interaction files with the new items, to measure how well the model finds them",
    )
    deleted_file: str | None = Field(
        None, description="file of item ids (source ids) not to recommend any more, one per line, UTF-8"
    )
    onto: str | None = Field(
        None, description="semantic IDs of an earlier append (their folder) to continue; none: the model's own"
    )
    limits: DriftLimits = DriftLimits()


class ServeConfig(Config):
    """Recommendations over HTTP (`jobs.serve`)."""

    host: str = Field(
        "127.0.0.1", min_length=1, description="address to listen on; a token is required unless it is loopback"
    )
    port: int = Field(8000, ge=1, le=65535, description="port to listen on")
    semantic_ids: str | None = Field(
        None, description="folder of the semantic IDs of an append (tiger append), to serve its items, too"
    )
    token_file: str | None = Field(
        None, description="file with the bearer token of requests; must not be readable by others"
    )
    allowed_origins: list[str] = Field(
        [],
        description="origins whose pages may ask from a browser (CORS), such as https://shop.example; none by default",
    )
    tls_cert_file: str | None = Field(None, description="certificate chain in PEM, to serve HTTPS")
    tls_key_file: str | None = Field(None, description="its private key in PEM")
    request_seconds: float = Field(
        30.0, gt=0, description="timeout of a request, including the wait for a replica; then it gets 408"
    )
    max_queued_requests: int = Field(
        512, ge=1, description="requests that wait for a replica at most; further ones get 429 at once"
    )
    max_replicas: int | None = Field(
        None, ge=1, description="replicas to scale up to under load; none: resources.max_workers replicas, always"
    )
    config_file: str | None = Field(
        None, description="write the configuration for `serve deploy` (YAML) to this file, and do not serve"
    )
    resources: FixedResources = Resources()  # of the replicas


class ResourcesConfig(Config):
    """Resources for Ray. They do not affect results, up to rounding."""

    gpus: int | None = Field(
        None,
        ge=0,
        description="number of GPUs to use, waiting for an autoscaling cluster to start them; 0: CPUs only; none: "
        "those available when a stage begins",
    )
    wait_minutes: float = Field(15, gt=0, description="minutes to wait for nodes, or for room on busy ones")
    training: TrainingResources = Resources()  # of the DDP groups that train tokenizer and model
    collective_seconds: int = Field(1800, ge=1, description="timeout of collective operations, in seconds")
    dollars_per_hour: float | None = Field(
        None, ge=0, description="price of the cluster, to report the cost of each stage"
    )
    in_process_megabytes: int = Field(
        512,
        ge=0,
        description="megabytes of raw data (uncompressed), or of vectors, that the driver itself works on; above it, "
        "tasks do",
    )
    max_failures: int = Field(3, ge=0, description="maximum restarts of training after the loss of a worker or node")


class RunConfig(Config):
    """One run of the pipeline."""

    root: str = Field("runs", min_length=1, description="folder of all artifacts: a path, or s3://, gs://, ...")
    warm_start: str | None = Field(
        None,
        description="folder of a trained model, or of the semantic IDs of an append to one, from which the next "
        "training starts: vectors, codebooks, semantic IDs and weights are aligned to it",
    )
    data: Annotated[SerializeAsAny[DatasetConfig], BeforeValidator(DatasetConfig.resolve)] = synthetic.Config()
    catalog: CatalogConfig = CatalogConfig()
    embedding: EmbeddingConfig = EmbeddingConfig()
    collaborative: CollaborativeConfig = CollaborativeConfig()
    tokenizer: Annotated[SerializeAsAny[TokenizerConfig], BeforeValidator(TokenizerConfig.resolve)] = rqvae.Config()
    semantic_ids: SemanticIdsConfig = SemanticIdsConfig()
    model: Annotated[SerializeAsAny[ModelConfig], BeforeValidator(ModelConfig.resolve)] = TigerConfig()
    decoding: DecodingConfig = DecodingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    recommend: RecommendConfig = RecommendConfig()
    append: AppendConfig = AppendConfig()
    serve: ServeConfig = ServeConfig()
    scale: ResourcesConfig = ResourcesConfig()
    tracking: TrackingConfig = TrackingConfig()

    @model_validator(mode="after")
    def _sections_fit(self) -> RunConfig:
        """Reject sections that cannot be used together, before the first stage."""
        tokenizer, ids = self.tokenizer, self.semantic_ids
        sizes = [tokenizer.codebook_size] * tokenizer.num_levels
        if math.prod(sizes) >= 2**63:
            raise ValueError(
                f"tokenizer.num_levels = {tokenizer.num_levels} of tokenizer.codebook_size = {tokenizer.codebook_size} "
                "codes give 2^63 tuples or more; use fewer levels or smaller codebooks"
            )
        if ids.collision_policy != "error" and math.prod([*sizes, ids.collision_codes]) >= 2**63:
            raise ValueError(
                f"tokenizer.num_levels = {tokenizer.num_levels} of tokenizer.codebook_size = {tokenizer.codebook_size} "
                f"codes and a collision level of semantic_ids.collision_codes = {ids.collision_codes} give 2^63 "
                "tuples or more; use fewer levels, or fewer codes"
            )
        if self.decoding.beam < self.decoding.k:
            raise ValueError(
                f"decoding.beam = {self.decoding.beam} is less than decoding.k = {self.decoding.k}: lists would come "
                "back short; set decoding.beam to decoding.k or more"
            )
        return self


def load_config(name: str = "sample", overrides: Sequence[str] = ()) -> RunConfig:
    """Return the configuration of a run.

    Args:
        name: a TOML file, or the name of a built-in configuration: sample, beauty-cpu, beauty.
        overrides: `dotted.key=value` strings, as on the command line.

    Raises:
        ConfigError: no such file, an unknown key, or an invalid value.
    """
    return load(RunConfig, name, list(overrides), CONFIGS)
