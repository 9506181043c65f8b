"""Train the generative model with `training.fit`: what every training worker runs.

Plain PyTorch in one process or in a process group; `on_ray/train.py` starts the group on Ray.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tiger.core.artifacts import open_artifact
from tiger.core.errors import HealthError
from tiger.core.precision import Shapes
from tiger.core.storage import Folder
from tiger.data.catalog import Catalog
from tiger.data.histories import Histories
from tiger.metrics.ranking import ranking, target_ranks
from tiger.models.recommender import load_text_embeddings
from tiger.models.tiger.batches import make_examples, pad_histories, user_token_ids
from tiger.models.tiger.beam_search import beam_search
from tiger.models.tiger.config import ModelConfig
from tiger.models.tiger.model import TigerModel
from tiger.semantic_ids.assignment import SemanticIds
from tiger.semantic_ids.trie import Trie
from tiger.training import loop as training
from tiger.training.job import TrainingJob
from tiger.training.loop import Callbacks, FitResult, Schedule
from tiger.training.weights import save_training_result

log = logging.getLogger(__name__)


def fit_model(
    config: ModelConfig,
    histories: Histories,
    ids: SemanticIds,
    *,
    device: torch.device,
    vectors: Tensor | None = None,
    hooks: Callbacks | None = None,
) -> tuple[TigerModel, FitResult]:
    """Train the generative model; the best weights are chosen by NDCG@10 of beam search on validation users.

    Args:
        vectors: floating-point [items, d] text embeddings, for softmax = trie.

    Raises:
        HealthError: the targets are not those of the training parts, or the loss is not finite.
    """
    torch.manual_seed(config.seed)
    trie = Trie(ids)
    model = TigerModel(config, Trie(ids), vectors)
    known_nodes = model.set_training_counts(torch.from_numpy(histories.training_counts(len(ids))))
    model = model.to(device)
    training.broadcast(model)
    examples = make_examples(histories, config, trie, known_nodes)
    if len(examples) != histories.training_examples():
        raise HealthError(
            f"the model would train on {len(examples)} targets, the training parts have "
            f"{histories.training_examples()}: targets of validation or test have leaked in, or examples are lost"
        )
    result = training.fit(
        model,
        lambda epoch: examples.batches(config.seed, epoch, config.training.batch_size),
        Schedule(config.training, examples.steps_per_epoch(config.training.batch_size), config.seed),
        device=device,
        validate=validation(config, model, histories, device),
        objective="ndcg@10",
        hooks=hooks,
        name="model",
        shapes=model_shapes(config, model),
    )
    return model.eval(), result


def validation(config: ModelConfig, model: TigerModel, histories: Histories, device: torch.device) -> Any:
    """Return the function that `fit` validates with: beam search for a sample of validation users."""
    users = histories.evaluation("valid")
    chosen = np.random.default_rng(config.seed).permutation(len(users))[: config.training.validation_users]
    users = users.take(np.sort(chosen))
    context, beam = config.context_items, config.training.validation_beam
    lengths = np.minimum(users.end - users.begin, context)
    own = np.argsort(lengths, kind="stable")[training.rank() :: training.world_size()]
    tokens = user_token_ids(histories.source_ids, config.num_user_tokens) if config.num_user_tokens else None

    def validate(module: nn.Module) -> dict[str, float]:
        ranks = np.zeros(len(users), np.int64)
        with torch.no_grad():
            node_vectors = model.node_vectors()
        for rows in np.array_split(own, max(1, len(own) // 128)) if len(own) else ():  # fewer users than workers
            begins = np.maximum(users.begin[rows], users.end[rows] - context)
            history = pad_histories(users.items, begins, users.end[rows]).to(device)
            token = None if tokens is None else torch.from_numpy(tokens[users.users[rows]]).to(device)
            items, _ = beam_search(model, history, beam=beam, node_vectors=node_vectors, user=token)
            ranks[rows] = target_ranks(items.cpu().numpy(), users.targets[rows])
        shared = training.all_reduce_sum(torch.from_numpy(ranks).to(device)).cpu().numpy()
        return ranking(shared, cutoffs=(10,))

    return validate


def reference_losses(trie: Trie, targets: np.ndarray) -> dict[str, list[float]]:
    """Return the loss by level of two models that know no history, to compare a training with.

    `uniform` gives the existing children of a node equal probability, `popularity` their number of targets plus one.

    Args:
        targets: [T] target items of training.
    """
    paths = trie.paths.numpy()[targets].astype(np.int64)
    uniform, popularity = [], []
    parents = np.zeros(len(targets), np.int64)
    for level in range(trie.depth):
        first_child = trie.first_child(level).numpy()
        children = np.diff(first_child)[parents]
        counts = np.bincount(paths[:, level], minlength=trie.num_nodes[level]) + 1
        below = np.concatenate([[0], np.cumsum(counts)])
        total = (below[first_child[1:]] - below[first_child[:-1]])[parents]
        uniform.append(float(np.log(children).mean()))
        popularity.append(float(np.log(total / counts[paths[:, level]]).mean()))
        parents = paths[:, level]
    return {"uniform": uniform, "popularity": popularity}


def model_shapes(config: ModelConfig, model: TigerModel) -> Shapes:
    """Return the sizes of a training step of this worker; histories fill about half of their positions."""
    length = max(1, config.max_history_items * model.encoder.tokens_per_item // 2)
    per_example = model.trie.depth if model.encoder.causal else length
    return Shapes(
        rows=max(1, config.training.batch_size // training.world_size()) * per_example,
        width=config.d_model or 0,
        hidden=config.d_ff or 0,
        heads=config.num_heads or 0,
        head_dim=config.head_dim or 0,
        length=length,
    )


@dataclass(frozen=True)
class ModelJob(TrainingJob):
    """Training of the generative model on the artifacts of a catalog and its semantic IDs; written to `target`."""

    config: ModelConfig
    catalog: Folder
    semantic_ids: Folder
    target: Folder

    def run(self, device: torch.device, callbacks: Callbacks) -> dict[str, Any]:
        """Train; return the best validation metrics, and losses to compare with."""
        histories = Catalog(open_artifact(self.catalog)).histories
        artifact = open_artifact(self.semantic_ids)
        vectors = load_text_embeddings(self.config, artifact)
        model, result = fit_model(
            self.config, histories, SemanticIds.read(artifact.folder), device=device, vectors=vectors, hooks=callbacks
        )
        references = reference_losses(model.trie.cpu(), histories.training_targets())
        if training.rank() == 0:
            log.info("%s", _losses_by_level(result.log[-1], references))
        return save_training_result(model, result, self.target) | {"reference_losses": references}


def _losses_by_level(last: dict[str, Any], references: dict[str, list[float]]) -> str:
    """Return the last losses of training by level, next to those of models that know no history."""
    losses = {"training": [value for name, value in last.items() if name.startswith("loss@")]} | references
    rows = (f"  {name:<11}" + "".join(f"{loss:>8.3f}" for loss in row) for name, row in losses.items())
    return "loss by level\n" + "\n".join(rows)
