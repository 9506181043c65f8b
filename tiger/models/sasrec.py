"""SASRec (Kang and McAuley 2018) with cross-entropy over all items (Klenitskiy and Vasilev 2023).

A causal transformer over item embeddings; the output of a position is compared with the embeddings of all items.
ID-only: it uses neither text nor codes, so a new item has no embedding. The layers are those of RecBole: layer norm on
the embeddings and after every sublayer, GELU, weights from a normal distribution of 0.02. With pre-norm and no norm on
the embeddings, which start short, the first layers drown them: Recall@10 on Beauty is .0673 in place of .0759 (LOG.md).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from tiger.core.precision import Shapes
from tiger.data.histories import sample_users
from tiger.metrics.ranking import ranking, target_ranks
from tiger.models.base import ModelConfig, ModelData, ModelTraining
from tiger.models.padding import PAD, pad_right
from tiger.models.recommender import Recommender, Rows
from tiger.models.scoring import ScoringRecommender, top_items
from tiger.training import loop as training
from tiger.training.loop import Batch, Callbacks, FitResult

_USERS_PER_BATCH = 512


class SASRecTraining(ModelTraining):
    """How SASRec is trained."""

    epochs: int = Field(40, ge=1, description="passes over all users, at most")
    batch_size: int = Field(256, ge=1, description="users per step, over all workers")
    learning_rate: float = Field(1e-3, gt=0, description="AdamW's peak learning rate")
    warmup_steps: int = Field(100, ge=0, description="steps of linear warm-up, before a cosine to zero")
    validate_every_epochs: float = Field(2.0, gt=0, description="epochs between two validations")
    patience: int = Field(5, ge=1, description="validations without a better one before training stops")


class Config(ModelConfig):
    """Sizes of SASRec and its training."""

    kind: Literal["sasrec"] = Field("sasrec", description="self-attentive sequential recommendation, without text")

    embedding_dim: int = Field(64, ge=2, description="of item embeddings")
    num_layers: int = Field(2, ge=1, description="transformer layers")
    num_heads: int = Field(2, ge=1, description="attention heads")
    dropout: float = Field(0.5, ge=0, lt=1, description="on embeddings, attention and feed-forward")
    max_history_items: int = Field(50, ge=1, description="most recent items that are read")
    training: SASRecTraining = SASRecTraining()


class SASRec(nn.Module):
    """Self-attention over item embeddings."""

    def __init__(self, config: Config, num_items: int) -> None:
        super().__init__()
        self.max_items = config.max_history_items
        self.items = nn.Embedding(num_items, config.embedding_dim)
        self.positions = nn.Embedding(config.max_history_items, config.embedding_dim)
        self.norm, self.dropout = nn.LayerNorm(config.embedding_dim), nn.Dropout(config.dropout)
        layer = nn.TransformerEncoderLayer(
            config.embedding_dim,
            config.num_heads,
            4 * config.embedding_dim,
            config.dropout,
            F.gelu,
            batch_first=True,
        )
        self.layers = nn.TransformerEncoder(layer, config.num_layers, enable_nested_tensor=False)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def states(self, history: Tensor) -> Tensor:
        """Return the hidden state after each position, [B, N, M].

        Args:
            history: int64 [B, N], right-padded with -1, N at most `max_items`. The last item has the last position.
        """
        n_items = (history != PAD).sum(1, keepdim=True)
        position = (self.max_items - n_items + torch.arange(history.shape[1], device=history.device)).clamp_max(
            self.max_items - 1
        )
        x_BNM = self.dropout(self.norm(self.items(history.clamp_min(0)) + self.positions(position)))
        mask = nn.Transformer.generate_square_subsequent_mask(history.shape[1], device=history.device)
        states: Tensor = self.layers(x_BNM, mask=mask, is_causal=True)
        return states

    def forward(self, sequence: Tensor, targets: Tensor | None = None) -> Tensor:
        """Return the loss of each row, float32 [B]: the cross-entropies of all its items but the first, summed.

        Args:
            sequence: int64 [B, N + 1], padded behind with -1.
            targets: int64 [targets of all rows], where they are among the B x N items after the first ones; without it
                they are looked for on the device, which has to be waited for.
        """
        target_BN = sequence[:, 1:]
        known_BN = target_BN != PAD
        if targets is None:
            targets = known_BN.flatten().nonzero().squeeze(1)
        # Positions are those of the history: the last item is a target only.
        states_BNM = self.states(torch.where(known_BN, sequence[:, :-1], PAD))
        states, items = (x.flatten(0, 1).index_select(0, targets) for x in (states_BNM, target_BN.unsqueeze(2)))
        losses = F.cross_entropy(states @ self.items.weight.T, items.squeeze(1), reduction="none")
        return losses.new_zeros(target_BN.numel()).index_copy(0, targets, losses).view_as(target_BN).sum(1)

    @torch.inference_mode()
    def next_item_scores(self, histories: list[Rows]) -> Tensor:
        """Return the scores of all items after each history, float32 [B, items], on the CPU."""
        device, scores = self.items.weight.device, []
        for begin in range(0, len(histories), _USERS_PER_BATCH):
            rows = [history[-self.max_items :] for history in histories[begin : begin + _USERS_PER_BATCH]]
            states = self.states(pad_right(rows).to(device))
            last = torch.tensor([len(row) - 1 for row in rows], device=device)
            scores.append((states[torch.arange(len(rows), device=device), last] @ self.items.weight.T).cpu())
        return torch.cat(scores)


class SASRecRecommender(ScoringRecommender):
    """Ranks items by the product of their embeddings with the state after the last item."""

    def __init__(self, model: SASRec, data: ModelData, device: torch.device) -> None:
        super().__init__(data, device)
        self.model = model.to(device).eval()
        self.max_history_items = model.max_items

    def scores(self, histories: list[Rows]) -> npt.NDArray[Any]:
        """Return logits, float32 [B, items]."""
        scores: npt.NDArray[Any] = self.model.next_item_scores(histories).numpy()
        return scores


def build(config: Config, data: ModelData) -> SASRec:
    """Return the model before training, for the items of `data`."""
    return SASRec(config, data.num_items)


def recommender(module: SASRec, config: Config, data: ModelData, device: torch.device) -> Recommender:
    """Return a trained model, ready to recommend."""
    return SASRecRecommender(module, data, device)


def train(
    model: SASRec, config: Config, data: ModelData, *, device: torch.device, callbacks: Callbacks | None = None
) -> FitResult:
    """Train on the training parts of all histories; the best weights are chosen by NDCG@10 on validation.

    Raises:
        HealthError: the loss is not finite.
    """
    histories = data.histories
    model = model.to(device)
    training.broadcast(model)
    begins = np.maximum(histories.offsets[:-1], histories.train_end - config.max_history_items - 1)
    users = np.flatnonzero(histories.train_end - begins >= 2)
    lengths = (histories.train_end - begins)[users]
    evaluation = sample_users(histories.evaluation("valid"), config.training.validation_users, config.seed)

    def batches(epoch: int) -> Iterator[Batch]:
        """Batches of similar lengths, in random order."""
        random = np.random.default_rng([config.seed, epoch])
        order = np.lexsort((random.random(len(users)), lengths))
        pieces = np.split(order, range(config.training.batch_size, len(order), config.training.batch_size))
        for piece in random.permutation(len(pieces)):
            rows = pieces[piece]
            own, weights = training.share(torch.from_numpy(rows))
            sequences = [histories.items[begins[u] : histories.train_end[u]] for u in users[own.numpy()]]
            padded = pad_right(sequences)
            targets = (padded[:, 1:] != PAD).flatten().nonzero().squeeze(1)
            yield Batch((padded, targets), weights, float((lengths[rows] - 1).sum()))

    def validate(module: nn.Module) -> dict[str, float]:
        ranks = np.zeros(len(evaluation), np.int64)
        for own in np.split(np.arange(len(evaluation)), range(_USERS_PER_BATCH, len(evaluation), _USERS_PER_BATCH)):
            own = own[training.rank() :: training.world_size()]
            if len(own):
                users = evaluation.take(own)
                scores = model.next_item_scores([history.astype(np.int64) for history in users.histories()])
                ranks[own] = target_ranks(top_items(scores.numpy(), 10), users.targets)
        shared = training.all_reduce_sum(torch.from_numpy(ranks).to(device)).cpu().numpy()
        return ranking(shared, cutoffs=(10,))

    return training.fit(
        model,
        batches,
        config.training.schedule(len(users), config.seed),
        device=device,
        validate=validate,
        objective="ndcg@10",
        hooks=callbacks,
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
