"""Training of a tokenizer on embeddings, and encoding of items with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from tiger.core.artifacts import open_artifact
from tiger.core.errors import HealthError
from tiger.core.storage import Folder
from tiger.embedding.vectors import map_embeddings
from tiger.metrics.codes import code_metrics
from tiger.tokenizers.base import Tokenizer, TokenizerConfig, build, check_codebook_size
from tiger.training import loop as training
from tiger.training.job import TrainingJob
from tiger.training.loop import Batch, Callbacks, FitResult
from tiger.training.weights import load_weights, save_training_result

_CHUNK = 65_536
_VALIDATION_CHUNK = 4_096  # rows; sized to fit the CPU cache: validation is 20% faster


Judge = Callable[[npt.NDArray[np.int64], dict[str, float]], dict[str, float]]


def fit_tokenizer(
    config: TokenizerConfig,
    vectors: Tensor,
    *,
    device: torch.device,
    hooks: Callbacks | None = None,
    judge: Judge | None = None,
    start: Folder | None = None,
) -> tuple[Tokenizer, FitResult]:
    """Train a tokenizer on embeddings float32 [N, d], equal on every worker, which may be mapped from a file.

    Args:
        config: options of the tokenizer.
        vectors: float32 [N, d].
        device: where to compute.
        hooks: callbacks for metrics and checkpoints.
        judge: (codes [N, L], validation metrics) -> further metrics, whose `objective` is maximized to choose the best
            weights. By default it is the negative reconstruction error.
        start: folder of a trained tokenizer of the same sizes to continue from, in place of an initialization: its
            codes keep their meaning.

    Raises:
        ConfigError: the codebook is larger than the catalog.
        HealthError: a vector or the loss is not finite.
    """
    check_codebook_size(config, len(vectors))
    finite = torch.cat([torch.isfinite(chunk).all(dim=1) for chunk in vectors.split(_CHUNK)])
    if len(bad := (~finite).nonzero().flatten()):
        raise HealthError(f"embeddings of {len(bad)} items are not finite, including {bad[:5].tolist()}; embed again")
    torch.manual_seed(config.seed)
    tokenizer = build(config, vectors.shape[1]).to(device)
    generator = torch.Generator().manual_seed(config.seed)
    sample = vectors[torch.randperm(len(vectors), generator=generator)[: config.kmeans_sample]].to(device)
    if start is None:
        tokenizer.fit_normalizer(sample)
    else:
        load_weights(tokenizer, start)
    sample = tokenizer.standardize(sample)
    if start is None and training.rank() == 0:
        tokenizer.initialize(sample, generator)
    training.broadcast(tokenizer)
    schedule = config.training.schedule(len(vectors), config.seed)

    mean, scale = tokenizer.mean.cpu(), tokenizer.scale.cpu()

    def standardize(rows: Tensor) -> Tensor:
        """Standardize some rows at a time, on the CPU: a copy of all would take as much memory as the vectors."""
        return (rows - mean) / scale

    def on_epoch_start(epoch: int) -> None:
        if (
            epoch
            and epoch % tokenizer.codebook_update_every == 0
            and epoch <= tokenizer.codebook_update_until * config.training.epochs
        ):
            if training.rank() == 0:
                tokenizer.refresh(sample)
            training.broadcast(tokenizer)

    def batches(epoch: int) -> Iterator[Batch]:
        order = torch.from_numpy(np.random.default_rng([config.seed, epoch]).permutation(len(vectors)))
        for rows in order.split(config.training.batch_size):
            own, weights = training.share(rows)
            yield Batch((standardize(vectors.index_select(0, own)),), weights, float(len(rows)))

    result = training.fit(
        tokenizer,
        batches,
        schedule,
        device=device,
        validate=_validation(config, tokenizer, vectors, device, judge),
        objective="objective",
        on_epoch_start=on_epoch_start,
        hooks=hooks,
        name="tokenizer",
    )
    return tokenizer.eval(), result


def _validation(
    config: TokenizerConfig, tokenizer: Tokenizer, vectors: Tensor, device: torch.device, judge: Judge | None
) -> Callable[[nn.Module], dict[str, float]]:
    """Return the function that `fit` validates with: the reconstruction error and metrics of all codes.

    Every worker encodes its part of the vectors.
    """

    def validate(module: nn.Module) -> dict[str, float]:
        codes = torch.zeros(len(vectors), tokenizer.levels, dtype=torch.int32)
        error = torch.zeros(1, dtype=torch.float64)
        with torch.no_grad():
            for begin in range(0, len(vectors), _VALIDATION_CHUNK * training.world_size()):
                begin += _VALIDATION_CHUNK * training.rank()
                chunk = tokenizer.standardize(vectors[begin : begin + _VALIDATION_CHUNK].to(device))
                if len(chunk):
                    found = tokenizer.encode_normalized(chunk)
                    codes[begin : begin + len(chunk)] = found.cpu()
                    error += float((tokenizer.decode_normalized(found) - chunk).square().sum())
        shared = [training.all_reduce_sum(tensor.to(device)).cpu() for tensor in (codes, error)]
        codes, error = shared
        metrics = {"reconstruction_error": float(error) / vectors.numel()}
        metrics |= code_metrics(codes.numpy(), config.codebook_size)
        metrics["objective"] = -metrics["reconstruction_error"]
        return metrics | (judge(codes.numpy().astype(np.int64), metrics) if judge else {})

    return validate


def encode_dataset(tokenizer: Tokenizer, vectors: Tensor, device: torch.device) -> Tensor:
    """Return the codes int64 [N, L] of all vectors, on the CPU."""
    was_training = tokenizer.training
    tokenizer.eval()
    codes = torch.cat([tokenizer.encode(chunk.to(device)).cpu() for chunk in vectors.split(_CHUNK)])
    tokenizer.train(was_training)
    return codes


def reconstruction_error(tokenizer: Tokenizer, vectors: Tensor, codes: Tensor, device: torch.device) -> float:
    """Return the mean squared error of codes [N, L], normalized by the variance: 1 if all are decoded to the mean."""
    chunks = zip(vectors.split(_CHUNK), codes.split(_CHUNK), strict=True)
    errors = torch.cat([tokenizer.errors(v.to(device), c.to(device)).cpu() for v, c in chunks])
    return float(errors.mean()) / vectors.shape[1]


@dataclass(frozen=True)
class TokenizerJob(TrainingJob):
    """Training of a tokenizer on the embeddings of an artifact; the weights are written to `target`."""

    config: TokenizerConfig
    embeddings: Folder
    target: Folder
    start: Folder | None = None

    def run(self, device: torch.device, callbacks: Callbacks) -> dict[str, Any]:
        """Train; return the best validation metrics."""
        vectors = map_embeddings(open_artifact(self.embeddings).folder)
        tokenizer, result = fit_tokenizer(self.config, vectors, device=device, hooks=callbacks, start=self.start)
        return save_training_result(tokenizer, result, self.target)


def load_tokenizer(config: TokenizerConfig, folder: Folder, dim: int) -> Tokenizer:
    """Load the trained tokenizer in a folder, in eval mode, for embeddings of dimension `dim`."""
    tokenizer = build(config, dim)
    load_weights(tokenizer, folder)
    return tokenizer.eval()
