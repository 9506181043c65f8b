"""What every training worker runs: the tokenizer and the generative model through `training.fit`.

Plain PyTorch in one process or in a process group; `scale/train.py` starts the group on Ray.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from tiger import sasrec, training
from tiger.artifacts import Folder, open_artifact
from tiger.catalog import Catalog, Histories
from tiger.config import build as build_config
from tiger.decoding import beam_search
from tiger.diagnostics import code_figures
from tiger.embedding import read_vectors
from tiger.errors import HealthError
from tiger.examples import Examples, Sequences, hash_users, pad_histories
from tiger.metrics import ranking, target_ranks
from tiger.model import GenerativeRecommender, ModelConfig
from tiger.precision import Shapes
from tiger.recommender import WEIGHTS, load_weights, text_vectors
from tiger.sasrec import SASRecConfig
from tiger.semantic_ids import SemanticIds
from tiger.tokenizers import Tokenizer, TokenizerConfig, build, require_enough_items
from tiger.training import Batch, FitResult, Hooks, Schedule
from tiger.trie import Trie

_CHUNK = 65_536
_LOOK_CHUNK = 4_096  # activations of so many rows stay in a CPU's cache: a look takes a fifth less


Judge = Callable[[npt.NDArray[np.int64], dict[str, float]], dict[str, float]]


def learn_tokenizer(
    config: TokenizerConfig,
    vectors: Tensor,
    *,
    device: torch.device,
    hooks: Hooks | None = None,
    judge: Judge | None = None,
) -> tuple[Tokenizer, FitResult]:
    """Trains a tokenizer on embeddings float32 [N, d], the same on every worker.

    Args:
        judge: (codes [N, L], figures of a look) -> further figures; its `objective` chooses the checkpoint. By default
            that is the reconstruction error, the less the better.

    Raises:
        ConfigError: the codebook is larger than the catalog.
        HealthError: a vector or the loss is not finite.
    """
    require_enough_items(config, len(vectors))
    if len(bad := (~torch.isfinite(vectors).all(dim=1)).nonzero().flatten()):
        raise HealthError(
            f"embeddings of {len(bad)} items are not finite, of {bad[:5].tolist()} among them; embed again"
        )
    torch.manual_seed(config.seed)
    tokenizer = build(config, vectors.shape[1]).to(device)
    generator = torch.Generator().manual_seed(config.seed)
    sample = vectors[torch.randperm(len(vectors), generator=generator)[: config.kmeans_sample]].to(device)
    tokenizer.fit_statistics(sample)
    sample = tokenizer.standardize(sample)
    if training.rank() == 0:
        tokenizer.initialize(sample, generator)
    training.broadcast(tokenizer)
    schedule = config.training.schedule(len(vectors), config.seed)
    standardized = torch.cat([tokenizer.standardize(chunk.to(device)).cpu() for chunk in vectors.split(_CHUNK)])

    def begin_epoch(epoch: int) -> None:
        if epoch and epoch % tokenizer.refresh_every == 0 and epoch <= tokenizer.refresh_until * config.training.epochs:
            if training.rank() == 0:
                tokenizer.refresh(sample)
            training.broadcast(tokenizer)

    def batches(epoch: int) -> Iterator[Batch]:
        order = torch.from_numpy(np.random.default_rng([config.seed, epoch]).permutation(len(vectors)))
        for rows in order.split(config.training.batch_size):
            own, weights = training.share(rows)
            yield Batch((standardized.index_select(0, own),), weights, float(len(rows)))

    def validate(module: nn.Module) -> dict[str, float]:
        found, error = [], 0.0
        with torch.no_grad():
            for chunk in standardized.split(_LOOK_CHUNK):
                found.append(tokenizer.encode_standardized(chunk.to(device)))
                error += float((tokenizer.decode_standardized(found[-1]) - chunk.to(device)).square().sum())
        codes = torch.cat(found).cpu()
        figures = {"reconstruction_error": error / vectors.numel()} | code_figures(codes.numpy(), config.codebook_size)
        figures["objective"] = -figures["reconstruction_error"]
        return figures | (judge(codes.numpy(), figures) if judge else {})

    result = training.fit(
        tokenizer,
        batches,
        schedule,
        device=device,
        validate=validate,
        objective="objective",
        begin_epoch=begin_epoch,
        hooks=hooks,
        name="tokenizer",
    )
    return tokenizer.eval(), result


def encode_all(tokenizer: Tokenizer, vectors: Tensor, device: torch.device) -> Tensor:
    """Codes int64 [N, L] of all vectors, on the CPU."""
    was_training = tokenizer.training
    tokenizer.eval()
    codes = torch.cat([tokenizer.encode(chunk.to(device)).cpu() for chunk in vectors.split(_CHUNK)])
    tokenizer.train(was_training)
    return codes


def reconstruction_error(tokenizer: Tokenizer, vectors: Tensor, codes: Tensor, device: torch.device) -> float:
    """Mean squared error of codes [N, L] relative to the variance of the embeddings: 1 is what their mean reaches."""
    chunks = zip(vectors.split(_CHUNK), codes.split(_CHUNK), strict=True)
    errors = torch.cat([tokenizer.errors(v.to(device), c.to(device)).cpu() for v, c in chunks])
    return float(errors.mean()) / vectors.shape[1]


def learn_model(
    config: ModelConfig,
    histories: Histories,
    ids: SemanticIds,
    *,
    device: torch.device,
    vectors: Tensor | None = None,
    hooks: Hooks | None = None,
) -> tuple[GenerativeRecommender, FitResult]:
    """Trains the generative model; the checkpoint is chosen by NDCG@10 of beam search on validation users.

    Args:
        vectors: float32 [items, d] text embeddings, for a model with a dense head.

    Raises:
        HealthError: the targets are not those of the training parts, or the loss is not finite.
    """
    torch.manual_seed(config.seed)
    model = GenerativeRecommender(config, ids.level_sizes, vectors).to(device)
    training.broadcast(model)
    examples: Examples | Sequences
    if config.mode == "fast":
        examples = Sequences(histories, ids, config.max_items, bool(config.dense))
    else:
        examples = Examples(histories, ids, config.max_items, config.user_tokens, bool(config.dense))
    if len(examples) != histories.training_examples():
        raise HealthError(
            f"the model would train on {len(examples)} targets, the training parts have "
            f"{histories.training_examples()}: a leak of what it is held against, or lost examples"
        )
    trie = Trie(ids).to(device)
    users = histories.evaluation("valid")
    chosen = np.random.default_rng(config.seed).permutation(len(users))[: config.validation_users]
    users = users.take(np.sort(chosen))
    lengths = np.minimum(users.end - users.begin, config.max_items)
    own = np.argsort(lengths, kind="stable")[training.rank() :: training.world_size()]
    tokens = hash_users(histories.source_ids, config.user_tokens) if config.user_tokens else None

    def validate(module: nn.Module) -> dict[str, float]:
        ranks = np.zeros(len(users), np.int64)
        with torch.no_grad():
            keys = model.item_keys() if config.dense else None
        for rows in np.array_split(own, max(1, len(own) // 128)) if len(own) else ():  # fewer users than workers
            begins = np.maximum(users.begin[rows], users.end[rows] - config.max_items)
            history = pad_histories(users.items, begins, users.end[rows], examples.codes).to(device)
            token = None if tokens is None else torch.from_numpy(tokens[users.users[rows]]).to(device)
            items, _ = beam_search(model, trie, history, beam=config.validation_beam, keys=keys, user=token)
            ranks[rows] = target_ranks(items.cpu().numpy(), users.targets[rows])
        shared = training.all_sum(torch.from_numpy(ranks).to(device)).cpu().numpy()
        return ranking(shared, cutoffs=(10,))

    result = training.fit(
        model,
        lambda epoch: examples.batches(config.seed, epoch, config.training.batch_size),
        Schedule(config.training, examples.steps_per_epoch(config.training.batch_size), config.seed),
        device=device,
        validate=validate,
        objective="ndcg@10",
        hooks=hooks,
        name="model",
        shapes=model_shapes(config, model),
    )
    return model.eval(), result


def model_shapes(config: ModelConfig, model: GenerativeRecommender) -> Shapes:
    """Return the sizes of a training step of this worker; histories fill half of their places, about."""
    length = max(1, config.max_items * model.item_width // 2)
    per_example = len(model.level_sizes) if model.fast else length
    return Shapes(
        rows=max(1, config.training.batch_size // training.world_size()) * per_example,
        width=config.d_model or 0,
        hidden=config.d_ff or 0,
        heads=config.heads or 0,
        head_dim=config.head_dim or 0,
        length=length,
    )


def tokenizer_worker(arguments: dict[str, Any], device: torch.device, hooks: Hooks) -> dict[str, Any]:
    """A worker's part of the tokenizer stage.

    Args:
        arguments: `config` (values of the tokenizer's configuration), `embeddings` and `target` (URIs).
    """
    config = TokenizerConfig.resolve(arguments["config"])
    vectors = read_vectors(open_artifact(arguments["embeddings"]).folder)
    tokenizer, result = learn_tokenizer(config, vectors, device=device, hooks=hooks)
    return _leave(tokenizer, result, Folder(arguments["target"]))


def model_worker(arguments: dict[str, Any], device: torch.device, hooks: Hooks) -> dict[str, Any]:
    """A worker's part of the model stage.

    Args:
        arguments: `config` (values of the model's configuration), `catalog`, `semantic_ids` and `target` (URIs).
    """
    config = build_config(ModelConfig, arguments["config"])
    histories = Catalog(open_artifact(arguments["catalog"])).histories
    artifact = open_artifact(arguments["semantic_ids"])
    vectors = text_vectors(config, artifact)
    model, result = learn_model(
        config, histories, SemanticIds.read(artifact.folder), device=device, vectors=vectors, hooks=hooks
    )
    return _leave(model, result, Folder(arguments["target"]))


def _leave(module: nn.Module, result: FitResult, target: Folder) -> dict[str, Any]:
    """Rank 0 writes weights and the log of the training; returns the figures of the best look."""
    if training.rank() == 0:
        write_weights(module, target)
        target.write_bytes("metrics.jsonl", "".join(json.dumps(look) + "\n" for look in result.log).encode())
    steps = {"best_step": result.best_step, "steps": result.steps, "stopped_early": result.stopped_early}
    return result.best | steps | result.precision.figures()


def sasrec_worker(arguments: dict[str, Any], device: torch.device, hooks: Hooks) -> dict[str, Any]:
    """A worker's part of the baseline.

    Args:
        arguments: `config` (values of the baseline's configuration), `catalog` and `target` (URIs).
    """
    catalog = Catalog(open_artifact(arguments["catalog"]))
    config = build_config(SASRecConfig, arguments["config"])
    model, result = sasrec.learn(config, catalog.histories, catalog.n_items, device=device, hooks=hooks)
    return _leave(model, result, Folder(arguments["target"]))


def write_weights(module: nn.Module, target: Folder) -> None:
    """All parameters and buffers, as safetensors."""
    target.write_tensors(WEIGHTS, module.state_dict())


def load_tokenizer(config: TokenizerConfig, folder: Folder, dim: int) -> Tokenizer:
    """The trained tokenizer in a folder, ready to encode embeddings of dimension `dim`."""
    tokenizer = build(config, dim)
    load_weights(tokenizer, folder)
    return tokenizer.eval()
