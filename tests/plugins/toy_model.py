"""An example of a trained model family: the product of two embeddings scores what comes after the last item."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from tiger.data.histories import sample_users
from tiger.metrics.ranking import ranking, target_ranks
from tiger.models.base import ModelConfig, ModelData, ModelTraining
from tiger.models.recommender import Recommender, Rows
from tiger.models.scoring import ScoringRecommender
from tiger.training import loop as training
from tiger.training.loop import Batch, Callbacks, FitResult


class Training(ModelTraining):
    """How the embeddings are trained."""

    epochs: int = Field(10, ge=1, description="passes over all targets")
    learning_rate: float = Field(0.05, gt=0, description="AdamW's peak learning rate")


class Config(ModelConfig):
    """Size of the embeddings, and their training."""

    kind: str = Field("tests.plugins.toy_model", description="product of two embeddings")
    embedding_dim: int = Field(16, ge=1, description="of both embeddings")
    training: Training = Training()


class NextItem(nn.Module):
    """One embedding of the last item, one of the next."""

    def __init__(self, config: Config, num_items: int) -> None:
        super().__init__()
        self.last = nn.Embedding(num_items, config.embedding_dim)
        self.next = nn.Embedding(num_items, config.embedding_dim)

    def logits(self, last: Tensor) -> Tensor:
        """Return the logits of all items, float32 [B, items], after last items int64 [B]."""
        return self.last(last) @ self.next.weight.T

    def forward(self, last: Tensor, target: Tensor) -> Tensor:
        """Return the loss of each row, float32 [B]."""
        return F.cross_entropy(self.logits(last), target, reduction="none")


class NextItemRecommender(ScoringRecommender):
    """Ranks items by their logits after the last item."""

    def __init__(self, module: NextItem, data: ModelData, device: torch.device) -> None:
        super().__init__(data, device)
        self.module = module.to(device).eval()

    @torch.inference_mode()
    def scores(self, histories: list[Rows]) -> npt.NDArray[Any]:
        """Return logits, float32 [B, items]."""
        last = torch.tensor([history[-1] for history in histories], device=self.device)
        return self.module.logits(last).cpu().numpy()


def build(config: Config, data: ModelData) -> NextItem:
    """Return the model before training."""
    return NextItem(config, data.num_items)


def recommender(module: NextItem, config: Config, data: ModelData, device: torch.device) -> Recommender:
    """Return the trained model, ready to recommend."""
    return NextItemRecommender(module, data, device)


def train(
    module: NextItem, config: Config, data: ModelData, *, device: torch.device, callbacks: Callbacks | None = None
) -> FitResult:
    """Train on all pairs of an item and the next one in the training parts, on one worker or several."""
    training.broadcast(module.to(device))  # equal weights on all workers
    targets = data.histories.training_target_positions()
    last, following = (torch.from_numpy(data.histories.items[at].astype(np.int64)) for at in (targets - 1, targets))
    users = sample_users(data.histories.evaluation("valid"), config.training.validation_users, config.seed)

    def batches(epoch: int) -> Iterator[Batch]:
        order = torch.from_numpy(np.random.default_rng([config.seed, epoch]).permutation(len(targets)))
        for rows in order.split(config.training.batch_size):
            own, weights = training.share(rows)  # this worker's
            yield Batch((last[own], following[own]), weights, float(len(rows)))

    def validate(model: nn.Module) -> dict[str, float]:
        found = NextItemRecommender(module, data, device).recommend(users.histories(), k=10, exclude_seen=False)
        return ranking(target_ranks(found.items, users.targets), cutoffs=(10,))

    schedule = config.training.schedule(len(targets), config.seed)
    return training.fit(
        module, batches, schedule, device=device, validate=validate, objective="ndcg@10", hooks=callbacks, name="toy"
    )
