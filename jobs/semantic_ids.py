"""Embeddings -> semantic IDs: trains the tokenizer on Ray Train, then gives every item one unique tuple of codes.

With embedding.vectors=FILE.parquet (item_id, vector) from anywhere it needs no catalog and no text.
"""

from __future__ import annotations

import torch

from jobs.command import command
from jobs.embed import embeddings_of
from tiger import artifacts, semantic_ids
from tiger.artifacts import Artifact, Draft
from tiger.diagnostics import check_semantic_ids, check_tokenizer, code_figures, require
from tiger.learning import encode_all, load_tokenizer, read_vectors, tokenizer_worker
from tiger.run import RunConfig
from tiger.scale.train import train


def train_tokenizer(run: RunConfig, embeddings: Artifact) -> Artifact:
    config = run.tokenizer

    def make(draft: Draft) -> None:
        arguments = {
            "config": config.model_dump(mode="json"),
            "embeddings": embeddings.folder.uri,
            "target": draft.folder.uri,
        }
        draft.figures = train(tokenizer_worker, arguments, draft.folder, run.scale, "tokenizer")
        vectors = read_vectors(embeddings.folder)
        tokenizer = load_tokenizer(config, draft.folder, vectors.shape[1])
        codes = encode_all(tokenizer, vectors, torch.device("cpu"))
        with torch.no_grad():
            latents = tokenizer.latent(vectors[:20_000])
        draft.health = require(check_tokenizer(latents.numpy(), codes.numpy(), config.codebook_size))

    return artifacts.build(run.root, "tokenizer", config, {"embeddings": embeddings}, make)


def assign_ids(run: RunConfig, tokenizer: Artifact, embeddings: Artifact) -> Artifact:
    def make(draft: Draft) -> None:
        vectors = read_vectors(embeddings.folder)
        trained = load_tokenizer(run.tokenizer, tokenizer.folder, vectors.shape[1])
        codes = encode_all(trained, vectors, torch.device("cpu")).numpy()
        costs = lambda items: trained.last_costs(vectors[items]).numpy()  # noqa: E731
        ids = semantic_ids.assign(codes, run.tokenizer.codebook_size, run.semantic_ids, costs)
        owner = embeddings.inputs.get("catalog", embeddings)
        ids.write(draft.folder, owner.folder.read_table("items.parquet", ["source_id"])["source_id"])
        nearest, assigned = code_figures(codes, run.tokenizer.codebook_size), ids.codes[:, : ids.levels]
        error = float(trained.errors(vectors, torch.from_numpy(assigned).long()).mean()) / vectors.shape[1]
        draft.figures = {
            "items": len(ids),
            "codes_per_item": len(ids.level_sizes),
            "moved_items": int((assigned != codes).any(axis=1).sum()),
            "largest_group": int(ids.collisions.max()) + 1,
            "unique_ratio_of_nearest_codes": nearest["unique_ratio"],
            "reconstruction_error": error,
            **code_figures(assigned, run.tokenizer.codebook_size),
        }
        draft.health = require(check_semantic_ids(ids.collisions))

    inputs = {"tokenizer": tokenizer, "embeddings": embeddings}
    return artifacts.build(run.root, "semantic_ids", run.semantic_ids, inputs, make)


def make_ids(run: RunConfig, embeddings: Artifact) -> Artifact:
    return assign_ids(run, train_tokenizer(run, embeddings), embeddings)


if __name__ == "__main__":
    command(__doc__, lambda run: make_ids(run, embeddings_of(run)))
