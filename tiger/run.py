"""All knobs of a run, in the order of the stages: the table of contents.

Every section stands beside the component that it turns; this file composes them.
"""

from __future__ import annotations

import math
from typing import Annotated, ClassVar

from pydantic import BeforeValidator, Field, SerializeAsAny, model_validator

from tiger.core.config import Config
from tiger.core.tracking import TrackingConfig
from tiger.data.catalog import CatalogConfig
from tiger.data.sources import synthetic
from tiger.data.sources.base import DatasetConfig
from tiger.embedding.collaborative import CollaborativeConfig
from tiger.embedding.encoder import EmbeddingConfig
from tiger.models.sasrec import SASRecConfig
from tiger.models.tiger.config import ModelConfig
from tiger.semantic_ids.assignment import SemanticIdsConfig
from tiger.tokenizers import rkmeans, rqvae
from tiger.tokenizers.base import TokenizerConfig


class EvaluationConfig(Config):
    """How the trained model is held against the validation and test targets."""

    unfingerprinted: ClassVar[frozenset[str]] = frozenset({"max_actors"})

    beam: int = Field(50, ge=50, description="width of the beam search; at least the largest cutoff, 50")
    max_users: int | None = Field(None, ge=1, description="users per split, drawn by seed; none: all")
    num_exact_users: int = Field(
        300, ge=0, description="test users for whom the search is held against scoring every item; 0: none"
    )
    max_actors: int | None = Field(None, ge=1, description="decoders at most; none: two per GPU, or one per CPU core")
    seed: int = Field(0, ge=0, description="seed of the draw of users and of the bootstrap")


class RecommendConfig(Config):
    """Recommendations after the users' whole histories."""

    unfingerprinted: ClassVar[frozenset[str]] = frozenset(
        {"allowed_items_file", "max_actors"}
    )  # what the file holds counts

    users: int | None = Field(100, ge=1, description="first users by id to recommend to; none: all")
    k: int = Field(10, ge=1, description="items per user")
    beam: int = Field(50, ge=1, description="width of the beam search")
    exclude_history: bool = Field(True, description="leave out what the user already had")
    allowed_items_file: str | None = Field(
        None, description="a file of item names (source ids), one a line, UTF-8: only these come back; none: all items"
    )
    temperature: float = Field(0.0, ge=0, description="above 0: items are drawn, the higher the more freely")
    max_per_first_code: int | None = Field(None, ge=1, description="items of one first code in a list, at most")
    seed: int = Field(0, ge=0, description="seed of the draw")
    max_actors: int | None = Field(None, ge=1, description="decoders at most; none: two per GPU, or one per CPU core")


class ServeConfig(Config):
    """Recommendations over HTTP (`jobs.serve`)."""

    host: str = Field("127.0.0.1", min_length=1, description="address to listen on; beyond loopback a token is needed")
    port: int = Field(8000, ge=1, le=65535, description="port to listen on")
    token_file: str | None = Field(
        None, description="file with the bearer token that requests must bring, readable by its owner only"
    )
    beam: int = Field(50, ge=1, description="width of the beam search, and the most items that a request may ask for")
    replicas: int = Field(1, ge=1, description="copies of the model")
    cpus: int = Field(1, ge=1, description="CPUs, and PyTorch threads, per replica")
    gpus: float | None = Field(
        None, ge=0, le=1, description="GPU, or a fraction of one, per replica; none: 1 if the run uses GPUs, else 0"
    )


class ResourcesConfig(Config):
    """What Ray may use. None of it changes what comes out, except for rounding."""

    gpus: int | None = Field(
        None,
        ge=0,
        description="GPUs to use, waited for while an autoscaling cluster starts them; 0: CPUs only; none: those that "
        "are there when a stage begins",
    )
    wait_minutes: float = Field(15, gt=0, description="minutes to wait for nodes, or for room on busy ones")
    train_workers: int | None = Field(
        None, ge=1, description="DDP workers; none: one, or with GPUs one per 1,024 rows of a batch, up to one per GPU"
    )
    cpus_per_worker: int | None = Field(
        None, ge=1, description="CPUs per worker; none: all that one node can give, or 4 with a GPU"
    )
    collective_seconds: int = Field(1800, ge=1, description="seconds after which a worker that waits for others fails")
    dollars_per_hour: float | None = Field(None, ge=0, description="price of the cluster, for the cost of each stage")
    max_failures: int = Field(3, ge=0, description="times that training continues after a worker or node was lost")


class RunConfig(Config):
    """One run of the pipeline."""

    root: str = Field("runs", min_length=1, description="where artifacts go: a folder, or s3://, gs://, ...")
    data: Annotated[SerializeAsAny[DatasetConfig], BeforeValidator(DatasetConfig.resolve)] = synthetic.Config()
    catalog: CatalogConfig = CatalogConfig()
    embedding: EmbeddingConfig = EmbeddingConfig()
    collaborative: CollaborativeConfig = CollaborativeConfig()
    tokenizer: Annotated[SerializeAsAny[TokenizerConfig], BeforeValidator(TokenizerConfig.resolve)] = rqvae.Config()
    semantic_ids: SemanticIdsConfig = SemanticIdsConfig()
    model: ModelConfig = ModelConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    recommend: RecommendConfig = RecommendConfig()
    sasrec: SASRecConfig = SASRecConfig()
    serve: ServeConfig = ServeConfig()
    scale: ResourcesConfig = ResourcesConfig()
    tracking: TrackingConfig = TrackingConfig()

    @model_validator(mode="after")
    def _sections_fit(self) -> RunConfig:
        """Refuse sections that cannot be used together, before the first stage."""
        tokenizer, ids = self.tokenizer, self.semantic_ids
        if isinstance(tokenizer, rkmeans.Config) and tokenizer.streaming and ids.collision_policy == "nearest_free":
            raise ValueError(
                "semantic_ids.collision_policy = nearest_free needs the vectors in memory, tokenizer.streaming = true "
                "keeps them out of it; set semantic_ids.collision_policy = extra_code"
            )
        sizes = [tokenizer.codebook_size] * tokenizer.num_levels
        if math.prod(sizes) >= 2**63:
            raise ValueError(
                f"tokenizer.num_levels = {tokenizer.num_levels} of tokenizer.codebook_size = {tokenizer.codebook_size} "
                "codes have 2^63 tuples or more; use fewer levels or smaller codebooks"
            )
        if ids.collision_policy != "error" and math.prod([*sizes, ids.collision_codes]) >= 2**63:
            raise ValueError(
                f"tokenizer.num_levels = {tokenizer.num_levels} of tokenizer.codebook_size = {tokenizer.codebook_size} "
                f"codes and a collision level of semantic_ids.collision_codes = {ids.collision_codes} have 2^63 "
                "tuples or more; use fewer levels, or less of either"
            )
        return self
