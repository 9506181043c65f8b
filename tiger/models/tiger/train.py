"""Train the generative model with `training.fit`: what every training worker runs.

Plain PyTorch in one process or in a process group; `on_ray/train.py` starts the group on Ray.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from tiger.core.errors import HealthError
from tiger.core.precision import Shapes
from tiger.data.histories import Histories, sample_users
from tiger.metrics.ranking import ranking, target_ranks
from tiger.models.base import ModelData
from tiger.models.sampling import hash_users
from tiger.models.tiger.batches import make_examples, pad_histories
from tiger.models.tiger.beam_search import beam_search
from tiger.models.tiger.config import TigerConfig
from tiger.models.tiger.model import TigerModel
from tiger.semantic_ids.trie import Trie
from tiger.training import loop as training
from tiger.training.loop import Callbacks, FitResult, Schedule

log = logging.getLogger(__name__)


def train(
    model: TigerModel, config: TigerConfig, data: ModelData, *, device: torch.device, callbacks: Callbacks | None = None
) -> FitResult:
    """Train the generative model; the best weights are chosen by NDCG@10 of beam search on validation users.

    Raises:
        HealthError: the targets are not those of the training parts, or the loss is not finite.
    """
    histories = data.histories
    trie = model.trie if device.type == "cpu" else Trie(data.semantic_ids)  # on the CPU, for the batches
    known_nodes = model.set_training_counts(torch.from_numpy(histories.training_counts(data.num_items)))
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
        hooks=callbacks,
        name="model",
        shapes=model_shapes(config, model),
    )
    references = reference_losses(trie, histories.training_target_counts(data.num_items))
    if training.rank() == 0:
        log.info("%s", _losses_by_level(result.log[-1], references))
    return replace(result, extra={"reference_losses": references})


def validation(config: TigerConfig, model: TigerModel, histories: Histories, device: torch.device) -> Any:
    """Return the function that `fit` validates with: beam search for a sample of validation users."""
    users = sample_users(histories.evaluation("valid"), config.training.validation_users, config.seed)
    context, beam = config.context_items, config.training.validation_beam
    lengths = np.minimum(users.end - users.begin, context)
    own = np.argsort(lengths, kind="stable")[training.rank() :: training.world_size()]
    tokens = hash_users(histories.source_ids, config.num_user_tokens) if config.num_user_tokens else None

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


def reference_losses(trie: Trie, targets: npt.NDArray[np.int64]) -> dict[str, list[float]]:
    """Return the loss by level of two models that know no history, to compare a training with.

    `uniform` gives the existing children of a node equal probability, `popularity` their number of targets plus one.

    Args:
        targets: int64 [items], how often each item is a target of training.
    """
    items = np.flatnonzero(targets)
    paths, weights = trie.paths.numpy()[items].astype(np.int64), targets[items]
    uniform, popularity = [], []
    parents = np.zeros(len(items), np.int64)
    for level in range(trie.depth):
        first_child = trie.first_child(level).numpy()
        children = np.diff(first_child)[parents]
        counts = np.bincount(paths[:, level], weights, trie.num_nodes[level]).astype(np.int64) + 1
        below = np.concatenate([[0], np.cumsum(counts)])
        total = (below[first_child[1:]] - below[first_child[:-1]])[parents]
        uniform.append(float(np.average(np.log(children), weights=weights)))
        popularity.append(float(np.average(np.log(total / counts[paths[:, level]]), weights=weights)))
        parents = paths[:, level]
    return {"uniform": uniform, "popularity": popularity}


def model_shapes(config: TigerConfig, model: TigerModel) -> Shapes:
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


def _losses_by_level(last: dict[str, Any], references: dict[str, list[float]]) -> str:
    """Return the last losses of training by level, next to those of models that know no history."""
    losses = {"training": [value for name, value in last.items() if name.startswith("loss@")]} | references
    rows = (f"  {name:<11}" + "".join(f"{loss:>8.3f}" for loss in row) for name, row in losses.items())
    return "loss by level\n" + "\n".join(rows)
