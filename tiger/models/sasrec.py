"""SASRec with full cross-entropy: the baseline that a user would pick instead (Kang and McAuley 2018; the loss over all
items after Klenitskiy and Vasilev 2023, which makes up for what was said to be behind newer models).

A causal transformer over item embeddings; the output of a position is compared with the embeddings of all items.
ID-only: it uses neither text nor codes, so a new item has no embedding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from tiger.core.artifacts import open_artifact
from tiger.core.config import Config
from tiger.core.precision import Shapes
from tiger.core.storage import Folder
from tiger.data.catalog import Catalog
from tiger.data.histories import Histories
from tiger.metrics.ranking import ranking, target_ranks
from tiger.models import sasrec
from tiger.training import loop as training
from tiger.training.job import TrainingJob
from tiger.training.loop import Batch, Callbacks, FitResult, TrainingConfig
from tiger.training.weights import save_training_result

_PAD = -1
_USERS_AT_ONCE = 512


class SASRecTraining(TrainingConfig):
    """How the baseline is trained."""

    epochs: int = Field(60, ge=1, description="passes over all users, at most")
    batch_size: int = Field(256, ge=1, description="users per step, over all workers")
    learning_rate: float = Field(1e-3, gt=0, description="AdamW's peak learning rate")
    warmup_steps: int = Field(100, ge=0, description="steps of linear warm-up, before a cosine to zero")
    validate_every_epochs: float = Field(2.0, gt=0, description="epochs between two validations")
    patience: int = Field(5, ge=1, description="validations without a better one before training stops")


class SASRecConfig(Config):
    """Shape of the baseline and its training."""

    embedding_dim: int = Field(128, ge=2, description="of item embeddings")
    num_layers: int = Field(2, ge=1, description="transformer layers")
    num_heads: int = Field(2, ge=1, description="attention heads")
    dropout: float = Field(0.5, ge=0, lt=1, description="on embeddings, attention and feed-forward")
    max_history_items: int = Field(50, ge=1, description="most recent items that are read")
    training: SASRecTraining = SASRecTraining()
    seed: int = Field(0, ge=0, description="seed of weights, dropout and order")


class SASRec(nn.Module):
    def __init__(self, config: SASRecConfig, n_items: int) -> None:
        super().__init__()
        self.max_items = config.max_history_items
        self.items = nn.Embedding(n_items, config.embedding_dim)
        self.positions = nn.Embedding(config.max_history_items, config.embedding_dim)
        nn.init.normal_(self.items.weight, std=0.02)
        nn.init.normal_(self.positions.weight, std=0.02)
        self.dropout = nn.Dropout(config.dropout)
        layer = nn.TransformerEncoderLayer(
            config.embedding_dim,
            config.num_heads,
            4 * config.embedding_dim,
            config.dropout,
            F.gelu,
            batch_first=True,
            norm_first=True,
        )
        self.layers = nn.TransformerEncoder(
            layer, config.num_layers, nn.LayerNorm(config.embedding_dim), enable_nested_tensor=False
        )

    def states(self, history: Tensor) -> Tensor:
        """Return the hidden state after each position, [B, N, M].

        Args:
            history: int64 [B, N], right-padded with -1, N at most `max_items`. The last item has the last position.
        """
        n_items = (history != _PAD).sum(1, keepdim=True)
        position = (self.max_items - n_items + torch.arange(history.shape[1], device=history.device)).clamp_max(
            self.max_items - 1
        )
        x_BNM = self.dropout(self.items(history.clamp_min(0)) + self.positions(position))
        mask = nn.Transformer.generate_square_subsequent_mask(history.shape[1], device=history.device)
        states: Tensor = self.layers(x_BNM, mask=mask, is_causal=True)
        return states

    def forward(self, sequence: Tensor, targets: Tensor | None = None) -> Tensor:
        """Loss of each row, float32 [B]: the cross-entropies of all its items but the first, summed.

        Args:
            sequence: int64 [B, N + 1], padded behind with -1.
            targets: int64 [targets of all rows], where they are among the B x N items after the first ones; without it
                they are looked for on the device, which has to be waited for.
        """
        target_BN = sequence[:, 1:]
        known_BN = target_BN != _PAD
        if targets is None:
            targets = known_BN.flatten().nonzero().squeeze(1)
        # Places are those of the history: the last item is a target only.
        states_BNM = self.states(torch.where(known_BN, sequence[:, :-1], _PAD))
        states, items = (x.flatten(0, 1).index_select(0, targets) for x in (states_BNM, target_BN.unsqueeze(2)))
        losses = F.cross_entropy(states @ self.items.weight.T, items.squeeze(1), reduction="none")
        return losses.new_zeros(target_BN.numel()).index_copy(0, targets, losses).view_as(target_BN).sum(1)

    @torch.inference_mode()
    def best(self, histories: Sequence[npt.NDArray[np.integer]], k: int) -> npt.NDArray[np.int64]:
        """The `k` items of highest score for each user, [U, k], best first."""
        device, lists = self.items.weight.device, []
        for begin in range(0, len(histories), _USERS_AT_ONCE):
            rows = [history[-self.max_items :] for history in histories[begin : begin + _USERS_AT_ONCE]]
            states = self.states(_padded(rows).to(device))
            last = torch.tensor([len(row) - 1 for row in rows], device=device)
            scores = states[torch.arange(len(rows), device=device), last] @ self.items.weight.T
            lists.append(scores.topk(min(k, scores.shape[1]), dim=1).indices.cpu().numpy())
        return np.concatenate(lists)


def learn(
    config: SASRecConfig, histories: Histories, n_items: int, *, device: torch.device, hooks: Callbacks | None = None
) -> tuple[SASRec, FitResult]:
    """Trains on the training parts of all histories; the checkpoint is chosen by NDCG@10 on validation.

    Raises:
        HealthError: the loss is not finite.
    """
    torch.manual_seed(config.seed)
    model = SASRec(config, n_items).to(device)
    training.broadcast(model)
    begins = np.maximum(histories.offsets[:-1], histories.train_end - config.max_history_items - 1)
    users = np.flatnonzero(histories.train_end - begins >= 2)
    lengths = (histories.train_end - begins)[users]
    schedule = config.training.schedule(len(users), config.seed)
    evaluation = histories.evaluation("valid")

    def batches(epoch: int) -> Iterator[Batch]:
        """Batches of similar lengths, in random order."""
        random = np.random.default_rng([config.seed, epoch])
        order = np.lexsort((random.random(len(users)), lengths))
        pieces = np.split(order, range(config.training.batch_size, len(order), config.training.batch_size))
        for piece in random.permutation(len(pieces)):
            rows = pieces[piece]
            own, weights = training.share(torch.from_numpy(rows))
            sequences = [histories.items[begins[u] : histories.train_end[u]] for u in users[own.numpy()]]
            padded = _padded(sequences)
            targets = (padded[:, 1:] != _PAD).flatten().nonzero().squeeze(1)
            yield Batch((padded, targets), weights, float((lengths[rows] - 1).sum()))

    def validate(module: nn.Module) -> dict[str, float]:
        ranks = np.zeros(len(evaluation), np.int64)
        own = np.arange(training.rank(), len(evaluation), training.world_size())
        if len(own):
            users = evaluation.take(own)
            ranks[own] = target_ranks(model.best(users.histories(), 10), users.targets)
        shared = training.all_reduce_sum(torch.from_numpy(ranks).to(device)).cpu().numpy()
        return ranking(shared, cutoffs=(10,))

    result = training.fit(
        model,
        batches,
        schedule,
        device=device,
        validate=validate,
        objective="ndcg@10",
        hooks=hooks,
        name="sasrec",
        shapes=Shapes(
            rows=max(1, config.training.batch_size // training.world_size()) * config.max_history_items // 2,
            width=config.embedding_dim,
            hidden=4 * config.embedding_dim,
            heads=config.num_heads,
            head_dim=config.embedding_dim // config.num_heads,
            length=max(1, config.max_history_items // 2),
        ),
    )
    return model.eval(), result


def _padded(rows: Sequence[npt.NDArray[Any]]) -> Tensor:
    longest = max(map(len, rows))
    padded = np.full((len(rows), longest), _PAD, np.int64)
    for index, row in enumerate(rows):
        padded[index, : len(row)] = row
    return torch.from_numpy(padded)


@dataclass(frozen=True)
class SASRecJob(TrainingJob):
    """Training of the baseline on the artifact of a catalog; the weights are written to `target`."""

    config: SASRecConfig
    catalog: Folder
    target: Folder

    def run(self, device: torch.device, callbacks: Callbacks) -> dict[str, Any]:
        """Train; return the best validation metrics."""
        catalog = Catalog(open_artifact(self.catalog))
        model, result = sasrec.learn(self.config, catalog.histories, catalog.n_items, device=device, hooks=callbacks)
        return save_training_result(model, result, self.target)
