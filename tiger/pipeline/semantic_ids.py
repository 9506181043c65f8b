"""Train the tokenizer on the embeddings (Ray Train) and assign every item one unique tuple of codes.

With embedding.import_path=FILE.parquet (item_id, vector) and without data files (`data.kind`) it needs no catalog or
texts.
"""

from __future__ import annotations

import logging

import numpy as np
import numpy.typing as npt
import torch

from tiger.core.artifacts import Artifact, Draft, stage
from tiger.core.errors import ConfigError
from tiger.embedding.vectors import load_embeddings, sample_embeddings
from tiger.evaluation.health import check_semantic_ids, check_tokenizer, require
from tiger.metrics.codes import code_metrics
from tiger.models.warm_start import WarmStart
from tiger.on_ray import kmeans as quantize
from tiger.on_ray.train import train
from tiger.pipeline.item_vectors import ensure_item_vectors
from tiger.run import RunConfig
from tiger.semantic_ids import assignment as semantic_ids
from tiger.semantic_ids.growth import align_ids
from tiger.tokenizers import rkmeans
from tiger.tokenizers.append import other_codes, squared_errors
from tiger.tokenizers.base import Tokenizer, TokenizerConfig
from tiger.tokenizers.train import TokenizerJob, encode_dataset, load_tokenizer, reconstruction_error
from tiger.training.weights import write_weights

log = logging.getLogger(__name__)

_HEALTH_SAMPLE = 20_000  # maximum number of latents for the health checks


def train_tokenizer(run: RunConfig, embeddings: Artifact) -> Artifact:
    """Return the tokenizer artifact trained on embeddings."""
    start = None if run.warm_start is None else WarmStart.open(run.warm_start)
    return fit_tokenizer.build(
        run.root, run.tokenizer, {embeddings.kind: embeddings}, run, embeddings, start,
        source=start.source if start else None,
    )  # fmt: skip


@stage("tokenizer", verb="semantic_ids")
def fit_tokenizer(draft: Draft, run: RunConfig, embeddings: Artifact, start: WarmStart | None) -> None:
    """Train the tokenizer, and measure its codes on all items."""
    config = run.tokenizer
    if _streamed(config):
        if start is not None:
            raise ConfigError("warm_start continues a tokenizer in memory; set tokenizer.streaming = false")
        assert isinstance(config, rkmeans.Config)
        write_weights(quantize.fit(config, embeddings.folder), draft.folder)
        draft.metrics = {"precision": "float32"}
    else:
        worker_job = TokenizerJob(
            config, embeddings.folder, draft.folder, None if start is None else start.tokenizer.folder
        )
        draft.metrics = train(worker_job, draft.folder, run.scale, "tokenizer", batch_size=config.training.batch_size)
    tokenizer = load_tokenizer(config, draft.folder, embeddings.metrics["dimension"])
    codes, error, _ = _quantize(config, tokenizer, embeddings)
    draft.metrics |= {"reconstruction_error": error} | code_metrics(codes, config.codebook_size)
    with torch.no_grad():
        latents = tokenizer.latent(tokenizer.standardize(sample_embeddings(embeddings.folder, _HEALTH_SAMPLE)))
    draft.health = require(check_tokenizer(latents.numpy(), codes, config.codebook_size))


def assign_ids(run: RunConfig, tokenizer: Artifact, embeddings: Artifact) -> Artifact:
    """Return the semantic_ids artifact of a tokenizer and the embeddings that it was trained on."""
    inputs = {"tokenizer": tokenizer, embeddings.kind: embeddings}
    start = None if run.warm_start is None else WarmStart.open(run.warm_start)
    return write_ids.build(
        run.root, run.semantic_ids, inputs, run, tokenizer, embeddings, start, source=start.source if start else None
    )


@stage("semantic_ids", verb="semantic_ids")
def write_ids(draft: Draft, run: RunConfig, tokenizer: Artifact, embeddings: Artifact, start: WarmStart | None) -> None:
    """Encode all items, and make their codes unique; of a warm start, those that fit keep their published IDs."""
    config = run.tokenizer
    trained = load_tokenizer(config, tokenizer.folder, embeddings.metrics["dimension"])
    codes, error, vectors = _quantize(config, trained, embeddings)
    nearest = code_metrics(codes, config.codebook_size)

    def costs(items: npt.NDArray[np.int64]) -> npt.NDArray[np.floating]:
        assert vectors is not None, "RunConfig rejects a streamed tokenizer with collision_policy = nearest_free"
        return trained.last_level_costs(vectors[items]).numpy()

    kept: dict[str, float] = {}
    if start is None:
        ids = semantic_ids.assign(codes, config.codebook_size, run.semantic_ids, costs)
    else:
        assert vectors is not None, "train_tokenizer refuses a warm start of a streamed tokenizer"
        ids, kept = _align(run, start, embeddings, codes, trained, vectors)
    ids.write(draft.folder, embeddings.folder.read_table("items.parquet", ["source_id"])["source_id"])
    assigned = ids.codes[:, : ids.levels].astype(np.int64)
    if vectors is not None:
        error = reconstruction_error(trained, vectors, torch.from_numpy(assigned), torch.device("cpu"))
    draft.metrics = {
        "items": len(ids),
        "codes_per_item": len(ids.level_sizes),
        "moved_items": int((assigned != codes).any(axis=1).sum()),
        "largest_group": int(ids.collisions.max()) + 1,
        "unique_ratio_of_nearest_codes": nearest["unique_ratio"],
        "reconstruction_error": error,
        **code_metrics(assigned, config.codebook_size),
        **kept,
    }
    draft.health = require(check_semantic_ids(ids.collisions))


def _align(
    run: RunConfig,
    start: WarmStart,
    embeddings: Artifact,
    codes: npt.NDArray[np.int64],
    tokenizer: Tokenizer,
    vectors: torch.Tensor,
) -> tuple[semantic_ids.SemanticIds, dict[str, float]]:
    """Return IDs among which published ones stay as far as they fit, and the fraction that stayed."""  # fmt: skip
    published, before = start.published_ids(), start.items_of(embeddings.folder)
    ids = align_ids(
        codes, published, before, run.semantic_ids, run.tokenizer.codebook_size,
        lambda items: tokenizer.last_level_costs(vectors[torch.from_numpy(items)]).numpy(),
        lambda item: other_codes(tokenizer, vectors[item], codes[item]),
        lambda items, given: squared_errors(tokenizer, vectors[torch.from_numpy(items)], torch.from_numpy(given)),
    )  # fmt: skip
    known = np.flatnonzero(before >= 0)
    same = np.zeros(len(known), bool)
    if ids.level_sizes == published.level_sizes:
        same = (ids.codes[known] == published.codes[before[known]]).all(axis=1)
    kept = float(same.mean()) if len(known) else 0.0
    log.info("semantic_ids: %.1f %% of the %s published IDs stay", 100 * kept, f"{len(known):,}")
    return ids, {"published_items": len(known), "kept_ids": kept}


def build_semantic_ids(run: RunConfig, vectors: Artifact) -> Artifact:
    """Return the semantic IDs of vectors: those of texts, or of texts and co-occurrence."""
    return assign_ids(run, train_tokenizer(run, vectors), vectors)


def _streamed(config: TokenizerConfig) -> bool:
    return isinstance(config, rkmeans.Config) and config.streaming


def _quantize(
    config: TokenizerConfig, tokenizer: Tokenizer, embeddings: Artifact
) -> tuple[npt.NDArray[np.int64], float, torch.Tensor | None]:
    """Return the nearest codes [N, L] of all items, their reconstruction error, and the vectors if in memory."""
    if _streamed(config):
        codes, error = quantize.encode(tokenizer, embeddings.folder)
        return codes, error, None
    vectors = load_embeddings(embeddings.folder)
    tensor = encode_dataset(tokenizer, vectors, torch.device("cpu"))
    return tensor.numpy(), reconstruction_error(tokenizer, vectors, tensor, torch.device("cpu")), vectors


def job(run: RunConfig) -> Artifact:
    """Build the semantic IDs of a configuration."""
    return build_semantic_ids(run, ensure_item_vectors(run))
