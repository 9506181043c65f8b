"""Train the tokenizer on the embeddings (Ray Train) and assign every item one unique tuple of codes.

With embedding.import_path=FILE.parquet (item_id, vector) and without data files (`data.kind`) it needs no catalog or
texts.
"""

from __future__ import annotations

import logging

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tiger.core.artifacts import Artifact, Draft, stage
from tiger.core.errors import ConfigError
from tiger.core.external_sort import FolderStore
from tiger.core.row_groups import read_row_groups
from tiger.core.storage import SCRATCH, Folder
from tiger.data.item_names import ITEMS
from tiger.embedding.vectors import load_embeddings, sample_embeddings
from tiger.evaluation.health import check_semantic_ids, check_tokenizer, require
from tiger.metrics.codes import code_metrics, unique_ratio
from tiger.models.warm_start import WarmStart
from tiger.on_ray.tasks import RayTasks
from tiger.on_ray.train import train
from tiger.pipeline.item_vectors import ensure_item_vectors
from tiger.run import RunConfig
from tiger.semantic_ids.assignment import SemanticIds, assign
from tiger.semantic_ids.growth import align_ids
from tiger.tokenizers import rkmeans
from tiger.tokenizers.append import other_codes, squared_errors
from tiger.tokenizers.base import Tokenizer, TokenizerConfig, suitable_codebook_size
from tiger.tokenizers.shards import Assigned, assign_shards, encode_shards
from tiger.tokenizers.streaming import fit_streamed
from tiger.tokenizers.train import TokenizerJob, encode_dataset, load_tokenizer, reconstruction_error
from tiger.training.weights import write_weights

log = logging.getLogger(__name__)

_MANY = 1_000_000  # prefixes, each a row of several tables of the model
_FEW_ITEMS = 4  # per code of the first level
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
    _warn_of_few_items_per_code(config, embeddings.metrics["items"])
    if _streamed(config):
        if start is not None:
            raise ConfigError("warm_start continues a tokenizer in memory; set tokenizer.streaming = false")
        assert isinstance(config, rkmeans.Config)
        write_weights(fit_streamed(config, embeddings.folder, RayTasks(draft.folder)), draft.folder)
        draft.metrics = {"precision": "float32"}
    else:
        worker_job = TokenizerJob(
            config, embeddings.folder, draft.folder, None if start is None else start.tokenizer.folder
        )
        draft.metrics = train(worker_job, draft.folder, run.scale, "tokenizer", batch_size=config.training.batch_size)
    tokenizer = load_tokenizer(config, draft.folder, embeddings.metrics["dimension"])
    if _fits_memory(run, embeddings):
        vectors = load_embeddings(embeddings.folder)
        found = encode_dataset(tokenizer, vectors, torch.device("cpu"))
        codes, error = found.numpy(), reconstruction_error(tokenizer, vectors, found, torch.device("cpu"))
    else:
        encoded = encode_shards(tokenizer, embeddings.folder, RayTasks(draft.folder))
        codes, error = encoded.codes, encoded.error
    draft.metrics |= {"reconstruction_error": error} | code_metrics(codes, config.codebook_size)
    with torch.no_grad():
        latents = tokenizer.latent(tokenizer.standardize(sample_embeddings(embeddings.folder, _HEALTH_SAMPLE)))
    draft.health = require(check_tokenizer(latents.numpy(), codes, config.codebook_size))


def _warn_of_few_items_per_code(config: TokenizerConfig, num_items: int) -> None:
    """Log a warning if most first codes will stand for a few items only, and name a suitable codebook."""
    if num_items < _FEW_ITEMS * config.codebook_size:
        log.warning(
            "tokenizer.codebook_size = %d is large for %s items: codes that few items share say little about other "
            "items; tokenizer.codebook_size=%d is suitable",
            config.codebook_size, f"{num_items:,}", suitable_codebook_size(num_items),
        )  # fmt: skip


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
    kept: dict[str, float] = {}
    if start is not None:
        assigned, kept = _align(run, start, trained, embeddings.folder)
    elif _fits_memory(run, embeddings):
        assigned = _assign_in_memory(run, trained, embeddings.folder)
    else:
        assigned = _assign_on_ray(run, trained, embeddings.folder, draft)
    ids = assigned.ids
    ids.write(draft.folder, read_row_groups(embeddings.folder, ITEMS, ["source_id"]))
    draft.metrics = {
        "items": len(ids),
        "codes_per_item": len(ids.level_sizes),
        "moved_items": assigned.moved,
        "largest_group": int(ids.collisions.max()) + 1,
        "unique_ratio_of_nearest_codes": assigned.unique_ratio_of_nearest_codes,
        "reconstruction_error": assigned.error,
        **code_metrics(ids.codes[:, : ids.levels], config.codebook_size),
        **kept,
    }
    if len(ids.level_sizes) > ids.levels and (prefixes := round(draft.metrics["unique_ratio"] * len(ids))) > _MANY:
        log.warning(
            "%s items share their codes, so that IDs have one more code, and the model holds a learned vector and a "
            "mean text for each of %s prefixes: a larger tokenizer.codebook_size avoids both",
            f"{int((ids.collisions > 0).sum()):,}",
            f"{prefixes:,}",
        )
    draft.health = require(check_semantic_ids(ids.collisions))


def _compared(ids: SemanticIds, nearest: npt.NDArray[np.integer], tokenizer: Tokenizer, vectors: Tensor) -> Assigned:
    """Return IDs and how they differ from the nearest codes [N, L] of vectors [N, d]."""
    codes = ids.codes[:, : ids.levels]
    assigned = torch.from_numpy(codes.astype(np.int64))
    error = reconstruction_error(tokenizer, vectors, assigned, torch.device("cpu"))
    return Assigned(ids, int((codes != nearest).any(axis=1).sum()), error, unique_ratio(nearest))


def _assign_in_memory(run: RunConfig, tokenizer: Tokenizer, embeddings: Folder) -> Assigned:
    vectors = load_embeddings(embeddings)
    codes = encode_dataset(tokenizer, vectors, torch.device("cpu")).numpy()
    costs = tokenizer.assignment_costs(vectors)
    ids = assign(codes, run.tokenizer.codebook_size, run.semantic_ids, costs)
    return _compared(ids, codes, tokenizer, vectors)


def _assign_on_ray(run: RunConfig, tokenizer: Tokenizer, embeddings: Folder, draft: Draft) -> Assigned:
    """Return what `_assign_in_memory` returns, by tasks that hold the vectors of some items each."""
    runner = RayTasks(draft.folder)
    scratch = draft.folder.child(f"{SCRATCH}/codes")
    scratch.delete()  # of an earlier attempt
    with_vectors = run.semantic_ids.collision_policy == "nearest_free"
    store = FolderStore(scratch)
    encoded = encode_shards(tokenizer, embeddings, runner, store, with_vectors)
    return assign_shards(tokenizer, encoded, run.semantic_ids, runner, store)


def _align(
    run: RunConfig, start: WarmStart, tokenizer: Tokenizer, embeddings: Folder
) -> tuple[Assigned, dict[str, float]]:
    """Return what `_assign_in_memory` returns, of IDs of which published ones stay as far as they fit, and how many."""
    vectors = load_embeddings(embeddings)
    codes = encode_dataset(tokenizer, vectors, torch.device("cpu")).numpy()
    published, before = start.published_ids(), start.items_of(embeddings)
    ids = align_ids(
        codes, published, before, run.semantic_ids, run.tokenizer.codebook_size,
        tokenizer.assignment_costs(vectors), lambda item: other_codes(tokenizer, vectors[item], codes[item]),
        lambda items, given: squared_errors(tokenizer, vectors[torch.from_numpy(items)], torch.from_numpy(given)),
    )  # fmt: skip
    known = np.flatnonzero(before >= 0)
    same = np.zeros(len(known), bool)
    if ids.level_sizes == published.level_sizes:
        same = (ids.codes[known] == published.codes[before[known]]).all(axis=1)
    kept = float(same.mean()) if len(known) else 0.0
    log.info("semantic_ids: %.1f %% of the %s published IDs stay", 100 * kept, f"{len(known):,}")
    return _compared(ids, codes, tokenizer, vectors), {"published_items": len(known), "kept_ids": kept}


def build_semantic_ids(run: RunConfig, vectors: Artifact) -> Artifact:
    """Return the semantic IDs of vectors: those of texts, or of texts and co-occurrence."""
    return assign_ids(run, train_tokenizer(run, vectors), vectors)


def _streamed(config: TokenizerConfig) -> bool:
    return isinstance(config, rkmeans.Config) and config.streaming


def _fits_memory(run: RunConfig, embeddings: Artifact) -> bool:
    """Return whether the vectors are encoded in this process rather than by tasks."""
    size = 4 * embeddings.metrics["items"] * embeddings.metrics["dimension"]
    return size <= run.scale.in_process_megabytes << 20 and not _streamed(run.tokenizer)


def job(run: RunConfig) -> Artifact:
    """Build the semantic IDs of a configuration."""
    return build_semantic_ids(run, ensure_item_vectors(run))
