"""What every training worker runs: the tokenizer and the generative model through `training.fit`.

Plain PyTorch in one process or in a process group; `on_ray/train.py` starts the group on Ray.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tiger.core.artifacts import open_artifact
from tiger.core.config import build as build_config
from tiger.core.errors import HealthError
from tiger.core.precision import Shapes
from tiger.core.storage import Folder
from tiger.data.catalog import Catalog
from tiger.data.histories import Histories
from tiger.metrics.ranking import ranking, target_ranks
from tiger.models.recommender import load_text_embeddings
from tiger.models.tiger.batches import SequenceExamples, TargetExamples, pad_histories, user_token_ids
from tiger.models.tiger.beam_search import beam_search
from tiger.models.tiger.model import ModelConfig, TigerModel
from tiger.semantic_ids.assignment import SemanticIds
from tiger.semantic_ids.trie import Trie
from tiger.training import loop as training
from tiger.training.loop import Callbacks, FitResult, Schedule
from tiger.training.weights import save_training_result


def fit_model(
    config: ModelConfig,
    histories: Histories,
    ids: SemanticIds,
    *,
    device: torch.device,
    vectors: Tensor | None = None,
    hooks: Callbacks | None = None,
) -> tuple[TigerModel, FitResult]:
    """Trains the generative model; the checkpoint is chosen by NDCG@10 of beam search on validation users.

    Args:
        vectors: float32 [items, d] text embeddings, for a model with a dense head.

    Raises:
        HealthError: the targets are not those of the training parts, or the loss is not finite.
    """
    torch.manual_seed(config.seed)
    model = TigerModel(config, ids.level_sizes, vectors).to(device)
    training.broadcast(model)
    examples: TargetExamples | SequenceExamples
    if config.encoder == "causal":
        examples = SequenceExamples(histories, ids, config.max_history_items, bool(config.dense))
    else:
        examples = TargetExamples(histories, ids, config.max_history_items, config.num_user_tokens, bool(config.dense))
    if len(examples) != histories.training_examples():
        raise HealthError(
            f"the model would train on {len(examples)} targets, the training parts have "
            f"{histories.training_examples()}: a leak of what it is held against, or lost examples"
        )
    trie = Trie(ids).to(device)
    users = histories.evaluation("valid")
    chosen = np.random.default_rng(config.seed).permutation(len(users))[: config.training.validation_users]
    users = users.take(np.sort(chosen))
    lengths = np.minimum(users.end - users.begin, config.max_history_items)
    own = np.argsort(lengths, kind="stable")[training.rank() :: training.world_size()]
    tokens = user_token_ids(histories.source_ids, config.num_user_tokens) if config.num_user_tokens else None

    def validate(module: nn.Module) -> dict[str, float]:
        ranks = np.zeros(len(users), np.int64)
        with torch.no_grad():
            keys = model.item_embeddings() if config.dense else None
        for rows in np.array_split(own, max(1, len(own) // 128)) if len(own) else ():  # fewer users than workers
            begins = np.maximum(users.begin[rows], users.end[rows] - config.max_history_items)
            history = pad_histories(users.items, begins, users.end[rows], examples.codes).to(device)
            token = None if tokens is None else torch.from_numpy(tokens[users.users[rows]]).to(device)
            items, _ = beam_search(model, trie, history, beam=config.training.validation_beam, keys=keys, user=token)
            ranks[rows] = target_ranks(items.cpu().numpy(), users.targets[rows])
        shared = training.all_reduce_sum(torch.from_numpy(ranks).to(device)).cpu().numpy()
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


def model_shapes(config: ModelConfig, model: TigerModel) -> Shapes:
    """Return the sizes of a training step of this worker; histories fill half of their places, about."""
    length = max(1, config.max_history_items * model.tokens_per_item // 2)
    per_example = len(model.level_sizes) if model.fast else length
    return Shapes(
        rows=max(1, config.training.batch_size // training.world_size()) * per_example,
        width=config.d_model or 0,
        hidden=config.d_ff or 0,
        heads=config.num_heads or 0,
        head_dim=config.head_dim or 0,
        length=length,
    )


def model_worker(arguments: dict[str, Any], device: torch.device, hooks: Callbacks) -> dict[str, Any]:
    """A worker's part of the model stage.

    Args:
        arguments: `config` (values of the model's configuration), `catalog`, `semantic_ids` and `target` (URIs).
    """
    config = build_config(ModelConfig, arguments["config"])
    histories = Catalog(open_artifact(arguments["catalog"])).histories
    artifact = open_artifact(arguments["semantic_ids"])
    vectors = load_text_embeddings(config, artifact)
    model, result = fit_model(
        config, histories, SemanticIds.read(artifact.folder), device=device, vectors=vectors, hooks=hooks
    )
    return save_training_result(model, result, Folder(arguments["target"]))
